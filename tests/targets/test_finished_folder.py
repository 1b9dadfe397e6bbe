"""What each engine looks up in the description of a finished folder, and which keys and tensors it would ignore."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.targets.test_families_in_engines import FLOAT_TOWER, LANGUAGE_DYNAMIC, WITH_EXPERTS, schemes_of
from vlqc.families.family import ModelFamily
from vlqc.families.linear import Linear
from vlqc.families.qwen2 import QWEN2
from vlqc.families.qwen2_vl import QWEN2_VL
from vlqc.families.qwen3_vl import QWEN3_VL
from vlqc.families.qwen3_vl_moe import QWEN3_VL_MOE
from vlqc.targets.engine import Engine, FinishedFolder, StoredTensor
from vlqc.targets.mindie import MINDIE
from vlqc.targets.rules import folder_type
from vlqc.targets.schemes import Scheme
from vlqc.targets.versions import loading_versions, unread_in
from vlqc.targets.vllm_ascend import VLLM_ASCEND

ENGINES = (VLLM_ASCEND, MINDIE)


class Empty:
    """A tensor of which only the name matters."""

    dtype, shape = "BF16", (8,)

    def read(self) -> Any:
        return np.zeros(8)


def folder(
    family: ModelFamily,
    layout: Engine = VLLM_ASCEND,
    changes: Mapping[str, Scheme] | None = None,
    *,
    tensors: tuple[str, ...] = (),
    norms: Mapping[str, tuple[str, ...]] | None = None,
    files: tuple[str, ...] = (),
) -> FinishedFolder:
    """A folder whose description has every linear layer and the embedding, and these tensors."""
    schemes = schemes_of(family, **(changes or {}))
    embedding = "model.language_model.embed_tokens" if "language_model" in "".join(schemes) else "model.embed_tokens"
    described = {f"{name}.weight": str(scheme) for name, scheme in schemes.items()}
    described |= dict.fromkeys((f"{embedding}.weight", "lm_head.weight", *tensors), "FLOAT")
    stored: dict[str, StoredTensor] = dict.fromkeys(described, Empty())
    quant_type = folder_type(layout, family, schemes)
    described |= {"version": "1.0.0", "model_quant_type": str(quant_type)}
    name = layout.description_name(quant_type)
    return FinishedFolder(
        path=Path(),
        layout=layout,
        family=family,
        files=(name, *files),
        description_name=name,
        description=described,
        config={},
        tensors=stored,
        quant_type=quant_type,
        schemes=schemes | {embedding: Scheme.FLOAT},
        embedding=embedding,
        linears={layer: Linear(8, 8) for layer in (*schemes, "lm_head") if not layer.endswith("mlp.gate")},
        norm_readers=norms or {},
    )


def without(made: FinishedFolder, *entries: str) -> FinishedFolder:
    """The folder with a description that lacks these entries."""
    for entry in entries:
        del made.description[entry]  # type: ignore[attr-defined]
    return made


FAMILIES: list[tuple[ModelFamily, dict[str, Scheme]]] = [
    (QWEN2_VL, {}),
    (QWEN3_VL, {}),
    (QWEN3_VL_MOE, WITH_EXPERTS),
    (QWEN2, {}),
]


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_a_complete_description(family: ModelFamily, changes: dict[str, Scheme]) -> None:
    """Catches a look-up of something that a correct folder does not describe."""
    for layout in ENGINES:
        made = folder(family, layout, changes)
        assert layout.description_faults(made) == layout.header_faults(made) == MINDIE.description_faults(made) == []


def test_models_that_an_engine_does_not_run() -> None:
    """Catches a folder of such a model that `vlqc verify` passes, or for which it names no reason."""
    text = {"num_hidden_layers": 1, "tie_word_embeddings": True}
    config = {"text_config": text, "vision_config": {"deepstack_visual_indexes": [0]}, "quantize": "w8a8_dynamic"}
    made = replace(folder(QWEN3_VL_MOE, VLLM_ASCEND, WITH_EXPERTS), quant_type=Scheme.W8A8_DYNAMIC, config=config)
    tied, outputs = "the output head is tied to the embedding", "1 output of the vision tower besides the last one"
    assert [fault.what for fault in VLLM_ASCEND.config_faults(made)] == [tied]
    assert [fault.what for fault in MINDIE.config_faults(made)] == [tied, outputs]
    dense = replace(folder(QWEN3_VL), config=config | {"quantize": "w8a8"})
    assert VLLM_ASCEND.config_faults(dense) == []
    assert [fault.what for fault in MINDIE.config_faults(dense)] == [outputs]


MERGER, DEEPSTACK = "model.visual.merger.linear_fc2", "model.visual.deepstack_merger_list.0.linear_fc1"
LANGUAGE = "model.language_model.layers.0"
# family, changes of its schemes, layer without an entry, engines that look it up
MISSING: list[tuple[ModelFamily, dict[str, Scheme], str, tuple[Engine, ...]]] = [
    (QWEN2_VL, {}, "visual.merger.mlp.2", (VLLM_ASCEND,)),
    (QWEN2_VL, {}, "visual.blocks.0.mlp.fc2", (VLLM_ASCEND,)),
    (QWEN3_VL, {}, MERGER, (VLLM_ASCEND,)),
    (QWEN3_VL, {}, DEEPSTACK, (VLLM_ASCEND,)),
    (QWEN3_VL, {}, "model.language_model.embed_tokens", (VLLM_ASCEND,)),
    (QWEN3_VL, {}, "lm_head", (VLLM_ASCEND,)),
    (QWEN3_VL, {}, f"{LANGUAGE}.self_attn.q_proj", ENGINES),
    (QWEN3_VL_MOE, WITH_EXPERTS, f"{LANGUAGE}.mlp.gate", (VLLM_ASCEND,)),
    (QWEN3_VL_MOE, WITH_EXPERTS, f"{LANGUAGE}.mlp.experts.0.down_proj", ENGINES),
    (QWEN2, {}, "model.layers.0.mlp.down_proj", ENGINES),
]


@pytest.mark.parametrize(("family", "changes", "layer", "engines"), MISSING)
def test_a_missing_entry(
    family: ModelFamily, changes: dict[str, Scheme], layer: str, engines: tuple[Engine, ...]
) -> None:
    """Catches a folder said to load in an engine that stops with a KeyError: a merger, a router, an output head."""
    made = without(folder(family, changes=changes), f"{layer}.weight")
    found = [(each, fault.what) for each in ENGINES for fault in each.description_faults(made)]
    assert found == [(each, f"{layer}.weight has no entry") for each in engines]


def test_the_other_layout() -> None:
    """Catches a folder with MindIE's description said to load in vLLM Ascend, which reads another file."""
    made = folder(QWEN3_VL, MINDIE)
    (fault,) = VLLM_ASCEND.description_faults(made)
    assert fault.where == "quant_model_description_w8a8.json" and MINDIE.description_faults(made) == []


NORM = f"{LANGUAGE}.input_layernorm"
READERS = tuple(f"{LANGUAGE}.self_attn.{member}_proj" for member in "qkv")
MERGER_NORM = "model.visual.merger.norm.bias"


def test_entries_that_make_rmsnorms_have_a_bias() -> None:
    """Catches the biases of the mergers' LayerNorms in vLLM Ascend's description, where they give every RMSNorm a bias
    of zeros; and a folded shift without such an entry, which vLLM Ascend drops."""
    assert not VLLM_ASCEND.describes(QWEN3_VL, MERGER_NORM)
    assert not VLLM_ASCEND.describes(QWEN3_VL, "model.visual.deepstack_merger_list.2.norm.bias")
    assert VLLM_ASCEND.describes(QWEN3_VL, "model.visual.blocks.0.norm1.bias")
    assert VLLM_ASCEND.describes(QWEN3_VL, f"{NORM}.bias") and MINDIE.describes(QWEN3_VL, MERGER_NORM)
    norms = {NORM: READERS}
    (warning,) = VLLM_ASCEND.description_warnings(folder(QWEN3_VL, tensors=(MERGER_NORM,), norms=norms))
    assert MERGER_NORM in warning.what
    shifted = folder(QWEN3_VL, tensors=(MERGER_NORM, f"{NORM}.bias"), norms=norms)
    assert VLLM_ASCEND.description_warnings(shifted) == VLLM_ASCEND.tensor_faults(shifted) == []
    (fault,) = VLLM_ASCEND.tensor_faults(without(shifted, MERGER_NORM, f"{NORM}.bias"))
    assert fault.where == f"{NORM}.bias"


def test_biases_of_text_models_in_mindie() -> None:
    """Catches a bias of W8A8_DYNAMIC layers or norms without an entry, and a second description: MindIE's loader of
    text models drops the former without an error and refuses the latter."""
    dynamic = {"QKV": Scheme.W8A8_DYNAMIC, "OUT": Scheme.W8A8_DYNAMIC, "UP": Scheme.W8A8_DYNAMIC}
    bias, norm = "model.layers.0.self_attn.q_proj.bias", "model.layers.0.input_layernorm"
    made = folder(QWEN2, MINDIE, dynamic, tensors=(bias, f"{norm}.bias"), norms={norm: ()})
    assert MINDIE.description_faults(made) == []
    assert [fault.what for fault in MINDIE.description_faults(without(made, bias, f"{norm}.bias"))] == [
        f"{bias} has no entry",
        f"{norm}.bias has no entry",
    ]
    static = without(folder(QWEN2, MINDIE, tensors=(bias,)), bias)
    assert MINDIE.description_faults(static) == []  # it is part of quant_bias
    (fault,) = MINDIE.description_faults(folder(QWEN2, MINDIE, files=("quant_model_description.json",)))
    assert "quant_model_description_w8a8.json" in fault.where
    assert MINDIE.description_faults(folder(QWEN3_VL, MINDIE, files=("quant_model_description.json",))) == []


def test_shifted_norms_in_front_of_experts() -> None:
    """Catches a norm bias that MindIE drops, because experts and their router read the norm."""
    norm = f"{LANGUAGE}.post_attention_layernorm"
    experts = tuple(layer for layer in schemes_of(QWEN3_VL_MOE) if ".experts." in layer)
    names = (f"{norm}.bias", f"{norm}.module.weight", f"{norm}.module.bias")
    made = folder(QWEN3_VL_MOE, MINDIE, WITH_EXPERTS, tensors=names, norms={norm: experts})
    assert "ignore" in MINDIE.tensor_faults(made)[0].what


def test_a_type_that_only_the_description_names() -> None:
    """Catches a folder of vLLM Ascend's layout, per token with a float vision tower, said not to load in versions of
    MindIE that take its type from the description."""
    config = {"model_type": "qwen2_vl", "vision_config": {}}
    made = replace(folder(QWEN2_VL, VLLM_ASCEND, LANGUAGE_DYNAMIC | FLOAT_TOWER), config=config)
    completed = MINDIE.completed_config(made)
    assert completed == {**config, "quantize": "w8a8_dynamic"} and MINDIE.config_faults(made) == []
    versions = loading_versions(MINDIE, QWEN2_VL, made.schemes, "bfloat16", completed)
    assert versions is not None and loading_versions(MINDIE, QWEN2_VL, made.schemes, "bfloat16", config) is None
    unread = unread_in("2.2", MINDIE.version_faults(made))
    assert [fault.where for fault in unread] == ["config.json"] and not unread_in("3.0.0", MINDIE.version_faults(made))
    assert MINDIE.completed_config(replace(made, description_name="quant_model_description_w8a8_dynamic.json")) is None
