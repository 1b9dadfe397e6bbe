"""The tensors that a compiled folder must contain: name, dtype, shape and description entry of each.

They follow from the structure of the model, the scheme of every linear layer and the folder's form.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from vlqc.families.linear import Shape
from vlqc.frontend.model_structure import ModelStructure
from vlqc.targets.caches import CacheSchemes, TensorScheme, projections
from vlqc.targets.schemes import Scheme, StorageFormat, quant_type, stored_tensors

# dtype in config.json -> safetensors dtype code
DTYPE_CODES = {"bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class ExpectedTensor:
    """One tensor of the folder: allowed dtype codes, shape, and its scheme in the description."""

    dtypes: tuple[str, ...]
    shape: Shape
    scheme: TensorScheme


def expected_tensors(
    model: ModelStructure, schemes: Mapping[str, Scheme], form: StorageFormat, caches: CacheSchemes | None = None
) -> dict[str, ExpectedTensor]:
    """Model, scheme per linear layer (FLOAT if absent), form and caches -> every tensor that the folder must have."""
    tensors = {
        name: ExpectedTensor((form.float_dtype,), shape, Scheme.FLOAT)
        for name, shape in model.parameters.items()
        if name.rpartition(".")[0] not in model.linears
    }
    for layer, linear in model.linears.items():
        scheme = schemes.get(layer, Scheme.FLOAT)
        for spec in stored_tensors(scheme, form):
            shape = spec.shape(linear, form)
            tensors[f"{layer}.{spec.suffix}"] = ExpectedTensor(form.dtype_codes(spec.dtypes), shape, scheme)
        if linear.bias:
            tensors[f"{layer}.bias"] = ExpectedTensor((form.float_dtype,), (linear.outputs,), Scheme.FLOAT)
    for attention, pair in projections(model.family, model.linears).items():
        if (cache := (caches or {}).get(attention)) is None:
            continue
        for layer in pair:
            for spec in cache.spec.stored:
                shape = spec.shape(model.linears[layer], form)
                tensors[f"{layer}.{spec.suffix}"] = ExpectedTensor(form.dtype_codes(spec.dtypes), shape, cache)
    return tensors


def shift_tensors(
    model: ModelStructure, schemes: Mapping[str, Scheme], form: StorageFormat, copies: str
) -> dict[str, ExpectedTensor]:
    """Optional tensors: a bias per norm that has none of its own, left by a folded shift.

    copies: `norm_copies` of the layout. If it is not empty, there is also a copy of that norm's weight and bias in the
    submodule of this name, described with the folder's type.
    """
    dtypes = (form.float_dtype,)
    norms = {norm: size for norm, size in model.norms.items() if not model.has_bias(norm)}
    tensors = {f"{norm}.bias": ExpectedTensor(dtypes, (size,), Scheme.FLOAT) for norm, size in norms.items()}
    if copies:
        scheme = quant_type(schemes.values())
        for norm, size in norms.items():
            for suffix in ("weight", "bias"):
                tensors[f"{norm}.{copies}.{suffix}"] = ExpectedTensor(dtypes, (size,), scheme)
    return tensors
