"""How much of the inputs of static layers, and of cached keys and values, is clipped while a quantized model runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlqc.kernels_ref.attention import ATTENTION, attention_arguments
from vlqc.kernels_ref.kv_cache import QuantizedCacheAttention, scale_per_head
from vlqc.kernels_ref.quant_linear import QuantLinear
from vlqc.kernels_ref.quantize import INT8_MAX, INT8_MIN
from vlqc.targets.schemes import Scheme
from vlqc.verify.findings import VerificationResult, format_list

CHECK, CACHE_CHECK = "input ranges", "KV cache"
# Times the power of rounding errors. The best range of a layer has about as much clipping noise as rounding noise; half
# of a range that covers four standard deviations has 500 times as much.
TOO_MUCH = 100.0
# Share of the inputs and times the power of rounding errors from which a range may be what makes the logits useless: a
# quarter of a good range clips half of them, with 9e4 times the power. Undamaged ranges reach a quarter, 2e4 times on
# images of one color or of stripes after calibration with one photo, but then logits stay above 11 dB.
FAR_TOO_SMALL = (0.3, 3e4)


@dataclass
class _Clipped:
    """Sums over the inputs of one layer, or the keys or values of one cache: squares of what was clipped, squared
    rounding errors as expected, values."""

    clipped: float = 0.0
    rounding: float = 0.0
    values: int = 0
    beyond: int = 0


class ClippingRecorder:
    """Adds up what static layers clip of their inputs, and quantized caches of keys and values."""

    def __init__(self) -> None:
        self.layers: dict[str, _Clipped] = {}
        self.caches: dict[tuple[str, str], _Clipped] = {}  # (path of the attention module, "key" or "value")

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Inside, the inputs of all static layers below `model` count, under the paths of these layers, and what is
        cached as integers, under the paths of the attention modules."""
        handles = [
            module.register_forward_pre_hook(self._hook(path))
            for path, module in model.named_modules()
            if isinstance(module, QuantLinear) and Scheme(module.scheme).spec.activation.is_static
        ]
        for path, module in model.named_modules():
            if isinstance(module, QuantizedCacheAttention):
                handles += self._cache_hooks(path, module)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _cache_hooks(self, path: str, module: QuantizedCacheAttention) -> list[Any]:
        """Handles of hooks of the wrapped module: it runs where keys and values are not rounded yet."""
        members = {"key": module.key_scale, "value": module.value_scale}
        sums = {name: self.caches.setdefault((path, name), _Clipped()) for name in members}
        modes: list[_CountClipped] = []

        def enter(*unused: Any) -> None:
            modes.append(_CountClipped(members, sums))
            modes[-1].__enter__()  # type: ignore[no-untyped-call]

        def leave(*unused: Any) -> None:
            modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

        wrapped = module.float_attention
        return [wrapped.register_forward_pre_hook(enter), wrapped.register_forward_hook(leave, always_call=True)]

    def _hook(self, path: str) -> Any:
        sums = self.layers.setdefault(path, _Clipped())

        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            scale, offset = (float(module.get_buffer(name)) for name in ("input_scale", "input_offset"))
            values = args[0].float()
            excess = values - values.clamp((INT8_MIN - offset - 0.5) * scale, (INT8_MAX - offset + 0.5) * scale)
            sums.clipped += float(excess.square().sum(dtype=torch.float64))
            sums.rounding += values.numel() * scale**2 / 12
            sums.values += values.numel()
            sums.beyond += int(excess.count_nonzero())

        return add

    def far_too_small(self) -> list[str]:
        """Paths of the layers of which most of the range is missing for these inputs."""
        share, times = FAR_TOO_SMALL
        return [
            path
            for path, sums in self.layers.items()
            if sums.beyond > share * sums.values and sums.clipped > times * sums.rounding
        ]

    def add_warnings(self, name: Any, result: VerificationResult) -> None:
        """One warning for all layers with one input of which far more is clipped than a good range clips.

        name: path -> name of a layer.
        """
        alike: dict[tuple[float, int], list[str]] = {}
        for path, sums in self.layers.items():
            result.add_examined(CHECK, int(sums.values > 0))
            if sums.clipped > TOO_MUCH * sums.rounding:
                alike.setdefault((sums.clipped / sums.rounding, sums.beyond), []).append(path)
        for (times, beyond), paths in alike.items():
            share = beyond / self.layers[paths[0]].values
            what = f"{share:.2%} of the inputs are clipped, with {times:.3g} times the power of rounding errors"
            why = "the range is too small for these inputs: it is damaged, or the calibration inputs were smaller"
            fix = "compile again with calibration images like these"
            where = format_list([name(path) for path in paths])
            result.add_warning(CHECK, where, what, why, fix)
        for (path, member), sums in self.caches.items():
            if sums.clipped > TOO_MUCH * sums.rounding:
                share, times = sums.beyond / sums.values, sums.clipped / sums.rounding
                what = f"{share:.2%} of the {member}s are clipped, with {times:.3g} times the power of rounding errors"
                why = "the scales are too small for these inputs: damaged, or the calibration inputs were smaller"
                result.add_warning(
                    CACHE_CHECK, name(path), what, why, "compile again with calibration images like these"
                )


class _CountClipped(TorchFunctionMode):
    """Mode that adds up what is clipped of the keys and values of attention calls.

    scales: float32 [channels], sums: of "key" and "value".
    """

    def __init__(self, scales: Mapping[str, Tensor], sums: Mapping[str, _Clipped]) -> None:
        super().__init__()
        self.scales, self.sums = scales, sums

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is ATTENTION:
            arguments = attention_arguments(args, kwargs or {})
            for name, sums in self.sums.items():
                self._add(arguments[name].float(), self.scales[name], sums)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _add(values: Tensor, scale: Tensor, sums: _Clipped) -> None:
        """values: [..., heads, S, D]."""
        heads, _, size = values.shape[-3:]
        steps = scale_per_head(scale, scale.numel() // size, heads)  # [heads, 1, D]
        excess = values - values.clamp((INT8_MIN - 0.5) * steps, (INT8_MAX + 0.5) * steps)
        sums.clipped += float(excess.square().sum(dtype=torch.float64))
        sums.rounding += float(steps.square().mean()) * values.numel() / 12
        sums.values += values.numel()
        sums.beyond += int(excess.count_nonzero())
