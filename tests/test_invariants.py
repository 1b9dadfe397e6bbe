"""Each invariant has a stage that breaks it, and the message says which node, site or tensor it is about."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from little_stage import decided, lowered, traced
from torch import Tensor, fx, nn

from vlqc.engines import Scheme
from vlqc.invariants import check
from vlqc.ir import Edge, InputQuantization, Stage, WeightQuantization
from vlqc.parser import parse_stage
from vlqc.printer import print_stage

QKV, GATE, UP, DOWN = (f"visual.blocks.0.{name}" for name in ("attn.qkv", "mlp.gate", "mlp.up", "mlp.down"))


@pytest.mark.parametrize("make", [traced, decided, lowered])
def test_valid_stages_have_no_faults(make: Callable[[], Stage]) -> None:
    """An invariant that a correct stage breaks would stop every compilation."""
    assert check(make()) == []
    assert check(parse_stage(print_stage(make()))) == []


def call_of(stage: Stage, target: str) -> fx.Node:
    found: fx.Node = next(node for node in stage.graph.nodes if node.target == target)
    return found


def weight_of(stage: Stage, name: str) -> WeightQuantization:
    found = stage.sites[name].weight
    assert found is not None
    return found


def set_input(stage: Stage, scale: float = 0.5, offset: float = 0.0) -> None:
    stage.sites[QKV].input = InputQuantization(scale, offset)


def set_weight(stage: Stage, integers: Tensor | None = None, scale: Tensor | None = None) -> None:
    known = weight_of(stage, QKV)
    stage.sites[QKV].weight = WeightQuantization(
        known.integers if integers is None else integers, known.scale if scale is None else scale
    )


def set_groups(stage: Stage, size: int | None = 2, **parts: Tensor | None) -> None:
    """Makes qkv's weight one of 4-bit groups of two columns, but for the given parts."""
    site = stage.sites[QKV]
    site.group_size, whole = size, torch.ones(12, 2)
    known = {"integers": weight_of(stage, QKV).integers.clamp(-8, 7), "group_scale": whole} | parts
    site.weight = replace(weight_of(stage, QKV), **known)  # type: ignore[arg-type]


def set_edge(stage: Stage, number: int = 0, **parts: Any) -> None:
    edges = list(stage.edges or ())
    edges[number] = replace(edges[number], **parts)
    stage.edges = tuple(edges)


def set_range(stage: Stage, **parts: Any) -> None:
    seen = stage.observations["norm1"]
    seen.ranges["text"] = replace(seen.ranges["text"], **parts)


def first(tensor: Tensor, value: Any) -> Tensor:
    """A copy whose first element is `value`."""
    changed = tensor.clone()
    changed.view(-1)[0] = value
    return changed


# ---- what is done to a stage of `decided`, and what must be said -----------------------------------------------------


def reads_a_later_node(stage: Stage) -> None:
    stage.node("norm1").args = (stage.node("norm2"),)


def reads_another_graph(stage: Stage) -> None:
    stage.node("add_1").args = (traced().node("add"), stage.node("attn_proj"))


def observer_is_read(stage: Stage) -> None:
    stage.node("add_2").args = (stage.node("observe_2"), stage.node("mlp_down"))


def two_nodes_of_one_name(stage: Stage) -> None:
    stage.node("add_2").name = "add"


def no_output(stage: Stage) -> None:
    stage.graph.erase_node(stage.node("output"))


def operation_after_output(stage: Stage) -> None:
    with stage.graph.inserting_after(stage.node("output")):
        stage.graph.call_function(torch.relu, (stage.node("add_2"),))


def calls_what_is_not_there(stage: Stage) -> None:
    stage.node("norm2").target = "norm3"


def reads_a_missing_constant(stage: Stage) -> None:
    del stage.node("constant_0").meta["constant"]


def linear_without_a_site(stage: Stage) -> None:
    del stage.sites[DOWN]


def site_under_a_wrong_key(stage: Stage) -> None:
    stage.sites["elsewhere"] = stage.sites.pop(DOWN)


def two_sites_of_one_name(stage: Stage) -> None:
    stage.sites["second"] = replace(stage.sites[DOWN], target="norm1")


def two_sites_of_one_target(stage: Stage) -> None:
    stage.sites["second"] = replace(stage.sites[DOWN], name="second")


def site_is_not_called(stage: Stage) -> None:
    node = call_of(stage, "mlp.down")
    node.replace_all_uses_with(stage.node("add_1"))
    stage.graph.erase_node(node)


def wrong_source(stage: Stage) -> None:
    stage.sites[QKV].source = "norm2"


def source_is_no_node(stage: Stage) -> None:
    stage.sites[QKV].source = "norm9"


def wrong_shape(stage: Stage) -> None:
    stage.sites[QKV].shape = (8, 4)


def wrong_node_shape(stage: Stage) -> None:
    stage.node("norm1").meta["shape"] = (2, 5)


def lowered_without_a_weight(stage: Stage) -> None:
    stage.live.set_submodule("mlp.down", nn.Identity())


def lowered_without_an_input_scale(stage: Stage) -> None:
    stage.live.set_submodule("attn.qkv", nn.Identity())
    stage.sites[QKV].input = None


def float_with_parameters(stage: Stage) -> None:
    stage.sites[QKV].scheme = Scheme.FLOAT


def mixed_group(stage: Stage) -> None:
    stage.sites[UP].scheme = Scheme.W8A8_DYNAMIC


def group_with_two_scales(stage: Stage) -> None:
    stage.sites[UP].input = InputQuantization(0.5, 0.0)


def nan_weight(stage: Stage) -> None:
    stage.live.get_parameter("attn.proj.weight")[1, 2] = math.nan


def infinite_buffer(stage: Stage) -> None:
    stage.live.get_buffer("position")[0, 0] = -math.inf


def wrong_kept_bound(stage: Stage) -> None:
    seen = stage.observations["norm1"]
    seen.kept = torch.cat([seen.kept, seen.kept])
    seen.kept_modality = torch.cat([seen.kept_modality, seen.kept_modality])


def kept_of_a_modality_that_was_not_seen(stage: Stage) -> None:
    del stage.observations["norm1"].ranges["image"]


def kept_rows_not_rescaled(stage: Stage) -> None:
    stage.observations["norm1"].kept *= 2


def unknown_modality(stage: Stage) -> None:
    stage.observations["norm1"].ranges["sound"] = stage.observations["norm1"].ranges["text"]


def observation_of_no_node(stage: Stage) -> None:
    stage.observations["norm9"] = stage.observations["norm1"]


FAULTS: list[tuple[Callable[[Stage], None], str]] = [
    (reads_a_later_node, "%norm1 reads %norm2 before it is defined"),
    (reads_another_graph, "%add_1 reads %add, which is a node of another graph"),
    (observer_is_read, "%observe_2 is an observer but is read by %add_2"),
    (two_nodes_of_one_name, "2 nodes are called %add"),
    (no_output, "the graph does not end in exactly one output"),
    (operation_after_output, "the graph does not end in exactly one output"),
    (lambda stage: setattr(stage.node("add_1"), "op", "jump"), "%add_1 has the unusable operation jump"),
    (calls_what_is_not_there, "%norm2 calls visual.blocks.0.norm3, which the module does not have"),
    (reads_a_missing_constant, "%constant_0 reads constant_0, which the module does not have"),
    (linear_without_a_site, f"%mlp_down calls the Linear {DOWN}, which is no site"),
    (lambda stage: stage.outputs.pop(), "2 outputs are kept of 3 calls"),
    (nan_weight, "attn.proj.weight has NaN or infinite values"),
    (infinite_buffer, "position has NaN or infinite values"),
    (site_under_a_wrong_key, f"site {DOWN} is listed as elsewhere"),
    (two_sites_of_one_name, f"2 sites have the name {DOWN}"),
    (two_sites_of_one_target, "2 sites have the target mlp.down"),
    (site_is_not_called, f"site {DOWN} is not called by the graph"),
    (wrong_source, f"site {QKV} reads %norm1 in the graph, but its source is %norm2"),
    (source_is_no_node, f"sites {QKV} read %norm9, which is no node"),
    (wrong_shape, f"site {QKV} is [8, 4], but its weight is [12, 4]"),
    (wrong_shape, f"site {QKV} is [8, 4], but %attn_qkv has the shape [2, 12]"),
    (wrong_node_shape, f"site {QKV} is [12, 4], but %norm1 has the shape [2, 5]"),
    (lowered_without_a_weight, f"site {DOWN} is lowered to Identity without a scheme and a quantized weight"),
    (lowered_without_an_input_scale, f"site {QKV} is lowered as W8A8 without an input scale"),
    (float_with_parameters, f"site {QKV} is FLOAT but has quantization parameters"),
    (mixed_group, f"the group that reads %norm2 has several schemes: {GATE} W8A8, {UP} W8A8_DYNAMIC"),
    (group_with_two_scales, f"the group that reads %norm2 has several input quantizations: {GATE}, {UP}"),
    (lambda stage: set_input(stage, scale=0.0), f"site {QKV} has the input scale 0.0"),
    (lambda stage: set_input(stage, scale=math.nan), f"site {QKV} has the input scale nan"),
    (lambda stage: set_input(stage, scale=math.inf), f"site {QKV} has the input scale inf"),
    (lambda stage: set_input(stage, offset=128.0), f"site {QKV} has the input offset 128.0"),
    (lambda stage: set_input(stage, offset=-0.5), f"site {QKV} has the input offset -0.5"),
    (lambda stage: set_input(stage, offset=math.nan), f"site {QKV} has the input offset nan"),
    (
        lambda stage: set_weight(stage, integers=weight_of(stage, QKV).integers.T),
        f"site {QKV} has integers torch.int8 [4, 12]: int8 [12, 4] is wanted",
    ),
    (
        lambda stage: set_weight(stage, integers=weight_of(stage, QKV).integers.short()),
        f"site {QKV} has integers torch.int16 [12, 4]: int8 [12, 4] is wanted",
    ),
    (
        lambda stage: set_weight(stage, integers=first(weight_of(stage, QKV).integers, -128)),
        f"site {QKV} has the integer -128",
    ),
    (
        lambda stage: set_weight(stage, scale=weight_of(stage, QKV).scale[:, 0]),
        f"site {QKV} has scales torch.float32 [12]: float32 [12, 1] is wanted",
    ),
    (
        lambda stage: set_weight(stage, scale=weight_of(stage, QKV).scale.half()),
        f"site {QKV} has scales torch.float16 [12, 1]: float32 [12, 1] is wanted",
    ),
    *(
        (
            lambda stage, wrong=wrong: set_weight(stage, scale=first(weight_of(stage, QKV).scale, wrong)),
            f"site {QKV} has weight scales that are not positive and finite",
        )
        for wrong in (0.0, -1.0, math.inf, math.nan)
    ),
    *(
        (
            lambda stage, wrong=wrong: set_groups(
                stage, integers=first(weight_of(stage, QKV).integers.clamp(-8, 7), wrong)
            ),
            f"site {QKV} has integers beyond 4 bits: -8 to 7 are wanted",
        )
        for wrong in (8, -9)
    ),
    (lambda stage: set_groups(stage, group_scale=None), f"site {QKV} has group scales or a group size, but not both"),
    (lambda stage: set_groups(stage, size=None), f"site {QKV} has group scales or a group size, but not both"),
    (
        lambda stage: set_groups(stage, group_scale=torch.ones(12, 4)),
        f"site {QKV} has group scales torch.float32 [12, 4]: float32 [12, 2] is wanted",
    ),
    (
        lambda stage: set_groups(stage, group_scale=torch.ones(12, 2).half()),
        f"site {QKV} has group scales torch.float16 [12, 2]: float32 [12, 2] is wanted",
    ),
    (
        lambda stage: set_groups(stage, size=3, group_scale=torch.ones(12, 1)),
        f"site {QKV} has 4 inputs, which groups of 3 do not divide",
    ),
    (
        lambda stage: set_groups(stage, size=0),
        f"site {QKV} has 4 inputs, which groups of 0 do not divide",
    ),
    *(
        (
            lambda stage, wrong=wrong: set_groups(stage, group_scale=first(torch.ones(12, 2), wrong)),
            f"site {QKV} has group scales that are not positive and finite",
        )
        for wrong in (0.0, -1.0, math.inf, math.nan)
    ),
    (lambda stage: set_edge(stage, producer="norm3"), "edge from visual.blocks.0.norm3: the graph does not call it"),
    (
        lambda stage: set_edge(stage, usable=torch.ones(3, dtype=torch.bool)),
        "edge from visual.blocks.0.norm1: usable is torch.bool [3], bool [4] is wanted",
    ),
    (
        lambda stage: set_edge(stage, usable=torch.ones(4)),
        "edge from visual.blocks.0.norm1: usable is torch.float32 [4], bool [4] is wanted",
    ),
    (lambda stage: set_edge(stage, consumers={}), "edge from visual.blocks.0.norm1: it has no consumer"),
    (
        lambda stage: set_edge(stage, consumers={"norm2": torch.arange(4)}),
        "edge from visual.blocks.0.norm1 to visual.blocks.0.norm2: the consumer is no site",
    ),
    (
        lambda stage: set_edge(stage, consumers={"attn.qkv": torch.arange(3)}),
        f"edge from visual.blocks.0.norm1 to {QKV}: the map is torch.int64 [3], int64 [4] is wanted",
    ),
    (
        lambda stage: set_edge(stage, consumers={"attn.qkv": torch.arange(0)}),
        f"edge from visual.blocks.0.norm1 to {QKV}: the map is torch.int64 [0], int64 [4] is wanted",
    ),
    (
        lambda stage: set_edge(stage, consumers={"attn.qkv": torch.arange(4).int()}),
        f"edge from visual.blocks.0.norm1 to {QKV}: the map is torch.int32 [4], int64 [4] is wanted",
    ),
    *(
        (
            lambda stage, wrong=wrong: set_edge(stage, consumers={"attn.qkv": first(torch.arange(4), wrong)}),
            f"edge from visual.blocks.0.norm1 to {QKV}: columns refer to channels outside -1 to 3",
        )
        for wrong in (4, -2)
    ),
    (
        lambda stage: set_edge(stage, usable=torch.tensor([True, True, False, True])),
        f"edge from visual.blocks.0.norm1 to {QKV}: columns refer to channels that are not usable",
    ),
    (observation_of_no_node, "observation of %norm9: there is no such node"),
    (
        lambda stage: setattr(stage.observations["norm1"], "channels", 5),
        "observation of %norm1: it counts 5 channels, but the node has the shape [2, 4]",
    ),
    (
        lambda stage: setattr(stage.observations["norm1"], "kept", torch.zeros(3, 4).double()),
        "observation of %norm1: kept rows are torch.float64 [3, 4], float32 [T, 4] is wanted",
    ),
    (
        lambda stage: setattr(stage.observations["norm1"], "kept_modality", torch.zeros(2, dtype=torch.int8)),
        "observation of %norm1: 3 rows are kept, but 2 modalities",
    ),
    (wrong_kept_bound, "observation of %norm1, text: 4 rows are kept of 2"),
    (kept_of_a_modality_that_was_not_seen, "observation of %norm1, image: 1 rows are kept of 0"),
    (kept_rows_not_rescaled, "observation of %norm1, text: kept rows lie outside its range"),
    (unknown_modality, "observation of %norm1, sound: it is none of text, image"),
    (lambda stage: set_range(stage, rows=0), "observation of %norm1, text: it counts 0 rows"),
    (lambda stage: set_range(stage, minimum=torch.ones(4) * 2), "text: the minimum is above the maximum"),
    (
        lambda stage: set_range(stage, maximum=torch.tensor([1.0, math.inf, 1.0, 1.0])),
        "observation of %norm1, text: maximum has NaN or infinite values",
    ),
    (
        lambda stage: set_range(stage, sum=torch.full((4,), math.nan).double()),
        "observation of %norm1, text: sum has NaN or infinite values",
    ),
    (
        lambda stage: set_range(stage, sum=torch.zeros(4)),
        "observation of %norm1, text: sum is torch.float32 [4], torch.float64 [4] is wanted",
    ),
    (
        lambda stage: set_range(stage, minimum=-torch.ones(5)),
        "observation of %norm1, text: minimum is torch.float32 [5], torch.float32 [4] is wanted",
    ),
    (
        lambda stage: set_range(stage, sum_of_squares=-torch.ones(4).double()),
        "observation of %norm1, text: the sum of squares is negative",
    ),
]


@pytest.mark.parametrize(("damage", "message"), FAULTS, ids=[message.split(":")[-1][:60] for _, message in FAULTS])
def test_each_invariant_is_noticed(damage: Callable[[Stage], None], message: str) -> None:
    """Damage that goes unnoticed here would reach a checkpoint; a message without a name does not help to find it."""
    stage = decided()
    damage(stage)
    found = check(stage)
    assert any(message in fault for fault in found), found
    assert all(fault.startswith("visual.blocks.0: ") for fault in found)


def test_all_faults_at_once() -> None:
    """One fault that hides the others costs a run per fault."""
    stage = decided()
    for damage in (nan_weight, mixed_group, wrong_kept_bound, observer_is_read):
        damage(stage)
    found = "\n".join(check(stage))
    for message in ("attn.proj.weight has NaN", "several schemes", "4 rows are kept of 2", "is an observer"):
        assert message in found


def test_parsed_stages_are_checked_as_far_as_text_goes() -> None:
    """A dump edited by hand into a mixed group must not pass because it has no weights."""
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
    stage.sites[QKV].scheme, stage.sites[QKV].input = Scheme.W4A8_DYNAMIC, None
    assert check(stage) == [] and check(parse_stage(print_stage(stage))) == []
