"""Checkpoints of 8-bit floats with scales: read as the bfloat16 numbers that they stand for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import write
from tests.support.float8 import float8_weight
from vlqc.errors import UserError
from vlqc.frontend.checkpoint.checkpoint import Checkpoint

Q = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.language_model.layers.0.mlp.experts"
SETTINGS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}


def checkpoint(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any], **config: Any) -> Checkpoint:
    write(folder, tensors)
    content = {"model_type": "qwen2_5_vl", "quantization_config": SETTINGS | settings, **config}
    (folder / "config.json").write_text(json.dumps(content))
    return Checkpoint(folder)


@pytest.mark.parametrize(
    ("block", "shape", "suffix", "as_stored"),
    [
        ((2, 3), (5, 7), "_scale_inv", None),  # blocks that are cut at both edges
        ((2, 3), (4, 6), "_scale_inv", None),
        ((128, 128), (3, 130), "_scale_inv", None),
        ((1, 7), (5, 7), "_scale", None),  # a scale per row
        ((5, 7), (5, 7), "_scale", ()),  # one for all
        ((5, 7), (5, 7), "_scale_inv", (1,)),
    ],
)
def test_a_matrix_is_the_product_rounded_once(
    tmp_path: Path, block: tuple[int, int], shape: tuple[int, int], suffix: str, as_stored: tuple[int, ...] | None
) -> None:
    """Catches scales of the wrong block, division in place of multiplication, and a dtype that is not bfloat16."""
    stored, scale, meant = float8_weight(shape, block)
    tensors = {
        f"{Q}.weight": stored, f"{Q}.weight{suffix}": scale if as_stored is None else scale.reshape(as_stored),
        f"{Q}.input_scale": torch.ones(()), f"{Q}.bias": torch.ones(shape[0], dtype=torch.bfloat16),
    }  # fmt: skip
    read = checkpoint(tmp_path, tensors, {"weight_block_size": list(block)})
    assert read.names == [f"{Q}.bias", f"{Q}.weight"]
    assert read.stored_dtype(f"{Q}.weight") == read.dtype == torch.bfloat16 and read.shape(f"{Q}.weight") == shape
    assert torch.equal(read.tensor(f"{Q}.weight"), meant)
    indices = torch.tensor([[2, 0], [1, 2]])
    assert torch.equal(read.rows(f"{Q}.weight", indices), meant[indices])
    read.check_not_quantized()
    assert "quantization_config" not in read.config and any("8-bit floats" in note for note in read.notes)


@pytest.mark.parametrize("transposed", [True, False])
def test_experts_in_one_tensor(tmp_path: Path, transposed: bool) -> None:
    """Catches scales of another expert, of the wrong half of a fused tensor, or of rows in place of columns."""
    shape = (3, 8, 12) if transposed else (3, 12, 8)
    gate_up, scale, meant = float8_weight(shape, (4, 5))
    down, of_down, _ = float8_weight((3, 6, 8) if transposed else (3, 8, 6), (4, 5))
    tensors = {
        f"{EXPERTS}.gate_up_proj": gate_up, f"{EXPERTS}.gate_up_proj_scale_inv": scale,
        f"{EXPERTS}.down_proj": down, f"{EXPERTS}.down_proj_scale_inv": of_down.to(torch.bfloat16),
    }  # fmt: skip
    sizes = {"model_type": "qwen3_vl_moe", "text_config": {"hidden_size": 8}}
    read = checkpoint(tmp_path, tensors, {"weight_block_size": [4, 5]}, **sizes)
    for expert in range(3):
        matrix = meant[expert].T if transposed else meant[expert]
        assert torch.equal(read.tensor(f"{EXPERTS}.{expert}.gate_proj.weight"), matrix[:6])
        assert torch.equal(read.tensor(f"{EXPERTS}.{expert}.up_proj.weight"), matrix[6:])
    assert f"{EXPERTS}.gate_up_proj_scale_inv" not in read


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{Q}.weight_scale_inv": None}, "without scales"),
        ({f"{Q}.weight_scale_inv": torch.ones(2, 2)}, "does not fit the weight [5, 7]"),
        ({f"{Q}.weight_scale_inv": torch.ones(3, 3, dtype=torch.uint8)}, "U8"),
        ({f"{Q}.weight": torch.ones(5, 7).to(torch.float8_e5m2)}, "F8_E5M2"),
    ],
)
def test_other_forms_are_refused_by_name(tmp_path: Path, change: dict[str, Tensor | None], words: str) -> None:
    """Catches 8-bit floats that are read without their scales, or with those of another form."""
    stored, scale, _ = float8_weight((5, 7), (2, 3))
    tensors = {f"{Q}.weight": stored, f"{Q}.weight_scale_inv": scale, **change}
    with pytest.raises(UserError) as caught:
        checkpoint(tmp_path, {name: each for name, each in tensors.items() if each is not None}, {
            "weight_block_size": [2, 3]
        })  # fmt: skip
    assert words in str(caught.value) and "quantized" in str(caught.value)


def test_all_weights_without_scales_are_one_fault(tmp_path: Path) -> None:
    """Catches one fault per weight, and advice to download again what never had scales."""
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(30)]
    with pytest.raises(UserError) as caught:
        checkpoint(tmp_path, {name: torch.ones(2, 2).to(torch.float8_e4m3fn) for name in names}, {})
    assert len(caught.value.faults) == 1 and "30 weights" in str(caught.value)
    assert "download" not in str(caught.value)


# ---- float checkpoints that are taken for quantized ones, and the other way round ----------------------------------


FLOAT = {f"{Q}.weight": torch.ones(2, 4, dtype=torch.bfloat16)}


def test_a_leftover_statement_beside_float_weights(tmp_path: Path) -> None:
    """Catches a float checkpoint that is refused because a merge left quantization_config behind."""
    read = checkpoint(tmp_path, FLOAT, {"quant_method": "bitsandbytes"})
    read.check_not_quantized()
    assert "quantization_config" not in read.config and any("quantization_config" in note for note in read.notes)


@pytest.mark.parametrize("name", ["visual.blocks.0.position_ids", "model.rotary_emb.inv_freq", "num_batches_tracked"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_a_buffer_of_integers(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Catches a buffer that is taken for a quantized weight."""
    checkpoint(tmp_path, {**FLOAT, name: torch.ones(3).to(dtype)}, {}).check_not_quantized()


@pytest.mark.parametrize(
    ("tensors", "method", "words"),
    [
        ({f"{Q}.qweight": torch.int32, f"{Q}.qzeros": torch.int32}, "awq", "awq, 2 tensors of dtype I32"),
        ({f"{Q}.qweight": torch.int32, f"{Q}.g_idx": torch.int32}, "gptq", "gptq"),
        ({f"{Q}.weight_packed": torch.int32}, "compressed-tensors", "compressed-tensors"),
        ({f"{Q}.weight": torch.uint8}, "bitsandbytes", "bitsandbytes, 1 tensor of dtype U8"),
        ({f"{Q}.weight": torch.int8}, None, "1 tensor of dtype I8"),
        ({f"{EXPERTS}.gate_up_proj_blocks": torch.uint8}, "mxfp4", "mxfp4"),
    ],
)
def test_quantized_weights_are_named_as_what_they_are(
    tmp_path: Path, tensors: dict[str, torch.dtype], method: str | None, words: str
) -> None:
    """Catches integers that are read as a weight, and an error that does not say of which kind they are."""
    stored = {name: torch.ones(2, 4, dtype=dtype) for name, dtype in tensors.items()}
    norm = {"model.norm.weight": torch.ones(4)}
    read = checkpoint(tmp_path, stored | norm, {"quant_method": method})
    with pytest.raises(UserError, match="quantized already") as caught:
        read.check_not_quantized()
    assert words in str(caught.value)
