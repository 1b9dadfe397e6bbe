"""Suspended forwards: stage by stage gives what an ordinary forward gives, and leaves the model as it was."""

from types import SimpleNamespace

import greenlet
import pytest
import torch
from torch import Tensor, nn

from tests.support import tiny
from vlqc.errors import InternalError, UserError
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.sequential import SequentialForward

RUN_ANYTHING = pytest.mark.every_transformers


@RUN_ANYTHING
def test_logits_are_bit_equal_with_an_ordinary_forward() -> None:
    """Catches any glue between stages that is skipped, repeated, or run for the wrong sample: mixed kinds and sizes."""
    model, samples = tiny.float_model(), tiny.mixed_samples()
    with (
        model.non_stage_weights(model.checkpoint.tensor, head=True),
        SequentialForward(model, samples, run_to_end=True) as forward,
    ):
        names = []
        for inputs in forward:
            names.append(inputs.name)
            tiny.run_float_stage(model, inputs)
    assert names == tiny.STAGES
    for sample, result in zip(samples, forward.results, strict=True):
        assert torch.equal(result.logits, tiny.plain_logits(sample))


@RUN_ANYTHING
def test_text_only_samples_skip_the_vision_tower() -> None:
    """Catches a sample without an image that runs through the vision tower, or is counted there."""
    model, samples = tiny.float_model(), tiny.mixed_samples()
    with model.non_stage_weights(model.checkpoint.tensor), SequentialForward(model, samples) as forward:
        for inputs in forward:
            assert [call.sample for call in inputs.calls] == ([0, 2, 3] if "visual" in inputs.name else [0, 1, 2, 3])
            tiny.run_float_stage(model, inputs)


@RUN_ANYTHING
def test_the_head_never_runs_without_to_the_end() -> None:
    """Catches the largest matrix of the model being multiplied, and the final norm, without a loss to compute."""
    model = tiny.float_model()
    ran = []
    for name in ("lm_head", "norm"):
        module = next(child for child in model.module.modules() if model.name(child) in (name, f"model.{name}"))
        module.register_forward_pre_hook(lambda *unused, name=name: ran.append(name))
    for run_to_end in (False, True):
        with (
            model.non_stage_weights(model.checkpoint.tensor, head=True),
            SequentialForward(model, [tiny.synthetic_sample()], run_to_end=run_to_end) as forward,
        ):
            for inputs in forward:
                tiny.run_float_stage(model, inputs)
        assert ran == (["norm", "lm_head"] if run_to_end else [])
        assert len(forward.results) == run_to_end


@RUN_ANYTHING
@pytest.mark.parametrize("stage", ["visual.blocks.1", "model.layers.3"])
@pytest.mark.parametrize("held", [False, True])
def test_everything_is_put_back_after_an_error(stage: str, held: bool) -> None:
    """Catches forwards that stay replaced and coroutines that stay alive (with all their tensors) after a failure."""
    model = tiny.float_model()
    suspended = []
    with (
        pytest.raises(ZeroDivisionError),
        model.non_stage_weights(model.checkpoint.tensor),
        SequentialForward(model, tiny.mixed_samples()) as forward,
    ):
        stops = iter(forward)
        for inputs in stops if held else forward:
            suspended = [one.greenlet for one in forward._forwards]
            if inputs.name == stage:
                _ = 1 / 0
            tiny.run_float_stage(model, inputs)
    stops.close()
    assert suspended and all(run.dead for run in suspended)
    assert not any("forward" in module.__dict__ for module in model.stages.values())
    assert {parameter.device.type for parameter in model.module.parameters()} == {"meta"}
    assert torch.is_grad_enabled()


@RUN_ANYTHING
def test_a_stage_runs_itself_while_it_is_due() -> None:
    """Catches a door that stays shut for the stage at hand, or that opens for another."""
    model = tiny.float_model()
    with (
        model.non_stage_weights(model.checkpoint.tensor),
        SequentialForward(model, [tiny.synthetic_sample((4, 4))]) as forward,
    ):
        for inputs in forward:
            shut = {name for name, stage in model.stages.items() if "forward" in stage.__dict__}
            assert shut == set(tiny.STAGES) - {inputs.name}
            tiny.run_float_stage(model, inputs)


@RUN_ANYTHING
@pytest.mark.parametrize("given", [0, 1, 3])
def test_a_missing_answer_is_an_internal_error(given: int) -> None:
    """Catches a sample that goes on with another sample's output because an answer was forgotten."""
    model = tiny.float_model()
    samples = [tiny.synthetic_sample((4, 4), seed=number) for number in range(2)]
    with model.non_stage_weights(model.checkpoint.tensor), SequentialForward(model, samples) as forward:
        stops = iter(forward)
        inputs = next(stops)
        tiny.run_float_stage(model, inputs)
        inputs.outputs = (inputs.outputs * 2)[:given]
        with pytest.raises(InternalError, match=rf"visual.blocks.0: {given} outputs for 2 samples"):
            next(stops)


@RUN_ANYTHING
def test_an_error_in_the_models_own_code_comes_through() -> None:
    """Catches an error between two stages that disappears in a coroutine, or reaches the user as a traceback."""
    model = tiny.float_model()
    sample = tiny.synthetic_sample((4, 4))
    sample["pixel_values"] = sample["pixel_values"][:, :100]
    with (
        model.non_stage_weights(model.checkpoint.tensor),
        pytest.raises(UserError, match=r"cannot be run on a sample[\s\S]*RuntimeError: shape"),
        SequentialForward(model, [tiny.synthetic_sample(), sample]) as forward,
    ):
        for inputs in forward:
            tiny.run_float_stage(model, inputs)
    assert not any("forward" in module.__dict__ for module in model.stages.values())


def test_modality_of_rows() -> None:
    """Catches padding that counts as text, or image tokens that do."""
    config = SimpleNamespace(image_token_id=5, video_token_id=6)
    sample = {"input_ids": torch.tensor([[0, 1, 5, 5, 9]]), "attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}
    modality = QWEN2_5_VL.inputs.row_modality(sample, config)
    assert modality.dtype == torch.int8 and modality.tolist() == [-1, 0, 1, 1, 0]
    del sample["attention_mask"]
    assert QWEN2_5_VL.inputs.row_modality(sample, config).tolist() == [0, 0, 1, 1, 0]


@RUN_ANYTHING
def test_calls_say_which_rows_are_pictures() -> None:
    """Catches a modality on image patches, or none on the tokens of the prompt."""
    model, sample = tiny.float_model(), tiny.synthetic_sample((4, 4), words=2)
    with model.non_stage_weights(model.checkpoint.tensor), SequentialForward(model, [sample]) as forward:
        for inputs in forward:
            (call,) = inputs.calls
            if "visual" in inputs.name:
                assert call.modality is None
            else:
                assert call.modality is not None and call.modality.tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0]
            tiny.run_float_stage(model, inputs)


# ---- models that do unusual things, made by hand ---------------------------------------------------------------------


class Towers(nn.Module):
    """Three stages in a list, run in the order `order`, under a gradient mode of its own."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.order = order
        self.config = SimpleNamespace(image_token_id=5, video_token_id=6)

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Tensor:
        rows = input_ids.float()
        for number in self.order:
            rows = self.blocks[number](rows) + 1
        return rows


class Minimal:
    """Of StreamedModel what SequentialForward uses."""

    family = QWEN2_5_VL

    def __init__(self, module: Towers) -> None:
        self.module = module
        self.stages = {f"blocks.{number}": block for number, block in enumerate(module.blocks)}

    def inputs(self, sample: dict[str, Tensor]) -> dict[str, Tensor]:
        return sample

    def is_language(self, stage: nn.Module) -> bool:
        return False

    def name(self, stage: nn.Module) -> str:
        return next(name for name, other in self.stages.items() if other is stage)


def sequential_forward(order: list[int], *, run_to_end: bool = True) -> SequentialForward:
    samples = [{"input_ids": torch.tensor([[1, number]])} for number in range(2)]
    return SequentialForward(Minimal(Towers(order)), samples, run_to_end=run_to_end)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2], [1], []])
def test_stages_may_be_skipped(order: list[int]) -> None:
    """Catches samples that hang or lose their result when the model does not visit every stage."""
    forward = sequential_forward(order)
    with forward:
        for inputs in forward:
            assert len(inputs.calls) == (2 if int(inputs.name[-1]) in order else 0)
            inputs.outputs = [inputs.module(*call.args) for call in inputs.calls]
    for number, result in enumerate(forward.results):
        assert torch.equal(result, forward.model.module(torch.tensor([[1, number]])))


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 0], [0, 1, 0, 2], [2, 2]])
@pytest.mark.parametrize("run_to_end", [False, True])
def test_stages_out_of_order_are_an_internal_error(order: list[int], run_to_end: bool) -> None:
    """Catches a model that returns to an earlier stage: its samples would silently be measured incompletely."""
    if order == [2, 2] and not run_to_end:
        order = [1, 1, 2]  # behind the last stage nothing runs
    with (
        pytest.raises(InternalError, match="out of order"),
        sequential_forward(order, run_to_end=run_to_end) as forward,
    ):
        for inputs in forward:
            inputs.outputs = [inputs.module(*call.args) for call in inputs.calls]


@pytest.mark.parametrize("ready", [0, 1, 3])
def test_gradient_mode_survives(ready: int) -> None:
    """Catches coroutines that are ended under another gradient mode than they were resumed in, and leave it set."""
    assert torch.is_grad_enabled()
    with sequential_forward([0, 1, 2]) as forward:
        for number, inputs in enumerate(forward):
            if number == ready:
                break
            assert torch.is_grad_enabled()
            inputs.outputs = [inputs.module(*call.args) for call in inputs.calls]
    assert torch.is_grad_enabled()


def test_samples_run_in_coroutines_of_the_caller() -> None:
    """Catches a forward that only works from the main coroutine (a test runner or a notebook may use others)."""
    results = []

    def inside() -> None:
        with sequential_forward([0, 1, 2]) as forward:
            for inputs in forward:
                inputs.outputs = [inputs.module(*call.args) for call in inputs.calls]
        results.extend(forward.results)

    greenlet.greenlet(inside).switch()
    assert len(results) == 2
