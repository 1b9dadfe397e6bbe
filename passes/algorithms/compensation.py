"""How much of a weight's rounding error GPTQ leaves at the outputs, per input column, before any weight is rounded.

Notation as in `hessian`: x [T, K] rows of the input, H = x^T D x = R R^T. Without compensation an error in column j
costs E[x_j^2] at the outputs. GPTQ compensates it in the columns after j, and E[(P x^T)_j^2] is left, with
P = (R diag(R)^-1)^-1. A smoothing scale s divides x_j as well as (P x^T)_j by s_j: the share that is left does not
depend on s.
"""

import torch
from torch import Tensor

from vlqc.ir.observation import Observation
from vlqc.passes.algorithms.gptq import activation_order, single_threaded_pool
from vlqc.passes.algorithms.hessian import (
    MAX_HOLDOUT_ROWS,
    ParallelFor,
    compensated_errors,
    gram_matrix,
    holdout_split,
    search_shrinkage,
    serial_for,
)
from vlqc.passes.algorithms.weight_clipping import column_importance

COLUMNS_PER_BLOCK = 1024  # bounds the cost; compensation between blocks is left out
MAX_ROWS = 1024  # of x


def uncompensated_share(observation: Observation, energy: Tensor, group_size: int | None) -> Tensor:
    """`share_left` of the weights that read a node, whose groups have `group_size` columns: float32 [K].

    energy: float32 [K], sum over outputs of the squared weights in each column. GPTQ orders columns by importance, and
    smoothing moves it into the weights: a balanced scale, see `SmoothingTask.balanced_scales`, leaves every column the
    root of importance times energy.
    """
    index = observation.representative(MAX_ROWS)
    importance = column_importance(observation.second_moment())
    order = activation_order((importance.double() * energy.double()).sqrt(), group_size)
    width = max(COLUMNS_PER_BLOCK // (group_size or 1), 1) * (group_size or 1)
    with single_threaded_pool() as parallel_for:
        rows, row_weight = observation.kept[index], observation.row_weight(index)
        return share_left(rows, row_weight, importance, order, width, parallel_for)


def share_left(
    rows: Tensor,
    row_weight: Tensor,
    importance: Tensor,
    order: Tensor,
    width: int,
    parallel_for: ParallelFor = serial_for,
) -> Tensor:
    """Share of the squared output error of a rounding error in each column that compensation leaves: float32 [K], 0..1.

    rows: x float32 [T, K]; row_weight: float64 [T]; importance: float32 [K] > 0, mean square of each column; order:
    int64 [K], in which columns are rounded; width: of the blocks of columns that are compensated together.

    Measured on rows to which R was not fitted, as in `search_shrinkage`: with few rows, compensation achieves less on
    unseen inputs than on those rows.
    """
    root = row_weight.sqrt().float()[:, None]  # [T, 1]
    share = torch.ones_like(importance)
    for columns in torch.split(order, width):
        rms = importance[columns].sqrt()
        training, holdout = holdout_split(rows[:, columns] * root / rms)
        gram = gram_matrix(training, parallel_for)  # [B, B]
        shrinkage = search_shrinkage(gram, holdout, rms, parallel_for)
        errors = (holdout[:: max(1, -(-holdout.shape[0] // MAX_HOLDOUT_ROWS))] * rms).T.contiguous()  # [B, T']
        compensated = compensated_errors(gram, shrinkage, rms, errors)
        if compensated is not None:
            before, left = errors.square().sum(1), compensated.square().sum(1)
            share[columns] = torch.where(before > 0, left / before, 1.0).clamp(max=1.0)
    return share
