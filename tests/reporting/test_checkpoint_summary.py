"""vlqc.reporting.checkpoint_summary: counts and sizes of folders with known tensors."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from tests.support.synthetic_report import report_data
from vlqc.errors import UserError
from vlqc.reporting.checkpoint_summary import inspect_folder
from vlqc.reporting.html.schema import RotationData

FLOAT = {
    "visual.patch_embed.proj.weight": torch.zeros(8, 3, 2, 4, 4),
    "visual.blocks.0.attn.qkv.weight": torch.zeros(24, 8),
    "visual.blocks.0.attn.qkv.bias": torch.zeros(24),
    "visual.merger.mlp.0.weight": torch.zeros(32, 32),
    "model.embed_tokens.weight": torch.zeros(10, 16),
    "model.layers.0.input_layernorm.weight": torch.zeros(16),
    "model.layers.0.mlp.up_proj.weight": torch.zeros(40, 16),
    "model.layers.0.mlp.down_proj.weight": torch.zeros(16, 40),
    "model.norm.weight": torch.zeros(16),
    "lm_head.weight": torch.zeros(10, 16),
}
CONFIG = {
    "model_type": "qwen2_5_vl", "num_hidden_layers": 1, "hidden_size": 16, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "vision_config": {"depth": 1},
}  # fmt: skip


def write(folder: Path, tensors: dict[str, torch.Tensor], config: object = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def float_folder(folder: Path) -> Path:
    return write(folder, {name: tensor.to(torch.bfloat16) for name, tensor in FLOAT.items()})


def test_parts_of_a_float_folder(tmp_path: Path) -> None:
    """Catches tensors counted in the wrong part, and embeddings or convolutions counted as linear layers."""
    inspection = inspect_folder(float_folder(tmp_path / "model"))
    assert [(row.part, row.scheme, row.linears, row.tensors, row.bytes) for row in inspection.rows] == [
        ("vision blocks", "FLOAT", 1, 2, 2 * (24 * 8 + 24)),
        ("merger", "FLOAT", 1, 1, 2 * 32 * 32),
        ("vision, other", "FLOAT", 0, 1, 2 * 8 * 3 * 2 * 4 * 4),
        ("language layers", "FLOAT", 2, 3, 2 * (16 + 2 * 40 * 16)),
        ("embeddings", "FLOAT", 0, 1, 2 * 160),
        ("lm_head", "FLOAT", 1, 1, 2 * 160),
        ("other", "FLOAT", 0, 1, 2 * 16),
    ]
    assert {row.dtypes for row in inspection.rows} == {("bfloat16",)}
    assert inspection.ranges == []
    assert inspection.facts == {
        "model": "qwen2_5_vl", "kind": "float", "dtype": "bfloat16", "language layers": 1, "hidden size": 16,
        "vision blocks": 1, "tied embeddings": False,
    }  # fmt: skip


def test_newer_names_and_nested_config(tmp_path: Path) -> None:
    """Catches tensor names of newer transformers versions that are counted as part 'other'."""
    renamed = {
        name.replace("visual.", "model.visual.").replace("model.layers", "model.language_model.layers"): tensor
        for name, tensor in FLOAT.items()
    }
    text = {"num_hidden_layers": 1, "hidden_size": 16, "tie_word_embeddings": False}
    config = {"model_type": "qwen2_5_vl", "dtype": "bfloat16", "text_config": text, "vision_config": {"depth": 1}}
    newer = inspect_folder(write(tmp_path / "new", {name: each.bfloat16() for name, each in renamed.items()}, config))
    older = inspect_folder(float_folder(tmp_path / "old"))
    assert (newer.rows, newer.facts) == (older.rows, older.facts)


def compiled_folder(folder: Path) -> Path:
    layer = "model.layers.0.mlp.up_proj"
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in FLOAT.items()}
    tensors[f"{layer}.weight"] = torch.ones(40, 16, dtype=torch.int8)
    tensors[f"{layer}.weight_scale"] = torch.arange(1, 41, dtype=torch.float32)[:, None]
    tensors[f"{layer}.weight_offset"] = torch.zeros(40, 1)
    tensors[f"{layer}.input_scale"] = torch.tensor([0.25])
    tensors[f"{layer}.input_offset"] = torch.tensor([-7.0])
    described = {name: "W8A8" if name.startswith(layer) else "FLOAT" for name in tensors}
    write(folder, tensors)
    (folder / "quant_model_description.json").write_text(json.dumps({**described, "version": "1.0.0"}))
    return folder


def test_schemes_and_ranges_of_a_compiled_folder(tmp_path: Path) -> None:
    """Catches scales that are not counted with their layer, and a wrong minimum or maximum."""
    inspection = inspect_folder(compiled_folder(tmp_path / "model"))
    language = {row.scheme: row for row in inspection.rows if row.part == "language layers"}
    assert (language["W8A8"].linears, language["W8A8"].tensors) == (1, 5)
    assert language["W8A8"].bytes == 40 * 16 + 4 * (40 + 40 + 1 + 1)
    assert language["W8A8"].dtypes == ("int8",)
    assert (language["FLOAT"].linears, language["FLOAT"].tensors) == (1, 2)
    ranges = {each.parameter: each for each in inspection.ranges}
    assert list(ranges) == ["input_scale", "input_offset", "weight_scale"]
    scale = ranges["weight_scale"]
    assert (scale.part, scale.values, scale.min, scale.median, scale.max) == ("language layers", 40, 1, 20, 40)
    assert ranges["input_offset"].min == -7
    assert inspection.facts["kind"] == "compiled"


@pytest.mark.parametrize("damage", ["none", "missing", "cut", "other content"])
def test_rotations_of_a_compiled_folder(tmp_path: Path, damage: str) -> None:
    """Catches a traceback or a claim about rotations where the file that states them is missing or damaged."""
    folder = compiled_folder(tmp_path / "model")
    rotation = RotationData(kind="residual stream", seed=0, size=16, names=("model.embed_tokens",))
    report_data(layers=1, blocks=1, rotations=(rotation,)).write(folder)
    file = folder / "vlqc_report.json"
    if damage == "missing":
        file.unlink()
    elif damage != "none":
        content = file.read_text()
        file.write_text(content[:100] if damage == "cut" else content.replace('"size":16', '"size":"big"'))
    rotated = inspect_folder(folder).facts["rotated"]
    assert ("language model" in rotated) == (damage == "none")
    assert ("vlqc_report.json" in rotated) == (damage != "none")


def test_json_and_table_agree(tmp_path: Path) -> None:
    """Catches a table without a part, and JSON that cannot be parsed."""
    inspection = inspect_folder(compiled_folder(tmp_path / "model"))
    shown = io.StringIO()
    inspection.render(Console(width=120, file=shown))
    read = json.loads(inspection.to_json())
    assert [row["part"] for row in read["rows"]] == [row.part for row in inspection.rows]
    assert all(row["part"] in shown.getvalue() for row in read["rows"])
    assert all(each["parameter"] in shown.getvalue() for each in read["ranges"])
    assert read["files"].keys() == {"model.safetensors"}


@pytest.mark.parametrize("damage", ["missing", "file", "no weights", "cut", "header", "description"])
def test_unusable_folders(tmp_path: Path, damage: str) -> None:
    """Catches a traceback in place of an error that names the folder or file."""
    folder = compiled_folder(tmp_path / "model")
    weights, named = folder / "model.safetensors", str(folder)
    if damage == "missing":
        folder = tmp_path / "absent"
        named = str(folder)
    elif damage == "file":
        folder = weights
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
        named = str(weights)
    elif damage == "header":
        weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
        named = str(weights)
    else:
        described = folder / "quant_model_description.json"
        described.write_text("{")
        named = str(described)
    with pytest.raises(UserError) as caught:
        inspect_folder(folder)
    assert named in str(caught.value)
