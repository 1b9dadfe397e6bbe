"""A mixture of experts as linear layers: a router, and a gated MLP of three linear layers per expert.

transformers holds the weights of all experts of a layer in two tensors, and its versions multiply them differently.
This module takes the place of both: `vlqc` quantizes linear layers, and its passes run one expert at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary


def chosen_rows(routing: Tensor, expert: int) -> Tensor:
    """Positions of the rows that are sent to an expert, int64 [n], ascending. routing: float [T, E].

    On the meta device, where nothing is known of the values, n is T. One operation of a traced graph.
    """
    if has_torch_function_unary(routing):
        positions: Tensor = handle_torch_function(chosen_rows, (routing,), routing, expert)
        return positions
    column = routing[:, expert]
    if column.device.type == "meta":
        return torch.empty(column.shape, dtype=torch.int64, device="meta")
    return column.nonzero().flatten()


class Expert(nn.Module):
    """A gated MLP: down_proj(activation(gate_proj(x)) * up_proj(x)).

    row_positions: while it runs, positions of its rows among those of the mixture, int64 [n]; otherwise None.
    """

    def __init__(self, hidden: int, intermediate: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False, device="meta")
        self.up_proj = nn.Linear(hidden, intermediate, bias=False, device="meta")
        self.down_proj = nn.Linear(intermediate, hidden, bias=False, device="meta")
        self.act_fn = activation
        self.row_positions: Tensor | None = None

    def forward(self, rows: Tensor) -> Tensor:
        """float [n, hidden] -> [n, hidden]; n may be 0."""
        output: Tensor = self.down_proj(self.act_fn(self.gate_proj(rows)) * self.up_proj(rows))
        return output


class MixtureOfExperts(nn.Module):
    """Sends every row to the `used` experts with the highest scores and adds up their outputs.

    A row's weights are the softmax of the scores of all experts, in float32, divided by the sum over the chosen ones.

    hidden, intermediate: sizes; count: number of experts; activation: of the experts. Parameters are on meta.
    """

    def __init__(
        self, hidden: int, intermediate: int, count: int, used: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.used = used
        self.gate = nn.Linear(hidden, count, bias=False, device="meta")
        self.experts = nn.ModuleList(Expert(hidden, intermediate, activation) for _ in range(count))
        self.requires_grad_(requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """float [..., hidden] -> the same shape."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = self.routing(rows)
        total = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            assert isinstance(expert, Expert)
            expert.row_positions = positions = chosen_rows(routing, number)
            output = expert(rows.index_select(0, positions))
            weight = routing.index_select(0, positions)[:, number : number + 1]
            total = total.index_add_(0, positions, output * weight)
            expert.row_positions = None
        return total.reshape(hidden_states.shape)

    def routing(self, rows: Tensor) -> Tensor:
        """float [T, hidden] -> [T, E]: the weight of each expert for each row, 0 where it is not chosen."""
        scores = self.gate(rows)
        weights, choices = torch.topk(torch.softmax(scores, -1, dtype=torch.float32), self.used, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        return torch.zeros_like(scores).scatter(1, choices, weights.to(rows.dtype))
