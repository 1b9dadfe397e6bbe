"""Model families of other packages: by import path, registered in Python, and from installed packages."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import vlqc
from tests.support.interrupted_runs import STAGES, fail_at_stage
from tests.support.tiny import TINY
from tools.demo import tiny_task
from vlqc.cli.commands import app
from vlqc.errors import UserError
from vlqc.families import registry
from vlqc.families.registry import family_of, find_family, load_family, register_family
from vlqc.import_paths import _entry_points
from vlqc.reporting.dumps import trace_only
from vlqc.reporting.dumps.writer import Dumper

FAMILIES = """
from vlqc import ModelFamily
from vlqc.families.family import Role
from vlqc.families.qwen2_5_vl import Qwen25VL


class MadeUp(Qwen25VL):
    name = "made_up_vl"
    title = "MadeUp-VL"
    model_types = ("made_up_vl",)
    engine_rows = "qwen2_5_vl"


class Second(MadeUp):
    name = "second"


class WithoutTypes(MadeUp):
    model_types = ()


class OneWord(MadeUp):
    model_types = "made_up_vl"
    roles = {"qkv": ("*.qkv",)}


class Incomplete(MadeUp):
    roles = {
        **Qwen25VL.roles,
        Role.OUT: ("model.layers.*.self_attn.o_porj",),
        Role.MERGER: ("visual.merger.mlp.0",),
    }


class UnknownRows(MadeUp):
    engine_rows = "qwen3x"


class OldTypedDict(MadeUp):
    def config_schema(self):
        raise TypeError("use another TypedDict\\n\\nand more lines")


class Uncallable(MadeUp):
    def __init__(self, size):
        pass


class NoLimits(MadeUp):
    def config_limits(self, config, largest, tensors):
        return config["absent"]


class OtherType(MadeUp):
    model_types = ("other", "another")


class NotReleased(MadeUp):
    architectures = ("Qwen2_5_VLForConditionalGeneration",)
    transformers_version = "99.1"

    def model_class(self, architecture):
        return None


class Bare(ModelFamily):
    name = "bare"


class Replaces(Qwen25VL):
    title = "Replaced"


number = 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder: a module with families, and a checkpoint of a model type that vlqc does not have."""
    monkeypatch.setattr(registry, "_registered", [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other_families.py").write_text(FAMILIES, encoding="utf-8")
    shutil.copytree(TINY, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "made_up_vl"}))
    yield tmp_path
    sys.modules.pop("other_families", None)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, package: str, **entries: str) -> None:
    """An installed package, as far as its metadata goes."""
    info = folder / "site" / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {place}" for name, place in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[vlqc.families]", *lines]))
    monkeypatch.syspath_prepend(str(folder / "site"))
    _entry_points.cache_clear()  # a second package in a folder that was looked through


def run(*words: str) -> tuple[int, str]:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


MODEL_TYPE = {"model_type": "made_up_vl"}


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("absent_module:X", ["there is no module absent_module"]),
        ("other_families:Missing", ["has no class Missing"]),
        ("other_families:number", ["not a subclass of vlqc.ModelFamily"]),
        ("other_families:ModelFamily", ["not a subclass of vlqc.ModelFamily"]),
        ("other_families", ["'other_families'", "write module:Class"]),
        ("other_families:WithoutTypes", ["model_types is empty"]),
        ("other_families:OneWord", ["model_types", "valid tuple", "roles['qkv']"]),
        ("other_families:UnknownRows", ["engine_rows: no engine has rows", "'qwen3x'; did you mean qwen3"]),
        ("other_families:OldTypedDict", ["OldTypedDict.config_schema failed", "TypeError: use another TypedDict"]),
        ("other_families:Uncallable", ["Uncallable.__init__ failed", "'size'"]),
        ("other_families:Bare", ["config_schema is not defined", "title is not defined", "model_types is not"]),
    ],
)
def test_faults_of_a_family(folder: Path, path: str, words: list[str]) -> None:
    """Catches a class that fails in the middle of a compilation, and an error without a hint for its author."""
    with pytest.raises(UserError) as caught:
        load_family(path)
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(UserError, match=words[0]):
        vlqc.compile(model_path="model", save_directory="out", family=path, samples=tiny_task.samples(1))
    code, output = run("inspect", "model", "--family", path)
    assert code == 2 and all(word in output for word in words[:1])


def test_precedence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an installed package that replaces a family of vlqc, and a registered one that does not."""
    install(folder, monkeypatch, "plug", qwen2_5_vl="other_families:Replaces", made_up_vl="other_families:MadeUp")
    own = find_family({"model_type": "qwen2_5_vl"})
    assert own is not None and own.title == "Qwen2.5-VL"
    installed = find_family(MODEL_TYPE)
    assert installed is not None and installed.name == "made_up_vl" and find_family(MODEL_TYPE) is installed
    register_family(load_family("other_families:Replaces"))
    replaced = find_family({"model_type": "qwen2_5_vl"})
    assert replaced is not None and replaced.title == "Replaced"
    for name in ("Second", "MadeUp", "Second"):
        register_family(load_family(f"other_families:{name}"))
    latest = find_family(MODEL_TYPE)
    assert latest is not None and latest.name == "second"


def test_only_the_family_in_use_is_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a broken package that breaks the compilation of other models, and one that is not reported."""
    install(folder, monkeypatch, "plug", made_up_vl="absent_module:X", other_type="other_families:MadeUp")
    assert find_family({"model_type": "qwen2_vl"}) is not None
    with pytest.raises(UserError, match=r"(?s)'made_up'.*qwen2_vl.*made_up_vl.*did you mean made_up_vl"):
        family_of({"model_type": "made_up"}, "config.json")
    with pytest.raises(UserError, match="there is no module absent_module"):
        find_family(MODEL_TYPE)
    with pytest.raises(UserError, match="other_families:MadeUp has no model type other_type"):
        find_family({"model_type": "other_type"})
    assert find_family({"model_type": ["made_up_vl"]}) is None


def test_two_installed_families(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one of two packages that is chosen silently."""
    install(folder, monkeypatch, "plug", made_up_vl="other_families:MadeUp")
    install(folder, monkeypatch, "plug2", made_up_vl="other_families:Second")
    with pytest.raises(UserError, match=r"(?s)two families for the model type made_up_vl.*MadeUp.*--family"):
        find_family(MODEL_TYPE)
    register_family(load_family("other_families:Second"))
    chosen = find_family(MODEL_TYPE)
    assert chosen is not None and chosen.name == "second"


def test_only_families_are_registered(folder: Path) -> None:
    """Catches an object or another class that is registered and fails later."""
    wrong: list[Any] = ["other_families:MadeUp", dict, load_family("other_families:MadeUp")()]
    for value in wrong:
        with pytest.raises(UserError, match="not a subclass of"):
            register_family(value)


def test_a_method_that_fails(folder: Path) -> None:
    """Catches an error in a family's own code that is reported as a bug of vlqc."""
    with pytest.raises(UserError, match=r"(?s)other_families:NoLimits.config_limits failed.*KeyError: 'absent'"):
        vlqc.compile(
            model_path="model", save_directory="out", family="other_families:NoLimits", samples=tiny_task.samples(1)
        )


@pytest.mark.parametrize("command", ["compile", "inspect", "verify", "report", "dump", "run-pass"])
def test_a_family_for_another_model_type(folder: Path, command: str) -> None:
    """Catches --family that is ignored without an error."""
    compiling = ("--model_path", "model", "--calib_images", ".", "--save_directory", "out")
    words = {"compile": compiling, "dump": ("model", "--output", "out"), "run-pass": ("model", "insert-observers")}
    code, output = run(command, *words.get(command, ("model",)), "--family", "other_families:OtherType")
    assert (
        code == 2 and "other_families:OtherType is for model type other or another; config.json has made_up" in output
    )
    with pytest.raises(UserError, match="unsupported model type"):
        family_of({"model_type": "another"}, "config.json")


@pytest.mark.parametrize("command", ["compile", "plan", "dump"])
def test_layers_without_a_role(folder: Path, command: str) -> None:
    """Catches a family without some layers, which is found when all stages are compiled, as a bug of vlqc."""
    compiling = ("compile", "--model_path", "model", "--calib_images", ".", "--save_directory", "out")
    words = {"compile": compiling, "plan": (*compiling, "--plan"), "dump": ("dump", "model")}[command]
    code, output = run(*words, "--family", "other_families:Incomplete")
    assert code == 2 and "where: other_families:Incomplete\n" in output
    assert "no role for visual.merger.mlp.2, model.layers.*.self_attn.o_proj\n" in output
    assert "model matches model.layers.*.self_attn.o_porj\n" in output


@pytest.mark.every_transformers
def test_transformers_without_the_model(folder: Path) -> None:
    """Catches a command that fails for an old transformers without the version that has the model."""
    register_family(load_family("other_families:NotReleased"))
    shutil.copytree("model", "compiled")
    (folder / "compiled" / "quant_model_description.json").write_text("{}")
    commands: list[Callable[[], Any]] = [
        lambda: vlqc.compile(model_path="model", save_directory="out", samples=tiny_task.samples(1)),
        lambda: vlqc.load("compiled"),
        lambda: vlqc.verify_folder("compiled"),
        lambda: trace_only.trace(Path("model"), Dumper(None, model_path=Path("model"))),
    ]
    for command in commands:
        with pytest.raises(UserError, match=r"(?s)MadeUp-VL is not available.*install transformers 99\.1 or newer"):
            command()


@pytest.mark.slow
@pytest.mark.every_transformers
def test_every_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a command that does not find a third-party family, or finds it without --family."""
    photos = str(Path(__file__).parents[1] / "photos")
    named = ("--family", "other_families:MadeUp")
    compiling = ("compile", "--model_path", "model", "--calib_images", photos, "--save_directory", "out")
    commands: list[tuple[tuple[str, ...], str]] = [
        ((*compiling, "--plan"), "MindIE"),
        ((*compiling, "--dump_ir", "dump", "--dump_formats", "bundle", "--dump_stages", "model.layers.0"), "output"),
        (("inspect", "out"), "language layers"),
        (("dump", "model", "--stages", "model.layers.0"), "model.layers.0.mlp.up_proj"),
        (("verify", "out"), "no faults"),
        (("verify", "out", "--model_path", "model"), "no faults"),
        (("report", "out"), "written"),
        (("run-pass", next_bundle := "dump/model.layers.0/00-traced.bundle", "rotate-heads"), "rotat"),
    ]
    for words, expected in commands:
        monkeypatch.setattr(registry, "_registered", [])
        code, output = run(*words)
        if words[0] not in ("report", "inspect"):  # these show a folder without its family, too
            assert code != 0 and "made_up_vl" in output and "--family" in output, (words, output)
        code, output = run(*words, *named)
        assert code == 0 and expected in output, (words, output)
    assert Path(next_bundle).exists()
    assert "MadeUp-VL" in Path("vlqc_report.html").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="add --overwrite"):
        vlqc.compile(model_path="model", save_directory="out", samples=tiny_task.samples(1), family=named[1])
    assert vlqc.load("out")


@pytest.mark.slow
def test_resume(folder: Path) -> None:
    """Catches a run that is resumed with another family, or with changed source of the same one."""
    options: dict[str, Any] = {"model_path": "model", "save_directory": "out", "samples": tiny_task.samples(1)}
    with pytest.raises(RuntimeError, match="stopped"), fail_at_stage(STAGES[3], RuntimeError("stopped")):
        vlqc.compile(**options, family="other_families:MadeUp")
    with pytest.raises(UserError, match=r"model family: other_families:MadeUp before, other_families:Second now"):
        vlqc.compile(**options, family="other_families:Second", resume=True)
    source = Path("other_families.py").read_text(encoding="utf-8")
    Path("other_families.py").write_text(f"{source}# changed\n", encoding="utf-8")
    with pytest.raises(UserError, match="source of other_families"):
        vlqc.compile(**options, family="other_families:MadeUp", resume=True)
    Path("other_families.py").write_text(source, encoding="utf-8")
    assert vlqc.compile(**options, family="other_families:MadeUp", resume=True).folder.exists()
