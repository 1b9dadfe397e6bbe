"""Folders that are no checkpoint, or hold other files than they should: one fault that names the way out."""

import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import vlqc
from tests.support.checkpoints import TENSORS, fault_of, write
from vlqc import files
from vlqc.errors import Fault, UserError
from vlqc.files import LFS_POINTER, read_json_object, trust_links
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.options.options import Options

POINTER_TEXT = LFS_POINTER + b"\noid sha256:4d7a2146\nsize 16381516032\n"


def one_fault(folder: Path) -> Fault:
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    (fault,) = caught.value.faults
    return fault


def folders(root: Path, *names: str) -> list[Path]:
    """Folders with an empty config.json."""
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")
    return [root / name for name in names]


def hub(root: Path) -> Path:
    """A repository of the Hugging Face cache with two snapshots, of which the older one is main."""
    main, newer = folders(root / "models--Qwen--Qwen2.5-VL-7B-Instruct" / "snapshots", "0a1b", "2c3d")
    os.utime(main, (1, 1))
    (main.parents[1] / "refs").mkdir()
    (main.parents[1] / "refs" / "main").write_text("0a1b\n")
    assert newer.is_dir()
    return main


def test_a_repository_of_the_hub_cache(tmp_path: Path) -> None:
    """Catches a message that leaves the user to search the cache, and a snapshot that is not that of main."""
    main = hub(tmp_path)
    assert str(main) in one_fault(main.parents[1]).fix
    assert str(main) in one_fault(tmp_path).fix  # the cache itself
    (main.parents[1] / "refs" / "main").unlink()
    assert "2c3d" in one_fault(main.parents[1]).fix


def test_a_training_run_names_its_newest_checkpoint(tmp_path: Path) -> None:
    """Catches checkpoints in alphabetical order (500 after 1000), and one without a model."""
    folders(tmp_path, "checkpoint-500", "checkpoint-1000", "checkpoint-best")
    (tmp_path / "checkpoint-1500").mkdir()
    assert one_fault(tmp_path).fix.endswith("checkpoint-1000")
    (tmp_path / "checkpoint-1500" / "adapter_config.json").write_text("{}")
    assert re.search(r"--lora \S*checkpoint-1500$", one_fault(tmp_path).fix)


@pytest.mark.parametrize("inner", ["model", "Qwen/Qwen2.5-VL-7B-Instruct"])
def test_a_checkpoint_further_down(tmp_path: Path, inner: str) -> None:
    """Catches a folder of a download, or of the cache of ModelScope, that has to be opened to find the model in it."""
    folders(tmp_path, inner)
    assert str(tmp_path / inner) in one_fault(tmp_path).fix


def touch(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")

    return make


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (touch("global_step100/mp_rank_00_model_states.pt", "latest"), "zero_to_fp32"),
        (touch("zero_pp_rank_0_mp_rank_00_optim_states.pt"), "zero_to_fp32"),
        (touch("pytorch_model_fsdp_0/__0_0.distcp"), "accelerate merge-weights"),
        (touch("__0_0.distcp", ".metadata"), "accelerate merge-weights"),
        (touch("model-q4_k_m.gguf"), "llama.cpp"),
        (touch("pytorch_model-00001-of-00002.bin"), "convert"),
    ],
    ids=["deepspeed", "deepspeed flat", "fsdp", "distcp", "gguf", "bin"],
)
def test_weights_in_other_forms(tmp_path: Path, make: Callable[[Path], None], expected: str, with_config: bool) -> None:
    """Catches states of training and other formats that are reported as missing files."""
    make(tmp_path)
    if with_config:
        (tmp_path / "config.json").write_text("{}")
    fault = one_fault(tmp_path)
    assert expected in f"{fault.why} {fault.fix} {fault.what}"


def test_the_command_that_converts_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a command that fails on a blank in the path, or on tensors that share memory or are transposed."""
    folder = tmp_path / "a model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": weight, "b": weight.T}, folder / "pytorch_model.bin")
    torch.save([1], folder / "training_args.bin")
    _, code, file = shlex.split(one_fault(folder).fix.partition(": python ")[2])
    monkeypatch.setattr("sys.argv", ["-c", file])
    exec(code, {})
    checkpoint = Checkpoint(folder)
    assert torch.equal(checkpoint.tensor("a"), weight) and torch.equal(checkpoint.tensor("b"), weight.T)


@pytest.mark.parametrize("names", [["model.safetensors"], ["config.json"], ["tokenizer.json", "model.safetensors"]])
def test_git_lfs_pointers_are_one_fault(tmp_path: Path, names: list[str]) -> None:
    """Catches pointers that are reported as damaged files, one by one, or are copied as a tokenizer."""
    write(tmp_path)
    for name in names:
        (tmp_path / name).write_bytes(POINTER_TEXT)
    fault = one_fault(tmp_path)
    assert "git lfs pull" in fault.fix and all(name in fault.what for name in names)


def test_empty_tensors_are_one_fault(tmp_path: Path) -> None:
    """Catches a save of ZeRO-3 without gathered weights that is reported as hundreds of wrong shapes."""
    empty = {name: torch.empty(0) for name in list(TENSORS)[:-1]}
    fault = one_fault(write(tmp_path, TENSORS | empty))
    assert "5 of 6 tensors" in fault.what and "zero_to_fp32" in fault.fix


# ---- links -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of links to the files of a checkpoint."""
    monkeypatch.setattr(files, "_trusted_folders", set())
    write(tmp_path / "store")
    (tmp_path / "view").mkdir()
    for path in (tmp_path / "store").iterdir():
        (tmp_path / "view" / path.name).symlink_to(path)
    yield tmp_path / "view"


def test_a_folder_of_links_is_one_fault(view: Path) -> None:
    """Catches one fault per file, and a message that does not name the folder of the files."""
    fault = one_fault(view)
    assert "config.json, model.safetensors" in fault.what
    assert str(view.with_name("store")) in fault.fix and "--follow_links" in fault.fix


def test_links_are_followed_if_the_user_says_so(view: Path, tmp_path: Path) -> None:
    """Catches links that are refused, or followed in a folder that the user did not name."""
    Options.from_user(model_path=view, save_directory=tmp_path / "out", follow_links=True)
    assert Checkpoint(view).names == sorted(TENSORS)
    other = write(tmp_path / "other")
    (other / "tokenizer.json").symlink_to(view.with_name("store") / "config.json")
    assert "tokenizer.json is a link" in fault_of(other)


def test_a_recipe_does_not_follow_links(tmp_path: Path) -> None:
    """Catches a recipe of somebody else that makes vlqc copy files of its user."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("follow_links: true\n")
    with pytest.raises(UserError, match="cannot set follow_links"):
        Options.from_user(model_path=tmp_path, save_directory=tmp_path / "out", recipe=recipe)


def test_trust_is_of_the_folder_itself(view: Path, tmp_path: Path) -> None:
    """Catches a folder that is named through another path and is refused."""
    (tmp_path / "again").symlink_to(view)
    trust_links(tmp_path / "again")
    assert Checkpoint(view).names == sorted(TENSORS)


# ---- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ("{}".encode("utf-16"), "UTF-16"),
        (b"<!DOCTYPE html>\n<html></html>", "web page"),
        (b'{\n  "a": 1,  // why\n  "b": 2\n}', "line 2 holds a comment"),
        (b'{"a": 1 /* why */}', "line 1 holds a comment"),
        (b'{\n  "a": 1,\n}', "line 3 holds } behind a comma"),
        (b'{"a": [1,]}', "line 1 holds ] behind a comma"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1, "a": 2}', "given twice"),
        (b"{'a': 1}", "line 1 column 2"),
    ],
)
def test_text_that_is_no_json(tmp_path: Path, content: bytes, reason: str) -> None:
    """Catches a message of the parser that does not say what a person has to change."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json_object(tmp_path / "config.json")
    assert reason in caught.value.faults[0].why


def test_the_command_names_the_situation(tmp_path: Path) -> None:
    """Catches a check that reads config.json earlier, and reports it as a file that cannot be read."""
    main = hub(tmp_path)
    pointers = write(tmp_path / "pointers")
    (pointers / "config.json").write_bytes(POINTER_TEXT)
    for folder, expected in ((main.parents[1], str(main)), (pointers, "git lfs pull")):
        with pytest.raises(UserError) as caught:
            vlqc.compile(model_path=folder, save_directory=tmp_path / "out", calib_images="tests/photos/chelsea.jpg")
        (fault,) = caught.value.faults
        assert expected in fault.fix
