"""The float checkpoint as verify reads it with NumPy: equal, bit for bit, to what the compiler reads with PyTorch."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.adapters import low_rank, random, write_adapter
from tests.support.checkpoints import write
from tests.support.float8 import float8_weight
from vlqc.families.registry import find_family
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.verify.findings import VerificationResult
from vlqc.verify.float_match.compare import open_source
from vlqc.verify.float_match.read_source import float8_values, forget_adapters
from vlqc.verify.folder.adapters import check_adapters

LAYER = "model.language_model.layers.0"
EXPERTS, Q, TABLE = f"{LAYER}.mlp.experts", f"{LAYER}.self_attn.q_proj", "model.language_model.embed_tokens"


def test_every_byte_of_an_8_bit_float() -> None:
    """Catches a wrong exponent, subnormal number, sign or NaN."""
    expected = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(float8_values(), expected, equal_nan=True)
    numbers = ~np.isnan(expected)
    assert np.array_equal(np.signbit(float8_values())[numbers], np.signbit(expected)[numbers])


def tensors(dtype: torch.dtype, transposed: bool) -> dict[str, Tensor]:
    gate_up, scale, _ = float8_weight((3, 8, 12) if transposed else (3, 12, 8), (4, 5))
    down, of_down, _ = float8_weight((3, 6, 8) if transposed else (3, 8, 6), (4, 5))
    q, of_q, _ = float8_weight((9, 8), (4, 5), seed=1)
    return {
        f"{EXPERTS}.gate_up_proj": gate_up, f"{EXPERTS}.gate_up_proj_scale_inv": scale,
        f"{EXPERTS}.down_proj": down, f"{EXPERTS}.down_proj_scale_inv": of_down,
        f"{Q}.weight": q, f"{Q}.weight_scale_inv": of_q, f"{Q}.bias": random(9, seed=2, dtype=dtype),
        f"{TABLE}.weight": random(20, 8, seed=3, dtype=dtype), "lm_head.weight": random(20, 8, seed=4, dtype=dtype),
        "model.visual.patch_embed.proj.weight": random(4, 3, 2, 2, 2, seed=5, dtype=dtype),
    }  # fmt: skip


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_both_readers_agree(tmp_path: Path, transposed: bool, dtype: torch.dtype, dora: bool, prefix: str) -> None:
    """Catches a sum, scale, rounding or name that only one of the two readers has."""
    model = write(tmp_path / "model", {prefix + name: each for name, each in tensors(dtype, transposed).items()})
    settings = {"quant_method": "fp8", "weight_block_size": [4, 5]}
    config = {"model_type": "qwen3_vl_moe", "text_config": {"hidden_size": 8}, "quantization_config": settings}
    (model / "config.json").write_text(json.dumps(config))
    q = low_rank(Q, 9, 8) | ({f"{Q}.lora_magnitude_vector": random(9)} if dora else {f"{Q}.lora_B.bias": random(9)})
    rest = {
        f"{TABLE}.lora_embedding_A": random(2, 20), f"{TABLE}.lora_embedding_B": random(8, 2),
        "lm_head.weight": random(20, 8, seed=9), "model.visual.patch_embed.proj.lora_A.weight": random(2, 3, 2, 2, 2),
        "model.visual.patch_embed.proj.lora_B.weight": random(4, 2, 1, 1, 1),
        **low_rank(f"{EXPERTS}.1.up_proj", 6, 8), **low_rank(Q, 9, 8, seed=5),
    }  # fmt: skip
    lora = [write_adapter(tmp_path / "q", q, use_dora=dora), write_adapter(tmp_path / "rest", rest)]
    structure: Any = SimpleNamespace(family=find_family(config), embedding=TABLE, output_head="lm_head", tied=False)
    forget_adapters()
    source, checkpoint = open_source(model, structure, lora), Checkpoint(model, lora)
    assert sorted(source) == checkpoint.names
    for name in checkpoint.names:
        read = checkpoint.tensor(name)
        assert source[name].shape == tuple(read.shape)
        assert np.array_equal(source[name].read(), read.float().numpy()), name
        assert np.array_equal(source[name].part(1, 3), read[1:3].float().numpy()), name


def statement(folder: Path, *adapters: Path) -> None:
    checkpoint = Checkpoint(folder.parent / "model", adapters)
    entries = [{"name": adapter.name, "sha256": adapter.sha256} for adapter in checkpoint.adapters]
    folder.mkdir(exist_ok=True)
    (folder / "vlqc_report.json").write_text(json.dumps({"adapters": entries}))


def test_adapters_of_the_folder_and_of_the_comparison(tmp_path: Path) -> None:
    """Catches a folder with a merged adapter whose faults do not say why, and an adapter of the same name."""
    write(tmp_path / "model", {f"{Q}.weight": torch.ones(9, 8)})
    one, two = (write_adapter(tmp_path / name / "a", low_rank(Q, 9, 8, seed=len(name))) for name in ("x", "xy"))
    statement(tmp_path / "out", one, two)
    found = {}
    for name, lora in {"same": [one, two], "none": [], "other": [one], "order": [two, one]}.items():
        result = VerificationResult("out")
        found[name] = (check_adapters(tmp_path / "out", lora, result), len(result.faults))
    assert found == {"same": (True, 0), "none": (False, 1), "other": (False, 1), "order": (False, 1)}
