"""The benchmark compares like with like: same flags, same exclusions, same sites; and it says so when it does not."""

import argparse
import inspect
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import Qwen2_5_VLForConditionalGeneration

from tools.bench import reference as bench
from tools.bench import reference_cases, reference_environment, reference_runner, reference_table
from tools.bench.metrics import Agreement
from tools.bench.process import Usage
from tools.checkpoints.outlier_checkpoint import Shape, config_of
from vlqc.options.options import Options


@pytest.mark.parametrize("scheme", [*bench.SCHEMES, *bench.OURS_ONLY])
def test_every_scheme_is_a_legal_combination(scheme: str) -> None:
    """Catches a scheme that vlqc refuses, or that names something else than it selects."""
    chosen = {**bench.SCHEMES, **bench.OURS_ONLY}[scheme]
    options = Options.without_paths(**{"group_size": 256, **chosen})
    wanted = {"static": "W8A8", "dynamic": "W8A8_DYNAMIC", "w4a8": "W4A8_DYNAMIC"}[scheme.partition("-")[0]]
    assert options.scheme == wanted and options.anti_method in scheme
    assert "act" not in scheme or f"-act{options.act_method}" in scheme
    assert wanted != "W4A8_DYNAMIC" or scheme in bench.OURS_ONLY or options.w4a8_scope == "all"
    assert options.shift == scheme.endswith("-shift")


def test_defaults_of_both_sides_are_the_same() -> None:
    """Catches a flag left out that means one thing to one side and something else to the other."""
    fields = Options.model_fields
    assert {name: fields[name].default for name in reference_runner.DEFAULTS} == reference_runner.DEFAULTS


def test_inputs_are_passed_in_the_order_of_the_forward() -> None:
    """Catches pixel values that arrive as something else: msModelSlim gets its inputs by position."""
    parameters = list(inspect.signature(Qwen2_5_VLForConditionalGeneration.forward).parameters)
    assert tuple(parameters[1 : 1 + len(reference_runner.FORWARD_ORDER)]) == reference_runner.FORWARD_ORDER


def test_exclusions_name_every_layer() -> None:
    """Catches a tower whose depth is taken from the other one."""
    names = reference_runner.left_float(config_of(Shape(layers=3, vision_layers=2), "bfloat16", tied=False))
    assert sum(name.startswith("model.layers.") for name in names) == 3
    assert sum(name.startswith("visual.blocks.") for name in names) == 2
    assert len(names) == len(set(names)) == 7


def test_unseen_inputs_are_unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an evaluation on what was calibrated on, or on the same inputs for every seed."""
    made = reference_cases.outliers.config_of(Shape(), "bfloat16", tied=False)
    monkeypatch.setattr(reference_cases.outliers, "make", lambda *_, **__: made)
    first, second = reference_cases.outlier_cases(tmp_path, [0, 1], ["standard"])
    pixels = [sample["pixel_values"] for case in (first, second) for sample in (*case.calibration, *case.unseen)]
    assert len(pixels) == 2 * (reference_cases.SAMPLES + reference_cases.UNSEEN)
    assert len({float(each.double().sum()) for each in pixels}) == len(pixels)


@pytest.mark.parametrize("shape", [*(shape for shape, _ in reference_cases.SHAPES.values()), reference_cases.LARGE])
def test_shapes_are_possible(shape: Shape) -> None:
    """Catches sizes no checkpoint can have."""
    assert config_of(shape, "bfloat16", tied=False)["vision_config"]["out_hidden_size"] == shape.hidden


def test_four_bit_weights_fit_in_the_outlier_shapes() -> None:
    """Catches layers that vlqc keeps at 8 bits, for lack of whole groups or packed rows, and the other side not."""
    for shape, _ in reference_cases.SHAPES.values():
        assert shape.hidden % 256 == shape.vision_hidden % 256 == 0
        assert shape.intermediate % 8 == shape.vision_intermediate % 8 == 0


def test_command_line() -> None:
    """Catches defaults that differ from the documentation, and cost runs that take hours."""
    options = bench.parsed(["--seeds", "3,5", "--option", "seed=4"])
    assert (options.seeds, options.option, options.schemes) == ([3, 5], [("seed", "4")], list(bench.SCHEMES))
    assert bench.parsed([]).seeds == [0, 1, 2, 3, 4]
    assert bench.parsed(["--checkpoint", "large"]).schemes == list(bench.COST_SCHEMES)
    with pytest.raises(argparse.ArgumentTypeError, match="known are static-m2-act1"):
        bench.chosen("dynamic-m2,dynamic-m3", list(bench.SCHEMES))
    with pytest.raises(argparse.ArgumentTypeError):
        bench.named_value("seed")


# ---- a run with stand-ins for the two sides --------------------------------------------------------------------------


def row(side: str, sqnr: float, seed: int = 0, scheme: str = "static-m2-act1") -> bench.Row:
    usage = None if side == bench.FLOOR else Usage(12.5, 6.25, 300 * 2**20)
    return bench.Row("case", seed, scheme, side, Agreement(sqnr, 0.999, 0.01, 0.9, 1.0), usage=usage)


def run_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sites: dict[str, dict[str, str]]) -> tuple[int, Path]:
    """The whole program on one case, the two sides writing descriptions only; exit status and JSON file."""
    case = reference_cases.Case("case", 0, tmp_path / "float", [], [])
    case.folder.mkdir()

    def quantize(_: bench.Bench, side: str, *others: Any) -> None:
        save = others[2]
        save.mkdir(exist_ok=True)
        (save / "quant_model_description.json").write_text(json.dumps(sites[side]))

    monkeypatch.setattr(bench, "reference_python", lambda *_, **__: tmp_path)
    monkeypatch.setattr(bench, "cases_of", lambda *_: iter([case]))
    monkeypatch.setattr(bench, "load_float", lambda _: torch.nn.Identity())
    monkeypatch.setattr(bench, "measure_float", lambda *_: None)
    monkeypatch.setattr(bench, "score", lambda *_: (Agreement(24.0, 1.0, 0.0, 1.0, 1.0), None, None))
    monkeypatch.setattr(bench.metrics, "round_weights", lambda model, _: model)
    monkeypatch.setattr(bench.Bench, "quantize", quantize)
    monkeypatch.setattr(bench, "evaluate", lambda *given: row(given[4], 30.0, scheme=given[3]))
    saved = tmp_path / "rows.json"
    arguments = ["bench_reference.py", "--schemes", "static-m2-act1,dynamic-m2", "--json", str(saved)]
    monkeypatch.setattr("sys.argv", arguments)
    return bench.main(), saved


def test_a_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a side, a scheme or the floor missing in the JSON or on the screen."""
    same = {"a.weight": "W8A8", "b.weight": "FLOAT"}
    status, saved = run_with(monkeypatch, tmp_path, {bench.REFERENCE: same, bench.OURS: {**same, "b.bias": "FLOAT"}})
    assert status == 0
    found = [(one["scheme"], one["side"]) for one in json.loads(saved.read_text())]
    pairs = [(scheme, side) for scheme in ("static-m2-act1", "dynamic-m2") for side in bench.SIDES]
    assert found == [*pairs, (bench.FLOOR, bench.FLOOR)]
    assert all(word in capsys.readouterr().out for word in ("dynamic-m2",))


def test_different_sites_end_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches figures of unequal work: a layer that only one side quantizes must not pass."""
    sites = {bench.REFERENCE: {"a.weight": "W8A8", "b.weight": "W8A8"}, bench.OURS: {"a.weight": "W8A8"}}
    status, saved = run_with(monkeypatch, tmp_path, sites)
    assert status == 1 and not saved.exists()
    assert "b: W8A8 against FLOAT" in capsys.readouterr().err


# ---- the table -------------------------------------------------------------------------------------------------------


def test_differences_pair_the_seeds() -> None:
    """Catches a difference of medians where a median of differences is meant, and seeds that lack a side."""
    rows = [row(bench.REFERENCE, 20.0, 0), row(bench.OURS, 24.0, 0), row(bench.OURS, 50.0, 1)]
    rows += [row(bench.OURS, 30.0, 2), row(bench.REFERENCE, 29.0, 2)]
    assert reference_table.differences([bench.asdict(one) for one in rows]) == [4.0, 1.0]


def test_the_table_shows_both_sides() -> None:
    """Catches a column cut off, figures in wrong units, and columns for what no run has."""
    rows = [row(bench.REFERENCE, 20.0), row(bench.OURS, 24.5), row(bench.FLOOR, 37.0, scheme=bench.FLOOR)]
    out = io.StringIO()
    console = Console(file=out, width=reference_table.WIDTH)
    reference_table.show([bench.asdict(one) for one in rows], console)
    lines = out.getvalue().splitlines()
    (ours,) = [line for line in lines if " vlqc " in line]
    for word in ("+4.50", "24.50", "90.0", "12.5", "6.2", "300"):
        assert word in ours
    assert any("37.00" in line for line in lines) and "…" not in out.getvalue()
    assert "perplexity" not in out.getvalue()


# ---- the environment -------------------------------------------------------------------------------------------------


def test_the_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an installation on every run, none after the pins change, and weights that are loaded when not asked."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        commands.append(command)
        tmp_path.joinpath("env").mkdir(exist_ok=True)

    monkeypatch.setattr(subprocess, "run", run)
    pins = tmp_path / "pins.txt"
    pins.write_text("torch==1\n")
    monkeypatch.setattr(reference_environment, "CONSTRAINTS", pins)
    counts = []
    for with_weights in (False, False, True, True):
        reference_environment.reference_python(tmp_path / "env", with_weights)
        counts.append(len(commands))
    assert counts == [3, 3, 4, 4]  # venv, two installations; then the weights
    pins.write_text("torch==2\n")
    reference_environment.reference_python(tmp_path / "env")
    assert len(commands) == 7


def test_everything_installed_is_pinned() -> None:
    """Catches a package of whatever version, and torch_npu, which takes over torch where there is no NPU."""
    lines = reference_environment.CONSTRAINTS.read_text().splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if "==" in line}
    wanted = {*reference_environment.FIRST, *reference_environment.THEN, reference_environment.WEIGHTS_ONLY}
    assert wanted <= pinned and not {"torch_npu", "torch-npu"} & pinned
    assert "msmodelslim==26.1.0" in lines and "transformers==4.49.0" in lines
