"""Costs of a command are those of the command, not of whoever asks."""

import sys

import pytest

from tools.bench.process import CommandFailed, measured

MIB = 2**20


def test_the_command_is_charged_for_its_own_memory() -> None:
    """Catches KiB taken for bytes, and the caller's memory (torch is loaded here) counted as the command's."""
    small = measured([sys.executable, "-S", "-c", "pass"])
    large = measured([sys.executable, "-S", "-c", f"block = b'x' * {300 * MIB}"])
    assert 2 * MIB < small.peak_bytes < 100 * MIB
    assert 300 * MIB < large.peak_bytes < 400 * MIB


def test_time_of_grandchildren_counts() -> None:
    """Catches CPU time that is asked of the wrong process: the work is done by a child of the command."""
    work = "import time\nwhile time.process_time() < 0.5: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {work!r}])"
    used = measured([sys.executable, "-S", "-c", parent])
    assert used.cpu_seconds >= 0.5 and used.wall_seconds > 0


def test_variables_reach_the_command() -> None:
    """Catches a number of threads that is set for nobody."""
    check = "import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'] != '3')"
    assert measured([sys.executable, "-S", "-c", check], {"OMP_NUM_THREADS": "3"}).peak_bytes > 0


def test_a_failure_shows_what_was_printed() -> None:
    """Catches a crashed side whose last words are lost, or that counts as a result."""
    with pytest.raises(CommandFailed, match=r"(?s)ended with 7.*no such tensor"):
        measured([sys.executable, "-c", "import sys; print('no such tensor', file=sys.stderr); sys.exit(7)"])
