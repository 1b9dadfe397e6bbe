"""The benchmark of size: checkpoints that are what they claim to be, figures that add up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.bench import scale as bench_scale
from tools.bench import scale_checkpoint
from tools.bench.scale_bounds import Rates, work_of
from tools.bench.scale_checkpoint import Case, checkpoint_bytes, make, samples_of
from tools.checkpoints.outlier_checkpoint import Shape
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.streamed_model import StreamedModel

LITTLE = Shape(3, 64, 96, 4, 2, 9, 32, 48, 4, 256)


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that is quickly made."""
    monkeypatch.setitem(scale_checkpoint.SIZES, "7B", LITTLE)
    monkeypatch.setattr("tools.bench.scale_checkpoint.POOL", 10007)


def test_the_folder_is_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tensor that the model lacks or has in another shape, in every shard, and values that are not finite."""
    monkeypatch.setattr("tools.bench.scale_checkpoint.SHARD_BYTES", 100_000)
    case = Case.of("7B", layers=2)
    size = make(tmp_path, case)
    checkpoint = Checkpoint(tmp_path)
    model = StreamedModel.open(checkpoint)
    assert not model.unknown_tensors() and len(list(tmp_path.glob("*.safetensors"))) > 2
    assert [name for name in model.stages if name.startswith("model")] == ["model.layers.0", "model.layers.1"]
    assert size == checkpoint_bytes(case) == sum(checkpoint.tensor(name).nbytes for name in checkpoint.names)
    assert model.module.config.vision_config.fullatt_block_indexes == [7]


def test_samples_have_the_tokens_asked_for(tmp_path: Path) -> None:
    """Catches figures for fewer tokens than the table says."""
    config = Case.of("7B").config
    for sample in samples_of(config, 2, 200):
        assert sample["input_ids"].shape == (1, 200)
        _, down, across = sample["image_grid_thw"][0].tolist()
        assert int((sample["input_ids"] == config["image_token_id"]).sum()) == down * across // 4
        assert sample["pixel_values"].shape[0] == down * across


def test_fewer_layers_where_the_disk_is_small() -> None:
    """Catches a disk that is filled up, and a run of nothing."""
    case = Case.of("7B")
    assert bench_scale.fitting(case, 10**9) == case
    less = bench_scale.fitting(case, int(2.2 * checkpoint_bytes(case)) - 1)
    assert less.layers < case.layers and less.vision_layers == case.vision_layers
    with pytest.raises(ValueError, match="even with one layer"):
        bench_scale.fitting(case, 1000)


@pytest.mark.parametrize(("layers", "vision_layers"), [(4, None), (None, 10), (-1, None), (0, None), (None, 0)])
def test_layers_that_a_size_does_not_have(layers: int | None, vision_layers: int | None) -> None:
    """Catches an extrapolation to a model that does not exist."""
    with pytest.raises(ValueError, match="7B has 3 layers"):
        Case.of("7B", layers, vision_layers)


def test_layers_that_did_not_run_count_as_the_mean_of_those_that_did() -> None:
    """Catches fixed costs that are multiplied, and vision blocks that stand for layers."""
    stages = {
        "visual.blocks.0": {"forward": 2.0},
        "visual.merger": {"forward": 5.0},
        "model.layers.0": {"forward": 10.0, "weights": 1.0},
        "model.layers.1": {"forward": 20.0, "weights": 3.0},
    }
    figures: dict[str, Any] = {"phases": {"forward": 37.0, "weights": 4.0, "imports": 3.0}, "stages": stages}
    every = bench_scale.extrapolated(figures, Case.of("7B", 2, 1))
    assert every == {"forward": 37.0 + 8 * 2 + 15, "weights": 4.0 + 2, "imports": 3.0}
    # Of nine blocks, one attends to the whole picture.
    stages["visual.blocks.1"] = {"forward": 50.0}
    every = bench_scale.extrapolated({"phases": {"forward": 87.0}, "stages": stages}, Case.of("7B", 3, 2))
    assert every["forward"] == 87.0 + 7 * 2 + 15


def test_work_by_hand() -> None:
    """Catches matrices that are left out of the count, or multiplied by the rows of the other tower."""
    case = Case.of("7B", 1, 1)
    quantized = {"model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight", "lm_head.weight"}
    work = work_of(case, samples=2, tokens=50, patches=100, written=7, proof_rows=512, quantized=quantized)
    assert work.weight_values == 2 * 64 * 96
    vision = 100 * (32 * 96 + 32 * 32 + 3 * 32 * 48)
    merger = 25 * (128 * 128 + 128 * 64)
    text = 50 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert work.forward_flops == 2 * 2 * (vision + merger + text)
    assert work.proof_flops == 2 * work.forward_flops / 2  # one of two samples, before and after
    assert work.read_bytes == checkpoint_bytes(case)
    rates = Rates(*(1.0 for _ in range(7)))
    assert work.bounds(rates)["reading"] == work.read_bytes and work.bounds(rates)["writing"] == 7


def test_a_watched_run(tmp_path: Path) -> None:
    """Catches a phase whose function was renamed: its time would silently count elsewhere."""
    case = Case.of("7B", 1, 2)
    make(tmp_path / "source", case)
    samples = tmp_path / "samples.pt"
    torch.save(samples_of(case.config, 1, 60), samples)
    figures = bench_scale.compiled(tmp_path / "source", tmp_path / "result", samples, ["act_method=1"], 1)
    phases = {"reading", "forward", "observing", "proofs", "folding", "smoothing", "activation ranges", "weights"}
    assert phases | {"checks", "lowering", "writing", "verifying", "publishing", "imports", "tracing"} <= set(
        figures["phases"]
    )
    assert figures["phases"].keys() == figures["phases_cpu"].keys() and figures["kernel"]["peak_bytes"] > 10**8
    quantized = bench_scale.quantized_weights(tmp_path / "result")
    assert "model.layers.0.mlp.up_proj.weight" in quantized and "model.embed_tokens.weight" not in quantized
    assert list(figures["stages"]) == ["visual.blocks.0", "visual.blocks.1", "visual.merger", "model.layers.0"]
    assert abs(sum(figures["phases"].values()) - figures["seconds"]) < 1.0
    assert json.loads((tmp_path / "result" / "config.json").read_text())["num_hidden_layers"] == 1
