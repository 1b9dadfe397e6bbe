"""Every invariant is violated by a stage, and the message names the node, site or tensor."""

from collections.abc import Callable

import pytest
import torch

from tests.support.broken_graphs import BROKEN_GRAPHS, QKV, UP, observer_is_read
from tests.support.broken_numbers import (
    BROKEN_NUMBERS,
    first,
    mixed_group,
    nan_weight,
    set_groups,
    weight_of,
    wrong_kept_bound,
)
from tests.support.small_stage import decided, lowered, traced
from vlqc.ir.parser import parse_stage
from vlqc.ir.printer import print_stage
from vlqc.ir.stage import Edge, Stage
from vlqc.ir.verifier import check


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
    set_groups(stage, integers=first(weight_of(stage, QKV).integers.clamp(-8, 7), -8))
    assert check(stage) == [] and check(parse_stage(print_stage(stage))) == []
