"""Maps tensors in files into memory."""

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from vlqc.frontend.checkpoint.prefetch import ByteRange

DTYPES = {  # dtype code of safetensors -> dtype
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


def map_tensor(span: ByteRange, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A tensor whose data is a private mapping of these bytes of a file.

    safetensors reads the header of a file each time it is opened, which takes long where it lists every expert.
    """
    if span.begin == span.end:
        return torch.empty(tuple(shape), dtype=dtype)
    start = span.begin - span.begin % mmap.ALLOCATIONGRANULARITY
    with open(span.file, "rb") as file:
        mapping = mmap.mmap(file.fileno(), span.end - start, access=mmap.ACCESS_COPY, offset=start)
    flat = torch.frombuffer(mapping, dtype=dtype, count=math.prod(shape), offset=span.begin - start)
    return flat.view(tuple(shape))
