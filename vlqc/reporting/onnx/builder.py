"""Building an ONNX graph: one node, one constant at a time. All shapes are static: those of a stage are, too."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

OPSET = 21  # the first with 4-bit integers and with DequantizeLinear in blocks
IR_VERSION = 10  # of the first onnx that has the opset; newer readers read it, older runtimes do not read newer ones

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
    """Nodes and initializers in their order. Values are known by name; names are made unique, and begin as asked."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._taken: set[str] = set()
        self._shared: dict[tuple[Any, ...], str] = {}

    def name(self, wanted: str) -> str:
        """A name that is not taken yet; it is from now on."""
        number, found = 1, wanted
        while found in self._taken:
            found, number = f"{wanted}_{number}", number + 1
        self._taken.add(found)
        return found

    def op(self, kind: str, *inputs: str, to: str = "", **attributes: Any) -> str:
        """Adds a node with one output and returns the output's name, which is `to` or made from the kind."""
        (output,) = self.ops(kind, *inputs, to=[to or kind.lower()], **attributes)
        return output

    def ops(self, kind: str, *inputs: str, to: Sequence[str], **attributes: Any) -> list[str]:
        """Adds a node with several outputs."""
        outputs = [self.name(wanted) for wanted in to]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, name=outputs[0], **attributes))
        return outputs

    def cast(self, x: str, dtype: torch.dtype, to: str) -> str:
        """A Cast, whose attribute is called as our outputs are."""
        name = self.name(to)
        self.nodes.append(helper.make_node("Cast", [x], [name], name=name, **{"to": type_of(dtype)}))
        return name

    def tensor(self, value: Tensor, wanted: str) -> str:
        """An initializer: values of the tensor's own dtype."""
        name = self.name(wanted)
        array = value.detach().cpu().contiguous()
        if array.dtype == torch.bfloat16:
            raw = array.view(torch.int16).numpy().tobytes()
            self.initializers.append(helper.make_tensor(name, TensorProto.BFLOAT16, list(array.shape), raw, raw=True))
        else:
            self.initializers.append(numpy_helper.from_array(array.numpy(), name))
        return name

    def int4(self, value: Tensor, wanted: str) -> str:
        """An initializer of 4-bit integers: int8 [N, K] in -8..7, of which onnx stores two in a byte, row by row."""
        name = self.name(wanted)
        flat = value.detach().cpu().contiguous().flatten()
        flat = torch.cat([flat, flat.new_zeros(flat.numel() % 2)])
        packed = (flat[0::2] & 0xF) | (flat[1::2] << 4)  # the first one in the low half
        raw = packed.numpy().tobytes()
        self.initializers.append(helper.make_tensor(name, TensorProto.INT4, list(value.shape), raw, raw=True))
        return name

    def numbers(self, *values: int) -> str:
        """A constant int64 [n], shared by all that want the same one."""
        return self._constant(np.array(values, dtype=np.int64), f"ints_{'_'.join(map(str, values))}"[:40])

    def scalar(self, value: float) -> str:
        """A constant float32 [], shared."""
        return self._constant(np.array(value, dtype=np.float32), f"float_{value:g}")

    def _constant(self, array: Any, wanted: str) -> str:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._shared:
            self._shared[key] = self.name(wanted)
            self.initializers.append(numpy_helper.from_array(array, self._shared[key]))
        return self._shared[key]


def type_of(dtype: torch.dtype) -> int:
    return int(TYPES[dtype])
