"""Every invariant is violated by a stage, and the message names the node, site or tensor."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.broken_graphs import BROKEN_GRAPHS, UP, observer_is_read
from tests.support.broken_graphs import QKV as VISION_QKV
from tests.support.broken_numbers import (
    BROKEN_NUMBERS,
    first,
    mixed_group,
    nan_weight,
    set_groups,
    weight_of,
    wrong_kept_bound,
)
from tests.support.exact_stage import LANGUAGE, planned_stage
from tests.support.small_stage import decided, lowered, traced
from vlqc.ir.parser import parse_stage
from vlqc.ir.printer import print_stage
from vlqc.ir.stage import Edge, Stage
from vlqc.ir.verifier import check
from vlqc.kernels_ref.rotation import Rotation


@pytest.mark.parametrize("make", [traced, decided, lowered])
def test_valid_stages_have_no_faults(make: Callable[[], Stage]) -> None:
    """An invariant that a correct stage breaks would stop every compilation."""
    assert check(make()) == []
    assert check(parse_stage(print_stage(make()))) == []


FAULTS = [*BROKEN_GRAPHS, *BROKEN_NUMBERS]


@pytest.mark.parametrize(("damage", "message"), FAULTS, ids=[message.split(":")[-1][:60] for _, message in FAULTS])
def test_each_invariant_is_noticed(damage: Callable[[Stage], None], message: str) -> None:
    """Damage that goes unnoticed here would reach a checkpoint; a message without a name does not help to find it."""
    stage = decided()
    damage(stage)
    faults = check(stage)
    assert any(message in fault for fault in faults), faults
    assert all(fault.startswith("visual.blocks.0: ") for fault in faults)


QKV, PROJ, DOWN = (LANGUAGE + path for path in ("attn.qkv", "attn.proj", "mlp.down_proj"))
RESIDUAL: list[tuple[dict[str, Any], str]] = [
    ({"norms": ("norm9",)}, "the stage has no norm9.weight"),
    ({"norms": (QKV,)}, f"{QKV} is not a norm"),
    ({"norms": ()}, "which is not one of its norms"),
    ({"readers": {QKV: f"{LANGUAGE}norm1", f"{LANGUAGE}norm2": None}}, "norm2 has a weight [4]"),
    (
        {"rotation": Rotation(10**12, 0, "")},
        f"{QKV} has a weight [12, 4]: expected a multiple of 1000000000000 columns",
    ),
    ({"rotation": Rotation(2, 0, "")}, "input hidden_states is torch.float32 [2, 4]: expected float [..., 2]"),
    ({"writers": {PROJ: (-4,)}}, f"{PROJ} has 4 rows: expected separate blocks of 4 rows at -4"),
    ({"writers": {PROJ: (1,)}}, f"{PROJ} has 4 rows: expected separate blocks of 4 rows at 1"),
    ({"writers": {QKV: (0, 2)}}, f"{QKV} has 12 rows: expected separate blocks of 4 rows at 0, 2"),
    ({"tables": (DOWN,)}, f"{DOWN} is a table [4, 6]: expected 4 columns"),
    ({"inputs": ("position",)}, "input position is not a tensor of the stage"),
    ({"outputs": (1,)}, "output 1 is not a tensor of the stage"),
    (
        {"writers": {}, "readers": {}, "norms": (), "inputs": (), "outputs": ()},
        "it changes nothing in the stage",
    ),
]


@pytest.mark.parametrize(("fields", "message"), RESIDUAL, ids=[message[-40:] for _, message in RESIDUAL])
def test_rotations_fit_the_stage(fields: dict[str, Any], message: str) -> None:
    """Catches a rotation in a bundle that would end in a traceback, or in a stage that is rotated in part."""
    stage = planned_stage()
    assert check(stage) == []
    stage.rotations = (replace(stage.rotations[0], **fields), stage.rotations[1])
    assert any(message in fault for fault in check(stage)), check(stage)
    if fields.get("writers") != {PROJ: (-4,)}:  # which has no text
        assert any(message in fault for fault in check(parse_stage(print_stage(stage))))


def test_rotations_come_first() -> None:
    """Catches layers that are observed, lowered or converted while their inputs are rotated and they are not."""
    stage = planned_stage()
    stage.observations = decided().observations
    assert any("inputs are observed before layers are rotated" in fault for fault in check(stage))
    stage = planned_stage()
    stage.module.get_submodule("mlp.up_proj").bfloat16()
    assert any("mlp.up_proj has no float32 weight" in fault for fault in check(stage))
    stage.rotations = (replace(stage.rotations[0], done=True), stage.rotations[1])
    assert not any("float32" in fault for fault in check(stage))
    stage.rotations *= 2
    assert any("2 rotations of the residual stream model.embed_tokens" in fault for fault in check(stage))


def test_all_faults_at_once() -> None:
    """One fault that hides the others costs a run per fault."""
    stage = decided()
    for damage in (nan_weight, mixed_group, wrong_kept_bound, observer_is_read):
        damage(stage)
    faults = "\n".join(check(stage))
    for message in ("attn.proj.weight has NaN", "several schemes", "4 rows are kept of 2", "is an observer"):
        assert message in faults


def test_parsed_stages_are_checked_as_far_as_text_goes() -> None:
    """Catches a snapshot with mixed schemes in a group that passes because it has no weights."""
    site = f'"{UP}" [6, 4] from %norm2 scheme='
    parsed = parse_stage(print_stage(decided()).replace(f"{site}W8A8", f"{site}W8A8_DYNAMIC"))
    assert len(check(parsed)) == 1 and "several schemes" in check(parsed)[0]


def test_checking_changes_nothing() -> None:
    """A verifier that altered what it verifies would make verified and unverified runs differ."""
    stage = decided()
    before = print_stage(stage)
    check(stage)
    assert print_stage(stage) == before


def test_padding_columns_are_legal() -> None:
    """A column that comes from no usable channel is -1 in the map: that is no fault."""
    stage = decided()
    usable = torch.tensor([True, False, True, True])
    stage.edges = (Edge("norm1", usable, {"attn.qkv": torch.tensor([0, -1, 2, 3])}),)
    assert check(stage) == []


def test_four_bit_groups_are_legal() -> None:
    """-8 is no fault in 4 bits, as -128 is in 8; the text must be checked as the stage is."""
    stage = decided()
    set_groups(stage, integers=first(weight_of(stage, VISION_QKV).integers.clamp(-8, 7), -8))
    assert check(stage) == [] and check(parse_stage(print_stage(stage))) == []
