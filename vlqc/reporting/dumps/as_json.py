"""A stage as JSON: what its text says, for programs. It is made from the text, so both say the same."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import fx

from vlqc.ir.parser import parse_stage
from vlqc.ir.printer import CALLEES, print_stage
from vlqc.ir.snapshot import WEIGHT_PARTS, StageSnapshot
from vlqc.ir.stage import Site, Stage
from vlqc.ir.syntax import function_name, literal
from vlqc.reporting.dumps.files import State, with_suffix


def write_json(stage: Stage, path: Path, state: State) -> None:
    described = describe(parse_stage(print_stage(stage)))
    with_suffix(path, ".json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def describe(stage: StageSnapshot) -> dict[str, Any]:
    """A stage that was parsed from text -> plain data; numbers, lists and names are those of the text.

    nodes: name, operation, what it calls, arguments in the text's notation, shape and dtype; tensors, sites, edges,
    observations: by name. Numbers that JSON lacks (inf, nan) are words.
    """
    described = {
        "stage": stage.name,
        "part": stage.part,
        "dtype": str(stage.dtype).removeprefix("torch."),
        "nodes": [_node(node) for node in stage.graph.nodes],
        "tensors": {name: asdict(summary) for name, summary in stage.tensors.items()},
        "sites": {name: _site(stage, site) for name, site in stage.sites.items()},
        "edges": None if stage.edges is None else [asdict(edge) for edge in stage.edges],
        "observations": {name: asdict(seen) for name, seen in stage.observations.items()},
    }
    plain: dict[str, Any] = _finite(described)
    return plain


def _node(node: fx.Node) -> dict[str, Any]:
    called = function_name(node.target) if node.op == "call_function" else str(node.target)
    words = {"placeholder": "input", "get_attr": "constant", "call_module": "module", "call_function": "function"}
    found: dict[str, Any] = {
        "name": node.name,
        "operation": words.get(node.op) or CALLEES.get(node.op, node.op),
        "called": called,
        "args": [literal(value) for value in node.args],
        "kwargs": {name: literal(value) for name, value in node.kwargs.items()},
        "reads": [read.name for read in node.all_input_nodes],
    }
    if "shape" in node.meta:
        found |= {"shape": list(node.meta["shape"]), "dtype": str(node.meta["dtype"]).removeprefix("torch.")}
    if "summary" in node.meta:
        found |= {"absmax": node.meta["summary"].absmax, "digest": node.meta["summary"].digest}
    return found


def _site(stage: StageSnapshot, site: Site) -> dict[str, Any]:
    weight = stage.weights.get(site.name)
    return {
        "source": site.source,
        "shape": list(site.shape),
        "scheme": None if site.scheme is None else str(site.scheme),
        "group_size": site.group_size,
        "added_bias": site.added_bias,
        "reason": site.reason,
        "input": None if site.input is None else asdict(site.input),
        "weight": weight and {word: asdict(it) for word, it in zip(WEIGHT_PARTS, weight, strict=False)},
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return repr(value)
    if isinstance(value, dict):
        return {key: _finite(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(held) for held in value]
    return value
