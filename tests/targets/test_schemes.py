"""vlqc.targets.schemes: facts of the schemes, and bytes of a stored Linear."""

import pytest

from tests.support.reference_schemes import DYNAMIC, FLOAT, W4A8, W8A8
from vlqc.families.model_structure import Linear
from vlqc.targets.schemes import NAMING_ORDER, SPECS, Scheme, StorageFormat, linear_bytes, quant_type

BF16, F16 = StorageFormat("BF16", group_size=64), StorageFormat("F16", group_size=64)
UNPACKED = StorageFormat("BF16", packed=False, group_size=64)
WIDE, ROW_PARALLEL = Linear(16, 128), Linear(16, 128, row_parallel=True)


def test_every_scheme_is_described() -> None:
    """Catches a new scheme without stored tensors, without a place in the order of names, or with itself as
    alternative."""
    assert set(SPECS) == set(Scheme) == {*NAMING_ORDER, FLOAT}
    for scheme, spec in SPECS.items():
        assert spec.stored and scheme not in (spec.substitute, *spec.alternatives)


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
