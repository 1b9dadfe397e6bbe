"""Finished stages that wait for a decision: what they become in every scheme lies on disk until one is chosen.

A stage is forgotten before the next one begins, and which schemes its groups get is decided when all are known. So one
file per stage holds what does not depend on that, and the tensors of every choice; then the chosen ones are read back,
stage by stage, in the order in which they would have been written.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from vlqc.emit.shard_writer import ENTRY_BYTES, Damaged, ShardWriter, sync
from vlqc.emit.stage_tensors import TENSORS_PER_LINEAR, Entry, emitted_dtype, module_entries
from vlqc.emit.stage_tensors import expected_bytes as expected_bytes_without
from vlqc.files import sha256_of
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.stage import MODALITIES, Sensitivity, Stage
from vlqc.pipeline.precision_search import Choice, Group, Plan
from vlqc.targets.rules import supported_schemes
from vlqc.targets.schemes import Scheme
from vlqc.targets.vllm_ascend import VLLM_ASCEND

IMAGE = MODALITIES.index("image")
FOLDER = ".waiting"  # inside the work folder; nothing of it is left when the result appears


@dataclass(frozen=True)
class Line:
    """One tensor in a stage's file, where its key is its number: name and mark of its entry.

    group, scheme: for which choice of which group it is; None where it is emitted whatever is chosen.
    """

    name: str
    mark: Scheme
    group: int | None = None
    scheme: Scheme | None = None


@dataclass
class DeferredStages:
    """Holds stages back: `put` each of them, decide about `groups`, then `take` what the plan chose, once.

    folder: made by the first `put`; `remove` ends all.
    """

    folder: Path
    _stages: list[list[Line]] = field(default_factory=list)
    _measured: list[Sensitivity] = field(default_factory=list)
    _bytes: list[dict[Scheme, int]] = field(default_factory=list)
    _groups: list[int] = field(default_factory=list)  # per stage
    _dropped: set[int] = field(default_factory=set)
    _tokens: int = 0
    _image_tokens: int = 0

    def put(self, stage: Stage, entries: Iterable[Entry], *, packed: bool) -> None:
        """Writes a stage: its entries, and those that its groups would have in every other scheme they may get."""
        self._count_tokens(stage)
        first = len(self._measured)
        self._measured += [replace(it, modules={}) for it in stage.sensitivities]  # the stage is to be forgotten
        self._bytes += [dict.fromkeys(it.noise, 0) for it in stage.sensitivities]
        self._groups.append(len(stage.sensitivities))
        self.folder.mkdir(exist_ok=True)
        writer = ShardWriter(self.folder, header_bytes=_header_bytes(stage))
        lines: list[Line] = []
        for entry, number, scheme in self._with_choices(stage, entries, first, packed):
            writer.add(str(len(lines)), entry.tensor)
            lines.append(Line(entry.name, entry.mark, number, scheme))
            if number is not None and scheme is not None:
                self._bytes[number][scheme] += entry.tensor.numel() * entry.tensor.element_size()
        writer.close(str(len(self._stages)))
        self._stages.append(lines)

    def groups(self) -> list[Group]:
        """What there is to decide: per group its noise at the logits and its bytes, in every scheme.

        Noise of the vision tower reaches picture tokens, so of all tokens it counts for their share.
        """
        share = self._image_tokens / self._tokens if self._tokens else 1.0
        found = []
        for measured, size in zip(self._measured, self._bytes, strict=True):
            reach = 1.0 if measured.part == "language" else share
            choices = {scheme: Choice(noise * reach, size[scheme]) for scheme, noise in measured.noise.items()}
            found.append(Group(measured.sites, measured.assigned, choices))
        return found

    def take(self, plan: Plan, taken: Callable[[int], None] | None = None) -> Iterator[Entry]:
        """The entries that the plan chose, for `groups` as they were.

        taken: is told the number of every stage when its last entry was used, and sees to `drop`.
        """
        for number, lines in enumerate(self._stages):
            if number in self._dropped:
                continue
            with safe_open(self._path(number), framework="pt") as file:
                for key, line in enumerate(lines):
                    if line.group is None or plan.schemes[line.group] == line.scheme:
                        yield Entry(line.name, file.get_tensor(str(key)), line.mark)
            (taken or self.drop)(number)

    def drop(self, number: int) -> None:
        """A stage is not wanted any more: its file goes."""
        self._dropped.add(number)
        self._path(number).unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def mark(self) -> dict[str, Any]:
        """What became known by the last `put`, in JSON."""
        lines = self._stages[-1]
        first = sum(self._groups[:-1])
        return {
            "lines": [[it.name, it.mark, it.group, it.scheme] for it in lines],
            "measured": [[it.source, it.part, it.sites, it.assigned, it.noise] for it in self._measured[first:]],
            "bytes": self._bytes[first:],
            "tokens": [self._tokens, self._image_tokens],
        }

    def sealed(self, number: int) -> str:
        """SHA-256 of a stage's file, which is on the disk when this returns."""
        sync(self._path(number))
        sync(self.folder)
        return sha256_of(self._path(number))

    def restore(self, marks: Iterable[tuple[dict[str, Any], str]], dropped: set[int]) -> None:
        """Goes on from marks and seals that another spool made in this folder. Damaged if a file is not as it was."""
        for number, (mark, seal) in enumerate(marks):
            if number not in dropped and (not self._path(number).exists() or sha256_of(self._path(number)) != seal):
                raise Damaged(f"{self._path(number).name} of {self.folder.name} is not what was written")
            self._stages.append(
                [
                    Line(name, Scheme(word), group, scheme and Scheme(scheme))
                    for name, word, group, scheme in mark["lines"]
                ]
            )
            self._measured += [
                Sensitivity(source, part, tuple(sites), Scheme(assigned), _by_scheme(noise), {})
                for source, part, sites, assigned, noise in mark["measured"]
            ]
            self._groups.append(len(mark["measured"]))
            self._bytes += [_by_scheme(size) for size in mark["bytes"]]
            self._tokens, self._image_tokens = mark["tokens"]
        for number in dropped:
            self.drop(number)
        for path in self.folder.glob("*"):
            if path.name not in {self._path(number).name for number in range(len(self._stages))}:
                path.unlink()

    @property
    def count(self) -> int:
        """How many stages were put."""
        return len(self._stages)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"

    def _with_choices(
        self, stage: Stage, entries: Iterable[Entry], first: int, packed: bool
    ) -> Iterator[tuple[Entry, int | None, Scheme | None]]:
        """(entry, group, scheme): all entries of the stage, with those of its other choices before the first of a
        layer. first: number of the stage's first group."""
        group_of = {site: number for number, it in enumerate(stage.sensitivities, first) for site in it.sites}
        begun: set[str] = set()
        for entry in entries:
            layer = entry.name.rpartition(".")[0]
            number = group_of.get(layer)
            if number is None:
                yield entry, None, None
                continue
            measured = stage.sensitivities[number - first]
            if layer not in begun:
                begun.add(layer)
                target = stage.sites[layer].target
                for scheme in (it for it in measured.modules if it != measured.assigned):
                    for other in module_entries(stage, target, measured.modules[scheme][target], packed=packed):
                        yield other, number, scheme
            yield entry, number, measured.assigned

    def _count_tokens(self, stage: Stage) -> None:
        """How many tokens there are, and how many are of pictures: the same in every stage that reads text."""
        if any(call.modality is not None for call in stage.calls) and not self._tokens:
            self._tokens = sum(sum(visit.of_modality) for visit in stage.all_sample_shapes())
            self._image_tokens = sum(visit.of_modality[IMAGE] for visit in stage.all_sample_shapes())


def _by_scheme(values: dict[str, Any]) -> dict[Scheme, Any]:
    return {Scheme(scheme): value for scheme, value in values.items()}


def _header_bytes(stage: Stage) -> int:
    """An upper bound of the header of a stage's file, whose keys are numbers."""
    of_choices = sum(len(it.sites) * len(it.modules) for it in stage.sensitivities) * TENSORS_PER_LINEAR
    return 1024 + (len(stage.live.state_dict()) * 2 + of_choices) * (ENTRY_BYTES + 16)


def expected_bytes(model: StreamedModel) -> int:
    """About how much room a result takes while its stages wait: that of the result, and every other choice beside it.

    The choices are a float, and int8 with scales of another kind.
    """
    each = emitted_dtype(model.checkpoint.dtype).itemsize + 1
    waiting = sum(
        parameter.numel() * each
        for name, parameter in model.parameters(model.module).items()
        if len(supported_schemes(VLLM_ASCEND, name.removesuffix(".weight"))) > 1
    )
    return expected_bytes_without(model) + waiting
