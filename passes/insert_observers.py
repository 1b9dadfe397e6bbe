"""insert-observers: what reaches each site, measured in the stage's one run over the samples."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlqc.ir import MODALITIES, Call, ChannelRange, Observation, Stage, observe
from vlqc.pipeline import Pass

IMAGE = MODALITIES.index("image")
ROWS_PER_STEP = 1024  # rows reduced at a time: bounds the temporaries, whatever the sample


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Puts an observer at the input of every group of sites and runs the stage once, which fills them.

    tokens: how many rows are kept per observer for later searches; megabytes: bound of one observer's kept rows.
    Ranges and moments are exact over all rows, whatever the bounds.
    """

    name: ClassVar[str] = "insert-observers"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "observe the inputs of all sites while every sample runs through the stage once"

    tokens: int = 4096
    megabytes: int = 64

    def run(self, stage: Stage) -> bool:
        watch: dict[str, Callable[[Tensor, Call], None]] = {}
        for source, members in stage.groups().items():
            node = stage.node(source)
            if not any(user.target is observe for user in node.users):
                with stage.graph.inserting_after(node):
                    stage.graph.call_function(observe, (node,)).meta.update(node.meta)
            channels = members[0].shape[1]
            budget = max(1, min(self.tokens, self.megabytes * 2**20 // (4 * channels)))
            stage.observations[source] = observation = Observation(channels)
            watch[members[0].target] = _filler(observation, max(1, budget // max(1, len(stage.calls))))
        stage.run(watch)
        return True


def _filler(observation: Observation, rows_per_sample: int) -> Callable[[Tensor, Call], None]:
    def fill(value: Tensor, call: Call) -> None:
        add_rows(observation, value.detach(), call.modality, rows_per_sample)

    return fill


def add_rows(observation: Observation, value: Tensor, modality: Tensor | None, keep: int) -> None:
    """Adds one sample's rows, value [..., K], to an observation; at most `keep` of them stay, evenly spread.

    modality int8 [rows] says what each row is (see ir.Call); rows of padding count nowhere. Where the number of rows
    does not fit the modality (pooled tokens), and where it is None, all rows are image tokens.
    """
    rows = value.reshape(-1, value.shape[-1]).float()
    if modality is None or modality.numel() != rows.shape[0]:
        modality = torch.full((rows.shape[0],), IMAGE, dtype=torch.int8)
    present = [number for number in range(len(MODALITIES)) if bool((modality == number).any())]
    chosen = []
    for number in present:
        where = (modality == number).nonzero().flatten()
        seen = observation.ranges.get(MODALITIES[number]) or ChannelRange.empty(observation.channels)
        observation.ranges[MODALITIES[number]] = _extended(seen, rows if len(where) == len(rows) else rows[where])
        chosen.append(where[_spread(len(where), keep // len(present))])
    if chosen:
        index = torch.cat(chosen)
        observation.kept = torch.cat([observation.kept.reshape(-1, observation.channels), rows[index]])
        observation.kept_modality = torch.cat([observation.kept_modality, modality[index]])


def _extended(seen: ChannelRange, rows: Tensor) -> ChannelRange:
    for part in rows.split(ROWS_PER_STEP):
        seen = ChannelRange(
            seen.rows + part.shape[0],
            torch.minimum(seen.minimum, part.amin(0)),
            torch.maximum(seen.maximum, part.amax(0)),
            seen.sum + part.sum(0, dtype=torch.float64),
            seen.sum_of_squares + part.square().sum(0, dtype=torch.float64),
        )
    return seen


def _spread(available: int, wanted: int) -> Tensor:
    """int64 [min(available, max(wanted, 1))]: evenly spread positions, the first row always among them.

    The first row is where language models carry their massive activations.
    """
    count = min(available, max(wanted, 1))
    return torch.tensor([math.floor(position * available / count) for position in range(count)], dtype=torch.int64)
