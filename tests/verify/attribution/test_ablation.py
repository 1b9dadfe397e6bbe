"""Attribution of the logits' error to groups of layers, compared with whole models in which one group is replaced."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import vlqc
from tests.support.ablation_folders import IMAGE, SAMPLES, SMALL, path_in, sample, verify_with_locate
from tests.support.compiled_folder import make_content
from tests.support.naive_w8a8 import load_float
from tools.checkpoints import outlier_checkpoint as make_outlier_checkpoint
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.streamed_model import model_inputs
from vlqc.verify import verify_folder
from vlqc.verify.attribution.ablation import choose_samples
from vlqc.verify.attribution.stage_pair import (
    EquivalentTransform,
    FolderStages,
    combine_scales,
    fit_scales,
    float_in_stored,
    stored_in_float,
)
from vlqc.verify.findings import RANKING, VerificationResult
from vlqc.verify.loader import load


def rows_of(result: VerificationResult) -> dict[str, dict[str, Any]]:
    return {row["group"]: row for row in result.facts[RANKING]}


def layers_of(group: str) -> list[str]:
    """`a.{b,c}_proj` -> [a.b_proj, a.c_proj]"""
    match = re.fullmatch(r"(.*)\{(.*)\}(.*)", group)
    return [match[1] + member + match[3] for member in match[2].split(",")] if match else [group]


def plain_logits(model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Logits of all tokens of SAMPLES but padding, and a mask of image tokens."""
    rows, images = [], []
    for one in SAMPLES:
        kept = one["attention_mask"][0].bool()
        with torch.no_grad():
            rows.append(model(**model_inputs(model, QWEN2_5_VL, one)).logits[0][kept].double().numpy())
        images.append((one["input_ids"][0][kept] == IMAGE).numpy())
    return np.concatenate(rows), np.concatenate(images)


def decibels(reference: np.ndarray, other: np.ndarray) -> float:
    return 10 * math.log10((reference**2).sum() / ((other - reference) ** 2).sum())


# ---- the numbers -----------------------------------------------------------------------------------------------------


def test_figures_are_those_of_whole_models(tmp_path: Path) -> None:
    """Catches variants that start at the wrong stage, reuse outputs of the wrong model, or mix text and image rows."""
    content = make_content(smooth=False)
    source, folder = content.write_source(tmp_path / "float"), content.write(tmp_path / "out")
    result = verify_with_locate(folder, source, SAMPLES)
    whole, quantized = load_float(source), load(folder)
    reference, image = plain_logits(whole)
    everything = decibels(reference, plain_logits(quantized)[0])
    rows = rows_of(result)
    assert len(rows) == 3 * 3
    for group, row in rows.items():
        alone, without = copy.deepcopy(whole), copy.deepcopy(quantized)
        for layer in layers_of(group):
            path = path_in(whole, layer)
            alone.set_submodule(path, quantized.get_submodule(path))
            without.set_submodule(path, whole.get_submodule(path))
        logits = plain_logits(alone)[0]
        assert row["alone dB"] == pytest.approx(decibels(reference, logits), abs=0.02), group
        assert row["gain dB"] == pytest.approx(decibels(reference, plain_logits(without)[0]) - everything, abs=0.03)
        assert row["share %"] == pytest.approx(10 ** ((everything - decibels(reference, logits)) / 10) * 100, abs=0.3)
        for name, of_this in (("image dB", image), ("text dB", ~image)):
            assert row[name] == pytest.approx(decibels(reference[of_this], logits[of_this]), abs=0.02), (group, name)
    shares = [row["share %"] for row in rows.values()]
    assert shares == sorted(shares, reverse=True)
    assert sorted(row["gain rank"] for row in rows.values()) == list(range(1, 10))
    assert result.facts["SQNR of the logits"]["all quantized dB"] == pytest.approx(everything, abs=0.02)


def test_scales_of_smoothed_groups_are_undone(tmp_path: Path) -> None:
    """Catches a quantized layer in the float model whose input or output keeps the wrong scales."""
    content = make_content()
    source, folder = content.write_source(tmp_path / "float"), content.write(tmp_path / "out")
    result = verify_with_locate(folder, source, SAMPLES)
    # The rest is the rounding of float tensors to bfloat16, about 50 dB, and of scales fitted from small matrices.
    assert result.facts["SQNR of the logits"]["without the groups' rounding dB"] > 45
    whole, quantized = load_float(source), load(folder)
    reference, _ = plain_logits(whole)
    for index in range(2):
        block = f"model.layers.{index}"
        for part in (
            "post_attention_layernorm",
            "mlp",
        ):  # a fold's producer and consumers, and down_proj behind up_proj
            path = path_in(whole, f"{block}.{part}")
            whole.set_submodule(path, copy.deepcopy(quantized.get_submodule(path)))
        row = rows_of(result)[f"{block}.mlp.{{gate,up}}_proj"]
        assert row["alone dB"] == pytest.approx(decibels(reference, plain_logits(whole)[0]), abs=0.3)
        whole = load_float(source)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"anti_method": "m4", "is_dynamic": True},
        {"shift": True},
        {"w_bit": 4, "is_lowbit": True, "is_dynamic": True, "open_outlier": False},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_compiled_folders_without_their_rounding_are_exact(tmp_path: Path, options: dict[str, Any]) -> None:
    """Catches scales, shifts and biases of a compiled folder that are not undone, in any scheme."""
    config = make_outlier_checkpoint.make(tmp_path / "float", shape=SMALL)
    samples = make_outlier_checkpoint.random_samples(config, 2)
    vlqc.compile(model_path=tmp_path / "float", save_directory=tmp_path / "out", samples=samples, **options)
    facts = verify_with_locate(tmp_path / "out", tmp_path / "float", samples, locate_tokens=1).facts
    assert (
        facts["SQNR of the logits"]["without the groups' rounding dB"]
        > facts["SQNR of the logits"]["all quantized dB"] + 14  # rotated float tensors are rounded to bfloat16
    )


# ---- scales ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.booleans())
def test_without_rounding_both_ways_are_exact(seed: int, shifted: bool) -> None:
    """Catches a scale, shift or bias that is applied in the wrong direction."""
    torch.manual_seed(seed)
    linear = nn.Linear(6, 4)
    columns, rows = torch.rand(6) + 0.5, torch.rand(4) + 0.5
    shift = torch.randn(6) if shifted else None
    folded = nn.Linear(6, 4)  # the stored layer without rounding
    with torch.no_grad():
        folded.weight.copy_(rows[:, None] * linear.weight * columns)
        folded.bias.copy_(rows * linear.bias - (folded.weight @ shift if shift is not None else 0))
    transform = EquivalentTransform(columns, rows, shift)
    x = torch.randn(3, 6)
    entered = x / columns + (shift if shift is not None else 0)
    torch.testing.assert_close(stored_in_float(folded, transform)(x), linear(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(float_in_stored(linear, transform)(entered), folded(entered), rtol=1e-4, atol=1e-5)


@given(st.integers(0, 1000))
def test_scales_of_representable_weights_are_found_exactly(seed: int) -> None:
    """Catches an inexact fit without rounding, a wrong map of channels, or clipped weights in the fit."""
    random = torch.Generator().manual_seed(seed)
    producer = torch.randint(-100, 100, (4, 40), generator=random).float()
    consumer = torch.randint(-100, 100, (30, 8), generator=random).float()
    scale = 2.0 ** torch.randint(-3, 4, (4,), generator=random)
    scale[0] = 4
    channel = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    stored, behind = producer * scale[:, None], consumer / scale[channel]
    inside = torch.ones(4, 40, dtype=torch.bool)
    inside[:, 0] = False
    stored[:, 0] = 0
    rows = fit_scales(producer, (stored, torch.full((4, 40), 0.5), inside), dim=1)
    columns = fit_scales(consumer, (behind, torch.ones(30, 8), torch.ones(30, 8, dtype=torch.bool)), dim=0)
    torch.testing.assert_close(combine_scales(rows, columns, channel), scale, rtol=1e-6, atol=0)


def test_a_damaged_row_scale_is_no_smoothing() -> None:
    """Catches damage that counts as smoothing and is therefore missing from the group's error."""
    random = torch.Generator().manual_seed(1)
    producer, consumer = torch.randn(4, 64, generator=random), torch.randn(32, 4, generator=random)
    whole = torch.ones((), dtype=torch.bool)
    wrong = producer * torch.tensor([1.0, 1.0, 3.0, 1.0])[:, None]
    rows = fit_scales(
        producer, (wrong + 0.01 * torch.randn(4, 64, generator=random), torch.ones(4, 64), whole.expand(4, 64)), 1
    )
    noisy = consumer * torch.tensor([1.0, 2.0, 1.0, 1.0]) + 0.01 * torch.randn(32, 4, generator=random)
    columns = fit_scales(consumer, (noisy, torch.ones(32, 4), whole.expand(32, 4)), 0)
    assert combine_scales(rows, columns, torch.arange(4))[2] == pytest.approx(1, abs=0.02)


# ---- stage runs ------------------------------------------------------------------------------------------------------


def test_the_number_of_stage_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches variants that run stages before their group's, or text samples in the vision tower."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as classes

    ran: list[str] = []
    for kind in (
        classes.Qwen2_5_VLVisionBlock, classes.Qwen2_5_VLPatchMerger, classes.Qwen2_5_VLDecoderLayer
    ):  # fmt: skip

        def counted(self: nn.Module, *args: Any, forward: Any = kind.forward, **kwargs: Any) -> Any:
            ran.append(type(self).__name__)
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)
    content = make_content()
    source, folder = content.write_source(tmp_path / "float"), content.write(tmp_path / "out")
    verify_folder(folder, model_path=source, samples=SAMPLES[:2])
    messages: list[str] = []
    without = len(ran)
    verify_with_locate(folder, source, SAMPLES[:2], progress=messages.append)
    # Four stages with three groups in all but the merger. With an image the two base models and the variant with float
    # groups run 4 each, the two variants of a group 4, 2 or 1 each; with text alone 2 each, and 2 or 1.
    expected = 3 * 4 + 2 * 3 * (4 + 2 + 1) + 3 * 2 + 2 * 3 * (2 + 1)
    assert len(ran) - 2 * without == expected
    assert f"{expected} stage runs" in messages[0]


def test_one_stage_of_the_folder_is_in_memory(tmp_path: Path) -> None:
    """Catches a folder that is loaded as a whole, or stages that stay in memory."""
    folder = make_content().write(tmp_path / "out")
    stages = FolderStages(folder)
    model = stages._model

    def filled() -> set[str]:
        names = [name for name, tensor in model.named_parameters() if not tensor.is_meta]
        return {*names, *(name for name, _ in model.named_buffers() if name.endswith("deq_scale"))}

    path = path_in(model, "model.layers.0")
    with stages.stage(path):
        assert filled() and all(name.startswith(f"{path}.") for name in filled())
    assert filled() == set()
    assert isinstance(model.get_submodule(f"{path}.mlp.gate_proj"), nn.Linear)


def test_short_samples_are_chosen_first() -> None:
    """Catches a token budget that is exceeded, a kind of sample that is left out, or truncated samples."""
    lengths = [(30, True), (9, False), (24, True), (4, False), (200, False), (6, False)]
    samples = [
        sample(n, has_image=has_image, words=size - 18 * has_image) for n, (size, has_image) in enumerate(lengths)
    ]
    inputs = QWEN2_5_VL.inputs
    assert choose_samples(samples, 1, inputs) == [2, 3]
    assert choose_samples(samples, 24 + 4 + 6 + 9, inputs) == [1, 2, 3, 5]
    assert choose_samples(samples, 1000, inputs) == [0, 1, 2, 3, 4, 5]
    assert choose_samples(samples[3:], 11, inputs) == [0, 2]
    samples[0] |= {"pixel_values_videos": samples[0].pop("pixel_values")}
    assert choose_samples(samples, 1, inputs) == [0, 2, 3]
