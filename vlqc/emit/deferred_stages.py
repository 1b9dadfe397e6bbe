"""Keeps finished stages on the disk, in every scheme that their groups may get, until the schemes are chosen.

A stage's module is freed before the next stage begins, but the precision search needs the measurements of all stages.
So each stage is stored in one file: the tensors that do not depend on the search, and those of every choice, equal ones
once. Then the chosen ones are read back, stage by stage, in the order in which they would have been written without a
search.
"""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vlqc.emit.shard_writer import ENTRY_BYTES, Damaged, ShardWriter, sync
from vlqc.emit.stage_tensors import TENSORS_PER_LINEAR, EmittedTensor, module_tensors
from vlqc.families.family import Part
from vlqc.files import sha256_of
from vlqc.ir.observation import MODALITIES
from vlqc.ir.stage import Sensitivity, Stage
from vlqc.pipeline.precision_search import Candidate, SearchGroup, SearchResult
from vlqc.targets.caches import TensorScheme, tensor_scheme
from vlqc.targets.schemes import Scheme

TEXT = MODALITIES.index("text")
FOLDER = ".waiting"  # inside the result folder, until it is complete


@dataclass(frozen=True)
class DeferredTensor:
    """One tensor of a stage: name, scheme for the description, and its key in the stage's file, a number.

    group, choice: the number of the group, and the choice for it, with which the tensor is written; both None if it is
    written in any case. Equal tensors of several choices have the same key.
    """

    name: str
    scheme: TensorScheme
    key: int
    group: int | None = None
    choice: Scheme | None = None


@dataclass
class DeferredStages:
    """`store` each stage, choose schemes for the `groups`, then `load` what was chosen, once.

    folder: created by the first `store`, deleted by `remove`. Groups are numbered through all stages.
    """

    folder: Path
    _stages: list[list[DeferredTensor]] = field(default_factory=list)
    _sensitivities: list[Sensitivity] = field(default_factory=list)  # per group
    _bytes: list[dict[Scheme, int]] = field(default_factory=list)  # per group
    _groups_per_stage: list[int] = field(default_factory=list)
    _fixed_bytes: int = 0
    _discarded: set[int] = field(default_factory=set)
    _tokens: int = 0
    _feature_tokens: int = 0

    def store(self, stage: Stage, tensors: Iterable[EmittedTensor], *, packed: bool) -> None:
        """Writes a stage's file: its tensors, and those of its groups in every other scheme that they may get.

        packed: as in `module_tensors`.
        """
        self._count_tokens(stage)
        first = len(self._sensitivities)
        self._sensitivities += [replace(measured, modules={}) for measured in stage.sensitivities]  # frees the modules
        self._bytes += [dict.fromkeys(measured.noise, 0) for measured in stage.sensitivities]
        self._groups_per_stage.append(len(stage.sensitivities))
        self.folder.mkdir(exist_ok=True)
        writer = ShardWriter(self.folder, header_bytes=_header_bytes(stage))
        stored: list[DeferredTensor] = []
        keys = _Keys()
        for emitted, group, choice in self._with_choices(stage, tensors, first, packed):
            key, is_new = keys.of(emitted)
            if is_new:
                writer.add(str(key), emitted.tensor)
            stored.append(DeferredTensor(emitted.name, emitted.scheme, key, group, choice))
            if group is None or choice is None:
                self._fixed_bytes += emitted.tensor.nbytes
            else:
                self._bytes[group][choice] += emitted.tensor.nbytes
        writer.close(str(len(self._stages)))
        self._stages.append(stored)

    def groups(self) -> list[SearchGroup]:
        """The groups to choose for: noise at the logits and bytes, in every scheme.

        Noise of the vision tower reaches tokens of images and videos only, so it is weighted by their share of all
        tokens.
        """
        share = self._feature_tokens / self._tokens if self._tokens else 1.0
        groups = []
        for measured, size in zip(self._sensitivities, self._bytes, strict=True):
            weight = 1.0 if measured.part == Part.LANGUAGE else share
            choices = {scheme: Candidate(noise * weight, size[scheme]) for scheme, noise in measured.noise.items()}
            groups.append(SearchGroup(measured.part, measured.sites, measured.assigned, choices))
        return groups

    def load(self, plan: SearchResult) -> Iterator[tuple[int, Iterator[EmittedTensor]]]:
        """(number, tensors that the plan chose) for every stage that was not discarded; to be read in this order.

        plan: made from `groups`.
        """
        for number in range(len(self._stages)):
            if number not in self._discarded:
                yield number, self._chosen(number, plan)

    def discard(self, number: int) -> None:
        """Deletes the file of a stage."""
        self._discarded.add(number)
        self._path(number).unlink(missing_ok=True)

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def fixed_bytes(self) -> int:
        """Size of the tensors that are written whatever is chosen."""
        return self._fixed_bytes

    @property
    def count(self) -> int:
        """How many stages were stored."""
        return len(self._stages)

    # ---- records, from which an interrupted run resumes -------------------------------------------------------------

    def last_record(self) -> dict[str, Any]:
        """What the last `store` added to this object, in JSON."""
        first = sum(self._groups_per_stage[:-1])
        return {
            "tensors": [
                [stored.name, stored.scheme, stored.key, stored.group, stored.choice] for stored in self._stages[-1]
            ],
            "sensitivities": [
                [measured.source, measured.part, measured.sites, measured.assigned, measured.noise]
                for measured in self._sensitivities[first:]
            ],
            "bytes": self._bytes[first:],
            "fixed_bytes": self._fixed_bytes,
            "tokens": [self._tokens, self._feature_tokens],
        }

    def sync(self, number: int) -> str:
        """Waits until a stage's file is on the disk, and returns its SHA-256."""
        sync(self._path(number))
        sync(self.folder)
        return sha256_of(self._path(number))

    def restore(self, records: Iterable[tuple[dict[str, Any], str]], discarded: set[int]) -> None:
        """Continues from another object's records, each with its `sync`. Damaged if a file has changed since."""
        for number, (record, digest) in enumerate(records):
            path = self._path(number)
            if number not in discarded and (not path.exists() or sha256_of(path) != digest):
                raise Damaged(f"{path.name} of {self.folder.name} has changed since it was written")
            self._stages.append(
                [
                    DeferredTensor(name, tensor_scheme(scheme), key, group, choice and Scheme(choice))
                    for name, scheme, key, group, choice in record["tensors"]
                ]
            )
            self._sensitivities += [
                Sensitivity(source, part, tuple(sites), Scheme(assigned), _by_scheme(noise), {})
                for source, part, sites, assigned, noise in record["sensitivities"]
            ]
            self._groups_per_stage.append(len(record["sensitivities"]))
            self._bytes += [_by_scheme(size) for size in record["bytes"]]
            self._fixed_bytes = record["fixed_bytes"]
            self._tokens, self._feature_tokens = record["tokens"]
        for number in discarded:
            self.discard(number)
        known = {self._path(number).name for number in range(len(self._stages))}
        for path in self.folder.glob("*"):
            if path.name not in known:
                path.unlink()

    # ---- details ----------------------------------------------------------------------------------------------------

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"

    def _chosen(self, number: int, plan: SearchResult) -> Iterator[EmittedTensor]:
        with safe_open(self._path(number), framework="pt") as file:
            for stored in self._stages[number]:
                if stored.group is None or plan.schemes[stored.group] == stored.choice:
                    yield EmittedTensor(stored.name, file.get_tensor(str(stored.key)), stored.scheme)

    def _with_choices(
        self, stage: Stage, tensors: Iterable[EmittedTensor], first: int, packed: bool
    ) -> Iterator[tuple[EmittedTensor, int | None, Scheme | None]]:
        """(tensor, group, choice): all tensors of the stage, those of a layer's other choices before its own.

        first: number of the stage's first group.
        """
        group_of = {
            site: number for number, measured in enumerate(stage.sensitivities, first) for site in measured.sites
        }
        begun: set[str] = set()
        for emitted in tensors:
            layer = emitted.name.rpartition(".")[0]
            number = group_of.get(layer)
            if number is None or not isinstance(emitted.scheme, Scheme):  # scales of the cache fit every choice
                yield emitted, None, None
                continue
            measured = stage.sensitivities[number - first]
            if layer not in begun:
                begun.add(layer)
                target = stage.sites[layer].target
                for scheme in (scheme for scheme in measured.modules if scheme != measured.assigned):
                    for other in module_tensors(stage, target, measured.modules[scheme][target], packed=packed):
                        yield other, number, scheme
            yield emitted, number, measured.assigned

    def _count_tokens(self, stage: Stage) -> None:
        """Counts all tokens and those of images and videos, in the first stage that reads text: all have the same."""
        if any(shape.rows_per_modality[TEXT] for shape in stage.execution.sample_shapes) and not self._tokens:
            self._tokens = sum(sum(shape.rows_per_modality) for shape in stage.execution.sample_shapes)
            text = sum(shape.rows_per_modality[TEXT] for shape in stage.execution.sample_shapes)
            self._feature_tokens = self._tokens - text


class _Keys:
    """Numbers the tensors of a stage's file. Equal tensors of one name, in several schemes, have one number."""

    def __init__(self) -> None:
        self._next = 0
        self._layer = ""
        self._known: dict[str, list[tuple[Tensor, int]]] = {}  # of the current layer only: the others leave the memory

    def of(self, emitted: EmittedTensor) -> tuple[int, bool]:
        """(key, whether it is new)."""
        layer = emitted.name.rpartition(".")[0]
        if layer != self._layer:
            self._layer, self._known = layer, {}
        tensor, known = emitted.tensor, self._known.setdefault(emitted.name, [])
        for other, key in known:
            if tensor.dtype == other.dtype and torch.equal(tensor, other):
                return key, False
        known.append((tensor, self._next))
        self._next += 1
        return self._next - 1, True


def _by_scheme(values: dict[str, Any]) -> dict[Scheme, Any]:
    return {Scheme(scheme): value for scheme, value in values.items()}


def _header_bytes(stage: Stage) -> int:
    """An upper bound of the header of a stage's file, whose keys are numbers."""
    choices = sum(len(measured.sites) * len(measured.modules) for measured in stage.sensitivities)
    several = choices + len(stage.caches)
    return 1024 + (len(stage.module.state_dict()) * 2 + several * TENSORS_PER_LINEAR) * (ENTRY_BYTES + 16)
