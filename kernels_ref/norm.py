"""Root-mean-square normalisation as the Ascend runs it, with the bias that a shifted norm carries."""

import torch


def rms_norm(
    x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """x [..., C], gamma [C], beta [C] or None -> dtype [..., C] = dt(dt(x * rsqrt(mean(x^2) + eps)) * gamma + beta).

    All arithmetic in float32; the two roundings to `dtype` (dt) are the only ones, as in npu_rms_norm and in the float
    model's own norm.
    """
    x32 = x.to(torch.float32)  # [..., C]
    normalised = (x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)).to(dtype)  # [..., C]
    scaled = normalised.to(torch.float32) * gamma.to(torch.float32)  # [..., C]
    if beta is not None:
        scaled += beta.to(torch.float32)
    return scaled.to(dtype)
