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

The right side of an operation is a Python expression without its `%` signs. Tensors appear as a summary with a digest,
so that a pass that changes only weights changes the text. Names are checkpoint names; addresses and times do not occur.
The sections `tensors`, `sites`, `caches`, `edges`, `rotations` and `observations` follow in this order; empty ones are
left out. A cache is one line for the keys and values of an attention module:

    caches {
      "attn" keys "attn.k" values "attn.v" [2, 32] at %node text=9 key_absmax=9.5 value_absmax=3.0 kept=9 queries=9 ...
    }

with the number and the size of the key-value heads and what was observed; scheme, scales and SQNR follow once they are
chosen. A rotation is one line, followed by one for each input, output, folded norm and layer:

    rotations {
      residual stream "visual.patch_embed.proj" size=128 seed=0 keeps_mean done
        input "hidden_states"
        output 0
        norm "visual.blocks.0.norm1"
        columns "visual.blocks.0.attn.qkv" after "visual.blocks.0.norm1" weight(absmax 1.25 -> 0.75)
        rows "visual.blocks.0.attn.proj" at 0 weight(absmax 1.5 -> 0.875) bias(absmax 2.0 -> 1.5)
    }

The largest magnitudes of its tensors before and after it are there once it is `done`.
"""

import keyword

import torch
from torch import Tensor, fx

from vlqc.ir.rotations import ROTATED_PARTS, AppliedRotation
from vlqc.ir.snapshot import (
    WEIGHT_PARTS,
    CacheSummary,
    EdgeSummary,
    MapSummary,
    ObservationSummary,
    StageSnapshot,
    TensorSummary,
    snapshot,
    summarize,
)
from vlqc.ir.stage import CacheSite, Site, Stage
from vlqc.ir.syntax import function_name, literal, quote

CALLEES = {"placeholder": "input", "get_attr": "constant", "call_method": "method"}  # fx opcode -> keyword of the text


def print_stage(stage: Stage | StageSnapshot, *, tensors: bool = True) -> str:
    """The text of a stage. tensors=False leaves out the section of its parameters and buffers, and reads none."""
    printed = snapshot(stage, tensors=tensors) if isinstance(stage, Stage) else stage
    dtype = str(printed.dtype).removeprefix("torch.")
    lines = [f"stage {quote(printed.name)} part={printed.part} dtype={dtype} {{"]
    lines += [f"  {print_node(printed, node)}" for node in printed.graph.nodes]
    lines.append("}")
    if tensors:
        named = printed.tensors.items()
        lines += _section("tensors", [f"{quote(name)} {_print_summary(summary)}" for name, summary in named])
    lines += _section("sites", [_print_site(printed, site) for site in printed.sites.values()])
    lines += _section("caches", [_print_cache(printed, site) for site in printed.caches.values()])
    if printed.edges is not None:  # an empty section says that no edge exists, a missing one that none was computed
        lines += ["edges {", *(f"  {_print_edge(edge)}" for edge in printed.edges), "}"]
    lines += _section("rotations", [line for rotation in printed.rotations for line in _print_rotation(rotation)])
    observations = printed.observations.items()
    lines += _section("observations", [_print_observation(name, summary) for name, summary in observations])
    return "\n".join(lines) + "\n"


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"{title} {{", *(f"  {line}" for line in lines), "}"] if lines else []


# ---- operations ------------------------------------------------------------------------------------------------------


def print_node(stage: Stage | StageSnapshot, node: fx.Node) -> str:
    """One operation of a stage as it appears in the text."""
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


def _print_callee(stage: Stage | StageSnapshot, node: fx.Node) -> str:
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


# ---- tensors, sites, edges, rotations, observations ------------------------------------------------------------------


def _print_summary(summary: TensorSummary) -> str:
    return f"{_print_type(summary.dtype, summary.shape)} absmax={summary.absmax!r} digest={summary.digest}"


def _print_site(stage: StageSnapshot, site: Site) -> str:
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
    for part, summary in zip(WEIGHT_PARTS, stage.weights.get(site.name, ()), strict=False):
        line += f" {part}({_print_summary(summary)})"
    return line


def _print_cache(stage: StageSnapshot, site: CacheSite) -> str:
    words = [f"{quote(site.name)} keys {quote(site.key)} values {quote(site.value)} [{site.heads}, {site.head_size}]"]
    words.append(f"at %{site.node}")
    if site.scheme is not None:
        words.append(f"scheme={site.scheme}")
    if site.reason:
        words.append(f"reason={quote(site.reason)}")
    if site.sqnr is not None:
        words.append(f"sqnr={float(site.sqnr)!r}")
    summary = stage.cache_summaries.get(site.name, CacheSummary())
    words += [f"{name}({_print_summary(scale)})" for name, scale in summary.scales.items()]
    if (observed := summary.observation) is not None:
        words += [f"{modality}={rows}" for modality, rows in observed.rows.items()]
        words.append(f"key_absmax={observed.key_absmax!r} value_absmax={observed.value_absmax!r}")
        words.append(f"kept={observed.kept} queries={observed.queries} digest={observed.digest}")
    return " ".join(words)


def _print_edge(edge: EdgeSummary) -> str:
    consumers = [f"{quote(target)} {_print_map(columns)}" for target, columns in edge.consumers.items()]
    return f"{quote(edge.producer)} {_print_map(edge.usable)} -> {', '.join(consumers)}"


def _print_map(summary: MapSummary) -> str:
    return f"{summary.used} of {summary.total} digest={summary.digest}"


def _print_rotation(rotation: AppliedRotation) -> list[str]:
    """The lines of one rotation."""
    matrix = rotation.rotation
    flags = " keeps_mean" * matrix.keeps_mean + " done" * rotation.done
    lines = [f"input {quote(name)}" for name in rotation.inputs]
    lines += [f"output {position}" for position in rotation.outputs]
    lines += [f"norm {quote(norm)}" for norm in rotation.norms]
    for layer, norm in rotation.readers.items():
        line = f"columns {quote(layer)}" + ("" if norm is None else f" after {quote(norm)}")
        lines.append(line + _print_absmax(rotation, layer))
    for layer, starts in rotation.writers.items():
        rows = f"rows {quote(layer)} at {', '.join(map(str, starts))}"
        line = f"table {quote(layer)}" if layer in rotation.tables else rows
        lines.append(line + _print_absmax(rotation, layer))
    header = f"{rotation.kind} {quote(matrix.name)} size={matrix.size} seed={matrix.seed}{flags}"
    return [header, *(f"  {line}" for line in lines)]


def _print_absmax(rotation: AppliedRotation, layer: str) -> str:
    pairs = {part: rotation.absmax.get(f"{layer}.{part}") for part in ROTATED_PARTS}
    return "".join(f" {part}(absmax {pair[0]!r} -> {pair[1]!r})" for part, pair in pairs.items() if pair is not None)


def _print_observation(name: str, summary: ObservationSummary) -> str:
    words = [f"%{name} channels={summary.channels}"]
    words += [f"{modality}={rows}" for modality, rows in summary.rows.items()]
    if summary.minimum is not None and summary.maximum is not None:
        words.append(f"min={summary.minimum!r} max={summary.maximum!r}")
    return " ".join([*words, f"kept={summary.kept} digest={summary.digest}"])
