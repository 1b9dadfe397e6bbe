"""The quantization schemes: how one Linear is stored and run.

A scheme is one row of `Scheme`, plus its quantized layer in `vlqc.kernels_ref`. The rest of the compiler reads the row,
`scheme.spec`, and does not compare schemes with each other; only the rules of the engines name them.
"""

import math
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from vlqc.families.linear import Linear, Shape

if TYPE_CHECKING:  # it imports torch, which the command line loads late
    from vlqc.kernels_ref.quant_linear import QuantLinear

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
    their bytes and come with a scale_bias, or take bytes of their own (`Engine.packs_int4`); group_size: of weights
    with groups, 0 without any.
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
INT8_WEIGHT = (TensorSpec("weight", ("I8",), _matrix), *PER_CHANNEL)
INT4_WEIGHT = (
    TensorSpec("weight", ("I8",), _int4_matrix),
    *PER_CHANNEL,
    TensorSpec("weight_scale_second", SCALE, _per_group),
    TensorSpec("weight_offset_second", ZEROS, _per_group),
    TensorSpec("scale_bias", ("F32",), _per_part, only_packed=True),
)
STATIC_INPUT = (
    TensorSpec("input_scale", SCALE, _one),
    TensorSpec("input_offset", SCALE, _one),
    TensorSpec("quant_bias", ("I32",), _vector),
    TensorSpec("deq_scale", (DEQ_SCALE,), _vector),
)


# ---- the formats of weights and activations --------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightFormat:
    """Symmetric integers with a scale per output channel, or float.

    bits: of one weight; smallest, largest: integers that quantization produces, both 0 for a float weight; per_group:
    whether `group_size` columns of a row share a second scale; float32_scale: whether engines use the weight's scale
    as float32, and not in the checkpoint's dtype.
    """

    bits: int
    smallest: int = 0
    largest: int = 0
    per_group: bool = False
    float32_scale: bool = False

    @property
    def is_quantized(self) -> bool:
        return self.largest > 0

    def is_packed(self, form: StorageFormat) -> bool:
        """Whether two rows share their bytes in a folder of this format."""
        return form.packed and self.bits == 4


@dataclass(frozen=True)
class ActivationFormat:
    """int8 or float inputs.

    bits: of one value; is_static: int8 with one stored scale and offset for all inputs; is_dynamic: int8 with a scale
    per token, computed at run time (both: the engine decides when it runs the layer); cost: time that quantizing at run
    time takes, as a fraction of the time to read the layer's tensors.
    """

    bits: int
    is_static: bool = False
    is_dynamic: bool = False
    cost: float = 0.0

    @property
    def is_quantized(self) -> bool:
        return self.is_static or self.is_dynamic


FLOAT_WEIGHT = WeightFormat(16)
INT8_STATIC = WeightFormat(8, -127, 127, float32_scale=True)  # engines read deq_scale, a product in float32
INT8 = WeightFormat(8, -127, 127)
INT4_GROUPS = WeightFormat(4, -8, 7, per_group=True)

FLOAT_ACTIVATION = ActivationFormat(16)
PER_TENSOR = ActivationFormat(8, is_static=True)
PER_TOKEN = ActivationFormat(8, is_dynamic=True, cost=0.1)
PER_TENSOR_OR_TOKEN = ActivationFormat(8, is_static=True, is_dynamic=True, cost=0.1)
# Overhead of integer weights with float inputs. Their products take as long as those of float weights, twice as long as
# those of integers. That matters for prompts and not for single tokens, where reading takes the time: the mean of both.
FLOAT_PRODUCTS = 0.5


# ---- the schemes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReportStyle:
    """How the report page shows a scheme.

    title: in words; letter: in the precision map; light, dark: background and text color of each color scheme, as
    "#rrggbb".
    """

    title: str
    letter: str
    light: tuple[str, str]
    dark: tuple[str, str]


@dataclass(frozen=True)
class SchemeSpec:
    """Facts of a scheme that do not depend on an engine.

    name: in quant_model_description.json; stored: the tensors of a Linear, its bias aside; module: the quantized
    layer, as "module:class" in `vlqc.kernels_ref`, empty for float layers; substitute: name of the scheme for layers on
    which an engine does not run this one, tried before FLOAT; output_multiple: of
    which the number of outputs must be a multiple; naming_priority: a folder of several schemes is named after the one
    with the highest; aliases: other names on the command line, in lower case.
    """

    name: str
    weight: WeightFormat
    activation: ActivationFormat
    stored: tuple[TensorSpec, ...]
    report: ReportStyle
    module: str = ""
    substitute: str | None = None
    output_multiple: int = 1
    naming_priority: int = 0
    aliases: tuple[str, ...] = ()

    @property
    def is_quantized(self) -> bool:
        """Whether the layer is stored as integers."""
        return self.weight.is_quantized

    @property
    def replaces_float(self) -> bool:
        """Whether it may take the place of FLOAT, as it reads the same inputs (`--float_as`)."""
        return self.is_quantized and not self.activation.is_quantized

    @property
    def takes_added_bias(self) -> bool:
        """Whether a pass may add a bias to a layer without one, as part of its quant_bias.

        Engines apply the bias of a norm before such layers only.
        """
        return self.activation.is_static and not self.activation.is_dynamic

    @property
    def has_one_arithmetic(self) -> bool:
        """Whether it is known how engines quantize the inputs. Otherwise they decide when they run the layer, so that
        its error depends on where it runs."""
        return not (self.activation.is_static and self.activation.is_dynamic)

    @property
    def overhead(self) -> float:
        """Run time beyond reading the layer's tensors, as a fraction of the time to read them."""
        return FLOAT_PRODUCTS if self.is_quantized and not self.activation.is_quantized else self.activation.cost

    @property
    def cost(self) -> float:
        """Run time per weight: bits to read, and the overhead. Scales and biases aside."""
        return self.weight.bits * (1 + self.overhead)

    def quant_linear(self) -> type["QuantLinear"]:
        """The class of the quantized layer. Raises ValueError for a scheme without one."""
        if not self.module:
            raise ValueError(f"{self.name} has no quantized layer")
        kind: type[QuantLinear] = pkgutil.resolve_name(f"vlqc.kernels_ref.{self.module}")
        return kind


class Scheme(StrEnum):
    """How one Linear is stored and run. The value is the name in quant_model_description.json; the row is `spec`.

    `Scheme("W8A8")` returns a scheme by name. Raises ValueError for a name that does not exist.
    """

    spec: SchemeSpec

    def __new__(cls, spec: SchemeSpec | str) -> "Scheme":  # str: type checkers compare Scheme("W8A8") with this
        assert isinstance(spec, SchemeSpec)
        member = str.__new__(cls, spec.name)
        member._value_, member.spec = spec.name, spec
        return member

    W8A8 = SchemeSpec(
        "W8A8",
        INT8_STATIC,
        PER_TENSOR,
        stored=(*INT8_WEIGHT, *STATIC_INPUT),
        report=ReportStyle("W8A8, static", "8", light=("#2f6fb0", "#ffffff"), dark=("#6cabea", "#10141a")),
        module="quant_linear:StaticQuantLinear",
        substitute="W8A8_DYNAMIC",
        naming_priority=3,
    )
    W8A8_DYNAMIC = SchemeSpec(
        "W8A8_DYNAMIC",
        INT8,
        PER_TOKEN,
        stored=INT8_WEIGHT,
        report=ReportStyle("W8A8, dynamic per token", "d", light=("#0b7a7c", "#ffffff"), dark=("#53c5bd", "#10141a")),
        module="quant_linear:DynamicQuantLinear",
        naming_priority=2,
    )
    W8A8_MIX = SchemeSpec(
        "W8A8_MIX",
        INT8,
        PER_TENSOR_OR_TOKEN,
        stored=(*INT8_WEIGHT, *STATIC_INPUT),
        report=ReportStyle("W8A8, static or dynamic", "m", light=("#6a4fb3", "#ffffff"), dark=("#b3a0f0", "#10141a")),
        module="quant_linear:MixQuantLinear",
        substitute="W8A8_DYNAMIC",
        naming_priority=4,
        aliases=("w8a8_pdmix",),  # of MindIE
    )
    W4A8_DYNAMIC = SchemeSpec(
        "W4A8_DYNAMIC",
        INT4_GROUPS,
        PER_TOKEN,
        stored=INT4_WEIGHT,
        report=ReportStyle(
            "W4A8, 4-bit weights per group", "4", light=("#e8953a", "#1c2027"), dark=("#f3aa5c", "#10141a")
        ),
        module="quant_linear:GroupQuantLinear",
        substitute="W8A8_DYNAMIC",
        output_multiple=8,  # operators that take packed int4 weights read eight outputs at a time
        naming_priority=5,
        aliases=("w4a8",),
    )
    W8A16 = SchemeSpec(
        "W8A16",
        INT8,
        FLOAT_ACTIVATION,
        stored=INT8_WEIGHT,
        report=ReportStyle("W8A16, float inputs", "w", light=("#5c7d2e", "#ffffff"), dark=("#a9c96b", "#10141a")),
        module="quant_linear:WeightOnlyQuantLinear",
        naming_priority=1,
    )
    FLOAT = SchemeSpec(
        "FLOAT",
        FLOAT_WEIGHT,
        FLOAT_ACTIVATION,
        stored=(TensorSpec("weight", (FLOAT_DTYPE,), _matrix),),
        report=ReportStyle("float", "f", light=("#ddd8cf", "#4c4a45"), dark=("#3a3f49", "#d5d2cb")),
    )

    @property
    def is_quantized(self) -> bool:
        """Whether a layer in this scheme is stored as integers."""
        return self.spec.is_quantized

    @property
    def substitute(self) -> "Scheme | None":
        """The scheme for layers on which an engine does not run this one, tried before FLOAT."""
        return None if self.spec.substitute is None else Scheme(self.spec.substitute)


DEFAULT_SCHEME = Scheme.W8A8


def option_name(scheme: Scheme) -> str:
    """The name of a scheme on the command line, such as "w8a8_dynamic"."""
    return scheme.lower()


def find_scheme(name: str) -> Scheme | None:
    """The scheme with this name or alias, in upper or lower case, with dashes or underscores; None if there is none."""
    wanted = name.strip().lower().replace("-", "_")
    return next((each for each in Scheme if wanted in (option_name(each), *each.spec.aliases)), None)


def floats() -> list[Scheme]:
    """The schemes that a layer may get that is not to be quantized with the others: FLOAT and those in its place."""
    return [Scheme.FLOAT, *(scheme for scheme in Scheme if scheme.spec.replaces_float)]


def quant_linears() -> list[type["QuantLinear"]]:
    """The classes of all quantized layers."""
    return [scheme.spec.quant_linear() for scheme in Scheme if scheme.is_quantized]


def stored_tensors(scheme: Scheme, form: StorageFormat) -> tuple[TensorSpec, ...]:
    """The tensors of a Linear in a folder of this format, its bias aside."""
    return tuple(tensor for tensor in scheme.spec.stored if form.packed or not tensor.only_packed)


def linear_bytes(scheme: Scheme, linear: Linear, form: StorageFormat) -> int:
    """Bytes of the stored tensors of a Linear, its bias aside."""
    return tensors_bytes(stored_tensors(scheme, form), linear, form)


def tensors_bytes(tensors: Iterable[TensorSpec], linear: Linear, form: StorageFormat) -> int:
    """Bytes of some tensors of a Linear."""
    return sum(
        math.prod(tensor.shape(linear, form)) * ITEM_BYTES[form.dtype_codes(tensor.dtypes)[0]] for tensor in tensors
    )


def scheme_of_tensors(suffixes: Iterable[str]) -> Scheme:
    """Names of the tensors of a quantized Linear without their layer -> the scheme of which most are there.

    Of several such schemes the one with the fewest tensors. A folder describes its schemes; this is for faults in it.
    """
    present = set(suffixes)
    expected = {each: {tensor.suffix for tensor in each.spec.stored} for each in Scheme if each.is_quantized}
    return max(expected, key=lambda each: (len(expected[each] & present), -len(expected[each])))


def quant_type(schemes: Iterable[Scheme]) -> Scheme:
    """Schemes of a folder's layers -> the one that names its files and is its model_quant_type; FLOAT if none is
    quantized."""
    present = set(schemes)
    quantized = (each for each in Scheme if each in present and each.is_quantized)
    return max(quantized, key=lambda each: each.spec.naming_priority, default=Scheme.FLOAT)
