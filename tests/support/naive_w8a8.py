"""W8A8 without any smoothing, simulated in floating point on the Hugging Face model: what outliers do to it.

Written against transformers alone, so that the checkpoint makers are judged by arithmetic that is not the compiler's.
"""

import copy
import json
import re
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from tools.demo.tiny_task import with_token_types

LEFT_FLOAT = re.compile(r"lm_head|merger|down_proj|linear_fc2|mlp\.gate$")


def load_float(folder: Path) -> nn.Module:
    """The checkpoint in float32, in the class that its config names."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model: nn.Module = getattr(transformers, architecture).from_pretrained(folder)
    return model.float().eval()


def _with_token_types(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    return with_token_types(sample) if "pixel_values" in sample else sample


@torch.no_grad()
def logits(model: nn.Module, samples: list[dict[str, Tensor]]) -> Tensor:
    """Logits [all tokens, vocabulary] of the samples one after the other."""
    return torch.cat([model(**_with_token_types(sample), use_cache=False).logits[0].float() for sample in samples])


def signal_to_noise(reference: Tensor, other: Tensor) -> float:
    """10 log10 of the power of the reference over the power of the difference, in dB."""
    reference, other = reference.double(), other.double()
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()))


@torch.no_grad()
def quantized(model: nn.Module, calibration: list[dict[str, Tensor]]) -> nn.Module:
    """A copy whose Linears round weights per row (absmax / 127), inputs per tensor (asymmetric, running extremes)."""
    model = copy.deepcopy(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linears = {name: module for name, module in linears.items() if not LEFT_FLOAT.search(name)}
    extremes = dict.fromkeys(linears, (0.0, 0.0))
    hooks = []
    for name, linear in linears.items():

        def observe(_: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
            low, high = extremes[name]
            extremes[name] = (min(low, inputs[0].min().item()), max(high, inputs[0].max().item()))

        hooks.append(linear.register_forward_pre_hook(observe))
    logits(model, calibration)
    for hook in hooks:
        hook.remove()
    for name, linear in linears.items():
        step = linear.weight.abs().amax(1, keepdim=True) / 127
        linear.weight.copy_((linear.weight / step).round().clamp(-127, 127) * step)
        low, high = extremes[name]
        scale = (high - low) / 255
        offset = -128 - round(low / scale)

        def round_input(
            _: nn.Module, inputs: tuple[Tensor], scale: float = scale, offset: int = offset
        ) -> tuple[Tensor]:
            return (((inputs[0] / scale + offset).round().clamp(-128, 127) - offset) * scale,)

        linear.register_forward_pre_hook(round_input)
    return model
