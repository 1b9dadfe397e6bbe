"""The published command lines of the original script, run as written, with `cpu` in place of `npu`."""

import json
import runpy
import sys
from pathlib import Path

import pytest

import vlqc
from tools.checkpoints import outlier_checkpoint as make_outlier_checkpoint

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "tools" / "quant_qwen2_5vl.py"
PHOTOS = Path(__file__).parents[1] / "photos"
COMMON = "--w_bit 8 --a_bit 8 --device_type cpu --trust_remote_code True"
LOW_BIT = "--w_bit 4 --a_bit 8 --act_method 1 --device_type cpu --trust_remote_code True --anti_method m4"
LINES = {  # options as on the page: engine they are meant for, scheme
    f"{COMMON} --anti_method m2 --mindie_format": ("mindie", "W8A8"),
    f"{COMMON} --anti_method m2": ("vllm-ascend", "W8A8"),
    f"{COMMON} --anti_method m4 --mindie_format": ("mindie", "W8A8"),
    f"{COMMON} --anti_method m4": ("vllm-ascend", "W8A8"),
    f"{LOW_BIT} --open_outlier False --is_dynamic True --is_lowbit True --group_size 256": (
        "vllm-ascend",
        "W4A8_DYNAMIC",
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "Qwen2.5-VL"
    make_outlier_checkpoint.make(folder, seed=0)
    return folder


@pytest.mark.parametrize("line", LINES)
def test_line(checkpoint: Path, tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an existing command line that fails, or writes a folder that its engine does not load."""
    engine, scheme = LINES[line]
    folders = ["--model_path", checkpoint, "--calib_images", PHOTOS, "--save_directory", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, folders), *line.split()])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not ended.value.code
    report = vlqc.verify_folder(tmp_path / "out", engine=engine)
    assert report.faults == []
    description = json.loads(next((tmp_path / "out").glob("quant_model_description*.json")).read_text())
    assert description["model_quant_type"] == scheme
    assert description["model.layers.0.mlp.gate_proj.weight"] == scheme
