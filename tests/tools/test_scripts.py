"""Every tool with a command line starts as a script and prints its help."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    path.relative_to(ROOT)
    for path in sorted((ROOT / "tools").rglob("*.py"))
    if "ArgumentParser(" in path.read_text(encoding="utf-8")
]
CODE = """
import runpy, sys
for script in {scripts!r}:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
"""


@pytest.mark.slow
def test_help_of_every_script() -> None:
    """Catches a script with an import or an option that fails at the start."""
    code = CODE.format(scripts=list(map(str, SCRIPTS)))
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("usage:") == len(SCRIPTS) >= 8
