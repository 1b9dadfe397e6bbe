"""Mixed-precision search: gives some groups a scheme with less noise, so that an SQNR is met at the least extra cost.

The noise of each candidate is measured one group at a time. Independent rounding errors add up along the residual
stream, so the noise of an assignment is the sum over its groups.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from vlqc.families.family import ModelFamily, Part
from vlqc.options.fields import flag_of
from vlqc.targets.rules import group_faults
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import Target

MAX_NAMES = 3  # groups that a note names
MAX_COST_RATIO = 2  # upper bound of the result's extra cost, relative to the optimum


@dataclass(frozen=True)
class Candidate:
    """A scheme for a group. noise: noise-to-signal ratio that it adds to the logits; bytes: size of its tensors."""

    noise: float
    bytes: int


@dataclass(frozen=True)
class SearchGroup:
    """Sites that share one scheme.

    part: of the model; candidates: the schemes to choose from, usually including the assigned one.
    """

    part: str
    sites: tuple[str, ...]
    assigned: Scheme
    candidates: Mapping[Scheme, Candidate]

    @property
    def name(self) -> str:
        return self.sites[0]

    @property
    def float_candidate(self) -> Candidate | None:
        """The group in float, None if it must be quantized."""
        return self.candidates.get(Scheme.FLOAT)

    def extra_cost(self, scheme: Scheme) -> float:
        """Bytes above those of the assigned scheme, plus the run-time cost of its activations. Not negative."""
        overhead = max(0.0, scheme.spec.activation.cost - self.assigned.spec.activation.cost)
        base = self.candidates[self.assigned].bytes if self.assigned in self.candidates else 0
        return max(0.0, self.candidates[scheme].bytes * (1 + overhead) - base)


@dataclass(frozen=True)
class GroupPrecision:
    """The result for one group. sqnr: signal to noise of the group alone, dB; noise_share: share of the total noise."""

    sites: tuple[str, ...]
    part: str
    assigned: Scheme
    scheme: Scheme
    sqnr: float
    noise_share: float
    bytes: int


@dataclass(frozen=True)
class SearchResult:
    """Groups and their chosen schemes. min_sqnr: the requested SQNR, dB; best_sqnr: the highest achievable one, dB."""

    groups: tuple[SearchGroup, ...]
    schemes: tuple[Scheme, ...]
    min_sqnr: float | None
    best_sqnr: float

    @property
    def sqnr(self) -> float:
        """Predicted signal-to-noise ratio of the logits, dB."""
        return decibels(noise_of(self.groups, self.schemes))

    @property
    def met(self) -> bool:
        return self.min_sqnr is None or self.sqnr >= self.min_sqnr

    def table(self) -> list[GroupPrecision]:
        """One row per group, in the model's order."""
        total = noise_of(self.groups, self.schemes)
        rows = []
        for group, scheme in zip(self.groups, self.schemes, strict=True):
            candidate = group.candidates[scheme]
            share, sqnr = candidate.noise / total if total else 0.0, decibels(candidate.noise)
            rows.append(GroupPrecision(group.sites, group.part, group.assigned, scheme, sqnr, share, candidate.bytes))
        return rows

    def notes(self) -> list[str]:
        """Messages to the user: the groups whose scheme changed and the predicted SQNR; a warning if it is too low."""
        changed: dict[Scheme, list[str]] = {}
        for group, scheme in zip(self.groups, self.schemes, strict=True):
            if scheme != group.assigned:
                changed.setdefault(scheme, []).append("+".join(_short_names(group)))
        parts = [_describe(names, scheme) for scheme, names in sorted(changed.items())] or ["no group changes"]
        summary = f"{flag_of('fallback')} auto: {'; '.join(parts)}; predicted SQNR {self.sqnr:.1f} dB"
        if self.met:
            return [summary]
        what = (
            f"{flag_of('min_sqnr')} {self.min_sqnr:g} cannot be met: the best predicted SQNR is {self.best_sqnr:.1f} dB"
        )
        why = "float tensors are rounded when they are written, and the target requires some groups to be quantized"
        return [f"{what}\nwhy: {why}\nwhat to do: lower {flag_of('min_sqnr')}", summary]


def decibels(noise: float) -> float:
    """Noise-to-signal ratio -> SQNR in dB; infinity for no noise."""
    return -10 * math.log10(noise) if noise > 0 else math.inf


def noise_of(groups: Sequence[SearchGroup], schemes: Sequence[Scheme]) -> float:
    """Predicted noise-to-signal ratio of the logits: the sum over the groups."""
    return math.fsum(group.candidates[scheme].noise for group, scheme in zip(groups, schemes, strict=True))


def extra_cost(groups: Sequence[SearchGroup], schemes: Sequence[Scheme]) -> float:
    """The sum of `SearchGroup.extra_cost`, bytes."""
    return math.fsum(group.extra_cost(scheme) for group, scheme in zip(groups, schemes, strict=True))


def search_schemes(
    groups: Sequence[SearchGroup],
    *,
    target: str | Target,
    family: ModelFamily,
    min_sqnr: float | None = None,
    max_float_groups: int | None = None,
) -> SearchResult:
    """Finds the cheapest schemes that meet `min_sqnr`, or those with the least noise under `max_float_groups`.

    The result satisfies `group_faults` if the assigned schemes do, and is deterministic.

    Args:
        min_sqnr: predicted SQNR to meet, dB. The extra cost is at most MAX_COST_RATIO times the optimum. If no
            assignment meets it, the one with the least noise is returned.
        max_float_groups: the maximum number of groups that change to FLOAT; no other scheme changes.
    """
    best: tuple[float, ...] | None = None
    schemes: tuple[Scheme, ...] = ()
    lowest_noise = math.inf
    for limited in restrictions(groups, target, family):
        least_noise = _least_noise(limited)
        lowest_noise = min(lowest_noise, noise_of(groups, least_noise))
        if min_sqnr is not None:
            chosen = _search_by_noise(limited, 10 ** (-min_sqnr / 10))
            missed = noise_of(groups, least_noise) if chosen is None else 0.0
            chosen = chosen or least_noise
            rank: tuple[float, ...] = (missed, extra_cost(groups, chosen), noise_of(groups, chosen))
        else:
            chosen = _search_by_count(limited, max_float_groups or 0)
            if chosen is None:
                continue
            rank = (0.0, noise_of(groups, chosen), extra_cost(groups, chosen))
        if best is None or rank < best:
            best, schemes = rank, tuple(chosen)
    return SearchResult(tuple(groups), schemes, min_sqnr, decibels(lowest_noise))


def restrictions(
    groups: Sequence[SearchGroup], target: str | Target, family: ModelFamily
) -> Iterator[list[SearchGroup]]:
    """Yields the groups with fewer candidates, such that every combination of the candidates is legal.

    First without the candidates that break a rule while all other groups keep their schemes. FLOAT in the vision tower
    may be such a candidate, but legal if the whole tower is FLOAT: this is yielded second.
    """
    assigned = _of_site(groups, [group.assigned for group in groups])
    independent, coupled = [], set()
    for group in groups:
        legal = {}
        for scheme, candidate in group.candidates.items():
            if scheme == group.assigned or not group_faults(
                target, family, assigned | dict.fromkeys(group.sites, scheme)
            ):
                legal[scheme] = candidate
            elif not scheme.is_quantized:
                coupled.add(_in_language_model(group))
        independent.append(replace(group, candidates=legal))
    yield independent
    inside = [group for group in groups if _in_language_model(group) in coupled]
    floats = {
        group.name: replace(group, candidates={Scheme.FLOAT: group.float_candidate})
        for group in inside
        if group.float_candidate is not None
    }
    all_float = {site: Scheme.FLOAT for group in inside for site in group.sites}
    if inside and len(floats) == len(inside) and not group_faults(target, family, assigned | all_float):
        yield [floats.get(group.name, group) for group in independent]


def _search_by_noise(groups: Sequence[SearchGroup], max_noise: float) -> list[Scheme] | None:
    """Schemes with at most `max_noise` and a low extra cost, or None if there are none.

    A multiple-choice knapsack cover. The greedy algorithm by noise removed per cost, along each group's convex hull,
    costs at most the optimum of the relaxed problem plus one step. With steps no larger than the largest step of the
    optimum, found by trying all of them, it costs at most twice the optimum.
    """
    best: list[Scheme] | None = None
    for largest in sorted({group.extra_cost(scheme) for group in groups for scheme in group.candidates}):
        chosen = _greedy(groups, max_noise, largest)
        if chosen is None:
            continue
        chosen = _undo_unnecessary(groups, chosen, max_noise)
        if best is None or _rank(groups, chosen) < _rank(groups, best):
            best = chosen
    return best


def _greedy(groups: Sequence[SearchGroup], max_noise: float, largest: float) -> list[Scheme] | None:
    """Applies steps in order of noise removed per cost until the noise is at most `max_noise`; None if it never is.

    largest: schemes of a higher extra cost are not used.
    """
    schemes = [_initial(group) for group in groups]
    steps = []
    for number, group in enumerate(groups):
        for efficiency, scheme in _hull(group, largest):
            steps.append((-efficiency, group.name, number, scheme))
    if noise_of(groups, schemes) <= max_noise:
        return schemes
    for _, _, number, scheme in sorted(steps, key=lambda step: step[:2]):  # stable: a group's steps stay in order
        schemes[number] = scheme
        if noise_of(groups, schemes) <= max_noise:
            return schemes
    return None


def _hull(group: SearchGroup, largest: float) -> list[tuple[float, Scheme]]:
    """(noise removed per cost, scheme): steps from the start along the lower convex hull of cost and noise."""
    now = _initial(group)
    steps: list[tuple[float, Scheme]] = []
    while True:
        ahead = [
            (_efficiency(group, now, scheme), -group.extra_cost(scheme), str(scheme), scheme)
            for scheme, candidate in group.candidates.items()
            if candidate.noise < group.candidates[now].noise
            and group.extra_cost(now) <= group.extra_cost(scheme) <= largest
        ]
        if not ahead:
            return steps
        efficiency, *_, now = max(ahead)
        steps.append((min([efficiency, *(step[0] for step in steps)]), now))  # not increasing, in spite of rounding


def _efficiency(group: SearchGroup, now: Scheme, scheme: Scheme) -> float:
    cost = group.extra_cost(scheme) - group.extra_cost(now)
    return (group.candidates[now].noise - group.candidates[scheme].noise) / cost if cost > 0 else math.inf


def _undo_unnecessary(groups: Sequence[SearchGroup], schemes: Sequence[Scheme], max_noise: float) -> list[Scheme]:
    """Reverts steps that the noise limit does not need, the most expensive first."""
    kept = list(schemes)
    order = sorted(range(len(groups)), key=lambda index: (-groups[index].extra_cost(kept[index]), groups[index].name))
    for number in order:
        group, before = groups[number], kept[number]
        cheaper = [scheme for scheme in group.candidates if group.extra_cost(scheme) < group.extra_cost(before)]
        for scheme in sorted(cheaper, key=lambda scheme: (group.extra_cost(scheme), group.candidates[scheme].noise)):
            kept[number] = scheme
            if noise_of(groups, kept) <= max_noise:
                break
            kept[number] = before
    return kept


def _search_by_count(groups: Sequence[SearchGroup], max_groups: int) -> list[Scheme] | None:
    """FLOAT for at most `max_groups` groups, those whose noise falls most; None if more than that must be float."""
    schemes = [_initial(group) for group in groups]
    left = max_groups - sum(scheme != group.assigned for group, scheme in zip(groups, schemes, strict=True))
    if left < 0:
        return None
    gains = [
        (group.candidates[scheme].noise - group.float_candidate.noise, number)
        for number, (group, scheme) in enumerate(zip(groups, schemes, strict=True))
        if group.float_candidate is not None and scheme.is_quantized
    ]
    for gain, number in sorted(gains, key=lambda gain: (-gain[0], groups[gain[1]].name))[:left]:
        if gain > 0:
            schemes[number] = Scheme.FLOAT
    return schemes


def _least_noise(groups: Sequence[SearchGroup]) -> list[Scheme]:
    return [
        min(
            group.candidates, key=lambda scheme: (group.candidates[scheme].noise, group.extra_cost(scheme), str(scheme))
        )
        for group in groups
    ]


def _initial(group: SearchGroup) -> Scheme:
    """The assigned scheme if it is a candidate, else the cheapest candidate."""
    if group.assigned in group.candidates:
        return group.assigned
    return min(group.candidates, key=lambda scheme: (group.extra_cost(scheme), group.candidates[scheme].noise))


def _rank(groups: Sequence[SearchGroup], schemes: Sequence[Scheme]) -> tuple[float, float]:
    return extra_cost(groups, schemes), noise_of(groups, schemes)


def _of_site(groups: Sequence[SearchGroup], schemes: Sequence[Scheme]) -> dict[str, Scheme]:
    return {site: scheme for group, scheme in zip(groups, schemes, strict=True) for site in group.sites}


def _in_language_model(group: SearchGroup) -> bool:
    """Whether a group is in the language model or the vision tower: the two sets of layers that rules are about."""
    return group.part == Part.LANGUAGE


def _describe(names: Sequence[str], scheme: Scheme) -> str:
    what = f"become {scheme}" if scheme.is_quantized else "stay float"
    if len(names) == 1:
        what = f"becomes {scheme}" if scheme.is_quantized else "stays float"
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{len(names)} group{'s' * (len(names) > 1)} {what}: {', '.join(names[:MAX_NAMES])}{more}"


def _short_names(group: SearchGroup) -> list[str]:
    """The full name of the first site and the last component of the others."""
    return [group.name, *(site.rpartition(".")[2] for site in group.sites[1:])]
