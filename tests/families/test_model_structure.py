"""The structure of Qwen2.5-VL by config.json, compared with the modules that transformers builds from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import tiny
from tests.support.float_model import CONFIG
from vlqc.families.model_structure import Linear, ModelStructure
from vlqc.families.qwen2_5_vl import flatten_config, model_structure, original_name
from vlqc.frontend.streamed_model import build_meta_model

CONFIGS = {
    "tiny": flatten_config(json.loads((tiny.TINY / "config.json").read_text())),
    "small": CONFIG,
    "tied": CONFIG | {"tie_word_embeddings": True},
    "other heads": CONFIG | {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 1},
    "defaults": {key: value for key, value in CONFIG.items() if key != "num_hidden_layers"},
}


def structure_of(config: dict[str, Any]) -> ModelStructure:
    structure = model_structure(config)
    assert isinstance(structure, ModelStructure), structure
    return structure


@pytest.mark.every_transformers
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """Catches a layer, a bias or a shape that differs from the model's, and defaults of other transformers versions."""
    config = CONFIGS[name]
    structure = structure_of(config)
    model = build_meta_model(tmp_path, config)
    tied = bool(config["tie_word_embeddings"])
    linears, norms, others = {}, {}, {}
    for path, module in model.named_modules():
        layer = original_name(f"{path}.").removesuffix(".")
        parameters = {part: tuple(parameter.shape) for part, parameter in module.named_parameters(recurse=False)}
        if not parameters or (tied and module is model.get_output_embeddings()):  # type: ignore[operator]
            continue
        if isinstance(module, nn.Linear):
            linears[layer] = (parameters["weight"], "bias" in parameters)
        elif len(parameters["weight"]) == 1:
            norms[layer] = parameters["weight"][0]
        else:
            others |= {f"{layer}.{part}": shape for part, shape in parameters.items()}
    expected = {layer: ((linear.outputs, linear.inputs), linear.bias) for layer, linear in structure.linears.items()}
    assert (expected, structure.norms, structure.other_tensors) == (linears, norms, others)


@pytest.mark.parametrize("name", CONFIGS)
def test_edges_connect_existing_layers(name: str) -> None:
    """Catches an edge to a layer that does not exist, or whose channels do not match the other end's."""
    structure = structure_of(CONFIGS[name])
    assert structure.norm_consumers.keys() == structure.norms.keys()
    for norm, consumers in structure.norm_consumers.items():
        for layer in consumers:
            if layer in structure.linears:
                assert structure.linears[layer].inputs % structure.norms[norm] == 0
                assert structure.norm_before(layer) == norm
    for producer, consumer in structure.linear_edges.items():
        rows = structure.linears[producer].outputs - structure.first_scaled_row(producer)
        channels = structure.consumer_channels(producer)
        assert len(channels) == structure.linears[consumer].inputs
        assert set(channels) == set(range(rows))


def test_channels_of_grouped_queries_are_those_of_repeat_kv() -> None:
    """Catches value heads that are assigned to the wrong query heads."""
    layers = {"v": Linear(outputs=2 * 3, inputs=4), "o": Linear(outputs=4, inputs=6 * 3)}
    structure = ModelStructure(layers, {}, {}, {}, {"v": "o"}, heads=6, kv_heads=2)
    values = torch.arange(6).reshape(1, 2, 1, 3)  # [batch, heads, tokens, channels]
    repeated = values[:, :, None].expand(1, 2, 3, 1, 3).reshape(1, 6, 1, 3).flatten()
    assert structure.consumer_channels("v") == repeated.tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "64"},
        {"hidden_size": 0},
        {"vocab_size": 1 << 40},
        {"num_hidden_layers": True},
        {"num_key_value_heads": 3},
        {"head_dim": -1},
        {"vision_config": None},
        {"num_hidden_layers": 100_000},
    ],
)
def test_an_unusable_config_is_described(change: dict[str, Any]) -> None:
    """Catches a structure of impossible sizes, or an exception in place of the description."""
    described = model_structure(CONFIG | change)
    assert isinstance(described, str) and (next(iter(change)) in described)
