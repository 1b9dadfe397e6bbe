"""Rotations in words: for the summary of a compilation, `--plan`, `vlqc inspect` and the report."""

from collections.abc import Iterable
from dataclasses import dataclass

from vlqc.families.family import ModelFamily, Part, part_title
from vlqc.formatting import pluralize
from vlqc.ir.rotations import RotationGroup, RotationKind, RotationPlan
from vlqc.pipeline.pass_api import Pass

LORA = (
    "LoRA adapters of the float model fit neither rotated nor smoothed weights: merge them with --lora, or compile "
    "with --rotate none --anti_method none"
)
HIDDEN_STATES = (
    "draft models for speculative decoding, multi-token prediction layers, prompt embeddings and pooling layers made "
    "for the float model need --rotate heads"
)


@dataclass(frozen=True)
class RotatedPart:
    """Rotations of one kind, size and seed in one part of the model.

    part: a `Part`; others: see `RotationGroup`.
    """

    part: str
    kind: str
    size: int
    seed: int
    names: tuple[str, ...]


def rotated_parts(rotations: Iterable[RotationGroup], family: ModelFamily | None) -> list[RotatedPart]:
    """family: of the model, None if it is unknown. In the order of the forward."""
    parts: dict[tuple[Part, str, int, int], list[str]] = {}
    for entry in rotations:
        for name in entry.names:
            part = family.part(name) if family else Part.OTHER
            parts.setdefault((part, entry.kind, entry.size, entry.seed), []).append(name)
    order = list(Part)
    return [
        RotatedPart(str(part), kind, size, seed, tuple(names))
        for (part, kind, size, seed), names in sorted(parts.items(), key=lambda item: order.index(item[0][0]))
    ]


def rotation_text(parts: Iterable[RotatedPart]) -> str:
    """Such as "residual streams: vision tower, language model; attention heads of 60 layers"; "none" without any."""
    counts: dict[str, int] = {}
    streams: list[str] = []
    for each in parts:
        counts[each.kind] = counts.get(each.kind, 0) + len(each.names)
        if each.kind == RotationKind.RESIDUAL:
            streams += each.names if each.part == Part.OTHER else [part_title(each.part).lower()]
    texts = [
        f"{kind}{'s' * (count > 1)}: {', '.join(dict.fromkeys(streams))}"
        if kind == RotationKind.RESIDUAL
        else f"{kind} of {pluralize(count, 'layer')}"
        for kind, count in counts.items()
    ]
    return "; ".join(texts) or "none"


def adapter_notes(passes: Iterable[Pass], plan: RotationPlan) -> list[str]:
    """That adapters do not fit the result, where no note on rotations says so."""
    return [f"weights are smoothed: {LORA}"] if not plan and any(step.changes_inputs for step in passes) else []


def rotation_notes(plan: RotationPlan, family: ModelFamily) -> list[str]:
    """What the rotations break and how to avoid it, in one note; then a note for each stream that is not rotated."""
    notes = []
    if any(family.output_head in rotation.readers for rotation in plan.rotations):
        notes.append(f"the hidden states of the language model are rotated: {HIDDEN_STATES}. {LORA}")
    elif plan:
        notes.append(f"weights are rotated: {LORA}")
    if count := len(plan.unbalanced_heads):
        notes.append(
            f"the attention heads of {pluralize(count, 'layer')} are not rotated: values of some channels are large "
            "where the weights that read them are small; smoothing balances them"
        )
    return notes + [
        f"the residual stream {_of_part(name, family)} is not rotated: {why}" for name, why in plan.obstacles.items()
    ]


def _of_part(name: str, family: ModelFamily) -> str:
    """name: of the layer that writes a residual stream first."""
    part = family.part(name)
    return f"that {name} writes" if part == Part.OTHER else f"of the {part_title(part).lower()}"
