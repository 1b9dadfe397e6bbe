"""StageRun.probe_output: when a result is reused, and which call runs."""

import pytest
import torch
from torch import Tensor, nn

from vlqc.frontend.process_group import ProcessGroup
from vlqc.ir.execution import Call, StageRun


class Counted(nn.Module):
    """A linear layer that counts its runs."""

    def __init__(self, *, exact: bool) -> None:
        super().__init__()
        self.linear, self.runs = nn.Linear(8, 8).requires_grad_(False), 0
        if exact:
            self.linear.weight.copy_(self.linear.weight.bfloat16())

    def forward(self, rows: Tensor) -> Tensor:
        self.runs += 1
        output: Tensor = self.linear(rows)
        return output


def run_of(*, exact: bool = False, rounds_weights: bool = False) -> tuple[StageRun, Counted]:
    module, call = Counted(exact=exact), Call(0, (torch.randn(5, 8),), {})
    return StageRun(module, ProcessGroup(), [call], call, rounds_weights=rounds_weights), module


def test_only_what_asks_for_it_reuses_a_result() -> None:
    """Catches a reused result where the caller needs the run itself, and a second run where it does not."""
    run, module = run_of()
    first = run.probe_output()
    assert run.probe_output(reuse=True) is first and module.runs == 1
    assert torch.equal(run.probe_output(), first) and module.runs == 2
    run.forget_probe_output()
    assert torch.equal(run.probe_output(reuse=True), first) and module.runs == 3
    run.release()
    assert run._last_probe is None


def test_a_changed_weight_runs() -> None:
    """Catches the output of earlier weights, and a result that is reused although it is of a later state."""
    run, module = run_of()
    before, weight = run.probe_output(), module.linear.weight.clone()
    module.linear.weight.mul_(2)
    after = run.probe_output(reuse=True)
    assert module.runs == 2 and not torch.equal(after, before)
    module.linear.weight.copy_(weight)
    assert torch.equal(run.probe_output(reuse=True), before) and module.runs == 3


@pytest.mark.parametrize(("exact", "rounds_weights"), [(True, False), (False, True), (False, False)])
def test_a_forward_keeps_the_result(exact: bool, rounds_weights: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a proof that is repeated after the calibration, and one that is reused for weights changed before it."""
    monkeypatch.setattr("vlqc.ir.bfloat16_linears.multiplies_bfloat16", lambda device: True)
    run, module = run_of(exact=exact, rounds_weights=rounds_weights)
    first = run.probe_output()
    run.forward()
    assert run.probe_output(reuse=True) is first and module.runs == 2
    module.linear.weight.mul_(2)
    run.forward()
    assert not torch.equal(run.probe_output(reuse=True), first)


def test_another_call() -> None:
    """Catches the output of the probe for another call, and the reverse."""
    run, module = run_of()
    other = Call(1, (torch.randn(3, 8),), {})
    expected, of_probe = module.linear(other.args[0]), module.linear(run.calls[0].args[0])
    run.probe_output()
    assert torch.equal(run.probe_output(other, reuse=True), expected)
    assert torch.equal(run.probe_output(reuse=True), of_probe)
