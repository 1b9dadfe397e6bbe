"""Sequential calibration: the forwards of all samples are suspended at each stage and advance one stage at a time.

`model(**inputs)` of each sample runs in a greenlet. The `forward` of every stage is replaced by a switch to the caller
that passes the arguments of the stage; the caller resumes the forward with the outputs of the stage. Everything between
stages (window reordering, rotary embeddings, image features scattered into the text) therefore runs in the model's own
code, in every version of transformers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from vlqc.errors import Fault, InternalError, UserError, VlqcError
from vlqc.families.inputs.text_inputs import TextInputs
from vlqc.frontend.calibration.probe import PROBE, VISION_PROBE
from vlqc.frontend.memory import is_out_of_memory
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.execution import Call
from vlqc.ir.serialization import placeholder


@dataclass
class StageInputs:
    """Inputs of one stage for all samples of this rank. The caller fills `outputs`, one per call, in their order."""

    name: str
    module: nn.Module
    calls: list[Call]
    outputs: list[Any] = field(default_factory=list)


@dataclass
class CachedOutputs:
    """Outputs of the stages that an interrupted run has finished.

    stages: their names in order; specs: stage -> sample -> structure of the outputs, as `serialization` describes it;
    values: sample -> stage -> outputs, of the last finished stage of the sample and of those that stages read which are
    not finished.
    """

    stages: Sequence[str] = ()
    specs: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)
    values: dict[int, dict[str, Any]] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def pop(self, stage: str, sample: int, owner: int) -> Any:
        """Outputs of a stage for a sample; to be called once.

        For a stage without values, whose outputs only finished stages read, it returns tensors of the same shape, with
        NaN in place of floats.

        owner: the sample that ran through the stage; another one if both have the same images.
        """
        if stage in self.values.get(sample, {}):
            return self.values[sample].pop(stage)
        return placeholder(self.specs[stage][owner], self.device)

    def share(self, sample: int, owner: int) -> None:
        """Copies the entries of `owner` that a sample does not have."""
        if owner in self.values:
            self.values[sample] = self.values[owner] | self.values.get(sample, {})


@dataclass
class _SuspendedForward:
    greenlet: greenlet.greenlet
    modality: Tensor
    patch_modality: Tensor | None
    ends_with_vision: bool = False
    stage: nn.Module | None = None  # at which it is suspended
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    result: Any = None


class SequentialForward:
    """Runs all samples through the model, one stage at a time.

        with model.non_stage_weights(read), SequentialForward(model, samples) as forward:
            for inputs in forward.loaded_stages():
                inputs.outputs = [inputs.module(*call.args, **call.kwargs) for call in inputs.calls]

    Samples may skip stages: those without images do not reach the vision tower.

    samples: model inputs of this rank; first: index of the first of them among the samples of all ranks; probe: one
    more sample, with the index PROBE; vision_probe: another one, with the index VISION_PROBE, that runs through the
    vision tower only; cached: outputs of finished stages, which are skipped.
    run_to_end: whether to run what follows the last stage (final norm, output head) and to keep the return values of
    the model in `results`; otherwise the iteration ends at the last stage.
    share_images: whether consecutive samples with the same images run through the vision tower once.
    """

    def __init__(
        self,
        model: StreamedModel,
        samples: Sequence[dict[str, Tensor]],
        *,
        run_to_end: bool = False,
        first: int = 0,
        probe: dict[str, Tensor] | None = None,
        vision_probe: dict[str, Tensor] | None = None,
        cached: CachedOutputs | None = None,
        share_images: bool = False,
    ) -> None:
        self.model = model
        probes = {PROBE: probe, VISION_PROBE: vision_probe}
        self.samples = [*samples, *(each for each in probes.values() if each is not None)]
        self.indices = [*range(first, first + len(samples)), *(key for key, each in probes.items() if each is not None)]
        self.run_to_end = run_to_end
        self.cached = cached or CachedOutputs()
        self._image_owners = _image_owners(self.samples, len(samples) if share_images else 0, model.family.inputs)
        self.results: list[Any] = []
        self._forwards: list[_SuspendedForward] = []
        for position, owner in enumerate(self._image_owners):
            self.cached.share(self.indices[position], self.indices[owner])

    def __enter__(self) -> "SequentialForward":
        caller = greenlet.getcurrent()

        def suspending_forward(stage: nn.Module) -> Any:
            return lambda *args, **kwargs: caller.switch((stage, args, kwargs))

        for stage in self.model.stages.values():
            stage.forward = suspending_forward(stage)
        config, of_family = self.model.module.config, self.model.family.inputs
        try:
            for index, sample in zip(self.indices, self.samples, strict=True):
                inputs = self.model.inputs(sample)
                run = greenlet.greenlet(lambda inputs=inputs: (None, (self.model.module(**inputs),), {}), caller)
                modality = of_family.row_modality(sample, config), of_family.patch_modality(sample, config)
                self._forwards.append(_SuspendedForward(run, *modality, index == VISION_PROBE))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *unused: object) -> None:
        # In the gradient mode in which they were resumed: a model that sets the mode restores that one.
        with torch.no_grad():
            for forward in self._forwards:
                if forward.greenlet:
                    forward.greenlet.throw(greenlet.GreenletExit)
        self._forwards.clear()
        for stage in self.model.stages.values():
            stage.__dict__.pop("forward", None)

    def loaded_stages(self) -> Iterator[StageInputs]:
        """The stages that are not cached, in order, each with its weights in float32 while the caller works on it.

        At most one stage has weights; those of the next one are prefetched from disk.
        """
        for inputs in self:
            try:
                self.model.materialize(inputs.module, self.model.read_stage_tensor)
                self.model.prefetch_after(inputs.name)
                yield inputs
            finally:
                self.model.to_meta(inputs.module)

    def __iter__(self) -> Iterator[StageInputs]:
        """As `loaded_stages`, without weights."""
        last = list(self.model.stages)[-1]
        if last in self.cached.stages and not self.run_to_end:
            return
        self._skip_cached_stages()
        order = {stage: index for index, stage in enumerate(self.model.stages.values())}
        for name, stage in self.model.stages.items():
            if name in self.cached.stages:
                continue
            for forward in self._forwards:
                if forward.stage is not None and order[forward.stage] < order[stage]:
                    early = self.model.name(forward.stage)
                    raise InternalError(f"stages run out of order: a sample is at {early} when {name} is next")
            suspended = [position for position, forward in enumerate(self._forwards) if forward.stage is stage]
            running = [position for position in suspended if self._owner(position, stage) == position]
            calls = [self._call(position, stage) for position in running]
            inputs = StageInputs(name, stage, calls)
            suspending_forward = stage.__dict__.pop("forward")
            try:
                yield inputs
            finally:
                if self._forwards:  # empty if the iterator is closed after the `with` block
                    stage.forward = suspending_forward
            if len(inputs.outputs) != len(calls):
                raise InternalError(f"{name}: {len(inputs.outputs)} outputs for {len(calls)} samples")
            if name == last and not self.run_to_end:
                return
            outputs = dict(zip(running, inputs.outputs, strict=True))
            shared = self.model.is_language(stage) and len({id(output) for output in inputs.outputs}) < len(calls)
            for position in suspended:
                output = outputs[self._owner(position, stage)]
                # Models may write into the outputs of decoder layers (Qwen3-VL in transformers 4 adds image features).
                self._resume(self._forwards[position], tree_map_only(Tensor, torch.clone, output) if shared else output)
        for forward in self._forwards:
            if forward.stage is not None:
                where = self.model.name(forward.stage)
                raise InternalError(f"stages run out of order: a sample returned to {where}")
        self.results = [forward.result for forward in self._forwards]

    def _skip_cached_stages(self) -> None:
        """Starts all forwards and resumes them with cached outputs up to the first stage that is not cached."""
        for position, forward in enumerate(self._forwards):
            self._resume(forward)
            while forward.stage is not None and (name := self.model.name(forward.stage)) in self.cached.stages:
                owner = self.indices[self._owner(position, forward.stage)]
                self._resume(forward, self.cached.pop(name, self.indices[position], owner))

    def _owner(self, position: int, stage: nn.Module) -> int:
        """Position of the sample whose outputs a sample takes: its own, or in the vision tower the image owner's."""
        return position if self.model.is_language(stage) else self._image_owners[position]

    def _call(self, position: int, stage: nn.Module) -> Call:
        forward = self._forwards[position]
        if self.cached.stages:
            self._require_no_placeholder(self.model.name(stage), forward)
        modality = forward.modality if self.model.is_language(stage) else forward.patch_modality
        return Call(self.indices[position], forward.args, forward.kwargs, modality)

    @staticmethod
    def _require_no_placeholder(stage: str, forward: _SuspendedForward) -> None:
        """UserError if an input depends on a stage whose outputs were not saved."""
        tensors = [value for value in tree_leaves((forward.args, forward.kwargs)) if isinstance(value, Tensor)]
        if any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in tensors):
            why = "its inputs are NaN: the model reads outputs of earlier stages, which are not saved, or computes NaN"
            fix = "start again with --start_over"
            raise UserError(Fault("the run cannot be resumed at this stage", stage, why, fix))

    def _resume(self, forward: _SuspendedForward, *outputs: Any) -> None:
        forward.stage, forward.args, forward.kwargs = None, (), {}
        with torch.no_grad():
            try:
                forward.stage, args, forward.kwargs = forward.greenlet.switch(*outputs)
            except VlqcError:
                raise
            except Exception as error:  # raised by the model's code, for which any config.json is possible
                if is_out_of_memory(error):
                    raise
                why = f"{type(error).__name__}: {error}"
                fix = "check config.json and the sample"
                raise UserError(Fault("the model cannot be run on a sample", why=why, fix=fix)) from error
        if forward.stage is None:
            (forward.result,) = args
        elif forward.ends_with_vision and self.model.is_language(forward.stage):
            forward.greenlet.throw(greenlet.GreenletExit)
            forward.stage, forward.kwargs = None, {}
        else:
            forward.args = args


def _image_owners(samples: Sequence[dict[str, Tensor]], count: int, inputs: TextInputs) -> list[int]:
    """Per sample the position of the sample that runs through the vision tower in its place.

    Among the first `count` samples that is the first of consecutive ones with the same images, otherwise itself.
    """
    owners = list(range(len(samples)))
    for position in range(1, count):
        if inputs.same_images(samples[owners[position - 1]], samples[position]):
            owners[position] = owners[position - 1]
    return owners
