"""Stages with an invalid graph or invalid sites, and the expected messages."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

from tests.support.small_stage import traced
from vlqc.ir.stage import Stage

QKV, GATE, UP, DOWN = (f"visual.blocks.0.{name}" for name in ("attn.qkv", "mlp.gate", "mlp.up", "mlp.down"))


def call_of(stage: Stage, target: str) -> fx.Node:
    found: fx.Node = next(node for node in stage.graph.nodes if node.target == target)
    return found


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


# What is done to a stage of `decided`, and what must be said.
BROKEN_GRAPHS: list[tuple[Callable[[Stage], None], str]] = [
    (reads_a_later_node, "%norm1 reads %norm2 before it is defined"),
    (reads_another_graph, "%add_1 reads %add, which is a node of another graph"),
    (observer_is_read, "%observe_2 is an observer but is read by %add_2"),
    (two_nodes_of_one_name, "2 nodes are called %add"),
    (no_output, "the graph does not end in exactly one output"),
    (operation_after_output, "the graph does not end in exactly one output"),
    (lambda stage: setattr(stage.node("add_1"), "op", "jump"), "%add_1 has the unusable operation jump"),
    (calls_what_is_not_there, "%norm2 calls visual.blocks.0.norm3, which the module does not have"),
    (reads_a_missing_constant, "%constant_0 reads constant_0, which the module does not have"),
    (linear_without_a_site, f"%mlp_down calls the Linear {DOWN}, which is not a site"),
    (lambda stage: stage.execution.outputs.pop(), "2 outputs are kept of 3 calls"),
    (site_under_a_wrong_key, f"site {DOWN} is listed as elsewhere"),
    (two_sites_of_one_name, f"2 sites have the name {DOWN}"),
    (two_sites_of_one_target, "2 sites have the target mlp.down"),
    (site_is_not_called, f"site {DOWN} is not called by the graph"),
    (wrong_source, f"site {QKV} reads %norm1 in the graph, but its source is %norm2"),
    (source_is_no_node, f"sites {QKV} read %norm9, which does not exist"),
    (wrong_shape, f"site {QKV} is [8, 4], but its weight is [12, 4]"),
    (wrong_shape, f"site {QKV} is [8, 4], but %attn_qkv has the shape [2, 12]"),
    (wrong_node_shape, f"site {QKV} is [12, 4], but %norm1 has the shape [2, 5]"),
]
