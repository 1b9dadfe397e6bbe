"""From a stop of the forward to a stage and back: sites and names, weights that come and go."""

import typing
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.support import tiny
from tests.support.stages import materialized_stage
from vlqc.errors import UserError
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.calibration.probe import MEASURED_ROWS, PROBE_ROWS, choose_probe, missing_modalities
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.sequential import SequentialForward, StageInputs
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.execution import Call, SampleShape
from vlqc.ir.observation import Observation
from vlqc.ir.rotations import AppliedRotation, RotationPlan
from vlqc.ir.stage import WeightQuantization


def at_each_stage(work: Callable[[StreamedModel, StageInputs], None]) -> StreamedModel:
    model = tiny.float_model()
    with (
        model.non_stage_weights(model.checkpoint.tensor),
        SequentialForward(model, [tiny.synthetic_sample((4, 4))]) as forward,
    ):
        for inputs in forward:
            work(model, inputs)
            model.materialize(inputs.module, model.checkpoint.tensor)
            with torch.no_grad():
                inputs.outputs = [inputs.module(*call.args, **call.kwargs) for call in inputs.calls]
            model.to_meta(inputs.module)
    return model


@pytest.mark.every_transformers
def test_sites_are_all_linears_by_checkpoint_name() -> None:
    """Catches a Linear that no pass would see, and names that engines do not know."""
    shapes: dict[str, tuple[int, int]] = {}
    parts = {}

    def look(model: StreamedModel, inputs: StageInputs) -> None:
        with materialized_stage(model, inputs, torch.bfloat16, model.checkpoint.tensor) as stage:
            parts[stage.name] = stage.part
            for name, site in stage.sites.items():
                assert name == site.name == stage.checkpoint_name(site.target)
                assert stage.module.get_submodule(site.target) is stage.linear(site)
                assert stage.node(site.source).meta["shape"][-1] == site.shape[1]
                assert torch.equal(stage.linear(site).weight, model.checkpoint.tensor(f"{name}.weight"))
                shapes[name] = site.shape

    model = at_each_stage(look)
    matrices = {name for name in model.checkpoint.names if len(model.checkpoint.shape(name)) == 2} - {
        "lm_head.weight",
        "model.embed_tokens.weight",
    }
    assert {f"{name}.weight" for name in shapes} == matrices
    assert all(model.checkpoint.shape(f"{name}.weight") == shape for name, shape in shapes.items())
    assert [parts[name] for name in tiny.STAGES] == ["vision"] * 4 + ["merger"] + ["language"] * 4


@pytest.mark.every_transformers
def test_nothing_of_a_stage_stays_behind() -> None:
    """Catches memory that grows with every stage: float weights, or the integers that lowering put in their place."""

    def lower(model: StreamedModel, inputs: StageInputs) -> None:
        before = dict(inputs.module.named_modules())
        with materialized_stage(model, inputs, torch.bfloat16, model.checkpoint.tensor) as stage:
            assert not any(parameter.is_meta for parameter in stage.module.parameters())
            for site in stage.sites.values():
                stage.module.set_submodule(site.target, nn.Identity())
            assert dict(inputs.module.named_modules()) != before
        assert dict(inputs.module.named_modules()) == before
        assert all(
            parameter.is_meta for parameter in model.module.get_submodule(model.path(inputs.module)).parameters()
        )

    at_each_stage(lower)


def test_a_reference_to_a_finished_stage_keeps_little_memory() -> None:
    """Catches the loop variable of the compiler: a stage's integers and kept rows would stay while the next is read."""
    stages = []

    def look(model: StreamedModel, inputs: StageInputs) -> None:
        with materialized_stage(model, inputs, torch.bfloat16, model.checkpoint.tensor) as stage:
            stage.observations["%x"] = Observation(3)
            stage.execution.outputs = outputs = [torch.ones(2)]
            for site in stage.sites.values():
                site.weight = WeightQuantization(torch.ones(1, 1, dtype=torch.int8), torch.ones(1, 1))
            stages.append(stage)
        assert len(outputs) == 1  # they go on to the next stage

    at_each_stage(look)
    for stage in stages:
        assert not (stage.observations or stage.execution.outputs or stage.execution.calls or stage.execution.probe)
        assert all(site.weight is None for site in stage.sites.values())


@pytest.mark.every_transformers
def test_nothing_stays_behind_after_an_error() -> None:
    """Catches weights that stay in memory when a pass or the reading of a weight fails."""

    def fail(model: StreamedModel, inputs: StageInputs) -> None:
        with (
            pytest.raises(ZeroDivisionError),
            materialized_stage(model, inputs, torch.bfloat16, model.checkpoint.tensor) as stage,
        ):
            stage.module.set_submodule(next(iter(stage.sites.values())).target, nn.Identity())
            _ = 1 / 0

        def broken(name: str) -> Tensor:
            if name.endswith("bias"):
                raise OSError("disk")
            return model.checkpoint.tensor(name)

        if any(name.endswith("bias") for name in model.parameters(inputs.module)):
            with pytest.raises(OSError, match="disk"), materialized_stage(model, inputs, torch.bfloat16, broken):
                pass
        assert all(parameter.is_meta for parameter in inputs.module.parameters())

    at_each_stage(fail)


@pytest.mark.every_transformers
def test_a_stage_that_no_sample_reaches_is_named() -> None:
    """Catches a traceback where only text was given: the vision tower cannot be calibrated."""
    model = tiny.float_model()
    with (
        model.non_stage_weights(model.checkpoint.tensor),
        SequentialForward(model, [tiny.synthetic_sample()]) as forward,
        pytest.raises(UserError, match=r"no calibration sample reaches visual\.blocks\.0"),
    ):
        for inputs in forward:
            with materialized_stage(model, inputs, torch.bfloat16, model.checkpoint.tensor):
                pass


class OnlyReal(nn.Module):
    """A block whose mask lies on the CPU whatever its input does: not to be recorded on meta tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, rows: Tensor) -> Tensor:
        return self.down(self.up(rows) * torch.ones(4))  # type: ignore[no-any-return]


def test_a_block_that_needs_real_weights_to_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a fallback to real values that can never work, because the weights are filled in after it."""
    block = OnlyReal()
    stored = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    for name, parameter in list(block.named_parameters()):
        owner, _, last = name.rpartition(".")
        setattr(block.get_submodule(owner), last, nn.Parameter(parameter.to("meta"), requires_grad=False))
    model = StreamedModel.__new__(StreamedModel)
    model.module, model.canonical, model._path = block, lambda name: name.lstrip("."), {block: ""}
    model.device, model.family, model._hooks = torch.device("cpu"), QWEN2_5_VL, []
    model.rotation_plan = RotationPlan()
    monkeypatch.setattr(model, "prefetch_after", lambda name: None)  # there is no stage behind it
    inputs = StageInputs("block", block, [Call(0, (torch.ones(2, 4),), {})])
    with materialized_stage(model, inputs, torch.bfloat16, stored.__getitem__) as stage:
        assert [site.target for site in stage.sites.values()] == ["up", "down"]


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [([3, 9, 5], 1), ([3, PROBE_ROWS, PROBE_ROWS + 1], 1), ([PROBE_ROWS + 2, PROBE_ROWS + 1], 1), ([4, 4], 0)],
)
def test_probe_is_the_largest_that_is_quick(rows: list[int], chosen: int) -> None:
    """Catches proofs that run on a huge image, or on a sample too small to show a difference."""
    calls = [Call(number, (torch.ones(1, count, 2),), {}) for number, count in enumerate(rows)]
    assert choose_probe([SampleShape.from_call(call).rows for call in calls]) == chosen
    named = [Call(number, (), {"hidden_states": torch.ones(count, 2)}) for number, count in enumerate(rows)]
    assert choose_probe([SampleShape.from_call(call).rows for call in named]) == chosen


def test_modalities_that_the_probe_lacks() -> None:
    """Catches videos that are never measured because the probe has none, and a sample too large to be measured."""
    text, image, large, video = (
        SampleShape(0, 9, (9, 0, 0)),
        SampleShape(1, 8, (2, 6, 0)),
        SampleShape(2, MEASURED_ROWS + 1, (1, 0, MEASURED_ROWS)),
        SampleShape(3, MEASURED_ROWS, (1, 0, MEASURED_ROWS - 1)),
    )
    assert missing_modalities(image, [text, image, large, video]) == [video]
    assert missing_modalities(text, [text, image, large]) == [image]
    assert missing_modalities(text, [text, SampleShape(4, 7, (1, 2, 4))]) == [SampleShape(4, 7, (1, 2, 4))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rotated_stages_of_a_bfloat16_checkpoint_round_their_weights(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a calibration of a rotated model in float32, and rounding where the checkpoint has more bits."""
    monkeypatch.setattr(Checkpoint, "dtype", property(lambda checkpoint: dtype))
    rounds = set()

    def look(model: StreamedModel, inputs: StageInputs) -> None:
        model.rotation_plan = RotationPlan(stages={tiny.STAGES[1]: (typing.cast(AppliedRotation, object()),)})
        with materialized_stage(model, inputs, torch.bfloat16, model.checkpoint.tensor) as stage:
            if stage.execution.rounds_weights:
                rounds.add(stage.name)

    at_each_stage(look)
    assert rounds == ({tiny.STAGES[1]} if dtype == torch.bfloat16 else set())
