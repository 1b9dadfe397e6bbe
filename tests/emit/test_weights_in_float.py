"""Integer weights that engines multiply with their scale in the dtype of the float tensors."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlqc.emit.stage_tensors import module_tensors
from vlqc.errors import UserError
from vlqc.families.qwen2 import QWEN2
from vlqc.kernels_ref.quant_linear import DynamicQuantLinear, WeightOnlyQuantLinear

LAYER = "model.layers.0.mlp.up_proj"


def test_weights_beyond_float16() -> None:
    """Catches a W8A16 folder whose weights are Inf in the engine; a scale per token is applied to the sums instead."""
    tensors = {
        "weight": torch.tensor([[1, -127], [2, 3]], dtype=torch.int8),
        "weight_scale": torch.tensor([[768.0], [1.0]]),  # 127 * 768 = 97536
        "weight_offset": torch.zeros(2, 1),
    }
    stage: Any = SimpleNamespace(family=QWEN2, dtype=torch.float16, checkpoint_name=lambda path: path)
    with pytest.raises(UserError, match="97536 is beyond float16"):
        list(module_tensors(stage, LAYER, WeightOnlyQuantLinear(**tensors), packed=True))
    assert len(list(module_tensors(stage, LAYER, DynamicQuantLinear(**tensors), packed=True))) == len(tensors)
    stage.dtype = torch.bfloat16
    assert len(list(module_tensors(stage, LAYER, WeightOnlyQuantLinear(**tensors), packed=True))) == len(tensors)
