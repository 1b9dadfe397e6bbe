"""How much of the inputs of static layers is clipped while a quantized model runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlqc.kernels_ref.quant_linear import QuantLinear
from vlqc.kernels_ref.quantize import INT8_MAX, INT8_MIN
from vlqc.targets.schemes import Scheme
from vlqc.verify.findings import VerificationResult, format_list

CHECK = "input ranges"
# Times the power of rounding errors. The best range of a layer has about as much clipping noise as rounding noise; half
# of a range that covers four standard deviations has 500 times as much.
TOO_MUCH = 100.0
# Share of the inputs and times the power of rounding errors from which a range may be what makes the logits useless: a
# quarter of a good range clips half of them, with 9e4 times the power. Undamaged ranges reach a quarter, 2e4 times on
# images of one color or of stripes after calibration with one photo, but then logits stay above 11 dB.
FAR_TOO_SMALL = (0.3, 3e4)


@dataclass
class _Clipped:
    """Sums over the inputs of one layer: squares of what was clipped, squared rounding errors as expected, values."""

    clipped: float = 0.0
    rounding: float = 0.0
    values: int = 0
    beyond: int = 0


class ClippingRecorder:
    """Adds up what static layers clip of their inputs."""

    def __init__(self) -> None:
        self.layers: dict[str, _Clipped] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Inside, the inputs of all static layers below `model` count, under the paths of these layers."""
        handles = [
            module.register_forward_pre_hook(self._hook(path))
            for path, module in model.named_modules()
            if isinstance(module, QuantLinear) and Scheme(module.scheme).spec.activation.is_static
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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
