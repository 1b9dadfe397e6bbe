"""Observations built sample by sample, as InsertObservers does for a whole stage."""

import torch
from torch import Tensor

from vlqc.ir.observation import MODALITIES, Observation
from vlqc.passes.algorithms.observer import IMAGE, add_ranges, observe_rows, sample_quota


def add_rows(observation: Observation, value: Tensor, modality: Tensor | None, keep: int) -> None:
    """Adds one sample's rows, value [..., K], to an observation; at most `keep` of them are kept.

    modality: as in `ir.Call`.
    """
    rows = value.numel() // value.shape[-1]
    if modality is None or modality.numel() != rows:
        available = [rows * (number == IMAGE) for number in range(len(MODALITIES))]
    else:
        available = [int((modality == number).sum()) for number in range(len(MODALITIES))]
    kept = [int((observation.kept_modality == number).sum()) for number in range(len(MODALITIES))]
    statistics, _ = observe_rows(value, modality, sample_quota(available, keep, kept))
    add_ranges(observation, statistics)
    observation.kept = torch.cat([observation.kept.reshape(-1, observation.channels), statistics.kept])
    observation.kept_modality = torch.cat([observation.kept_modality, statistics.kept_modality])
