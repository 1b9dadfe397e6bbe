"""vlqc.reporting.plan against a compilation with the same options."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import Tensor

import vlqc
from tests.support.calibration_files import lines
from tools.checkpoints import outlier_checkpoint as outliers
from tools.demo import tiny_task
from vlqc.cli.commands import app
from vlqc.errors import UserError
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.reporting.checkpoint_summary import inspect_folder
from vlqc.reporting.dumps.trace_only import trace
from vlqc.reporting.dumps.writer import Dumper
from vlqc.reporting.plan import attention_seconds, plan_compilation
from vlqc.reporting.rotations import rotation_text

TINY = Path(tiny_task.__file__).parent / "tiny_vl"
FOUR_BITS = {"w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False}
TEXT = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2, dtype=torch.int64)}


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Tensor]]:
    return tiny_task.samples(2, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"mindie_format": True}, {"is_dynamic": True}, FOUR_BITS, {**FOUR_BITS, "mindie_format": True}],
    ids=["static", "mindie", "dynamic", "four bits", "four bits, mindie"],
)
def test_plan_agrees_with_the_compilation(
    tmp_path: Path, samples: list[dict[str, Tensor]], options: dict[str, object]
) -> None:
    """Catches schemes, engines or sizes that differ from those of the compilation.

    The plan has an upper bound of the file header only: 5 % of this small model.
    """
    arguments = {"model_path": TINY, "save_directory": tmp_path / "out", "samples": samples, **options}
    plan = plan_compilation(**arguments)
    assert not (tmp_path / "out").exists()
    result = vlqc.compile(weight_method="round", **arguments)
    assert plan.counts == result.counts
    assert plan.engines == result.engines
    assert plan.bytes_before == result.bytes_before
    assert plan.bytes_after == pytest.approx(result.bytes_after, rel=0.05)
    assert plan.tokens == sum(sample["input_ids"].numel() for sample in samples)
    assert plan.patches == sum(len(sample["pixel_values"]) for sample in samples)


@pytest.mark.slow
def test_plan_of_an_untied_head(tmp_path: Path) -> None:
    """Catches a head that `--rotate all` stores and the plan does not count, and rotations that the plan misses."""
    config = outliers.make(tmp_path / "model", tied=True)
    arguments = {"model_path": tmp_path / "model", "samples": outliers.random_samples(config, count=1)}
    tied, untied = (plan_compilation(rotate=rotate, **arguments) for rotate in ("auto", "all"))
    head = 2 * config["vocab_size"] * config["hidden_size"]
    assert untied.bytes_after - tied.bytes_after == untied.disk_needed - tied.disk_needed == head
    for plan, rotate in ((tied, "auto"), (untied, "all")):
        result = vlqc.compile(rotate=rotate, weight_method="round", save_directory=tmp_path / rotate, **arguments)
        assert plan.counts == result.counts and plan.bytes_after == pytest.approx(result.bytes_after, rel=0.05)
        assert plan.rotations == result.rotations and set(plan.notes) <= set(result.notes)
        assert inspect_folder(tmp_path / rotate).facts["rotated"] == rotation_text(result.rotations)
    assert [part.part for part in untied.rotations if part.kind == "residual stream"] == ["vision", "language"]


def test_notes_about_a_scheme_that_no_layer_gets(samples: list[dict[str, Tensor]]) -> None:
    """Catches notes about 4-bit weights in a folder that has none, because no layer has two groups of this size."""
    arguments: dict[str, Any] = {"model_path": TINY, "samples": samples, **FOUR_BITS, "w4a8_scope": "all"}
    groups_of_64, groups_of_128 = (plan_compilation(group_size=size, **arguments) for size in (64, 128))
    assert any("W4A8_DYNAMIC" in note for note in groups_of_64.notes)
    assert not any("W4A8_DYNAMIC" in note for note in groups_of_128.notes) and groups_of_128.engines


def test_more_data_takes_longer(samples: list[dict[str, Tensor]], tmp_path: Path) -> None:
    """Catches an estimate that does not depend on the data. The second has 10000 times the tokens."""
    arguments = {"model_path": TINY, "save_directory": tmp_path / "out"}
    mask = torch.ones(1, 20000, dtype=torch.long)
    long = [{"input_ids": torch.full((1, 20000), 9 + number), "attention_mask": mask} for number in range(20)]
    few, many = plan_compilation(samples=samples, **arguments), plan_compilation(samples=[*samples, *long], **arguments)
    assert many.tokens == few.tokens + 400_000
    assert many.seconds > few.seconds > 0 and many.memory >= few.memory > 0
    assert not any("--max_tokens" in note for note in few.notes)


def test_attention_grows_with_the_square_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a plan of seconds for images that take minutes. 100 multiplications of the probe per second."""
    monkeypatch.setattr("vlqc.reporting.plan.calls_per_second", lambda function: 100.0)
    model = StreamedModel.open(Checkpoint(TINY))
    short, long = (
        {"input_ids": torch.zeros(1, 4), "pixel_values": torch.zeros(side * side, 1),
         "image_grid_thw": torch.tensor([[1, side, side]])}
        for side in (4, 256)
    )  # fmt: skip
    assert attention_seconds(model, [short]) == 0
    once, twice = attention_seconds(model, [long]), attention_seconds(model, [long, long])
    vision = model.module.config.vision_config
    whole, windowed = 256**4, 256**2 * (vision.window_size // vision.patch_size) ** 2
    blocks = len(vision.fullatt_block_indexes)
    flops = 4 * vision.hidden_size * (blocks * whole + (4 - blocks) * windowed)
    assert once == pytest.approx(flops / (4 * 8 * 1024 * 64 * 1024 * 100), rel=1e-6)
    assert twice == pytest.approx(2 * once)


def test_plan_of_a_text_only_model(tmp_path: Path) -> None:
    """Catches a plan or a dump that expects images, and a note about images."""
    outliers.make(tmp_path / "model", family="qwen2")
    source = lines(tmp_path / "q.jsonl", {"prompt": "red"}, {"prompt": "red green", "response": "7"})
    plan = plan_compilation(model_path=tmp_path / "model", calib_images=source)
    assert plan.patches == 0 < plan.tokens and plan.seconds > 0
    assert {part for part, _ in plan.counts} == {"language", "other"}
    written = io.StringIO()
    plan.render(Console(file=written, width=200))
    shown = [line for line in written.getvalue().splitlines() if "calibration data" not in line]
    assert f"{plan.tokens} tokens" in written.getvalue() and not any("image" in line for line in shown)
    result = trace(tmp_path / "model", Dumper(tmp_path / "dump", stages=("model.layers.1",)))
    assert result.stages == ("model.layers.1",)


@pytest.mark.parametrize(
    "options",
    [
        {"exclude": ["nowhere.*"]},
        {"pipeline": "lower-linears"},
        {"device_type": "npu"},
        {"samples": []},
        {"samples": [TEXT]},
    ],
    ids=["no such layer", "order of passes", "no such device", "no samples", "no image"],
)
def test_the_plan_refuses_what_the_compilation_refuses(
    samples: list[dict[str, Tensor]], tmp_path: Path, options: dict[str, object]
) -> None:
    """Catches a plan for options that the compilation refuses."""
    arguments = {"model_path": TINY, "save_directory": tmp_path / "out", "samples": samples, **options}
    with pytest.raises(UserError) as planned:
        plan_compilation(**arguments)
    with pytest.raises(UserError) as run:
        vlqc.compile(**arguments)
    assert str(planned.value) == str(run.value)


def test_command(tmp_path: Path) -> None:
    """Catches a --plan that compiles, or omits a figure."""
    save, photos = tmp_path / "out", Path(__file__).parents[1] / "photos"
    ended = CliRunner().invoke(
        app,
        ["compile", "--plan", "--model_path", str(TINY), "--calib_images", str(photos), "--save_directory", str(save)],
    )
    assert ended.exit_code == 0, ended.output
    assert not save.exists()
    for word in ("W8A8", "FLOAT", "size", "memory", "time", "disk", "loads in", "MindIE", "vLLM Ascend"):
        assert word in ended.output


def test_plan_with_stop_after(tmp_path: Path) -> None:
    """Catches a plan that starts to compile because of another option."""
    places = ["--model_path", str(TINY), "--calib_images", str(TINY), "--save_directory", str(tmp_path / "out")]
    ended = CliRunner().invoke(app, ["compile", *places, "--plan", "--stop_after", "smooth-m2"])
    assert ended.exit_code == 2 and "--plan with --stop_after" in ended.stderr


def test_too_little_memory(samples: list[dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a plan without the compilation's memory check or its note."""
    arguments = {"model_path": TINY, "save_directory": tmp_path / "out", "samples": samples}
    monkeypatch.setattr("vlqc.frontend.memory._available_memory", lambda: 1)
    assert any("--memory_budget" in note for note in plan_compilation(**arguments).notes)
    monkeypatch.setattr("resource.getrlimit", lambda kind: (1 << 20, 1 << 20))
    with pytest.raises(UserError, match="ulimit -v"):
        plan_compilation(**arguments)
