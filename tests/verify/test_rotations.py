"""Outputs of a rotated folder: compared with those of the float model in the same basis."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import vlqc
from tests.support import naive_w8a8
from tools.checkpoints.families import Shape
from tools.checkpoints.outlier_checkpoint import make, random_samples
from vlqc.ir.rotations import AppliedRotation, Rotatable
from vlqc.verify import verify_folder
from vlqc.verify.findings import RANKING

SHAPE = Shape(
    layers=1, hidden=128, intermediate=128, heads=2, vision_layers=1, vision_hidden=128, vision_intermediate=136,
    vocabulary=64,
)  # fmt: skip
HEAD = "lm_head"


@pytest.mark.slow
def test_outputs_of_a_rotated_folder_with_layer_norms_and_an_untied_head(tmp_path: Path) -> None:
    """Catches biases of norms that are not folded, stages compared in two bases, and logits of another float model."""
    source, folder = tmp_path / "float", tmp_path / "out"
    config = make(source, family="qwen2_vl", tied=True)
    samples, unseen = (random_samples(config, 2, seed=seed) for seed in (100, 7))
    vlqc.compile(model_path=source, save_directory=folder, samples=samples, target="vllm-ascend", rotate="all")
    result = verify_folder(folder, model_path=source, samples=unseen, locate=True)
    assert result.ok, [fault.what for fault in result.faults]
    assert min(stage["SQNR dB"] for stage in result.facts["stages against float"]) > 30
    expected = naive_w8a8.logits(naive_w8a8.load_float(source), unseen)
    sqnr = naive_w8a8.signal_to_noise(expected, naive_w8a8.logits(vlqc.load(folder), unseen))
    assert abs(result.facts["logits against float"]["SQNR dB"] - sqnr) < 0.1
    assert 60 < sum(row["share %"] for row in result.facts[RANKING]) < 200
    statement = folder / "vlqc_report.json"
    statement.write_text(json.dumps(json.loads(statement.read_text()) | {"rotations": []}))
    other = verify_folder(folder, model_path=source, samples=unseen)
    assert [fault.check for fault in other.faults] == ["manifest", "rotations", "rotations"]
    assert other.facts["logits against float"] == result.facts["logits against float"]


@pytest.mark.slow
def test_logits_are_compared_with_those_of_the_float_model_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a high SQNR of a folder whose final norm is not folded, if the rotated float model's is not either."""

    right = AppliedRotation.of_model

    def wrong(part: Rotatable, seed: int) -> AppliedRotation:
        if HEAD not in part.readers:
            return right(part, seed)
        norms = tuple(norm for norm in part.norms if norm != part.readers[HEAD])
        return right(replace(part, readers={**part.readers, HEAD: None}, norms=norms), seed)

    monkeypatch.setattr(AppliedRotation, "of_model", wrong)
    source, folder = tmp_path / "float", tmp_path / "out"
    samples = random_samples(make(source, shape=SHAPE), 2)
    vlqc.compile(model_path=source, save_directory=folder, samples=samples, weight_method="round")
    result = verify_folder(folder, model_path=source, samples=samples, min_sqnr=20)
    assert min(stage["SQNR dB"] for stage in result.facts["stages against float"]) > 25
    expected = naive_w8a8.logits(naive_w8a8.load_float(source), samples)
    sqnr = naive_w8a8.signal_to_noise(expected, naive_w8a8.logits(vlqc.load(folder), samples))
    assert sqnr < 20
    assert abs(result.facts["logits against float"]["SQNR dB"] - sqnr) < 0.1
    assert [fault.where for fault in result.faults] == [str(source), "all samples"], result.faults
