"""Root-mean-square normalization of the Ascend, and a norm with an added bias."""

import torch


def rms_norm(
    x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """x [..., C], gamma [C], beta [C] or None -> dtype [..., C] = dt(dt(x * rsqrt(mean(x^2) + eps)) * gamma + beta).

    Computed in float32 with the two roundings to `dtype` (dt) only. Source: npu_rms_norm; the float model's norm does
    the same.
    """
    x32 = x.to(torch.float32)  # [..., C]
    normalized = (x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)).to(dtype)  # [..., C]
    scaled = normalized.to(torch.float32) * gamma.to(torch.float32)  # [..., C]
    if beta is not None:
        scaled += beta.to(torch.float32)
    return scaled.to(dtype)


class ShiftedNorm(torch.nn.Module):
    """A norm with an added bias: x [..., C] -> norm(x) + bias, in x's dtype.

    Its parameters are `weight`, shared with the norm, and `bias`: the names under which a folder stores them. The
    norm's own forward is called with the current weight, which may have been scaled, moved or replaced since. The norm
    is not a submodule, as that would register the weight a second time.
    """

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter

    def __init__(self, norm: torch.nn.Module, bias: torch.Tensor) -> None:
        """norm: a module whose only tensor is `weight` [C]; bias: [C], not copied. Raises ValueError for others."""
        super().__init__()
        tensors = [name for name, _ in (*norm.named_parameters(), *norm.named_buffers())]
        if tensors != ["weight"]:
            raise ValueError(f"expected a norm with a weight only, got {', '.join(tensors) or 'no tensor'}")
        self.weight = norm.get_parameter("weight")
        if bias.shape != self.weight.shape:
            raise ValueError(f"bias must have shape {list(self.weight.shape)}, got {list(bias.shape)}")
        self.bias = torch.nn.Parameter(bias, requires_grad=False)
        self._norm = (norm,)  # in a tuple, so that PyTorch does not register it as a submodule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normalized: torch.Tensor = torch.func.functional_call(self._norm[0], {"weight": self.weight}, (x,))
        return (normalized + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return repr(self._norm[0])
