"""What every Ascend layout shares: which tensors a stage becomes, how each is marked, how much room they take."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlqc.emit.shard_writer import ENTRY_BYTES
from vlqc.errors import Fault, UserError
from vlqc.families.qwen2_5_vl import stays_float_in_reference
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.stage import Stage
from vlqc.kernels_ref.int4_groups import pack_int4, scale_bias
from vlqc.kernels_ref.quant_linear import GroupQuantLinear
from vlqc.targets.rules import supported_schemes
from vlqc.targets.schemes import Scheme
from vlqc.targets.vllm_ascend import VLLM_ASCEND

TENSORS_PER_LINEAR = 8  # the most that one Linear becomes: weight, bias and six companions
ROW_PARALLEL = ("o_proj", "down_proj", "proj")  # linears that tensor parallelism cuts along their inputs


@dataclass(frozen=True)
class Entry:
    """One emitted tensor: checkpoint name, value, and its word in the description."""

    name: str
    tensor: Tensor
    mark: Scheme


def emitted_dtype(stored: torch.dtype) -> torch.dtype:
    """Engines run bfloat16 and float16; everything else is emitted as bfloat16."""
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16


def float_entry(name: str, tensor: Tensor, dtype: torch.dtype) -> Entry:
    """An unquantized tensor in the emitted dtype; UserError if a value leaves its range."""
    value = tensor.to(dtype)
    if value.numel() and not all(map(torch.isfinite, torch.aminmax(value))):
        why = f"its largest value {float(tensor.abs().amax()):g} is beyond {dtype}".replace("torch.", "")
        raise UserError(Fault(f"{name} cannot be stored", why=why, fix="compile from a bfloat16 or float32 checkpoint"))
    return Entry(name, value, Scheme.FLOAT)


def stage_entries(stage: Stage, *, packed: bool) -> Iterator[Entry]:
    """The tensors of a lowered stage in module order: integers and scales of quantized linears, all else in float.

    packed: two 4-bit weights per byte with the correction that this needs, else one per byte.
    """
    for site in stage.sites.values():
        if site.scheme not in (None, Scheme.FLOAT) and not stage.is_lowered(site):
            fix = "let the pipeline end with the passes that quantize activations and weights and lower linears"
            raise UserError(Fault(f"{site.name} was assigned {site.scheme} but is still float", stage.name, fix=fix))
    for path, module in stage.live.named_modules():
        yield from module_entries(stage, path, module, packed=packed)


def module_entries(stage: Stage, path: str, module: nn.Module, *, packed: bool) -> Iterator[Entry]:
    """The tensors that a module itself holds, were it at this path of the stage."""
    scheme = getattr(module, "scheme", None)
    if scheme is None:
        for name, parameter in module.named_parameters(recurse=False):
            local = f"{path}.{name}" if path else name
            yield float_entry(stage.checkpoint_name(local), parameter, stage.dtype)
        return
    layer = stage.checkpoint_name(path)
    tensors = dict(module.named_buffers(recurse=False))
    if packed and isinstance(module, GroupQuantLinear):
        tensors |= packed_int4(module, layer)
    for name, buffer in tensors.items():
        full = f"{layer}.{name}"
        yield float_entry(full, buffer, stage.dtype) if name == "bias" else Entry(full, buffer, Scheme(scheme))


def packed_int4(module: GroupQuantLinear, layer: str) -> dict[str, Tensor]:
    """The tensors of a 4-bit layer that differ where two weights share a byte."""
    row_parallel = layer.rpartition(".")[2] in ROW_PARALLEL
    correction = scale_bias(module.weight, module.weight_scale, module.weight_scale_second, row_parallel)
    return {"weight": pack_int4(module.weight), "scale_bias": correction}


def header_bytes(checkpoint: Checkpoint) -> int:
    """An upper bound of the header of a file that holds everything made of this checkpoint."""
    return 1024 + sum((len(name.encode()) + 24 + ENTRY_BYTES) * TENSORS_PER_LINEAR for name in checkpoint.names)


def expected_bytes(model: StreamedModel) -> int:
    """About how much room the result takes: a byte per weight of what is quantized by default, floats as emitted."""
    checkpoint, total = model.checkpoint, header_bytes(model.checkpoint)
    for name, parameter in model.parameters(model.module).items():
        layer = name.removesuffix(".weight")
        quantized = len(supported_schemes(VLLM_ASCEND, layer)) > 1 and not stays_float_in_reference(layer)
        total += parameter.numel() * (1 if quantized else emitted_dtype(checkpoint.dtype).itemsize)
    return total
