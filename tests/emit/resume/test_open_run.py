"""A run is resumed only with the same inputs, and only from undamaged files."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.interrupted_runs import (
    compile_and_read,
    compile_into,
    file_contents,
    interrupt_compile,
    run_folders,
    small_checkpoint,
)
from tests.support.resume_runs import QUICK, SAMPLES
from vlqc.emit.resume.fingerprint import _numerics, run_fingerprint
from vlqc.errors import UserError

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
SEARCH = QUICK | {"fallback": "auto", "max_float_groups": 2, "target": "vllm-ascend"}
WAITING = Path("result") / ".waiting"  # folder of deferred stages


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    return compile_and_read(tmp_path_factory.mktemp("whole") / "out", checkpoint)


# ---- other inputs ----------------------------------------------------------------------------------------------------


def weights_changed(copy: Path, name: str) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors[name].view(torch.int16).flatten()[0] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})


def text_changed(copy: Path, name: str) -> None:
    (copy / name).write_text((copy / name).read_text().rstrip() + "\n\n")


CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, Any], tuple[str, ...]]] = {
    "an option": (lambda copy: None, {"act_method": 2}, ("--act_method: 1 before, 2 now", "pipeline: ")),
    "the target": (lambda copy: None, {"target": "vllm-ascend"}, ("--target: None before, vllm-ascend now",)),
    "a size": (lambda copy: None, {"part_file_size": 1}, ("--part_file_size: None before, 1 now",)),
    "the samples": (lambda copy: None, {"samples": SAMPLES[:1]}, ("data differ", "2 samples before, 1 now")),
    "a pixel": (lambda copy: None, {"samples": [SAMPLES[0] | {"pixel_values": SAMPLES[0]["pixel_values"] + 1e-3},
                                                SAMPLES[1]]}, ("calibration data differ", "(2 samples)")),
    "config.json": (lambda copy: text_changed(copy, "config.json"), {}, ("config.json: ",)),
    "a side file": (lambda copy: text_changed(copy, "tokenizer.json"), {}, ("file tokenizer.json: ",)),
    "a new file": (lambda copy: (copy / "NOTICE").write_text("x"), {}, ("file NOTICE: missing before",)),
    "a finished weight": (lambda copy: weights_changed(copy, "visual.blocks.0.attn.qkv.bias"), {},
                          ("visual.blocks.0.attn.qkv.bias",)),
    "an embedding": (lambda copy: weights_changed(copy, "model.embed_tokens.weight"), {}, ()),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_other_inputs_are_named(change: str, checkpoint: Path, tmp_path: Path) -> None:
    """Catches a result computed partly from other inputs."""
    damage, options, words = CHANGES[change]
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    work = interrupt_compile(tmp_path / "out", copy)
    before = file_contents(work / "outputs")
    damage(copy)
    if change == "an embedding":  # of a token that the samples hold
        tensors = load_file(copy / "model.safetensors")
        tensors["model.embed_tokens.weight"][int(SAMPLES[0]["input_ids"][0, 0])] += 1
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        words = ("rows of model.embed_tokens.weight in use: ",)
    with pytest.raises(UserError, match="cannot be resumed") as caught:
        compile_into(tmp_path / "out", copy, **({"resume": True} | options))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "--start_over" in str(caught.value)
    assert run_folders(tmp_path / "out") == [work] and file_contents(work / "outputs") == before


@pytest.mark.parametrize("fact", ["vlqc", "torch", "transformers", "safetensors", "numpy", "threads", "device"])
def test_another_version_or_machine_is_named(
    fact: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a version or setting that is not compared, although it may change rounding."""
    interrupt_compile(tmp_path / "out", checkpoint)
    monkeypatch.setattr(
        "vlqc.emit.resume.journal.run_fingerprint", lambda *args: run_fingerprint(*args) | {fact: "another"}
    )
    with pytest.raises(UserError, match=rf"{fact}: .* before, another now\n"):
        compile_into(tmp_path / "out", checkpoint, resume=True)


def test_other_rounding_is_named(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches routines that round differently because of a setting, on the same processor."""
    interrupt_compile(tmp_path / "out", checkpoint)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with pytest.raises(UserError, match="cannot be resumed") as caught:
        compile_into(tmp_path / "out", checkpoint, resume=True)
    assert "floating-point results: " in str(caught.value)


def test_numerics_digest_is_reproducible() -> None:
    """Catches a digest that depends on the process or the random state, so that no run could be resumed."""
    code = (
        "import torch; torch.set_num_threads(int(input()))\n"
        "from vlqc.emit.resume import fingerprint as f\nprint(f._numerics())"
    )
    threads = f"{torch.get_num_threads()}\n"
    before = torch.get_rng_state()
    here = [_numerics() for _ in range(3)]
    command = [sys.executable, "-c", code]
    there = subprocess.run(command, input=threads, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    assert [*here, there] == [there] * 4 and torch.equal(before, torch.get_rng_state())


def test_options_without_effect_may_differ(checkpoint: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Catches a run that cannot be resumed with another memory budget, or after the checkpoint was moved."""
    interrupt_compile(tmp_path / "out", checkpoint)
    copy = shutil.copytree(
        checkpoint, tmp_path / "moved"
    )  # other file times: all weights of finished stages are compared
    compile_into(tmp_path / "out", copy, resume=True, memory_budget=0.0, overwrite=True, dump_ir=tmp_path / "dump")
    assert file_contents(tmp_path / "out") == whole


# ---- damaged files ---------------------------------------------------------------------------------------------------


def truncate_journal(work: Path, count: int) -> None:
    path = work / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.parametrize("lost", [1, 300])
def test_an_incomplete_last_line_is_ignored(
    lost: int, checkpoint: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a journal that is unusable after a power failure during a write."""
    monkeypatch.setattr(Path, "unlink", lambda *unused, **unused_too: None)  # keeps stale outputs
    work = interrupt_compile(tmp_path / "out", checkpoint)
    monkeypatch.undo()
    truncate_journal(work, lost)
    result = compile_into(tmp_path / "out", checkpoint, resume=True)
    assert (
        any("2 of 5 stages are finished" in note for note in result.notes) and file_contents(tmp_path / "out") == whole
    )


def flip_bit(path: Path, at: float = 0.7) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * at)] ^= 1
    path.write_bytes(bytes(raw))


DAMAGES: dict[str, tuple[dict[str, Any], Callable[[Path], object], str]] = {
    "a line": (QUICK, lambda work: flip_bit(work / "journal.jsonl", 0.3), "line"),
    "a weight": (QUICK, lambda work: flip_bit(work / "result" / ".00000.partial"), " to "),
    "a weight file gone": (QUICK, lambda work: (work / "result" / ".00000.partial").unlink(), "is missing"),
    "a weight file cut": (QUICK, lambda work: os.truncate(work / "result" / ".00000.partial", 99_999), " to "),
    "an output": (QUICK, lambda work: flip_bit(next((work / "outputs").iterdir())), "outputs/2"),
    "outputs gone": (QUICK, lambda work: shutil.rmtree(work / "outputs"), "outputs/2"),
    "a deferred stage": (SEARCH, lambda work: flip_bit(work / WAITING / "1.safetensors"), "1.safetensors"),
    "a deferred stage gone": (SEARCH, lambda work: next((work / WAITING).glob("0*")).unlink(), "0.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    """Catches a byte that changed on disk since the interruption and would get into the result."""
    options, apply, words = DAMAGES[damage]
    work = interrupt_compile(tmp_path / "out", checkpoint, **options)
    apply(work)
    with pytest.raises(UserError, match="damaged") as caught:
        compile_into(tmp_path / "out", checkpoint, **(options | {"resume": True}))
    assert words in str(caught.value) and "--start_over" in str(caught.value)
    assert not (tmp_path / "out").exists()
