"""Compares a compiled folder with its float checkpoint, and finds out whether it has the rotations that it states.

If tensors do not follow from the float checkpoint under the stated rotations, every stage with such tensors is compared
under other ones: without a rotation, or with another seed. If far fewer faults are left then, these count, and each
difference to what the folder states is one fault. So a wrong statement is not a fault of every tensor.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from vlqc.frontend.model_structure import ModelStructure
from vlqc.ir.rotations import Rotatable, RotationKind
from vlqc.verify.findings import COPY_AGAIN, Finding, VerificationResult, format_list
from vlqc.verify.float_match.compare import CHECK, Comparison, open_source
from vlqc.verify.float_match.read_source import forget_adapters
from vlqc.verify.float_match.rotated_source import release_memory, rotated_source
from vlqc.verify.folder.manifest import SUMMARY
from vlqc.verify.folder.reader import StoredTensor
from vlqc.verify.folder.rotations import CHECK as ROTATIONS
from vlqc.verify.folder.rotations import Key, Rotated, Seeds, applied, describe_parts, key_of, layers_of
from vlqc.verify.structure.structure import CompiledFolder

DEFAULT_SEED = 0
FEWEST_FAULTS = 2  # tensors of a stage that a rotation changes a little; one alone is damaged
MUCH_BETTER = 2  # times as few tensors with faults: another rotation is not chosen by chance
MOST_SEEDS = 5  # that are tried for one rotation
FUTILE_SEARCHES = 3  # stages alike for which no other rotation was better; then none is tried for more of them
# If so many of at least that many matrices that a rotation changes are not the source's, it is not damage.
UNKNOWN_SHARE, FEWEST_MATRICES = 0.9, 4
OUTSIDE = ""  # stands for the layers outside all stages


def check_against_source(
    folder: CompiledFolder, model_path: Path, result: VerificationResult, lora: Sequence[Path] = ()
) -> Seeds:
    """Adds faults for every tensor that does not follow from the float checkpoint. UserError if that is unreadable.

    lora: folders of adapters that are merged into the checkpoint first.

    Returns the rotations that the folder's tensors have; those that it states where stages differ or none fits.
    """
    if folder.model is None or not folder.sizes_are_stored:
        return folder.rotations
    with np.errstate(all="ignore"):  # damaged values are faults in the result, not NumPy warnings
        check = _SourceCheck(folder, folder.model, open_source(model_path, folder.model, lora), result)
        try:
            return check.run()
        finally:
            release_memory()
            forget_adapters()


@dataclass
class _Outcome:
    """The comparison of some layers under some rotations.

    sqnr: of every matrix, in dB; not_source: layers whose matrix is not the source's.
    """

    rotated: Rotated
    faults: list[Finding]
    sqnr: dict[str, float]
    not_source: set[str]

    @property
    def tensors(self) -> int:
        """Number of tensors with faults."""
        return len({fault.where for fault in self.faults})

    def part(self, includes: Callable[[str], bool]) -> "_Outcome":
        """That of the layers that `includes`."""
        return _Outcome(
            self.rotated,
            [fault for fault in self.faults if includes(fault.where)],
            {layer: value for layer, value in self.sqnr.items() if includes(layer)},
            set(filter(includes, self.not_source)),
        )


class _SourceCheck:
    """Compares one folder with one source under the rotations that fit best."""

    def __init__(
        self,
        folder: CompiledFolder,
        model: ModelStructure,
        source: dict[str, StoredTensor],
        result: VerificationResult,
    ) -> None:
        self.folder, self.model, self.source, self.result = folder, model, source, result
        self.parts = {key_of(part): part for part in model.rotatable if not part.obstacle}
        self.stated: Rotated = {key: folder.rotations.get(key) for key in self.parts}
        self.stages = {stage for part in model.rotatable for stage, _ in (*part.inputs, *part.outputs)}
        self.units = {key: {self.unit(layer) for layer in layers_of(part)} for key, part in self.parts.items()}

    def unit(self, name: str) -> str:
        """The stage of a layer or tensor."""
        while name and name not in self.stages:
            name = name.rpartition(".")[0]
        return name or OUTSIDE

    def run(self) -> Seeds:
        """Adds faults to the result -> the rotations of the folder's tensors."""
        whole = self.compare(self.stated, lambda layer: True, count=True)
        units = dict.fromkeys(map(self.unit, [*whole.sqnr, *(fault.where for fault in whole.faults)]))
        outcomes = {unit: whole.part(lambda name, unit=unit: self.unit(name) == unit) for unit in units}  # type: ignore[misc]
        self.find_rotations(outcomes)
        found = self.compare_statement({unit: outcome.rotated for unit, outcome in outcomes.items()})
        self.result.faults += self.without_unknown_rotations(outcomes.values())
        sqnr = [item for outcome in outcomes.values() for item in outcome.sqnr.items()]
        self.result.facts["weights furthest from float"] = [
            {"layer": layer, "SQNR dB": round(value, 2)} for layer, value in sorted(sqnr, key=lambda item: item[1])[:5]
        ]
        return found

    def compare(self, rotated: Rotated, includes: Callable[[str], bool], *, count: bool = False) -> _Outcome:
        """The comparison of the layers that `includes`, under some rotations. count: add what was examined."""
        faults = VerificationResult(self.result.folder)
        seeds = {key: seed for key, seed in rotated.items() if seed is not None}
        source = rotated_source(self.source, self.model, applied(self.model, seeds), includes)
        comparison = Comparison(self.folder, self.model, source, faults)
        comparison.run(includes)
        if count:
            self.result.add_examined(CHECK, faults.examined.get(CHECK, 0))
        return _Outcome(rotated, faults.faults, comparison.sqnr, comparison.not_source)

    # ---- other rotations than the stated ones ------------------------------------------------------------------------

    def find_rotations(self, outcomes: dict[str, _Outcome]) -> None:
        """Replaces outcomes of stages under the stated rotations by those under others with far fewer faults."""
        futile: Counter[tuple[str, ...]] = Counter()
        latest: dict[RotationKind, int | None] = {}
        for unit, stated in outcomes.items():
            keys = [key for key in self.parts if unit in self.units[key]]
            alike = tuple(name for kind, name in keys if kind == RotationKind.RESIDUAL)
            few = stated.tensors < FEWEST_FAULTS and not stated.not_source
            if few or futile[alike] >= FUTILE_SEARCHES:
                continue
            best, includes = stated, lambda name, unit=unit: self.unit(name) == unit
            for rotated in sorted(
                self.others(keys), key=lambda each: [each[key] != latest.get(key[0]) for key in keys]
            ):
                outcome = self.compare(rotated, includes)
                if outcome.not_source - stated.not_source:
                    continue  # under the right rotation every matrix is the source's
                if MUCH_BETTER * outcome.tensors <= stated.tensors and outcome.tensors < best.tensors:
                    best = outcome
                if not best.faults:
                    break
            futile[alike] = futile[alike] + 1 if best is stated else 0
            if best is not stated:
                outcomes[unit] = best
                latest |= {key[0]: best.rotated[key] for key in keys}

    def others(self, keys: list[Key]) -> Iterator[Rotated]:
        """Other rotations of some parts: each is not rotated, or with the stated seed, the default or another one.

        Heads of several layers are changed together.
        """
        heads = [key for key in keys if key[0] == RotationKind.HEADS]
        groups = [*([key] for key in keys if key not in heads), *([heads] if heads else [])]
        choices: list[list[Rotated]] = []
        for group in groups:
            kind = group[0][0]
            seeds = dict.fromkeys([None, DEFAULT_SEED, *(self.stated[key] for key in self.stated if key[0] == kind)])
            choices.append([{key: self.stated[key] for key in group}])
            for seed in list(seeds)[:MOST_SEEDS]:
                choices[-1].append(dict.fromkeys(group, seed))
        for chosen in product(*choices):
            rotated = self.stated | {key: seed for of_group in chosen for key, seed in of_group.items()}
            if rotated != self.stated:
                yield rotated

    # ---- faults ------------------------------------------------------------------------------------------------------

    def compare_statement(self, found: Mapping[str, Rotated]) -> Seeds:
        """One fault for every difference between the rotations of the stages and the stated ones -> the former.

        Where stages differ, the stated ones.
        """
        seeds = dict(self.folder.rotations)
        everywhere: dict[tuple[RotationKind, int | None, int | None], list[str]] = {}
        in_stages: dict[tuple[Key, int | None, int | None], list[str]] = {}
        for key, units in self.units.items():
            stated, by_unit = self.stated[key], {unit: found.get(unit, self.stated)[key] for unit in units}
            if len(set(by_unit.values())) == 1:
                (seed,) = set(by_unit.values())
                seeds = {other: value for other, value in seeds.items() if other != key}
                seeds |= {} if seed is None else {key: seed}
                if seed != stated:
                    everywhere.setdefault((key[0], stated, seed), []).append(key[1])
            else:
                for unit, seed in sorted(by_unit.items()):
                    if seed != stated:
                        in_stages.setdefault((key, stated, seed), []).append(unit or "the layers outside all stages")
        why = f"{SUMMARY} was changed, or is that of another folder"
        for (kind, stated, seed), names in everywhere.items():
            what = (
                f"{describe_parts(kind, names)}: {_text(stated)} according to {SUMMARY}; the weights are {_text(seed)}"
            )
            self.result.add_fault(ROTATIONS, SUMMARY, what, why, COPY_AGAIN)
        why = "they read or write other values than the rest of the model, so its outputs are wrong"
        for (key, stated, seed), stages in in_stages.items():
            what = f"{describe_parts(key[0], [key[1]])}: {_text(stated)}, but {_text(seed)} in {format_list(stages)}"
            self.result.add_fault(ROTATIONS, format_list(stages), what, why, COPY_AGAIN)
        return seeds

    def without_unknown_rotations(self, outcomes: Collection[_Outcome]) -> list[Finding]:
        """The faults, with one in place of those of all tensors that an unknown rotation changes."""
        faults = [fault for outcome in outcomes for fault in outcome.faults]
        not_source = {layer for outcome in outcomes for layer in outcome.not_source}
        groups: dict[tuple[RotationKind, str], list[Rotatable]] = {}
        for (kind, name), part in self.parts.items():
            groups.setdefault((kind, "" if kind == RotationKind.HEADS else name), []).append(part)
        for (kind, _), parts in groups.items():
            layers = {layer for part in parts for layer in layers_of(part)}
            matrices = [layer for layer in self.model.linears if layer in layers]
            wrong = [layer for layer in matrices if layer in not_source]
            if len(matrices) < FEWEST_MATRICES or len(wrong) < UNKNOWN_SHARE * len(matrices):
                continue
            if not any(fault.where.rpartition(".")[0] in layers for fault in faults):
                continue  # they are part of a fault of another rotation
            seeds = {DEFAULT_SEED, *(seed for part in parts if (seed := self.stated[key_of(part)]) is not None)}
            what = (
                f"{len(wrong)} of {len(matrices)} matrices that write or read the "
                f"{describe_parts(kind, [part.name for part in parts])} are not those of the float checkpoint, whether "
                f"not rotated or rotated with seed {format_list(sorted(seeds))}"
            )
            why = "they have another rotation, or the folder was made from another checkpoint"
            fix = "pass the right checkpoint as --model_path, or compile again"
            self.result.add_fault(CHECK, format_list(wrong, 3), what, why, fix)
            faults = [fault for fault in faults if fault.where.rpartition(".")[0] not in layers]
        return faults


def _text(seed: int | None) -> str:
    return "not rotated" if seed is None else f"rotated with seed {seed}"
