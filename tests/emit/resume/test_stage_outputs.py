"""Files of stage outputs, and the serialization that they use: values, strides and alignment are preserved."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vlqc.emit.resume.stage_outputs import OutputsWriter, read_output
from vlqc.ir.serialization import NotSerializable, placeholder

CPU = torch.device("cpu")
GRID = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
VALUES: list[Any] = [
    GRID,
    (GRID.bfloat16(), None),
    [GRID.transpose(0, 2), {"hidden": GRID[1, :, 1:3], "n": 3, "name": "x", "on": True, "half": 0.5}],
    (torch.empty(0, 4), torch.tensor(7), GRID[:, :, 2].expand(2, 3, 4)),
    torch.randn(130, generator=torch.Generator().manual_seed(0))[70:],  # unaligned
]


def assert_same(one: Any, other: Any, *, layout: bool = True) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert one.stride() == other.stride() and one.storage_offset() % 64 == other.storage_offset() % 64
        assert not layout or torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key], layout=layout)
    elif isinstance(one, tuple | list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right, layout=layout)
    else:
        assert one == other


def test_values_are_restored(tmp_path: Path) -> None:
    """Catches other strides or alignment, on which arithmetic may depend, and values of another tensor."""
    writer = OutputsWriter(tmp_path / "file")
    specs = [writer.add(value) for value in VALUES]
    writer.close()
    for value, spec in zip(VALUES, specs, strict=True):
        assert_same(value, read_output(tmp_path / "file", spec, CPU))
        assert_same(value, placeholder(spec, CPU), layout=False)


def test_placeholders_are_nan(tmp_path: Path) -> None:
    """Catches zeros in place of outputs that were not saved, which could be used by mistake."""
    writer = OutputsWriter(tmp_path / "file")
    assert bool(placeholder(writer.add((GRID, 1)), CPU)[0].isnan().all())


@pytest.mark.parametrize("value", [object(), {1: GRID}, (GRID, {3}), torch.zeros(2, dtype=torch.complex64)])
def test_unsupported_values_are_rejected(tmp_path: Path, value: Any) -> None:
    """Catches a value that is restored as something else."""
    with pytest.raises(NotSerializable):
        OutputsWriter(tmp_path / "file").add(value)


def test_a_short_file_is_an_error(tmp_path: Path) -> None:
    """Catches uninitialized memory in place of missing data, and an endless loop."""
    writer = OutputsWriter(tmp_path / "file")
    spec = writer.add(GRID)
    writer.close()
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-4])
    with pytest.raises(OSError, match="shorter"):
        read_output(tmp_path / "file", spec, CPU)
