"""What passed one point of a stage's graph: ranges and moments, a bounded choice of rows, what each row counts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

MODALITIES = ("text", "image")
MASSIVE = 30.0  # times the median energy: such a token is a class of its own, as it carries what others attend to
GOLDEN_RATIO = (5**0.5 - 1) / 2
MASSIVE_SHARE = 0.1  # of the weight of its modality
FAINT = 0.1  # of the median energy: fainter tokens count as if they had that much


@dataclass
class ChannelRange:
    """Running statistics per channel over the rows of one modality; all tensors float32 [K], sums in float64."""

    rows: int
    minimum: Tensor
    maximum: Tensor
    sum: Tensor
    sum_of_squares: Tensor

    @classmethod
    def empty(cls, channels: int) -> "ChannelRange":
        infinite = torch.full((channels,), torch.inf)
        zero = torch.zeros(channels, dtype=torch.float64)
        return cls(0, infinite, -infinite, zero, zero.clone())


@dataclass
class Observation:
    """What passed one point of the graph: exact ranges and moments of every row, and a bounded choice of rows.

    ranges: per modality name, over all rows; a modality that never appeared is absent.
    kept: float32 [T, K], an evenly spread choice of at most the observer's budget; kept_modality: int8 [T];
    kept_energy: float32 [T], mean square of what the stage returned for the row; empty before it has: counts as 1;
    balance: whether modalities count the same, however many rows each has; samples: how many were seen.
    """

    channels: int
    ranges: dict[str, ChannelRange] = field(default_factory=dict)
    kept: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    kept_modality: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int8))
    kept_energy: Tensor = field(default_factory=lambda: torch.empty(0))
    balance: bool = True
    samples: int = 0

    @property
    def rows(self) -> int:
        return sum(seen.rows for seen in self.ranges.values())

    def minimum(self) -> Tensor:
        """float32 [K], over all modalities."""
        return torch.stack([seen.minimum for seen in self.ranges.values()]).amin(0)

    def maximum(self) -> Tensor:
        """float32 [K], over all modalities."""
        return torch.stack([seen.maximum for seen in self.ranges.values()]).amax(0)

    def energy(self) -> Tensor:
        """float32 [T] of the kept rows."""
        known = self.kept_energy.shape[0] == self.kept.shape[0]
        return self.kept_energy if known else torch.ones(self.kept.shape[0])

    def row_weight(self, index: Tensor | None = None) -> Tensor:
        """float64 [T], sums to 1: how much an error in each kept row counts; index int64: in that choice of them.

        In a choice every class that is in it counts as it does among all kept rows, however many of it were chosen.
        """
        modality, energy = self.kept_modality, self.energy()
        rows = {MODALITIES.index(name): seen.rows for name, seen in self.ranges.items()}
        weight = row_weights(modality, energy, balance=self.balance, rows=rows)
        if index is None:
            return weight
        chosen = torch.zeros(index.shape[0], dtype=torch.float64)
        for members in classes(modality, energy):
            mine = torch.isin(index, members)
            part = weight[index[mine]]
            chosen[mine] = part / part.sum() * weight[members].sum()
        return chosen / chosen.sum()

    def representative(self, most: int) -> Tensor:
        """int64 [<= most]: positions of kept rows, ascending, spread over all of every class of rows.

        Rows come sample by sample, text before image: equal strides could meet only one class, or only first rows.
        Multiples of the golden ratio, modulo 1, have no period to fall in with.
        """
        members = classes(self.kept_modality, self.energy())
        chosen = []
        for where in members:
            order = (torch.arange(len(where), dtype=torch.float64) * GOLDEN_RATIO).frac().argsort()
            chosen.append(where[order[: max(1, most // len(members))]])
        return torch.cat([torch.empty(0, dtype=torch.int64), *chosen]).sort().values

    def second_moment(self) -> Tensor:
        """float32 [K]: mean of x^2 over the kept rows, weighted as `row_weight` says."""
        return torch.stack([part.square().double().T @ weight for part, weight in self._weighted()]).sum(0).float()

    def _weighted(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Kept rows and their weights, few at a time."""
        yield from zip(torch.split(self.kept, 256), torch.split(self.row_weight(), 256), strict=True)

    def rescaled(self, divisor: Tensor) -> "Observation":
        """The same observation after every row was divided by `divisor` float32 [K] > 0 (a fold is linear)."""
        ranges = {
            name: ChannelRange(
                seen.rows,
                seen.minimum / divisor,
                seen.maximum / divisor,
                seen.sum / divisor,
                seen.sum_of_squares / divisor.double() ** 2,
            )
            for name, seen in self.ranges.items()
        }
        return replace(self, ranges=ranges, kept=self.kept / divisor)

    def shifted(self, middle: Tensor) -> "Observation":
        """The same observation after `middle` float32 [K] was subtracted from every row."""
        # A channel that hardly varies leaves a difference of nearly equal numbers, which rounding can push below zero.
        ranges = {
            name: ChannelRange(
                seen.rows,
                seen.minimum - middle,
                seen.maximum - middle,
                seen.sum - seen.rows * middle.double(),
                (seen.sum_of_squares - 2 * middle.double() * seen.sum + seen.rows * middle.double() ** 2).clamp(min=0),
            )
            for name, seen in self.ranges.items()
        }
        return replace(self, ranges=ranges, kept=self.kept - middle)


def classes(modality: Tensor, energy: Tensor) -> list[Tensor]:
    """int8 [T], float [T] -> positions int64 of the rows of each class: per modality the ordinary and the massive."""
    found = []
    for number in sorted(set(modality.tolist())):
        members = (modality == number).nonzero().flatten()
        massive = energy[members] > MASSIVE * energy[members].median()
        found += [members[~massive], members[massive]]
    return [members for members in found if len(members)]


def row_weights(
    modality: Tensor, energy: Tensor, *, balance: bool = True, rows: Mapping[int, int] | None = None
) -> Tensor:
    """How much an error in each row counts: modality int8 [T], energy float [T] -> float64 [T] that sums to 1.

    energy: mean square of what the stage returns for the row. A norm divides every token by its own size before
    anything reads it, so what counts is the error relative to the row's energy. Rows far above their modality's median
    (massive tokens, to which all others attend) share MASSIVE_SHARE of its weight: relative to themselves they are few
    and would be clipped away. balance: modalities count the same, however many rows each has; else by their rows, which
    may be given per modality where these are a choice of more.
    """
    weights = torch.zeros(modality.shape[0], dtype=torch.float64)
    present = sorted(set(modality.tolist()))
    counts = {number: (rows or {}).get(number, int((modality == number).sum())) for number in present}
    for number in present:
        members = (modality == number).nonzero().flatten()
        parts = classes(modality[members], energy[members])
        share = 1 / len(present) if balance else counts[number] / sum(counts.values())
        faintest = FAINT * energy[members].double().median().clamp(min=torch.finfo(torch.float32).tiny)
        for mine, part in zip(parts, (1 - MASSIVE_SHARE, MASSIVE_SHARE) if len(parts) == 2 else (1.0,), strict=True):
            relative = 1 / torch.maximum(energy[members[mine]].double(), faintest)
            weights[members[mine]] = relative / relative.sum() * (share * part)
    return weights


def noise_to_signal(reference: Tensor, other: Tensor) -> float:
    """float32 [rows, K] twice -> mean over rows of the difference's power relative to the row's own.

    A norm divides every token by its size before anything reads it, so of a token 10 times as large 100 times the noise
    counts the same; and as all tokens leave the last norm alike, they all count the same.
    """
    signal = reference.double().square().mean(1)
    noise = (other.double() - reference.double()).square().mean(1)
    faintest = (FAINT * signal.median()).clamp(min=torch.finfo(torch.float32).tiny)
    return float((noise / torch.maximum(signal, faintest)).mean())
