"""vlqc.emit.shard_writer: written tensors are read back unchanged by the safetensors library, whatever their sizes."""

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from vlqc.emit.shard_writer import ALIGNMENT, ENTRY_BYTES, LENGTH_FIELD, ShardWriter, most_header_bytes
from vlqc.errors import InternalError

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8)


def header_bytes(tensors: dict[str, Tensor]) -> int:
    return 256 + sum(len(name.encode()) + ENTRY_BYTES for name in tensors)


def write(folder: Path, tensors: dict[str, Tensor], limit: int | None = None) -> list[Path]:
    writer = ShardWriter(folder, header_bytes=header_bytes(tensors), limit=limit)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close("weights")
    return sorted(folder.glob("*.safetensors"))


def read(paths: list[Path]) -> dict[str, Tensor]:
    actual: dict[str, Tensor] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 - no mapping
                assert name not in actual
                actual[name] = file.get_tensor(name)
    return actual


def header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(header without metadata, offset of the data, file size), parsed as the format specification says."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:LENGTH_FIELD])
    entries = json.loads(raw[LENGTH_FIELD : LENGTH_FIELD + length])
    assert entries.pop("__metadata__") == {"format": "pt"}
    return entries, LENGTH_FIELD + length, len(raw)


def assert_well_formed(path: Path) -> None:
    """No gaps, no overlap, no bytes after the last tensor; every tensor aligned to its element size."""
    entries, start, size = header(path)
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: entry["data_offsets"]):
        assert entry["data_offsets"][0] == end
        element = int("".join(filter(str.isdigit, entry["dtype"]))) // 8
        assert (start + end) % element == 0
        end = entry["data_offsets"][1]
    assert start % ALIGNMENT == 0 and start + end == size


def same(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit, NaN and -0 included."""
    as_bytes = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*as_bytes)


SHAPES = st.one_of(st.just(()), st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple))
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


@settings(max_examples=60)
@given(
    st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=12),
    st.sampled_from([None, 1, 2600, 4000]),
    st.integers(0, 1000),
)
def test_round_trip(described: dict[str, tuple[tuple[int, ...], torch.dtype]], limit: int | None, seed: int) -> None:
    """Catches sizes, dtypes and names that damage a file or another tensor, empty and 0-dimensional ones included."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (shape, dtype) in described.items():
        count = torch.Size(shape).numel() * dtype.itemsize
        tensors[name] = torch.randint(0, 256, (count,), generator=random, dtype=torch.uint8).view(dtype).reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder), tensors, limit)
        for path in paths:
            assert_well_formed(path)
        actual = read(paths)
        size, header = sum(path.stat().st_size for path in paths), header_bytes(tensors)
    assert actual.keys() == tensors.keys()
    if limit is None or limit > header + LENGTH_FIELD + ALIGNMENT:
        data = sum(tensor.nbytes for tensor in tensors.values())
        most = data + most_header_bytes(data, header, limit)
        assert size == most if len(paths) == 1 else size <= most  # --max_bytes counts with it
    assert all(same(actual[name], tensor) for name, tensor in tensors.items())


def test_views_are_written_by_their_values(tmp_path: Path) -> None:
    """Catches a transposed, strided or expanded tensor of which the storage is written in place of the values."""
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"t": base.T, "strided": base[::2, 1::2], "expanded": base[:1].expand(5, 6), "offset": base[1:, 3]}
    actual = read(write(tmp_path, tensors))
    assert all(torch.equal(actual[name], tensor) for name, tensor in tensors.items())


def test_an_unaligned_tensor_is_copied(tmp_path: Path) -> None:
    """Catches a tensor of odd size that the caller changes before its file is closed."""
    writer = ShardWriter(tmp_path, header_bytes=1000)
    odd, even = torch.ones(3, dtype=torch.int8), torch.ones(8, dtype=torch.int8)
    writer.add("odd", odd)
    writer.add("even", even)
    odd.zero_()
    even.zero_()
    writer.close("weights")
    actual = read([tmp_path / "weights.safetensors"])
    assert actual["odd"].tolist() == [1] * 3 and actual["even"].tolist() == [1] * 8


def test_parameters_can_be_written(tmp_path: Path) -> None:
    """Catches a tensor with a gradient that NumPy refuses."""
    weight = torch.nn.Linear(3, 3).weight
    assert torch.equal(read(write(tmp_path, {"w": weight}))["w"], weight.detach())


def test_one_file_without_a_limit(tmp_path: Path) -> None:
    """Catches an index, a numbered name or a leftover file of a writer without a limit."""
    write(tmp_path, {"a": torch.ones(3), "b": torch.ones(5)})
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_shards_and_their_index(tmp_path: Path) -> None:
    """Catches a shard above the limit, an index with a wrong shard, and a wrong total size."""
    tensors = {f"layer.{number}": torch.full((100 + number,), float(number)) for number in range(20)}
    limit = header_bytes(tensors) + 2000
    paths = write(tmp_path, tensors, limit)
    count = len(paths)
    assert [path.name for path in paths] == [f"weights-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)]
    assert count == 5 and all(path.stat().st_size <= limit for path in paths)
    index = json.loads((tmp_path / "weights.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert list(index["weight_map"]) == sorted(tensors)
    for path in paths:
        assert header(path)[0].keys() == {name for name, file in index["weight_map"].items() if file == path.name}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(p.name for p in paths), "weights.safetensors.index.json"]
    )


@pytest.mark.parametrize("spare", [-8, 0, 8])
def test_the_limit_counts_the_whole_file(tmp_path: Path, spare: int) -> None:
    """Catches a shard that exceeds the limit by its header, or by the header's length field."""
    tensors = {"a": torch.ones(200), "b": torch.ones(200)}
    limit = LENGTH_FIELD + -(-header_bytes(tensors) // ALIGNMENT) * ALIGNMENT + 2 * 800 + spare
    paths = write(tmp_path, tensors, limit)
    assert len(paths) == (2 if spare < 0 else 1)
    assert all(path.stat().st_size <= limit for path in paths)


def test_a_limit_that_is_not_reached_gives_one_numbered_shard(tmp_path: Path) -> None:
    """Catches a missing index, or a name without a number, where everything fits into the first shard."""
    paths = write(tmp_path, {"a": torch.ones(3)}, limit=10**6)
    assert [path.name for path in paths] == ["weights-00001-of-00001.safetensors"]
    assert (tmp_path / "weights.safetensors.index.json").exists()


def test_a_tensor_larger_than_the_limit_gets_its_own_file(tmp_path: Path) -> None:
    """Catches a large tensor that is refused, split, or in one shard with others."""
    tensors = {"a": torch.ones(10), "huge": torch.ones(5000), "b": torch.ones(10), "c": torch.ones(10)}
    paths = write(tmp_path, tensors, header_bytes(tensors) + 1000)
    assert [sorted(header(path)[0]) for path in paths] == [["a"], ["huge"], ["b", "c"]]
    actual = read(paths)
    assert all(torch.equal(actual[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("limit", [None, 1500])
def test_the_same_tensors_give_the_same_bytes(tmp_path: Path, limit: int | None) -> None:
    """Catches dates, random names, hash order or uninitialized padding in the files."""
    tensors = {f"t{number}": torch.arange(number * 3, dtype=torch.int8) for number in range(30)}
    contents = []
    for run in ("first", "second"):
        folder = tmp_path / run
        folder.mkdir()
        write(folder, tensors, limit)
        contents.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    assert contents[0] == contents[1]


def test_header_is_padded_with_spaces(tmp_path: Path) -> None:
    """Catches padding that the format does not allow: strict readers refuse anything but spaces."""
    (path,) = write(tmp_path, {"a": torch.ones(2)})
    raw = path.read_bytes()
    text = raw[LENGTH_FIELD : header(path)[1]]
    assert text.startswith(b"{") and text.rstrip(b" ").endswith(b"}") and text.endswith(b" ")


def test_no_tensors(tmp_path: Path) -> None:
    """Catches a crash, or a missing file, where nothing was added."""
    (path,) = write(tmp_path, {})
    assert read([path]) == {}


def test_a_name_written_twice_is_an_internal_error(tmp_path: Path) -> None:
    """Catches a tensor that silently replaces another, in the same shard or in an earlier one."""
    writer = ShardWriter(tmp_path, header_bytes=1000, limit=1)
    for name in ("a", "b"):
        writer.add(name, torch.ones(2))
    for name in ("a", "b"):
        with pytest.raises(InternalError, match=f"{name} is written twice"):
            writer.add(name, torch.ones(2))


def test_a_header_longer_than_reserved_is_an_internal_error(tmp_path: Path) -> None:
    """Catches a header that is written over the first tensor's data."""
    writer = ShardWriter(tmp_path, header_bytes=64)
    writer.add("a long name that needs more room than was reserved", torch.ones(2))
    with pytest.raises(InternalError, match="header needs"):
        writer.close("weights")
