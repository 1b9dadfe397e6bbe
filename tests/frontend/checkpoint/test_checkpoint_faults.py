"""Reading damaged checkpoint folders: every kind of damage is a UserError."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.checkpoints import fault_of, indexed, write
from vlqc.errors import UserError
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.checkpoint.files import INDEX


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """Catches an error that does not name the folder."""
    assert str(tmp_path / "nowhere") in fault_of(tmp_path / "nowhere")


def test_a_folder_without_config(tmp_path: Path) -> None:
    """Catches a folder without config.json that is accepted."""
    write(tmp_path)
    (tmp_path / "config.json").unlink()
    assert re.search(r"no config\.json", fault_of(tmp_path))


@pytest.mark.parametrize("text", ["{", "[1]", '"words"', "\xff"])
def test_a_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    """Catches an exception of the JSON parser, and a config that is not an object."""
    write(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    message = fault_of(tmp_path)
    assert "config.json" in message and str(tmp_path) in message


@pytest.mark.parametrize("other", [None, "pytorch_model.bin"])
def test_a_folder_without_safetensors(tmp_path: Path, other: str | None) -> None:
    """Catches .bin files that are loaded (which runs code), or a misleading error about them."""
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if other:
        (tmp_path / other).write_bytes(b"x")
    message = fault_of(tmp_path)
    assert "no *.safetensors" in message and "convert" in message


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_shard_is_named(tmp_path: Path, kept: int) -> None:
    """Catches a truncated shard that is read."""
    write(tmp_path, layout=indexed)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:kept])
    assert shard.name in fault_of(tmp_path)


def test_all_damaged_shards_are_named_at_once(tmp_path: Path) -> None:
    """Catches an error that stops at the first of several damaged files."""
    write(tmp_path, layout=indexed)
    for number in (1, 3):
        (tmp_path / f"model-0000{number}-of-00003.safetensors").write_bytes(b"\0" * 50)
    message = fault_of(tmp_path)
    assert "model-00001" in message and "model-00003" in message and "model-00002" not in message


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    """Catches an incomplete download that is compiled without the tensors of a missing shard."""
    write(tmp_path, layout=indexed)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    assert "model-00003-of-00003.safetensors is missing" in fault_of(tmp_path)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "below/outside.safetensors", "..", ""]
)
def test_an_index_does_not_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """Catches an index that makes the compiler read files elsewhere, though they exist."""
    folder = write(tmp_path / "inner")
    (folder / "below").mkdir()
    for outside in (tmp_path, folder / "below"):
        save_file({"lm_head.weight": torch.ones(1)}, outside / "outside.safetensors")
    listed = str(tmp_path / "outside.safetensors") if name.startswith("/") else name
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": listed}}))
    message = fault_of(folder)
    assert repr(listed) in message and "own folder" in message


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": {"": null, "a": "b"}}',
    ],
)
def test_an_index_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    """Catches an exception for a damaged index."""
    write(tmp_path, layout=indexed)
    (tmp_path / INDEX).write_text(text)
    message = fault_of(tmp_path)
    assert INDEX in message and "is missing" not in message


def test_a_tensor_stored_twice_names_both_files(tmp_path: Path) -> None:
    """Catches a stale file with a tensor that another file holds, too."""
    write(tmp_path)
    save_file({"model.language_model.embed_tokens.weight": torch.ones(10, 4)}, tmp_path / "old.safetensors")
    message = fault_of(tmp_path)
    assert "model.embed_tokens.weight is stored twice" in message
    assert "old.safetensors" in message and "model.safetensors" in message


def test_weight_files_without_tensors(tmp_path: Path) -> None:
    """Catches an empty file that is reported as hundreds of missing tensors."""
    assert "no tensors" in fault_of(write(tmp_path, {}))


def test_a_dtype_that_is_not_read_is_named(tmp_path: Path) -> None:
    """Catches an exception for 8-bit floats of another format, or one error for each of their tensors."""
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(3)]
    message = fault_of(write(tmp_path, {name: torch.ones(2, 2).to(torch.float8_e5m2) for name in names}))
    assert "3 tensors of dtype F8_E5M2" in message and message.count("what to do") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [[torch.nan], [torch.inf], [-torch.inf, torch.nan, torch.inf]])
def test_nan_and_inf_are_named_and_counted(tmp_path: Path, dtype: torch.dtype, bad: list[float]) -> None:
    """Catches a damaged weight that is quantized."""
    weight = torch.ones(4, 5)
    weight.view(-1)[7 : 7 + len(bad)] = torch.tensor(bad)
    checkpoint = Checkpoint(write(tmp_path, {"good": torch.ones(2), "model.damaged.weight": weight.to(dtype)}))
    assert torch.equal(checkpoint.tensor("good"), torch.ones(2))
    with pytest.raises(UserError) as caught:
        checkpoint.tensor("model.damaged.weight")
    message = str(caught.value)
    assert "model.damaged.weight holds NaN or Inf" in message and "model.safetensors" in message
    assert f"{len(bad)} of 20 values" in message


def test_missing_and_misshapen_tensors_are_listed_together(tmp_path: Path) -> None:
    """Catches an error that names the first missing tensor only, or lets a wrong shape pass."""
    checkpoint = Checkpoint(write(tmp_path))
    checkpoint.check_tensors([("lm_head.weight", (5, 4))])
    expected = [("lm_head.weight", (5, 4)), ("a", (1,)), ("visual.blocks.0.attn.qkv.weight", (2, 6)), ("b", (2, 3))]
    with pytest.raises(UserError) as caught:
        checkpoint.check_tensors(expected)
    whats = [fault.what for fault in caught.value.faults]
    assert whats == [
        "tensor a is missing",
        "tensor visual.blocks.0.attn.qkv.weight has shape [6, 2]",
        "tensor b is missing",
    ]
    assert "[2, 6]" in caught.value.faults[1].why and "[2, 3]" in caught.value.faults[2].why


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    """Catches an error of hundreds of lines, which hides its own beginning."""
    with pytest.raises(UserError) as caught:
        Checkpoint(write(tmp_path)).check_tensors([(f"missing.{number}", (1,)) for number in range(60)])
    assert len(caught.value.faults) == 21 and "40 more" in caught.value.faults[-1].what


def test_no_float_tensor(tmp_path: Path) -> None:
    """Catches an exception for a folder that holds integers only."""
    checkpoint = Checkpoint(write(tmp_path, {"w": torch.ones(3, dtype=torch.int8)}))
    with pytest.raises(UserError, match="no float tensor"):
        _ = checkpoint.dtype


def test_an_unreadable_config_is_an_error_of_the_user(tmp_path: Path) -> None:
    """Catches an exception if config.json is a folder."""
    write(tmp_path)
    os.remove(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    assert "config.json cannot be read" in fault_of(tmp_path)
