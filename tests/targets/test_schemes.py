"""vlqc.targets.schemes: facts of the schemes, and bytes of a stored Linear."""

import pytest

from tests.support.reference_schemes import DYNAMIC, FLOAT, W4A8, W8A8
from vlqc.families.linear import Linear
from vlqc.targets.schemes import Scheme, StorageFormat, linear_bytes, quant_linears, quant_type, scheme_of_tensors

BF16, F16 = StorageFormat("BF16", group_size=64), StorageFormat("F16", group_size=64)
UNPACKED = StorageFormat("BF16", packed=False, group_size=64)
WIDE, ROW_PARALLEL = Linear(16, 128), Linear(16, 128, row_parallel=True)


def test_every_scheme_is_described() -> None:
    """Catches a new scheme without stored tensors or quantized layer, and one that shares its place in the order of
    names or its letter with another."""
    for scheme in Scheme:
        assert scheme.spec.name == scheme and scheme != scheme.substitute
        assert scheme.spec.stored[0].suffix == "weight"
    assert {kind.scheme for kind in quant_linears()} == set(Scheme) - {FLOAT}
    assert len({scheme.spec.naming_priority for scheme in Scheme}) == len(Scheme)
    assert len({scheme.spec.report.letter for scheme in Scheme}) == len(Scheme)


def test_float_has_no_quantized_layer() -> None:
    """Catches a float layer that is replaced."""
    with pytest.raises(ValueError, match="FLOAT"):
        FLOAT.spec.quant_linear()


@pytest.mark.parametrize("scheme", [W8A8, DYNAMIC, W4A8])
def test_scheme_of_tensors(scheme: Scheme) -> None:
    """Catches a layer without a description that is taken for another scheme, also when a tensor is missing."""
    suffixes = [tensor.suffix for tensor in scheme.spec.stored]
    assert scheme_of_tensors([*suffixes, "bias"]) == scheme
    assert scheme_of_tensors(suffixes[1:]) == scheme


@pytest.mark.parametrize(
    ("schemes", "expected"),
    [([FLOAT], FLOAT), ([], FLOAT), ([DYNAMIC, FLOAT, W8A8], W8A8), ([W8A8, W4A8, DYNAMIC], W4A8)],
)
def test_quant_type(schemes: list[Scheme], expected: Scheme) -> None:
    """Catches a folder named after another scheme than engines expect."""
    assert quant_type(schemes) == expected


@pytest.mark.parametrize(
    ("scheme", "linear", "form", "expected"),
    [
        (FLOAT, WIDE, BF16, 2 * 16 * 128),
        (DYNAMIC, WIDE, BF16, 16 * 128 + 2 * 4 * 16),
        (W8A8, WIDE, BF16, 16 * 128 + 2 * 4 * 16 + 2 * 4 + (4 + 4) * 16),
        (W8A8, WIDE, F16, 16 * 128 + 2 * 4 * 16 + 2 * 4 + (4 + 8) * 16),  # deq_scale is int64
        (W4A8, WIDE, UNPACKED, 16 * 128 + 2 * 4 * 16 + 2 * 4 * 16 * 2),
        (W4A8, WIDE, BF16, 8 * 128 + 2 * 4 * 16 + 2 * 4 * 16 * 2 + 4 * 16),
        (W4A8, ROW_PARALLEL, BF16, 8 * 128 + 2 * 4 * 16 + 2 * 4 * 16 * 2 + 4 * 16 * 16),
    ],
)
def test_linear_bytes(scheme: Scheme, linear: Linear, form: StorageFormat, expected: int) -> None:
    """Catches a tensor that is left out of the size of the output, or counted with another dtype or shape."""
    assert linear_bytes(scheme, linear, form) == expected
