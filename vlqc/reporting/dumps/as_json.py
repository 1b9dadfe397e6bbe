"""The text of a stage as JSON, for programs. It is made from the parsed text, so that both have the same content."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import fx

from vlqc.ir.parser import parse_stage
from vlqc.ir.printer import CALLEES, print_stage
from vlqc.ir.rotations import AppliedRotation
from vlqc.ir.snapshot import WEIGHT_PARTS, StageSnapshot
from vlqc.ir.stage import CacheSite, Site, Stage
from vlqc.ir.syntax import function_name, literal
from vlqc.reporting.dumps.writer import DumpContext, add_suffix

OPERATIONS = {"placeholder": "input", "get_attr": "constant", "call_module": "module", "call_function": "function"}


def write_json(stage: Stage, path: Path, context: DumpContext) -> None:
    """Writes PATH.json."""
    content = stage_to_dict(parse_stage(print_stage(stage)))
    add_suffix(path, ".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def stage_to_dict(stage: StageSnapshot) -> dict[str, Any]:
    """A stage as JSON-compatible values, with the numbers, lists and names of its text.

    nodes: name, operation, callee, arguments as in the text, shape and dtype. tensors, sites, caches, observations: by
    name. rotations: kind, matrix, what is rotated; columns: layer -> norm or null; rows: layer -> first rows of its
    blocks.
    inf and nan, which JSON does not have, are strings.
    """
    content = {
        "stage": stage.name,
        "part": stage.part,
        "dtype": str(stage.dtype).removeprefix("torch."),
        "nodes": [_node_to_dict(node) for node in stage.graph.nodes],
        "tensors": {name: asdict(summary) for name, summary in stage.tensors.items()},
        "sites": {name: _site_to_dict(stage, site) for name, site in stage.sites.items()},
        "caches": {name: _cache_to_dict(stage, site) for name, site in stage.caches.items()},
        "edges": None if stage.edges is None else [asdict(edge) for edge in stage.edges],
        "rotations": [_rotation_to_dict(rotation) for rotation in stage.rotations],
        "observations": {name: asdict(observation) for name, observation in stage.observations.items()},
    }
    finite: dict[str, Any] = _replace_infinite(content)
    return finite


def _node_to_dict(node: fx.Node) -> dict[str, Any]:
    content: dict[str, Any] = {
        "name": node.name,
        "operation": OPERATIONS.get(node.op) or CALLEES.get(node.op, node.op),
        "called": function_name(node.target) if node.op == "call_function" else str(node.target),
        "args": [literal(value) for value in node.args],
        "kwargs": {name: literal(value) for name, value in node.kwargs.items()},
        "reads": [read.name for read in node.all_input_nodes],
    }
    if "shape" in node.meta:
        content |= {"shape": list(node.meta["shape"]), "dtype": str(node.meta["dtype"]).removeprefix("torch.")}
    if "summary" in node.meta:
        content |= {"absmax": node.meta["summary"].absmax, "digest": node.meta["summary"].digest}
    return content


def _site_to_dict(stage: StageSnapshot, site: Site) -> dict[str, Any]:
    weight = stage.weights.get(site.name)
    return {
        "source": site.source,
        "shape": list(site.shape),
        "scheme": None if site.scheme is None else str(site.scheme),
        "group_size": site.group_size,
        "added_bias": site.added_bias,
        "reason": site.reason,
        "input": None if site.input is None else asdict(site.input),
        "weight": weight and {part: asdict(summary) for part, summary in zip(WEIGHT_PARTS, weight, strict=False)},
    }


def _cache_to_dict(stage: StageSnapshot, site: CacheSite) -> dict[str, Any]:
    summary = stage.cache_summaries[site.name]
    return {
        "keys": site.key,
        "values": site.value,
        "node": site.node,
        "heads": site.heads,
        "head_size": site.head_size,
        "scheme": None if site.scheme is None else str(site.scheme),
        "reason": site.reason,
        "sqnr": site.sqnr,
        "scales": {name: asdict(scale) for name, scale in summary.scales.items()},
        "observation": None if summary.observation is None else asdict(summary.observation),
    }


def _rotation_to_dict(rotation: AppliedRotation) -> dict[str, Any]:
    return {
        "kind": str(rotation.kind),
        **asdict(rotation.rotation),
        "done": rotation.done,
        "inputs": list(rotation.inputs),
        "outputs": list(rotation.outputs),
        "norms": list(rotation.norms),
        "columns": dict(rotation.readers),
        "rows": {layer: starts for layer, starts in rotation.writers.items() if layer not in rotation.tables},
        "tables": list(rotation.tables),
        "absmax": dict(rotation.absmax),
    }


def _replace_infinite(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return repr(value)
    if isinstance(value, dict):
        return {key: _replace_infinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_infinite(item) for item in value]
    return value
