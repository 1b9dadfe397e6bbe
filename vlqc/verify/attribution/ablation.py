"""Which layers a compiled folder loses its accuracy in: every group quantized alone, and every group float alone.

All variants are suspended forwards beside each other, two per group: the float model with only that group quantized,
and the folder with only that group float. So every weight is read once, and one stage is in memory at a time. Up to its
group's stage a variant is its base, whose outputs it is given; from there on it runs for itself.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlqc.formatting import format_bytes, format_duration
from vlqc.frontend.calibration.samples import checked_samples
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.sequential import SequentialForward, Stop, row_modality
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.stage import MODALITIES, Call, first_tensor, watching
from vlqc.verify.accuracy import logits_are_hidden
from vlqc.verify.attribution.group_error import Measured, SeenInput, measure
from vlqc.verify.attribution.ranking import report_ranking
from vlqc.verify.attribution.stage_pair import FolderStages, StagePair
from vlqc.verify.attribution.variants import (
    Group,
    GroupNoise,
    Located,
    ModalityNoise,
    Run,
    Variant,
    choose_samples,
    find_groups,
)
from vlqc.verify.findings import VerificationResult
from vlqc.verify.structure.expected import ExpectedModel
from vlqc.verify.structure.structure import CompiledFolder

TOKENS = 256  # of all samples together
HEAD_ROWS = 4096  # of the output head that are in memory at a time
QUIET_SECONDS = 5.0  # between two lines of progress, at least
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


@torch.no_grad()
def locate_drop(
    content: CompiledFolder,
    model_path: Path,
    samples: Sequence[dict[str, Tensor]],
    tokens: int,
    result: VerificationResult,
    progress: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Ranking, figures and advice into the report. UserError: unusable input.

    samples: as for `vlqc.compile`; tokens: see `choose_samples`; progress: is told the work to come and how far it is.
    """
    expected = content.model
    if expected is None:
        raise ValueError("the folder must describe a model")
    checkpoint = Checkpoint(model_path)
    model = StreamedModel.open(checkpoint, trust_remote_code=trust_remote_code)
    samples = checked_samples(samples, model.module)
    numbers = choose_samples(samples, tokens)
    groups = find_groups(model, content.schemes)
    if not groups:
        result.facts["located"] = "nothing in this folder is quantized"
        return
    work = _Work(model, expected, groups, [samples[number] for number in numbers], DTYPES[content.glue])
    plan = work.plan()
    if progress is not None:
        progress(plan)
    located = work.run(FolderStages(content.files.path, trust_remote_code=trust_remote_code), progress)
    result.facts["located on"] = f"{len(numbers)} of {len(samples)} samples; {plan}"
    report_ranking(located, content, result)


class _Work:
    """All variants on all chosen samples, and what was measured on the way."""

    def __init__(
        self,
        model: StreamedModel,
        expected: ExpectedModel,
        groups: list[Group],
        samples: list[dict[str, Tensor]],
        dtype: torch.dtype,
    ) -> None:
        self.model, self.expected, self.groups, self.samples, self.dtype = model, expected, groups, samples, dtype
        self.stages = list(model.stages)
        begin = {group: self.stages.index(group.stage) for group in groups}
        self.float, self.stored = Variant(stored=False), Variant(stored=True)
        self.folded = Variant(True, tuple(groups), min(begin.values()))  # everything float, but in the folder's stages
        self.only_quantized = {group: Variant(False, (group,), begin[group]) for group in groups}
        self.only_float = {group: Variant(True, (group,), begin[group]) for group in groups}
        variants = [self.float, self.stored, self.folded]  # the first two answer for the others
        variants += [*self.only_quantized.values(), *self.only_float.values()]
        self.runs = [Run(it, sample) for it in variants for sample in range(len(samples)) if self._differs(it, sample)]
        self.modality = [row_modality(sample, model.module) for sample in samples]
        self.measured: dict[Group, Measured] = {}
        self.stage_runs = 0

    def plan(self) -> str:
        """How much will be done, in words."""
        kinds = torch.cat(self.modality)
        text, image = (int((kinds == number).sum()) for number in range(len(MODALITIES)))
        width = self.model.embedding.get_parameter("weight").shape[1]
        held = sum(len(self.modality[run.sample]) for run in self.runs) * width * 4
        work = f"{self.expected_stage_runs()} stage runs, {format_bytes(held)} of hidden states"
        return f"{text} text and {image} image tokens, {len(self.groups)} groups: {work}"

    def expected_stage_runs(self) -> int:
        return sum(
            self._visits(run.sample, stage) and number >= run.variant.begin
            for run in self.runs
            for number, stage in enumerate(self.stages)
        )

    def run(self, folder: FolderStages, progress: Callable[[str], None] | None) -> Located:
        """Runs everything, one stage after the other."""
        model, told, started = self.model, time.monotonic(), time.monotonic()
        all_runs = self.expected_stage_runs()
        with model.non_stage_weights(model.checkpoint.tensor), logits_are_hidden(model.module):
            given = [self.samples[run.sample] for run in self.runs]
            with SequentialForward(model, given, to_the_end=True) as lockstep:
                for number, stop in enumerate(lockstep):
                    model.materialize(stop.module, model.checkpoint.tensor)
                    with folder.stage(model.path(stop.module)) as stored:
                        self._run_stage(number, stop, stored)
                    model.to_meta(stop.module)
                    if progress is not None and time.monotonic() - told >= QUIET_SECONDS:
                        told = time.monotonic()
                        left = (told - started) * (all_runs / max(self.stage_runs, 1) - 1)
                        done = f"stage {number + 1} of {len(self.stages)}, {self.stage_runs} of {all_runs} stage runs"
                        progress(
                            f"{done}, {format_duration(told - started)} elapsed, about {format_duration(left)} left"
                        )
                hidden = [result.logits[0].float() for result in lockstep.results]
        noise = self._noise(hidden)
        by_group = {
            group: GroupNoise(
                noise[self.only_quantized[group]], noise[self.only_float[group]], self.measured.get(group)
            )
            for group in self.groups
        }
        return Located(noise[self.float], noise[self.stored], noise[self.folded], by_group)

    def _run_stage(self, number: int, stop: Stop, stored: nn.Module) -> None:
        pair = StagePair(stop.name, stop.module, stored, self.expected)
        here = {group for group in self.groups if group.stage == stop.name}
        outputs: dict[tuple[bool, int], Any] = {}  # of the unchanged models, per sample
        seen: dict[Group, list[SeenInput]] = {group: [] for group in here}
        for call in stop.calls:
            run = self.runs[call.sample]
            variant = run.variant
            if number < variant.begin:
                stop.outputs.append(outputs[variant.stored, run.sample])
                continue
            stage = stored if variant.stored else stop.module
            layers = [layer for group in variant.groups if group in here for layer in group.layers]
            self.stage_runs += 1
            if variant is self.float:
                output = self._watched(pair, stage, call, seen)
            else:
                with pair.swapped(layers, in_stored=variant.stored):
                    output = stage(*call.args, **call.kwargs)
            if not variant.groups:
                outputs[variant.stored, run.sample] = output
            stop.outputs.append(output)
        for group, inputs in seen.items():
            if inputs:
                rows, modality, weight = (
                    torch.cat([getattr(it, part) for it in inputs]) for part in ("rows", "modality", "weight")
                )
                self.measured[group] = measure(pair, group.layers, SeenInput(rows, modality, weight), self.dtype)

    def _watched(self, pair: StagePair, stage: nn.Module, call: Call, seen: dict[Group, list[SeenInput]]) -> Any:
        """Runs the float stage and keeps what enters its groups."""
        inputs: dict[Group, Tensor] = {}
        paths = {module: path for path, module in stage.named_modules()}

        def keep(group: Group) -> Callable[[Tensor, Call], None]:
            return lambda x, _: inputs.__setitem__(group, x.reshape(-1, x.shape[-1]).float())

        watch = {paths[pair.linears[group.layers[0]]]: keep(group) for group in seen}
        with watching(stage, watch, call):
            output = stage(*call.args, **call.kwargs)
        made = first_tensor(output)
        power = made.reshape(-1, made.shape[-1]).double().square().sum(dim=1)
        for group, rows in inputs.items():
            modality = call.modality if call.modality is not None else torch.ones(len(rows), dtype=torch.int8)
            # Before the logits every token is normalised: an error counts by what its token carries.
            weight = 1 / power.clamp(min=1e-30) if len(power) == len(rows) else torch.ones(len(rows)).double()
            real = modality >= 0
            seen[group].append(SeenInput(rows[real], modality[real], weight[real]))
        return output

    def _noise(self, hidden: list[Tensor]) -> dict[Variant, ModalityNoise]:
        """Final hidden rows [S, H] of every run -> the power of each variant's error, of the float model its own."""
        gram = head_gram(self.model)
        at = {(run.variant, run.sample): rows for run, rows in zip(self.runs, hidden, strict=True)}
        noise = {variant: ModalityNoise() for variant, _ in at}
        for variant, sums in noise.items():
            for sample, modality in enumerate(self.modality):
                reference = at[self.float, sample]
                unchanged = at[self.stored if variant.stored else self.float, sample]
                error = at.get((variant, sample), unchanged) - reference
                sums.add(logit_power(reference if variant is self.float else error, gram), modality)
        return noise

    def _differs(self, variant: Variant, sample: int) -> bool:
        """Whether a sample meets what a variant changes; text never meets the vision tower."""
        return not variant.groups or any(self._visits(sample, group.stage) for group in variant.groups)

    def _visits(self, sample: int, stage: str) -> bool:
        return "pixel_values" in self.samples[sample] or self.model.is_language(self.model.stages[stage])


def head_gram(model: StreamedModel) -> Tensor:
    """float64 [H, H]: the Gram matrix of the output head, by which the power of logits follows from hidden rows."""
    head: Any = model.module.get_output_embeddings()  # type: ignore[operator]
    name = f"{model.name(model.embedding if model.tied else head)}.weight"
    gram = torch.zeros(head.in_features, head.in_features, dtype=torch.float64)
    for start in range(0, head.out_features, HEAD_ROWS):
        some = torch.arange(start, min(start + HEAD_ROWS, head.out_features))
        rows = model.checkpoint.rows(name, some).float()
        gram += (rows.T @ rows).double()
    return gram


def logit_power(hidden: Tensor, gram: Tensor) -> Tensor:
    """hidden float [S, H] (or a difference of two) -> float64 [S]: sum of the squares of its logits."""
    wide = hidden.double()
    return ((wide @ gram) * wide).sum(dim=1).clamp(min=0)
