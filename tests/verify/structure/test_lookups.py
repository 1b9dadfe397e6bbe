"""Descriptions of every family with a damage, as `vlqc verify` names it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vlqc
from tests.support.damaged_folder import edit, texts
from tools.checkpoints.families import Shape
from tools.checkpoints.outlier_checkpoint import make, random_samples
from vlqc.verify import verify_folder

pytestmark = pytest.mark.slow
NEW, NONE = pytest.mark.qwen3_vl, ["no known engine version"]
SIZES: dict[str, Any] = {
    "layers": 1,
    "hidden": 128,
    "intermediate": 128,
    "heads": 4,
    "vision_layers": 1,
    "vision_hidden": 64,
}
SIZES |= {"vision_intermediate": 128, "vision_heads": 2, "vocabulary": 64}
DEEPSTACK = {"layers": 3, "vision_layers": 3, "head": 32, "deepstack": (0, 1, 2)}  # MindIE needs three of these mergers
SHAPES = {
    "qwen2_vl": Shape(**SIZES),
    "qwen2": Shape(**SIZES),
    "qwen3_vl": Shape(**SIZES | DEEPSTACK),
    "qwen3_vl_moe": Shape(**SIZES | DEEPSTACK, experts=2, expert_intermediate=64),
}
FAMILIES = ["qwen2_vl", "qwen2", pytest.param("qwen3_vl", marks=NEW), pytest.param("qwen3_vl_moe", marks=NEW)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> a folder for both engines, compiled on first use, and copied for each call."""
    root = tmp_path_factory.mktemp("lookups")

    def folder_of(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            config = make(root / f"{family} float", family=family, shape=SHAPES[family])
            samples = random_samples(config, 1)
            vlqc.compile(
                model_path=root / f"{family} float", save_directory=folder, samples=samples, weight_method="round"
            )
            (folder / "MANIFEST.json").unlink()
            (folder / "vlqc_report.json").unlink()
        return folder

    return folder_of


@pytest.fixture
def change(compiled: Callable[[str], Path]) -> Any:
    """(family, function that changes the description) -> the result of verifying the changed folder."""
    restored: list[tuple[Path, str]] = []

    def verify_changed(family: str, edit_description: Callable[[dict[str, Any]], object]) -> Any:
        folder = compiled(family)
        path = folder / "quant_model_description.json"
        restored.append((path, path.read_text()))
        edit(path, edit_description)
        return verify_folder(folder)

    yield verify_changed
    for path, text in restored:
        path.write_text(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_for_both_engines(family: str, compiled: Callable[[str], Path]) -> None:
    """Catches a rule of an engine that refuses a folder which it loads."""
    result = verify_folder(compiled(family), engine="both")
    assert texts(result) == "" and [each.split()[0] for each in result.facts["loads in"]] == ["vLLM", "MindIE"]
    vision = json.loads((compiled(family) / "config.json").read_text()).get("vision_config", {})
    assert ("quantize" in vision) == (family == "qwen2_vl")


@pytest.mark.parametrize(
    ("family", "layer", "loads_in"),
    [
        ("qwen2_vl", "visual.merger.mlp.2", ["MindIE"]),
        ("qwen2_vl", "model.embed_tokens", ["MindIE"]),
        ("qwen2", "model.layers.0.mlp.down_proj", []),
        pytest.param("qwen3_vl", "model.visual.deepstack_merger_list.0.linear_fc2", ["MindIE"], marks=NEW),
        pytest.param("qwen3_vl_moe", "model.language_model.layers.0.mlp.gate", ["MindIE"], marks=NEW),
    ],
)
def test_a_missing_entry(change: Any, family: str, layer: str, loads_in: list[str]) -> None:
    """Catches a folder without an entry that an engine looks up, said to load there; and one fault reported twice."""
    result = change(family, lambda description: description.pop(f"{layer}.weight"))
    assert [fault.what for fault in result.faults] == [f"{layer}.weight has no entry"]
    assert [each.split()[0] for each in result.facts["loads in"]] == (loads_in or ["no"])


@NEW
def test_an_expert_of_another_scheme(change: Any) -> None:
    """Catches an expert described with another scheme than the first one, which engines read in that one's."""
    names = [f"model.language_model.layers.0.mlp.experts.1.{name}_proj.weight" for name in ("gate", "up", "down")]
    result = change("qwen3_vl_moe", lambda description: description.update(dict.fromkeys(names, "FLOAT")))
    assert "experts" in texts(result) and "while" in texts(result) and result.facts["loads in"] == NONE


@NEW
def test_biases_of_merger_norms(change: Any, compiled: Callable[[str], Path]) -> None:
    """Catches biases of the mergers' norms that are described, which gives every RMSNorm a bias in vLLM Ascend, and a
    fault where they are not."""
    description = json.loads((compiled("qwen3_vl") / "quant_model_description.json").read_text())
    assert not any("norm.bias" in key for key in description) and "model.visual.blocks.0.norm1.bias" in description
    result = change("qwen3_vl", lambda content: content.update({"model.visual.merger.norm.bias": "FLOAT"}))
    assert result.ok and "model.visual.merger.norm.bias" in result.warnings[0].what
