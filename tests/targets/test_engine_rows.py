"""Each row of the engines' tables: versions around both ends, layers and dtypes."""

from dataclasses import dataclass

import pytest

from vlqc.families.family import DECODER_ROLES, EXPERT_ROLES, VISION_ROLES, ModelFamily, Role
from vlqc.families.qwen2 import QWEN2
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.families.qwen2_vl import QWEN2_VL
from vlqc.families.qwen3 import QWEN3
from vlqc.families.qwen3_vl import QWEN3_VL
from vlqc.families.qwen3_vl_moe import QWEN3_VL_MOE
from vlqc.targets.engine import Engine
from vlqc.targets.mindie import MINDIE
from vlqc.targets.rules import supported_schemes
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import ENGINES
from vlqc.targets.vllm_ascend import VLLM_ASCEND

W8A8, DYNAMIC, W4A8 = Scheme.W8A8, Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC
MIX, W8A16 = Scheme.W8A8_MIX, Scheme.W8A16
TOWER = (*VISION_ROLES, Role.MERGER)
WITHOUT_BIAS = (Role.OUT, Role.UP, Role.DOWN)
STATIC_GRAPH = (Role.VISION_QKV, Role.VISION_PROJ, Role.VISION_UP)


@dataclass(frozen=True)
class Row:
    """Layers with `roles` of a family run in `scheme`, in the versions marked + and not in those marked -.

    versions: of the engine, in order, on both sides of every end of a range.
    """

    family: ModelFamily
    scheme: Scheme
    roles: tuple[Role, ...]
    versions: str
    float16: bool = True


VLLM_ASCEND_ROWS = (
    Row(QWEN2_5_VL, W8A8, TOWER + DECODER_ROLES, "-0.10.2rc1 +0.10.2rc2 +0.26"),
    Row(QWEN2_5_VL, DYNAMIC, DECODER_ROLES, "-0.11rc3 +0.11 +0.26", float16=False),
    Row(QWEN2_5_VL, DYNAMIC, TOWER, "-0.16rc1 +0.16 +0.26", float16=False),
    Row(QWEN2_5_VL, W4A8, WITHOUT_BIAS, "-0.11rc3 +0.11 +0.26rc1 -0.26"),
    Row(QWEN2_VL, W8A8, TOWER + DECODER_ROLES, "-0.11.0 +0.12.0rc1 +0.26"),
    Row(QWEN2_VL, DYNAMIC, DECODER_ROLES, "-0.11.0 +0.12.0rc1 +0.26", float16=False),
    Row(QWEN2_VL, DYNAMIC, TOWER, "-0.15.0rc1 +0.16.0rc1 +0.26", float16=False),
    Row(QWEN2_VL, W4A8, WITHOUT_BIAS, "-0.11.0 +0.12.0rc1 +0.26rc1 -0.26"),
    Row(
        QWEN3_VL,
        W8A8,
        TOWER + DECODER_ROLES,
        "-0.13.0rc1 +0.13.0rc2 +0.13.0 -0.14.0rc1 -0.17.0rc1 -0.18.0rc1 +0.18 +0.26",
    ),
    Row(
        QWEN3_VL,
        DYNAMIC,
        DECODER_ROLES,
        "-0.13.0rc1 +0.13.0rc2 +0.13.0 -0.14.0rc1 -0.17.0rc1 -0.18.0rc1 +0.18 +0.26",
        float16=False,
    ),
    Row(QWEN3_VL, DYNAMIC, TOWER, "-0.13.0rc2 -0.13.0 -0.17.0rc1 -0.18.0rc1 +0.18 +0.26", float16=False),
    Row(
        QWEN3_VL,
        W4A8,
        DECODER_ROLES,
        "-0.13.0rc1 +0.13.0rc2 +0.13.0 -0.14.0rc1 -0.17.0rc1 -0.18.0rc1 +0.18 +0.26rc1 -0.26",
    ),
    Row(QWEN3_VL_MOE, W8A8, TOWER + DECODER_ROLES, "-0.12.0rc1 +0.13.0rc1 +0.14.0rc1 +0.26"),
    Row(QWEN3_VL_MOE, DYNAMIC, DECODER_ROLES + EXPERT_ROLES, "-0.12.0rc1 +0.13.0rc1 +0.26", float16=False),
    Row(QWEN3_VL_MOE, DYNAMIC, TOWER, "-0.15.0rc1 +0.16.0rc1 +0.26", float16=False),
    Row(QWEN3_VL_MOE, W4A8, DECODER_ROLES, "-0.12.0rc1 +0.13.0rc1 +0.26rc1 -0.26"),
    Row(QWEN3_VL_MOE, W4A8, EXPERT_ROLES, "-0.12.0rc1 +0.13.0rc1 +0.26rc1 -0.26", float16=False),
    Row(QWEN2, W8A8, DECODER_ROLES, "-0.11rc3 +0.11 +0.26"),
    Row(QWEN2, DYNAMIC, DECODER_ROLES, "-0.11rc3 +0.11 +0.26", float16=False),
    Row(QWEN2, W4A8, WITHOUT_BIAS, "-0.11rc3 +0.11 +0.26rc1 -0.26"),
    Row(QWEN3, W8A8, DECODER_ROLES, "-0.11rc3 +0.11 +0.26"),
    Row(QWEN3, DYNAMIC, DECODER_ROLES, "-0.11rc3 +0.11 +0.26", float16=False),
    Row(QWEN3, W4A8, DECODER_ROLES, "-0.11rc3 +0.11 +0.26rc1 -0.26"),
    Row(QWEN2_5_VL, MIX, DECODER_ROLES, "-0.11.0 +0.12.0rc1 +0.26", float16=False),
    Row(QWEN2_5_VL, MIX, TOWER, "-0.16rc1 +0.16 +0.26", float16=False),
    Row(QWEN2_VL, MIX, DECODER_ROLES, "-0.11.0 +0.12.0rc1 +0.26", float16=False),
    Row(QWEN2_VL, MIX, TOWER, "-0.15.0rc1 +0.16.0rc1 +0.26", float16=False),
    Row(QWEN3_VL, MIX, DECODER_ROLES, "-0.13.0rc1 +0.13.0rc2 -0.14.0rc1 -0.18.0rc1 +0.18 +0.26", float16=False),
    Row(QWEN3_VL, MIX, TOWER, "-0.13.0rc2 -0.17.0rc1 -0.18.0rc1 +0.18 +0.26", float16=False),
    Row(QWEN3_VL_MOE, MIX, DECODER_ROLES, "-0.12.0rc1 +0.13.0rc1 +0.26", float16=False),
    Row(QWEN3_VL_MOE, MIX, TOWER, "-0.15.0rc1 +0.16.0rc1 +0.26", float16=False),
    Row(QWEN2, MIX, DECODER_ROLES, "-0.11.0 +0.12.0rc1 +0.26", float16=False),
    Row(QWEN3, MIX, DECODER_ROLES, "-0.11.0 +0.12.0rc1 +0.26", float16=False),
    Row(QWEN2_5_VL, W8A16, WITHOUT_BIAS, "-0.12.0rc1 +0.13.0rc1 +0.26"),
    Row(QWEN2_VL, W8A16, WITHOUT_BIAS, "-0.12.0rc1 +0.13.0rc1 +0.26"),
    Row(QWEN3_VL, W8A16, DECODER_ROLES, "-0.13.0rc1 +0.13.0rc2 -0.14.0rc1 -0.18.0rc1 +0.18 +0.26"),
    Row(QWEN3_VL_MOE, W8A16, DECODER_ROLES, "-0.12.0rc1 +0.13.0rc1 +0.26"),
    Row(QWEN2, W8A16, WITHOUT_BIAS, "-0.12.0rc1 +0.13.0rc1 +0.26"),
    Row(QWEN3, W8A16, DECODER_ROLES, "-0.12.0rc1 +0.13.0rc1 +0.26"),
)
MINDIE_ROWS = (
    Row(QWEN2_5_VL, W8A8, (*STATIC_GRAPH, Role.MERGER, *DECODER_ROLES), "-2.1.RC1 +2.2.RC1 +3.0.0"),
    Row(QWEN2_5_VL, DYNAMIC, DECODER_ROLES, "-2.1.RC1 +2.2.RC1 +3.0.0"),
    Row(QWEN2_VL, W8A8, STATIC_GRAPH + DECODER_ROLES, "-2.0 +2.1.RC1 +3.0.0"),
    Row(QWEN2_VL, DYNAMIC, DECODER_ROLES, "-2.2 +3.0.0alpha1 +3.0.0"),
    Row(QWEN3_VL, W8A8, STATIC_GRAPH + DECODER_ROLES, "-3.0.0alpha1 +3.0.0.beta.1 +3.0.RC1 +3.0.0"),
    Row(QWEN3_VL, DYNAMIC, DECODER_ROLES, "-3.0.0alpha1 +3.0.0.beta.1 +3.0.RC1 +3.0.0"),
    Row(QWEN3_VL_MOE, W8A8, (*STATIC_GRAPH, Role.QKV, Role.OUT), "-3.0.0alpha1 +3.0.0.beta.1 +3.0.RC1 +3.0.0"),
    Row(QWEN3_VL_MOE, DYNAMIC, EXPERT_ROLES, "-3.0.0alpha1 +3.0.0.beta.1 +3.0.RC1 +3.0.0"),
    Row(QWEN2, W8A8, DECODER_ROLES, "-2.2 +3.0.0alpha1 +3.0.0"),
    Row(QWEN2, DYNAMIC, DECODER_ROLES, "-2.2 +3.0.0alpha1 +3.0.0"),
    Row(QWEN3, W8A8, DECODER_ROLES, "-2.2 +3.0.0alpha1 +3.0.0"),
    Row(QWEN3, DYNAMIC, DECODER_ROLES, "-2.2 +3.0.0alpha1 +3.0.0"),
    Row(QWEN2, MIX, DECODER_ROLES, "-3.0.0alpha1 +3.0.0.beta.1 +3.0.0"),
    Row(QWEN3, MIX, DECODER_ROLES, "-3.0.0alpha1 +3.0.0.beta.1 +3.0.0"),
)
ROWS: dict[Engine, tuple[Row, ...]] = {VLLM_ASCEND: VLLM_ASCEND_ROWS, MINDIE: MINDIE_ROWS}
EACH = [(engine, row) for engine in ENGINES for row in ROWS[engine]]


def roles_in(target: str, row: Row, dtype: str = "bfloat16") -> set[Role]:
    """The roles of the row's family of which the target runs every layer in the row's scheme."""
    family = row.family
    return {
        role
        for role in family.roles
        if all(row.scheme in supported_schemes(target, family, layer, dtype) for layer in family.layers(role))
    }


@pytest.mark.parametrize(("engine", "row"), EACH)
def test_versions_of_a_row(engine: Engine, row: Row) -> None:
    """Catches an end of a range of versions that is off by one release, for any of the row's layers."""
    for marked in row.versions.split():
        found = roles_in(f"{engine}@{marked[1:]}", row) & set(row.roles)
        assert found == (set(row.roles) if marked[0] == "+" else set()), marked


@pytest.mark.parametrize(("engine", "row"), EACH)
def test_dtypes_of_a_row(engine: Engine, row: Row) -> None:
    """Catches a scheme said to run in a float16 model, for which the engine has no operator, in any range of versions,
    and one that is refused there."""
    for marked in row.versions.split():
        found = roles_in(f"{engine}@{marked[1:]}", row, "float16") & set(row.roles)
        assert found == (set(row.roles) if marked[0] == "+" and row.float16 else set()), marked


@pytest.mark.parametrize("engine", ENGINES)
def test_no_other_layers_and_schemes(engine: Engine) -> None:
    """Catches a row too many, and layers in a row that the engine refuses in this scheme: experts, a bias, a tower."""
    families = {row.family for row in ROWS[engine]}
    assert engine.rules.keys() == {family.name for family in families}
    for family in families:
        for scheme in set(Scheme) - {Scheme.FLOAT}:
            rows = [row for row in ROWS[engine] if (row.family, row.scheme) == (family, scheme)]
            wanted = {role for row in rows for role in row.roles}
            assert roles_in(str(engine), Row(family, scheme, (), "")) == wanted, (family, scheme)
