"""Quantized linear layers as modules, with exactly the tensors of an emitted folder."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from vlqc.kernels_ref.deq_scale import decode_deq_scale, encode_deq_scale
from vlqc.kernels_ref.int4_groups import group_size_of, int4_fault, pack_int4, scale_bias, unpack_int4
from vlqc.kernels_ref.matmul import (
    dynamic_quant_matmul,
    group_quant_matmul,
    quantized_bias,
    static_quant_matmul,
    weight_only_group_matmul,
    weight_only_matmul,
)
from vlqc.kernels_ref.quantize import dequantize_per_tensor, quantize_per_tensor, quantize_per_token

Shape = tuple[int, ...]
Dtypes = tuple[torch.dtype, ...]


def rows_and_columns(weight: torch.Tensor) -> tuple[int, int]:
    """N and K of a weight [N, K]. Raises ValueError for another number of dimensions."""
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape [N, K], got {list(weight.shape)}")
    return weight.shape[0], weight.shape[1]


@dataclass(frozen=True)
class LayerQuantization:
    """What quantization chose for one linear layer.

    integers: int8 [N, K]; scale: float32 [N, 1]; group_scale: float32 [N, K/G], None without groups; input: scale and
    offset, None if they are not static; mean_error: float [N], of the outputs, to be corrected.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    group_scale: torch.Tensor | None = None
    input: tuple[float, float] | None = None
    mean_error: torch.Tensor | None = None


class QuantLinear(torch.nn.Module):
    """Base class of the schemes: x [..., K] float -> [..., N] in x's dtype, with the stored tensors as buffers.

    The buffers have the stored names, so `state_dict()` is what a folder contains for this layer. All schemes have

        weight         int8 [N, K]
        weight_scale   float [N, 1]
        weight_offset  [N, 1]           zeros
        bias           float [N] or None

    A subclass defines `scheme`, its additional buffers, `from_quantized` and `multiply`, and the other methods where it
    differs from them.

    scheme: its name; settings: names of attributes that change the arithmetic and are not stored.
    """

    scheme: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()
    weight_only: bool = False  # whether the engine multiplies float inputs and ignores the bias
    static_input: bool = False  # whether inputs are quantized with the stored input_scale and input_offset

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_offset: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_offset: torch.Tensor,
        bias: torch.Tensor | None,
        others: Mapping[str, tuple[torch.Tensor, Shape, Dtypes | None]],
        faults: tuple[str, ...] = (),
    ) -> None:
        """Takes the stored tensors without copying; others: further ones of the scheme, with their shapes and dtypes.

        Raises ValueError with every tensor of wrong shape or dtype, and with `faults`, found by the subclass.
        """
        super().__init__()
        self.out_features, self.in_features = rows_and_columns(weight)
        buffers: dict[str, tuple[torch.Tensor | None, Shape, Dtypes | None]] = {
            "weight": (weight, (self.out_features, self.in_features), (torch.int8,)),
            "weight_scale": (weight_scale, (self.out_features, 1), None),
            "weight_offset": (weight_offset, (self.out_features, 1), None),
            **others,
            "bias": (bias, (self.out_features,), None),
        }
        messages = list(faults)
        for name, (tensor, shape, dtypes) in buffers.items():
            self.register_buffer(name, tensor)
            if tensor is None:
                continue
            if tensor.shape != shape:
                messages.append(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
            if dtypes is not None and tensor.dtype not in dtypes:
                messages.append(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        if messages:
            raise ValueError("; ".join(messages))

    @classmethod
    def from_quantized(cls, result: LayerQuantization, bias: torch.Tensor | None, dtype: torch.dtype) -> Self:
        """Computes the stored tensors from what quantization chose; a scheme ignores what it has no use for.

        bias: float [N]; dtype: of the checkpoint. Raises ValueError if something is missing, or if a stored tensor
        cannot hold its values.
        """
        raise NotImplementedError

    @classmethod
    def from_stored(cls, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None) -> Self:
        """The layer from the tensors of a folder, without copying, by name without that of the layer.

        Raises ValueError with every one of wrong shape or dtype.
        """
        return cls(**tensors, bias=bias)  # type: ignore[arg-type]  # subclasses take their stored tensors by name

    def stored(self, *, packed: bool, row_parallel: bool) -> dict[str, torch.Tensor]:
        """The tensors of a folder, by name without that of the layer; the inverse of `from_stored`.

        packed: two rows of 4-bit weights share their bytes; row_parallel: engines divide the columns among devices.
        """
        return dict(self.named_buffers(recurse=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.multiply(x.reshape(-1, self.in_features))  # [M, N]
        return y.reshape(*x.shape[:-1], self.out_features)  # [..., N]

    def multiply(self, tokens: torch.Tensor) -> torch.Tensor:
        """The scheme's arithmetic: [M, K] float -> [M, N] in the same dtype."""
        raise NotImplementedError

    def rounded_input(self, x: torch.Tensor) -> torch.Tensor:
        """x float [M, K] -> float32 [M, K], quantized as the layer does it and dequantized; x if it stays float."""
        return x

    @property
    def group_size(self) -> int:
        """Number of columns of a row that share a scale."""
        return self.in_features

    def weight_steps(self) -> torch.Tensor:
        """Quantization step of each weight, float32 [N, 1] or [N, K]."""
        return self.weight_scale.float()

    def effective_bias(self) -> torch.Tensor:
        """What the layer adds to the product of dequantized inputs and weights, float32 [N]."""
        return torch.zeros(self.out_features) if self.bias is None else self.bias.float()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """`.to(...)` and `.half()` change the device only: the stored tensors must not be rounded."""

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


class StaticQuantLinear(QuantLinear):
    """A static W8A8 linear layer: inputs are quantized with one scale and offset. Additional buffers:

        input_scale    float [1]        a value of the checkpoint's dtype
        input_offset   [1]              integral, -128..127
        quant_bias     int32 [N]        bias and the input offset's correction, in steps of deq_scale
        deq_scale      float32 or int64 [N]    input_scale * weight_scale, which is used only to make it

    Engines require `bias` and ignore its value, as does this module: the bias is part of quant_bias.

    With float32 inputs, everything but the integers is float32. With bfloat16 or float16 inputs, the arithmetic is that
    of the device: inputs and outputs have that dtype, and for float16 only 19 bits of an int64 deq_scale are used.
    """

    scheme = "W8A8"
    settings: ClassVar[tuple[str, ...]] = ("corrected",)
    static_input = True
    corrected: bool = False  # whether quant_bias corrects a mean error

    input_scale: torch.Tensor
    input_offset: torch.Tensor
    quant_bias: torch.Tensor
    deq_scale: torch.Tensor

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
        """Takes the stored tensors without copying. Raises ValueError with every one of wrong shape or dtype."""
        features, _ = rows_and_columns(weight)
        others: dict[str, tuple[torch.Tensor, Shape, Dtypes | None]] = {
            "input_scale": (input_scale, (1,), None),
            "input_offset": (input_offset, (1,), None),
            "quant_bias": (quant_bias, (features,), (torch.int32,)),
            "deq_scale": (deq_scale, (features,), (torch.float32, torch.int64)),
        }
        super().__init__(weight, weight_scale, weight_offset, bias, others)

    @classmethod
    def from_float(
        cls,
        weight_q: torch.Tensor,
        weight_scale: torch.Tensor,
        input_scale: float,
        input_offset: float,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        mean_error: torch.Tensor | None = None,
    ) -> Self:
        """Computes the stored tensors from weight int8 [N, K], its scale [N, 1], and the float layer's bias [N].

        dtype: of the checkpoint (bfloat16 or float16), which determines how deq_scale is stored; input_scale: should be
        a value of it; mean_error: float [N], see `quantized_bias`. deq_scale = input_scale * weight_scale in float32.
        Raises ValueError if quant_bias overflows int32.
        """
        weight_scale = weight_scale.to(torch.float32)
        stored_input_scale = torch.tensor([input_scale], dtype=torch.float32, device=weight_q.device)
        deq_scale = (stored_input_scale * weight_scale).flatten()  # [N]
        lowered = cls(
            weight=weight_q,
            weight_scale=weight_scale,
            weight_offset=torch.zeros_like(weight_scale),
            input_scale=stored_input_scale,
            input_offset=torch.tensor([input_offset], dtype=torch.float32, device=weight_q.device),
            quant_bias=quantized_bias(bias, deq_scale, input_offset, weight_q, mean_error),
            deq_scale=encode_deq_scale(deq_scale, dtype),
            bias=bias,
        )
        lowered.corrected = mean_error is not None
        return lowered

    @classmethod
    def from_quantized(cls, result: LayerQuantization, bias: torch.Tensor | None, dtype: torch.dtype) -> Self:
        if result.input is None:
            raise ValueError(f"a layer in {cls.scheme} needs a static input scale")
        return cls.from_float(result.integers, result.scale, *result.input, bias, dtype, result.mean_error)

    def multiply(self, tokens: torch.Tensor) -> torch.Tensor:
        xq = quantize_per_tensor(tokens, self.input_scale, self.input_offset)  # [M, K] int8
        deq_scale = decode_deq_scale(self.deq_scale, truncate=tokens.dtype == torch.float16)  # [N]
        return static_quant_matmul(xq, self.weight, self.quant_bias, deq_scale, tokens.dtype)

    def rounded_input(self, x: torch.Tensor) -> torch.Tensor:
        integers = quantize_per_tensor(x, self.input_scale, self.input_offset)
        return dequantize_per_tensor(integers, self.input_scale, self.input_offset, torch.float32)

    def effective_bias(self) -> torch.Tensor:
        """quant_bias without the correction of the input's offset."""
        sums = self.weight.sum(dim=1, dtype=torch.int64).double()
        added = self.quant_bias.double() + self.input_offset.double() * sums
        return (added * decode_deq_scale(self.deq_scale, truncate=False).double()).float()


class DynamicQuantLinear(QuantLinear):
    """A W8A8_DYNAMIC linear layer: inputs are quantized with one scale per token. No additional buffers.

    `weight_scale` should contain values of the checkpoint's dtype, in which engines read it. `bias` is added.
    """

    scheme = "W8A8_DYNAMIC"

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_offset: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Takes the stored tensors without copying. Raises ValueError with every one of wrong shape or dtype."""
        super().__init__(weight, weight_scale, weight_offset, bias, {})

    @classmethod
    def from_float(cls, weight_q: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None) -> Self:
        """weight int8 [N, K], its scale [N, 1] (a value of the checkpoint's dtype), the float bias [N] -> the layer."""
        weight_scale = weight_scale.to(torch.float32)
        return cls(weight_q, weight_scale, torch.zeros_like(weight_scale), bias)

    @classmethod
    def from_quantized(cls, result: LayerQuantization, bias: torch.Tensor | None, dtype: torch.dtype) -> Self:
        return cls.from_float(result.integers, result.scale, bias)

    def multiply(self, tokens: torch.Tensor) -> torch.Tensor:
        xq, scale_per_token = quantize_per_token(tokens)  # [M, K] int8, [M, 1]
        return dynamic_quant_matmul(xq, scale_per_token, self.weight, self.weight_scale, self.bias, tokens.dtype)

    def rounded_input(self, x: torch.Tensor) -> torch.Tensor:
        return _rounded_per_token(x)


class WeightOnlyQuantLinear(DynamicQuantLinear):
    """A W8A16 linear layer: int8 weights, float inputs. No additional buffers.

    `weight_scale` should contain values of the checkpoint's dtype, in which engines read it. `bias` is added.
    """

    scheme = "W8A16"

    def multiply(self, tokens: torch.Tensor) -> torch.Tensor:
        return weight_only_matmul(tokens, self.weight, self.weight_scale, self.bias, tokens.dtype)

    def rounded_input(self, x: torch.Tensor) -> torch.Tensor:
        return x


class MixQuantLinear(StaticQuantLinear):
    """A W8A8_MIX linear layer: the tensors of static W8A8, with which engines run two kinds of arithmetic.

    By default inputs are quantized with one scale per token, and `bias` is added, as in W8A8_DYNAMIC: so does ordinary
    serving. With `static_input`, inputs are quantized as in static W8A8: so do the decode nodes of a deployment that
    separates them from prefill nodes. `weight_scale` should contain values of the checkpoint's dtype, in which the
    dynamic arithmetic reads it.
    """

    scheme = "W8A8_MIX"
    settings = ("corrected", "static_input")
    static_input = False

    def multiply(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.static_input:
            return super().multiply(tokens)
        xq, scale_per_token = quantize_per_token(tokens)  # [M, K] int8, [M, 1]
        return dynamic_quant_matmul(xq, scale_per_token, self.weight, self.weight_scale, self.bias, tokens.dtype)

    def rounded_input(self, x: torch.Tensor) -> torch.Tensor:
        return super().rounded_input(x) if self.static_input else _rounded_per_token(x)

    def effective_bias(self) -> torch.Tensor:
        return super().effective_bias() if self.static_input else QuantLinear.effective_bias(self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', static_input=True' if self.static_input else ''}"


class GroupQuantLinear(QuantLinear):
    """A W4A8_DYNAMIC linear layer: 4-bit weights with scales per group of columns. Additional buffers:

        weight_scale_second   float [N, K/G]
        weight_offset_second  [N, K/G]         zeros

    `weight` is unpacked, -8..7, one value in each int8, as MindIE stores it; vLLM Ascend's folders have it packed
    (`int4_groups.pack_int4`) and with a `scale_bias` (`int4_groups.scale_bias`), which can be computed from the rest.

    By default activations are int8 with one scale per token, and `bias` is added. With `weight_only`, as vLLM Ascend
    runs dense layers, activations are float and `bias` is ignored.
    """

    scheme = "W4A8_DYNAMIC"
    settings = ("weight_only",)

    weight_scale_second: torch.Tensor
    weight_offset_second: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_offset: torch.Tensor,
        weight_scale_second: torch.Tensor,
        weight_offset_second: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Takes the stored tensors without copying. Raises ValueError with every one of wrong shape, dtype or range."""
        features, columns = rows_and_columns(weight)
        groups = weight_scale_second.shape[-1] if weight_scale_second.dim() else 0
        faults = [f"weight has wrong values: {fault}"] if (fault := int4_fault(weight)) else []
        try:
            group_size_of(columns, groups)
        except ValueError as error:
            faults.append(f"weight_scale_second does not fit: {error}")
        shape = (features, groups)
        others: dict[str, tuple[torch.Tensor, Shape, Dtypes | None]] = {
            "weight_scale_second": (weight_scale_second, shape, None),
            "weight_offset_second": (weight_offset_second, shape, None),
        }
        super().__init__(weight, weight_scale, weight_offset, bias, others, tuple(faults))

    @classmethod
    def from_float(
        cls,
        weight_q: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_scale_second: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> Self:
        """weight int8 [N, K] in -8..7, scales [N, 1] and [N, K/G], the float layer's bias [N] -> the layer.

        Both scales should be values of the checkpoint's dtype, in which engines read them.
        """
        first, second = weight_scale.to(torch.float32), weight_scale_second.to(torch.float32)
        return cls(weight_q, first, torch.zeros_like(first), second, torch.zeros_like(second), bias)

    @classmethod
    def from_quantized(cls, result: LayerQuantization, bias: torch.Tensor | None, dtype: torch.dtype) -> Self:
        if result.group_scale is None:
            raise ValueError(f"a layer in {cls.scheme} needs scales per group")
        return cls.from_float(result.integers, result.scale, result.group_scale, bias)

    @classmethod
    def from_stored(cls, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None) -> Self:
        """Unpacks the weight if there is a `scale_bias`, which exists in packed folders only."""
        unpacked = dict(tensors)
        if unpacked.pop("scale_bias", None) is not None:
            unpacked["weight"] = unpack_int4(unpacked["weight"])
        return super().from_stored(unpacked, bias)

    def stored(self, *, packed: bool, row_parallel: bool) -> dict[str, torch.Tensor]:
        tensors = super().stored(packed=packed, row_parallel=row_parallel)
        if packed:
            correction = scale_bias(self.weight, self.weight_scale, self.weight_scale_second, row_parallel)
            tensors |= {"weight": pack_int4(self.weight), "scale_bias": correction}
        return tensors

    @property
    def group_size(self) -> int:
        return self.in_features // self.weight_scale_second.shape[1]

    def multiply(self, tokens: torch.Tensor) -> torch.Tensor:
        scales = self.weight_scale, self.weight_scale_second
        if self.weight_only:
            return weight_only_group_matmul(tokens, self.weight, *scales, tokens.dtype)
        xq, scale_per_token = quantize_per_token(tokens)  # [M, K] int8, [M, 1]
        return group_quant_matmul(xq, scale_per_token, self.weight, *scales, self.bias, tokens.dtype)

    def rounded_input(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.weight_only else _rounded_per_token(x)

    def weight_steps(self) -> torch.Tensor:
        steps = self.weight_scale.float()
        return steps * self.weight_scale_second.float().repeat_interleave(self.group_size, dim=1)

    def effective_bias(self) -> torch.Tensor:
        return torch.zeros(self.out_features) if self.weight_only else super().effective_bias()

    def extra_repr(self) -> str:
        arithmetic = ", weight_only=True" if self.weight_only else ""
        return f"{super().extra_repr()}, group_size={self.group_size}{arithmetic}"


def layers_with_both(model: torch.nn.Module) -> list[QuantLinear]:
    """The layers of a model whose inputs can be quantized with a stored scale or with one scale per token."""
    modules = (module for module in model.modules() if isinstance(module, QuantLinear))
    return [module for module in modules if "static_input" in module.settings]


@contextmanager
def static_inputs(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the layers of `layers_with_both` quantize their inputs with the stored scale."""
    layers = layers_with_both(model)
    before = [layer.static_input for layer in layers]
    try:
        for layer in layers:
            layer.static_input = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.static_input = value


def _rounded_per_token(x: torch.Tensor) -> torch.Tensor:
    """x float [M, K] -> float32 [M, K], quantized to int8 with one scale per token and dequantized."""
    integers, scale = quantize_per_token(x)
    return integers.float() * scale
