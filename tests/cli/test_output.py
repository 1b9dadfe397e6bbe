"""--json, --json_file and --quiet: one object or nothing on stdout, the same exit codes, errors included."""

import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import vlqc
from tests.support.compiled_folder import make_content
from tests.support.tiny import TINY
from tools.demo import tiny_task
from vlqc.cli.commands import app
from vlqc.cli.output import BUG, silence_libraries
from vlqc.errors import Fault, InternalError, UserError
from vlqc.files import format_json
from vlqc.pipeline.registry import REGISTRY

ROOT = Path(__file__).parents[2]


def run(*words: str) -> Any:
    return CliRunner(env={"NO_COLOR": "1", "COLUMNS": "120"}).invoke(app, words)


def strict(text: str) -> Any:
    """One JSON value, as any reader takes it."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled") / "out"
    vlqc.compile(model_path=TINY, save_directory=folder, samples=tiny_task.samples(2), weight_method="round")
    return folder


def test_every_command(compiled: Path, tmp_path: Path) -> None:
    """Catches a command without --json, text beside the object, and a file with other content."""
    page = tmp_path / "page.html"
    for words, keys in (
        (["inspect", str(compiled)], {"folder", "rows", "ranges"}),
        (["verify", str(compiled)], {"ok", "faults", "warnings"}),
        (["report", str(compiled), "--output", str(page)], {"page", "bytes"}),
        (["passes"], {"passes"}),
        (["passes", "--explain", "--act_method", "1"], {"pipeline"}),
    ):
        file = tmp_path / "found.json"
        ended = run(*words, "--json", "--json_file", str(file))
        assert ended.exit_code == 0 and ended.stderr == ""
        assert keys <= set(strict(ended.stdout)) and file.read_text() == ended.stdout
        assert run(*words, "--quiet").output == ""
        assert run(*words, "--quiet", "--json").stdout == ended.stdout
    options = {row["name"]: row["options"] for row in strict(run("passes", "--json").stdout)["passes"]}
    assert options["split-window-attention"] == {} and "seed" in options["rotate-heads"]


@pytest.mark.slow
def test_compile(tmp_path: Path) -> None:
    """Catches a result or plan that is not JSON, progress on stdout, and output in spite of --quiet."""
    words = ["--model_path", str(TINY), "--weight_method", "round", "--calib_images", str(ROOT / "tests" / "photos")]
    words += ["--max_samples", "1", "--max_tokens", "64", "--save_directory"]
    planned = run("compile", *words, str(tmp_path / "a"), "--plan", "--json")
    assert planned.exit_code == 0, planned.output
    plan = strict(planned.stdout)
    command = [sys.executable, "-m", "vlqc", "compile", *words, str(tmp_path / "a"), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert ended.returncode == 0 and "9 stages" in ended.stderr
    result = strict(ended.stdout)
    assert result["folder"] == str(tmp_path / "a") and set(result["passes"]) >= {"smooth-m2", "lower-linears"}
    linears = {(each["part"], each["scheme"]): each["linears"] for each in result["counts"]}
    assert linears["language", "W8A8"] == 4 * 6 and abs(result["bytes_after"] - plan["bytes_after"]) < 4096
    assert sorted(plan["counts"], key=str) == sorted(result["counts"], key=str)
    quiet = run("compile", *words, str(tmp_path / "b"), "--quiet")
    assert quiet.exit_code == 0 and quiet.output == "" and (tmp_path / "b" / "config.json").is_file()


@pytest.mark.parametrize(
    ("words", "kind", "whats"),
    [
        (["compile", "--json"], "input", ["--model_path is missing", "--save_directory is missing"]),
        (["compile", "--json", "--w_bit", "5", "--model_path", "no"], "input", ["--w_bit 5", "--model_path no"]),
        (["inspect", "absent", "--json"], "input", ["absent"]),
        (["compile", "--modl_path", "x", "--json"], "usage", ["--modl_path"]),
        (["complie", "--json"], "usage", ["complie"]),
        (["inspect", "--json"], "usage", ["FOLDER"]),
    ],
)
def test_errors_as_json(words: list[str], kind: str, whats: list[str]) -> None:
    """Catches an error without its JSON object, and an exit code that --json changes."""
    ended = run(*words)
    result = strict(ended.stdout)
    assert ended.exit_code == 2 == run(*(word for word in words if word != "--json")).exit_code
    assert (result["error"], result["exit_code"], ended.stderr) == (kind, 2, "")
    assert all(set(fault) == {"what", "where", "why", "fix"} for fault in result["faults"])
    said = json.dumps(result)
    assert all(what in said for what in whats)


@pytest.mark.parametrize(
    ("raised", "kind", "code", "faults"),
    [
        (UserError(Fault("a", "b", "c", "d"), "e\x1b"), "input", 2, [["a", "b", "c", "d"], ["e\x1b", "", "", ""]]),
        (InternalError("a promise", "a way out"), "internal", 70, [["a promise", "", "", "a way out"]]),
        (ZeroDivisionError("oops"), "internal", 70, None),
        (KeyboardInterrupt(), "interrupted", 130, [["interrupted", "", "", ""]]),
    ],
)
def test_how_it_ends(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException, kind: str, code: int, faults: list[list[str]] | None
) -> None:
    """Catches an error kind without JSON, with another exit code, or without its notes."""

    def inspect_folder(folder: Path) -> None:
        raise raised

    raised.__notes__ = ["how to go on"]
    placeholder = types.ModuleType("vlqc.reporting.checkpoint_summary")
    placeholder.__dict__["inspect_folder"] = inspect_folder
    monkeypatch.setitem(sys.modules, "vlqc.reporting.checkpoint_summary", placeholder)
    ended = run("inspect", "x", "--json")
    result = strict(ended.stdout)
    assert (ended.exit_code, result["error"], result["exit_code"], result["notes"]) == (
        code,
        kind,
        code,
        ["how to go on"],
    )
    if faults is not None:
        assert [list(fault.values()) for fault in result["faults"]] == faults
    assert "\x1b" not in ended.output
    assert run("inspect", "x", "--quiet").stderr != "", "quiet hides everything but errors"


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_whose_fault_it_is(monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    """Catches an error of a third-party pass reported as a bug of vlqc, and the reverse."""
    blamed = "on stage a: look at odd:Boom, which is not part of vlqc"
    for notes, fix in ((["how to go on"], BUG), ([blamed, "how to go on"], blamed)):
        error = ZeroDivisionError("oops")
        error.__notes__ = notes

        def inspect_folder(folder: Path, error: Exception = error) -> None:
            raise error

        placeholder = types.ModuleType("vlqc.reporting.checkpoint_summary")
        placeholder.__dict__["inspect_folder"] = inspect_folder
        monkeypatch.setitem(sys.modules, "vlqc.reporting.checkpoint_summary", placeholder)
        ended = run("inspect", "x", *words)
        assert ended.exit_code == 70 and fix in ended.stderr and "ZeroDivisionError" in ended.stderr
        assert ("a bug in vlqc" in ended.output) == (fix == BUG)
        if words:
            assert strict(ended.stdout)["faults"][0]["fix"] == fix


SIGNALLED = """
import os, signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # in case the parent process ignores it

def inspect_folder(folder):
    try:
        os.kill(os.getpid(), signal.{signal})
    except BaseException as error:
        made = {error}
        made.add_note("how to go on")
        raise made from error

from vlqc.errors import Fault, UserError
sys.modules["vlqc.reporting.checkpoint_summary"] = types.SimpleNamespace(inspect_folder=inspect_folder)
from vlqc.cli.commands import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("error", ["RuntimeError('Failed to import x')", "UserError(Fault('m cannot be imported'))"])
def test_an_interruption_that_became_another_error(tmp_path: Path, signal: str, error: str) -> None:
    """Catches SIGINT or SIGTERM during an import that is reported as a bug, with a traceback."""
    command = [sys.executable, "-c", SIGNALLED.format(signal=signal, error=error), "inspect", "x"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr.strip()) == (130, "", "interrupted\nhow to go on")
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 130 and result.stderr.strip() == ""
    assert (strict(result.stdout)["error"], strict(result.stdout)["notes"]) == ("interrupted", ["how to go on"])


HANDLERS = """
import signal
from vlqc.cli.output import prepare_process
{first}
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
prepare_process()
after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
print([one is other for one, other in zip(before, after)])
"""


@pytest.mark.parametrize(
    ("first", "environment", "kept"),
    [
        ("signal.signal(signal.SIGINT, signal.default_int_handler)", {}, "[False, False]"),
        ("signal.signal(signal.SIGINT, signal.SIG_IGN)", {}, "[True, False]"),
        ("", {"TORCHELASTIC_RUN_ID": "x"}, "[True, True]"),
    ],
)
def test_signals_that_are_left_alone(first: str, environment: dict[str, str], kept: str) -> None:
    """Catches a background job that SIGINT ends, and torchrun's SIGTERM reported as an interruption."""
    command = [sys.executable, "-c", HANDLERS.format(first=first)]
    variables = {**os.environ, **environment}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, env=variables)
    assert ended.stdout.strip() == kept


def test_a_failed_verification(tmp_path: Path) -> None:
    """Catches findings that --quiet hides, and a failure whose JSON comes with exit code 0."""
    content = make_content()
    del content.tensors["model.norm.weight"]
    folder = str(content.write(tmp_path / "out"))
    quiet = run("verify", folder, "--quiet")
    assert (quiet.exit_code, quiet.stdout) == (1, "") and "model.norm.weight" in quiet.stderr
    result = run("verify", folder, "--quiet", "--json")
    assert result.exit_code == 1 and strict(result.stdout)["ok"] is False and result.stderr == ""


def test_numbers_that_are_none() -> None:
    """Catches NaN and infinity, which are not JSON, and control characters in the output."""
    value = {"a": float("nan"), "b": [float("-inf"), 1.5, True, None], "c": "\x1b[2J\u202e", 1: Path("x")}
    text = format_json(value)
    assert strict(text) == {"a": None, "b": [None, 1.5, True, None], "c": "\x1b[2J\u202e", "1": "x"}
    assert text.isprintable() or all(letter.isprintable() or letter == "\n" for letter in text)


def test_help_teaches() -> None:
    """Catches help without examples, exit codes, or how to enable completion."""
    shown = " ".join(run("--help").stdout.split())
    assert all(words in shown for words in ("vlqc verify OUT", "130 interrupted", "_VLQC_COMPLETE=bash_source vlqc"))
    shown = " ".join(run("compile", "--help").stdout.split())
    assert "--scheme w4a8_dynamic --group_size 256" in " ".join(shown.split())
    assert "--recipe w8a8.yaml" in shown


def test_all_passes_complete_at_once() -> None:
    """Catches a pass that is not completed, and completion that imports torch."""
    code = (
        "import sys; from vlqc.cli.parameters import complete_pass; print(*complete_pass(None, None, ''))\n"
        "assert 'torch' not in sys.modules"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and set(REGISTRY) <= set(ended.stdout.split()), ended.stderr


@pytest.mark.slow
def test_values_complete() -> None:
    """Catches shell completion that is off or lacks the values of an option."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_VLQC_COMPLETE": "bash_complete"}
    for words, wanted in (
        ("vlqc compile --anti_method ", {"m2", "m4", "none"}),
        ("vlqc compile --device_type c", {"cpu", "cuda"}),
        ("vlqc ver", {"verify"}),
        ("vlqc compile --dump_formats text,", {"text,json", "text,onnx", "text,bundle"}),
        ("vlqc dump x --formats j", {"json"}),
        ("vlqc compile --stop_after smooth", {"smooth-m2", "smooth-m4"}),
        ("vlqc compile --print_after smooth", {"smooth-m2", "smooth-m4"}),
        ("vlqc run-pass BUNDLE smooth", {"smooth-m2", "smooth-m4"}),
    ):
        asked = {**environment, "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
        code = "from vlqc.cli.commands import main; main()"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=asked, check=False)
        assert {line.partition(",")[2] for line in ended.stdout.split()} == wanted, ended.stderr


def test_an_interruption_while_processes_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches SIGINT before all processes have joined that ends with another exit code or without a message."""

    def waiting() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlqc.cli.output.init_distributed", waiting)
    ended = run("compile", "--plan")
    assert (ended.exit_code, ended.stdout, ended.stderr.strip()) == (130, "", "interrupted")


def test_libraries_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches warnings of Pillow on the terminal, and warnings of vlqc that are hidden with them."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence_libraries()
        for module in ("PIL.TiffImagePlugin", "transformers.utils", "PILGRIM", "vlqc"):
            warnings.warn_explicit("damaged EXIF data", UserWarning, "file.py", 1, module=module)
    assert len(caught) == 2


@pytest.mark.parametrize("part", ["what", "where", "why", "fix"])
def test_faults_are_bounded(part: str) -> None:
    """Catches megabytes of a file in an error, as text or as JSON."""
    fault = Fault(**{"what": "a", part: "ab" * 10**6})
    assert len(getattr(fault, part)) <= 4000 and "2,000,000 characters" in getattr(fault, part)
