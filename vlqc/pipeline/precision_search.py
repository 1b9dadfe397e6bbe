"""Mixed-precision search: one scheme per group, so that an SQNR is met at the least extra cost, or a size with the
least noise.

The noise of each candidate is measured one group at a time. Independent rounding errors add up along the residual
stream, so the noise of an assignment is the sum over its groups.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from vlqc.families.family import ModelFamily, Part
from vlqc.options.fields import flag_of
from vlqc.pipeline.knapsack import PRECISION, Option, choose_options
from vlqc.targets.engine import join_and
from vlqc.targets.rules import group_faults
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import Target

MAX_NAMES = 3  # groups that a note names
MAX_RATIO = 1 + PRECISION  # upper bound of what the search minimizes, relative to the optimum


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
        """Run time above that of the assigned scheme, in bytes that could be read meanwhile. Not negative."""
        base = self._cost(self.assigned) if self.assigned in self.candidates else 0.0
        return max(0.0, self._cost(scheme) - base)

    def _cost(self, scheme: Scheme) -> float:
        return self.candidates[scheme].bytes * (1 + scheme.spec.overhead)


@dataclass(frozen=True)
class CandidatePrecision:
    """A scheme that a group could have. sqnr: signal to noise of the group alone, dB; bytes: size of its tensors."""

    scheme: Scheme
    sqnr: float
    bytes: int


@dataclass(frozen=True)
class GroupPrecision:
    """The result for one group. sqnr: signal to noise of the group alone, dB; noise_share: share of the total noise;
    candidates: the schemes among which the search chose, the assigned one first."""

    sites: tuple[str, ...]
    part: str
    assigned: Scheme
    scheme: Scheme
    sqnr: float
    noise_share: float
    bytes: int
    candidates: tuple[CandidatePrecision, ...] = ()


@dataclass(frozen=True)
class SearchResult:
    """Groups and their chosen schemes.

    min_sqnr: the requested SQNR, dB; best_sqnr: the highest achievable one, dB; max_bytes: the requested size of the
    weight files; fixed_bytes: of what does not depend on the search.
    """

    groups: tuple[SearchGroup, ...]
    schemes: tuple[Scheme, ...]
    min_sqnr: float | None
    best_sqnr: float
    max_bytes: int | None = None
    fixed_bytes: int = 0

    @property
    def sqnr(self) -> float:
        """Predicted signal-to-noise ratio of the logits, dB."""
        return decibels(noise_of(self.groups, self.schemes))

    @property
    def bytes(self) -> int:
        """Size of the weight files, at most: with several files, a part of their headers may be missing."""
        return self.fixed_bytes + bytes_of(self.groups, self.schemes)

    @property
    def met(self) -> bool:
        return (self.min_sqnr is None or self.sqnr >= self.min_sqnr) and (
            self.max_bytes is None or self.bytes <= self.max_bytes
        )

    def table(self) -> list[GroupPrecision]:
        """One row per group, in the model's order."""
        total = noise_of(self.groups, self.schemes)
        rows = []
        for group, scheme in zip(self.groups, self.schemes, strict=True):
            candidate = group.candidates[scheme]
            share, sqnr = candidate.noise / total if total else 0.0, decibels(candidate.noise)
            candidates = tuple(
                CandidatePrecision(name, decibels(each.noise), each.bytes) for name, each in group.candidates.items()
            )
            rows.append(
                GroupPrecision(
                    group.sites, group.part, group.assigned, scheme, sqnr, share, candidate.bytes, candidates
                )
            )
        return rows

    def notes(self) -> list[str]:
        """Messages to the user: the groups whose scheme changed and the predicted SQNR; a warning if it is too low."""
        changed: dict[Scheme, list[str]] = {}
        for group, scheme in zip(self.groups, self.schemes, strict=True):
            if scheme != group.assigned:
                changed.setdefault(scheme, []).append(group_title(group.sites))
        parts = [_describe(names, scheme) for scheme, names in sorted(changed.items())] or ["no group changes"]
        summary = f"{flag_of('fallback')} auto: {'; '.join(parts)}; predicted SQNR {self.sqnr:.1f} dB"
        if per_token := sorted({scheme for scheme in self.schemes if not scheme.spec.has_one_arithmetic}):
            summary += f", with inputs of {join_and(per_token)} quantized per token"
        if self.met:
            return [summary]
        if self.min_sqnr is None:
            flag = flag_of("max_bytes")
            what = f"{flag} {self.max_bytes} cannot be met: the smallest size is {self.bytes} bytes, which was written"
            why = "some tensors are larger than their shapes showed before the compilation"
            return [f"{what}\nwhy: {why}\nwhat to do: raise {flag}", summary]
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


def bytes_of(groups: Sequence[SearchGroup], schemes: Sequence[Scheme]) -> int:
    """Total size of the groups' tensors."""
    return sum(group.candidates[scheme].bytes for group, scheme in zip(groups, schemes, strict=True))


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
    max_bytes: int | None = None,
    fixed_bytes: int = 0,
) -> SearchResult:
    """Finds the cheapest schemes that meet `min_sqnr`, or those with the least noise under one of the limits.

    The result satisfies `group_faults` if the assigned schemes do, and is deterministic.

    Args:
        min_sqnr: predicted SQNR to meet, dB. The extra cost is at most MAX_RATIO times the optimum. If no assignment
            meets it, the one with the least noise is returned.
        max_float_groups: the maximum number of groups that change to FLOAT; no other scheme changes.
        max_bytes: the maximum size of the groups and of what `fixed_bytes` counts. The noise is at most MAX_RATIO times
            the optimum. If no assignment is small enough, the smallest one is returned.
        fixed_bytes: size of all that does not depend on the search.
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
        elif max_bytes is not None:
            chosen, smallest = _search_by_bytes(limited, max_bytes - fixed_bytes), _smallest(limited)
            missed = bytes_of(groups, smallest) if chosen is None else 0.0
            chosen = chosen or smallest
            rank = (missed, noise_of(groups, chosen), extra_cost(groups, chosen))
        else:
            chosen = _search_by_count(limited, max_float_groups or 0)
            if chosen is None:
                continue
            rank = (0.0, noise_of(groups, chosen), extra_cost(groups, chosen))
        if best is None or rank < best:
            best, schemes = rank, tuple(chosen)
    return SearchResult(tuple(groups), schemes, min_sqnr, decibels(lowest_noise), max_bytes, fixed_bytes)


def size_range(groups: Sequence[SearchGroup], target: str | Target, family: ModelFamily) -> tuple[int, int]:
    """The smallest and the largest total size of the groups, over all legal assignments."""
    limited = list(restrictions(groups, target, family))
    return (
        min(bytes_of(groups, _smallest(each)) for each in limited),
        max(bytes_of(groups, _largest(each)) for each in limited),
    )


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
    """Schemes with at most `max_noise` and a low extra cost, or None if there are none."""

    def option(group: SearchGroup, scheme: Scheme) -> tuple[float, float]:
        return group.extra_cost(scheme), group.candidates[scheme].noise

    return _choose(groups, option, max_noise, heavy_first=False)


def _search_by_bytes(groups: Sequence[SearchGroup], max_bytes: int) -> list[Scheme] | None:
    """Schemes of at most `max_bytes` and with low noise, or None if there are none."""

    def option(group: SearchGroup, scheme: Scheme) -> tuple[float, float]:
        return group.candidates[scheme].noise, group.candidates[scheme].bytes

    return _choose(groups, option, max_bytes, heavy_first=True)


def _choose(
    groups: Sequence[SearchGroup],
    option: Callable[[SearchGroup, Scheme], tuple[float, float]],
    limit: float,
    *,
    heavy_first: bool,
) -> list[Scheme] | None:
    """`choose_options`, whatever the order of the groups. option: value and weight of a scheme; of equal groups, the
    first ones by name get the heavier option if `heavy_first`, else the last ones."""
    order = sorted(range(len(groups)), key=lambda number: groups[number].name, reverse=not heavy_first)
    schemes = [_preferred_first(groups[number]) for number in order]
    items = [
        [Option(*option(groups[number], scheme), rank) for rank, scheme in enumerate(candidates)]
        for number, candidates in zip(order, schemes, strict=True)
    ]
    chosen = choose_options(items, limit)
    if chosen is None:
        return None
    by_number = {number: of[index] for number, of, index in zip(order, schemes, chosen, strict=True)}
    return [by_number[number] for number in range(len(groups))]


def _preferred_first(group: SearchGroup) -> list[Scheme]:
    """The candidates: the assigned scheme, then by cost and noise."""
    return sorted(
        group.candidates,
        key=lambda scheme: (
            scheme != group.assigned, group.extra_cost(scheme), group.candidates[scheme].noise, str(scheme)
        ),
    )  # fmt: skip


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


def _smallest(groups: Sequence[SearchGroup]) -> list[Scheme]:
    return [
        min(
            _preferred_first(group), key=lambda scheme: (group.candidates[scheme].bytes, group.candidates[scheme].noise)
        )
        for group in groups
    ]


def _largest(groups: Sequence[SearchGroup]) -> list[Scheme]:
    return [max(_preferred_first(group), key=lambda scheme: group.candidates[scheme].bytes) for group in groups]


def _initial(group: SearchGroup) -> Scheme:
    """The assigned scheme if it is a candidate, else the cheapest candidate."""
    if group.assigned in group.candidates:
        return group.assigned
    return min(group.candidates, key=lambda scheme: (group.extra_cost(scheme), group.candidates[scheme].noise))


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


def group_title(sites: Sequence[str]) -> str:
    """The full name of the first site and the last component of the others."""
    return "+".join([sites[0], *(site.rpartition(".")[2] for site in sites[1:])])
