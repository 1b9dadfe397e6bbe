"""Full disks and failing devices behind stdout, stderr and output files."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import SafetensorError

import vlqc
from tests.support.compiled_folder import make_content
from vlqc.cli.commands import app
from vlqc.cli.output import write_file
from vlqc.errors import UserError
from vlqc.ir.snapshot import StageSnapshot
from vlqc.ir.stage import Stage
from vlqc.reporting.dumps import writer as dumps

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TEXT = 'stage "a.0" part=vision dtype=bfloat16 {\n  %x = input("x") : float32[2]\n  return (%x,)\n}\n'


def run(redirected: str, *words: str) -> "subprocess.CompletedProcess[str]":
    command = f'exec "$0" -m vlqc "$@" {redirected}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["sh", "-c", command, sys.executable, *words], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize("words", [["--json"], [], ["--help"]])
def test_a_result_that_cannot_be_printed(words: list[str], tmp_path: Path) -> None:
    """Catches exit code 1 (a faulty folder) or a traceback when stdout is on a full disk."""
    ended = run("> /dev/full", "verify", str(make_content().write(tmp_path / "out")), *words)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "No space left" in ended.stderr


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    """Catches a command that fails because stderr cannot be written."""
    folder = str(make_content().write(tmp_path / "out"))
    for redirected in ("2> /dev/full", "2>&-"):
        ended = run(redirected, "verify", folder)
        assert ended.returncode == 0 and ended.stdout
        assert run(redirected, "verify", str(tmp_path / "nowhere")).returncode == 2


def test_a_closed_pipe(tmp_path: Path) -> None:
    """Catches an error message for `vlqc ... | head`."""
    ended = run("| true", "passes", "--json")
    assert ended.stderr == ""


def test_files_that_are_none_or_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a command that blocks on a named pipe, and a traceback for a file on a full disk."""
    folder = str(make_content().write(tmp_path / "out"))
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", "/dev/full"):
        ended = CliRunner().invoke(app, ["verify", folder, "--json_file", str(file)])
        assert ended.exit_code == 2 and "not a regular file" in ended.stderr
    with pytest.raises(UserError, match="No space left"):
        write_file("--json_file", Path("/dev/full"), "{}")


@pytest.mark.parametrize("error", [SafetensorError("No space left"), OSError(errno.ENOSPC, "No space left")])
def test_a_dump_that_does_not_fit(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a full disk that is reported as a bug of vlqc."""

    def write(stage: Stage, path: Path, state: object) -> None:
        raise error

    monkeypatch.setattr("pkgutil.resolve_name", lambda name: write)
    stage = StageSnapshot("a.0", "vision", torch.bfloat16, vlqc.parse_stage(TEXT).graph)
    with pytest.raises(UserError, match="No space left"):
        dumps.Dumper(tmp_path, formats=["bundle"]).traced(stage)
