"""Builds an ONNX graph node by node. All shapes are static, as those of a traced stage."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

OPSET = 21  # the first with 4-bit integers and blockwise DequantizeLinear
IR_VERSION = 10  # the first with this opset, so that older runtimes can read the model

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}


class Builder:
    """Collects nodes and initializers in order. Values are identified by unique names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._names: set[str] = set()
        self._shared: dict[tuple[Any, ...], str] = {}

    def name(self, prefix: str) -> str:
        """Reserves a unique name: the prefix, with a number if it is in use."""
        number, name = 1, prefix
        while name in self._names:
            name, number = f"{prefix}_{number}", number + 1
        self._names.add(name)
        return name

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Adds a node with one output and returns its name. output: prefix of the name, by default the kind."""
        (name,) = self.ops(kind, *inputs, outputs=[output or kind.lower()], **attributes)
        return name

    def ops(self, kind: str, *inputs: str, outputs: Sequence[str], **attributes: Any) -> list[str]:
        """Adds a node with several outputs and returns their names."""
        names = [self.name(output) for output in outputs]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=names[0], **attributes))
        return names

    def tensor(self, value: Tensor, prefix: str) -> str:
        """Adds an initializer with the values and dtype of a tensor and returns its name."""
        name = self.name(prefix)
        array = value.detach().cpu().contiguous()
        if array.dtype == torch.bfloat16:
            raw = array.view(torch.int16).numpy().tobytes()
            self.initializers.append(helper.make_tensor(name, TensorProto.BFLOAT16, list(array.shape), raw, raw=True))
        else:
            self.initializers.append(numpy_helper.from_array(array.numpy(), name))
        return name

    def int4(self, value: Tensor, prefix: str) -> str:
        """Adds an INT4 initializer and returns its name.

        value: int8 [N, K] in -8..7. ONNX stores two of them in a byte, in row-major order.
        """
        name = self.name(prefix)
        flat = value.detach().cpu().contiguous().flatten()
        flat = torch.cat([flat, flat.new_zeros(flat.numel() % 2)])
        packed = (flat[0::2] & 0xF) | (flat[1::2] << 4)  # the first in the low four bits
        raw = packed.numpy().tobytes()
        self.initializers.append(helper.make_tensor(name, TensorProto.INT4, list(value.shape), raw, raw=True))
        return name

    def numbers(self, *values: int) -> str:
        """A constant int64 [n]; equal constants are shared."""
        return self._constant(np.array(values, dtype=np.int64), f"ints_{'_'.join(map(str, values))}"[:40])

    def scalar(self, value: float) -> str:
        """A constant float32 []; equal constants are shared."""
        return self._constant(np.array(value, dtype=np.float32), f"float_{value:g}")

    def _constant(self, array: Any, prefix: str) -> str:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._shared:
            self._shared[key] = self.name(prefix)
            self.initializers.append(numpy_helper.from_array(array, self._shared[key]))
        return self._shared[key]


def type_of(dtype: torch.dtype) -> int:
    return int(TYPES[dtype])
