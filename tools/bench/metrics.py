"""Agreement of a quantized model with its float model, and differences between two descriptions."""

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
from vlqc.kernels_ref.kv_cache import QuantizedCacheAttention
from vlqc.kernels_ref.quant_linear import GroupQuantLinear, QuantLinear, StaticQuantLinear

Samples = Sequence[dict[str, Tensor]]
WEIGHT, FLOAT = ".weight", "FLOAT"


@dataclass(frozen=True)
class Agreement:
    """Quantized against float logits, over all tokens: sqnr in dB; cosine of the concatenated logits; kl, the mean
    KL(float || quantized) in nats; top1, the share of tokens with the same most likely next token; loss, the mean
    negative log likelihood of the next tokens under the quantized model, in nats."""

    sqnr: float
    cosine: float
    kl: float
    top1: float
    loss: float


@torch.no_grad()
def logits_of(model: nn.Module, samples: Samples) -> list[Tensor]:
    """Logits float32 [S, V] of each sample of one sequence of S tokens."""
    return [model(**with_token_types(dict(sample)), use_cache=False).logits[0].float() for sample in samples]


def agreement(float_logits: Iterable[Tensor], logits: Iterable[Tensor], ids: Iterable[Tensor]) -> Agreement:
    """Logits [S, V] of each sample, float and quantized, and its token ids [1, S] -> Agreement; sums in float64."""
    signal = noise = power = product = divergence = same = loss = 0.0
    tokens = predicted = 0
    for reference, quantized, sample in zip(float_logits, logits, ids, strict=True):
        reference, quantized = reference.double(), quantized.double()
        signal += reference.square().sum().item()
        power += quantized.square().sum().item()
        noise += (reference - quantized).square().sum().item()
        product += (reference * quantized).sum().item()
        log_p, log_q = reference.log_softmax(-1), quantized.log_softmax(-1)
        divergence += (log_p.exp() * (log_p - log_q)).sum().item()
        same += (reference.argmax(-1) == quantized.argmax(-1)).sum().item()
        loss += F.nll_loss(log_q[:-1], sample[0, 1:], reduction="sum").item()
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


def model_agreement(float_logits: Sequence[Tensor], model: nn.Module, samples: Samples) -> Agreement:
    """`agreement` of a model with float logits."""
    return agreement(float_logits, logits_of(model, samples), [sample["input_ids"] for sample in samples])


# ---- weights alone ---------------------------------------------------------------------------------------------------


def without_activation_rounding(model: nn.Module) -> nn.Module:
    """Replaces the quantized layers of a model by float layers with the same weights, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            model.set_submodule(path, _dequantized(module))
    return model


def has_quantized_cache(model: nn.Module) -> bool:
    """Whether attention modules of a model round their keys and values."""
    return any(isinstance(module, QuantizedCacheAttention) for module in model.modules())


def with_float_cache(model: nn.Module) -> nn.Module:
    """Removes the rounding of keys and values from the attention modules of a model, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantizedCacheAttention):
            model.set_submodule(path, module.float_attention)
    return model


def _dequantized(quantized: QuantLinear) -> nn.Linear:
    """A Linear with the dequantized weight and bias."""
    weight, bias = quantized.weight.double(), quantized.bias
    if isinstance(quantized, StaticQuantLinear):  # bias and scales follow from quant_bias and deq_scale
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
    """Rounds the weights of these linear layers to 8 bits, in place, with one scale per row (absmax / 127).

    layers: names in the checkpoint, whose prefixes may differ from those in the model.
    """
    modules = {_without_prefixes(path): module for path, module in model.named_modules()}
    for layer in layers:
        weight = modules[_without_prefixes(layer)].get_parameter("weight")
        step = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(weight.dtype).tiny)
        weight.copy_((weight / step).round() * step)
    return model


def _without_prefixes(path: str) -> str:
    """ "model.language_model.layers.0.mlp" -> "layers.0.mlp": which prefixes there are depends on transformers."""
    return ".".join(part for part in path.split(".") if part not in ("model", "language_model"))


# ---- descriptions ----------------------------------------------------------------------------------------------------


def sites_of(description: Mapping[str, Any]) -> dict[str, str]:
    """quant_model_description.json -> scheme of each layer that is not float."""
    return {
        name.removesuffix(WEIGHT): str(scheme)
        for name, scheme in description.items()
        if name.endswith(WEIGHT) and scheme != FLOAT
    }


def description_of(folder: Path) -> dict[str, Any]:
    """The description in a compiled folder of either layout. Raises FileNotFoundError if there is none."""
    for path in sorted(folder.glob("quant_model_description*.json")):
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return description
    raise FileNotFoundError(f"no quant_model_description*.json in {folder}")


def different_sites(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    """A line "layer: scheme against scheme" for each layer that differs between two results of `sites_of`."""
    layers = sorted({*first, *second})
    pairs = {layer: (first.get(layer, FLOAT), second.get(layer, FLOAT)) for layer in layers}
    return [f"{layer}: {mine} against {yours}" for layer, (mine, yours) in pairs.items() if mine != yours]


def median(values: Iterable[float | None]) -> float | None:
    """Median without None values; None if there are no others."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
