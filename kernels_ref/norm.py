"""A norm with an added bias."""

import torch


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
