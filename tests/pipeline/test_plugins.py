"""Third-party passes, by import path and from installed packages."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import vlqc
from tests.support.tiny import TINY
from tools.demo import tiny_task
from vlqc.cli.commands import app
from vlqc.cli.pass_listing import describe_passes
from vlqc.emit.resume.fingerprint import source_digests
from vlqc.errors import InternalError, UserError
from vlqc.import_paths import _entry_points
from vlqc.pipeline.manager import PassManager
from vlqc.pipeline.ordering import check_order
from vlqc.pipeline.registry import load_pass, parse_pipeline, print_pipeline

PASSES = """
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from vlqc import Pass

Path(__file__).with_suffix(".ran").touch()


@dataclass(frozen=True)
class Good(Pass):
    name: ClassVar[str] = "good"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "does nothing well"
    most: int = 3

    def run(self, stage):
        return self.most > 3  # which is a lie


@dataclass(frozen=True)
class Twin(Good):
    pass


@dataclass(frozen=True)
class Usurper(Good):
    name: ClassVar[str] = "smooth-m2"


@dataclass(frozen=True)
class Breaks(Good):
    name: ClassVar[str] = "breaks"

    def run(self, stage):
        raise ZeroDivisionError("by the author")


@dataclass(frozen=True)
class Needy(Pass):
    must: int
    table: dict[str, int] | None = None
    name: ClassVar[str] = "needy"
    kind: ClassVar[str] = "analysis"
    summary: ClassVar[str] = "has an option without a default"


class Bare(Pass):
    name = "Bare Name"
    kind = "both"


class Outer:
    @dataclass(frozen=True)
    class Inner(Good):
        pass


number = 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, with a module in it."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "third_party.py").write_text(PASSES, encoding="utf-8")
    monkeypatch.chdir(folder)
    yield folder
    for name in ("third_party", "broken_module", "half_module"):
        sys.modules.pop(name, None)


def offer(folder: Path, monkeypatch: pytest.MonkeyPatch, package: str, **entries: str) -> None:
    """An installed package, as far as its metadata goes."""
    info = folder / "site" / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name.replace('_', '-')} = {place}" for name, place in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[vlqc.passes]", *lines]))
    monkeypatch.syspath_prepend(str(folder / "site"))
    _entry_points.cache_clear()  # a second package in a folder that was looked through


def test_text_and_back(folder: Path) -> None:
    """Catches a third-party pass whose text does not parse back, and a nested class that is not found."""
    text = "third_party:Good{most=2},third_party:Outer.Inner"
    assert print_pipeline(parse_pipeline(text)) == text
    assert "" not in sys.path[-1:]  # the working folder is not left behind


def test_what_is_installed_comes_first(folder: Path) -> None:
    """Catches a file of the working directory that shadows an installed module."""
    (folder / "colorsys.py").write_text("raise SystemExit('the wrong module')")
    with pytest.raises(UserError, match="colorsys has no class Good"):
        load_pass("colorsys:Good")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("absent_module:Good", ["there is no module absent_module", "run vlqc in the folder of absent_module.py"]),
        ("third_party.py:Good", ["there is no module third_party.py", "third_party:Good"]),
        ("third_party.deeper:Good", ["there is no module third_party.deeper"]),
        ("half_module:Good", ["half_module", "imports absent_module"]),
        ("broken_module:Good", ["broken_module", "SyntaxError"]),
        ("third_party:Godo", ["Godo", "did you mean Good"]),
        ("third_party:number", ["third_party:number", "type int", "vlqc.Pass"]),
        ("third_party:Outer", ["third_party:Outer", "not a subclass of vlqc.Pass"]),
        ("third_party:Pass", ["third_party:Pass", "not a subclass"]),
        ("third_party:", ["'third_party:'", "write module:Class"]),
        (":Good", ["':Good'", "write module:Class"]),
        ("third_party:Bare", ["'Bare Name'", "kind", "summary", "frozen dataclass"]),
        ("third_party:Usurper", ["third_party:Usurper", "smooth-m2", "rename"]),
        ("third_party:Needy", ["must is missing", "third_party:Needy{must=...}"]),
        ("third_party:Needy{must=1,table=x}", ["table=x", "dictionary"]),
        ("third_party:Good{mots=2,most=x}", ["has no option 'mots'", "did you mean most", "most=x", "integer"]),
    ],
)
def test_faults(folder: Path, text: str, words: list[str]) -> None:
    """Catches a traceback, or an error without a hint for the author of the pass."""
    (folder / "half_module.py").write_text("import absent_module")
    (folder / "broken_module.py").write_text("def (")
    with pytest.raises(UserError) as caught:
        parse_pipeline(text)
    for word in words:
        assert word in str(caught.value)


def test_two_passes_of_one_name(folder: Path) -> None:
    """Catches two classes of one name: the order is checked by name."""
    with pytest.raises(UserError, match="two passes are named good"):
        check_order(parse_pipeline("insert-observers,third_party:Good,third_party:Twin"))
    check_order(parse_pipeline("insert-observers,third_party:Good,third_party:Good{most=2}"))


def test_blame(folder: Path) -> None:
    """Catches an error of a third-party pass that is reported as a bug of vlqc, or without the stage."""
    from tests.support.small_stage import traced

    with pytest.raises(InternalError, match=r"changed nothing[\s\S]*check third_party:Good"):
        PassManager(parse_pipeline("third_party:Good{most=4}")).run(traced())
    with pytest.raises(ZeroDivisionError) as caught:
        PassManager(parse_pipeline("third_party:Breaks")).run(traced())
    (note,) = caught.value.__notes__
    assert "visual.blocks.0" in note and "third_party:Breaks" in note


def test_entry_points(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an entry point that is not found, not listed, or imported before it is used."""
    offer(folder, monkeypatch, "plug", good="third_party:Good", smooth_m2="third_party:Good")
    assert not (folder / "third_party.ran").exists()
    with pytest.raises(UserError, match="did you mean good"):
        parse_pipeline("goood")
    assert not (folder / "third_party.ran").exists()
    text = "good{most=2},third_party:Twin"
    assert print_pipeline(parse_pipeline(text)) == text
    assert print_pipeline(parse_pipeline("third_party:Good")) == "good"
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["passes"]).output
    assert "does nothing well  (third_party:Good)" in shown and "options: most=3" in shown
    described = {each["name"]: each for each in describe_passes()}
    assert described["good"]["class"] == "third_party:Good" and described["good"]["options"] == {"most": "3"}
    assert described["smooth-m2"]["class"] == "vlqc.passes.smooth_m2:SmoothM2", "a plug-in replaces no own pass"
    assert load_pass("smooth-m2").__module__ == "vlqc.passes.smooth_m2"


def test_entry_points_that_cannot_be_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a broken package that breaks the list of passes, and an ambiguous name that is resolved silently."""
    offer(folder, monkeypatch, "plug", good="third_party:Good", other="third_party:Twin", gone="absent_module:X")
    offer(folder, monkeypatch, "plug2", good="third_party:Twin")
    for name, words in (
        ("good", "third_party:Good and third_party:Twin|third_party:Twin and third_party:Good"),
        ("other", "third_party:Twin has two names"),
        ("gone", "there is no module absent_module"),
    ):
        with pytest.raises(UserError, match=words):
            load_pass(name)
    ended = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["passes"])
    assert ended.exit_code == 0 and ended.output.count("cannot be used") == 3


def test_sources_are_facts_of_a_run(folder: Path) -> None:
    """Catches a resumed run with other code than it started with."""
    passes = [type(step) for step in parse_pipeline("insert-observers,third_party:Good")]
    before = source_digests(passes)
    assert list(before) == ["source of third_party"]
    (folder / "third_party.py").write_text(PASSES + "\n")
    assert source_digests(passes) != before


def test_no_file_names_code(folder: Path, tmp_path: Path) -> None:
    """Catches a pipeline that is read from a checkpoint or a compiled folder, and runs code."""
    model = Path(shutil.copytree(TINY, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    text = "insert-observers,third_party:Good"
    (model / "config.json").write_text(json.dumps({**config, "pipeline": text, "passes": [text]}))
    (model / "vlqc_report.json").write_text(json.dumps({"pipeline": text, "command": ["--pipeline", text]}))
    (model / "recipe.yaml").write_text(f"pipeline: {text}\n")
    out = tmp_path / "out"
    vlqc.compile(model_path=model, save_directory=out, samples=tiny_task.samples(1), weight_method="round")
    facts = json.loads((out / "vlqc_report.json").read_text())
    (out / "vlqc_report.json").write_text(json.dumps({**facts, "pipeline": text}))
    vlqc.verify_folder(out)
    vlqc.write_report(out, tmp_path / "page.html")
    vlqc.load(out)
    assert not (folder / "third_party.ran").exists()
    parse_pipeline("third_party:Good")
    assert (folder / "third_party.ran").exists(), "the mark proves something only if running leaves it"
