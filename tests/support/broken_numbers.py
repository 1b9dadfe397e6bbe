"""Stages with invalid schemes, weights, edges or observations, and the expected messages."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.broken_graphs import DOWN, GATE, QKV, UP
from vlqc.ir.stage import InputQuantization, Stage, WeightQuantization
from vlqc.targets.schemes import Scheme


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
    site.scheme, site.input, site.group_size, whole = Scheme.W4A8_DYNAMIC, None, size, torch.ones(12, 2)
    known = {"integers": weight_of(stage, QKV).integers.clamp(-8, 7), "group_scale": whole} | parts
    site.weight = replace(weight_of(stage, QKV), **known)  # type: ignore[arg-type]


def set_edge(stage: Stage, number: int = 0, **parts: Any) -> None:
    edges = list(stage.edges or ())
    edges[number] = replace(edges[number], **parts)
    stage.edges = tuple(edges)


def set_range(stage: Stage, **parts: Any) -> None:
    observation = stage.observations["norm1"]
    observation.ranges["text"] = replace(observation.ranges["text"], **parts)


def first(tensor: Tensor, value: Any) -> Tensor:
    """A copy whose first element is `value`."""
    changed = tensor.clone()
    changed.view(-1)[0] = value
    return changed


def lowered_without_a_weight(stage: Stage) -> None:
    stage.module.set_submodule("mlp.down", nn.Identity())


def lowered_without_an_input_scale(stage: Stage) -> None:
    stage.module.set_submodule("attn.qkv", nn.Identity())
    stage.sites[QKV].input = None


def float_with_parameters(stage: Stage) -> None:
    stage.sites[QKV].scheme = Scheme.FLOAT


def mixed_group(stage: Stage) -> None:
    stage.sites[UP].scheme = Scheme.W8A8_DYNAMIC


def group_with_two_scales(stage: Stage) -> None:
    stage.sites[UP].input = InputQuantization(0.5, 0.0)


def nan_weight(stage: Stage) -> None:
    stage.module.get_parameter("attn.proj.weight")[1, 2] = math.nan


def infinite_buffer(stage: Stage) -> None:
    stage.module.get_buffer("position")[0, 0] = -math.inf


def wrong_kept_bound(stage: Stage) -> None:
    observation = stage.observations["norm1"]
    observation.kept = torch.cat([observation.kept, observation.kept])
    observation.kept_modality = torch.cat([observation.kept_modality, observation.kept_modality])


def kept_of_a_modality_that_was_not_seen(stage: Stage) -> None:
    del stage.observations["norm1"].ranges["image"]


def kept_rows_not_rescaled(stage: Stage) -> None:
    stage.observations["norm1"].kept *= 2


def unknown_modality(stage: Stage) -> None:
    stage.observations["norm1"].ranges["sound"] = stage.observations["norm1"].ranges["text"]


def observation_of_no_node(stage: Stage) -> None:
    stage.observations["norm9"] = stage.observations["norm1"]


# What is done to a stage of `decided`, and what must be said.
BROKEN_NUMBERS: list[tuple[Callable[[Stage], None], str]] = [
    (nan_weight, "attn.proj.weight has NaN or infinite values"),
    (infinite_buffer, "position has NaN or infinite values"),
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
        f"site {QKV} has integers torch.int8 [4, 12]: expected int8 [12, 4]",
    ),
    (
        lambda stage: set_weight(stage, integers=weight_of(stage, QKV).integers.short()),
        f"site {QKV} has integers torch.int16 [12, 4]: expected int8 [12, 4]",
    ),
    (
        lambda stage: set_weight(stage, integers=first(weight_of(stage, QKV).integers, -128)),
        f"site {QKV} has integers from -128 to ",
    ),
    (
        lambda stage: set_weight(stage, scale=weight_of(stage, QKV).scale[:, 0]),
        f"site {QKV} has scales torch.float32 [12]: expected float32 [12, 1]",
    ),
    (
        lambda stage: set_weight(stage, scale=weight_of(stage, QKV).scale.half()),
        f"site {QKV} has scales torch.float16 [12, 1]: expected float32 [12, 1]",
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
            "W4A8_DYNAMIC has -8 to 7",
        )
        for wrong in (8, -9)
    ),
    (lambda stage: set_groups(stage, group_scale=None), f"site {QKV} has group scales or a group size, but not both"),
    (lambda stage: set_groups(stage, size=None), f"site {QKV} has group scales or a group size, but not both"),
    (
        lambda stage: set_groups(stage, group_scale=torch.ones(12, 4)),
        f"site {QKV} has group scales torch.float32 [12, 4]: expected float32 [12, 2]",
    ),
    (
        lambda stage: set_groups(stage, group_scale=torch.ones(12, 2).half()),
        f"site {QKV} has group scales torch.float16 [12, 2]: expected float32 [12, 2]",
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
        "edge from visual.blocks.0.norm1: usable is torch.bool [3], expected bool [4]",
    ),
    (
        lambda stage: set_edge(stage, usable=torch.ones(4)),
        "edge from visual.blocks.0.norm1: usable is torch.float32 [4], expected bool [4]",
    ),
    (lambda stage: set_edge(stage, consumers={}), "edge from visual.blocks.0.norm1: it has no consumer"),
    (
        lambda stage: set_edge(stage, consumers={"norm2": torch.arange(4)}),
        "edge from visual.blocks.0.norm1 to visual.blocks.0.norm2: the consumer is not a site",
    ),
    (
        lambda stage: set_edge(stage, consumers={"attn.qkv": torch.arange(3)}),
        f"edge from visual.blocks.0.norm1 to {QKV}: the map is torch.int64 [3], expected int64 [4]",
    ),
    (
        lambda stage: set_edge(stage, consumers={"attn.qkv": torch.arange(0)}),
        f"edge from visual.blocks.0.norm1 to {QKV}: the map is torch.int64 [0], expected int64 [4]",
    ),
    (
        lambda stage: set_edge(stage, consumers={"attn.qkv": torch.arange(4).int()}),
        f"edge from visual.blocks.0.norm1 to {QKV}: the map is torch.int32 [4], expected int64 [4]",
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
    (observation_of_no_node, "observation of %norm9: the node does not exist"),
    (
        lambda stage: setattr(stage.observations["norm1"], "channels", 5),
        "observation of %norm1: it counts 5 channels, but the node has the shape [2, 4]",
    ),
    (
        lambda stage: setattr(stage.observations["norm1"], "kept", torch.zeros(3, 4).double()),
        "observation of %norm1: kept rows are torch.float64 [3, 4], expected float32 [T, 4]",
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
        "observation of %norm1, text: sum is torch.float32 [4], expected torch.float64 [4]",
    ),
    (
        lambda stage: set_range(stage, minimum=-torch.ones(5)),
        "observation of %norm1, text: minimum is torch.float32 [5], expected torch.float32 [4]",
    ),
    (
        lambda stage: set_range(stage, sum_of_squares=-torch.ones(4).double()),
        "observation of %norm1, text: the sum of squares is negative",
    ),
]
