"""Statistics of the values at one node of a stage's graph, and the weight of each row's error.

A row is the activation vector of one token. Notation: T kept rows, K channels.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

MODALITIES = ("text", "image", "video")
MASSIVE = 30.0  # tokens with more than this multiple of the median energy ("massive activations") are a separate class
MASSIVE_SHARE = 0.1  # of the weight of their modality
MIN_RELATIVE_ENERGY = 0.1  # of the median energy: lower bound of a token's energy in weights and noise ratios
GOLDEN_RATIO = (5**0.5 - 1) / 2
ROWS_PER_CHUNK = 256


@dataclass
class ChannelRange:
    """Statistics per channel over the rows of one modality: minimum and maximum float32 [K], sums float64 [K]."""

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
    """Exact ranges and moments over all rows at one node, and a bounded selection of rows.

    ranges: per modality name; modalities without rows are absent.
    kept: float32 [T, K], evenly spread rows, at most the observer's budget.
    kept_modality: int8 [T], index into `MODALITIES`.
    kept_energy: float32 [T], mean square of the stage's output for the row; empty if unknown, which counts as 1.
    balance: weight modalities equally, regardless of how many rows each has.
    samples: number of samples observed.
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
        return sum(span.rows for span in self.ranges.values())

    @property
    def is_empty(self) -> bool:
        """Whether samples were observed, but no row of theirs reaches the node, as with an expert never chosen."""
        return self.samples > 0 and not self.rows

    def minimum(self) -> Tensor:
        """float32 [K], over all modalities."""
        return torch.stack([span.minimum for span in self.ranges.values()]).amin(0)

    def maximum(self) -> Tensor:
        """float32 [K], over all modalities."""
        return torch.stack([span.maximum for span in self.ranges.values()]).amax(0)

    def energy(self) -> Tensor:
        """float32 [T] of the kept rows."""
        known = self.kept_energy.shape[0] == self.kept.shape[0]
        return self.kept_energy if known else torch.ones(self.kept.shape[0])

    def row_weight(self, index: Tensor | None = None) -> Tensor:
        """Weight of an error in each kept row, float64 [T] with sum 1; see `row_weights`.

        index: int64, positions of a selection of the kept rows. Every class of rows in the selection has the weight
        that it has among all kept rows, regardless of how many of its rows are selected.
        """
        modality, energy = self.kept_modality, self.energy()
        rows = {MODALITIES.index(name): span.rows for name, span in self.ranges.items()}
        weight = row_weights(modality, energy, balance=self.balance, rows=rows)
        if index is None:
            return weight
        selected = torch.zeros(index.shape[0], dtype=torch.float64)
        for members in row_classes(modality, energy):
            in_class = torch.isin(index, members)
            part = weight[index[in_class]]
            selected[in_class] = part / part.sum() * weight[members].sum()
        return selected / selected.sum()

    def representative(self, max_rows: int) -> Tensor:
        """Ascending positions of at most `max_rows` kept rows, int64, spread over every class of rows.

        Rows are stored sample by sample, modality by modality, so a constant stride could select a single class or only
        first rows. Multiples of the golden ratio modulo 1 are equidistributed without a period.
        """
        classes = row_classes(self.kept_modality, self.energy())
        selected = []
        for members in classes:
            order = (torch.arange(len(members), dtype=torch.float64) * GOLDEN_RATIO).frac().argsort()
            selected.append(members[order[: max(1, max_rows // len(classes))]])
        return torch.cat([torch.empty(0, dtype=torch.int64), *selected]).sort().values

    def second_moment(self) -> Tensor:
        """Mean of x^2 over the kept rows, weighted by `row_weight`, float32 [K]."""
        return torch.stack([part.square().double().T @ weight for part, weight in self._weighted()]).sum(0).float()

    def _weighted(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields chunks of the kept rows and their weights."""
        weights = self.row_weight()
        yield from zip(torch.split(self.kept, ROWS_PER_CHUNK), torch.split(weights, ROWS_PER_CHUNK), strict=True)

    def rescaled(self, divisor: Tensor) -> "Observation":
        """The observation after every row is divided by `divisor` float32 [K] > 0, as by a fold."""
        ranges = {
            name: ChannelRange(
                span.rows,
                span.minimum / divisor,
                span.maximum / divisor,
                span.sum / divisor,
                span.sum_of_squares / divisor.double() ** 2,
            )
            for name, span in self.ranges.items()
        }
        return replace(self, ranges=ranges, kept=self.kept / divisor)

    def shifted(self, offset: Tensor) -> "Observation":
        """The observation after `offset` float32 [K] is subtracted from every row."""
        # For a channel that hardly varies, cancellation can make the sum of squares slightly negative.
        ranges = {
            name: ChannelRange(
                span.rows,
                span.minimum - offset,
                span.maximum - offset,
                span.sum - span.rows * offset.double(),
                (span.sum_of_squares - 2 * offset.double() * span.sum + span.rows * offset.double() ** 2).clamp(min=0),
            )
            for name, span in self.ranges.items()
        }
        return replace(self, ranges=ranges, kept=self.kept - offset)


def modality_of_rows(modality: Tensor | None, rows: int) -> Tensor | None:
    """Modality index of each of so many rows inside a stage, int8 [rows]; None if all are rows of images.

    modality: of the rows of the stage, see `Call`. In the vision tower, mergers join adjacent patches of one image or
    video to one row. Other rows that are not those of the stage are image features.
    """
    if modality is None or modality.numel() == rows:
        return modality
    is_vision = bool((modality >= MODALITIES.index("image")).all())
    return modality[:: modality.numel() // rows] if is_vision and rows and modality.numel() % rows == 0 else None


def of_images(rows: int) -> Tensor:
    """Modality index of so many rows of images, int8 [rows]."""
    return torch.full((rows,), MODALITIES.index("image"), dtype=torch.int8)


def row_classes(modality: Tensor, energy: Tensor) -> list[Tensor]:
    """Positions int64 of the rows of each non-empty class: per modality the ordinary and the massive rows.

    modality: int8 [T]; energy: float [T].
    """
    classes = []
    for number in sorted(set(modality.tolist())):
        members = (modality == number).nonzero().flatten()
        massive = energy[members] > MASSIVE * energy[members].median()
        classes += [members[~massive], members[massive]]
    return [members for members in classes if len(members)]


def row_weights(
    modality: Tensor, energy: Tensor, *, balance: bool = True, rows: Mapping[int, int] | None = None
) -> Tensor:
    """Weight of an error in each row, float64 [T] with sum 1.

    modality: int8 [T].
    energy: float [T], mean square of the stage's output for the row. The next norm divides every token by its own
        magnitude, so the weight is inversely proportional to the energy. Massive rows share MASSIVE_SHARE of the weight
        of their modality: they are few, and by their relative error alone they would be clipped.
    balance: weight modalities equally; else by their number of rows.
    rows: number of rows per modality, if the rows are a selection; default: those in `modality`.
    """
    weights = torch.zeros(modality.shape[0], dtype=torch.float64)
    present = sorted(set(modality.tolist()))
    counts = {number: (rows or {}).get(number, int((modality == number).sum())) for number in present}
    for number in present:
        members = (modality == number).nonzero().flatten()
        classes = row_classes(modality[members], energy[members])
        share = 1 / len(present) if balance else counts[number] / sum(counts.values())
        smallest = MIN_RELATIVE_ENERGY * energy[members].double().median().clamp(min=torch.finfo(torch.float32).tiny)
        class_shares = (1 - MASSIVE_SHARE, MASSIVE_SHARE) if len(classes) == 2 else (1.0,)
        for positions, class_share in zip(classes, class_shares, strict=True):
            relative = 1 / torch.maximum(energy[members[positions]].double(), smallest)
            weights[members[positions]] = relative / relative.sum() * (share * class_share)
    return weights


def noise_to_signal(reference: Tensor, other: Tensor) -> float:
    """Mean over rows of the error's power relative to the row's own power; both float32 [rows, K].

    Each row counts relative to its own power, because the next norm divides every token by its magnitude.
    """
    signal = reference.double().square().mean(1)
    noise = (other.double() - reference.double()).square().mean(1)
    smallest = (MIN_RELATIVE_ENERGY * signal.median()).clamp(min=torch.finfo(torch.float32).tiny)
    return float((noise / torch.maximum(signal, smallest)).mean())
