"""Measures how much of the logits' error each group of layers causes, by two ablations per group.

The cached keys and values of a decoder layer are a group as well.

One variant is the float model with only that group quantized, the other the compiled folder with only that group float.
All variants run side by side, stage by stage, so every weight is read once and one stage is in memory at a time. Before
its group's stage a variant equals its base model and reuses the base's outputs; from there on it runs by itself.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlqc.families.inputs.text_inputs import TextInputs
from vlqc.families.layer_names import combine_names
from vlqc.formatting import format_bytes, format_duration, pluralize
from vlqc.frontend.calibration.samples import check_samples
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.model_structure import ModelStructure
from vlqc.frontend.sequential import SequentialForward, StageInputs
from vlqc.frontend.stage_builder import checkpoint_name
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.execution import Call, first_tensor, observing
from vlqc.ir.observation import MODALITIES, modality_of_rows, of_images
from vlqc.targets.caches import CacheSchemes
from vlqc.targets.schemes import Scheme
from vlqc.verify.accuracy import logits_are_hidden
from vlqc.verify.attribution.group_error import CapturedInput, GroupError, measure_group
from vlqc.verify.attribution.stage_pair import FolderStages, StagePair
from vlqc.verify.findings import VerificationResult
from vlqc.verify.folder.rotations import Seeds, rotate_float_model
from vlqc.verify.structure.structure import CompiledFolder

TOKENS = 256  # of all samples together
HEAD_ROWS = 4096  # rows of the output head in memory at a time
PROGRESS_SECONDS = 5.0  # least time between two progress messages
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class LayerGroup:
    """Quantized layers of one stage that share an input and a scheme, or the quantized cache of an attention module.

    layers: empty for a cache; cache: name of the attention module, empty for layers.
    """

    stage: str
    layers: tuple[str, ...]
    cache: str = ""

    @property
    def name(self) -> str:
        """`model.layers.3.mlp.{gate,up}_proj`; the layer's name where there is only one."""
        return f"{self.cache}, KV cache" if self.cache else combine_names(self.layers)


@dataclass(frozen=True, eq=False)
class Variant:
    """The float model (or the folder, if `stored`) with some groups taken from the other one.

    begin: index of the first stage in which it differs from its base model.
    """

    stored: bool
    groups: tuple[LayerGroup, ...] = ()
    begin: int = 0


@dataclass(frozen=True)
class VariantRun:
    """One variant on one sample; sample: index into the chosen samples."""

    variant: Variant
    sample: int


@dataclass
class ModalityPower:
    """Power of the logits, or of their error, per modality, summed over all samples."""

    power: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MODALITIES, 0.0))

    def add(self, power: Tensor, modality: Tensor) -> None:
        """power float64 [S], modality int8 [S]."""
        for number, name in enumerate(MODALITIES):
            self.power[name] += float(power[modality == number].sum())

    @property
    def total(self) -> float:
        return sum(self.power.values())


@dataclass(frozen=True)
class GroupEffect:
    """alone: error of the float model with only this group quantized; without: error of the folder with only this group
    float; measured: the error at the group's own outputs, None where no sample reaches it."""

    alone: ModalityPower
    without: ModalityPower
    measured: GroupError | None


@dataclass(frozen=True)
class Attribution:
    """signal: power of the float logits; error: of the folder's error; float_groups_error: of the error that remains if
    all groups are float, which is that of folded and rounded float tensors; groups: in the order of the model."""

    signal: ModalityPower
    error: ModalityPower
    float_groups_error: ModalityPower
    groups: dict[LayerGroup, GroupEffect]


@torch.no_grad()
def attribute_error(
    compiled: CompiledFolder,
    model_path: Path,
    samples: Sequence[dict[str, Tensor]],
    tokens: int,
    result: VerificationResult,
    rotations: Seeds,
    progress: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
    lora: Sequence[Path] = (),
) -> Attribution | None:
    """Compiled folder and float checkpoint -> the effect of every group; None if nothing is quantized.

    samples: as for `vlqc.compile`; tokens: see `choose_samples`; rotations: that the folder has; the float model is
    rotated likewise; progress: receives the planned work and, every few seconds, the progress; lora: folders of
    adapters to merge into the float checkpoint. Raises UserError for unusable samples.
    """
    structure = compiled.model
    if structure is None:
        raise ValueError("the folder must describe a model")
    checkpoint = Checkpoint(model_path, lora)
    model = StreamedModel.open(checkpoint, trust_remote_code=trust_remote_code)
    rotate_float_model(model, structure, rotations)
    samples = check_samples(samples, model)
    numbers = choose_samples(samples, tokens, model.family.inputs)
    groups = find_groups(model, compiled.schemes, compiled.caches)
    if not groups:
        result.facts["measured on"] = "nothing: no layer is quantized"
        return None
    ablation = _Ablation(
        model, structure, groups, [samples[number] for number in numbers], DTYPES[compiled.float_dtype]
    )
    plan = ablation.plan()
    if progress is not None:
        progress(plan)
    attribution = ablation.run(FolderStages(compiled.files.path, trust_remote_code=trust_remote_code), progress)
    result.facts["measured on"] = f"{len(numbers)} of {pluralize(len(samples), 'sample')}; {plan}"
    return attribution


def choose_samples(samples: Sequence[dict[str, Tensor]], tokens: int, inputs: TextInputs) -> list[int]:
    """Indices of the samples to use, ascending: always the shortest one with videos, with images only, and with text
    only, then the others from short to long as long as all together have at most `tokens` tokens."""
    length = [int(sample["attention_mask"].sum()) for sample in samples]
    order = sorted(range(len(samples)), key=lambda number: length[number])
    kinds = [(inputs.has_images(sample), inputs.has_videos(sample)) for sample in samples]
    chosen = [next(number for number in order if kinds[number] == kind) for kind in sorted(set(kinds))]
    left = tokens - sum(length[number] for number in chosen)
    for number in order:
        if number not in chosen and length[number] <= left:
            chosen.append(number)
            left -= length[number]
    return sorted(chosen)


def find_groups(
    model: StreamedModel, schemes: Mapping[str, Scheme], caches: CacheSchemes | None = None
) -> list[LayerGroup]:
    """The quantized layers, grouped as engines fuse them, and the quantized caches, in the order of the model."""
    groups: dict[tuple[str, ...], LayerGroup] = {}
    stages = list(model.stages)
    for layer in model.linear_layers:
        members = tuple(
            member for member in model.family.fused_group(layer) if schemes.get(member, Scheme.FLOAT).is_quantized
        )
        if layer in members and members not in groups:
            stage = next(stage for stage in stages if layer.startswith(f"{stage}."))
            groups[members] = LayerGroup(stage, members)
    quantized = [attention for attention, scheme in (caches or {}).items() if scheme is not None]
    of_caches = [
        LayerGroup(next(stage for stage in stages if attention.startswith(f"{stage}.")), (), attention)
        for attention in quantized
    ]
    return sorted([*groups.values(), *of_caches], key=lambda group: stages.index(group.stage))


class _ProgressReporter:
    """Passes a line about the progress to `progress`, at most every PROGRESS_SECONDS."""

    def __init__(self, progress: Callable[[str], None] | None, stages: int, stage_runs: int) -> None:
        self._progress, self._stages, self._stage_runs = progress, stages, stage_runs
        self._started = self._reported = time.monotonic()

    def update(self, stages: int, stage_runs: int) -> None:
        """Called with the numbers of finished stages and stage runs."""
        now = time.monotonic()
        if self._progress is None or now - self._reported < PROGRESS_SECONDS:
            return
        self._reported, elapsed = now, now - self._started
        left = elapsed * (self._stage_runs / max(stage_runs, 1) - 1)
        done = f"stage {stages} of {self._stages}, {stage_runs} of {self._stage_runs} stage runs"
        self._progress(f"{done}, {format_duration(elapsed)} elapsed, about {format_duration(left)} left")


class _Ablation:
    """Runs all variants on all chosen samples and measures the groups' own errors on the way."""

    def __init__(
        self,
        model: StreamedModel,
        structure: ModelStructure,
        groups: list[LayerGroup],
        samples: list[dict[str, Tensor]],
        dtype: torch.dtype,
    ) -> None:
        self.model, self.structure, self.groups, self.samples, self.dtype = model, structure, groups, samples, dtype
        self.stages = list(model.stages)
        begin = {group: self.stages.index(group.stage) for group in groups}
        self.float, self.stored = Variant(stored=False), Variant(stored=True)
        self.float_groups = Variant(True, tuple(groups), min(begin.values()))  # all layers float, in folded stages
        self.only_quantized = {group: Variant(False, (group,), begin[group]) for group in groups}
        self.only_float = {group: Variant(True, (group,), begin[group]) for group in groups}
        variants = [self.float, self.stored, self.float_groups]  # base models first: the others reuse their outputs
        variants += [*self.only_quantized.values(), *self.only_float.values()]
        self.variants = variants
        self.runs = [
            VariantRun(variant, sample)
            for variant in variants
            for sample in range(len(samples))
            if self._differs(variant, sample)
        ]
        row_modality, config = model.family.inputs.row_modality, model.module.config
        self.modality = [row_modality(sample, config) for sample in samples]
        self.measured: dict[LayerGroup, GroupError] = {}
        self.stage_runs = 0

    def plan(self) -> str:
        """The amount of work, for progress messages."""
        kinds = torch.cat(self.modality)
        counts = {name: int((kinds == number).sum()) for number, name in enumerate(MODALITIES)}
        width = self.model.embedding.get_parameter("weight").shape[1]
        held = sum(len(self.modality[run.sample]) for run in self.runs) * width * 4
        work = f"{self.expected_stage_runs()} stage runs, {format_bytes(held)} of hidden states"
        present = [f"{count} {name}" for name, count in counts.items() if count or name == MODALITIES[0]]
        tokens = f"{' and '.join(present)} tokens" if len(present) > 1 else pluralize(counts[MODALITIES[0]], "token")
        return f"{tokens}, {pluralize(len(self.groups), 'group')}: {work}"

    def expected_stage_runs(self) -> int:
        return sum(
            self._visits(run.sample, stage) and number >= run.variant.begin
            for run in self.runs
            for number, stage in enumerate(self.stages)
        )

    def run(self, folder: FolderStages, progress: Callable[[str], None] | None) -> Attribution:
        """Runs all variants, one stage after the other."""
        model, reporter = self.model, _ProgressReporter(progress, len(self.stages), self.expected_stage_runs())
        with model.non_stage_weights(model.tensors.tensor), logits_are_hidden(model.module):
            samples = [self.samples[run.sample] for run in self.runs]
            with SequentialForward(model, samples, run_to_end=True) as forward:
                for number, inputs in enumerate(forward.loaded_stages()):
                    with folder.stage(model.path(inputs.module)) as stored:
                        self._run_stage(number, inputs, stored)
                    reporter.update(number + 1, self.stage_runs)
                hidden = [returned.logits[0].float() for returned in forward.results]
        error = self._error_power(hidden)
        effects = {
            group: GroupEffect(
                error[self.only_quantized[group]], error[self.only_float[group]], self.measured.get(group)
            )
            for group in self.groups
        }
        return Attribution(error[self.float], error[self.stored], error[self.float_groups], effects)

    def _run_stage(self, number: int, inputs: StageInputs, stored: nn.Module) -> None:
        model = self.model
        pair = StagePair(
            inputs.name, inputs.module, stored, self.structure, partial(checkpoint_name, model, inputs.module)
        )
        here = {group for group in self.groups if group.stage == inputs.name}
        outputs: dict[tuple[bool, int], Any] = {}  # of the base models, by (stored, sample)
        captured: dict[LayerGroup, list[CapturedInput]] = {group: [] for group in here if group.layers}
        for call in inputs.calls:
            run = self.runs[call.sample]
            variant = run.variant
            if number < variant.begin:
                inputs.outputs.append(outputs[variant.stored, run.sample])
                continue
            stage = stored if variant.stored else inputs.module
            own = [group for group in variant.groups if group in here]
            layers = [layer for group in own for layer in group.layers]
            caches = [group.cache for group in own if group.cache]
            self.stage_runs += 1
            if variant is self.float:
                output = self._run_and_capture(pair, stage, call, captured)
            else:
                with pair.swapped(layers, caches, in_stored=variant.stored):
                    output = stage(*call.args, **call.kwargs)
            if not variant.groups:
                outputs[variant.stored, run.sample] = output
            inputs.outputs.append(output)
        for group, parts in captured.items():
            if parts:
                rows, modality, weight = (
                    torch.cat([getattr(each, part) for each in parts]) for part in ("rows", "modality", "weight")
                )
                self.measured[group] = measure_group(
                    pair, group.layers, CapturedInput(rows, modality, weight), self.dtype
                )

    def _run_and_capture(
        self, pair: StagePair, stage: nn.Module, call: Call, captured: dict[LayerGroup, list[CapturedInput]]
    ) -> Any:
        """Runs the float stage and appends the input of each group to `captured`."""
        inputs: dict[LayerGroup, tuple[Tensor, Call]] = {}
        paths = {module: path for path, module in stage.named_modules()}

        def keep(group: LayerGroup) -> Callable[[Tensor, Call], None]:
            return lambda x, of_rows: inputs.__setitem__(group, (x.reshape(-1, x.shape[-1]).float(), of_rows))

        watch = {paths[pair.linears[group.layers[0]]]: keep(group) for group in captured}
        with observing(stage, watch, call):
            output = stage(*call.args, **call.kwargs)
        hidden = first_tensor(output)
        power = hidden.reshape(-1, hidden.shape[-1]).double().square().sum(dim=1)
        for group, (rows, of_rows) in inputs.items():
            modality = modality_of_rows(of_rows.modality, len(rows))
            modality = of_images(len(rows)) if modality is None else modality
            of_group = power if of_rows.rows is None else power[of_rows.rows]
            # Every token is normalized before the logits, so its error counts relative to its power.
            weight = 1 / of_group.clamp(min=1e-30) if len(of_group) == len(rows) else torch.ones(len(rows)).double()
            real = modality >= 0
            if real.any():  # an expert may get no rows
                captured[group].append(CapturedInput(rows[real], modality[real], weight[real]))
        return output

    def _error_power(self, hidden: list[Tensor]) -> dict[Variant, ModalityPower]:
        """Final hidden rows [S, H] of every run -> power of each variant's logit error; of the float model, of its
        logits."""
        gram = head_gram(self.model)
        rows_of = {(run.variant, run.sample): rows for run, rows in zip(self.runs, hidden, strict=True)}
        power = {variant: ModalityPower() for variant in self.variants}  # without a run: no sample reaches its groups
        for variant, sums in power.items():
            for sample, modality in enumerate(self.modality):
                reference = rows_of[self.float, sample]
                base = rows_of[self.stored if variant.stored else self.float, sample]
                error = rows_of.get((variant, sample), base) - reference
                sums.add(logit_power(reference if variant is self.float else error, gram), modality)
        return power

    def _differs(self, variant: Variant, sample: int) -> bool:
        """Whether a sample passes a stage that the variant changes; text alone does not pass the vision tower."""
        return not variant.groups or any(self._visits(sample, group.stage) for group in variant.groups)

    def _visits(self, sample: int, stage: str) -> bool:
        has_images = self.model.family.inputs.has_images(self.samples[sample])
        return has_images or self.model.is_language(self.model.stages[stage])


def head_gram(model: StreamedModel) -> Tensor:
    """float64 [H, H]: the Gram matrix of the output head, which gives the power of logits from hidden rows."""
    head: Any = model.module.get_output_embeddings()  # type: ignore[operator]
    name = f"{model.name(model.embedding if model.tied else head)}.weight"
    gram = torch.zeros(head.in_features, head.in_features, dtype=torch.float64)
    for start in range(0, head.out_features, HEAD_ROWS):
        some = torch.arange(start, min(start + HEAD_ROWS, head.out_features))
        rows = model.tensors.rows(name, some).float()
        gram += (rows.T @ rows).double()
    return gram


def logit_power(hidden: Tensor, gram: Tensor) -> Tensor:
    """hidden float [S, H] (or a difference of two) -> float64 [S]: sum of the squares of its logits."""
    wide = hidden.double()
    return ((wide @ gram) * wide).sum(dim=1).clamp(min=0)
