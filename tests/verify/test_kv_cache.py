"""Folders with a quantized cache of keys and values: loading, faults of each damage, and what the cache costs."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.ablation_folders import SAMPLES, path_in, verify_with_locate
from tests.support.cache_content import add_cache, attention, rounding_attention, scales
from tests.support.compiled_folder import FolderContent, make_content
from tests.support.damaged_folder import add, texts
from tests.support.naive_w8a8 import load_float
from tests.support.tensors import Array, stored
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.streamed_model import model_inputs
from vlqc.kernels_ref.kv_cache import QuantizedCacheAttention
from vlqc.verify import verify_folder
from vlqc.verify.findings import FLOAT_CACHE, RANKING
from vlqc.verify.folder.manifest import SUMMARY
from vlqc.verify.loader import load

KEY, VALUE = (f"{attention(0)}.{member}_proj.kv_cache" for member in "kv")
TEXT = SAMPLES[1]


@dataclass(frozen=True)
class Made:
    content: FolderContent
    folder: Path
    source: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A folder whose cache is quantized in both decoder layers."""
    root = tmp_path_factory.mktemp("kv_cache")
    content = add_cache(make_content(wide={}), 0, 1)
    return Made(content, content.write(root / "out"), content.write_source(root / "float"))


def logits(model: nn.Module, sample: dict[str, Tensor] = TEXT) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**model_inputs(model, QWEN2_5_VL, sample)).logits[0]
    return result


def changed(content: FolderContent, change: Callable[[FolderContent], Any], folder: Path) -> Path:
    damaged = copy.deepcopy(content)
    change(damaged)
    return damaged.write(folder)


def scaled(name: str, factor: float) -> Callable[[FolderContent], None]:
    def apply(content: FolderContent) -> None:
        values = np.frombuffer(content.tensors[name].data, np.float32)
        content.tensors[name] = stored(values * np.float32(factor), "F32")

    return apply


def replaced(name: str, change: Callable[[Array], object]) -> Callable[[FolderContent], None]:
    def apply(content: FolderContent) -> None:
        values = np.frombuffer(content.tensors[name].data, np.float32).copy()
        change(values)
        content.tensors[name] = stored(values, "F32")

    return apply


def swap(content: FolderContent) -> None:
    for suffix in ("scale", "offset"):
        first, second = f"{KEY}_{suffix}", f"{VALUE}_{suffix}"
        content.tensors[first], content.tensors[second] = content.tensors[second], content.tensors[first]


def without_tensors(content: FolderContent) -> None:
    for name in [name for name in content.tensors if ".kv_cache_" in name]:
        del content.tensors[name], content.description[name]


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.every_transformers
@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_attention_reads_rounded_keys_and_values(
    layers: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches scales of another layer or of values instead of keys, keys that are rounded before the rotary embedding,
    a layer without scales that is rounded as well, and a switch that does not turn all of it off."""
    folder = add_cache(make_content(wide={}), *layers).write(tmp_path / "out")
    model, in_float = load(folder), load(folder, quantized_cache=False)
    wrapped = [module for module in model.modules() if isinstance(module, QuantizedCacheAttention)]
    assert len(wrapped) == len(layers)
    with rounding_attention(monkeypatch, *(layer if layer in layers else None for layer in (0, 1))) as shapes:
        expected = logits(in_float)
    assert len(shapes) == 2
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert not torch.allclose(logits(in_float), expected, atol=1e-2)


@pytest.mark.every_transformers
def test_decoding_with_a_cache(made: Made) -> None:
    """Catches keys and values that are rounded otherwise in decoding, where they come from the cache, than in one
    forward of the whole text."""
    model, prompt = load(made.folder), TEXT["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    returned = model.generate(  # type: ignore[operator]
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    ids = returned.sequences
    whole = logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert len(returned.logits) == 4
    for number, step in enumerate(returned.logits):
        assert torch.allclose(step[0], whole[prompt.shape[1] - 1 + number], atol=1e-4)


# ---- damages ---------------------------------------------------------------------------------------------------------

DAMAGES: dict[str, tuple[Callable[[FolderContent], Any], str]] = {
    "a missing scale": (lambda c: (c.tensors.pop(f"{KEY}_scale"), c.description.pop(f"{KEY}_scale")), f"{KEY}_scale"),
    "a missing offset": (lambda c: c.tensors.pop(f"{VALUE}_offset"), f"{VALUE}_offset"),
    "no entry": (lambda c: c.description.pop(f"{VALUE}_scale"), f"{VALUE}_scale"),
    "an entry of another scheme": (lambda c: c.description.update({f"{KEY}_scale": "W8A8"}), f"{KEY}_scale"),
    "an offset": (replaced(f"{KEY}_offset", lambda v: np.put(v, 5, 1)), "not zero in channels 5"),
    "a negative scale": (replaced(f"{VALUE}_scale", lambda v: np.put(v, 3, -0.5)), "in channels 3"),
    "a scale of 0": (replaced(f"{KEY}_scale", lambda v: np.put(v, 3, 0)), "in channels 3"),
    "a scale that is no number": (replaced(f"{KEY}_scale", lambda v: np.put(v, 3, np.nan)), "in channels 3"),
    "a scale beyond bfloat16": (replaced(f"{KEY}_scale", lambda v: np.put(v, 3, 0.1)), "not representable"),
    "a scale per head": (lambda c: add(c, f"{KEY}_scale", np.ones(2), "F32", "C8"), "shape [2] instead of [64]"),
    "int8 scales": (lambda c: add(c, f"{KEY}_scale", np.ones(64), "I8", "C8"), "dtype I8"),
    "no key in the header": (lambda c: c.description.pop("kv_cache_type"), "kv_cache_type is missing"),
    "another cache in the header": (lambda c: c.description.update(kv_cache_type="C4"), "kv_cache_type"),
    "a header without scales": (without_tensors, "kv_cache_type"),
    "quantized attention": (lambda c: c.description.update(fa_quant_type="FAQuant"), "fa_quant_type"),
    "scales of a vision block": (
        lambda c: add(c, "visual.blocks.0.attn.k_proj.kv_cache_scale", np.ones(64), "F32", "C8"),
        "visual.blocks.0.attn.k_proj",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_a_fault(made: Made, damage: str, tmp_path: Path) -> None:
    """Catches damage that `vlqc verify` does not report, or reports at another tensor."""
    change, expected = DAMAGES[damage]
    assert expected in texts(verify_folder(changed(made.content, change, tmp_path / "out")))


def test_undamaged_folder(made: Made, tmp_path: Path) -> None:
    """Catches faults in a valid folder, also in one of msModelSlim, which writes a second key."""
    result = verify_folder(made.folder)
    assert result.ok and result.facts["loads in"] == ["vLLM Ascend 0.25.1rc1 and later"]
    assert result.examined["KV cache"] == 2 and result.facts["KV cache"] == "int8 in 2 of 2 layers"
    other = changed(made.content, lambda c: c.description.update(kv_quant_type="C8"), tmp_path / "out")
    assert verify_folder(other).ok
    (fault,) = verify_folder(made.folder, engine="vllm-ascend@0.18").faults
    assert fault.fix == "compile again with --target vllm-ascend@0.18, without --kv_cache"


@pytest.mark.parametrize(
    "change", [scaled(f"{KEY}_scale", 1.05), scaled(f"{VALUE}_scale", 0.5), swap], ids=["1.05", "half", "swapped"]
)
def test_scales_are_those_of_the_report(made: Made, change: Callable[[FolderContent], Any], tmp_path: Path) -> None:
    """Catches plausible scales that are not those which the compilation chose: no other tensor shows them."""
    entries = []
    for layer in (0, 1):
        figures = {
            name: [float(f"{number:.4g}") for number in (np.sqrt(np.mean(values**2)), values.max())]
            for name, values in (("key", scales(layer, "k").astype(float)), ("value", scales(layer, "v").astype(float)))
        }
        entries.append({"name": f"model.layers.{layer}", "caches": [{"name": attention(layer), **figures}]})
    for name, each in (("good", lambda content: None), ("damaged", change)):
        folder = changed(made.content, each, tmp_path / name)
        (folder / SUMMARY).write_text(json.dumps({"rotations": [], "stages": entries}))
        faults = texts(verify_folder(folder))
        assert ("root mean square" in faults) == (name == "damaged"), faults


# ---- what the cache costs --------------------------------------------------------------------------------------------


def decibels(reference: Tensor, other: Tensor) -> float:
    noise = (other.double() - reference.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))


def test_cost_is_that_of_whole_models(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cost of the cache that is measured on another model, on rounded keys on both sides, or in the float
    model with the scales of the smoothed values."""
    result = verify_with_locate(made.folder, made.source, [TEXT])
    whole, quantized, in_float = load_float(made.source), load(made.folder), load(made.folder, quantized_cache=False)
    reference = logits(whole)
    assert result.facts["logits against float"]["SQNR dB"] == pytest.approx(
        decibels(reference, logits(quantized)), abs=0.02
    )
    assert result.facts[FLOAT_CACHE]["SQNR dB"] == pytest.approx(decibels(reference, logits(in_float)), abs=0.02)
    stages = {row["stage"]: row["KV cache dB"] for row in result.facts["stages against float"]}
    assert 10 < stages["model.layers.1"] < 60
    rows = {row["group"]: row for row in result.facts[RANKING]}
    row = rows[f"{attention(1)}, KV cache"]
    with rounding_attention(monkeypatch, 0, None):
        without = logits(in_float)
    assert row["scheme"] == "C8"
    gain = decibels(reference, without) - decibels(reference, logits(quantized))
    assert row["gain dB"] == pytest.approx(gain, abs=0.05)
    alone = copy.deepcopy(whole)
    path = path_in(whole, attention(1))
    rows_of_values = smoothing_of_values(whole, in_float)
    module = QuantizedCacheAttention(
        alone.get_submodule(path),
        torch.from_numpy(scales(1, "k")),
        torch.from_numpy(scales(1, "v")) / rows_of_values,
    )
    alone.set_submodule(path, module)
    assert row["alone dB"] == pytest.approx(decibels(reference, logits(alone)), abs=0.2)


def smoothing_of_values(whole: nn.Module, folder: nn.Module) -> Tensor:
    """float32 [channels]: by how much smoothing multiplied the values of layer 1, from the values of both models."""
    outputs = []
    for model in (whole, folder):
        layer = model.get_submodule(path_in(model, f"{attention(1)}.v_proj"))
        outputs.append(layer.weight.float() * (layer.weight_scale.float() if hasattr(layer, "weight_scale") else 1))
    norm = [model.get_submodule(path_in(model, "model.layers.1.input_layernorm")).weight for model in (whole, folder)]
    float_weight, stored_weight = outputs[0] * norm[0], outputs[1] * norm[1]
    return (float_weight * stored_weight).sum(1) / float_weight.square().sum(1)


def test_keys_that_are_clipped(made: Made, tmp_path: Path) -> None:
    """Catches scales that are far too small for the keys and that nobody is told of, in a folder without a report."""
    for factor, warns in ((1.0, False), (0.125, True)):
        folder = changed(made.content, scaled(f"{KEY}_scale", factor), tmp_path / str(factor))
        result = verify_folder(folder, model_path=made.source, samples=[TEXT])
        warnings = [finding for finding in result.warnings if finding.check == "KV cache"]
        assert [finding.where for finding in warnings] == [attention(0)] * warns
        assert all("keys are clipped" in finding.what for finding in warnings)


def test_heads_that_are_no_multiple_of_32(tmp_path: Path) -> None:
    """Catches a folder that is accepted although every version that reads its scales stops at heads of 16 channels."""
    result = verify_folder(add_cache(make_content(), 0, size=32).write(tmp_path / "out"))
    assert any("16 channels" in fault.what and "multiple of 32" in fault.why for fault in result.faults)
    assert result.facts["loads in"] == ["no known engine version"]
