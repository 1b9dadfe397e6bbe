"""kernels_ref.norm against NumPy in float64."""

import numpy as np
import pytest
import torch

from vlqc.kernels_ref.norm import rms_norm


def double(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return tensor.to(torch.float64).numpy()


@pytest.mark.parametrize("with_beta", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_agrees_with_numpy(dtype: torch.dtype, with_beta: bool) -> None:
    """Catches a mean that is subtracted, epsilon outside the root, a missing rounding, and a bias that is dropped."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 5, 48, generator=generator) * 0.01).to(dtype)
    gamma = torch.randn(48, generator=generator).to(dtype)
    beta = torch.randn(48, generator=generator).to(dtype) if with_beta else None
    eps = 1e-4  # as large as the mean square
    root = np.sqrt((double(x) ** 2).mean(axis=-1, keepdims=True) + eps)
    inner = torch.from_numpy(double(x) / root).to(torch.float32).to(dtype)
    outer = double(inner) * double(gamma) + (0 if beta is None else double(beta))
    expected = torch.from_numpy(outer).to(torch.float32).to(dtype)
    ours = rms_norm(x, gamma, beta, eps, dtype)
    assert ours.dtype == dtype and ours.shape == x.shape
    if dtype == torch.float32:
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    else:  # float32 against float64 decides a few roundings of 480 the other way
        assert (ours != expected).float().mean() < 0.01
        torch.testing.assert_close(ours, expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_rms_norm_rounds_before_gamma() -> None:
    """Catches the inner rounding left out: in bfloat16 sqrt(3) is 1.734375, and gamma times that is 1.75."""
    x = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])  # mean square 1/3, so every 1 becomes sqrt(3)
    gamma = torch.full((9,), 1.0078125, dtype=torch.bfloat16)
    assert (torch.tensor(3.0**0.5) * 1.0078125).to(torch.bfloat16).item() == 1.7421875
    assert rms_norm(x, gamma, None, 0.0, torch.bfloat16)[0].item() == 1.75


def test_rms_norm_squares_in_float32() -> None:
    """Catches squares in float16, which overflow for a massive token, and the input being written to."""
    x = torch.tensor([[400.0, 0.0]], dtype=torch.float16)
    y = rms_norm(x, torch.ones(2, dtype=torch.float16), torch.tensor([0.5, -0.25]), 1e-6, torch.float16)
    assert y.tolist() == [[torch.tensor(2.0**0.5).half().item() + 0.5, -0.25]]
    assert x.tolist() == [[400.0, 0.0]]
