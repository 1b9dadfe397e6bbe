"""Finished stages that wait for a decision: what they become in every scheme lies on disk until one is chosen.

A stage is forgotten before the next one begins, and which schemes its groups get is decided when all are known. So one
file per stage holds what does not depend on that, and the tensors of every choice; then the chosen ones are read back,
stage by stage, in the order in which they would have been written.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import safe_open

from vlqc.emit.ascend import TENSORS_PER_LINEAR, Entry, emitted_dtype, module_entries
from vlqc.emit.ascend import expected_bytes as expected_bytes_without
from vlqc.emit.shards import ENTRY_BYTES, ShardWriter
from vlqc.engines import VLLM_ASCEND, Scheme, legal_schemes
from vlqc.ir import MODALITIES, Sensitivity, Stage
from vlqc.model import FloatModel
from vlqc.precision_search import Choice, Group, Plan

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
class Spool:
    """Holds stages back: `put` each of them, decide about `groups`, then `take` what the plan chose, once.

    folder: made by the first `put` and removed by `take`.
    """

    folder: Path
    _stages: list[list[Line]] = field(default_factory=list)
    _measured: list[Sensitivity] = field(default_factory=list)
    _bytes: list[dict[Scheme, int]] = field(default_factory=list)
    _tokens: int = 0
    _image_tokens: int = 0

    def put(self, stage: Stage, entries: Iterable[Entry], *, packed: bool) -> None:
        """Writes a stage: its entries, and those that its groups would have in every other scheme they may get."""
        self._count_tokens(stage)
        first = len(self._measured)
        self._measured += [replace(it, modules={}) for it in stage.sensitivities]  # the stage is to be forgotten
        self._bytes += [dict.fromkeys(it.noise, 0) for it in stage.sensitivities]
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

    def take(self, plan: Plan) -> Iterator[Entry]:
        """The entries that the plan chose, for `groups` as they were; each file goes when it is read."""
        for number, lines in enumerate(self._stages):
            path = self.folder / f"{number}.safetensors"
            with safe_open(path, framework="pt") as file:
                for key, line in enumerate(lines):
                    if line.group is None or plan.schemes[line.group] == line.scheme:
                        yield Entry(line.name, file.get_tensor(str(key)), line.mark)
            path.unlink()
        if self._stages:
            self.folder.rmdir()
        self._stages.clear()

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
            self._tokens = sum(sum(visit.of_modality) for visit in stage.all_visits())
            self._image_tokens = sum(visit.of_modality[IMAGE] for visit in stage.all_visits())


def _header_bytes(stage: Stage) -> int:
    """An upper bound of the header of a stage's file, whose keys are numbers."""
    of_choices = sum(len(it.sites) * len(it.modules) for it in stage.sensitivities) * TENSORS_PER_LINEAR
    return 1024 + (len(stage.live.state_dict()) * 2 + of_choices) * (ENTRY_BYTES + 16)


def expected_bytes(model: FloatModel) -> int:
    """About how much room a result takes while its stages wait: that of the result, and every other choice beside it.

    The choices are a float, and int8 with scales of another kind.
    """
    each = emitted_dtype(model.checkpoint.dtype).itemsize + 1
    waiting = sum(
        parameter.numel() * each
        for name, parameter in model.parameters(model.module).items()
        if len(legal_schemes(VLLM_ASCEND, name.removesuffix(".weight"))) > 1
    )
    return expected_bytes_without(model) + waiting
