"""Inputs of known distributions, and the search for their int8 range once more, in NumPy."""

import math

import numpy as np
import torch

from tests.support.observations import add_rows
from vlqc.ir.observation import Observation

DTYPES = [torch.bfloat16, torch.float16]
MANY = 10**12  # samples of which nothing unseen differs


def observation(text: torch.Tensor, image: torch.Tensor | None = None, samples: int = MANY) -> Observation:
    """All rows kept, float32 [T, K] of either modality."""
    observed = Observation(text.shape[1], samples=samples)
    add_rows(observed, text, torch.zeros(len(text), dtype=torch.int8), len(text))
    if image is not None:
        add_rows(observed, image, torch.ones(len(image), dtype=torch.int8), len(image))
    return observed


def limits(observed: Observation) -> tuple[float, float]:
    return float(observed.minimum().amin()), float(observed.maximum().amax())


def rows_of(seed: int, kind: str) -> torch.Tensor:
    """float32 [64, 8] of one shape of distribution."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(64, 8, generator=generator)
    if kind == "heavy tail":
        rows = rows**5
    elif kind == "positive":
        rows = rows.abs() + 0.5
    elif kind == "negative":
        rows = -rows.abs() - 0.5
    elif kind == "outlier":
        rows[3, 2] = 300
    return rows


def numpy_rounded(values: np.ndarray, low: float, high: float, dtype: torch.dtype) -> np.ndarray:
    """The engines' int8 and back, float64, for a range whose scale is rounded up to dtype."""
    least_scale = max((high - low) / 255, 2.0**-23 if dtype == torch.bfloat16 else 2.0**-16 + 2.0**-24)
    scale = float(torch.tensor(least_scale, dtype=torch.float64).to(dtype))
    if scale < least_scale:
        bits = 7 if dtype == torch.bfloat16 else 10
        scale += 2.0 ** (math.floor(math.log2(scale)) - bits)  # one unit in the last place
    offset = -128 - np.rint(low / scale)
    rounded: np.ndarray = (np.clip(np.rint(values / scale + offset), -128, 127) - offset) * scale
    return rounded


FIVE = [(-2, 0.06), (-1, 0.24), (0, 0.4), (1, 0.24), (2, 0.06)]  # standard deviations, and their shares


def numpy_search(
    observed: Observation, energy: np.ndarray, low: float, high: float, dtype: torch.dtype
) -> tuple[float, dict[tuple[float, float], float]]:
    """(smallest error, error per candidate range) on a histogram that is made and judged in NumPy, in float64.

    Every value stands for five, which differ from it as values of unseen inputs may.
    """
    kept, kinds = observed.kept.double().numpy(), observed.kept_modality.numpy()
    deviation = 0.25 / math.sqrt(observed.samples)
    factors = [(math.exp(number * deviation), share) for number, share in FIVE]
    present = np.unique(kinds)
    share = sum((kinds == kind) / (kinds == kind).sum() / len(present) for kind in present)
    edges = np.linspace(low * factors[-1][0], high * factors[-1][0], 2049)
    mass = sum(
        np.histogram(kept * factor, edges, weights=part * share[:, None] * energy[None, :])[0]
        for factor, part in factors
    )
    centers = (edges[1:] + edges[:-1]) / 2
    shares = [1.25, 1.15, 1.05, *(2.0 ** (-step / 8) for step in range(41))]
    errors = {}
    for below in shares if low < 0 else [1.0]:
        for above in shares if high > 0 else [1.0]:
            rounded = numpy_rounded(centers, low * below, high * above, dtype)
            errors[low * below, high * above] = float(((rounded - centers) ** 2 * mass).sum())
    return min(errors.values()), errors


def true_error(observed: Observation, energy: torch.Tensor, low: float, high: float, dtype: torch.dtype) -> float:
    """Weighted squared error of the kept values themselves, float64, every modality counting the same."""
    values = observed.kept.double().numpy()
    error = (numpy_rounded(values, min(low, 0.0), max(high, 0.0), dtype) - values) ** 2 * energy.double().numpy()
    return float((error.sum(1) * observed.row_weight().numpy()).sum())
