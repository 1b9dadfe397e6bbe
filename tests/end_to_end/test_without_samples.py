"""Compilations from the weights alone, without calibration samples."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vlqc
from tests.support import tiny
from tests.support.interrupted_runs import STAGES, fail_at_stage, file_contents, small_checkpoint
from tools.checkpoints.outlier_checkpoint import make
from vlqc.errors import UserError
from vlqc.options.options import Options
from vlqc.reporting.html import report_text
from vlqc.reporting.html.schema import read_report_data
from vlqc.reporting.plan import plan_compilation
from vlqc.verify import verify_folder

BFLOAT16_STEP = 2.0**-7  # relative distance of neighboring scales
LAYERS = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # without a bias: W8A16 runs on them


def without_side_files(folder: Path) -> Path:
    """Removes everything but config.json and the weights: no tokenizer, no image processor."""
    for path in folder.iterdir():
        if path.name != "config.json" and path.suffix != ".safetensors":
            path.unlink()
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_side_files(small_checkpoint(tmp_path_factory.mktemp("float") / "float"))


@pytest.fixture(scope="module")
def compiled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the defaults of the scheme."""
    folder = tmp_path_factory.mktemp("compiled") / "out"
    vlqc.compile(model_path=checkpoint, scheme="w8a16", save_directory=folder)
    return folder


def test_weights_are_rounded_to_nearest(checkpoint: Path, tmp_path: Path) -> None:
    """Catches a layer that stays float although the engine runs it, as by the reference exclusions, and a weight that
    differs from its float value by more than half a step of its row."""
    vlqc.compile(model_path=checkpoint, scheme="w8a16", save_directory=tmp_path / "out", rotate="none")
    source = load_file(next(checkpoint.glob("*.safetensors")))
    stored = load_file(next((tmp_path / "out").glob("*.safetensors")))
    quantized = {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}
    assert quantized == {f"model.layers.{number}.{layer}" for number in (0, 1) for layer in LAYERS}
    for layer in quantized:
        weight, scale = source[f"{layer}.weight"].double(), stored[f"{layer}.weight_scale"].double()
        excess = scale * 127 / weight.abs().amax(1, keepdim=True) - 1
        assert torch.all((excess >= 0) & (excess <= BFLOAT16_STEP))  # rounded up, so that nothing is clipped
        assert torch.all((stored[f"{layer}.weight"] * scale - weight).abs() <= scale * (0.5 + 1e-6))


def test_the_result_is_valid(compiled: Path, checkpoint: Path) -> None:
    """Catches weights whose rotations do not cancel, and stages that read unrotated inputs."""
    assert verify_folder(compiled).ok
    found = verify_folder(compiled, model_path=checkpoint, samples=[tiny.synthetic_sample((4, 4))])
    assert found.ok, found.faults
    assert found.facts["logits against float"]["SQNR dB"] > 30


def test_report(compiled: Path) -> None:
    """Catches figures of a made-up sample that are reported as measured, a page with empty charts, and a command line
    that asks for images."""
    data = read_report_data(compiled)
    assert not data.calibrated and not data.ready_samples
    assert all(stage.samples == 0 and not (stage.rows or stage.sqnr or stage.inputs) for stage in data.stages)
    assert "--calib_images" not in data.command and data.command[-2:] == ("--scheme", "w8a16")
    page = report_text(compiled)
    assert "<svg" not in page and 'href="#depth"' not in page


def test_resumed(compiled: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Catches a resumed run without the outputs of the made-up sample, or with other bytes."""
    arguments: dict[str, Any] = {"model_path": checkpoint, "scheme": "w8a16", "save_directory": tmp_path / "out"}
    with fail_at_stage(STAGES[4], KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        vlqc.compile(**arguments)
    vlqc.compile(**arguments, resume=True)
    assert file_contents(tmp_path / "out") == file_contents(compiled)


@pytest.mark.every_transformers
def test_text_only_model(tmp_path: Path) -> None:
    """Catches a made-up sample with an image for a model without a vision tower, and a pipeline text whose passes need
    no samples that is refused without them."""
    make(tmp_path / "float", family="qwen2")
    source = without_side_files(tmp_path / "float")
    text = "assign-precision{scheme=W8A8_DYNAMIC,target=vllm-ascend},quantize-weights{method=round},lower-linears"
    result = vlqc.compile(model_path=source, save_directory=tmp_path / "out", pipeline=text, target="vllm-ascend")
    assert any(scheme == "W8A8_DYNAMIC" for _, scheme in result.counts)
    command = json.loads((tmp_path / "out" / "vlqc_report.json").read_text())["command"]
    assert "--pipeline" in command and "--calib_images" not in command


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({}, "--scheme w8a16"),
        ({"scheme": "w8a8_dynamic"}, "--anti_method none --weight_method round"),
        ({"scheme": "w8a8_dynamic", "anti_method": "none"}, "--anti_method none --weight_method round"),
        ({"scheme": "w8a16", "weight_method": "gptq"}, "--calib_images"),
        ({"scheme": "w8a16", "fallback": "auto", "min_sqnr": 30}, "--calib_images"),
    ],
)
def test_samples_are_needed(
    values: dict[str, Any], advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches methods that silently run without the samples they need, and an error after the model is built."""
    monkeypatch.setattr("vlqc.compiler.open_model", lambda options: pytest.fail("the model was built"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        vlqc.compile(model_path=tiny.TINY, save_directory=tmp_path / "out", **values)
    (fault,) = caught.value.faults
    assert "--calib_images" in fault.what and advice in fault.fix
    assert ("--scheme w8a16" in fault.fix) == (values.get("scheme") != "w8a16")


def test_options_of_samples(tmp_path: Path) -> None:
    """Catches options that look as if samples were used."""
    with pytest.raises(UserError) as caught:
        vlqc.compile(model_path=tiny.TINY, save_directory=tmp_path / "out", scheme="w8a16", max_samples=4, max_tokens=9)
    flags = [fault.what.partition(" ")[0] for fault in caught.value.faults]
    assert flags == ["--max_samples", "--max_tokens"]


def test_plan(compiled: Path, checkpoint: Path) -> None:
    """Catches a plan that reads samples, or counts their time."""
    plan = plan_compilation(model_path=checkpoint, scheme="w8a16")
    assert plan.tokens == plan.patches == 0
    assert plan.counts == read_report_data(compiled).counts()


def test_the_reference_exclusions_when_asked_for() -> None:
    """Catches a default that replaces what the user set."""
    fallbacks = [
        Options.without_paths(scheme=scheme, **given).fallback
        for scheme, given in (("w8a16", {}), ("w8a16", {"fallback": "reference"}), ("w8a8", {}))
    ]
    assert fallbacks == ["none", "reference", "reference"]
