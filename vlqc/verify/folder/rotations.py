"""The rotations that a folder says its weights have, from vlqc_report.json."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlqc.frontend.model_structure import ModelStructure
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.rotations import AppliedRotation, Rotatable, RotationKind, RotationPlan
from vlqc.verify.findings import COPY_AGAIN, VerificationResult, format_list
from vlqc.verify.folder.manifest import SUMMARY
from vlqc.verify.folder.reader import read_json_object

CHECK = "rotations"
LONGEST = 100  # characters of a name in a message
Key = tuple[RotationKind, str]  # kind and name of what can be rotated
Seeds = dict[Key, int]  # of what is rotated
Rotated = dict[Key, int | None]  # of everything that can be rotated: the seed, or None where it is not


def key_of(part: Rotatable) -> Key:
    return part.kind, part.name


def layers_of(part: Rotatable) -> set[str]:
    """All layers and norms that a rotation of it changes."""
    return {*part.writers, *part.readers, *part.norms}


@dataclass(frozen=True)
class StatedRotation:
    """An entry of vlqc_report.json: rotations of `size` channels with one seed, and the names of what is rotated."""

    kind: RotationKind
    seed: int
    size: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind} of {format_list(self.names, 2)}, size {self.size}, seed {self.seed}"


def read_rotations(folder: Path) -> tuple[list[StatedRotation], list[str]]:
    """The entries of vlqc_report.json, and what is wrong with others. No entries without the file or its list."""
    if not (folder / SUMMARY).is_file():
        return [], []
    content, _ = read_json_object(folder / SUMMARY)  # `verify` has another check for files that cannot be read
    entries = (content or {}).get("rotations", [])
    if not isinstance(entries, list):
        return [], ["`rotations` is not a list"]
    read = [_entry(entry) for entry in entries]
    invalid = [f"entry {number} of `rotations` is invalid" for number, entry in enumerate(read) if not entry]
    return [entry for entry in read if entry], invalid


def _entry(entry: Any) -> StatedRotation | None:
    if not isinstance(entry, Mapping) or entry.keys() != {"kind", "seed", "size", "names"}:
        return None
    kind, seed, size, names = (entry[key] for key in ("kind", "seed", "size", "names"))
    if kind not in tuple(RotationKind) or any(type(number) is not int or number < 0 for number in (seed, size)):
        return None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return None
    return StatedRotation(RotationKind(kind), seed, size, tuple(names))


def stated_rotations(folder: Path, model: ModelStructure, result: VerificationResult) -> Seeds:
    """What vlqc_report.json says is rotated, with a fault for every entry that does not fit the model."""
    entries, errors = read_rotations(folder)
    known = {key_of(part): part for part in model.rotatable if not part.obstacle}
    seeds: Seeds = {}
    for entry in entries:
        result.add_examined(CHECK, len(entry.names))
        for key in ((entry.kind, name) for name in entry.names):
            if key not in known:
                name = key[1] if len(key[1]) <= LONGEST else f"{key[1][:LONGEST]}..."
                errors.append(f"the model has no {entry.kind} of {name!r} that can be rotated")
            elif known[key].size != entry.size:
                errors.append(f"the {entry.kind} of {key[1]} has size {entry.size} instead of {known[key].size}")
            elif key in seeds:
                errors.append(f"the {entry.kind} of {key[1]} is listed twice")
            else:
                seeds[key] = entry.seed
    for error in errors:
        why = "the same rotations cannot be made of the float checkpoint"
        result.add_fault(CHECK, SUMMARY, error, why, COPY_AGAIN)
    if entries:
        result.facts[CHECK] = [str(entry) for entry in entries]
    return seeds


def applied(model: ModelStructure, seeds: Seeds) -> tuple[AppliedRotation, ...]:
    """These rotations of a whole model, in the order of the model."""
    return tuple(
        AppliedRotation.of_model(part, seeds[key_of(part)]) for part in model.rotatable if key_of(part) in seeds
    )


def rotate_float_model(model: StreamedModel, structure: ModelStructure, seeds: Seeds) -> None:
    """Rotates a float model as a folder is, so that the outputs of their stages are equal.

    structure: of the folder. If the folder's output head has a weight of its own, the float model's then has it too.
    """
    untied_head = structure.output_head if model.tied and not structure.tied else ""
    if seeds or untied_head:
        model.rotate(RotationPlan(applied(structure, seeds), untied_head=untied_head), stages=True)


def describe_parts(kind: RotationKind, names: Iterable[str]) -> str:
    return f"{kind} of {format_list(names, 2)}"
