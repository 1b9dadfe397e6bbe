"""A compiled folder and its float checkpoint on the same inputs: every stage's output, then the logits.

Both run in float32 on the stored values, the quantized layers in exact integer arithmetic. Each stage is given the
*float* stage's inputs on both sides, so its figure is its own; the logits are those of the two whole models.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlqc.errors import UserError
from vlqc.frontend.calibration.dataset import load_samples
from vlqc.frontend.calibration.samples import check_samples
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.sequential import SequentialForward, Stop
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.execution import first_tensor
from vlqc.verify.findings import VerificationResult
from vlqc.verify.loader import load

STAGES, LOGITS = "stage outputs", "logits"
# Noise of half the signal's power. Eight bits without any smoothing, on weights with outliers made to break them,
# stay above 7 dB; so a stage below this is not badly quantized but wrong.
BROKEN_SQNR = 3.0
TOKENS_AT_ONCE = 64  # logits are made for that many tokens at a time: a vocabulary row has 152064 of them
LARGEST_SQNR = 200.0  # dB; stands for "equal", as infinity is no JSON number


@dataclass
class Noise:
    """Running power of a signal and of the difference to it."""

    signal: float = 0.0
    noise: float = 0.0
    finite: bool = True

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Two float tensors of one shape; sums in float64."""
        self.finite = self.finite and bool(torch.isfinite(other).all()) and bool(torch.isfinite(reference).all())
        self.signal += float(reference.double().square().sum())
        self.noise += float((other.double() - reference.double()).square().sum())

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise ratio in dB, at most LARGEST_SQNR; minus that when something is not finite."""
        if not self.finite or not math.isfinite(self.noise):
            return -LARGEST_SQNR
        if self.noise == 0 or self.signal == 0:
            return LARGEST_SQNR if self.noise == 0 else -LARGEST_SQNR
        return min(10 * math.log10(self.signal / self.noise), LARGEST_SQNR)


@torch.no_grad()
def check_accuracy(
    folder: Path,
    model_path: Path,
    calib_images: Path | None,
    samples: Sequence[dict[str, Tensor]] | None,
    min_sqnr: float | None,
    result: VerificationResult,
    trust_remote_code: bool = False,
) -> None:
    """Figures of stages and logits into the report; findings for NaN, Inf and broken stages. UserError: unusable input.

    samples: as for `vlqc.compile`; calib_images is read when they are None.
    """
    checkpoint = Checkpoint(model_path)
    model = StreamedModel.open(checkpoint, trust_remote_code=trust_remote_code)
    if samples is None:
        if calib_images is None:
            raise ValueError("either calib_images or samples must be given")
        samples = load_samples(model_path, calib_images, trust_remote_code=trust_remote_code).samples
    samples = check_samples(samples, model.module)
    try:
        quantized = load(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except UserError as error:  # the folder's fault, not the caller's
        for fault in error.faults:
            result.add_fault(STAGES, fault.where, f"the folder cannot be run: {fault.what}", fault.why)
        return
    stages: list[dict[str, Any]] = []
    with model.non_stage_weights(checkpoint.tensor, head=True):
        with (
            logits_are_hidden(model.module),
            logits_are_hidden(quantized),
            SequentialForward(model, samples, to_the_end=True) as lockstep,
        ):
            for stop in lockstep:
                output, change = _run_stage(model, stop, quantized)
                _report_stage(stop.name, output, change, len(stop.calls), stages, result)
            hidden = [_logits_of(result) for result in lockstep.results]
            others = [_logits_of(quantized(**model.inputs(sample))) for sample in samples]
        result.facts["stages against float"] = stages
        _check_logits(model.module, quantized, samples, hidden, others, min_sqnr, result)


def _run_stage(model: StreamedModel, stop: Stop, quantized: nn.Module) -> tuple[Noise, Noise]:
    """Answer the stop with the float stage's outputs -> noise of the quantized stage on the same inputs: of its output,
    and of what it adds to its input (empty where it changes the shape)."""
    other = quantized.get_submodule(model.path(stop.module))
    output, change = Noise(), Noise()
    model.materialize(stop.module, model.checkpoint.tensor)
    for call in stop.calls:
        stop.outputs.append(stop.module(*call.args, **call.kwargs))
        entry = first_tensor((*call.args, *call.kwargs.values()))
        reference = first_tensor(stop.outputs[-1])
        result = first_tensor(other(*call.args, **call.kwargs))
        output.add(reference, result)
        if entry.shape == reference.shape:
            change.add(reference - entry, result - entry)
    model.to_meta(stop.module)
    return output, change


def _report_stage(
    name: str, output: Noise, change: Noise, calls: int, stages: list[dict[str, Any]], result: VerificationResult
) -> None:
    result.add_examined(STAGES, calls)
    figures = {"stage": name, "SQNR dB": round(output.sqnr, 2)}
    # What a block adds to its input: the input itself, equal on both sides, would flatter the figure.
    figures["of its change dB"] = round(change.sqnr, 2) if change.signal else "-"
    stages.append(figures)
    if not output.finite:
        result.add_fault(
            STAGES, name, "its output holds NaN or Inf", "on inputs of the float model", "see the faults above"
        )
    elif output.sqnr < BROKEN_SQNR:
        why = f"its noise has more than half of the signal's power (below {BROKEN_SQNR:g} dB): no rounding does that"
        result.add_fault(STAGES, name, f"SQNR against the float stage is {output.sqnr:.2f} dB", why, "compile again")


# ---- logits ----------------------------------------------------------------------------------------------------------


@contextmanager
def logits_are_hidden(model: nn.Module) -> Iterator[None]:
    """Inside, the model's "logits" are the inputs of its output head: the logits of a whole prompt need no memory."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    forward = head.forward
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        head.forward = forward


def _logits_of(result: Any) -> Tensor:
    logits: Tensor = result.logits
    return logits[0].float()  # [S, H]


@dataclass
class Agreement:
    """Sums over tokens, of logits of float and quantized model."""

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
        """SQNR in dB, cosine, mean KL(float || quantized) in nats, share of tokens with the same most likely token."""
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


def _check_logits(
    model: nn.Module,
    quantized: nn.Module,
    samples: Sequence[dict[str, Tensor]],
    hidden: list[Tensor],
    others: list[Tensor],
    min_sqnr: float | None,
    result: VerificationResult,
) -> None:
    heads = [one.get_output_embeddings() for one in (model, quantized)]  # type: ignore[operator]
    whole = Agreement()
    rows = []
    for number, sample in enumerate(samples):
        result.add_examined(LOGITS)
        kept = sample["attention_mask"][0].bool()
        one = Agreement()
        tokens = kept.nonzero().flatten()
        for start in range(0, len(tokens), TOKENS_AT_ONCE):
            some = tokens[start : start + TOKENS_AT_ONCE]
            one.add(heads[0](hidden[number][some]), heads[1](others[number][some]))
        whole.merge(one)
        rows.append({"sample": number, **one.figures()})
        if not math.isfinite(one.noise):
            result.add_fault(LOGITS, f"sample {number}", "the logits hold NaN or Inf", "", "see the faults above")
    result.facts["logits against float"] = whole.figures()
    result.facts["logits per sample"] = rows
    sqnr = Noise(whole.signal, whole.noise).sqnr
    if min_sqnr is not None and sqnr < min_sqnr:
        result.add_fault(LOGITS, "all samples", f"SQNR is {sqnr:.2f} dB, {min_sqnr:g} dB are asked for")
