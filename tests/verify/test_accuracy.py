"""Verification of outputs: every stage and the logits of a folder against those of the float checkpoint."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console

from tests.support.compiled_folder import FolderContent, make_content
from tests.support.tensors import stored
from vlqc.errors import UserError
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.streamed_model import model_inputs
from vlqc.verify import verify_folder
from vlqc.verify.findings import VerificationResult
from vlqc.verify.loader import load

STAGES = ["visual.blocks.0", "visual.merger", "model.layers.0", "model.layers.1"]


def sample(seed: int, *, has_image: bool = True, padding: int = 0) -> dict[str, torch.Tensor]:
    """One image of 8 x 8 patches (16 image tokens) and text, or text alone, after `padding` padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 40, (6,), generator=generator)
    image = torch.tensor([43, *[45] * 16, 44]) if has_image else torch.tensor([], dtype=torch.long)
    ids = torch.cat([torch.zeros(padding, dtype=torch.long), image, text])[None]
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if has_image:
        inputs["pixel_values"] = torch.randn(64, 1176, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 8, 8]])
    return inputs


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_content().write_source(tmp_path / "float")


def verify(content: FolderContent, folder: Path, source: Path, **options: float) -> VerificationResult:
    return verify_folder(content.write(folder), model_path=source, samples=[sample(1), sample(2)], **options)


def whole_logits(source: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    dtype = {"dtype" if transformers.__version__ >= "5" else "torch_dtype": torch.float32}
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(source, **dtype).eval()
    with torch.no_grad():
        return model(**model_inputs(model, QWEN2_5_VL, inputs)).logits[0]


def test_figures_are_those_of_two_plain_forwards(tmp_path: Path, source: Path) -> None:
    """Catches logits of other hidden states, tokens or heads than the models' own, or of padding."""
    samples = [sample(1), sample(2, has_image=False), sample(3, padding=3)]
    folder = make_content().write(tmp_path / "out")
    result = verify_folder(folder, model_path=source, samples=samples)
    quantized = load(folder)
    pairs = []
    for inputs in samples:
        kept = inputs["attention_mask"][0].bool()
        with torch.no_grad():
            other = quantized(**model_inputs(quantized, QWEN2_5_VL, inputs)).logits[0]
        pairs.append((whole_logits(source, inputs)[kept].double().numpy(), other[kept].double().numpy()))
    for (reference, other), figures in zip(pairs, result.facts["logits per sample"], strict=True):
        check_figures(figures, reference, other)
    reference, other = (np.concatenate(side) for side in zip(*pairs, strict=True))
    check_figures(result.facts["logits against float"], reference, other)
    assert result.ok
    assert result.examined["logits"] == 3


def check_figures(figures: dict[str, float], reference: np.ndarray, other: np.ndarray) -> None:
    """Recomputes the figures from their definitions with NumPy."""
    noise = other - reference
    assert figures["SQNR dB"] == pytest.approx(10 * math.log10((reference**2).sum() / (noise**2).sum()), abs=0.02)
    cosine = (reference * other).sum() / np.sqrt((reference**2).sum() * (other**2).sum())
    assert figures["cosine"] == pytest.approx(cosine, abs=1e-5)
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (reference, other))
    assert figures["KL"] == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), abs=1e-5)
    assert figures["top-1 agreement"] == pytest.approx((p.argmax(1) == q.argmax(1)).mean(), abs=1e-4)
    assert figures["tokens"] == len(reference)


def test_every_stage_is_measured(tmp_path: Path, source: Path) -> None:
    """Catches a stage that is left out, or a model that is compared with itself (infinite SQNR)."""
    result = verify(make_content(), tmp_path / "out", source)
    assert [row["stage"] for row in result.facts["stages against float"]] == STAGES
    assert all(20 < row["SQNR dB"] < 100 for row in result.facts["stages against float"])
    assert result.examined["stage outputs"] == 2 * len(STAGES)


def test_a_stage_is_measured_by_itself(tmp_path: Path, source: Path) -> None:
    """Catches stages that run on their quantized predecessors' outputs: one damage would change all later figures."""
    good = verify(make_content(), tmp_path / "good", source).facts["stages against float"]
    content = make_content()
    name = "model.layers.0.mlp.down_proj.weight"
    content.tensors[name] = stored(np.zeros((64, 96)), "BF16")
    bad = verify(content, tmp_path / "bad", source).facts["stages against float"]
    changed = [row["stage"] for row, before in zip(bad, good, strict=True) if row != before]
    assert changed == ["model.layers.0"]


def test_a_broken_stage_is_a_fault(tmp_path: Path, source: Path) -> None:
    """Catches a stage of pure noise without a fault."""
    content = make_content()
    name = "visual.merger.mlp.2.weight"
    content.tensors[name] = stored(np.random.default_rng(1).standard_normal((64, 128)), "BF16")
    result = verify(content, tmp_path / "out", source)
    faults = [finding for finding in result.faults if finding.check == "stage outputs"]
    assert [finding.where for finding in faults] == ["visual.merger"]
    assert "SQNR" in faults[0].what


def test_a_folder_that_cannot_be_run_on_the_samples_is_a_fault(tmp_path: Path, source: Path) -> None:
    """Catches an internal error for a damaged config.json with which transformers finds no place for the images."""
    content = make_content()
    content.config["image_token_id"] = 40
    result = verify(content, tmp_path / "out", source)
    faults = [finding for finding in result.faults if finding.check == "stage outputs"]
    assert [fault.where for fault in faults] == [str(tmp_path / "out")] and "image" in faults[0].what.lower()


def test_what_a_stage_adds_is_broken(tmp_path: Path, source: Path) -> None:
    """Catches a block that adds almost nothing to its input any more, whose output is close to the float one."""
    content = make_content()
    for name in ("model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"):
        weight = content.tensors[f"{name}.weight"]
        weight.data = bytes(len(weight.data))
    result = verify(content, tmp_path / "out", source)
    assert {"model.layers.1"} <= {fault.where for fault in result.faults if fault.check == "stage outputs"}


def test_logits_of_noise_are_a_fault(tmp_path: Path, source: Path) -> None:
    """Catches logits without a relation to the float model's, from weights outside of the stages."""
    content = make_content()
    content.tensors["lm_head.weight"] = stored(np.random.default_rng(2).standard_normal((48, 64)), "BF16")
    result = verify(content, tmp_path / "out", source)
    assert [fault.where for fault in result.faults if fault.check == "logits"] == ["all samples"]


def test_min_sqnr(tmp_path: Path, source: Path) -> None:
    """Catches a threshold that never fails, or fails above it."""
    folder = make_content().write(tmp_path / "out")
    options = {"model_path": source, "samples": [sample(1)]}
    figure = verify_folder(folder, **options).facts["logits against float"]["SQNR dB"]
    assert verify_folder(folder, **options, min_sqnr=figure - 0.1).ok
    result = verify_folder(folder, **options, min_sqnr=figure + 0.1)
    assert [finding.check for finding in result.faults] == ["logits"]


def test_infinite_outputs_are_a_fault(tmp_path: Path, source: Path) -> None:
    """Catches NaN that averages and comparisons hide, and invalid JSON because of it."""
    content = make_content()
    content.tensors["model.norm.weight"] = stored(np.full(64, 3e38), "BF16")
    content.tensors["model.layers.1.mlp.down_proj.weight"] = stored(np.full((64, 96), 3e38), "BF16")
    result = verify(content, tmp_path / "out", source)
    faults = {(finding.check, finding.where) for finding in result.faults}
    assert {("stage outputs", "model.layers.1"), ("logits", "sample 0"), ("logits", "sample 1")} <= faults
    assert "Infinity" not in result.to_json()
    assert ": NaN" not in result.to_json()


def test_a_folder_that_cannot_be_run_has_faults(tmp_path: Path, source: Path) -> None:
    """Catches an exception, or a user error, for a damaged folder."""
    content = make_content()
    content.tensors.pop("model.norm.weight")
    result = verify(content, tmp_path / "missing", source)
    assert "stage outputs" in [warning.check for warning in result.warnings]
    content = make_content()
    content.tensors["model.norm.weight"].data = b"\xc0\x7f" * 64  # NaN
    result = verify(content, tmp_path / "nan", source)
    assert {"finite", "stage outputs"} <= {finding.check for finding in result.faults}


def test_unusable_samples_are_a_user_error(tmp_path: Path, source: Path) -> None:
    """Catches a result for a folder if the inputs are unusable."""
    folder = make_content().write(tmp_path / "out")
    with pytest.raises(UserError):
        verify_folder(folder, model_path=source, samples=[])
    with pytest.raises(UserError, match="min_sqnr"):
        verify_folder(folder, model_path=source, min_sqnr=20)


def test_the_figures_are_printed(tmp_path: Path, source: Path) -> None:
    """Catches figures that are only in the JSON."""
    result = verify(make_content(), tmp_path / "out", source)
    console = Console(width=160, record=True, file=(tmp_path / "screen").open("w"))
    result.render(console)
    shown = console.export_text()
    assert "stages against float" in shown
    assert "top-1 agreement" in shown
    assert (
        result.to_json() == verify_folder(tmp_path / "out", model_path=source, samples=[sample(1), sample(2)]).to_json()
    )
