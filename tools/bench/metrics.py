"""How near a quantized model is to its float one, and what two descriptions of quantized folders have in common."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.demo.tiny_task import with_token_types
from vlqc.kernels_ref.deq_scale import decode_deq_scale
from vlqc.kernels_ref.quant_linear import GroupQuantLinear, QuantLinear, StaticQuantLinear

Samples = Sequence[dict[str, Tensor]]
WEIGHT, FLOAT = ".weight", "FLOAT"


@dataclass(frozen=True)
class Agreement:
    """Quantized against float logits, all tokens alike: sqnr in dB; cosine of the two as one long vector; mean
    KL(float || quantized) in nats; top1, the share of tokens with the same most likely token; loss, the mean negative
    log likelihood in nats of each sample's next tokens under the quantized model."""

    sqnr: float
    cosine: float
    kl: float
    top1: float
    loss: float


@torch.no_grad()
def logits_of(model: nn.Module, samples: Samples) -> list[Tensor]:
    """Logits float32 [S, V] of each sample of one sequence of S tokens."""
    return [model(**with_token_types(dict(it)), use_cache=False).logits[0].float() for it in samples]


def agreement(wanted: Iterable[Tensor], got: Iterable[Tensor], ids: Iterable[Tensor]) -> Agreement:
    """Logits [S, V] of every sample, float and quantized, and its token ids [1, S] -> Agreement; sums in float64."""
    signal = noise = power = product = divergence = same = loss = 0.0
    tokens = predicted = 0
    for one, other, sample in zip(wanted, got, ids, strict=True):
        reference, quantized = one.double(), other.double()
        signal += reference.square().sum().item()
        power += quantized.square().sum().item()
        noise += (reference - quantized).square().sum().item()
        product += (reference * quantized).sum().item()
        expected, found = reference.log_softmax(-1), quantized.log_softmax(-1)
        divergence += (expected.exp() * (expected - found)).sum().item()
        same += (reference.argmax(-1) == quantized.argmax(-1)).sum().item()
        loss += F.nll_loss(found[:-1], sample[0, 1:], reduction="sum").item()
        tokens, predicted = tokens + len(reference), predicted + len(reference) - 1
    return Agreement(
        decibel(signal, noise),
        product / math.sqrt(signal * power),
        divergence / tokens,
        same / tokens,
        loss / predicted,
    )


def decibel(signal: float, noise: float) -> float:
    """10 log10 of the ratio of two powers; infinity without noise."""
    return 10 * math.log10(signal / noise) if noise else math.inf


def model_agreement(wanted: Sequence[Tensor], model: nn.Module, samples: Samples) -> Agreement:
    """`agreement` of a model with given float logits."""
    return agreement(wanted, logits_of(model, samples), [sample["input_ids"] for sample in samples])


# ---- weights alone ---------------------------------------------------------------------------------------------------


def without_activation_rounding(model: nn.Module) -> nn.Module:
    """A loaded quantized model with its activations left float, in place: what its weights alone cost."""
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            model.set_submodule(path, _float_twin(module))
    return model


def _float_twin(quantized: QuantLinear) -> nn.Linear:
    """A Linear with the values that the integers stand for."""
    weight, bias = quantized.weight.double(), quantized.bias
    if isinstance(quantized, StaticQuantLinear):  # its bias and its scales are what quant_bias and deq_scale say
        scale = decode_deq_scale(quantized.deq_scale, truncate=False).double()
        total = quantized.quant_bias.double() + quantized.input_offset.double() * weight.sum(1)
        bias, weight = scale * total, weight * (scale / quantized.input_scale.double())[:, None]
    elif isinstance(quantized, GroupQuantLinear):
        second = quantized.weight_scale_second.double().repeat_interleave(quantized.group_size, 1)
        weight = weight * second * quantized.weight_scale.double()
    else:
        weight = weight * quantized.weight_scale.double()
    linear = nn.Linear(quantized.in_features, quantized.out_features, bias=bias is not None)
    linear.weight = nn.Parameter(weight.float(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.float(), requires_grad=False)
    return linear


@torch.no_grad()
def round_weights(model: nn.Module, layers: Iterable[str]) -> nn.Module:
    """Plain rounding of these Linears' weights to 8 bits in place, one scale per row (absmax / 127): the simplest floor
    there is, with no smoothing before it."""
    for layer in layers:
        weight = model.get_submodule(layer).get_parameter("weight")
        step = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(weight.dtype).tiny)
        weight.copy_((weight / step).round() * step)
    return model


# ---- descriptions ----------------------------------------------------------------------------------------------------


def sites_of(description: Mapping[str, Any]) -> dict[str, str]:
    """quant_model_description.json -> scheme of every layer that is not float. Other entries (scales, packing, facts
    about the model) do not matter."""
    return {
        name.removesuffix(WEIGHT): str(scheme)
        for name, scheme in description.items()
        if name.endswith(WEIGHT) and scheme != FLOAT
    }


def description_of(folder: Path) -> dict[str, Any]:
    """The description in an emitted folder, whichever of its names it has. FileNotFoundError if there is none."""
    for path in sorted(folder.glob("quant_model_description*.json")):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    raise FileNotFoundError(f"no quant_model_description*.json in {folder}")


def different_sites(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """A line "layer: scheme against scheme" for every layer on which two `sites_of` do not agree."""
    layers = sorted({*one, *other})
    pairs = {layer: (one.get(layer, FLOAT), other.get(layer, FLOAT)) for layer in layers}
    return [f"{layer}: {mine} against {yours}" for layer, (mine, yours) in pairs.items() if mine != yours]


def median(values: Iterable[float | None]) -> float | None:
    """The median of what is there; None of nothing."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
