"""Fitted scales of error-compensated weights: no false faults, and damage is still detected."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vlqc.passes.algorithms.gptq import gptq_quantize
from vlqc.passes.algorithms.weight_clipping import ChannelScaleGrid, GroupScaleGrid, column_importance
from vlqc.verify.float_match.scale_fit import SIGMAS, Scales, WeightPair, fit_columns, fit_rows, misfits
from vlqc.verify.folder.reader import read_tensors
from vlqc.verify.numbers.integers import StoredIntegers

ROWS, COLUMNS = 192, 256
ALL = np.ones(ROWS, bool)
SCHEMES = pytest.mark.parametrize("group_size", [None, 64, 256])


def rounded(seed: int, group_size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """A weight float32 [N, K], its integers by error compensation, and the steps float32 [N, K/G]."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(COLUMNS, generator=generator).exp()
    causes = torch.randn(24, COLUMNS, generator=generator)
    inputs = (
        torch.randn(600, 24, generator=generator) @ causes / 5 + torch.randn(600, COLUMNS, generator=generator)
    ) * size
    weight = torch.randn(ROWS, COLUMNS, generator=generator) / size.sqrt()
    importance = column_importance(inputs.square().mean(0))
    row_weight = torch.full((600,), 1 / 600, dtype=torch.float64)
    grid: ChannelScaleGrid | GroupScaleGrid = ChannelScaleGrid(weight, importance, None, torch.float32)
    if group_size:
        grid = GroupScaleGrid(weight, importance, group_size, torch.bfloat16)
    (integers,) = gptq_quantize([weight], [grid], inputs, row_weight, importance)
    return weight, integers, grid.scale if isinstance(grid, ChannelScaleGrid) else grid.first * grid.second


def pair(folder: Path, weight: Tensor, integers: Tensor, steps: Tensor) -> WeightPair:
    save_file({"float": weight.contiguous(), "integers": integers.contiguous()}, folder / "tensors.safetensors")
    tensors, _, faults = read_tensors(folder / "tensors.safetensors")
    assert not faults
    stored = StoredIntegers(tensors["integers"], 8 if steps.shape[1] == 1 and int(integers.max()) > 7 else 4)
    return WeightPair("layer", tensors["float"], stored, steps.numpy())


@SCHEMES
@pytest.mark.parametrize("seed", range(5))
def test_compensated_integers_have_no_scales(tmp_path: Path, seed: int, group_size: int | None) -> None:
    """Catches false scales of rows or columns, or false misfits, because rounding errors are correlated."""
    weights = pair(tmp_path, *rounded(seed, group_size))
    columns, rows = fit_columns([(weights, None)]), fit_rows(weights, ALL, Scales.ones(COLUMNS))
    assert (np.abs(columns.values - 1) <= SIGMAS * columns.sigma).all()
    assert (np.abs(rows.values - 1) <= SIGMAS * rows.sigma).all()
    result = misfits(weights, rows, columns)
    assert result.gross == 0 and not result.scaled


@SCHEMES
def test_damaged_scales_are_detected(tmp_path: Path, group_size: int | None) -> None:
    """Catches a tolerance so large that a row or column scaled by 1.5, or one damaged weight, is not detected."""
    weight, integers, steps = rounded(0, group_size)
    changed = weight.clone()
    changed[7] *= 1.5
    rows = fit_rows(pair(tmp_path, changed, integers, steps), ALL, Scales.ones(COLUMNS))
    assert np.flatnonzero(np.abs(rows.values - 1) > SIGMAS * rows.sigma).tolist() == [7]
    changed = weight.clone()
    clear = int(fit_columns([(pair(tmp_path, weight, integers, steps), None)]).sigma.argmin())
    changed[:, clear] *= 1.5
    columns = fit_columns([(pair(tmp_path, changed, integers, steps), None)])
    assert np.flatnonzero(np.abs(columns.values - 1) > SIGMAS * columns.sigma).tolist() == [clear]
    changed = integers.clone()
    changed[11, clear] = -changed[11, clear] if abs(int(changed[11, clear])) > 60 else changed[11, clear] ^ 0x40
    if not group_size:  # no 4-bit integer is that far from another one
        weights = pair(tmp_path, weight, changed, steps)
        result = misfits(weights, Scales.ones(ROWS), fit_columns([(weights, None)]))
        assert (result.gross, result.first_gross) == (1, (11, clear))
