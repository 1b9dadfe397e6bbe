"""The structure of a model by running it without weights, compared with tables of Qwen2.5-VL's layers."""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import tiny
from tests.support.float_model import CONFIG
from tests.support.renamed_modules import rename_children
from tools.checkpoints.families import FAMILIES, config_of
from vlqc.errors import UserError
from vlqc.families.linear import Linear
from vlqc.families.qwen2_5_vl import QWEN2_5_VL, flatten_config, original_name
from vlqc.families.registry import family_of
from vlqc.frontend.model_structure import ModelStructure, model_structure, structure_of
from vlqc.frontend.streamed_model import build_meta_model, model_inputs

CONFIGS = {
    "tiny": flatten_config(json.loads((tiny.TINY / "config.json").read_text())),
    "small": CONFIG,
    "tied": CONFIG | {"tie_word_embeddings": True},
    "other heads": CONFIG
    | {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 1}
    | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}},
    "default depth": {key: value for key, value in CONFIG.items() if key != "num_hidden_layers"},
}
SHAPES_7B = CONFIG | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": CONFIG["vision_config"]
    | {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
}


def expected_linears(config: dict[str, Any]) -> dict[str, Linear]:
    """Every linear layer of Qwen2.5-VL, by its config."""
    vision, hidden, inner = config["vision_config"], config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    width, merged = vision["hidden_size"], vision["hidden_size"] * vision.get("spatial_merge_size", 2) ** 2
    linears = {
        "visual.merger.mlp.0": Linear(merged, merged, bias=True),
        "visual.merger.mlp.2": Linear(vision["out_hidden_size"], merged, bias=True),
    }
    for number in range(vision["depth"]):
        block = f"visual.blocks.{number}"
        linears[f"{block}.attn.qkv"] = Linear(3 * width, width, bias=True)
        linears[f"{block}.attn.proj"] = Linear(width, width, row_parallel=True, bias=True)
        for name in ("gate", "up"):
            linears[f"{block}.mlp.{name}_proj"] = Linear(vision["intermediate_size"], width, bias=True)
        linears[f"{block}.mlp.down_proj"] = Linear(width, vision["intermediate_size"], row_parallel=True, bias=True)
    for number in range(config.get("num_hidden_layers", 80)):
        layer = f"model.layers.{number}"
        for name, outputs in (("q", hidden), ("k", keys), ("v", keys)):
            linears[f"{layer}.self_attn.{name}_proj"] = Linear(outputs, hidden, bias=True)
        linears[f"{layer}.self_attn.o_proj"] = Linear(hidden, hidden, row_parallel=True)
        linears[f"{layer}.mlp.gate_proj"] = linears[f"{layer}.mlp.up_proj"] = Linear(inner, hidden)
        linears[f"{layer}.mlp.down_proj"] = Linear(hidden, inner, row_parallel=True)
    if not config["tie_word_embeddings"]:
        linears["lm_head"] = Linear(config["vocab_size"], hidden)
    return linears


def expected_edges(config: dict[str, Any]) -> dict[str, dict[str, list[int]]]:
    """Every edge of Qwen2.5-VL, by its config: producer -> consumer -> the producer's channel per column."""
    vision, hidden, inner = config["vision_config"], config["hidden_size"], config["intermediate_size"]
    width, heads, kv_heads = vision["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    edges: dict[str, dict[str, list[int]]] = {}
    for number in range(vision["depth"]):
        block = f"visual.blocks.{number}"
        edges[f"{block}.norm1"] = {f"{block}.attn.qkv": list(range(width))}
        edges[f"{block}.norm2"] = {f"{block}.mlp.{name}_proj": list(range(width)) for name in ("gate", "up")}
        edges[f"{block}.attn.qkv"] = {f"{block}.attn.proj": list(range(2 * width, 3 * width))}
        edges[f"{block}.mlp.up_proj"] = {f"{block}.mlp.down_proj": list(range(vision["intermediate_size"]))}
    edges["visual.merger.ln_q"] = {"visual.merger.mlp.0": [*range(width)] * 4}
    values = torch.arange(hidden // heads * kv_heads).reshape(kv_heads, -1)
    repeated = values.repeat_interleave(heads // kv_heads, 0).flatten().tolist()
    for number in range(config.get("num_hidden_layers", 80)):
        attention, mlp = f"model.layers.{number}.self_attn", f"model.layers.{number}.mlp"
        edges[f"model.layers.{number}.input_layernorm"] = {
            f"{attention}.{name}_proj": list(range(hidden)) for name in "qkv"
        }
        edges[f"model.layers.{number}.post_attention_layernorm"] = {
            f"{mlp}.{name}_proj": list(range(hidden)) for name in ("gate", "up")
        }
        edges[f"{attention}.v_proj"] = {f"{attention}.o_proj": repeated}
        edges[f"{mlp}.up_proj"] = {f"{mlp}.down_proj": list(range(inner))}
    return edges


def edges_of(structure: ModelStructure) -> dict[str, dict[str, list[int]]]:
    return {
        name: {layer: channel.tolist() for layer, channel in edge.consumers.items()}
        for name, edge in structure.edges.items()
    }


@pytest.mark.every_transformers
@pytest.mark.parametrize("name", CONFIGS)
def test_the_structure_of_qwen2_5_vl(name: str) -> None:
    """Catches a layer, a bias, a shape or an edge that is not found, in any version of transformers."""
    config = CONFIGS[name]
    structure = model_structure(Path("checkpoint"), QWEN2_5_VL, config)
    assert structure.linears == expected_linears(config)
    assert edges_of(structure) == expected_edges(config)
    assert {name for name, edge in structure.edges.items() if not edge.usable.all()} == {
        f"visual.blocks.{number}.attn.qkv" for number in range(config["vision_config"]["depth"])
    }
    vision = config["vision_config"]
    assert structure.other_parameters == {
        "visual.patch_embed.proj.weight": (vision["hidden_size"], 3, 2, 14, 14),
        "model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"]),
        "model.norm.weight": (config["hidden_size"],),
    }
    assert (structure.embedding, structure.output_head) == ("model.embed_tokens", "lm_head")
    assert structure.tied == config["tie_word_embeddings"]
    assert structure.norms["visual.merger.ln_q"] == vision["hidden_size"]


def test_the_shapes_of_7b() -> None:
    """Catches a structure that needs the memory of the weights, or one whose layers are not all there."""
    structure = model_structure(Path("checkpoint"), QWEN2_5_VL, SHAPES_7B)
    assert structure.linears == expected_linears(SHAPES_7B)
    assert len(structure.edges) == 4 * 32 + 4 * 28 + 1


def test_equal_configs_share_a_structure() -> None:
    """Catches a model that is built again for every verification, and one of another config that is returned."""
    first = model_structure(Path("first"), QWEN2_5_VL, CONFIG)
    assert model_structure(Path("second"), QWEN2_5_VL, dict(reversed(CONFIG.items()))) is first
    assert model_structure(Path("first"), QWEN2_5_VL, CONFIG | {"vocab_size": 49}).parameters != first.parameters


def test_other_names_give_the_same_edges() -> None:
    """Catches an edge that is found by the name of a module."""
    model = build_meta_model(Path("checkpoint"), CONFIG)
    inputs = model_inputs(model, QWEN2_5_VL, QWEN2_5_VL.inputs.synthetic_sample(model.config))
    old_name = rename_children(model)
    structure = structure_of(
        model, QWEN2_5_VL, lambda: inputs, "config.json", lambda name: original_name(old_name(name))
    )
    assert structure.linears == expected_linears(CONFIG)
    assert edges_of(structure) == expected_edges(CONFIG)


# Relative names: edges of the blocks and mergers of the other families, where "2." stands for a number
DECODER = {
    "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attn.v_proj": ["self_attn.o_proj"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.up_proj": ["mlp.down_proj"],
}
QWEN2_VISION = {"norm1": ["attn.qkv"], "attn.qkv": ["attn.proj"], "norm2": ["mlp.fc1"]}
QWEN3_VISION = {"norm1": ["attn.qkv"], "attn.qkv": ["attn.proj"], "norm2": ["mlp.linear_fc1"]}
QWEN3_MERGER = {"norm": ["linear_fc1"]}
NEW = pytest.mark.qwen3_vl
FAMILY_EDGES = {
    "qwen2_vl": {
        "visual.blocks.*": QWEN2_VISION,
        "visual.merger": {"ln_q": ["mlp.0"]},
        "model.layers.*": DECODER,
    },
    "qwen3_vl": {
        "model.visual.blocks.*": QWEN3_VISION,
        "model.visual.merger": QWEN3_MERGER,
        "model.visual.deepstack_merger_list.*": QWEN3_MERGER,
        "model.language_model.layers.*": DECODER,
    },
    "qwen2": {"model.layers.*": DECODER},
    "qwen3": {"model.layers.*": DECODER},
}


def family_structure(name: str) -> ModelStructure:
    config = config_of(FAMILIES[name].shape, "bfloat16", tied=False, family=name)
    family = family_of(config, "config.json")
    return model_structure(Path("checkpoint"), family, family.engine_config(config))


@pytest.mark.every_transformers
@pytest.mark.parametrize(
    "name", ["qwen2_vl", "qwen2", pytest.param("qwen3", marks=NEW), pytest.param("qwen3_vl", marks=NEW)]
)
def test_edges_of_every_family(name: str) -> None:
    """Catches an edge across an activation function, a merger without edges, and q_norm as a producer."""
    structure = family_structure(name)
    found: dict[str, dict[str, list[str]]] = {}
    for producer, edge in structure.edges.items():
        block = next(prefix for prefix in FAMILY_EDGES[name] if fnmatchcase(producer, f"{prefix}.*"))
        prefix = ".".join(producer.split(".")[: block.count(".") + 1])
        consumers = [layer.removeprefix(f"{prefix}.") for layer in edge.consumers]
        kind = found.setdefault(block, {}).setdefault(producer.removeprefix(f"{prefix}."), consumers)
        assert kind == consumers
    assert found == FAMILY_EDGES[name]
    assert {norm for norm in structure.norms if structure.has_bias(norm)} == {
        norm for norm in structure.norms if "visual" in norm
    }


@NEW
def test_columns_of_the_mergers_of_qwen3_vl() -> None:
    """Catches a norm before the merge, of which four columns read each channel, that is taken for one after it, and the
    other way round; and an output projection that is not square."""
    structure, shape = family_structure("qwen3_vl"), FAMILIES["qwen3_vl"].shape
    width, edges = shape.vision_hidden, edges_of(structure)
    assert edges["model.visual.merger.norm"]["model.visual.merger.linear_fc1"] == [*range(width)] * 4
    deepstack = "model.visual.deepstack_merger_list.0"
    assert edges[f"{deepstack}.norm"][f"{deepstack}.linear_fc1"] == list(range(4 * width))
    attention = "model.language_model.layers.0.self_attn"
    channels = edges[f"{attention}.v_proj"][f"{attention}.o_proj"]
    values = torch.arange(shape.value_heads * shape.head_size).reshape(shape.value_heads, -1)
    assert channels == values.repeat_interleave(shape.heads // shape.value_heads, 0).flatten().tolist()
    assert f"{attention}.q_norm.weight" in structure.other_parameters


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": 3},
        {"hidden_act": "no such function"},
        {"vision_config": CONFIG["vision_config"] | {"num_heads": 3}},
        {"vision_config": CONFIG["vision_config"] | {"patch_size": 4096}},
    ],
)
def test_a_model_that_does_not_run_is_a_user_error(change: dict[str, Any]) -> None:
    """Catches an exception of the model's code in place of an error that names config.json."""
    with pytest.raises(UserError):
        model_structure(Path("checkpoint"), QWEN2_5_VL, CONFIG | change)
