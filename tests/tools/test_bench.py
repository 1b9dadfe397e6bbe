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
    reference_rows,
    reference_runner,
    reference_table,
    scale_checkpoint,
    scale_runner,
    scheme_accuracy,
)
from tools.bench import scale as bench_scale
from tools.bench.metrics import Agreement
from tools.bench.process import CommandFailed, Usage, measured
from tools.bench.scale_bounds import Rates, work_of
from tools.bench.scale_checkpoint import Case, checkpoint_bytes, make, samples_of, tensor_shapes
from tools.checkpoints.families import Shape
from vlqc.kernels_ref.kv_cache import QuantizedCacheAttention
from vlqc.kernels_ref.quant_linear import MixQuantLinear
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


def row(
    tool: str, sqnr: float, scheme: str = "static-m2-act1", rotate: str | None = None, seed: int = 0
) -> reference_rows.Row:
    usage = None if tool == reference.FLOOR else Usage(12.5, 6.25, 300 * MIB)
    return reference_rows.Row(
        "case", seed, scheme, tool, Agreement(sqnr, 0.999, 0.00012, 0.9, 1.0), usage=usage, rotate=rotate
    )


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, list[str]]:
    """A comparison in which the tools write only their description: tool -> layers. "ran" lists the runs."""
    case = reference_cases.Case("case", 0, tmp_path / "float", [{"input_ids": torch.tensor([[1, 2]])}], [])
    layers: dict[str, list[str]] = {reference.MSMODELSLIM: ["a"], reference.VLQC: ["a"], "ran": []}

    def cases_of(*_: Any) -> Any:
        case.folder.mkdir()
        yield case

    def quantize(_: reference.Bench, tool: str, case: Any, save: Path, options: dict[str, Any]) -> None:
        layers["ran"].append(f"{tool} {options.get('rotate')}")
        save.mkdir(exist_ok=True)
        description = {f"{layer}.weight": "W8A8" for layer in layers[tool]}
        (save / "quant_model_description.json").write_text(json.dumps(description))

    monkeypatch.setattr(reference, "reference_python", lambda *_, **__: tmp_path)
    monkeypatch.setattr(reference, "cases_of", cases_of)
    monkeypatch.setattr(reference, "load_float", lambda _: torch.nn.Identity())
    monkeypatch.setattr(reference, "measure_float", lambda *_: None)
    monkeypatch.setattr(reference, "score", lambda *_: (Agreement(24.0, 1.0, 0.0, 1.0, 1.0), None, None))
    monkeypatch.setattr(reference.metrics, "round_weights", lambda model, _: model)
    monkeypatch.setattr(reference.Bench, "quantize", quantize)
    monkeypatch.setattr(reference, "evaluate", lambda *arguments: row(arguments[4], 30.0, scheme=arguments[3]))
    return layers


BOTH = [f"{reference.VLQC} none", f"{reference.VLQC} auto"]


def compare(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["reference.py", *arguments])
    return reference.main()


def test_a_comparison(
    quantized: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a missing row in the JSON file or the table, and a run without its value of `rotate`."""
    saved = tmp_path / "rows.json"
    assert compare(monkeypatch, "--schemes", "static-m2-act1,dynamic-m2", "--json", str(saved)) == 0
    assert quantized["ran"] == [f"{reference.MSMODELSLIM} None", *BOTH] * 2
    rows = [(each["scheme"], each["tool"], each["rotate"]) for each in json.loads(saved.read_text())]
    tools = [(reference.MSMODELSLIM, None), (reference.VLQC, "none"), (reference.VLQC, "auto")]
    expected = [(scheme, *tool) for scheme in ("static-m2-act1", "dynamic-m2") for tool in tools]
    assert rows == [*expected, (reference.FLOOR, reference.FLOOR, None)]
    assert "dynamic-m2" in capsys.readouterr().out


def test_different_layers_end_a_comparison(
    quantized: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches different layers that are compared nevertheless."""
    quantized[reference.VLQC].append("b")
    assert compare(monkeypatch, "--schemes", "dynamic-m2") == 1
    assert "b: FLOAT against W8A8" in capsys.readouterr().err


def test_known_results(
    quantized: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a known result that is measured again, that is used for other inputs or another scheme, or whose layers
    are not compared."""
    saved = str(tmp_path / "rows.json")
    assert compare(monkeypatch, "--schemes", "dynamic-m2", "--json", saved) == 0
    expected = reference_rows.read_rows(Path(saved))
    quantized["ran"].clear()
    assert compare(monkeypatch, "--schemes", "dynamic-m2", "--known_json", saved, "--json", saved) == 0
    assert quantized["ran"] == BOTH and reference_rows.read_rows(Path(saved)) == expected
    assert compare(monkeypatch, "--schemes", "static-m2-act1", "--known_json", saved) == 0
    assert quantized["ran"][2:] == [f"{reference.MSMODELSLIM} None", *BOTH]
    monkeypatch.setattr(reference, "digest_of", lambda _: 1)
    assert compare(monkeypatch, "--schemes", "dynamic-m2", "--known_json", saved) == 0
    assert quantized["ran"][5:] == [f"{reference.MSMODELSLIM} None", *BOTH]


def test_the_digest_of_a_case(tmp_path: Path) -> None:
    """Catches a change of a weight, or of an input, that leaves a known result valid."""
    weights = tmp_path / "model.safetensors"
    calibration = [{"input_ids": torch.tensor([[1, 2]]), "pixel_values": torch.ones(2, 3)}]
    case = reference_cases.Case("case", 0, tmp_path, calibration, calibration)
    digests = []
    for change in range(3):
        weights.write_bytes(b"some" if change < 1 else b"same")
        if change == 2:
            calibration[0]["pixel_values"][1, 2] = 2
        digests.append(reference_rows.digest_of(case))
    assert len(set(digests)) == 3 and digests[2] == reference_rows.digest_of(case)


def test_the_table() -> None:
    """Catches a truncated column, wrong units, columns without values, and a median of something other than the
    differences per seed."""
    rows, scheme = [], "static-m2-act2-shift"
    for seed, reference_sqnr, none, rotated in ((0, 20.0, 24.0, 24.5), (1, 22.0, 25.0, 29.0), (2, 29.0, 28.0, 30.0)):
        rows += [
            row(reference.MSMODELSLIM, reference_sqnr, scheme, seed=seed),
            row(reference.VLQC, none, scheme, "none", seed),
            row(reference.VLQC, rotated, scheme, "auto", seed),
        ]
    out = io.StringIO()
    reference_table.show(
        [*rows, row(reference.FLOOR, 37.0, reference.FLOOR)], Console(file=out, width=reference_table.WIDTH)
    )
    cells = [line.strip("│ ").replace("│", " ").split() for line in out.getvalue().splitlines() if "90.0" in line]
    assert cells[0][1:3] == ["msModelSlim", "22.00"]
    assert cells[1][:5] == ["vlqc", "--rotate", "none", "+3.00", "25.00"]
    assert cells[2] == ["vlqc", "+4.50", "+2.00", "29.00", "0.99900", "0.00012", "90.0", "12.5", "6.2", "300"]
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


def test_every_compilation_is_a_legal_combination() -> None:
    """Catches a compilation that vlqc refuses, and two compilations with the same options."""
    compilations = scheme_accuracy.COMPILATIONS.values()
    for compilation in compilations:
        searched = {"fallback": "auto", "max_bytes": 1000} if compilation.share else {}
        Options.without_paths(**compilation.options, **searched, rotate="none", target="vllm-ascend")
    assert len({str(compilation) for compilation in compilations}) == len(compilations)


def test_variants_of_a_model() -> None:
    """Catches a row of an int8 cache measured with a float one, or of one arithmetic with the other."""
    matrix, column, vector, one = torch.ones(4, 4), torch.ones(4, 1), torch.ones(4), torch.ones(1)
    stored = {"weight": matrix.to(torch.int8), "weight_scale": column, "weight_offset": column, "input_scale": one}
    stored |= {"input_offset": one, "quant_bias": vector.to(torch.int32), "deq_scale": vector}
    layer = MixQuantLinear.from_stored(stored, None)
    attention = QuantizedCacheAttention(torch.nn.Sequential(layer), torch.ones(4), torch.ones(4), 2)
    model = torch.nn.Sequential(attention)
    seen = [
        (cache, arithmetic, layer.static_input, isinstance(next(changed.children()), QuantizedCacheAttention))
        for cache, arithmetic, changed in scheme_accuracy.variants(model)
    ]
    assert seen == [
        (True, "dynamic", False, True),
        (True, "static", True, True),
        (False, "dynamic", False, False),
        (False, "static", True, False),
    ]
    assert [each[:2] for each in scheme_accuracy.variants(torch.nn.Sequential(torch.nn.Linear(2, 2)))] == [(False, "")]


def test_table_of_schemes_has_medians_and_known_rows_are_not_measured(tmp_path: Path) -> None:
    """Catches a value in another column, a mean in place of the median, and a known row that is measured again."""

    def measured(seed: int, sqnr: float, *, cache: bool = False) -> scheme_accuracy.Row:
        return scheme_accuracy.Row("case", seed, "W8A8", "none", "", cache, sqnr, 0.5, 1.0625 if cache else None, 0.75)

    rows = [measured(0, 10.0), measured(1, 40.0), measured(2, 30.0), measured(0, 21.0, cache=True)]
    out = io.StringIO()
    scheme_accuracy.show(rows, {"W8A8": 0.5}, Console(file=out, width=200))
    lines = [re.findall(r"[\w+ ]*W8A8[\w+ ]*|[\d.]+%?", line) for line in out.getvalue().splitlines() if "W8A8" in line]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["W8A8", "30.0", "0.5", "75.0%", "50.0%"],
        ["W8A8 + int8 cache", "21.0", "0.5", "1.0625", "75.0%", "50.0%"],
    ]
    bench = scheme_accuracy.Bench(["W8A8"], ["none"], tmp_path, known=rows)
    case = reference_cases.Case("case", 0, tmp_path, [], [])
    bench.float_of = lambda case: None  # type: ignore[method-assign, assignment, return-value]
    assert list(bench.rows(case)) == [rows[0], rows[3]]


def test_sparse_checkpoint_has_the_sizes_without_values(tmp_path: Path) -> None:
    """Catches files of another size or header than those with values, or files that take space."""
    case = Case("3B", 1, 1)
    assert make(tmp_path, case, values=False) == checkpoint_bytes(case)
    (path,) = tmp_path.glob("*.safetensors")
    header = int.from_bytes(path.open("rb").read(8), "little")
    assert path.stat().st_size == 8 + header + checkpoint_bytes(case)
    assert path.stat().st_blocks * 512 < 0.1 * checkpoint_bytes(case)
