"""Compares the outputs of a compiled folder with those of its float checkpoint: of every stage, and the logits.

An output with noise that rounding cannot explain is a fault, whatever least SQNR the user asks for.

Both run in float32, quantized layers in exact integer arithmetic; a folder whose layers can be run in two kinds of it
is run in both. Every stage runs on the inputs that it has in the
float model, so its error does not include that of earlier stages; the logits are those of the two whole models.
Stages of a rotated folder are compared with those of the float model in the same basis. Its logits are compared with
those of the float model as it is, since nothing else shows that the tensors outside the stages are rotated rightly.

Attention of the folder reads quantized keys and values where it has scales for them, and once more float ones: the
difference is what the KV cache costs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlqc.errors import UserError
from vlqc.frontend.calibration.dataset import load_samples
from vlqc.frontend.calibration.samples import check_samples
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.sequential import SequentialForward, StageInputs
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.execution import first_tensor
from vlqc.ir.value_range import FLOAT16_MAX, PeakRecorder
from vlqc.kernels_ref.quant_linear import layers_with_both, static_inputs
from vlqc.verify.clipping import ClippingRecorder
from vlqc.verify.findings import COPY_AGAIN, FLOAT_CACHE, INPUTS_OF, VerificationResult, format_list
from vlqc.verify.folder.rotations import Seeds, rotate_float_model
from vlqc.verify.loader import float_caches, has_quantized_cache, load
from vlqc.verify.structure.structure import CompiledFolder

STAGES, LOGITS = "stage outputs", "logits"
CACHE_NOISE = "KV cache dB"  # SQNR of a stage's output with quantized keys and values against float ones
STATIC = "static inputs"  # name of the second arithmetic of layers that have two
# dB, noise of half the signal's power. 8 bits without smoothing stay above 7 dB even on weights with extreme outliers,
# so a stage below this is not badly quantized but wrong. What a stage adds to its input, and the logits, stay above
# 13 dB then, so the same limit holds for them.
BROKEN_SQNR = 3.0
# dB of the logits, below which layers that clip a large share of their inputs are not only unlike the calibration's.
BROKEN_BY_CLIPPING = 10.0
LONGEST_REASON = 300  # characters of an error of transformers in a message
TOKENS_AT_ONCE = 64  # tokens whose logits are in memory at a time, each 152064 values
# dB, logits of the rotated float model against those of the float model. Rounding to float32 leaves about 120 dB, and
# about 60 dB for a sample in which it makes a router choose another expert; wrong rotations leave less than 15 dB.
ROTATED_SQNR = 40.0
LARGEST_SQNR = 200.0  # dB; stands for equal outputs, because JSON has no infinity


@dataclass
class Noise:
    """Accumulated power of a signal and of the difference to it."""

    signal: float = 0.0
    noise: float = 0.0
    finite: bool = True

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Adds two float tensors of the same shape, with sums in float64."""
        self.finite = self.finite and bool(torch.isfinite(other).all()) and bool(torch.isfinite(reference).all())
        self.signal += float(reference.double().square().sum())
        self.noise += float((other.double() - reference.double()).square().sum())

    @property
    def sqnr(self) -> float:
        """Signal-to-quantization-noise ratio in dB, at most LARGEST_SQNR; -LARGEST_SQNR if a value is not finite."""
        if not self.finite or not math.isfinite(self.noise):
            return -LARGEST_SQNR
        if self.noise == 0 or self.signal == 0:
            return LARGEST_SQNR if self.noise == 0 else -LARGEST_SQNR
        return min(10 * math.log10(self.signal / self.noise), LARGEST_SQNR)


@dataclass
class StageNoise:
    """output: of a stage; change: of the difference between output and input, empty if the stage changes the shape;
    cache: of the output of the folder's stage with quantized keys and values against float ones, empty without such."""

    output: Noise = field(default_factory=Noise)
    change: Noise = field(default_factory=Noise)
    cache: Noise = field(default_factory=Noise)


@torch.no_grad()
def check_accuracy(
    compiled: CompiledFolder,
    model_path: Path,
    calib_images: Path | None,
    samples: Sequence[dict[str, Tensor]] | None,
    min_sqnr: float | None,
    result: VerificationResult,
    rotations: Seeds,
    trust_remote_code: bool = False,
    lora: Sequence[Path] = (),
) -> None:
    """Adds the SQNR of stages and logits to the result, and faults for NaN, Inf and broken stages.

    samples: as for `vlqc.compile`; None: calib_images is read. rotations: that the folder has; the float model is
    rotated likewise, and runs once more as it is, for its logits. lora: folders of adapters to merge into it. Raises
    UserError for unusable samples.
    """
    if compiled.model is None:
        raise ValueError("the folder must describe a model")
    checkpoint = Checkpoint(model_path, lora)
    model = StreamedModel.open(checkpoint, trust_remote_code=trust_remote_code)
    rotate_float_model(model, compiled.model, rotations)
    if samples is None:
        if calib_images is None:
            raise ValueError("calib_images or samples is required")
        samples = load_samples(model_path, calib_images, trust_remote_code=trust_remote_code).samples
    samples = check_samples(samples, model)
    try:
        quantized = load(compiled.files.path, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except UserError as error:  # the folder's fault, not the caller's
        for fault in error.faults:
            result.add_fault(STAGES, fault.where, f"the folder cannot be loaded: {fault.what}", fault.why, fault.fix)
        return
    try:
        _compare(compiled, checkpoint, model, quantized, samples, min_sqnr, result, trust_remote_code)
    except _FolderError as error:
        why = "config.json or the tensors do not fit the samples, which the float model runs"
        fix = "see the other faults, or compile again"
        result.add_fault(STAGES, str(compiled.files.path), f"the folder cannot be run: {error}", why, fix)


class _FolderError(Exception):
    """An error that a model raises because of the folder that it was loaded from."""


@contextmanager
def _folder_errors() -> Iterator[None]:
    """Raises what the folder's model raises as a _FolderError. The float model has run on the same samples."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # of transformers' code, for which any config.json is possible
        raise _FolderError(f"{type(error).__name__}: {error}".partition("\n")[0][:LONGEST_REASON]) from error


def _compare(
    compiled: CompiledFolder,
    checkpoint: Checkpoint,
    model: StreamedModel,
    quantized: nn.Module,
    samples: Sequence[dict[str, Tensor]],
    min_sqnr: float | None,
    result: VerificationResult,
    trust_remote_code: bool,
) -> None:
    """Adds the SQNR of stages and logits to the result, and faults. Raises _FolderError if the folder cannot be run."""
    stages: list[dict[str, Any]] = []
    values, clipping = PeakRecorder(), ClippingRecorder()
    has_cache = has_quantized_cache(quantized)
    with ExitStack() as loaded:
        loaded.enter_context(model.non_stage_weights(model.tensors.tensor, head=True))
        with (
            logits_are_hidden(model.module),
            logits_are_hidden(quantized),
            values.watching(quantized) if compiled.float_dtype == "F16" else nullcontext(),
            clipping.watching(quantized),
            SequentialForward(model, samples, run_to_end=True) as forward,
        ):
            for inputs in forward.loaded_stages():
                inputs.outputs.extend(inputs.module(*call.args, **call.kwargs) for call in inputs.calls)
                noises = {arithmetic: _stage_noise(model, inputs, quantized) for arithmetic in _each(quantized)}
                if inputs.calls:  # no sample with an image: nothing reaches the vision tower
                    _add_stage(inputs.name, noises, len(inputs.calls), stages, result)
                    if has_cache:
                        cache = noises[""].cache
                        stages[-1][CACHE_NOISE] = round(cache.sqnr, 2) if cache.signal else "-"
            reference = LastHidden.of(model.module, forward.results)
            with _folder_errors():
                others = {
                    arithmetic: LastHidden.of(quantized, [quantized(**model.inputs(sample)) for sample in samples])
                    for arithmetic in _each(quantized)
                }
        with_float_cache = _run_with_float_cache(model, quantized, samples) if has_cache else None
        result.facts["stages against float"] = stages
        _check_range(values, model, result)
        clipping.add_warnings(model.family.module_name, result)
        if model.rotation_plan:
            rotated = reference
            original = StreamedModel.open(checkpoint, trust_remote_code=trust_remote_code)
            loaded.enter_context(original.non_stage_weights(original.tensors.tensor, head=True))
            reference = _run_float(original, samples)
            _check_rotated(reference, rotated, samples, checkpoint.folder, result)
        clipped = list(map(model.family.module_name, clipping.far_too_small()))
        for arithmetic, other in others.items():
            # Clipping has no part in the first of two kinds of arithmetic.
            causes = clipped if len(others) == 1 or arithmetic else []
            _check_logits(reference, other, samples, min_sqnr, result, causes, arithmetic)
        if len(others) > 1:
            schemes = {layer.scheme for layer in layers_with_both(quantized)}
            result.facts[f"{INPUTS_OF}{format_list(sorted(schemes))}"] = (
                f"quantized per token, as in ordinary serving; {STATIC!r}: with the stored scale, as on decode nodes"
            )
        if with_float_cache is not None:
            result.facts[FLOAT_CACHE] = _agreement(reference, with_float_cache, samples).figures()


def _check_range(values: PeakRecorder, model: StreamedModel, result: VerificationResult) -> None:
    """Adds a fault if values between layers, computed here in float32, are beyond float16, the folder's dtype."""
    if values.peak.value > FLOAT16_MAX:
        kind, _, path = values.peak.where.rpartition(" ")
        what = f"values of {values.peak.value:.3g} between layers, at the {kind} {model.family.module_name(path)}"
        why = f"the largest value of float16 is {FLOAT16_MAX:.0f}, so an engine computes Inf or NaN there"
        result.add_fault(STAGES, model.family.module_name(path), what, why, "compile again with --dtype bfloat16")


def _run_with_float_cache(
    model: StreamedModel, quantized: nn.Module, samples: Sequence[dict[str, Tensor]]
) -> "LastHidden":
    with logits_are_hidden(quantized), float_caches(quantized), _folder_errors():
        return LastHidden.of(quantized, [quantized(**model.inputs(sample)) for sample in samples])


def _each(quantized: nn.Module) -> Iterator[str]:
    """Sets the layers of a model to each kind of arithmetic that it has, in turn, and yields its name; "" is the one
    that it is set to."""
    yield ""
    if layers_with_both(quantized):
        with static_inputs(quantized):
            yield STATIC


def _stage_noise(model: StreamedModel, inputs: StageInputs, quantized: nn.Module) -> StageNoise:
    """Runs a stage of the quantized model on the float inputs, and compares its outputs with `inputs.outputs`."""
    other = quantized.get_submodule(model.path(inputs.module))
    noise = StageNoise()
    has_cache = has_quantized_cache(other)
    for call, outputs in zip(inputs.calls, inputs.outputs, strict=True):
        stage_input = first_tensor((*call.args, *call.kwargs.values()))
        reference = first_tensor(outputs)
        with _folder_errors():
            result = first_tensor(other(*call.args, **call.kwargs))
        noise.output.add(reference, result)
        if stage_input.shape == reference.shape:
            noise.change.add(reference - stage_input, result - stage_input)
        if has_cache:
            with float_caches(other), _folder_errors():
                noise.cache.add(first_tensor(other(*call.args, **call.kwargs)), result)
    return noise


def _add_stage(
    name: str,
    noises: Mapping[str, StageNoise],
    calls: int,
    stages: list[dict[str, Any]],
    result: VerificationResult,
) -> None:
    """noises: by name of the arithmetic."""
    figures: dict[str, Any] = {"stage": name}
    for arithmetic, noise in noises.items():
        result.add_examined(STAGES, calls)
        where = f" ({arithmetic})" if arithmetic else ""
        figures[f"SQNR dB{where}"] = round(noise.output.sqnr, 2)
        # The SQNR of what a block adds to its input: the input is equal on both sides and hides the error.
        figures[f"residual SQNR dB{where}"] = round(noise.change.sqnr, 2) if noise.change.signal else "-"
        _check_stage(f"{name}{where}", noise.output, noise.change, result)
    stages.append(figures)


def _check_stage(name: str, output: Noise, change: Noise, result: VerificationResult) -> None:
    if not output.finite:
        why, fix = "weights or scales of the stage are damaged", "see the other faults, or compile again"
        result.add_fault(STAGES, name, "NaN or Inf in the stage's output", why, fix)
    elif output.sqnr < BROKEN_SQNR:
        why = f"below {BROKEN_SQNR:g} dB the stage is damaged: rounding alone causes less noise"
        result.add_fault(STAGES, name, f"SQNR against the float stage is {output.sqnr:.2f} dB", why, COPY_AGAIN)
    elif change.signal and change.sqnr < BROKEN_SQNR:
        what = f"SQNR of what the stage adds to its input is {change.sqnr:.2f} dB"
        why = f"below {BROKEN_SQNR:g} dB the stage is damaged: rounding alone causes less noise"
        result.add_fault(STAGES, name, what, why, COPY_AGAIN)


# ---- logits ----------------------------------------------------------------------------------------------------------


@contextmanager
def logits_are_hidden(model: nn.Module) -> Iterator[None]:
    """Context in which the model returns the inputs of its output head as logits, to save the memory of all logits."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    forward = head.forward
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        head.forward = forward


@dataclass(frozen=True)
class LastHidden:
    """What the logits of a model are computed from.

    head: its output head, with weights; rows: per sample, the inputs of the head, float32 [S, H].
    """

    head: nn.Module
    rows: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module, returned: Sequence[Any]) -> "LastHidden":
        """From what a model returns inside `logits_are_hidden`."""
        head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        return cls(head, [each.logits[0].float() for each in returned])

    def logits(self, sample: int, tokens: Tensor) -> Tensor:
        """float32 [tokens, vocabulary]."""
        logits: Tensor = self.head(self.rows[sample][tokens])
        return logits


def _run_float(model: StreamedModel, samples: Sequence[dict[str, Tensor]]) -> LastHidden:
    """Runs a float model whose parameters outside the stages are loaded."""
    with logits_are_hidden(model.module), SequentialForward(model, samples, run_to_end=True) as forward:
        for inputs in forward.loaded_stages():
            inputs.outputs = [inputs.module(*call.args, **call.kwargs) for call in inputs.calls]
        return LastHidden.of(model.module, forward.results)


def _some_tokens(sample: dict[str, Tensor]) -> Sequence[Tensor]:
    """The positions of a sample's tokens, without padding, up to TOKENS_AT_ONCE at a time."""
    return torch.split(sample["attention_mask"][0].bool().nonzero().flatten(), TOKENS_AT_ONCE)


@dataclass
class Agreement:
    """Sums over tokens that compare the logits of the float and the quantized model."""

    tokens: int = 0
    noise: float = 0.0
    signal: float = 0.0
    other: float = 0.0
    product: float = 0.0
    divergence: float = 0.0
    same_first: int = 0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Logits [tokens, vocabulary] of both models."""
        reference, other = reference.double(), other.double()
        self.tokens += len(reference)
        self.noise += float((other - reference).square().sum())
        self.signal += float(reference.square().sum())
        self.other += float(other.square().sum())
        self.product += float((reference * other).sum())
        log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
        self.divergence += float((log_p.exp() * (log_p - log_q)).sum())
        self.same_first += int((reference.argmax(-1) == other.argmax(-1)).sum())

    def figures(self) -> dict[str, Any]:
        """SQNR in dB, cosine, mean KL(float || quantized) in nats, share of tokens with the same top-1 prediction."""
        size = math.sqrt(self.signal * self.other)
        return {
            "SQNR dB": round(Noise(self.signal, self.noise).sqnr, 2),
            "cosine": round(self.product / size, 6) if size > 0 and math.isfinite(size) else 0.0,
            "KL": round(self.divergence / self.tokens, 6) if math.isfinite(self.divergence) else "not finite",
            "top-1 agreement": round(self.same_first / self.tokens, 4),
            "tokens": self.tokens,
        }

    def merge(self, more: "Agreement") -> None:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(more, name))


def _agreement(reference: LastHidden, other: LastHidden, samples: Sequence[dict[str, Tensor]]) -> Agreement:
    """Over all tokens of the samples."""
    whole = Agreement()
    for number, sample in enumerate(samples):
        for tokens in _some_tokens(sample):
            whole.add(reference.logits(number, tokens), other.logits(number, tokens))
    return whole


def _check_rotated(
    reference: LastHidden,
    rotated: LastHidden,
    samples: Sequence[dict[str, Tensor]],
    model_path: Path,
    result: VerificationResult,
) -> None:
    """Adds a fault if the float model and the same model rotated have different logits."""
    noise = Noise()
    for number, sample in enumerate(samples):
        for tokens in _some_tokens(sample):
            noise.add(reference.logits(number, tokens), rotated.logits(number, tokens))
    if noise.finite and noise.sqnr < ROTATED_SQNR:
        what = f"the rotated float model does not compute the float model's logits: SQNR {noise.sqnr:.2f} dB"
        why = "the rotation of a layer outside the stages is wrong for this model"
        result.add_fault(LOGITS, str(model_path), what, why, "compile with --rotate none")


def _check_logits(
    reference: LastHidden,
    other: LastHidden,
    samples: Sequence[dict[str, Tensor]],
    min_sqnr: float | None,
    result: VerificationResult,
    clipped: Sequence[str] = (),
    arithmetic: str = "",
) -> None:
    """Adds figures of the logits, and faults. clipped: layers of which most of the input range is missing; arithmetic:
    name of the one that was run if the folder has several."""
    suffix = f", {arithmetic}" if arithmetic else ""
    whole = Agreement()
    rows = []
    for number, sample in enumerate(samples):
        result.add_examined(LOGITS)
        of_sample = Agreement()
        for tokens in _some_tokens(sample):
            of_sample.add(reference.logits(number, tokens), other.logits(number, tokens))
        whole.merge(of_sample)
        rows.append({"sample": number, **of_sample.figures()})
        if not math.isfinite(of_sample.noise):
            why, fix = "weights or scales are damaged", "see the other faults, or compile again"
            result.add_fault(LOGITS, f"sample {number}{suffix}", "NaN or Inf in the logits", why, fix)
    result.facts[f"logits against float{suffix}"] = whole.figures()
    result.facts[f"logits per sample{suffix}"] = rows
    sqnr = Noise(whole.signal, whole.noise).sqnr
    if math.isfinite(whole.noise) and sqnr < BROKEN_SQNR:
        what, why = f"SQNR of the logits is {sqnr:.2f} dB", "rounding alone causes less noise: the folder is damaged"
        result.add_fault(
            LOGITS, f"all samples{suffix}", what, why, "see the other faults, or rank the layers with --locate"
        )
    elif clipped and math.isfinite(whole.noise) and sqnr < BROKEN_BY_CLIPPING:
        what = f"SQNR of the logits is {sqnr:.2f} dB, and {format_list(clipped)} clip a large share of their inputs"
        why = "input_scale is damaged, or the calibration inputs were far smaller"
        result.add_fault(LOGITS, f"all samples{suffix}", what, why, "compile again with calibration images like these")
    elif min_sqnr is not None and sqnr < min_sqnr:
        what, why = f"SQNR of the logits is {sqnr:.2f} dB", f"--min_sqnr requires {min_sqnr:g} dB"
        result.add_fault(LOGITS, f"all samples{suffix}", what, why, "rank the layers by their error with --locate")
