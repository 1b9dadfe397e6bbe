"""Quantized linear layers as modules: exactly the tensors of an emitted folder, run by the reference arithmetic."""

from collections.abc import Callable
from typing import Self

import torch

from vlqc.kernels_ref.deq_scale import decode_deq_scale, encode_deq_scale
from vlqc.kernels_ref.matmul import quantized_bias, static_quant_matmul
from vlqc.kernels_ref.quantize import quantize_per_tensor


class StaticQuantLinear(torch.nn.Module):
    """A W8A8 linear, static: x [..., K] float -> [..., N] in x's dtype.

    Its buffers are the stored tensors, by their stored names, so `state_dict()` is what a folder holds for this layer:

        weight         int8 [N, K]
        weight_scale   float [N, 1]     used only to make deq_scale
        weight_offset  [N, 1]           zeros
        input_scale    float [1]        a value of the checkpoint's dtype
        input_offset   [1]              integral, -128..127
        quant_bias     int32 [N]        bias and the input offset's correction, in steps of deq_scale
        deq_scale      float32 or int64 [N]
        bias           float [N] or None    engines want it present and ignore its value, and so does `forward`

    Given float32, everything but the integers is float32. Given bfloat16 or float16, the arithmetic is the device's:
    that dtype around the integers, and for float16 the 19 bits of an int64 deq_scale that the hardware uses.
    """

    scheme = "W8A8"

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_offset: torch.Tensor
    input_scale: torch.Tensor
    input_offset: torch.Tensor
    quant_bias: torch.Tensor
    deq_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_offset: torch.Tensor,
        input_scale: torch.Tensor,
        input_offset: torch.Tensor,
        quant_bias: torch.Tensor,
        deq_scale: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        """The stored tensors, kept as they are; ValueError naming every one whose shape or dtype does not fit."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        buffers = {
            "weight": (weight, (self.out_features, self.in_features), (torch.int8,)),
            "weight_scale": (weight_scale, (self.out_features, 1), None),
            "weight_offset": (weight_offset, (self.out_features, 1), None),
            "input_scale": (input_scale, (1,), None),
            "input_offset": (input_offset, (1,), None),
            "quant_bias": (quant_bias, (self.out_features,), (torch.int32,)),
            "deq_scale": (deq_scale, (self.out_features,), (torch.float32, torch.int64)),
            "bias": (bias, (self.out_features,), None),
        }
        faults = []
        for name, (tensor, shape, dtypes) in buffers.items():
            self.register_buffer(name, tensor)
            if tensor is None:
                continue
            if tensor.shape != shape:
                faults.append(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
            if dtypes is not None and tensor.dtype not in dtypes:
                faults.append(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        if faults:
            raise ValueError("; ".join(faults))

    @classmethod
    def from_float(
        cls,
        weight_q: torch.Tensor,
        weight_scale: torch.Tensor,
        input_scale: float,
        input_offset: float,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> Self:
        """weight int8 [N, K], its scale [N, 1], the input's scale and offset, the float layer's bias [N] -> the layer.

        `dtype` is the checkpoint's (bfloat16 or float16) and decides how deq_scale is stored; `input_scale` should
        already be a value of it. deq_scale = input_scale * weight_scale in float32. ValueError if quant_bias overflows
        int32.
        """
        weight_scale = weight_scale.to(torch.float32)
        stored_input_scale = torch.tensor([input_scale], dtype=torch.float32, device=weight_q.device)
        deq_scale = (stored_input_scale * weight_scale).flatten()  # [N]
        return cls(
            weight=weight_q,
            weight_scale=weight_scale,
            weight_offset=torch.zeros_like(weight_scale),
            input_scale=stored_input_scale,
            input_offset=torch.tensor([input_offset], dtype=torch.float32, device=weight_q.device),
            quant_bias=quantized_bias(bias, deq_scale, input_offset, weight_q),
            deq_scale=encode_deq_scale(deq_scale, dtype),
            bias=bias,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, self.in_features)  # [M, K]
        xq = quantize_per_tensor(tokens, self.input_scale, self.input_offset)  # [M, K] int8
        deq_scale = decode_deq_scale(self.deq_scale, truncate=x.dtype == torch.float16)  # [N]
        y = static_quant_matmul(xq, self.weight, self.quant_bias, deq_scale, x.dtype)  # [M, N]
        return y.reshape(*x.shape[:-1], self.out_features)  # [..., N]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Only the device follows `.to(...)` and `.half()`: the buffers are stored facts, not values to be rounded."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}"
        )
