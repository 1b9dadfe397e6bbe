"""Dumps of every stage after every pass: files, their content, and passes run again from bundles."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import vlqc
from tests.support.tiny import TINY
from tools.demo import tiny_task
from vlqc.cli.commands import app
from vlqc.errors import UserError
from vlqc.ir.snapshot import StageSnapshot
from vlqc.options.options import Options
from vlqc.pipeline.presets import pipeline_text
from vlqc.pipeline.registry import parse_pipeline, print_pipeline
from vlqc.reporting.dumps.bundle import read_bundle
from vlqc.reporting.dumps.replay import run_pass
from vlqc.reporting.dumps.trace_only import run_until, trace
from vlqc.reporting.dumps.writer import Dumper

CHOSEN = ("visual.blocks.1", "visual.merger", "model.layers.1")
SHIFTED: dict[str, Any] = {"shift": True, "target": "vllm-ascend", "rotate": "auto"}
W4A8: dict[str, Any] = {
    "w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False, "act_method": 1, "w4a8_scope": "all",
    "propagate": "quantized", "weight_method": "round",
}  # fmt: skip


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages of the tiny model in three formats, of a compilation with every kind of rewrite."""
    folder = tmp_path_factory.mktemp("dump")
    vlqc.compile(
        model_path=TINY, save_directory=folder / "out", samples=tiny_task.samples(3, seed=1), dump_ir=folder / "ir",
        dump_stages=CHOSEN, dump_formats="text,json,bundle", **SHIFTED,
    )  # fmt: skip
    return folder / "ir"


def steps_of(**options: Any) -> list[str]:
    return [print_pipeline([step]) for step in parse_pipeline(pipeline_text(Options.without_paths(**options)))]


def test_chosen_stages_in_chosen_formats(dump: Path) -> None:
    """Catches a missing stage, state or format, and files of other stages."""
    names = ["00-traced", *(f"{n:02}-after-{step.partition('{')[0]}" for n, step in enumerate(steps_of(**SHIFTED), 1))]
    assert sorted(path.name for path in dump.iterdir()) == sorted(CHOSEN)
    for stage in dump.iterdir():
        expected = {f"{name}.{suffix}" for name in names for suffix in ("vlqc", "json", "bundle")}
        assert {path.name for path in stage.iterdir()} == expected


def test_json_agrees_with_the_text(dump: Path) -> None:
    """Catches JSON with missing keys, or with numbers that differ from the text."""
    path = dump / "model.layers.1" / "10-after-lower-linears"
    content, stage = (
        json.loads(path.with_suffix(".json").read_text()),
        vlqc.parse_stage(path.with_suffix(".vlqc").read_text()),
    )
    assert (content["stage"], content["part"], content["dtype"]) == ("model.layers.1", "language", "bfloat16")
    assert [node["name"] for node in content["nodes"]] == [node.name for node in stage.graph.nodes]
    shaped = {node["name"]: (tuple(node["shape"]), node["dtype"]) for node in content["nodes"] if "shape" in node}
    assert shaped["hidden_states"][1] == "float32"
    site, known = content["sites"]["model.layers.1.self_attn.q_proj"], stage.sites["model.layers.1.self_attn.q_proj"]
    assert known.input is not None
    assert site["input"] == {"scale": known.input.scale, "offset": known.input.offset} and site["scheme"] == "W8A8"
    assert site["weight"]["weight"]["dtype"] == "int8"
    residual, heads = content["rotations"]
    assert (residual["kind"], residual["size"], residual["done"]) == ("residual stream", 192, True)
    assert residual["columns"]["model.layers.1.mlp.up_proj"] == "model.layers.1.post_attention_layernorm"
    assert heads["rows"] == {"model.layers.1.self_attn.v_proj": [0, 32]} and len(heads["absmax"]) == 3
    assert content["tensors"].keys() == stage.tensors.keys() and len(content["observations"]) == 4 == len(
        content["edges"]
    )


@pytest.mark.every_transformers
@pytest.mark.parametrize("stage", CHOSEN)
def test_every_pass_replays_to_the_same_text(dump: Path, stage: str) -> None:
    """Catches content of a stage that a bundle omits or rounds."""
    bundles, texts = sorted((dump / stage).glob("*.bundle")), sorted((dump / stage).glob("*.vlqc"))
    for number, step in enumerate(steps_of(**SHIFTED)):
        assert run_pass(bundles[number], step).text == texts[number + 1].read_text(), step


def test_four_bit_passes_replay(tmp_path: Path) -> None:
    """Catches bundles without group scales, lowered modules, or what was observed of keys and values, or with other
    samples than the compilation."""
    vlqc.compile(
        model_path=TINY, save_directory=tmp_path / "out", samples=tiny_task.samples(2, seed=1), dump_ir=tmp_path / "ir",
        dump_stages="model.layers.0", dump_formats="text,bundle", **W4A8, kv_cache="int8",
    )  # fmt: skip
    folder = tmp_path / "ir" / "model.layers.0"
    bundles, texts = sorted(folder.glob("*.bundle")), sorted(folder.glob("*.vlqc"))
    for number, step in enumerate(steps_of(**W4A8, kv_cache="int8")):
        if number != 1:  # covered by the test above
            assert run_pass(bundles[number], step).text == texts[number + 1].read_text(), step
    lowered = read_bundle(bundles[-1])
    assert all(map(lowered.is_lowered_cache, lowered.caches.values())) and len(lowered.cache_observations) == 1
    assert (
        lowered.is_lowered(lowered.sites["model.layers.0.mlp.up_proj"])
        and lowered.execution.probe_output().isfinite().all()
    )


def test_unchanged_tensors_are_stored_once(dump: Path) -> None:
    """Catches a dump that writes all weights again after passes that do not change them."""
    sizes: dict[str, set[int]] = {}
    for file in (dump / "model.layers.1").glob("*.bundle/*.safetensors"):
        sizes.setdefault(file.name, set()).add(file.stat().st_ino)
    assert len(sizes["inputs.safetensors"]) == 2  # with all samples, with the probe alone
    assert len(sizes["weights.safetensors"]) == 7  # traced; rotated twice; shifted; smoothed; quantized; lowered
    assert len(sizes["observations.safetensors"]) == 4  # none; filled; shifted; smoothed


def test_overwrite_deletes_dump_files_only(dump: Path, tmp_path: Path) -> None:
    """Catches files of an older dump that stay, and other files that are deleted."""
    shutil.copytree(dump / "visual.merger", tmp_path / "visual.merger")
    (tmp_path / "visual.merger" / "my notes.txt").write_text("mine")
    trace(TINY, Dumper(tmp_path, stages=["visual.merger"], formats=["json"], overwrite=True))
    assert sorted(path.name for path in (tmp_path / "visual.merger").iterdir()) == ["00-traced.json", "my notes.txt"]


# ---- damaged bundles -------------------------------------------------------------------------------------------------


def other_value(folder: Path) -> None:
    tensors = load_file(folder / "weights.safetensors")
    tensors["module/self_attn.o_proj.weight"][3, 4] += 1
    save_file(tensors, folder / "weights.safetensors", {})


def edit(**keys: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "bundle.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return change


def change_probe(**arguments: object) -> Callable[[Path], None]:
    """Other keyword arguments for the probe; first: its first positional argument."""

    def change(folder: Path) -> None:
        path = folder / "bundle.json"
        content = json.loads(path.read_text())
        probe = content["calls"][content["probe"]] if isinstance(content["probe"], int) else content["probe"]
        if "first" in arguments:
            probe["args"]["tuple"][0] = arguments["first"]
        probe["kwargs"]["dict"].update({name: value for name, value in arguments.items() if name != "first"})
        path.write_text(json.dumps(content))

    return change


def edit_text(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / "graph.vlqc").read_text()
        assert old in text
        (folder / "graph.vlqc").write_text(text.replace(old, new, 1))

    return change


def link(folder: Path) -> None:
    (folder / "graph.vlqc").unlink()
    (folder / "graph.vlqc").symlink_to("/etc/hostname")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other values": (other_value, "match|invalid|NaN|size"),
    "a module of any class": (edit(replaced=[{"path": "mlp", "kind": "os.system"}]), "os.system"),
    "another stage": (edit(stage="model.layers.77"), "has no module"),
    "an unknown key": (edit(run="rm -rf"), "run"),
    "not JSON": (lambda folder: (folder / "bundle.json").write_text("{"), "bundle.json"),
    "no tensors": (lambda folder: (folder / "inputs.safetensors").write_bytes(b""), "invalid bundle"),
    "a link": (link, "link out of"),
    "no such file": (lambda folder: (folder / "observations.safetensors").unlink(), "invalid bundle"),
    "a million blocks": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps({**json.loads((folder / "config.json").read_text()), "num_hidden_layers": 10**6})
        ),
        "num_hidden_layers",
    ),
    "a probe that is no tensor": (change_probe(first=True), "invalid bundle"),
    "a probe without positions": (change_probe(position_embeddings=None), "invalid bundle"),
    "a mask that is no tensor": (change_probe(attention_mask=True), "invalid bundle"),
    "a huge rotation": (edit_text("size=192", "size=1000000000000"), "expected a multiple of 1000000000000"),
    "a rotated layer of another stage": (edit_text('rows "model.layers.1', 'rows "model.layers.2'), "the stage has no"),
    "negative rows": (edit_text(" at 0", " at -1"), "numbers of rows"),
    "an integer input that is rotated": (
        edit_text('input "hidden_states"\n', 'input "cache_position"\n'),
        "input cache",
    ),
    "no text": (lambda folder: (folder / "graph.vlqc").write_text("stage"), "graph.vlqc"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_bundles_are_refused(dump: Path, tmp_path: Path, kind: str) -> None:
    """Catches a traceback, or a pass that runs on a stage that differs from its text."""
    damage, message = DAMAGE[kind]
    folder = tmp_path / "some.bundle"
    shutil.copytree(dump / "model.layers.1" / "05-after-assign-precision.bundle", folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        run_pass(folder, "smooth-m2")


def test_stages_that_are_not_rotated_yet(dump: Path, tmp_path: Path) -> None:
    """Catches observations of rotated inputs with unrotated weights, and another seed than that of the inputs."""
    traced = dump / "model.layers.1" / "00-traced.bundle"
    with pytest.raises(UserError, match="the stage is not rotated yet: residual stream, attention heads"):
        run_pass(traced, "insert-observers")
    with pytest.raises(UserError, match="the stage is not rotated yet: attention heads"):
        run_pass(traced, "rotate-residual,insert-observers")
    with pytest.raises(UserError, match=r"use rotate-heads\{seed=0\}"):
        run_pass(traced, "rotate-residual,rotate-heads{seed=1}")
    wrong = shutil.copytree(traced, tmp_path / "some.bundle")
    edit_text("    output 0\n", "")(wrong)
    with pytest.raises(UserError, match=r"a rotation changes the output of model\.layers\.1"):
        run_pass(wrong, "rotate-residual")


def test_bundles_without_rotations(dump: Path, tmp_path: Path) -> None:
    """Catches bundles of earlier versions that cannot be read any more."""
    folder = shutil.copytree(dump / "model.layers.1" / "05-after-assign-precision.bundle", tmp_path / "some.bundle")
    text = (folder / "graph.vlqc").read_text()
    start = text.index("rotations {")
    without = text[:start] + text[text.index("}\n", start) + 2 :]
    (folder / "graph.vlqc").write_text(without)
    assert vlqc.print_stage(read_bundle(folder)) == without


@pytest.fixture(scope="module")
def merger(dump: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a bundle, for damages."""
    folder = tmp_path_factory.mktemp("bundles") / "some.bundle"
    return Path(shutil.copytree(dump / "visual.merger" / "03-after-split-window-attention.bundle", folder))


@pytest.mark.slow
@settings(max_examples=60)
@given(st.sampled_from(["bundle.json", "graph.vlqc", "config.json"]), st.data())
def test_any_damage_is_refused_or_harmless(merger: Path, name: str, data: st.DataObject) -> None:
    """Catches a traceback for an edited or truncated file, and a stage that differs from its text."""
    text = (merger / name).read_text()
    at, length = data.draw(st.integers(0, len(text) - 1)), data.draw(st.sampled_from([1, 2, 10, len(text)]))
    other = (
        text[:at] + data.draw(st.sampled_from(["", "0", "-1", "[]", "null", '"', "%x", "9" * 12])) + text[at + length :]
    )
    try:
        (merger / name).write_text(other)
        stage = read_bundle(merger)
        assert vlqc.print_stage(stage) == vlqc.print_stage(vlqc.parse_stage((merger / "graph.vlqc").read_text()))
    except UserError:
        pass
    finally:
        (merger / name).write_text(text)


def test_calibration_needs_all_samples(dump: Path) -> None:
    """Catches a calibration on the probe alone."""
    with pytest.raises(UserError, match="contains the probe only"):
        run_pass(dump / "model.layers.1" / "05-after-assign-precision.bundle", "insert-observers")


# ---- commands --------------------------------------------------------------------------------------------------------


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, result.stdout, result.stderr


def test_run_pass_command(dump: Path, tmp_path: Path) -> None:
    """Catches a command that does not print the changes, and an output file without the text."""
    bundle = str(dump / "model.layers.1" / "07-after-smooth-m2.bundle")
    code, out, err = run("run-pass", bundle, "quantize-activations{method=minmax}", "-o", str(tmp_path / "t.vlqc"))
    assert (code, err) == (0, "")
    assert "model.layers.1.self_attn.q_proj\n  input: none -> scale 0.0" in out and "items changed" in out
    code, text, err = run("run-pass", bundle, "quantize-activations{method=minmax}", "--text")
    assert text == (tmp_path / "t.vlqc").read_text() == vlqc.print_stage(vlqc.parse_stage(text))
    assert run("run-pass", str(tmp_path), "smooth-m2")[0] == 2
    assert run("run-pass", bundle, "smoothm2")[0] == 2
    assert run("run-pass", bundle, "quantize-activations", "-o", str(tmp_path / "none" / "t.vlqc"))[0] == 2


def test_dump_agrees_with_a_compilation(dump: Path, tmp_path: Path) -> None:
    """Catches a trace that differs from the compilation's in more than lengths, or that runs a pass."""
    code, out, err = run("dump", str(TINY), "--stages", "model.layers.1")
    assert code == 0, err
    stage, traced = vlqc.parse_stage(out), vlqc.parse_stage((dump / "model.layers.1" / "00-traced.vlqc").read_text())
    assert stage.tensors == traced.tensors and list(stage.sites) == list(traced.sites)
    assert [(node.op, node.name) for node in stage.graph.nodes] == [(node.op, node.name) for node in traced.graph.nodes]
    assert stage.edges is None and not stage.observations
    assert run("dump", str(TINY), "--formats", "json")[0] == 2
    assert "matches no stage" in run("dump", str(TINY), "--stages", "nothing")[2]
    assert "does not modify" in run("dump", str(TINY), "-o", str(TINY / "dump"))[2] and not (TINY / "dump").exists()
    (tmp_path / "file").touch()
    assert "it is a file" in run("dump", str(TINY), "-o", str(tmp_path / "file"))[2]


def test_dump_of_images(tmp_path: Path) -> None:
    """Catches a --calib_images that is ignored."""
    photo = Path(__file__).parents[2] / "photos" / "chelsea.jpg"
    words = ("dump", str(TINY), "--stages", "visual.merger", "-o", str(tmp_path))
    assert run(*words, "--calib_images", str(photo))[0] == 0
    real = (tmp_path / "visual.merger" / "00-traced.vlqc").read_text()
    assert run(*words, "--overwrite")[0] == 0
    assert (tmp_path / "visual.merger" / "00-traced.vlqc").read_text() != real


def test_stop_after(dump: Path, tmp_path: Path) -> None:
    """Catches a save folder that is created or replaced, and a state that differs from the compilation's."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    result = run_until(
        "smooth-m2", model_path=TINY, save_directory=tmp_path / "out", samples=tiny_task.samples(3, seed=1),
        dump_ir=tmp_path / "ir", dump_stages=CHOSEN[:2], **SHIFTED,
    )  # fmt: skip
    assert result.stages == CHOSEN[:2] and result.total == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ir", "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]
    for name in CHOSEN[:2]:
        files = sorted((tmp_path / "ir" / name).iterdir())
        assert files[-1].name == "07-after-smooth-m2.vlqc"
        assert all(file.read_text() == (dump / name / file.name).read_text() for file in files)


def test_print_after() -> None:
    """Catches texts of other passes and stages."""
    stages = {
        name: StageSnapshot(name, "vision", torch.bfloat16, vlqc.parse_stage(TEXT).graph) for name in ("a.0", "a.1")
    }
    shown: list[str] = []
    dumper = Dumper(None, stages=["a.1"], print_after="smooth-m2", show=shown.append)
    for stage in stages.values():
        for number, step in enumerate(parse_pipeline("smooth-m4,smooth-m2")):
            dumper.after(stage, number, step)
    assert shown == [f"; a.1 after smooth-m2\n{vlqc.print_stage(stages['a.1'])}"]


TEXT = 'stage "a.0" part=vision dtype=bfloat16 {\n  %x = input("x") : float32[2]\n  return (%x,)\n}\n'


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"dump_stages": ["a"]}, "--dump_ir FOLDER or --print_after"),
        ({"dump_formats": "json"}, "nothing is dumped"),
        ({"dump_formats": "jsn", "dump_ir": "d"}, "did you mean json"),
        ({"dump_formats": "", "dump_ir": "d"}, "text, json, onnx or bundle"),
    ],
)
def test_choices_without_a_dump_are_refused(options: dict[str, Any], fault: str) -> None:
    """Catches an option that is accepted and then ignored."""
    with pytest.raises(UserError, match=fault):
        Options.without_paths(**options)
