"""insert-observers: what reaches each site, measured in the stage's one run over the samples."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlqc.errors import Fault, UserError
from vlqc.ir import MODALITIES, Call, ChannelRange, Observation, Stage, digest, observe
from vlqc.pipeline import Pass, require

IMAGE = MODALITIES.index("image")
ROWS_PER_STEP = 1024  # rows reduced at a time: bounds the temporaries, whatever the sample


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Puts an observer at the input of every group of sites and runs the stage once, which fills them.

    tokens: how many rows are kept per observer for later searches, at most; megabytes: bound of one observer's kept
    rows. Ranges and moments are exact over all rows, whatever the bounds.
    """

    name: ClassVar[str] = "insert-observers"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "observe the inputs of all sites while every sample runs through the stage once"

    tokens: int = 4096
    megabytes: int = 64

    def __post_init__(self) -> None:
        require(self.tokens >= 1 and self.megabytes >= 1, "tokens and megabytes must be 1 or more")

    def run(self, stage: Stage) -> bool:
        before, inserted = dict(stage.observations), False
        watch: dict[str, Callable[[Tensor, Call], None]] = {}
        for source, members in stage.groups().items():
            node = stage.node(source)
            if not any(user.target is observe for user in node.users):
                with stage.graph.inserting_after(node):
                    stage.graph.call_function(observe, (node,)).meta.update(node.meta)
                inserted = True
            channels = members[0].shape[1]
            budget = max(1, min(self.tokens, self.megabytes * 2**20 // (4 * channels)))
            stage.observations[source] = observation = Observation(channels)
            shares = shared_out(budget, len(stage.calls))
            rows_of_sample = {call.sample: share for call, share in zip(stage.calls, shares, strict=True)}
            watch[members[0].target] = _filler(observation, rows_of_sample, members[0].name)
        stage.run(watch)
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


def _filler(observation: Observation, rows_of_sample: dict[int, int], site: str) -> Callable[[Tensor, Call], None]:
    def fill(value: Tensor, call: Call) -> None:
        if not bool(torch.isfinite(value).all()):
            why = "weights, rms_norm_eps or the sample make values that float32 cannot hold"
            what = f"NaN or Inf reaches {site} in sample {call.sample}"
            raise UserError(Fault(what, why=why, fix="check the float model on this sample"))
        add_rows(observation, value.detach().cpu(), call.modality, rows_of_sample[call.sample])

    return fill


def _marks(seen: Observation | None) -> str | None:
    if seen is None:
        return None
    statistics = [part for it in seen.ranges.values() for part in (it.minimum, it.maximum, it.sum, it.sum_of_squares)]
    rows = [(name, it.rows) for name, it in seen.ranges.items()]
    return f"{rows} {digest(*statistics, seen.kept, seen.kept_modality)}"


def add_rows(observation: Observation, value: Tensor, modality: Tensor | None, keep: int) -> None:
    """Adds one sample's rows, value [..., K], to an observation; at most `keep` of them stay, evenly spread.

    modality int8 [rows] says what each row is (see ir.Call); rows of padding count nowhere. Where the number of rows
    does not fit the modality (pooled tokens), and where it is None, all rows are image tokens. Modalities share `keep`
    equally; what is left over goes to the one of which least is kept so far.
    """
    rows = value.reshape(-1, value.shape[-1]).float()
    if modality is None or modality.numel() != rows.shape[0]:
        modality = torch.full((rows.shape[0],), IMAGE, dtype=torch.int8)
    present = [number for number in range(len(MODALITIES)) if bool((modality == number).any())]
    present.sort(key=lambda number: int((observation.kept_modality == number).sum()))
    chosen = []
    for number, share in zip(present, shared_out(keep, len(present)), strict=True):
        where = (modality == number).nonzero().flatten()
        seen = observation.ranges.get(MODALITIES[number]) or ChannelRange.empty(observation.channels)
        observation.ranges[MODALITIES[number]] = _extended(seen, rows if len(where) == len(rows) else rows[where])
        chosen.append(where[_spread(len(where), share)])
    if chosen:
        index = torch.cat(chosen)
        observation.kept = torch.cat([observation.kept.reshape(-1, observation.channels), rows[index]])
        observation.kept_modality = torch.cat([observation.kept_modality, modality[index]])


def _extended(seen: ChannelRange, rows: Tensor) -> ChannelRange:
    for part in torch.split(rows, ROWS_PER_STEP):
        seen = ChannelRange(
            seen.rows + part.shape[0],
            torch.minimum(seen.minimum, part.amin(0)),
            torch.maximum(seen.maximum, part.amax(0)),
            seen.sum + part.sum(0, dtype=torch.float64),
            seen.sum_of_squares + part.square().sum(0, dtype=torch.float64),
        )
    return seen


def _spread(available: int, wanted: int) -> Tensor:
    """int64 [min(available, wanted)]: evenly spread positions, the first row always among them if there is any.

    The first row is where language models carry their massive activations.
    """
    count = min(available, wanted)
    return torch.tensor([math.floor(position * available / count) for position in range(count)], dtype=torch.int64)
