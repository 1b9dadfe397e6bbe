"""The commands: arguments, exit codes, and what goes to stdout and stderr. The API behind them is replaced."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from vlqc.cli.commands import app
from vlqc.errors import Fault, InternalError, UserError
from vlqc.options.fields import PANELS
from vlqc.options.options import Options
from vlqc.reporting.progress import Progress
from vlqc.reporting.summary import Result

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    (tmp_path / "model").mkdir()
    return ["--model_path", str(tmp_path / "model"), "--save_directory", str(tmp_path / "save")]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the compiler: what it was called with; "raises": what it shall raise; "notes": what it shall say."""
    received: dict[str, Any] = {}

    def compile(*, progress: Progress, options: Options) -> Result:
        if "raises" in received:
            raise received["raises"]
        received["options"] = options
        notes = received.pop("notes", ["a note"])
        for note in notes:
            progress.note(note)
        counts = {("language", "W8A8"): 7, ("vision", "FLOAT"): 3}
        return Result(options.save_directory, counts, 4096, 1024, 75.0, 3 << 20, notes, ["E 1.0"], ["serve it"])

    placeholder = types.ModuleType("vlqc.compiler")
    placeholder.__dict__["compile"] = compile
    monkeypatch.setitem(sys.modules, "vlqc.compiler", placeholder)
    return received


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces verification: what it was called with, and under "ok" what it shall find."""
    received: dict[str, Any] = {"ok": True}

    def verify_folder(folder: Path, **given: Any) -> Any:
        received.update(folder=folder, **given)
        render = lambda console: console.print("the report")  # noqa: E731
        return types.SimpleNamespace(ok=received["ok"], render=render, to_dict=lambda: {"ok": True})

    placeholder = types.ModuleType("vlqc.verify")
    placeholder.__dict__["verify_folder"] = verify_folder
    monkeypatch.setitem(sys.modules, "vlqc.verify", placeholder)
    return received


def run(*arguments: str, **environment: str) -> Any:
    return CliRunner(env={"NO_COLOR": "1", "TERMINAL_WIDTH": "120", "COLUMNS": "120", **environment}).invoke(
        app, arguments
    )


def in_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A real run, as a user starts it."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "PYTHONWARNINGS": "error", **environment}
    command = [sys.executable, "-m", "vlqc", *arguments]
    return subprocess.run(command, env=settings, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def test_help_loads_nothing_heavy() -> None:
    """Catches an import that loads torch for `vlqc --help`."""
    code = (
        "import sys; from vlqc.cli.commands import app\n"
        "try: app(['compile', '--help'])\nexcept SystemExit as ended: assert not ended.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert ended.returncode == 0, ended.stderr


def test_real_process() -> None:
    """Catches a broken `python -m vlqc`, and errors printed on stdout."""
    ended = in_process("--help")
    assert ended.returncode == 0 and "compile" in ended.stdout and not ended.stderr
    ended = in_process("compile", "--w_bit", "5", "--model_path", "absent", "--save_directory", "new")
    assert ended.returncode == 2 and not ended.stdout
    assert "error: --w_bit 5" in ended.stderr and "error: --model_path absent" in ended.stderr
    assert "Traceback" not in ended.stderr and "\x1b" not in ended.stderr


def test_every_option_is_a_flag() -> None:
    """Catches a field of Options without a flag or without its help text."""
    shown = run("compile", "--help", COLUMNS="200", TERMINAL_WIDTH="200").stdout
    for name, field in Options.model_fields.items():
        assert f"--{name} " in shown
        assert str(field.description).split(".")[0].split(":")[0] in " ".join(shown.split())


def test_options_arrive(folders: list[str], compiled: dict[str, Any], tmp_path: Path) -> None:
    """Catches a flag that is lost or arrives under another name, with underscores or dashes."""
    ended = run(
        "compile", *folders, "--w-bit", "8", "--act_method", "1", "--trust_remote_code", "True", "--skip-bad-images",
        "--dump-ir", str(tmp_path / "dump"), "--open_outlier=False",
    )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    options = Options.from_user(**compiled)
    assert (options.act_method, options.trust_remote_code, options.skip_bad_images) == (1, True, True)
    assert (options.dump_ir, options.open_outlier, options.overwrite) == (tmp_path / "dump", False, False)


def test_repeated_options_arrive(folders: list[str], compiled: dict[str, Any]) -> None:
    """Catches a repeated option that replaces the first value, and an empty list for an option that is not set."""
    ended = run("compile", *folders, "--exclude", "*.o_proj", "--include=lm_head", "--exclude", "visual.*")
    assert ended.exit_code == 0, ended.output
    options = Options.from_user(**compiled)
    assert (options.exclude, options.include) == (("*.o_proj", "visual.*"), ("lm_head",))
    compiled.clear()
    assert run("compile", *folders).exit_code == 0
    assert not {"exclude", "include", "anti_alpha", "target", "max_tokens"} & compiled["options"].model_fields_set


def test_help_is_grouped() -> None:
    """Catches options outside their panel, and panels in another order than PANELS."""
    shown = run("compile", "--help", COLUMNS="200", TERMINAL_WIDTH="200").stdout
    places = [shown.index(f"\n{panel}:\n") for panel in PANELS]
    assert places == sorted(places)
    assert places[2] < shown.index("--exclude") < places[3] < shown.index("--strict_target") < places[4]


def test_summary(folders: list[str], compiled: dict[str, Any]) -> None:
    """Catches a summary without the schemes, sizes, folder, serve command or notes."""
    shown = run("compile", *folders).stdout
    for wanted in (
        "language",
        "W8A8",
        "7",
        "4.0 KiB -> 1.0 KiB (25%)",
        "1:15",
        "3.0 MiB",
        folders[-1],
        "E 1.0",
        "serve it",
    ):
        assert wanted in shown
    assert shown.count("a note") == 1


def test_notes_are_told_once(folders: list[str], compiled: dict[str, Any]) -> None:
    """Catches notes printed both during the run and in the summary, and warnings printed only at the end."""
    warning = "no version of E loads this\n  why: too old\n  what to do: give --target F"
    compiled["notes"] = ["a note", warning]
    ended = run("compile", *folders)
    assert ended.exit_code == 0 and "a note" not in ended.stderr and ended.stdout.count("a note") == 1
    assert ended.stderr.splitlines() == [
        "warning: no version of E loads this",
        "  why: too old",
        "  what to do: give --target F",
    ]
    assert [line.split() for line in ended.stdout.splitlines() if "no version" in line] == [
        ["warning", *"no version of E loads this".split()]
    ]


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (UserError(Fault("a [b] c", why="because"), "second"), 2, ["error: a [b] c", "why: because", "error: second"]),
        (InternalError("a promise"), 70, ["a promise", "--dump_ir"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (ZeroDivisionError("oops"), 70, ["ZeroDivisionError: oops", "bug in vlqc"]),
    ],
)
def test_exit_codes(
    folders: list[str], compiled: dict[str, Any], raised: BaseException, code: int, words: list[str]
) -> None:
    """Catches a wrong exit code, a traceback for a user error, and text that is rendered as markup."""
    compiled["raises"] = raised
    ended = run("compile", *folders)
    assert ended.exit_code == code
    assert all(word in ended.stderr for word in words) and not ended.stdout
    assert ("Traceback" in ended.stderr) == isinstance(raised, ZeroDivisionError)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compile", "--modl_path", "x"], ["--modl_path", "--model_path"]),
        (["complie"], ["complie", "compile"]),
        (["inspect"], ["FOLDER"]),
        (["compile"], ["--model_path is missing", "--save_directory is missing"]),
        (["compile", "stray"], ["stray"]),
    ],
)
def test_usage_errors(arguments: list[str], words: list[str]) -> None:
    """Catches a usage error with another exit code than 2, or without a suggestion."""
    ended = run(*arguments)
    assert ended.exit_code == 2
    assert all(word in ended.stderr for word in words)


def test_verify(verified: dict[str, Any], tmp_path: Path) -> None:
    """Catches a failed verification that exits with 0, and arguments that are not passed on."""
    report = tmp_path / "report.json"
    ended = run("verify", "out", "--model-path", "float", "--calib_images", "images", "--json_file", str(report))
    assert ended.exit_code == 0 and "the report" in ended.stdout
    assert {name: verified[name] for name in verified if name != "ok"} == {
        "folder": Path("out"), "model_path": Path("float"), "calib_images": Path("images"), "engine": None,
        "lora": (), "min_sqnr": None, "trust_remote_code": False,
    }  # fmt: skip
    assert json.loads(report.read_text()) == {"ok": True}
    verified["ok"] = False
    report.unlink()
    assert run("verify", "out", "--json_file", str(report)).exit_code == 1
    assert report.exists()


def test_verify_for_an_engine(verified: dict[str, Any]) -> None:
    """Catches a bound, an engine or --trust_remote_code that is not passed on."""
    ended = run("verify", "out", "--engine", "mindie@2.2", "--min-sqnr", "28.5", "--trust_remote_code", "True")
    assert ended.exit_code == 0, ended.output
    assert (verified["engine"], verified["min_sqnr"], verified["trust_remote_code"]) == ("mindie@2.2", 28.5, True)
    ended = run("verify", "out", "--trust_remote_code", "perhaps")
    assert ended.exit_code == 2 and "--trust_remote_code perhaps" in ended.stderr


def test_json_file_is_checked_first(verified: dict[str, Any], tmp_path: Path) -> None:
    """Catches a result file that is found unwritable only after the verification."""
    ended = run("verify", "out", "--json_file", str(tmp_path / "absent" / "report.json"))
    assert ended.exit_code == 2 and "--json_file" in ended.stderr
    assert "folder" not in verified


def test_inspect_of_nothing(tmp_path: Path) -> None:
    """Catches a traceback for a folder that does not exist."""
    ended = run("inspect", str(tmp_path / "absent"))
    assert ended.exit_code == 2 and str(tmp_path / "absent") in ended.stderr and "Traceback" not in ended.stderr


def test_passes_explain_needs_no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `--explain` that requires folders, ignores the options, or wraps the text."""
    placeholder = types.ModuleType("vlqc.pipeline.presets")
    placeholder.__dict__["pipeline_text"] = lambda options: f"{'long,' * 60}method={options.act_method}"
    monkeypatch.setitem(sys.modules, "vlqc.pipeline.presets", placeholder)
    ended = run("passes", "--explain", "--act_method", "1")
    assert ended.exit_code == 0, ended.output
    assert ended.stdout == f"{'long,' * 60}method=1\n"
    assert run("passes", "--explain", "--act_method", "9").exit_code == 2


def test_inspect_writes_what_it_shows(tmp_path: Path) -> None:
    """Catches a JSON file that differs from the printed result."""
    ended = run("inspect", str(ROOT / "tools" / "demo" / "tiny_vl"), "--json_file", str(tmp_path / "found.json"))
    assert ended.exit_code == 0 and "language layers" in ended.stdout
    report = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert {row["part"] for row in report["rows"]} >= {"vision blocks", "merger", "language layers"}
