"""Observers of modules that run on some rows only, such as experts."""

import torch
from torch import Tensor, nn

from vlqc.ir.execution import Call, observing
from vlqc.passes.algorithms.observer import Observer


class Selected(nn.Module):
    """Runs its layer on every second row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.row_positions: Tensor | None = None

    def forward(self, rows: Tensor) -> Tensor:
        self.row_positions = torch.arange(1, len(rows), 2)
        return self.layer(rows[self.row_positions])


def test_rows_of_an_expert_have_the_modality_and_energy_of_their_tokens() -> None:
    """Would catch rows of text that count as image rows, and energies of other tokens."""
    root = nn.Sequential(Selected())
    rows = torch.arange(32.0).reshape(8, 4)
    modality = torch.tensor([0, 0, 0, 1, 1, 1, -1, -1], dtype=torch.int8)
    observer = Observer("layer", "stage", {0: {0: 4, 1: 4}}, merge_early=True)
    call = Call(0, (rows,), {}, modality)
    with observing(root, {"0.layer": observer}, call):
        root(rows)
    (sample,) = observer.samples_with_energy({0: torch.arange(8.0)})
    assert {name: span.rows for name, span in sample.statistics.ranges.items()} == {"text": 1, "image": 2}
    assert torch.equal(sample.statistics.kept, rows[[1, 3, 5]])
    assert sample.statistics.kept_modality.tolist() == [0, 1, 1]
    assert sample.statistics.kept_energy.tolist() == [1, 3, 5]
