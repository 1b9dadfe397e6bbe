"""The tensors that a finished stage is stored as: names, values and schemes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlqc.emit.shard_writer import ALIGNMENT, ENTRY_BYTES
from vlqc.errors import Fault, UserError
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.emitted_dtype import dtype_name
from vlqc.ir.memory import release_pages
from vlqc.ir.stage import CacheSite, Stage
from vlqc.kernels_ref.quant_linear import QuantLinear
from vlqc.targets.caches import TensorScheme
from vlqc.targets.engine import Engine
from vlqc.targets.schemes import Scheme

LOST_DIGITS = 2.0**-7  # relative error of a weight as a whole; rounding to bfloat16 leaves less than 2**-8
TENSORS_PER_LINEAR = max(len(scheme.spec.stored) for scheme in Scheme) + 1  # at most, with the bias


@dataclass(frozen=True)
class EmittedTensor:
    """One tensor of the result: checkpoint name, value, and the scheme that the description lists for it."""

    name: str
    tensor: Tensor
    scheme: TensorScheme


def float_tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> EmittedTensor:
    """An unquantized tensor, cast to `dtype`. UserError if a value is not finite there, or if all of them are too small
    to keep their digits. Single small values beside larger ones do not matter, and neither do a small bias and values
    below float32's normal ones."""
    value = tensor.to(dtype)
    if not tensor.numel():
        return EmittedTensor(name, value, Scheme.FLOAT)
    extremes = torch.stack(torch.aminmax(tensor))
    largest, why = float(extremes.abs().amax()), ""
    if not bool(torch.isfinite(extremes.to(dtype)).all()):
        why = f"its largest value {largest:g} is beyond {dtype_name(dtype)}"
    elif torch.finfo(torch.float32).tiny <= largest < torch.finfo(dtype).tiny and not name.endswith("bias"):
        error = float((tensor.double() - value.double()).norm() / tensor.double().norm())
        if error > LOST_DIGITS:
            why = f"its largest value is {largest:g}, and {dtype_name(dtype)} changes the tensor by {error:.0%}"
    if why:
        fix = "use --dtype bfloat16, with a bfloat16 or float32 checkpoint"
        raise UserError(Fault(f"{name} cannot be stored", why=why, fix=fix))
    return EmittedTensor(name, value, Scheme.FLOAT)


def stage_tensors(stage: Stage, layout: Engine, scheme: Scheme) -> Iterator[EmittedTensor]:
    """The tensors of a lowered stage in module order: integers and scales of quantized Linears, everything else in
    float, then the scales of cached keys and values, and at the end those that the layout repeats.

    scheme: that of the whole compilation, listed for the repeated tensors. UserError for a Linear that was assigned a
    scheme but not lowered, and for such a cache.
    """
    for site in stage.sites.values():
        if site.is_quantized and not stage.is_lowered(site):
            fix = "let the pipeline end with the passes that quantize activations and weights and lower linears"
            raise UserError(Fault(f"{site.name} was assigned {site.scheme} but is still float", stage.name, fix=fix))
    for cache in stage.caches.values():
        if cache.is_quantized and not stage.is_lowered_cache(cache):
            fix = "let the pipeline end with the pass that makes attention read quantized keys and values"
            raise UserError(Fault(f"{cache.name} has scales for its cache but reads it in float", stage.name, fix=fix))
    for path, module in stage.module.named_modules():
        yield from module_tensors(stage, path, module, packed=layout.packs_int4)
    for cache in stage.caches.values():
        yield from _cache_tensors(cache)
    if layout.norm_copies:
        yield from _norm_copies(stage, layout, scheme)


def module_tensors(stage: Stage, path: str, module: nn.Module, *, packed: bool) -> Iterator[EmittedTensor]:
    """The tensors that `module` itself holds, named as if it were at `path` of the stage.

    packed: two rows of 4-bit weights share their bytes and come with a scale_bias, else each takes bytes of its own.
    """
    if not isinstance(module, QuantLinear):
        for name, parameter in module.named_parameters(recurse=False):
            local = f"{path}.{name}" if path else name
            yield float_tensor(stage.checkpoint_name(local), parameter, stage.dtype)
            release_pages(parameter)
        return
    layer = stage.checkpoint_name(path)
    if Scheme(module.scheme).spec.replaces_float:
        _require_finite_weights(layer, module, stage.dtype)
    for name, buffer in module.stored(packed=packed, row_parallel=stage.family.is_row_parallel(layer)).items():
        full_name = f"{layer}.{name}"
        if name == "bias":
            yield float_tensor(full_name, buffer, stage.dtype)
        else:
            yield EmittedTensor(full_name, buffer, Scheme(module.scheme))


def _require_finite_weights(layer: str, module: QuantLinear, dtype: torch.dtype) -> None:
    """UserError if a weight is not finite in the dtype in which engines multiply the integers by their scale."""
    low, high = torch.aminmax(module.weight, dim=1)
    weights = torch.maximum(high.float(), -low.float()) * module.weight_scale.float().reshape(-1)
    if not bool(torch.isfinite(weights.to(dtype)).all()):
        why = f"its largest weight {float(weights.amax()):g} is beyond {dtype_name(dtype)}, in which engines compute it"
        raise UserError(Fault(f"{layer} cannot be {module.scheme}", why=why, fix="use --dtype bfloat16"))


def _cache_tensors(cache: CacheSite) -> Iterator[EmittedTensor]:
    """Scales of a quantized cache, and offsets of 0, float32 [channels]; nothing for a cache in float."""
    if cache.scheme is None:
        return
    for layer, scale in ((cache.key, cache.key_scale), (cache.value, cache.value_scale)):
        assert scale is not None, cache.name
        for spec in cache.scheme.spec.stored:
            value = scale.float() if spec.suffix.endswith("scale") else torch.zeros(cache.channels)
            yield EmittedTensor(f"{layer}.{spec.suffix}", value, cache.scheme)


def header_bytes(checkpoint: Checkpoint) -> int:
    """An upper bound of the header of a file that holds everything made of this checkpoint.

    It counts every tensor as a Linear. The four scales and offsets of a layer's cache have the space that its norms do
    not need.
    """
    needed = 1024 + sum((len(name.encode()) + 24 + ENTRY_BYTES) * TENSORS_PER_LINEAR for name in checkpoint.names)
    return -(-needed // ALIGNMENT) * ALIGNMENT


def _norm_copies(stage: Stage, layout: Engine, scheme: Scheme) -> Iterator[EmittedTensor]:
    """Weight and bias of every norm to which the engine adds a bias once more, as `X.<norm_copies>.weight` and
    `X.<norm_copies>.bias`."""
    for path, module in stage.module.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        norm = stage.checkpoint_name(path)
        is_part = stage.family.part(norm) in layout.norm_bias_parts
        if is_part and list(parameters) == ["weight", "bias"] and parameters["weight"].ndim == 1:
            for name, parameter in parameters.items():
                full_name = f"{norm}.{layout.norm_copies}.{name}"
                yield EmittedTensor(full_name, parameter.to(stage.dtype), scheme)
