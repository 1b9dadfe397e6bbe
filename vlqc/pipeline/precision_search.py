"""The precision search: which groups fall back to a scheme with less noise, so that a target is met at least cost.

What it goes by is measured stage by stage, one group at a time. Noise of independent roundings adds up along the
residual stream, so the noise of a set of choices is the sum over its groups; every rounding of a float is one, too.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from vlqc.families.qwen2_5_vl import model_part
from vlqc.options.options import flag_of
from vlqc.targets.rules import group_faults
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import Target

PER_TOKEN_COST = 0.1  # of its bytes: what a scale per token, made at run time, costs a group that had a stored one
NAMED = 3  # groups that a note names
FACTOR = 2  # a set that meets a least SQNR costs at most so many times what the cheapest one costs


@dataclass(frozen=True)
class Choice:
    """One scheme of a group: noise, relative to the signal, that it adds to the logits; bytes of all its tensors."""

    noise: float
    bytes: int


@dataclass(frozen=True)
class Group:
    """Sites that get one scheme: the one they were assigned, or another of `choices`, which holds both."""

    sites: tuple[str, ...]
    assigned: Scheme
    choices: Mapping[Scheme, Choice]

    @property
    def name(self) -> str:
        return self.sites[0]

    def extra_cost(self, scheme: Scheme) -> float:
        """Bytes that a scheme costs more than the assigned one, run time counted in; never below zero."""
        overhead = PER_TOKEN_COST if scheme == Scheme.W8A8_DYNAMIC and self.assigned == Scheme.W8A8 else 0.0
        base = self.choices[self.assigned].bytes if self.assigned in self.choices else 0
        return max(0.0, self.choices[scheme].bytes * (1 + overhead) - base)


@dataclass(frozen=True)
class GroupPrecision:
    """What became of a group: noise_share is its part of all noise; sqnr: signal to its own noise, in dB."""

    sites: tuple[str, ...]
    part: str
    assigned: Scheme
    scheme: Scheme
    sqnr: float
    noise_share: float
    bytes: int


@dataclass(frozen=True)
class Plan:
    """Groups and their schemes; least: the SQNR that was asked for, if one was; best: the highest within reach, dB."""

    groups: tuple[Group, ...]
    schemes: tuple[Scheme, ...]
    least: float | None
    best: float

    @property
    def sqnr(self) -> float:
        """Predicted signal-to-noise ratio of the logits, dB."""
        return decibels(noise_of(self.groups, self.schemes))

    @property
    def met(self) -> bool:
        return self.least is None or self.sqnr >= self.least

    def of_site(self) -> dict[str, Scheme]:
        """Checkpoint layer name -> scheme."""
        return _of_site(self.groups, self.schemes)

    def table(self) -> list[GroupPrecision]:
        """One row per group, in the model's order."""
        total = noise_of(self.groups, self.schemes)
        rows = []
        for group, scheme in zip(self.groups, self.schemes, strict=True):
            choice = group.choices[scheme]
            share = choice.noise / total if total else 0.0
            sqnr = decibels(choice.noise)
            rows.append(
                GroupPrecision(group.sites, model_part(group.name), group.assigned, scheme, sqnr, share, choice.bytes)
            )
        return rows

    def notes(self) -> list[str]:
        """What the user is told: how many groups got which scheme, and the predicted SQNR; a warning if it is short."""
        moved: dict[Scheme, list[str]] = {}
        for group, scheme in zip(self.groups, self.schemes, strict=True):
            if scheme != group.assigned:
                moved.setdefault(scheme, []).append(group.name if len(group.sites) == 1 else "+".join(_short(group)))
        parts = [_told(names, scheme) for scheme, names in sorted(moved.items())] or ["no group had to change"]
        told = f"{flag_of('fallback')} auto: {'; '.join(parts)}; predicted SQNR {self.sqnr:.1f} dB"
        if self.met:
            return [told]
        first = f"{flag_of('min_sqnr')} {self.least:g} is out of reach: the best is a predicted {self.best:.1f} dB"
        why = "what is left is the rounding of the emitted floats, and of groups that the target keeps quantized"
        return [f"{first}\nwhy: {why}\nwhat to do: ask for less", told]


def decibels(noise: float) -> float:
    """Noise relative to the signal -> dB; infinity where there is none."""
    return -10 * math.log10(noise) if noise > 0 else math.inf


def noise_of(groups: Sequence[Group], schemes: Sequence[Scheme]) -> float:
    """Predicted noise of the logits relative to their signal: the sum over groups."""
    return math.fsum(group.choices[scheme].noise for group, scheme in zip(groups, schemes, strict=True))


def extra_cost(groups: Sequence[Group], schemes: Sequence[Scheme]) -> float:
    """Bytes that the schemes cost more than the assigned ones, see `Group.extra_cost`."""
    return math.fsum(group.extra_cost(scheme) for group, scheme in zip(groups, schemes, strict=True))


def cheapest(
    groups: Sequence[Group],
    *,
    target: str | Target,
    min_sqnr: float | None = None,
    max_float_groups: int | None = None,
) -> Plan:
    """The cheapest schemes with a predicted SQNR of `min_sqnr` dB, or, with at most so many float groups, the best.

    min_sqnr: the extra cost is at most FACTOR times the smallest possible one; where no choice meets it, the one with
    the least noise is taken. max_float_groups: counts groups that leave their assigned scheme for float; no other
    scheme changes. Whatever comes out passes `engines.group_faults` if the assigned schemes do. Deterministic.
    """
    best: tuple[float, ...] | None = None
    schemes: tuple[Scheme, ...] = ()
    quietest = math.inf
    for limited in restrictions(groups, target):
        least_noise = _least_noise(limited)
        quietest = min(quietest, noise_of(groups, least_noise))
        if min_sqnr is not None:
            found = _covering(limited, 10 ** (-min_sqnr / 10))
            short = noise_of(groups, least_noise) if found is None else 0.0
            found = found or least_noise
            rank: tuple[float, ...] = (short, extra_cost(groups, found), noise_of(groups, found))
        else:
            found = _fewest(limited, max_float_groups or 0)
            if found is None:
                continue
            rank = (0.0, noise_of(groups, found), extra_cost(groups, found))
        if best is None or rank < best:
            best, schemes = rank, tuple(found)
    return Plan(tuple(groups), schemes, min_sqnr, decibels(quietest))


def restrictions(groups: Sequence[Group], target: str | Target) -> Iterator[list[Group]]:
    """The groups with fewer choices, of which every combination is legal; together they hold what is worth trying.

    First without the choices that break a rule when no other group changes. Some of those, floats of the vision tower,
    are legal where the whole tower is float: second.
    """
    assigned = _of_site(groups, [group.assigned for group in groups])
    alone, coupled = [], set()
    for group in groups:
        legal = {}
        for scheme, choice in group.choices.items():
            if scheme == group.assigned or not group_faults(target, assigned | dict.fromkeys(group.sites, scheme)):
                legal[scheme] = choice
            elif scheme == Scheme.FLOAT:
                coupled.add(_tower(group))
        alone.append(replace(group, choices=legal))
    yield alone
    inside = [group for group in groups if _tower(group) in coupled]
    if inside and all(Scheme.FLOAT in group.choices for group in inside):
        floats = {group.name: replace(group, choices={Scheme.FLOAT: group.choices[Scheme.FLOAT]}) for group in inside}
        yield [floats.get(group.name, group) for group in alone]


def _covering(groups: Sequence[Group], most_noise: float) -> list[Scheme] | None:
    """Schemes with at most so much noise at little extra cost, or None where there are none.

    A knapsack to be covered, with several choices per item. Greedy by noise removed per cost, along each group's convex
    hull, costs at most the relaxed optimum and one step more; so with steps no larger than the largest of the optimum,
    which is found by trying them all, at most twice the optimum.
    """
    best: list[Scheme] | None = None
    for largest in sorted({group.extra_cost(scheme) for group in groups for scheme in group.choices}):
        found = _greedy(groups, most_noise, largest)
        if found is None:
            continue
        found = _cleaned(groups, found, most_noise)
        if best is None or _rank(groups, found) < _rank(groups, best):
            best = found
    return best


def _greedy(groups: Sequence[Group], most_noise: float, largest: float) -> list[Scheme] | None:
    """The first of a row of better and better choices with at most so much noise; no choice dearer than `largest`."""
    schemes = [_start(group) for group in groups]
    steps = []
    for number, group in enumerate(groups):
        for efficiency, scheme in _hull(group, largest):
            steps.append((-efficiency, group.name, number, scheme))
    if noise_of(groups, schemes) <= most_noise:
        return schemes
    for _, _, number, scheme in sorted(steps, key=lambda step: step[:2]):  # stable: a group's steps stay in order
        schemes[number] = scheme
        if noise_of(groups, schemes) <= most_noise:
            return schemes
    return None


def _hull(group: Group, largest: float) -> list[tuple[float, Scheme]]:
    """(noise removed per cost, scheme): steps from the start along the lower convex hull of cost and noise."""
    now = _start(group)
    steps: list[tuple[float, Scheme]] = []
    while True:
        ahead = [
            (_efficiency(group, now, scheme), -group.extra_cost(scheme), str(scheme), scheme)
            for scheme, choice in group.choices.items()
            if choice.noise < group.choices[now].noise and group.extra_cost(now) <= group.extra_cost(scheme) <= largest
        ]
        if not ahead:
            return steps
        efficiency, *_, now = max(ahead)
        steps.append((min([efficiency, *(step[0] for step in steps)]), now))  # falling, whatever floats do


def _efficiency(group: Group, now: Scheme, scheme: Scheme) -> float:
    cost = group.extra_cost(scheme) - group.extra_cost(now)
    return (group.choices[now].noise - group.choices[scheme].noise) / cost if cost > 0 else math.inf


def _cleaned(groups: Sequence[Group], schemes: Sequence[Scheme], most_noise: float) -> list[Scheme]:
    """Takes back what turned out unnecessary, the dearest first."""
    kept = list(schemes)
    order = sorted(range(len(groups)), key=lambda it: (-groups[it].extra_cost(kept[it]), groups[it].name))
    for number in order:
        group, before = groups[number], kept[number]
        cheaper = [scheme for scheme in group.choices if group.extra_cost(scheme) < group.extra_cost(before)]
        for scheme in sorted(cheaper, key=lambda it: (group.extra_cost(it), group.choices[it].noise)):
            kept[number] = scheme
            if noise_of(groups, kept) <= most_noise:
                break
            kept[number] = before
    return kept


def _fewest(groups: Sequence[Group], most: int) -> list[Scheme] | None:
    """Float for those groups, at most so many, that gain most by it; None where more have to be float already."""
    schemes = [_start(group) for group in groups]
    left = most - sum(scheme != group.assigned for group, scheme in zip(groups, schemes, strict=True))
    if left < 0:
        return None
    gains = [
        (group.choices[scheme].noise - group.choices[Scheme.FLOAT].noise, number)
        for number, (group, scheme) in enumerate(zip(groups, schemes, strict=True))
        if Scheme.FLOAT in group.choices and scheme != Scheme.FLOAT
    ]
    for gain, number in sorted(gains, key=lambda it: (-it[0], groups[it[1]].name))[:left]:
        if gain > 0:
            schemes[number] = Scheme.FLOAT
    return schemes


def _least_noise(groups: Sequence[Group]) -> list[Scheme]:
    return [
        min(group.choices, key=lambda it: (group.choices[it].noise, group.extra_cost(it), str(it))) for group in groups
    ]


def _start(group: Group) -> Scheme:
    """The assigned scheme; where that is no choice, the one that is."""
    if group.assigned in group.choices:
        return group.assigned
    return min(group.choices, key=lambda it: (group.extra_cost(it), group.choices[it].noise))


def _rank(groups: Sequence[Group], schemes: Sequence[Scheme]) -> tuple[float, float]:
    return extra_cost(groups, schemes), noise_of(groups, schemes)


def _of_site(groups: Sequence[Group], schemes: Sequence[Scheme]) -> dict[str, Scheme]:
    return {site: scheme for group, scheme in zip(groups, schemes, strict=True) for site in group.sites}


def _tower(group: Group) -> str:
    """ "visual" or "model": whole parts that rules are about."""
    return group.name.partition(".")[0]


def _told(names: Sequence[str], scheme: Scheme) -> str:
    what = "stay float" if scheme == Scheme.FLOAT else f"become {scheme}"
    if len(names) == 1:
        what = "stays float" if scheme == Scheme.FLOAT else f"becomes {scheme}"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} group{'s' * (len(names) > 1)} {what}: {', '.join(names[:NAMED])}{more}"


def _short(group: Group) -> list[str]:
    """Names of the members, all but the first without what they share with it."""
    return [group.name, *(site.rpartition(".")[2] for site in group.sites[1:])]
