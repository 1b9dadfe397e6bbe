"""A stage as text: deterministic, one line per operation, made to be compared line by line and to be parsed back.

    stage "visual.blocks.0" part=vision dtype=bfloat16 {
      %hidden_states = input("hidden_states") : float32[32, 128]
      %norm1 = module("visual.blocks.0.norm1")(%hidden_states) : float32[32, 128]
      %reshape = torch.Tensor.reshape(%norm1, 32, 4, -1) : float32[32, 4, 32]
      return (%reshape,)
    }
    tensors {
      "visual.blocks.0.norm1.weight" float32[128] absmax=1.25 digest=1a2b3c4d
    }

The right side of an operation is a Python expression once `%` is taken away. Tensors appear as a summary with a digest,
so that a pass that only changes weights shows. Names are checkpoint names. There are no addresses, times or dates.
Sections `tensors`, `sites`, `edges` and `observations` follow in this order; those that have nothing to say are absent.
"""

import keyword
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from vlqc.ir.stage import (
    MODALITIES,
    WEIGHT_PARTS,
    Edge,
    EdgeSummary,
    MapSummary,
    Observation,
    ObservationSummary,
    Site,
    Stage,
    TensorSummary,
    digest,
    fingerprint,
    summarize,
)
from vlqc.ir.syntax import function_name, literal, quote
from vlqc.ir.tensor_cache import TensorCache

_FINGERPRINT = TensorCache(fingerprint)  # observations stay what they are over many passes
CALLEES = {"placeholder": "input", "get_attr": "constant", "call_method": "method"}  # fx's words and ours


def print_stage(stage: Stage, *, tensors: bool = True) -> str:
    """The text of a stage. tensors=False leaves out the section of its weights (the rest of the text reads none)."""
    dtype = str(stage.dtype).removeprefix("torch.")
    lines = [f"stage {quote(stage.name)} part={stage.part} dtype={dtype} {{"]
    lines += [f"  {print_node(stage, node)}" for node in stage.graph.nodes]
    lines.append("}")
    if tensors:
        lines += _section("tensors", [f"{quote(name)} {_print_summary(it)}" for name, it in _tensors(stage)])
    lines += _section("sites", [_print_site(stage, site) for site in stage.sites.values()])
    edges = stage.summaries.edges if stage.edges is None else [_summarize_edge(stage, edge) for edge in stage.edges]
    if edges is not None:  # "none were found" differs from "nobody looked"
        lines += ["edges {", *(f"  {_print_edge(edge)}" for edge in edges), "}"]
    observations = {name: _summarize_observation(seen) for name, seen in stage.observations.items()}
    observed = observations or stage.summaries.observations
    lines += _section("observations", [_print_observation(name, seen) for name, seen in observed.items()])
    return "\n".join(lines) + "\n"


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"{title} {{", *(f"  {line}" for line in lines), "}"] if lines else []


# ---- operations ------------------------------------------------------------------------------------------------------


def print_node(stage: Stage, node: fx.Node) -> str:
    """One operation, as the text of its stage has it."""
    if node.op == "output":
        return f"return {literal(node.args[0])}"
    line = f"%{node.name} = {_print_callee(stage, node)}"
    if node.op in ("call_module", "call_function", "call_method"):
        line += f"({_print_arguments(node)})"
    if "shape" in node.meta:
        line += f" : {_print_type(node.meta['dtype'], node.meta['shape'])}"
    summary = node.meta.get("summary")
    if isinstance(constant := node.meta.get("constant"), Tensor) and constant.device.type != "meta":
        summary = summarize(constant)
    return line + (f" absmax={summary.absmax!r} digest={summary.digest}" if summary else "")


def _print_callee(stage: Stage, node: fx.Node) -> str:
    if node.op == "call_function":
        return function_name(node.target)
    if node.op == "call_module":
        return f"module({quote(stage.checkpoint_name(str(node.target)))})"
    return f"{CALLEES[node.op]}({quote(str(node.target))})"


def _print_arguments(node: fx.Node) -> str:
    plain = {name: value for name, value in node.kwargs.items() if not keyword.iskeyword(name)}
    printed = [literal(value) for value in node.args] + [f"{name}={literal(value)}" for name, value in plain.items()]
    if special := {name: value for name, value in node.kwargs.items() if name not in plain}:
        printed.append(f"**{literal(special)}")  # arguments named like a Python keyword, such as `from`
    return ", ".join(printed)


def _print_type(dtype: torch.dtype | str, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"


# ---- tensors and facts -----------------------------------------------------------------------------------------------


def _tensors(stage: Stage) -> Iterator[tuple[str, TensorSummary]]:
    if stage.module is None:
        yield from stage.tensors.items()
        return
    for path, tensor in (*stage.module.named_parameters(), *stage.module.named_buffers()):
        yield stage.checkpoint_name(path), summarize(tensor)


def _print_summary(summary: TensorSummary) -> str:
    return f"{_print_type(summary.dtype, summary.shape)} absmax={summary.absmax!r} digest={summary.digest}"


def _print_site(stage: Stage, site: Site) -> str:
    line = f"{quote(site.name)} [{site.shape[0]}, {site.shape[1]}] from %{site.source}"
    if site.scheme is not None:
        line += f" scheme={site.scheme}"
    if site.group_size is not None:
        line += f" group_size={site.group_size}"
    if site.added_bias:
        line += " added_bias"
    if site.reason:
        line += f" reason={quote(site.reason)}"
    if site.input is not None:
        line += f" input(scale={float(site.input.scale)!r}, offset={float(site.input.offset)!r})"
    weight = stage.summaries.weights.get(site.name, [])
    if site.weight is not None:
        weight = [summarize(tensor) for tensor in site.weight.tensors()]
    for word, summary in zip(WEIGHT_PARTS, weight, strict=False):
        line += f" {word}({_print_summary(summary)})"
    return line


def _summarize_edge(stage: Stage, edge: Edge) -> EdgeSummary:
    usable = MapSummary(int(edge.usable.sum()), edge.usable.numel(), digest(edge.usable))
    consumers = {
        stage.checkpoint_name(target): MapSummary(int((columns >= 0).sum()), columns.numel(), digest(columns))
        for target, columns in edge.consumers.items()
    }
    return EdgeSummary(stage.checkpoint_name(edge.producer), usable, consumers)


def _print_edge(edge: EdgeSummary) -> str:
    consumers = [f"{quote(target)} {_print_map(it)}" for target, it in edge.consumers.items()]
    return f"{quote(edge.producer)} {_print_map(edge.usable)} -> {', '.join(consumers)}"


def _print_map(summary: MapSummary) -> str:
    return f"{summary.used} of {summary.total} digest={summary.digest}"


def _summarize_observation(seen: Observation) -> ObservationSummary:
    ranges = [(name, seen.ranges[name]) for name in MODALITIES if name in seen.ranges]
    rows = {name: it.rows for name, it in ranges}
    statistics = [part for _, it in ranges for part in (it.minimum, it.maximum, it.sum, it.sum_of_squares)]
    low = min((float(it.minimum.min()) for _, it in ranges), default=None)
    high = max((float(it.maximum.max()) for _, it in ranges), default=None)
    marked = digest(*statistics, seen.kept, seen.kept_modality, seen.energy(), known=_FINGERPRINT)
    return ObservationSummary(seen.channels, rows, low, high, seen.kept.shape[0], marked)


def _print_observation(name: str, seen: ObservationSummary) -> str:
    words = [f"%{name} channels={seen.channels}"]
    words += [f"{modality}={rows}" for modality, rows in seen.rows.items()]
    if seen.minimum is not None and seen.maximum is not None:
        words.append(f"min={seen.minimum!r} max={seen.maximum!r}")
    return " ".join([*words, f"kept={seen.kept} digest={seen.digest}"])
