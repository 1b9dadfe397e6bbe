"""The figures of the side-by-side benchmark, against arithmetic by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tools.bench import metrics
from vlqc.kernels_ref.quant_linear import DynamicQuantLinear, GroupQuantLinear, QuantLinear, StaticQuantLinear


def test_agreement_against_numpy() -> None:
    """Catches a wrong sum, sign, base of a logarithm, or a mean per sample where one per token is meant."""
    random = np.random.default_rng(0)
    shapes = [(3, 5), (7, 5)]
    wanted = [random.normal(size=shape) for shape in shapes]
    got = [one + 0.3 * random.normal(size=shape) for one, shape in zip(wanted, shapes, strict=True)]
    ids = [random.integers(0, 5, (1, shape[0])) for shape in shapes]
    found = metrics.agreement(*([torch.from_numpy(each) for each in group] for group in (wanted, got, ids)))
    one, other = np.concatenate(wanted), np.concatenate(got)
    p, q = (np.exp(each) / np.exp(each).sum(1, keepdims=True) for each in (one, other))
    assert found.sqnr == pytest.approx(10 * np.log10((one**2).sum() / ((one - other) ** 2).sum()))
    assert found.cosine == pytest.approx((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(1).mean())
    assert found.top1 == np.mean(one.argmax(1) == other.argmax(1))
    nexts = [q[token, ids[0][0, token + 1]] for token in range(2)]
    nexts += [q[3 + token, ids[1][0, token + 1]] for token in range(6)]
    assert found.loss == pytest.approx(-np.log(nexts).mean())


def test_equal_logits_agree_wholly() -> None:
    """Catches a division by zero when there is no noise."""
    logits, ids = [torch.tensor([[1.0, 2.0], [3.0, -1.0]])], [torch.tensor([[0, 1]])]
    found = metrics.agreement(logits, logits, ids)
    assert (found.sqnr, found.cosine, found.top1) == (math.inf, pytest.approx(1.0), 1.0)
    assert found.kl == pytest.approx(0, abs=1e-12)


GRID = torch.tensor([[-127.0, 3, 8, 0], [127, -50, 1, 2], [0, 127, 127, -9]]) / 16  # per token absmax: 127 / 16


def quantized_layers() -> dict[str, QuantLinear]:
    """A layer of every scheme with 4 inputs and 6 outputs, whose activation grid holds GRID exactly."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 8, (6, 4), generator=generator, dtype=torch.int8)
    scale, second = (torch.rand(6, count, generator=generator) + 0.5 for count in (1, 2))
    bias = torch.randn(6, generator=generator)
    return {
        "static": StaticQuantLinear.from_float(weight, scale, 1 / 16, 0.0, bias, torch.bfloat16),
        "static, shifted": StaticQuantLinear.from_float(weight, scale, 1 / 8, 17.0, bias, torch.float16),
        "dynamic": DynamicQuantLinear.from_float(weight, scale, bias),
        "group": GroupQuantLinear.from_float(weight, scale, second, bias),
        "no bias": DynamicQuantLinear.from_float(weight, scale, None),
    }


@pytest.mark.parametrize("name", quantized_layers())
def test_weights_alone_are_what_the_integers_stand_for(name: str) -> None:
    """Catches a scale left out, an input offset that stays in the bias, or activations that are still rounded."""
    quantized = quantized_layers()[name]
    # `2 *`: the shifted layer's step is twice as large, and its inputs are to stay on its grid and inside it
    inputs = (2 * (GRID / 2 * 16).round() / 16).clamp(-4, 4) if name == "static, shifted" else GRID
    model = metrics.without_activation_rounding(nn.Sequential(quantized))
    (twin,) = model
    assert type(twin) is nn.Linear
    tolerance = 0.04 if name.startswith("static") else 1e-4  # the bias was rounded to a step of the sum in both
    torch.testing.assert_close(twin(inputs), quantized(inputs), rtol=1e-4, atol=tolerance)
    between = inputs + 0.4 / 16
    torch.testing.assert_close(twin(between) - twin(inputs), between @ twin.weight.T - inputs @ twin.weight.T)


@given(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4))
def test_plain_rounding_stays_within_half_a_step(row: list[float]) -> None:
    """Catches the wrong axis, a wrong number of levels, and a row of zeros that becomes NaN."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    weight = torch.tensor([row, [0.0] * 4])
    model[0].weight.data.copy_(weight)
    rounded = metrics.round_weights(model, ["0"])[0].weight.detach()
    step = weight.abs().max().item() / 127
    assert (rounded - weight).abs().max().item() <= step * 0.5001
    assert len(set((rounded[0] / max(step, 1e-38)).round().tolist())) <= 4 and not rounded[1].any()


def test_sites_ignore_everything_but_quantized_weights() -> None:
    """Catches a difference in packing, in norms or in facts that is taken for a difference in sites."""
    one = {"version": "1", "a.weight": "W8A8", "a.weight_scale": "W8A8", "b.weight": "FLOAT", "group_size": 0}
    other = {"a.weight": "W8A8", "a.scale_bias": "W8A8", "n.bias": "FLOAT"}
    assert metrics.sites_of(one) == metrics.sites_of(other) == {"a": "W8A8"}
    assert metrics.different_sites({"a": "W8A8"}, {"a": "W8A8"}) == []


def test_every_different_site_is_named() -> None:
    """Catches a comparison that passes layers which only one side, or each side otherwise, quantizes."""
    one, other = {"a": "W8A8", "b": "W8A8"}, {"b": "W8A8_DYNAMIC", "c": "W8A8"}
    wanted = ["a: W8A8 against FLOAT", "b: W8A8 against W8A8_DYNAMIC", "c: FLOAT against W8A8"]
    assert metrics.different_sites(one, other) == wanted


@pytest.mark.parametrize("name", ["quant_model_description.json", "quant_model_description_w8a8.json"])
def test_both_names_of_a_description_are_found(tmp_path: Path, name: str) -> None:
    """Catches a folder whose description is looked for under one engine's name only."""
    (tmp_path / name).write_text(json.dumps({"a.weight": "W8A8"}))
    assert metrics.description_of(tmp_path) == {"a.weight": "W8A8"}


def test_no_description_is_an_error(tmp_path: Path) -> None:
    """Catches a missing description that passes for one without quantized layers."""
    with pytest.raises(FileNotFoundError):
        metrics.description_of(tmp_path)


def test_median_of_what_is_there() -> None:
    """Catches figures that are absent but count as zero."""
    assert metrics.median([3.0, None, 1.0]) == 2.0
    assert metrics.median([None]) is None
