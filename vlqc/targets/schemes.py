"""The quantization schemes: how one Linear is stored and run."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from vlqc.families.model_structure import Linear, Shape


class Scheme(StrEnum):
    """How one Linear is stored and run; the values are those of quant_model_description.json."""

    FLOAT = "FLOAT"
    W8A8 = "W8A8"  # int8 weight per output channel, int8 activation per tensor with stored scale and offset
    W8A8_DYNAMIC = "W8A8_DYNAMIC"  # int8 weight per output channel, int8 activation per token
    W4A8_DYNAMIC = "W4A8_DYNAMIC"  # int4 weight per group, int8 activation per token


# ---- the stored tensors of one Linear ------------------------------------------------------------------------------

FLOAT_DTYPE = "FLOAT_DTYPE"  # stands for the dtype of the float tensors, BF16 or F16
DEQ_SCALE = "DEQ_SCALE"  # float32 in bfloat16 folders; int64 holding the float32 bits in float16 folders
SCALE = ("F32", FLOAT_DTYPE)
ZEROS = (*SCALE, "I64")
SCALE_BIAS_PARTS = 16  # a row-parallel layer has its scale_bias per sixteenth of its inputs
ITEM_BYTES = {"I8": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8}  # by safetensors dtype code


@dataclass(frozen=True)
class StorageFormat:
    """What dtypes and shapes of a folder's tensors depend on besides the model.

    float_dtype: safetensors code of the float tensors, "BF16" or "F16"; packed: whether two rows of 4-bit weights share
    their bytes and come with a scale_bias (vLLM Ascend), or take bytes of their own (MindIE); group_size: of
    W4A8_DYNAMIC, 0 without it.
    """

    float_dtype: str
    packed: bool = True
    group_size: int = 0

    def dtype_codes(self, dtypes: Iterable[str]) -> tuple[str, ...]:
        """Replaces FLOAT_DTYPE and DEQ_SCALE by the codes that they stand for."""
        codes = {FLOAT_DTYPE: self.float_dtype, DEQ_SCALE: "F32" if self.float_dtype == "BF16" else "I64"}
        return tuple(dict.fromkeys(codes.get(dtype, dtype) for dtype in dtypes))


@dataclass(frozen=True)
class TensorSpec:
    """One tensor `<layer>.<suffix>` of a scheme.

    dtypes: safetensors codes that engines accept, the one that vlqc writes first; only_packed: only in folders with
    packed 4-bit weights.
    """

    suffix: str
    dtypes: tuple[str, ...]
    shape: Callable[[Linear, StorageFormat], Shape]
    only_packed: bool = False


def _per_channel(linear: Linear, _: StorageFormat) -> Shape:
    return (linear.outputs, 1)


def _matrix(linear: Linear, _: StorageFormat) -> Shape:
    return (linear.outputs, linear.inputs)


def _int4_matrix(linear: Linear, form: StorageFormat) -> Shape:
    return (linear.outputs // 2 if form.packed else linear.outputs, linear.inputs)


def _per_group(linear: Linear, form: StorageFormat) -> Shape:
    return (linear.outputs, linear.inputs // max(form.group_size, 1))


def _per_part(linear: Linear, _: StorageFormat) -> Shape:
    return (linear.outputs, SCALE_BIAS_PARTS if linear.row_parallel else 1)


def _one(_: Linear, __: StorageFormat) -> Shape:
    return (1,)


def _vector(linear: Linear, _: StorageFormat) -> Shape:
    return (linear.outputs,)


PER_CHANNEL = (TensorSpec("weight_scale", SCALE, _per_channel), TensorSpec("weight_offset", ZEROS, _per_channel))


# ---- facts per scheme ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SchemeSpec:
    """Facts of a scheme that do not depend on an engine.

    stored: the tensors of a Linear, its bias aside; substitute: the scheme for layers on which an engine does not run
    this one, tried before FLOAT; alternatives: what the precision search may choose in its place, in this order;
    grouped: whether `group_size` columns share a weight scale; output_multiple: of which the number of outputs must be
    a multiple.
    """

    stored: tuple[TensorSpec, ...]
    substitute: Scheme | None = None
    alternatives: tuple[Scheme, ...] = ()
    grouped: bool = False
    output_multiple: int = 1


SPECS: dict[Scheme, SchemeSpec] = {
    Scheme.FLOAT: SchemeSpec(stored=(TensorSpec("weight", (FLOAT_DTYPE,), _matrix),)),
    Scheme.W8A8: SchemeSpec(
        stored=(
            TensorSpec("weight", ("I8",), _matrix),
            *PER_CHANNEL,
            TensorSpec("input_scale", SCALE, _one),
            TensorSpec("input_offset", SCALE, _one),
            TensorSpec("quant_bias", ("I32",), _vector),
            TensorSpec("deq_scale", (DEQ_SCALE,), _vector),
        ),
        alternatives=(Scheme.W8A8_DYNAMIC, Scheme.FLOAT),
    ),
    Scheme.W8A8_DYNAMIC: SchemeSpec(
        stored=(TensorSpec("weight", ("I8",), _matrix), *PER_CHANNEL),
        alternatives=(Scheme.FLOAT,),
    ),
    Scheme.W4A8_DYNAMIC: SchemeSpec(
        stored=(
            TensorSpec("weight", ("I8",), _int4_matrix),
            *PER_CHANNEL,
            TensorSpec("weight_scale_second", SCALE, _per_group),
            TensorSpec("weight_offset_second", ZEROS, _per_group),
            TensorSpec("scale_bias", ("F32",), _per_part, only_packed=True),
        ),
        substitute=Scheme.W8A8_DYNAMIC,
        alternatives=(Scheme.W8A8_DYNAMIC, Scheme.FLOAT),
        grouped=True,
        output_multiple=8,  # vLLM Ascend's int4 operator reads eight outputs at a time
    ),
}


def stored_tensors(scheme: Scheme, form: StorageFormat) -> tuple[TensorSpec, ...]:
    """The tensors of a Linear in a folder of this format, its bias aside."""
    return tuple(spec for spec in SPECS[scheme].stored if form.packed or not spec.only_packed)


def linear_bytes(scheme: Scheme, linear: Linear, form: StorageFormat) -> int:
    """Bytes of the stored tensors of a Linear, its bias aside."""
    return sum(
        math.prod(spec.shape(linear, form)) * ITEM_BYTES[form.dtype_codes(spec.dtypes)[0]]
        for spec in stored_tensors(scheme, form)
    )


# ---- the scheme that names a folder --------------------------------------------------------------------------------

# A folder of several schemes is named after the first of these that occurs in it.
NAMING_ORDER = (Scheme.W4A8_DYNAMIC, Scheme.W8A8, Scheme.W8A8_DYNAMIC)


def quant_type(schemes: Iterable[Scheme]) -> Scheme:
    """Schemes of a folder's layers -> the one that names its files and is its model_quant_type; FLOAT if none is
    quantized."""
    present = set(schemes)
    return next((scheme for scheme in NAMING_ORDER if scheme in present), Scheme.FLOAT)
