"""insert-observers: what reaches each site, measured in the stage's one run over the samples."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlqc.errors import Fault, UserError
from vlqc.ir.execution import Call, first_tensor
from vlqc.ir.observation import MODALITIES, ChannelRange, Observation
from vlqc.ir.stage import Stage, observe
from vlqc.ir.tensor_digest import digest
from vlqc.pipeline.pass_api import Pass, require

IMAGE = MODALITIES.index("image")
LARGEST = 1e15  # of any activation: float32 holds sums of squares of such values; real ones end near 1e5
ROWS_PER_STEP = 1024  # rows reduced at a time: bounds the temporaries, whatever the sample


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Puts an observer at the input of every group of sites and runs the stage once, which fills them.

    tokens: how many rows are kept per observer for later searches, at most; megabytes: bound of one observer's kept
    rows; balance: whether errors in text and image tokens count the same, however many there are of each. Ranges and
    moments are exact over all rows, whatever the bounds.
    """

    name: ClassVar[str] = "insert-observers"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "observe the inputs of all sites while every sample runs through the stage once"

    tokens: int = 4096
    megabytes: int = 64
    balance: bool = True

    def __post_init__(self) -> None:
        require(self.tokens >= 1 and self.megabytes >= 1, "tokens and megabytes must be 1 or more")

    def run(self, stage: Stage) -> bool:
        before, inserted = dict(stage.observations), False
        watch: dict[str, Callable[[Tensor, Call], None]] = {}
        parts_of: dict[str, list[_Part]] = {}
        sample_shapes = stage.execution.sample_shapes
        for source, members in stage.groups().items():
            node = stage.node(source)
            if not any(user.target is observe for user in node.users):
                with stage.graph.inserting_after(node):
                    stage.graph.call_function(observe, (node,)).meta.update(node.meta)
                inserted = True
            channels = members[0].shape[1]
            budget = max(1, min(self.tokens, self.megabytes * 2**20 // (4 * channels)))
            planned = planned_shares([visit.rows_per_modality for visit in sample_shapes], budget)
            shares_of = {visit.sample: shares for visit, shares in zip(sample_shapes, planned, strict=True)}
            parts_of[source] = []
            where = f"{stage.name}, %{source}"
            watch[members[0].target] = _filler(
                parts_of[source], shares_of, members[0].name, where, stage.execution.process_group.is_rank0
            )
        stage.execution.forward(watch)
        for call, output in zip(stage.execution.calls, stage.execution.outputs, strict=True):
            _require_usable(first_tensor(output), f"the output of {stage.name}", stage.name, call.sample)
        energies = {
            call.sample: _energy(output)
            for call, output in zip(stage.execution.calls, stage.execution.outputs, strict=True)
        }
        for source, members in stage.groups().items():
            mine = [part.with_energy(energies) for part in parts_of.pop(source)]
            # In the order of the samples, whichever process had them: sums come out the same to the last bit. What
            # later passes derive (Gram matrices, histograms) they take from the kept rows: nothing larger travels.
            parts = [part for parts in stage.execution.process_group.all_gather(mine) for part in parts]
            stage.observations[source] = _joined(
                Observation(members[0].shape[1], balance=self.balance), parts, sample_shapes
            )
        now = stage.observations
        return inserted or any(_marks(before.get(source)) != _marks(seen) for source, seen in now.items())


def observed(stage: Stage, source: str, reader: str) -> Observation:
    """What was observed at a node. UserError where the pipeline runs the pass `reader` before anything was."""
    if source not in stage.observations or not stage.observations[source].ranges:
        why = f"nothing was observed at %{source} of {stage.name}"
        raise UserError(Fault(f"{reader} has nothing to go by", "--pipeline", why, "put insert-observers before it"))
    return stage.observations[source]


def shared_out(total: int, parts: int) -> list[int]:
    """`total` as a sum of `parts` numbers that differ by at most one, evenly spread, the first among the largest."""
    ends = [-(-total * part // max(parts, 1)) for part in range(parts + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def planned_shares(counts: Sequence[Sequence[int]], budget: int) -> list[dict[int, int]]:
    """Rows of each modality of every sample -> how many of them are to be kept, `budget` in all, modalities in order.

    Known before any sample runs, so it does not matter which process runs it.
    """
    kept = [0] * len(MODALITIES)
    planned = []
    for available, keep in zip(counts, shared_out(budget, len(counts)), strict=True):
        shares = _shares(available, keep, kept)
        for number, share in shares.items():
            kept[number] += min(share, available[number])
        planned.append(shares)
    return planned


def _shares(available: Sequence[int], keep: int, kept: Sequence[int]) -> dict[int, int]:
    """Modalities share `keep` equally; what is left over goes to the one of which least is kept so far, which is first.

    available, kept: rows of each modality. A sample without any row that counts keeps none.
    """
    present = sorted((number for number, rows in enumerate(available) if rows), key=lambda number: kept[number])
    return dict(zip(present, shared_out(keep, len(present)), strict=True))


@dataclass
class _Part:
    """What one sample showed at one node: statistics, how many rows there were, which of them are kept, int64 [T].

    matches: whether the stage returned as many rows; a linear in front of a pooling sees more than that.
    """

    sample: int
    seen: Observation
    rows: int
    index: Tensor
    matches: bool = False

    def with_energy(self, energies: Mapping[int, Tensor]) -> "_Part":
        """energies: per sample the mean square of every row that the stage returned, float32 [rows]."""
        energy = energies[self.sample]
        if self.rows == len(energy):
            self.matches, self.seen.kept_energy = True, energy[self.index]
        return self


def _filler(
    parts: list[_Part], shares_of: Mapping[int, Mapping[int, int]], site: str, where: str, first: bool
) -> Callable[[Tensor, Call], None]:
    """first: whether all samples before these are in `parts`. Their sums are then added up at once, to save memory."""

    def fill(value: Tensor, call: Call) -> None:
        _require_usable(value, f"the input of {site}", where, call.sample)
        seen, index = _observed_rows(value.detach().cpu(), call.modality, shares_of[call.sample])
        parts.append(_Part(call.sample, seen, value.numel() // value.shape[-1], index))
        if first and len(parts) > 1:
            _add_ranges(parts[0].seen, seen)
            seen.ranges.clear()

    return fill


def _require_usable(value: Tensor, what: str, where: str, sample: int) -> None:
    """UserError for values that are not finite, or so large that no statistics can be made of them."""
    least, most = (float(it) for it in torch.aminmax(value.detach())) if value.numel() else (0.0, 0.0)
    if -LARGEST <= least <= most <= LARGEST:
        return
    finite = math.isfinite(least) and math.isfinite(most)
    found = f"reaches {most if most > -least else least:.3g}" if finite else "holds NaN or Inf"
    why = f"weights, rms_norm_eps or the sample make values beyond {LARGEST:g}, of which nothing can be measured"
    fix = "run the float model on this sample; repair the checkpoint, or leave the sample out"
    raise UserError(Fault(f"{what} {found} in sample {sample}", where, why, fix))


def _joined(whole: Observation, parts: Sequence[_Part], sample_shapes: Sequence[object]) -> Observation:
    """`whole`, so far empty, with all samples' parts in their order; energies only where all rows have one."""
    for part in parts:
        _add_ranges(whole, part.seen)
    whole.kept = torch.cat([torch.empty(0, whole.channels), *(part.seen.kept for part in parts)])
    whole.kept_modality = torch.cat([whole.kept_modality, *(part.seen.kept_modality for part in parts)])
    if len(parts) == len(sample_shapes) and all(part.matches for part in parts):
        whole.kept_energy = torch.cat([whole.kept_energy, *(part.seen.kept_energy for part in parts)])
    whole.samples = len(parts)
    return whole


def _energy(output: Any) -> Tensor:
    """float32 [rows]: mean square of every row that a stage returned."""
    return first_tensor(output).float().square().mean(-1).flatten().cpu()


def _marks(seen: Observation | None) -> str | None:
    if seen is None:
        return None
    statistics = [part for it in seen.ranges.values() for part in (it.minimum, it.maximum, it.sum, it.sum_of_squares)]
    rows = [(name, it.rows) for name, it in seen.ranges.items()]
    return f"{rows} {digest(*statistics, seen.kept, seen.kept_modality, seen.energy())}"


def add_rows(observation: Observation, value: Tensor, modality: Tensor | None, keep: int) -> Tensor:
    """Adds one sample's rows, value [..., K], to an observation; at most `keep` of them stay, evenly spread.

    modality: as of ir.Call. Returns the positions of the kept rows, int64.
    """
    rows = value.numel() // value.shape[-1]
    available = _counts(modality, rows)
    kept = [int((observation.kept_modality == number).sum()) for number in range(len(MODALITIES))]
    seen, index = _observed_rows(value, modality, _shares(available, keep, kept))
    _add_ranges(observation, seen)
    observation.kept = torch.cat([observation.kept.reshape(-1, observation.channels), seen.kept])
    observation.kept_modality = torch.cat([observation.kept_modality, seen.kept_modality])
    return index


def _observed_rows(value: Tensor, modality: Tensor | None, shares: Mapping[int, int]) -> tuple[Observation, Tensor]:
    """One sample's rows, value [..., K], by themselves, of which `shares` are kept, and the positions of those, int64.

    modality int8 [rows] says what each row is (see ir.Call); rows of padding count nowhere. Where the number of rows
    does not fit the modality (pooled tokens), and where it is None, all rows are image tokens.
    """
    rows = value.reshape(-1, value.shape[-1]).float()
    if modality is None or modality.numel() != rows.shape[0]:
        modality, shares = torch.full((rows.shape[0],), IMAGE, dtype=torch.int8), {IMAGE: sum(shares.values())}
    seen, chosen = Observation(rows.shape[1]), []
    for number, share in shares.items():
        where = (modality == number).nonzero().flatten()
        if len(where):
            seen.ranges[MODALITIES[number]] = _range(rows if len(where) == len(rows) else rows[where])
        chosen.append(where[_spread(len(where), share)])
    index = torch.cat([torch.empty(0, dtype=torch.int64), *chosen])
    seen.kept, seen.kept_modality = rows[index], modality[index]
    return seen, index


def _counts(modality: Tensor | None, rows: int) -> list[int]:
    """How many rows of each modality there are, as `_observed_rows` takes them."""
    if modality is None or modality.numel() != rows:
        return [rows * (number == IMAGE) for number in range(len(MODALITIES))]
    return [int((modality == number).sum()) for number in range(len(MODALITIES))]


def _add_ranges(whole: Observation, part: Observation) -> None:
    for name, more in part.ranges.items():
        seen = whole.ranges.get(name) or ChannelRange.empty(whole.channels)
        whole.ranges[name] = ChannelRange(
            seen.rows + more.rows,
            torch.minimum(seen.minimum, more.minimum),
            torch.maximum(seen.maximum, more.maximum),
            seen.sum + more.sum,
            seen.sum_of_squares + more.sum_of_squares,
        )


def _range(rows: Tensor) -> ChannelRange:
    """Statistics of float32 [T, K], a bounded number of rows at a time."""
    seen = ChannelRange.empty(rows.shape[1])
    for part in torch.split(rows, ROWS_PER_STEP):
        seen = ChannelRange(
            seen.rows + part.shape[0],
            torch.minimum(seen.minimum, part.amin(0)),
            torch.maximum(seen.maximum, part.amax(0)),
            seen.sum + part.sum(0),  # of so few rows in float32, which is several times faster; all parts in float64
            seen.sum_of_squares + part.square().sum(0),
        )
    return seen


def _spread(available: int, wanted: int) -> Tensor:
    """int64 [min(available, wanted)]: evenly spread positions, the first row always among them if there is any.

    The first row is where language models carry their massive activations.
    """
    count = min(available, wanted)
    return torch.tensor([math.floor(position * available / count) for position in range(count)], dtype=torch.int64)
