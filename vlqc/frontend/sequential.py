"""Suspended forwards: every sample runs the model's own code, and all of them stop at the door of each stage.

`model(**inputs)` of each sample runs as a coroutine. A stage's `forward` is replaced by a switch back to the compiler
that carries the stage's arguments; the compiler answers with the stage's outputs. What lies between stages (window
reordering, rotary embeddings, image features scattered into the text) is therefore always the model's own code.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vlqc.errors import Fault, InternalError, UserError, VlqcError
from vlqc.frontend.calibration.probe import PROBE
from vlqc.frontend.calibration.samples import same_images
from vlqc.frontend.memory import is_out_of_memory
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.execution import Call
from vlqc.ir.serialization import placeholder


@dataclass
class Stop:
    """All samples of this process that stand before one stage.

    Whoever receives it fills `outputs`, one per call, before going on.
    """

    name: str
    module: nn.Module
    calls: list[Call]
    outputs: list[Any] = field(default_factory=list)


@dataclass
class Answers:
    """What finished stages returned in an earlier run.

    stages: their names, in order; described: per stage and sample the form of what it returned; values: per sample the
    last finished stage it passed through, and what that returned.
    """

    stages: Sequence[str] = ()
    described: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)
    values: dict[int, tuple[str, Any]] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def of(self, stage: str, sample: int, asked: int) -> Any:
        """What a stage returned for a sample, once. Only of its last stage are there the numbers: nothing else is read
        again, and if it were, that would show, as the floats are NaN. asked: the sample that ran through it."""
        if self.values.get(sample, ("", None))[0] == stage:
            return self.values.pop(sample)[1]
        return placeholder(self.described[stage][asked], self.device)

    def share(self, sample: int, asked: int) -> None:
        """Lets a sample that ran through no stage of its own yet have what another one got."""
        if sample not in self.values and asked in self.values:
            self.values[sample] = self.values[asked]


@dataclass
class _Suspended:
    run: greenlet.greenlet
    modality: Tensor
    at: nn.Module | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    result: Any = None


class SequentialForward:
    """Advances all samples one stage at a time.

        with SequentialForward(model, samples) as lockstep:
            for stop in lockstep:
                stop.outputs = [stop.module(*call.args, **call.kwargs) for call in stop.calls]

    Samples need not visit every stage: text-only ones never stop in the vision tower. Without `to_the_end` the
    iteration ends at the last stage and nothing behind it (final norm, output head) ever runs; with it, `results`
    holds what `model(**inputs)` returned per sample. first: number of the first sample, where others are elsewhere;
    probe: one more, the last of all, whose number is PROBE.
    known: answers for stages that are finished; no sample stops there. share_images: of neighbours with the same
    pictures only the first stops in the vision tower; the others get its answers.
    """

    def __init__(
        self,
        model: StreamedModel,
        samples: Sequence[dict[str, Tensor]],
        *,
        to_the_end: bool = False,
        first: int = 0,
        probe: dict[str, Tensor] | None = None,
        known: Answers | None = None,
        share_images: bool = False,
    ) -> None:
        self.model = model
        self.samples = [*samples, *([] if probe is None else [probe])]
        self.numbers = [*range(first, first + len(samples)), *([] if probe is None else [PROBE])]
        self.to_the_end = to_the_end
        self.known = known or Answers()
        self._looker = _lookers(self.samples, len(samples) if share_images else 0)
        self.results: list[Any] = []
        self._suspended: list[_Suspended] = []
        for number, looker in enumerate(self._looker):
            self.known.share(self.numbers[number], self.numbers[looker])

    def __enter__(self) -> "SequentialForward":
        compiler = greenlet.getcurrent()

        def door(stage: nn.Module) -> Any:
            return lambda *args, **kwargs: compiler.switch((stage, args, kwargs))

        for stage in self.model.stages.values():
            stage.forward = door(stage)
        try:
            for sample in self.samples:
                inputs = self.model.inputs(sample)
                run = greenlet.greenlet(lambda given=inputs: (None, (self.model.module(**given),), {}), compiler)
                self._suspended.append(_Suspended(run, row_modality(sample, self.model.module)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *unused: object) -> None:
        with torch.no_grad():  # as they were resumed: a model that sets the mode itself sets it back to that
            for suspended in self._suspended:
                if suspended.run:
                    suspended.run.throw(greenlet.GreenletExit)
        self._suspended.clear()
        for stage in self.model.stages.values():
            stage.__dict__.pop("forward", None)

    def __iter__(self) -> Iterator[Stop]:
        last = list(self.model.stages)[-1]
        if last in self.known.stages and not self.to_the_end:
            return
        for number, suspended in enumerate(self._suspended):
            self._resume(suspended)
            while suspended.at is not None and (name := self.model.name(suspended.at)) in self.known.stages:
                asked = self.numbers[self._asked(number, suspended.at)]
                self._resume(suspended, self.known.of(name, self.numbers[number], asked))
        order = {stage: number for number, stage in enumerate(self.model.stages.values())}
        for name, stage in self.model.stages.items():
            if name in self.known.stages:
                continue
            for one in self._suspended:
                if one.at is not None and order[one.at] < order[stage]:
                    where = self.model.name(one.at)
                    raise InternalError(f"a sample stands before {where} when {name} is due: stages are out of order")
            waiting = [number for number, one in enumerate(self._suspended) if one.at is stage]
            standing = [number for number in waiting if self._asked(number, stage) == number]
            calls = [self._call(number, stage) for number in standing]
            stop = Stop(name, stage, calls)
            forward = stage.__dict__.pop("forward")
            try:
                yield stop
            finally:
                if self._suspended:  # a generator may be closed after the lockstep
                    stage.forward = forward
            if len(stop.outputs) != len(calls):
                raise InternalError(f"{name}: {len(calls)} samples stand before it, {len(stop.outputs)} were answered")
            if name == last and not self.to_the_end:
                return
            answers = dict(zip(standing, stop.outputs, strict=True))
            for number in waiting:
                self._resume(self._suspended[number], answers[self._asked(number, stage)])
        for suspended in self._suspended:
            if suspended.at is not None:
                where = self.model.name(suspended.at)
                raise InternalError(f"a sample returned to {where} after the stages behind it: stages are out of order")
        self.results = [suspended.result for suspended in self._suspended]

    def _asked(self, number: int, stage: nn.Module) -> int:
        """Which sample runs through a stage for this one: itself, or in the vision tower who looks at its pictures."""
        return number if self.model.is_language(stage) else self._looker[number]

    def _call(self, number: int, stage: nn.Module) -> Call:
        one = self._suspended[number]
        if self.known.stages:
            self._require_known(self.model.name(stage), one)
        return Call(self.numbers[number], one.args, one.kwargs, one.modality if self.model.is_language(stage) else None)

    @staticmethod
    def _require_known(stage: str, suspended: _Suspended) -> None:
        """UserError if anything comes from a stage whose outputs were not kept."""
        given = tree_leaves((suspended.args, suspended.kwargs))
        if any(isinstance(it, Tensor) and it.is_floating_point() and bool(it.isnan().any()) for it in given):
            why = "the model's own code reads what earlier stages returned, or makes NaN itself"
            fix = "start anew with --start_over"
            raise UserError(Fault("this model cannot be resumed here", stage, why, fix))

    @staticmethod
    def _resume(suspended: _Suspended, *answer: Any) -> None:
        suspended.at, suspended.args, suspended.kwargs = None, (), {}
        with torch.no_grad():
            try:
                suspended.at, args, suspended.kwargs = suspended.run.switch(*answer)
            except VlqcError:
                raise
            except Exception as error:  # the model's own code between stages, which a config can break in any way
                if is_out_of_memory(error):
                    raise
                why = f"{type(error).__name__}: {error}"
                fix = "look at config.json and at the sample"
                raise UserError(Fault("the model cannot be run on a sample", why=why, fix=fix)) from error
        if suspended.at is None:
            (suspended.result,) = args
        else:
            suspended.args = args


def _lookers(samples: Sequence[dict[str, Tensor]], sharing: int) -> list[int]:
    """For every sample the one that looks at its pictures: of the first `sharing` ones a neighbour before it, or it."""
    found = list(range(len(samples)))
    for number in range(1, sharing):
        if same_images(samples[found[number - 1]], samples[number]):
            found[number] = found[number - 1]
    return found


def row_modality(sample: dict[str, Tensor], model: nn.Module) -> Tensor:
    """input_ids and attention_mask [B, S] of a sample -> int8 [B*S]: 0 text, 1 image (as ir.MODALITIES), -1 padding."""
    ids = sample["input_ids"]
    modality = (ids == model.config.image_token_id).to(torch.int8)  # type: ignore[union-attr]
    mask = sample.get("attention_mask")
    if mask is not None and mask.shape == ids.shape:
        modality = torch.where(mask == 0, torch.full_like(modality, -1), modality)
    flat: Tensor = modality.flatten()
    return flat
