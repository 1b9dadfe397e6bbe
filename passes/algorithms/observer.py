"""Observers: per-channel ranges and moments of all rows, and a bounded, evenly spread selection of rows.

A row is one token's activation vector. Which rows of a sample are kept depends only on the sample shapes, never on
values or on which process runs the sample.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlqc.errors import Fault, UserError
from vlqc.ir.execution import Call, first_tensor
from vlqc.ir.observation import MODALITIES, ChannelRange, Observation, modality_of_rows, of_images
from vlqc.ir.stage import Stage
from vlqc.ir.tensor_digest import digest

IMAGE = MODALITIES.index("image")
MAX_MAGNITUDE = 1e15  # of activations: sums of squares of such values fit into float32; real ones end near 1e5
ALL_ROWS = -1  # in place of the number of rows: positions are those in the stage's output
ROWS_PER_STEP = 1024  # rows reduced at a time: bounds the temporaries, whatever the sample


def require_observation(stage: Stage, source: str, pass_name: str) -> Observation:
    """Returns the observation at a node; UserError if the pass `pass_name` runs before insert-observers, or if no row
    of any sample reaches the node."""
    observation = stage.observations.get(source)
    if observation is not None and observation.is_empty:
        why = f"no row of any sample reaches %{source} of {stage.name}"
        fix = "add samples, or choose a scheme with dynamic inputs"
        raise UserError(Fault(f"{pass_name} needs observations", stage.name, why, fix))
    if observation is None or not observation.ranges:
        why = f"nothing was observed at %{source} of {stage.name}"
        raise UserError(Fault(f"{pass_name} needs observations", "--pipeline", why, "put insert-observers before it"))
    return observation


# ---- which rows are kept ---------------------------------------------------------------------------------------------


def split_evenly(total: int, parts: int) -> list[int]:
    """Splits `total` into `parts` integers that differ by at most one, evenly spread, the first among the largest."""
    ends = [-(-total * part // max(parts, 1)) for part in range(parts + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def plan_quotas(rows_of_modality: Sequence[Sequence[int]], budget: int) -> list[dict[int, int]]:
    """Number of rows of each modality of every sample -> number of rows to keep, per sample and modality index.

    The quotas sum to at most `budget`.
    """
    kept = [0] * len(MODALITIES)
    quotas = []
    for available, keep in zip(rows_of_modality, split_evenly(budget, len(rows_of_modality)), strict=True):
        quota = sample_quota(available, keep, kept)
        for modality, rows in quota.items():
            kept[modality] += min(rows, available[modality])
        quotas.append(quota)
    return quotas


def sample_quota(available: Sequence[int], keep: int, kept: Sequence[int]) -> dict[int, int]:
    """Splits `keep` rows evenly over the modalities that a sample has; the remainder goes to the least kept so far.

    available: rows of each modality in the sample; kept: rows of each modality kept from earlier samples.
    """
    present = sorted((modality for modality, rows in enumerate(available) if rows), key=lambda modality: kept[modality])
    return dict(zip(present, split_evenly(keep, len(present)), strict=True))


def spread_positions(available: int, wanted: int) -> Tensor:
    """int64 [min(available, wanted)]: evenly spread positions, always including the first row.

    Language models carry their massive activations in the first row.
    """
    count = min(available, wanted)
    return torch.tensor([math.floor(position * available / count) for position in range(count)], dtype=torch.int64)


# ---- one sample ------------------------------------------------------------------------------------------------------


@dataclass
class SampleObservation:
    """Statistics of one sample at one node.

    sample: index of the sample; statistics: its ranges and kept rows; rows: number of rows, or ALL_ROWS; index: int64
    [T], positions of the kept rows; has_energy: whether the rows of the node are those of the stage's output, or some
    of them. A linear layer before a pooling operation has more, so its rows have no output energy of their own.
    """

    sample: int
    statistics: Observation
    rows: int
    index: Tensor
    has_energy: bool = False


@dataclass
class Observer:
    """Records the inputs of one site, sample by sample; called with (input [..., K], call) from a forward hook.

    site, where: named in errors; quota_per_sample: rows to keep, per sample index and modality index; merge_early:
    whether this process runs the first samples. It can then add up their ranges at once, which saves memory, without
    changing the order of summation.
    """

    site: str
    where: str
    quota_per_sample: Mapping[int, Mapping[int, int]]
    merge_early: bool

    def __post_init__(self) -> None:
        self.samples: list[SampleObservation] = []

    def __call__(self, value: Tensor, call: Call) -> None:
        check_magnitude(value, f"the input of {self.site}", self.where, call.sample)
        statistics, index = observe_rows(value.detach().cpu(), call.modality, self.quota_per_sample[call.sample])
        rows = value.numel() // value.shape[-1]
        if call.rows is not None and len(call.rows) == rows:
            rows, index = ALL_ROWS, call.rows[index]
        self.samples.append(SampleObservation(call.sample, statistics, rows, index))
        if self.merge_early and len(self.samples) > 1:
            add_ranges(self.samples[0].statistics, statistics)
            statistics.ranges.clear()

    def samples_with_energy(self, energies: Mapping[int, Tensor]) -> list[SampleObservation]:
        """Returns the samples with `kept_energy` set; energies: per sample index the `row_energy` of the output."""
        for sample in self.samples:
            energy = energies[sample.sample]
            if sample.rows in (ALL_ROWS, len(energy)):
                sample.has_energy, sample.statistics.kept_energy = True, energy[sample.index]
        return self.samples


def check_magnitude(value: Tensor, what: str, where: str, sample: int) -> None:
    """Raises UserError if a value is not finite or exceeds MAX_MAGNITUDE, where squares overflow float32."""
    smallest, largest = (float(end) for end in torch.aminmax(value.detach())) if value.numel() else (0.0, 0.0)
    if -MAX_MAGNITUDE <= smallest <= largest <= MAX_MAGNITUDE:
        return
    finite = math.isfinite(smallest) and math.isfinite(largest)
    problem = f"reaches {largest if largest > -smallest else smallest:.3g}" if finite else "contains NaN or Inf"
    why = f"weights, rms_norm_eps or the sample produce values beyond {MAX_MAGNITUDE:g}, too large for statistics"
    fix = "run the float model on this sample; repair the checkpoint, or leave the sample out"
    raise UserError(Fault(f"{what} {problem} in sample {sample}", where, why, fix))


def observe_rows(value: Tensor, modality: Tensor | None, quota: Mapping[int, int]) -> tuple[Observation, Tensor]:
    """Statistics of one sample's rows, value [..., K], and the positions of its kept rows, int64 [T].

    modality: int8 [rows], modality index of each row of the stage, -1 for padding, which is ignored (see `ir.Call`), or
    None; `modality_of_rows` applies. quota: rows to keep per modality index.
    """
    rows = value.reshape(-1, value.shape[-1]).float()
    if (modality := modality_of_rows(modality, rows.shape[0])) is None:
        modality, quota = of_images(rows.shape[0]), {IMAGE: sum(quota.values())}
    statistics, chosen = Observation(rows.shape[1]), []
    for number, count in quota.items():
        positions = (modality == number).nonzero().flatten()
        if len(positions):
            members = rows if len(positions) == len(rows) else rows[positions]
            statistics.ranges[MODALITIES[number]] = channel_range(members)
        chosen.append(positions[spread_positions(len(positions), count)])
    index = torch.cat([torch.empty(0, dtype=torch.int64), *chosen])
    statistics.kept, statistics.kept_modality = rows[index], modality[index]
    return statistics, index


def channel_range(rows: Tensor) -> ChannelRange:
    """Per-channel statistics of rows float32 [T, K], ROWS_PER_STEP rows at a time."""
    total = ChannelRange.empty(rows.shape[1])
    for part in torch.split(rows, ROWS_PER_STEP):
        total = ChannelRange(
            total.rows + part.shape[0],
            torch.minimum(total.minimum, part.amin(0)),
            torch.maximum(total.maximum, part.amax(0)),
            total.sum + part.sum(0),  # each part in float32, which is several times faster; the total in float64
            total.sum_of_squares + part.square().sum(0),
        )
    return total


def row_energy(output: Any) -> Tensor:
    """Mean square of every row that a stage returned, float32 [rows]."""
    return first_tensor(output).float().square().mean(-1).flatten().cpu()


# ---- all samples -----------------------------------------------------------------------------------------------------


def add_ranges(total: Observation, other: Observation) -> None:
    """Adds the ranges and moments of `other` to `total`, in place."""
    for name, more in other.ranges.items():
        known = total.ranges.get(name) or ChannelRange.empty(total.channels)
        total.ranges[name] = ChannelRange(
            known.rows + more.rows,
            torch.minimum(known.minimum, more.minimum),
            torch.maximum(known.maximum, more.maximum),
            known.sum + more.sum,
            known.sum_of_squares + more.sum_of_squares,
        )


def merge_samples(observation: Observation, samples: Sequence[SampleObservation], count: int) -> Observation:
    """Merges samples, in order, into an empty observation. Energies are kept only if all `count` samples have them."""
    for sample in samples:
        add_ranges(observation, sample.statistics)
    parts = [sample.statistics for sample in samples]
    observation.kept = torch.cat([torch.empty(0, observation.channels), *(part.kept for part in parts)])
    observation.kept_modality = torch.cat([observation.kept_modality, *(part.kept_modality for part in parts)])
    if len(samples) == count and all(sample.has_energy for sample in samples):
        observation.kept_energy = torch.cat([observation.kept_energy, *(part.kept_energy for part in parts)])
    observation.samples = len(samples)
    return observation


def observation_digest(observation: Observation | None) -> str | None:
    """A digest of everything that an observation holds; None for None."""
    if observation is None:
        return None
    spans = observation.ranges.values()
    statistics = [part for span in spans for part in (span.minimum, span.maximum, span.sum, span.sum_of_squares)]
    rows = [(name, span.rows) for name, span in observation.ranges.items()]
    return f"{rows} {digest(*statistics, observation.kept, observation.kept_modality, observation.energy())}"
