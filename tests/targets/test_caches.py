"""Quantized caches of keys and values: which versions run them, per family, and what the user is told."""

from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.option_cases import faults_of, two_folders
from vlqc.families.family import ModelFamily
from vlqc.families.qwen2 import QWEN2
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.families.qwen2_vl import QWEN2_VL
from vlqc.families.qwen3 import QWEN3
from vlqc.families.qwen3_vl import QWEN3_VL
from vlqc.families.qwen3_vl_moe import QWEN3_VL_MOE
from vlqc.options import constraints
from vlqc.options.options import Options
from vlqc.pipeline.presets import pipeline_text
from vlqc.targets.advice import engine_notes, incompatibilities
from vlqc.targets.cache_schemes import CacheScheme
from vlqc.targets.caches import described_caches
from vlqc.targets.mindie import MINDIE
from vlqc.targets.schemes import Scheme
from vlqc.targets.versions import loading_engines, supporting_versions
from vlqc.targets.vllm_ascend import VLLM_ASCEND

C8 = CacheScheme.C8


@dataclass(frozen=True)
class Row:
    """Versions that run a quantized cache, in order, + or -: in all layers, and with some layers in float."""

    family: ModelFamily
    every: str
    some: str


ROWS = (
    Row(QWEN3, "-0.18rc1 +0.18 +0.20.2rc1 +0.26", "-0.18 -0.20.2rc1 +0.21.0rc1 +0.26"),
    Row(QWEN3_VL, "-0.18rc1 +0.18 +0.20.2rc1 +0.26", "-0.18 -0.20.2rc1 +0.21.0rc1 +0.26"),
    Row(QWEN2, "-0.18 -0.24.0rc1 +0.25.1rc1", "-0.24.0rc1 +0.25.1rc1"),
    Row(QWEN2_VL, "-0.18 -0.24.0rc1 +0.25.1rc1", "-0.24.0rc1 +0.25.1rc1"),
    Row(QWEN2_5_VL, "-0.18 -0.24.0rc1 +0.25.1rc1", "-0.24.0rc1 +0.25.1rc1"),
    Row(QWEN3_VL_MOE, "-0.18 -0.24.0rc1 +0.25.1rc1", "-0.24.0rc1 +0.25.1rc1"),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.family.name)
def test_versions(row: Row) -> None:
    """Catches a version that would load the folder with wrong scales, and one that is withheld: up to 0.20 layers
    without scales are quantized, too, and before 0.25.1rc1 only Qwen3 gets all elements of its scales."""
    for caches, expected in (({"a": C8, "b": C8}, row.every), ({"a": C8, "b": None}, row.some)):
        versions = supporting_versions(VLLM_ASCEND, row.family, {}, "bfloat16", caches)
        assert versions is not None
        for entry in expected.split():
            assert (entry[1:] in versions) == (entry[0] == "+"), (caches, entry, str(versions))
        assert supporting_versions(VLLM_ASCEND, row.family, {}, "float16", caches) is None
        assert supporting_versions(MINDIE, row.family, {}, "bfloat16", caches) is None
    in_float = supporting_versions(MINDIE, row.family, {}, "bfloat16", {"a": None})
    assert in_float == supporting_versions(MINDIE, row.family, {}, "bfloat16")


def test_versions_of_a_description() -> None:
    """Catches a folder whose layers without scales are taken for quantized ones, or a layer of the vision tower that
    counts as one of the language model."""
    layers = [f"model.language_model.layers.{number}.self_attn.{member}_proj" for number in (0, 1) for member in "qkv"]
    description: dict[str, Any] = {f"{layer}.weight": "W8A8_DYNAMIC" for layer in layers}
    description["model.visual.blocks.0.attn.qkv.weight"] = "FLOAT"
    config = {"model_type": "qwen3_vl"}
    of_every = {f"{layer}.kv_cache_scale": "C8" for layer in layers if not layer.endswith("q_proj")}
    of_one = {name: value for name, value in of_every.items() if ".0." in name}
    for entries, expected in ((of_every, "vLLM Ascend 0.18 and later"), (of_one, "vLLM Ascend 0.21.0rc1 and later")):
        assert loading_engines(description | entries | {"kv_cache_type": "C8"}, "bfloat16", config) == [expected]
    caches = described_caches(QWEN3_VL, description | of_one)
    assert caches == {f"model.language_model.layers.{n}.self_attn": C8 if n == 0 else None for n in (0, 1)}


def test_sentences_for_the_user() -> None:
    """Catches a compilation whose result no version of the target loads, without a word about it."""
    static = (Scheme.W8A8, "bfloat16", "engine", C8)
    assert incompatibilities("vllm-ascend", QWEN2_5_VL, *static) == []
    for target, family, dtype, words in (
        ("vllm-ascend@0.24.0rc1", QWEN2_5_VL, "bfloat16", "0.25.1rc1 and later do"),
        ("vllm-ascend", QWEN3_VL, "float16", "of a float16 model (bfloat16 only)"),
        ("mindie", QWEN3, "bfloat16", "no version of MindIE loads an int8 KV cache of Qwen3"),
    ):
        (sentence,) = incompatibilities(target, family, Scheme.W8A8, dtype, "engine", C8)
        assert words in sentence
    notes = engine_notes("vllm-ascend", QWEN2_5_VL, Scheme.W8A8, cache=C8)
    assert any("multiple of 32" in note for note in notes) and any("0.25.1rc1" in note for note in notes)
    (versions,) = (note for note in engine_notes("vllm-ascend", QWEN3, Scheme.W8A8, cache=C8) if "and later" in note)
    assert "0.18 and later" in versions
    some = engine_notes("vllm-ascend", QWEN3, Scheme.W8A8, cache=C8, every_layer=False)
    assert any("0.21.0rc1 and later" in note for note in some) and not any("0.18" in note for note in some)
    assert not any("32" in note for note in engine_notes("vllm-ascend", QWEN2_5_VL, Scheme.W8A8))


def test_option(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a target or a model that cannot run the cache and is accepted, and a pipeline without its passes."""
    folders = two_folders(tmp_path)
    monkeypatch.setattr(constraints, "config_of", lambda model_path: {"model_type": "qwen2_5_vl"})
    options = Options.from_user(**folders, kv_cache="INT8")
    assert options.engine_target == "vllm-ascend" and options.cache_scheme is C8
    names = [step.partition("{")[0] for step in pipeline_text(options).split(",")]
    assert names.index("quantize-cache") < names.index("lower-cache") and "caches=true" in pipeline_text(options)
    assert "cache" not in pipeline_text(Options.from_user(**folders))
    for values, words in (
        ({"target": "both"}, "--target both"),
        ({"target": "mindie@2.2"}, "--target mindie@2.2"),
        ({"mindie_format": True}, "--mindie_format"),
    ):
        (fault,) = faults_of(**folders, kv_cache="int8", **values)
        assert words in fault and "MindIE" in fault and "--target vllm-ascend" in fault
    (fault,) = faults_of(**folders, kv_cache="int4")
    assert "int8" in fault
    monkeypatch.setattr(type(QWEN2_5_VL), "key_value", ())
    (fault,) = faults_of(**folders, kv_cache="int8")
    assert "key_value" in fault


@pytest.mark.parametrize(("heads", "refused"), [(16, False), (12, True)])
def test_heads_that_are_no_multiple_of_32(
    heads: int, refused: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a cache with heads of 48 channels, at which the engine stops, and a refusal of other sizes or versions:
    up to 0.20 it runs any size, in Qwen3 alone."""
    folders = two_folders(tmp_path)
    size = 48 if refused else 32
    text = {"hidden_size": heads * size, "num_attention_heads": heads}
    for config in (text, {"text_config": text | {"head_dim": size, "hidden_size": 8}}):
        of_family = {"model_type": "qwen2_5_vl", **config}
        monkeypatch.setattr(constraints, "config_of", lambda model_path, config=of_family: config)
        if refused:
            (fault,) = faults_of(**folders, kv_cache="int8")
            assert "48 channels" in fault and "multiple of 32" in fault and "remove --kv_cache int8" in fault
        else:
            Options.from_user(**folders, kv_cache="int8")
    caches = {"a": C8}
    for family, has_older in ((QWEN2_5_VL, False), (QWEN3, True)):
        versions = supporting_versions(VLLM_ASCEND, family, {}, "bfloat16", caches, size)
        if refused:
            assert (versions is not None) == has_older and (versions is None or "0.21.0rc1" not in versions)
        else:
            assert versions is not None and "0.26" in versions
