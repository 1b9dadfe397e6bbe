"""The arithmetic of reading a weight: 8-bit floats are multiplied by their scales, and adapters are merged.

Both work on pieces of rows, so that little more than the tensor itself is in memory.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vlqc.frontend.checkpoint.adapters import AdapterTensor, Update
from vlqc.frontend.checkpoint.mapping import DTYPES, map_tensor
from vlqc.frontend.checkpoint.prefetch import ByteRange

PIECE = 1 << 22  # elements


def dequantize(values: Tensor, scale: Tensor, block: tuple[int, int], rows: Tensor) -> Tensor:
    """float8 values [N, K] times their scales, in float32, rounded to bfloat16 once.

    scale: [row blocks, column blocks]; block: rows and columns that share a scale; rows: int64 [N], the row of the
    stored weight that each row of `values` is.
    """
    result = torch.empty(values.shape, dtype=torch.bfloat16)
    scale, columns = scale.float(), values.shape[1]
    for piece in _pieces(values):
        of_rows = scale[rows[piece] // block[0]].repeat_interleave(block[1], dim=1)[:, :columns]
        result[piece] = values[piece].float() * of_rows
    return result


def merge_(tensor: Tensor, updates: Sequence[Update], rows: Tensor | None = None) -> Tensor:
    """Applies the updates of adapters to a tensor, in place, one after the other; returns it.

    Sums are computed in float64, so that they do not depend on their order, which differs between machines, and are
    rounded to float32 and then, once after all updates, to the dtype of the tensor.

    rows: int64 [N], numbers of the rows if `tensor` holds only some; None for all.
    """
    if not tensor.numel():
        return tensor
    loaded = [_LoadedUpdate(update, rows) for update in updates]
    matrix = tensor.view(tensor.shape[0] if tensor.ndim else 1, -1)
    for piece in _pieces(matrix):
        values = matrix[piece].double()
        for update in loaded:
            values = update.apply(values, piece)
        matrix[piece] = values if tensor.dtype == torch.float64 else values.float().to(tensor.dtype)
    return tensor


class _LoadedUpdate:
    """An update with its tensors. left @ right is the product that is added, [N, r] and [r, K]."""

    def __init__(self, update: Update, rows: Tensor | None) -> None:
        self.scaling = update.scaling
        self.value = None if update.value is None else _select(_matrix(update.value), rows)
        self.bias = None if update.bias is None else _matrix(update.bias)
        self.magnitude = None if update.magnitude is None else _select(_load(update.magnitude).flatten(), rows)
        self.left = self.right = None
        if update.a is not None and update.b is not None:
            a, b = _matrix(update.a).double(), _matrix(update.b).double()
            left, self.right = (a.T, b.T) if update.is_embedding else (b, a)
            self.left = _select(left, rows)

    def apply(self, values: Tensor, piece: slice) -> Tensor:
        """Rows of the tensor, float64 -> the same after the update."""
        if self.value is not None:
            values = self.value[piece].double()
        if self.left is not None and self.right is not None:
            values = values + self.scaling * (self.left[piece] @ self.right)
        if self.magnitude is not None:
            values = values * (self.magnitude[piece].double() / values.norm(dim=1)).unsqueeze(1)
        if self.bias is not None:
            values = values + self.scaling * self.bias[piece].double()
        return values


def _select(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _load(tensor: AdapterTensor) -> Tensor:
    return map_tensor(ByteRange(tensor.file, tensor.begin, tensor.end), DTYPES[tensor.dtype], tensor.shape)


def _matrix(tensor: AdapterTensor) -> Tensor:
    """As [first dimension, all others]."""
    return _load(tensor).view(tensor.shape[0] if tensor.shape else 1, -1)


def _pieces(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows with about PIECE elements."""
    step = max(1, PIECE // max(1, matrix[0].numel())) if len(matrix) else 1
    for begin in range(0, len(matrix), step):
        yield slice(begin, begin + step)
