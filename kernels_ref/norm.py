"""Root-mean-square normalisation as the Ascend runs it, and the bias that a shifted norm carries."""

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


class ShiftedNorm(torch.nn.Module):
    """A norm with a bias behind it: x [..., C] -> norm(x) + bias, in x's dtype.

    Its parameters are `weight`, the norm's own, and `bias`, so that their names are those a folder stores for this
    norm. What the norm computes is left to its own forward, given the weight as it is now: it may have been folded
    into, moved or replaced. Therefore the norm is not a submodule, which would repeat the weight under a longer name.
    """

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter

    def __init__(self, norm: torch.nn.Module, bias: torch.Tensor) -> None:
        """A norm whose only tensor is `weight` [C], and the bias [C], kept as it is. ValueError for others."""
        super().__init__()
        own = [name for name, _ in (*norm.named_parameters(), *norm.named_buffers())]
        if own != ["weight"]:
            raise ValueError(f"expected a norm that has a weight and nothing else, got {', '.join(own) or 'no tensor'}")
        self.weight = norm.get_parameter("weight")
        if bias.shape != self.weight.shape:
            raise ValueError(f"bias must have shape {list(self.weight.shape)}, got {list(bias.shape)}")
        self.bias = torch.nn.Parameter(bias, requires_grad=False)
        self._norm = (norm,)  # in a tuple, or PyTorch would register it as a submodule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normalised: torch.Tensor = torch.func.functional_call(self._norm[0], {"weight": self.weight}, (x,))
        return (normalised + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return repr(self._norm[0])
