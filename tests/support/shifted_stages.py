"""Stages whose inputs lie on one side, before and after shift-norms."""

import torch

from tests.support.random_stage import decoder
from vlqc.ir.stage import Stage
from vlqc.kernels_ref.norm import ShiftedNorm

NORMS = {"input_layernorm": ("q", "k", "v"), "post_attention_layernorm": ("gate", "up")}


def one_sided(dtype: torch.dtype = torch.bfloat16, *, outliers: bool = False) -> Stage:
    """A decoder whose residual has channels that are always far from zero: behind norms they keep one sign."""
    stage = decoder(outliers=outliers, dtype=dtype)
    for call in stage.execution.calls:
        call.args[0][..., 3] = (call.args[0][..., 3] + 40).to(dtype).float()
        call.args[0][..., 21] = (call.args[0][..., 21] - 25).to(dtype).float()
    return stage


def shifted(stage: Stage) -> set[str]:
    return {path for path, module in stage.module.named_modules() if isinstance(module, ShiftedNorm)}
