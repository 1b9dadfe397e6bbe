"""Reading checkpoint folders: every layout gives the same tensors, and nothing is modified."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.checkpoints import LAYOUTS, NEW_NAMES, TENSORS, fault_of, indexed_beside_a_stale_file, write
from vlqc.frontend.checkpoint.checkpoint import Checkpoint


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", ["old", "new"])
def test_every_layout_gives_every_tensor_as_stored(tmp_path: Path, layout: Callable[..., None], names: str) -> None:
    """Catches a shard that is not read, a stale file that is, a renamed tensor, a changed dtype, shape or value."""
    stored = {NEW_NAMES[name] if names == "new" else name: tensor for name, tensor in TENSORS.items()}
    checkpoint = Checkpoint(write(tmp_path, stored, layout))
    assert checkpoint.names == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert name in checkpoint
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.stored_dtype(name) == tensor.dtype
        read = checkpoint.tensor(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.booleans())
def test_rows_are_gathered_exactly(indices: list[int], nested: bool) -> None:
    """Catches rows in the wrong order, lost duplicates, or another shape than that of the indices."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint(write(Path(folder)))
        expected = torch.tensor([indices, indices[::-1]] if nested else indices)
        rows = checkpoint.rows("model.embed_tokens.weight", expected)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, TENSORS["model.embed_tokens.weight"][expected])


def test_dtype_is_that_of_most_elements(tmp_path: Path) -> None:
    """Catches a dtype that is counted per tensor: many small float32 norms do not make a checkpoint float32."""
    norms = {f"norm{number}.weight": torch.ones(3) for number in range(5)}
    checkpoint = Checkpoint(write(tmp_path, {"w": torch.ones(4, 8, dtype=torch.bfloat16), **norms}))
    assert checkpoint.dtype == torch.bfloat16


def test_bytes_are_those_of_the_weight_files(tmp_path: Path) -> None:
    """Catches a size without some shards, or with files that are not read."""
    checkpoint = Checkpoint(write(tmp_path, layout=indexed_beside_a_stale_file))
    assert checkpoint.bytes == sum(path.stat().st_size for path in tmp_path.glob("model-*-of-*.safetensors"))


def test_a_cache_of_links_is_read(tmp_path: Path) -> None:
    """Catches a snapshot in the Hugging Face cache, which consists of links to blobs, that is rejected."""
    repository = tmp_path / "models--user--name"
    real, snapshot = write(repository / "blobs"), repository / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    for path in real.iterdir():
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    assert torch.equal(Checkpoint(snapshot).tensor("lm_head.weight"), TENSORS["lm_head.weight"])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("cache", [False, True])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str, cache: bool) -> None:
    """Catches a checkpoint whose links make vlqc read and copy other files, also in a folder like the cache."""
    folder = write(tmp_path / "models--a" / "snapshots" / "0a1b2c" if cache else tmp_path / "model")
    other = tmp_path / "models--b" / "blobs"
    other.mkdir(parents=True)
    (folder / name).touch()
    (folder / name).rename(other / "secret")
    (folder / name).symlink_to(other / "secret")
    message = fault_of(folder)
    assert f"{name} is a link out of the checkpoint folder" in message and str(other / "secret") in message


def test_reading_cannot_write(tmp_path: Path) -> None:
    """Catches a memory mapping that writes changes of a tensor to the checkpoint."""
    before = (write(tmp_path) / "model.safetensors").read_bytes()
    tensor = Checkpoint(tmp_path).tensor("lm_head.weight")
    tensor.add_(1)
    del tensor
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert torch.equal(Checkpoint(tmp_path).tensor("lm_head.weight"), TENSORS["lm_head.weight"])
