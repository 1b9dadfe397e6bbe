"""Scale propagation in random small graphs: every reported edge holds."""

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tests.support.folded_edges import CALL, INPUT, assert_holds
from vlqc.frontend.tracing import trace
from vlqc.ir.scale_propagation import find_edges

SIZE = 8


def regrouped(x: Tensor) -> Tensor:
    """Heads apart and together again, as attention does."""
    return x.view(2, 4, 2, x.shape[-1] // 2).transpose(1, 2).transpose(1, 2).reshape(2, 4, -1)


# Every operation takes values [2, 4, any even number] and gives one; what does not fit gives its first value back.
STEPS: dict[str, Callable[["Program", Tensor, Tensor], Tensor]] = {
    "swap": lambda p, x, y: torch.cat(x.chunk(2, -1)[::-1], -1),
    "twice": lambda p, x, y: x.repeat(1, 1, 2) if x.shape[-1] <= 16 else x,
    "each twice": lambda p, x, y: x.repeat_interleave(2, -1) if x.shape[-1] <= 16 else x,
    "beside": lambda p, x, y: torch.cat([x, y], -1) if x.shape[-1] + y.shape[-1] <= 32 else x,
    "first half": lambda p, x, y: x[..., : x.shape[-1] // 2] if x.shape[-1] % 4 == 0 else x,
    "every other": lambda p, x, y: x[..., ::2] if x.shape[-1] % 4 == 0 else x,
    "heads": lambda p, x, y: regrouped(x),
    "mixed": lambda p, x, y: x.transpose(1, 2).reshape(2, 4, -1),
    "two rows": lambda p, x, y: x.reshape(2, 2, -1).repeat(1, 2, 1) if x.shape[-1] <= 16 else x,
    "rows turned": lambda p, x, y: torch.stack(x.unbind(1)[::-1], 1),
    "row chosen": lambda p, x, y: x[:, p.rows],
    "first row": lambda p, x, y: x[:, :1].expand(-1, 4, -1),
    "channel chosen": lambda p, x, y: x.index_select(-1, p.columns % x.shape[-1]),
    "times": lambda p, x, y: x * y if x.shape == y.shape else x,
    "over": lambda p, x, y: x / (2 + y) if x.shape == y.shape else x,
    "plus": lambda p, x, y: x + y if x.shape == y.shape else x,
    "minus": lambda p, x, y: x - y if x.shape == y.shape else x,
    "doubled": lambda p, x, y: -2 * x,
    "shifted": lambda p, x, y: x + 0.5,
    "bent": lambda p, x, y: functional.silu(x),
    "attended": lambda p, x, y: (y @ y.transpose(1, 2)).softmax(-1) @ x,
    "attending": lambda p, x, y: functional.scaled_dot_product_attention(y, y, x),
    "scored": lambda p, x, y: functional.scaled_dot_product_attention(x, x, y),
    "scaled in place": lambda p, x, y: x.clone().mul_(y) if x.shape == y.shape else x.clone().mul_(3),
    "written": lambda p, x, y: p.written(x, y),
    "linear": lambda p, x, y: p.through("linear", x),
    "norm": lambda p, x, y: p.through("norm", x),
    "linear again": lambda p, x, y: p.through("linear", y, again=True),
}  # fmt: skip


class Program(nn.Module):
    """Runs steps (name, first value, second value) and returns what Linears gave that no step used.

    Values are counted backwards from the latest: 0 is what the step before gave, at first the output of a norm.
    """

    def __init__(self, steps: list[tuple[str, int, int]], tap: bool) -> None:
        super().__init__()
        self.steps, self.tap = steps, tap
        self.layers = nn.ModuleList()
        self.register_buffer("rows", torch.tensor([1, 1, 0, 3]))
        self.register_buffer("columns", torch.tensor([1, 0, 3, 2, 5, 4, 7, 6]))
        torch.manual_seed(len(steps))
        self.forward(INPUT)  # makes the layers
        self.double().requires_grad_(False)

    def through(self, kind: str, x: Tensor, again: bool = False) -> Tensor:
        """A new layer of its own, or the one before once more."""
        if again and self.used and self.used[-1].weight.shape[-1] == x.shape[-1]:
            self.used.append(self.used[-1])
        else:
            fresh = len([layer for number, layer in enumerate(self.used) if layer not in self.used[:number]])
            if fresh == len(self.layers):
                made = nn.LayerNorm(x.shape[-1]) if kind == "norm" else nn.Linear(x.shape[-1], SIZE)
                nn.init.uniform_(made.weight, 0.2, 1.5)
                self.layers.append(made.double())
            self.used.append(self.layers[fresh])
        result: Tensor = self.used[-1](x)
        return result

    @staticmethod
    def written(x: Tensor, y: Tensor) -> Tensor:
        blank = torch.zeros_like(x)
        blank[:, 1:] = y[:, 1:] if x.shape == y.shape else x[:, 1:]
        return blank

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.used: list[nn.Module] = []
        values, loose = [x, self.through("norm", x)], set()  # loose: results of Linears that nothing has used yet
        for name, *back in self.steps:
            first, second = (len(values) - 1 - step % len(values) for step in back)
            loose -= {first, second}
            if name.startswith("linear"):
                loose.add(len(values))
            values.append(STEPS[name](self, values[first], values[second]))
        outputs = [self.through("linear", values[-1]), *(values[number].tanh() for number in sorted(loose))]
        return (*outputs, *([values[len(values) // 2]] if self.tap else []))


STEP = st.tuples(st.sampled_from(sorted(STEPS)), st.sampled_from([0, 0, 0, 1, 2]), st.integers(0, 5))


@settings(max_examples=300)
@given(
    st.lists(STEP, min_size=1, max_size=6),
    st.sampled_from([False, False, False, True]),
)
def test_whatever_is_claimed_holds(steps: list[tuple[str, int, int]], tap: bool) -> None:
    """Catches incorrect edges in small random graphs of layouts, products, sums, attention and shared layers."""
    check_claims(Program(steps, tap))


def check_claims(program: Program) -> int:
    edges = find_edges(program, trace(program, CALL, "program"))
    for edge in edges:
        assert_holds(program, edge, CALL)
    return len(edges)


def test_small_graphs_have_edges() -> None:
    """Catches an implementation that finds no edges at all."""
    kept = "swap, twice, each twice, beside, first half, every other, heads, two rows, row chosen, first row, doubled"
    for name in (*kept.split(", "), "attended", "attending", "scaled in place"):
        assert check_claims(Program([(name, 0, 1)], tap=False)) == 1, name
    assert check_claims(Program([("linear", 1, 0), ("times", 0, 2), ("linear", 0, 0), ("swap", 0, 0)], tap=False)) == 2
