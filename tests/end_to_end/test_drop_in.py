"""tools/quant_qwen2_5vl.py accepts the command lines of the script it replaces."""

import os
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from vlqc.options.options import Options
from vlqc.reporting.summary import Result
from vlqc.targets.schemes import Scheme

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "quant_qwen2_5vl.py"
FOLDERS = "--model_path {float} --calib_images {images}  --save_directory {quantized}"
W8A8 = "--w_bit 8 --a_bit 8 --device_type cpu --trust_remote_code True"
M2 = {"anti_method": "m2", "act_method": 2, "is_dynamic": False, "is_lowbit": False, "open_outlier": True}
W4A8 = {"anti_method": "m4", "act_method": 1, "is_dynamic": True, "is_lowbit": True, "open_outlier": False}
# The published command lines, "cpu" in place of "npu"; what they mean; scheme and engine.
LINES: dict[str, tuple[dict[str, Any], Scheme, str]] = {
    f"{FOLDERS} {W8A8} --anti_method m2 --mindie_format": ({**M2, "mindie_format": True}, Scheme.W8A8, "mindie"),
    f"{FOLDERS} {W8A8} --anti_method m2": (M2, Scheme.W8A8, "both"),
    f"{FOLDERS} {W8A8} --anti_method m4 --mindie_format": (
        {**M2, "anti_method": "m4", "mindie_format": True}, Scheme.W8A8, "mindie",
    ),
    f"{FOLDERS} {W8A8} --anti_method m4": ({**M2, "anti_method": "m4"}, Scheme.W8A8, "both"),
    f"{FOLDERS} --w_bit 4 --a_bit 8 --act_method 1 --device_type cpu --trust_remote_code True --anti_method m4 "
    "--open_outlier False --is_dynamic True --is_lowbit True --group_size 256": (
        {**W4A8, "w_bit": 4, "group_size": 256}, Scheme.W4A8_DYNAMIC, "vllm-ascend",
    ),
}  # fmt: skip
UNTOUCHED = {"w_bit": 8, "a_bit": 8, "group_size": 64, "mindie_format": False, "part_file_size": None}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the compiler: the options it was called with."""
    received: dict[str, Any] = {}

    def compile(*, progress: object, options: Options) -> Result:
        received["options"] = options
        return Result(options.save_directory, {}, 4, 1, 1.0, 1)

    placeholder = types.ModuleType("vlqc.compiler")
    placeholder.__dict__["compile"] = compile
    monkeypatch.setitem(sys.modules, "vlqc.compiler", placeholder)
    return received


@pytest.mark.parametrize("line", LINES)
def test_published_command_lines(
    line: str, compiled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a published command line that is refused or selects other options."""
    (tmp_path / "float").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = line.format(float="float", images="images", quantized="a/quantized").split()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not ended.value.code
    meant, scheme, target = LINES[line]
    options = Options.from_user(**compiled)
    expected = {**UNTOUCHED, **meant, "trust_remote_code": True, "device_type": "cpu", "calib_images": Path("images")}
    assert {name: getattr(options, name) for name in expected} == expected
    assert (options.model_path, options.save_directory) == (Path("float"), Path("a/quantized"))
    assert (options.scheme, options.engine_target) == (scheme, target)


def run(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A real run from another folder than the script's."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=settings, cwd=script.anchor, capture_output=True, text=True, encoding="utf-8")


@pytest.mark.slow
def test_runs_from_a_checkout() -> None:
    """Catches a script that only works where vlqc is installed, or whose usage names another command."""
    ended = run(SCRIPT, "--help", COLUMNS="120")
    assert ended.returncode == 0 and "Usage: quant_qwen2_5vl.py [OPTIONS]" in ended.stdout
    ended = run(SCRIPT, "--model-path", "absent", "--w_bit", "5")
    assert ended.returncode == 2 and not ended.stdout and "Traceback" not in ended.stderr
    assert all(words in ended.stderr for words in ("--w_bit 5", "--save_directory is missing", "absent"))


def test_runs_as_a_copy_where_vlqc_is_installed(tmp_path: Path) -> None:
    """Catches a script that only works inside its checkout."""
    copy = Path(shutil.copy(SCRIPT, tmp_path))
    ended = run(copy, "--help", PYTHONPATH=str(ROOT))
    assert ended.returncode == 0 and "--mindie_format" in ended.stdout
