"""Extreme numbers in weights, activations and samples: NaN, Inf, overflow, zeros and denormals.

A small model is compiled and verified against its float weights; no case may end in a traceback or in NaN.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlqc
from tests.support.compiled_folder import make_content
from tests.support.tiny import damaged, synthetic_sample
from vlqc.emit.stage_tensors import float_tensor
from vlqc.errors import UserError
from vlqc.passes.algorithms.hessian import hessian_blocks
from vlqc.verify.findings import VerificationResult

IMAGE, START, END = 45, 43, 44
Change = Callable[[dict[str, Tensor]], Any]
W4 = {"w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False, "group_size": 64}
ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"


def source(folder: Path, change: Change = lambda tensors: None, stored: torch.dtype | None = None, **how: Any) -> Path:
    """Writes a float checkpoint with one vision block and two decoder layers. change: modifies its tensors in place."""
    content = make_content(**how)
    if "scheme" in how:  # its heads are wider
        content.config["rope_scaling"] = {"type": "mrope", "mrope_section": [4, 6, 6]}
    model = content.write_source(folder)
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    if stored is not None:
        tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    save_file({name: it.contiguous() for name, it in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    return model


def image_sample(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    ids = [1, START, *[IMAGE] * 8, END, *torch.randint(2, 40, (9,), generator=random).tolist()]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "pixel_values": torch.randn(32, 1176, generator=random),
        "image_grid_thw": torch.tensor([[1, 4, 8]]),
    }


def one_token() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 1, dtype=torch.int64)}


def compiled(model: Path, out: Path, *samples: dict[str, Tensor], **options: Any) -> VerificationResult:
    calibration = list(samples) or [image_sample(), image_sample(1)]
    vlqc.compile(model_path=model, save_directory=out, samples=calibration, **options)
    return vlqc.verify_folder(out, model_path=model, samples=calibration)


def faults_of(report: VerificationResult) -> str:
    """All faults except of the fit to the float weights, for which matrices of 32 columns are too small, and of values
    between layers beyond float16, which the models of the cases have."""
    others = (finding for finding in report.faults if "between layers" not in finding.what)
    faults = [finding for finding in others if finding.check != "float weights"]
    return "\n".join(f"{finding.where}: {finding.what}" for finding in faults)


def matrices(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensor for name, tensor in tensors.items() if tensor.ndim == 2 and "embed" not in name]


# ---- errors ----------------------------------------------------------------------------------------------------------


def refused(model: Path, out: Path, *samples: dict[str, Tensor], **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        compiled(model, out, *samples, **options)
    assert not out.exists()
    return str(caught.value)


STOPS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a product beyond float32": (
        lambda t: (t[f"{MLP}.up_proj.weight"].mul_(1e30), t[f"{MLP}.gate_proj.weight"].mul_(1e30)),
        (f"the input of {MLP}.down_proj", "NaN or Inf", "sample 0", "model.layers.1, %"),
    ),
    "squares beyond float32": (
        lambda t: t[f"{MLP}.up_proj.weight"].mul_(1e20),
        (f"the input of {MLP}.down_proj reaches", "sample 0", "model.layers.1, %"),
    ),
    "NaN out of a softmax": (
        lambda t: t[f"{ATTENTION}.q_proj.weight"].mul_(3e38),
        (f"the input of {ATTENTION}.o_proj", "NaN or Inf", "sample 0", "model.layers.1, %"),
    ),
    "only what the last stage returns": (
        lambda t: t[f"{MLP}.down_proj.weight"].mul_(1e30),
        ("the output of model.layers.1 reaches", "sample 0"),
    ),
    "in the vision tower": (
        lambda t: t["visual.patch_embed.proj.weight"].mul_(3e38),
        ("visual.blocks.0", "sample 0"),
    ),
}


@pytest.mark.parametrize("case", STOPS)
def test_float32_overflow_is_an_error(tmp_path: Path, case: str) -> None:
    """Catches NaN in scales, an InternalError, and a message without stage, node and sample."""
    change, words = STOPS[case]
    message = refused(source(tmp_path / "model", change, torch.float32), tmp_path / "out")
    for word in words:
        assert word in message, message


def test_the_right_sample_is_named(tmp_path: Path) -> None:
    """Catches an error that names the first sample instead of the one with an extreme embedding."""
    model = source(tmp_path / "model", lambda t: t["model.embed_tokens.weight"][41].fill_(1e25), torch.float32)
    sample = one_token()
    sample["input_ids"] = torch.tensor([[1, 2, 41]])
    sample["attention_mask"] = torch.ones(1, 3, dtype=torch.int64)
    message = refused(model, tmp_path / "out", image_sample(), image_sample(1), sample)
    assert "sample 2" in message and "model.layers.0" in message


@pytest.mark.parametrize("method", ["gptq", "round"])
@pytest.mark.parametrize("value", [1e30, -1e30, 2e4])
def test_extreme_pixels_are_an_error(tmp_path: Path, value: float, method: str) -> None:
    """Catches a failing factorization, or a result computed from such pixels."""
    sample = image_sample()
    sample["pixel_values"][3, 5] = value
    message = refused(source(tmp_path / "model"), tmp_path / "out", image_sample(1), sample, weight_method=method)
    assert "samples[1]" in message and "pixel_values reaches" in message


def test_a_stage_that_no_sample_reaches(tmp_path: Path) -> None:
    """Catches a vision tower that is quantized without activations."""
    message = refused(source(tmp_path / "model"), tmp_path / "out", one_token())
    assert "no calibration sample has an image" in message


def test_a_norm_beyond_float16_is_an_error(tmp_path: Path) -> None:
    """Catches Inf in an emitted float16 tensor."""
    for value in (65505.0 * 2, -1e6, math.inf):
        with pytest.raises(UserError, match=r"model\.norm\.weight cannot be stored") as caught:
            float_tensor("model.norm.weight", torch.tensor([1.0, value]), torch.float16)
        assert "float16" in str(caught.value)
    assert float(float_tensor("x", torch.tensor([65504.0]), torch.float16).tensor) == 65504.0


def test_folding_stays_within_float16(tmp_path: Path) -> None:
    """Catches smoothing scales that overflow a float16 norm; channels at its limit must stay unscaled."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.input_layernorm.weight"].fill_(6.5e4)
        for member in "qkv":
            tensors[f"{ATTENTION}.{member}_proj.weight"].mul_(1e-4)

    model = source(tmp_path / "model", change, torch.float16, dtype="float16")
    report = compiled(model, tmp_path / "out", anti_method="m4", anti_alpha=1.0, rotate="none")
    assert faults_of(report) == ""
    stored = load_file(next((tmp_path / "out").glob("*.safetensors")))
    norm = stored["model.layers.1.input_layernorm.weight"].float()
    assert bool((norm == 64992).any()) and float(norm.min()) < 5e4 and float(norm.max()) <= 65504


# ---- valid extremes --------------------------------------------------------------------------------------------------


def no_rows(tensors: dict[str, Tensor]) -> None:
    for matrix in matrices(tensors):
        matrix[3] = 0


def no_columns(tensors: dict[str, Tensor]) -> None:
    for matrix in matrices(tensors):
        matrix[:, :64] = 0  # whole groups of 64


def no_matrix(tensors: dict[str, Tensor]) -> None:
    for name in ("visual.blocks.0.attn.qkv", f"{ATTENTION}.q_proj", f"{MLP}.up_proj"):
        tensors[f"{name}.weight"].zero_()


def no_tiny_matrix(tensors: dict[str, Tensor]) -> None:
    tensors["visual.blocks.1.attn.qkv.weight"].zero_()
    tensors["model.layers.1.self_attn.q_proj.weight"].zero_()


def silent_channels(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.input_layernorm.weight"][7] = 0
    tensors["visual.blocks.0.norm1.weight"][:5] = 0
    tensors["model.layers.1.input_layernorm.weight"].zero_()  # constant: zero for every token


def faint_weights(tensors: dict[str, Tensor]) -> None:
    for matrix in matrices(tensors):
        matrix[5], matrix[:, 9] = 1e-42, 3e-39


def faint_activations(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.input_layernorm.weight"].mul_(1e-40)
    tensors["visual.blocks.0.norm1.weight"].mul_(1e-41)


def large_float16(tensors: dict[str, Tensor]) -> None:
    """Inputs of down_proj and a residual stream beyond 65504."""
    tensors[f"{MLP}.up_proj.weight"].mul_(2e3)
    tensors["model.layers.0.mlp.gate_proj.weight"].mul_(100)
    tensors["model.layers.0.mlp.up_proj.weight"].mul_(2e3)


W8: dict[str, Any] = {}
DYNAMIC = {"is_dynamic": True}
WORKS: dict[str, tuple[Change, dict[str, Any], torch.dtype]] = {
    "zero rows": (no_rows, W8, torch.bfloat16),
    "zero rows, 4 bits": (no_rows, W4, torch.bfloat16),
    "empty groups": (no_columns, W4, torch.bfloat16),
    "zero columns": (no_columns, W8, torch.bfloat16),
    "zero matrices": (no_matrix, W8, torch.float32),
    "zero matrices, computed scales": (no_matrix, {"anti_method": "m4"}, torch.bfloat16),
    "constant channels": (silent_channels, {"act_method": 3}, torch.bfloat16),
    "constant channels, shifted": (silent_channels, {"shift": True, "anti_method": "m4"}, torch.bfloat16),
    "constant channels, 4 bits": (silent_channels, W4, torch.bfloat16),
    "denormal weights": (faint_weights, W8, torch.float32),
    "denormal weights, 4 bits": (faint_weights, W4, torch.float32),
    "denormal activations": (faint_activations, W8, torch.float32),
    "denormal activations, per token": (faint_activations, DYNAMIC, torch.float32),
    "beyond float16": (large_float16, W8, torch.float16),
}


@pytest.mark.parametrize("case", WORKS)
def test_valid_extremes_are_compiled_correctly(tmp_path: Path, case: str) -> None:
    """Catches a division by zero, a scale of 0 or Inf, and a failing proof or verification."""
    change, options, dtype = WORKS[case]
    how: dict[str, Any] = {"dtype": "float16"} if dtype == torch.float16 else {}
    how |= {"scheme": "W4A8_DYNAMIC"} if options is W4 else {}  # wide enough for groups
    report = compiled(source(tmp_path / "model", change, dtype, **how), tmp_path / "out", **options)
    assert faults_of(report) == ""
    assert report.facts["logits against float"]["SQNR dB"] > (10 if options is W4 else 20)


@pytest.mark.parametrize("change", [no_tiny_matrix, faint_activations], ids=["zero matrices", "denormal activations"])
def test_valid_extremes_match_the_float_weights(tmp_path: Path, change: Change) -> None:
    """Catches verification faults for weights that are zero or denormal in the float checkpoint."""
    model = damaged(tmp_path / "model", tensors=change)
    samples = [synthetic_sample((4, 8), seed=1), synthetic_sample(words=9, seed=2)]
    report = compiled(model, tmp_path / "out", *samples, weight_method="round", rotate="none")
    assert [f"{finding.where}: {finding.what}" for finding in report.faults] == []


def test_a_sample_of_one_token(tmp_path: Path) -> None:
    """Catches statistics that need two rows, and a probe of one row."""
    report = compiled(source(tmp_path / "model"), tmp_path / "out", one_token(), image_sample())
    assert faults_of(report) == ""


def test_singular_correlations(tmp_path: Path) -> None:
    """Catches an exception of the factorization for a matrix that rounding made singular."""
    rows = torch.ones(3, 4) * torch.tensor([1.0, 1e18, 1.0, 1e18])
    rows[1] *= -1e19  # squares beyond float32
    weight, importance = torch.full((3,), 1 / 3, dtype=torch.float64), torch.ones(4)
    (block,) = hessian_blocks(rows, weight, importance, torch.arange(4), 4)
    assert bool(torch.isfinite(block.importance).all()) and torch.equal(block.propagation, torch.eye(4))
