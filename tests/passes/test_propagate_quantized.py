"""propagate-quantized: what it hands on are the outputs of the integers, and nothing else changes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.exact_stage import text_after
from tests.support.random_stage import EVERYWHERE, decoder, through
from vlqc.errors import UserError
from vlqc.ir.execution import first_tensor
from vlqc.ir.printer import print_stage
from vlqc.ir.stage import Stage
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.lower_linears import LowerLinears
from vlqc.passes.propagate_quantized import PropagateQuantized
from vlqc.passes.quantize_activations import QuantizeActivations
from vlqc.passes.quantize_weights import QuantizeWeights
from vlqc.pipeline.ordering import check_order
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.schemes import Scheme

pytestmark = pytest.mark.usefixtures("float32_runs")  # the same numbers on every processor

ALL = (QuantizeActivations(), QuantizeWeights(method="round"), LowerLinears())


def returned(stage: Stage) -> list[Tensor]:
    """What the stage handed on, per sample."""
    return [first_tensor(output).clone() for output in stage.execution.outputs]


def lowered(scheme: Scheme = Scheme.W8A8, *behind: Pass) -> Stage:
    return through(decoder(outliers=True), InsertObservers(), EVERYWHERE[scheme], *ALL, *behind)


def test_text_is_that_of_the_lowered_stage() -> None:
    """A pass that leaves a trace in the stage: no golden of its own, as there is nothing to see."""
    assert text_after("propagate-quantized") == text_after("lower-linears")


@pytest.mark.parametrize("scheme", [Scheme.W8A8, Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC])
def test_outputs_are_those_of_the_integers(scheme: Scheme) -> None:
    """Outputs of the float stage handed on once more, or of one sample for all of them."""
    before, after = returned(lowered(scheme)), returned(stage := lowered(scheme, PropagateQuantized()))
    original = decoder(outliers=True)
    for call, float_output, output in zip(stage.execution.calls, before, after, strict=True):
        assert torch.equal(float_output, original.module(*call.args)[0])
        assert torch.equal(output, first_tensor(stage.module(*call.args)))
        difference = float((output - float_output).norm() / float_output.norm())
        assert 1e-3 < difference < 1.5  # planted outliers that nothing tamed


def test_a_later_stage_is_calibrated_on_them() -> None:
    """An output that keeps its old value where the next stage reads it: its ranges must be those of the new ones."""
    ranges = []
    for behind in ((), (PropagateQuantized(),)):
        first, second = lowered(Scheme.W8A8, *behind), decoder(1)
        second.execution.calls = [
            replace(call, args=(first_tensor(output),))
            for call, output in zip(second.execution.calls, first.execution.outputs, strict=True)
        ]
        through(second, InsertObservers())
        rows = torch.cat(
            [second.module.get_submodule("input_layernorm")(call.args[0])[0] for call in second.execution.calls]
        )
        kinds = torch.cat([call.modality for call in second.execution.calls if call.modality is not None])
        observed = second.observations["input_layernorm"]
        assert torch.equal(observed.maximum(), rows[kinds >= 0].amax(0))
        ranges.append(observed.maximum())
    assert not torch.equal(*ranges)


def test_one_run_and_no_trace() -> None:
    """A third run of every stage, hooks that stay, or observations replaced by what the integers see."""
    stage, ran = lowered(), []
    text, seen = (
        print_stage(stage),
        {source: observation.kept.clone() for source, observation in stage.observations.items()},
    )
    handle = stage.module.register_forward_hook(lambda *_: ran.append(1))
    assert PropagateQuantized().run(stage) is False
    handle.remove()
    assert len(ran) == len(stage.execution.calls) == len(stage.execution.outputs) and print_stage(stage) == text
    assert all(torch.equal(stage.observations[source].kept, rows) for source, rows in seen.items())
    assert sum(len(child._forward_pre_hooks) + len(child._forward_hooks) for child in stage.module.modules()) == 0


def test_before_lowering_there_is_nothing_to_hand_on() -> None:
    """A pipeline of the user's own that runs the float stage twice and takes it for the quantized one."""
    early = [InsertObservers(), EVERYWHERE[Scheme.W8A8], PropagateQuantized()]
    with pytest.raises(UserError, match="propagate-quantized needs lower-linears before it"):
        check_order(early)
    check_order([InsertObservers(), EVERYWHERE[Scheme.W8A8], *ALL, PropagateQuantized()])
