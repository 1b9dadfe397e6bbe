"""Loading a compiled folder: float layers, quantized layers by the description, and faults for missing tensors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlqc
from tests.support import tiny
from vlqc.errors import UserError
from vlqc.kernels_ref.quant_linear import StaticQuantLinear
from vlqc.kernels_ref.quantize import quantize_weight_per_channel_absmax
from vlqc.verify.loader import load

QUANTIZED = ("visual.blocks.1.mlp.gate_proj", "model.layers.2.self_attn.o_proj")
INPUT_SCALE, INPUT_OFFSET = 0.0625, 3.0


def float_folder(folder: Path) -> Path:
    """The tiny checkpoint, with float32 weights and FLOAT for every tensor in the description."""
    shutil.copytree(tiny.TINY, folder, dirs_exist_ok=True)
    write_description(folder, {name: "FLOAT" for name in load_file(folder / "model.safetensors")})
    return folder


def write_description(folder: Path, description: dict[str, Any]) -> None:
    (folder / "quant_model_description.json").write_text(json.dumps(description))


def quantized_folder(
    folder: Path,
    *,
    tensors: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
    description: Callable[[dict[str, Any]], None] = lambda description: None,
) -> Path:
    """`float_folder` with two W8A8 layers; tensors, description: change the content before it is written."""
    float_folder(folder)
    stored = load_file(folder / "model.safetensors")
    entries: dict[str, Any] = {"model_quant_type": "W8A8", "version": "1.0.0", **{name: "FLOAT" for name in stored}}
    for layer in QUANTIZED:
        quantized = quantized_layer(stored[f"{layer}.weight"], stored.get(f"{layer}.bias"))
        for name, buffer in quantized.named_buffers():
            stored[f"{layer}.{name}"] = buffer
            entries[f"{layer}.{name}"] = "FLOAT" if name == "bias" else "W8A8"
    tensors(stored)
    description(entries)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    write_description(folder, entries)
    return folder


def quantized_layer(weight: Tensor, bias: Tensor | None) -> StaticQuantLinear:
    integers, scale = quantize_weight_per_channel_absmax(weight)
    return StaticQuantLinear.from_float(integers, scale, INPUT_SCALE, INPUT_OFFSET, bias, torch.bfloat16)


def faults_of(folder: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(folder)
    return [fault.what for fault in caught.value.faults]


@pytest.mark.every_transformers
def test_a_float_folder_is_the_float_model(tmp_path: Path) -> None:
    """Catches a weight or buffer that is missing, swapped or rounded: logits are equal bit for bit."""
    loaded = load(float_folder(tmp_path))
    assert not loaded.training
    for sample in tiny.mixed_samples():
        assert torch.equal(tiny.plain_logits(sample, loaded), tiny.plain_logits(sample))


@pytest.mark.every_transformers
def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    """Catches a tied head that is required, not loaded, or a copy."""
    folder = tiny.damaged(
        tmp_path, tensors=lambda t: t.pop("lm_head.weight"), config=lambda c: c.update(tie_word_embeddings=True)
    )
    write_description(folder, {})
    loaded = load(folder)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tiny.plain_logits(tiny.synthetic_sample(), loaded).isfinite().all()


@pytest.mark.every_transformers
def test_described_layers_are_quantized(tmp_path: Path) -> None:
    """Catches a quantized layer that runs in float, or a float layer that runs quantized."""
    loaded = vlqc.load(quantized_folder(tmp_path))
    layers = {path: module for path, module in loaded.named_modules() if isinstance(module, StaticQuantLinear)}
    assert sorted(path.removeprefix("model.").replace("language_model.", "") for path in layers) == sorted(
        layer.removeprefix("model.") for layer in QUANTIZED
    )
    stored = load_file(tiny.TINY / "model.safetensors")
    for path, module in layers.items():
        layer = next(layer for layer in QUANTIZED if layer.removeprefix("model.") in path)
        expected = quantized_layer(stored[f"{layer}.weight"], stored.get(f"{layer}.bias"))
        rows = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(0))
        assert torch.equal(module(rows), expected(rows))
        float_output = torch.nn.functional.linear(rows, stored[f"{layer}.weight"], stored.get(f"{layer}.bias"))
        assert (module(rows) - float_output).abs().max() < 0.1 * float_output.abs().max()
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert tiny.plain_logits(tiny.synthetic_sample((4, 4)), loaded).isfinite().all()


@pytest.mark.every_transformers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """Catches a folder that runs in float32 only, or stored scales that are rounded to the dtype."""
    loaded = load(quantized_folder(tmp_path), dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    scales = [module.weight_scale.dtype for module in loaded.modules() if isinstance(module, StaticQuantLinear)]
    assert scales == [torch.float32] * len(QUANTIZED)
    sample = tiny.synthetic_sample((4, 4))
    sample["pixel_values"] = sample["pixel_values"].to(dtype)
    logits = tiny.plain_logits(sample, loaded)
    assert logits.dtype == dtype and logits.isfinite().all()


def test_a_folder_without_description(tmp_path: Path) -> None:
    """Catches a float checkpoint that is loaded as a compiled folder."""
    assert len(faults_of(tiny.TINY)) == 1


@pytest.mark.parametrize("text", ["{", "[]", '"FLOAT"'])
def test_a_description_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    """Catches a traceback from a damaged description."""
    folder = float_folder(tmp_path)
    (folder / "quant_model_description.json").write_text(text)
    (fault,) = faults_of(folder)
    assert fault.startswith("quant_model_description.json")


@pytest.mark.parametrize("scheme", ["W8A9", "W4A4", ["W8A8"], 8])
def test_an_unknown_scheme_is_named(tmp_path: Path, scheme: object) -> None:
    """Catches an unknown scheme that is run as another one."""
    layer = QUANTIZED[0]
    folder = quantized_folder(tmp_path, description=lambda entries: entries.update({f"{layer}.weight": scheme}))
    assert faults_of(folder) == [f"{layer} has the unknown scheme {scheme}"]


def test_integers_without_a_scheme(tmp_path: Path) -> None:
    """Catches int8 weights that are run as float weights."""
    layer = QUANTIZED[1]
    folder = quantized_folder(tmp_path, description=lambda entries: entries.pop(f"{layer}.weight"))
    assert len(faults := faults_of(folder)) == 1 and f"{layer}.weight" in faults[0]


@pytest.mark.every_transformers
def test_all_missing_or_misshapen_tensors_are_listed(tmp_path: Path) -> None:
    """Catches an error with the first fault only, and parameters that stay on the meta device."""

    def damage(tensors: dict[str, Tensor]) -> None:
        vision, text = QUANTIZED
        for name in (f"{vision}.deq_scale", f"{text}.input_scale", "lm_head.weight", f"{vision}.bias"):
            del tensors[name]
        tensors["model.norm.weight"] = torch.ones(7)

    faults = " ".join(faults_of(quantized_folder(tmp_path, tensors=damage))).split()
    assert sorted(word for word in faults if "." in word) == [
        "lm_head.weight",
        "model.layers.2.self_attn.o_proj.input_scale",
        "model.norm.weight",
        "visual.blocks.1.mlp.gate_proj.bias",
        "visual.blocks.1.mlp.gate_proj.deq_scale",
    ]
    assert "[7]" in faults


@pytest.mark.parametrize(
    ("part", "value"),
    [("weight", torch.ones(2, 2, dtype=torch.int8)), ("quant_bias", torch.ones(344)), ("input_scale", torch.ones(()))],
)
def test_invalid_companions_are_named(tmp_path: Path, part: str, value: Tensor) -> None:
    """Catches companions with a wrong shape or dtype, or without a dimension (engines reject those)."""
    layer = QUANTIZED[0]
    folder = quantized_folder(tmp_path, tensors=lambda tensors: tensors.update({f"{layer}.{part}": value}))
    assert len(faults := faults_of(folder)) == 1 and layer in faults[0]
