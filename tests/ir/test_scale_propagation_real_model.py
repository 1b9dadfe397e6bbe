"""Edges of the real model: against the list of tools/demo/plant_outliers.py, and by folding each of them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tests.support import tiny
from tests.support.folded_edges import assert_holds
from tools.demo import plant_outliers
from vlqc.frontend.tracing import trace
from vlqc.ir.execution import Call
from vlqc.ir.scale_propagation import find_edges


def known_edges() -> dict[str, dict[str, dict[int, int]]]:
    """Producer -> consumer -> column -> row of the producer, from the names that the outlier planter lists."""
    return {
        edge.producer[0].removesuffix(".weight"): {
            consumer.removesuffix(".weight"): {
                column: edge.first_row + channel for channel, columns in enumerate(edge.columns) for column in columns
            }
            for consumer in edge.consumers
        }
        for edge in plant_outliers.edges_of(tiny.config())
    }


@pytest.mark.every_transformers
def test_edges_of_the_real_model_are_the_known_ones() -> None:
    """Catches an edge that is missed, invented or mapped wrongly: grouped queries, fused qkv, 2x2 patches included."""
    edges_by_name = {}
    for stage in tiny.recorded_stages().values():
        for edge in find_edges(stage.module, trace(stage.module, stage.call, stage.name)):
            edges_by_name[f"{stage.name}.{edge.producer}"] = {
                f"{stage.name}.{target}": {
                    column: channel for column, channel in enumerate(channels.tolist()) if channel >= 0
                }
                for target, channels in edge.consumers.items()
            }
    known = known_edges()
    assert len(known) == 4 * 4 + 1 + 4 * 4
    assert edges_by_name == known


@pytest.mark.every_transformers
def test_usable_channels_are_those_that_are_consumed() -> None:
    """Catches a fold into the q and k thirds of a fused qkv, or into channels that nothing makes up for."""
    for stage in tiny.recorded_stages().values():
        for edge in find_edges(stage.module, trace(stage.module, stage.call, stage.name)):
            used = torch.zeros_like(edge.usable)
            for channels in edge.consumers.values():
                used[channels[channels >= 0]] = True
            assert torch.equal(used, edge.usable)
    qkv = next(e for e in find_edges(*module_and_graph("visual.blocks.0")) if e.producer == "attn.qkv")
    assert qkv.usable.tolist() == [False] * 256 + [True] * 128


def module_and_graph(name: str) -> tuple[nn.Module, Any]:
    stage = tiny.recorded_stages()[name]
    return stage.module, trace(stage.module, stage.call, name)


@pytest.mark.every_transformers
@pytest.mark.parametrize("name", ["visual.blocks.0", "visual.blocks.1", "visual.merger", "model.layers.0"])
def test_every_edge_of_the_real_model_holds(name: str) -> None:
    """Catches a column-to-channel map that is off by anything: float64 outputs must not move."""
    stage = tiny.recorded_stages()[name]
    module = copy.deepcopy(stage.module).double()
    args, kwargs = tree_map(
        lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf,
        (stage.call.args, stage.call.kwargs),
    )
    call = Call(0, args, kwargs)
    edges = find_edges(module, trace(module, call, name))
    assert len(edges) == (1 if "merger" in name else 4)
    for number, edge in enumerate(edges):
        assert_holds(module, edge, call, seed=number)
