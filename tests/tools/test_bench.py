"""tools/bench: the benchmarks run and compute what their tables say."""

import io
import json
import math
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console

from tools.bench import (
    metrics,
    reference,
    reference_cases,
    reference_environment,
    reference_runner,
    reference_table,
    scale_checkpoint,
    scale_runner,
)
from tools.bench import scale as bench_scale
from tools.bench.metrics import Agreement
from tools.bench.process import CommandFailed, Usage, measured
from tools.bench.scale_bounds import Rates, work_of
from tools.bench.scale_checkpoint import Case, checkpoint_bytes, make, samples_of, tensor_shapes
from tools.checkpoints.families import Shape
from vlqc.options.options import Options

LITTLE = Shape(3, 64, 96, 4, 2, 9, 32, 48, 4, 256)
LITTLE_MOE = Shape(
    3, 64, 96, 4, 2, 5, 32, 48, 4, 256, head=24, deepstack=(1, 2, 3), experts=4, used_experts=2, expert_intermediate=48
)
MIB = 2**20
EVERY_SIZE = [
    pytest.param(name, marks=pytest.mark.qwen3_vl if "qwen3" in name else ()) for name in scale_checkpoint.SIZES
]


def test_agreement_against_numpy() -> None:
    """Catches a wrong sum, sign or base of a logarithm, or a mean per sample instead of per token."""
    random = np.random.default_rng(0)
    shapes = [(3, 5), (7, 5)]
    expected = [random.normal(size=shape) for shape in shapes]
    got = [one + 0.3 * random.normal(size=shape) for one, shape in zip(expected, shapes, strict=True)]
    ids = [random.integers(0, 5, (1, shape[0])) for shape in shapes]
    result = metrics.agreement(*([torch.from_numpy(each) for each in group] for group in (expected, got, ids)))
    one, other = np.concatenate(expected), np.concatenate(got)
    p, q = (np.exp(each) / np.exp(each).sum(1, keepdims=True) for each in (one, other))
    assert result.sqnr == pytest.approx(10 * np.log10((one**2).sum() / ((one - other) ** 2).sum()))
    assert result.cosine == pytest.approx((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))
    assert result.kl == pytest.approx((p * np.log(p / q)).sum(1).mean())
    assert result.top1 == np.mean(one.argmax(1) == other.argmax(1))
    nexts = [q[token, ids[0][0, token + 1]] for token in range(2)]
    nexts += [q[3 + token, ids[1][0, token + 1]] for token in range(6)]
    assert result.loss == pytest.approx(-np.log(nexts).mean())
    same = metrics.agreement(*([torch.from_numpy(each) for each in group] for group in (expected, expected, ids)))
    assert same.sqnr == math.inf and same.top1 == 1.0


def test_different_layers_are_named() -> None:
    """Catches a comparison that accepts layers which only one tool quantizes."""
    one, other = {"a": "W8A8", "b": "W8A8"}, {"b": "W8A8_DYNAMIC", "c": "W8A8"}
    expected = ["a: W8A8 against FLOAT", "b: W8A8 against W8A8_DYNAMIC", "c: FLOAT against W8A8"]
    assert metrics.different_sites(one, other) == expected
    description = {"version": "1", "a.weight": "W8A8", "a.weight_scale": "W8A8", "b.weight": "FLOAT"}
    assert metrics.sites_of(description) == {"a": "W8A8"}


def test_usage_of_a_command() -> None:
    """Catches KiB taken for bytes, the caller's memory counted as the command's, and a lost error message."""
    large = measured([sys.executable, "-S", "-c", f"block = b'x' * {300 * MIB}"])
    assert 300 * MIB < large.peak_bytes < 400 * MIB and large.wall_seconds > 0
    with pytest.raises(CommandFailed, match=r"(?s)ended with 7.*no such tensor"):
        measured([sys.executable, "-S", "-c", "import sys; print('no such tensor', file=sys.stderr); sys.exit(7)"])


@pytest.mark.parametrize("scheme", [*reference.SCHEMES, *reference.VLQC_ONLY])
def test_every_scheme_is_a_legal_combination(scheme: str) -> None:
    """Catches a scheme that vlqc refuses, or whose name does not match its options."""
    chosen = {**reference.SCHEMES, **reference.VLQC_ONLY}[scheme]
    options = Options.without_paths(**{"group_size": 256, **chosen})
    expected = {"static": "W8A8", "dynamic": "W8A8_DYNAMIC", "w4a8": "W4A8_DYNAMIC"}[scheme.partition("-")[0]]
    assert options.scheme == expected and options.anti_method in scheme


def test_both_tools_have_the_same_defaults() -> None:
    """Catches an omitted flag that means something different for each tool."""
    defaults = {name: Options.model_fields[name].default for name in reference_runner.DEFAULTS}
    assert defaults == reference_runner.DEFAULTS


def test_everything_installed_is_pinned() -> None:
    """Catches a package without a pinned version."""
    lines = reference_environment.CONSTRAINTS.read_text().splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if "==" in line}
    assert {*reference_environment.FIRST, *reference_environment.THEN, reference_environment.WEIGHTS_ONLY} <= pinned
    assert not {"torch_npu", "torch-npu"} & pinned


def row(tool: str, sqnr: float, scheme: str = "static-m2-act1") -> reference.Row:
    usage = None if tool == reference.FLOOR else Usage(12.5, 6.25, 300 * MIB)
    return reference.Row("case", 0, scheme, tool, Agreement(sqnr, 0.999, 0.01, 0.9, 1.0), usage=usage)


@pytest.mark.parametrize("same", [True, False])
def test_a_comparison(
    same: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a missing row in the JSON file or the table, and different layers that are compared nevertheless."""
    case = reference_cases.Case("case", 0, tmp_path / "float", [], [])
    case.folder.mkdir()
    sites = {tool: {"a.weight": "W8A8"} for tool in reference.TOOLS}
    sites[reference.VLQC] |= {} if same else {"b.weight": "W8A8"}

    def quantize(_: reference.Bench, tool: str, *others: Any) -> None:
        others[2].mkdir(exist_ok=True)
        (others[2] / "quant_model_description.json").write_text(json.dumps(sites[tool]))

    monkeypatch.setattr(reference, "reference_python", lambda *_, **__: tmp_path)
    monkeypatch.setattr(reference, "cases_of", lambda *_: iter([case]))
    monkeypatch.setattr(reference, "load_float", lambda _: torch.nn.Identity())
    monkeypatch.setattr(reference, "measure_float", lambda *_: None)
    monkeypatch.setattr(reference, "score", lambda *_: (Agreement(24.0, 1.0, 0.0, 1.0, 1.0), None, None))
    monkeypatch.setattr(reference.metrics, "round_weights", lambda model, _: model)
    monkeypatch.setattr(reference.Bench, "quantize", quantize)
    monkeypatch.setattr(reference, "evaluate", lambda *arguments: row(arguments[4], 30.0, scheme=arguments[3]))
    saved = tmp_path / "rows.json"
    monkeypatch.setattr("sys.argv", ["reference.py", "--schemes", "static-m2-act1,dynamic-m2", "--json", str(saved)])
    assert reference.main() == (0 if same else 1)
    if same:
        rows = [(each["scheme"], each["tool"]) for each in json.loads(saved.read_text())]
        pairs = [(scheme, tool) for scheme in ("static-m2-act1", "dynamic-m2") for tool in reference.TOOLS]
        assert rows == [*pairs, (reference.FLOOR, reference.FLOOR)]
        assert "dynamic-m2" in capsys.readouterr().out
    else:
        assert "b: FLOAT against W8A8" in capsys.readouterr().err


def test_the_table() -> None:
    """Catches a truncated column, wrong units, and columns without values."""
    rows = [row(reference.MSMODELSLIM, 20.0), row(reference.VLQC, 24.5), row(reference.FLOOR, 37.0, reference.FLOOR)]
    out = io.StringIO()
    reference_table.show([reference.asdict(one) for one in rows], Console(file=out, width=reference_table.WIDTH))
    (ours,) = [line for line in out.getvalue().splitlines() if " vlqc " in line]
    assert all(word in ours for word in ("+4.50", "24.50", "90.0", "12.5", "6.2", "300"))
    assert "…" not in out.getvalue() and "perplexity" not in out.getvalue()


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model in place of the 7B, and a small one with experts."""
    monkeypatch.setitem(scale_checkpoint.SIZES, "7B", scale_checkpoint.Size("qwen2_5_vl", LITTLE))
    monkeypatch.setitem(scale_checkpoint.SIZES, "little-moe", scale_checkpoint.Size("qwen3_vl_moe", LITTLE_MOE))
    monkeypatch.setattr("tools.bench.scale_checkpoint.POOL", 10007)


def test_work_by_hand(little: None) -> None:
    """Catches matrices that are not counted, or multiplied by the rows of the other tower."""
    case = Case.of("7B", 1, 1)
    quantized = {"model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight", "lm_head.weight"}
    work = work_of(case, samples=2, tokens=50, patches=100, written=7, proof_rows=512, quantized=quantized)
    assert work.weight_values == 2 * 64 * 96
    vision = 100 * (32 * 96 + 32 * 32 + 3 * 32 * 48)
    merger = 25 * (128 * 128 + 128 * 64)
    text = 50 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert work.forward_flops == 2 * 2 * (vision + merger + text)
    assert work.read_bytes == checkpoint_bytes(case)
    assert work.bounds(Rates(*(1.0 for _ in range(7))))["reading"] == work.read_bytes


def test_work_of_experts_by_hand(little: None) -> None:
    """Catches experts that each count all tokens, or are not read one by one."""
    case = Case.of("little-moe", 1, 1)
    quantized = {f"model.language_model.layers.0.mlp.experts.{expert}.up_proj.weight" for expert in range(4)}
    work = work_of(case, samples=2, tokens=50, patches=100, written=7, proof_rows=512, quantized=quantized)
    assert work.weight_values == 4 * 64 * 48
    vision = 100 * (4 * 32 * 32 + 2 * 32 * 48)
    mergers = 2 * 25 * (128 * 128 + 128 * 64)
    text = 50 * (2 * 64 * 96 + 2 * 64 * 48 + 64 * 4 + 2 * 3 * 64 * 48)  # two of the four experts
    assert work.forward_flops == 2 * 2 * (vision + mergers + text)
    assert work.attention_flops == 2 * (4 * 32 * 100**2 + 2 * 96 * 50**2)
    assert work.read_bytes == checkpoint_bytes(case)


@pytest.mark.parametrize("size", EVERY_SIZE)
def test_shapes_of_published_sizes(size: str) -> None:
    """Catches a tensor that the model with this config.json does not have, and a wrong shape."""
    case = Case.of(size, 1, 1)
    config = transformers.AutoConfig.for_model(**case.config)
    with torch.device("meta"):
        model = getattr(transformers, case.config["architectures"][0])(config)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = re.compile("(language_model|model|visual)[.]")  # differs between files and versions of transformers
    shapes, expected = ({prefix.sub("", name): each[name] for name in each} for each in (found, tensor_shapes(case)))
    if case.tied:
        shapes.pop("lm_head.weight")
    assert shapes.keys() == expected.keys()
    # transformers 5 transposes the experts.
    assert all(sorted(shapes[name]) == sorted(shape) for name, shape in expected.items())
    assert all(shapes[name] == shape for name, shape in expected.items() if ".experts." not in name)


def test_extrapolation(little: None) -> None:
    """Catches fixed costs that are multiplied, and vision blocks that count as decoder layers."""
    stages = {
        "visual.blocks.0": {"forward": 2.0},
        "visual.merger": {"forward": 5.0},
        "model.layers.0": {"forward": 10.0, "weights": 1.0},
        "model.layers.1": {"forward": 20.0, "weights": 3.0},
    }
    phases = {"forward": 37.0, "weights": 4.0, "imports": 3.0}
    every = bench_scale.extrapolated({"phases": phases, "stages": stages}, Case.of("7B", 2, 1))
    assert every == {"forward": 37.0 + 8 * 2 + 15, "weights": 4.0 + 2, "imports": 3.0}


def test_extrapolation_with_mergers_between_blocks(little: None) -> None:
    """Catches mergers that are not extrapolated, or counted once per block."""
    stages = {
        "model.visual.blocks.0": {"forward": 2.0},
        "model.visual.deepstack_merger_list.0": {"forward": 3.0},
        "model.visual.merger": {"forward": 5.0},
        "model.language_model.layers.0": {"forward": 10.0},
    }
    every = bench_scale.extrapolated({"phases": {"forward": 20.0}, "stages": stages}, Case.of("little-moe", 1, 1))
    assert every == {"forward": 20.0 + 4 * 2 + 2 * 3 + 2 * 10}


@pytest.mark.parametrize("name", scale_runner.PHASES)
def test_functions_of_phases_exist(name: str) -> None:
    """Catches a function that was renamed or moved, so that no phase would count its time."""
    assert callable(pkgutil.resolve_name(name))


@pytest.mark.slow
def test_a_measured_run(little: None, tmp_path: Path) -> None:
    """Catches a checkpoint that does not compile, and a phase whose function was renamed."""
    case = Case.of("7B", 1, 2)
    make(tmp_path / "source", case)
    samples = tmp_path / "samples.pt"
    torch.save(samples_of(case.config, 1, 60), samples)
    result = bench_scale.compiled(tmp_path / "source", tmp_path / "result", samples, ["act_method=1"], 1)
    phases = {"reading", "forward", "observing", "proofs", "folding", "smoothing", "activation ranges", "weights"}
    phases |= {"checks", "lowering", "writing", "verifying", "publishing", "imports", "tracing"}
    assert phases <= set(result["phases"])
    assert list(result["stages"]) == ["visual.blocks.0", "visual.blocks.1", "visual.merger", "model.layers.0"]
    assert abs(sum(result["phases"].values()) - result["seconds"]) < 1.0
    assert "model.layers.0.mlp.up_proj.weight" in bench_scale.quantized_weights(tmp_path / "result")
