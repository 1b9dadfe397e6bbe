"""Checkpoints with their own model code: it runs only with --trust_remote_code."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import vlqc
from tests.support.naive_w8a8 import load_float
from tools.demo import tiny_task

TINY = Path(tiny_task.__file__).parent / "tiny_vl"
CODE = """
from pathlib import Path

from transformers import Qwen2_5_VLForConditionalGeneration

Path({trace!r}).touch()  # shows whether this code was run


class TinyVL(Qwen2_5_VLForConditionalGeneration):
    pass
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny checkpoint as a class of its own; running its code leaves tmp_path/ran behind."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(TINY, tmp_path / "own_code"))
    (folder / "modeling_tiny.py").write_text(CODE.format(trace=str(tmp_path / "ran")))
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["TinyVL"], "auto_map": {"AutoModelForImageTextToText": "modeling_tiny.TinyVL"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.every_transformers
def test_not_without_trust(own_code: Path, tmp_path: Path) -> None:
    """Catches model code that runs without trust_remote_code, and an error without a way out."""
    with pytest.raises(vlqc.UserError, match=r"needs its own code[\s\S]*--trust_remote_code True"):
        vlqc.compile(model_path=own_code, save_directory=tmp_path / "out", samples=tiny_task.samples(1))
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.every_transformers
def test_with_trust(own_code: Path, tmp_path: Path) -> None:
    """Catches trust_remote_code that is ignored by compile, by the copied code, or by load."""
    save = tmp_path / "out"
    samples = tiny_task.samples(4, seed=1)
    vlqc.compile(model_path=own_code, save_directory=save, samples=samples, trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert (save / "modeling_tiny.py").read_text() == (own_code / "modeling_tiny.py").read_text()
    model = vlqc.load(save, trust_remote_code=True)
    assert type(model).__name__ == "TinyVL"
    reference = tiny_task.answer_logits(load_float(TINY), 8)
    assert float((tiny_task.answer_logits(model, 8) - reference).abs().max()) < 0.2 * float(reference.abs().max())
    assert not torch.equal(tiny_task.answer_logits(model, 8), reference)


def test_code_is_not_copied_without_trust(tmp_path: Path) -> None:
    """Catches code that is copied into the output without trust_remote_code."""
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    (folder / "handler.py").write_text("print('hello')")
    vlqc.compile(model_path=folder, save_directory=tmp_path / "out", samples=tiny_task.samples(1))
    assert not (tmp_path / "out" / "handler.py").exists()
