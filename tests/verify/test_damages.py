"""Damages of a compiled folder without a manifest that shows them, each in the variation that is the hardest to find.

Every one is found with the float checkpoint; ALONE names those that the folder itself shows.
"""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.compiled_folder import FolderContent, make_content, side_files
from tests.support.damaged_folder import Q, add, rename, reshape, texts
from tests.support.tensors import Array, safetensors_bytes, stored
from vlqc.verify import verify_folder

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
FLOAT_CHECKS = ("float weights", "float config", "float files", "rotations")
KINDS = {"I8": np.int8, "I32": np.int32, "F32": np.float32}


def get(content: FolderContent, name: str) -> Array:
    tensor = content.tensors[name]
    if tensor.dtype == "BF16":
        bits = np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tensor.shape).copy()
    return np.frombuffer(tensor.data, KINDS[tensor.dtype]).reshape(tensor.shape).copy()


def change(name: str, to: Callable[[Array], Array]) -> Callable[[FolderContent], None]:
    def apply(content: FolderContent) -> None:
        content.tensors[name] = stored(to(get(content, name)), content.tensors[name].dtype)

    return apply


def scaled(name: str, factor: float, where: Any = ...) -> Callable[[FolderContent], None]:
    def multiply(values: Array) -> Array:
        values[where] = values[where] * factor
        return values

    return change(name, multiply)


def plus(name: str, value: float, where: Any = ...) -> Callable[[FolderContent], None]:
    def increase(values: Array) -> Array:
        values[where] += value
        return values

    return change(name, increase)


def swap_rows(name: str, *others: str) -> Callable[[FolderContent], None]:
    def apply(content: FolderContent) -> None:
        for each in (name, *others):
            change(each, lambda values: values[[1, 0, *range(2, len(values))]])(content)

    return apply


def swap(first: str, second: str) -> Callable[[FolderContent], None]:
    """Swaps all tensors whose names begin so."""

    def apply(content: FolderContent) -> None:
        for name in [name for name in content.tensors if name.startswith(first)]:
            other = name.replace(first, second, 1)
            content.tensors[name], content.tensors[other] = content.tensors[other], content.tensors[name]

    return apply


def drop(name: str) -> Callable[[FolderContent], None]:
    return lambda content: (content.tensors.pop(name), content.description.pop(name))[0] and None


def configure(**values: Any) -> Callable[[FolderContent], None]:
    return lambda content: content.config.update(values)


def vision(**values: Any) -> Callable[[FolderContent], None]:
    return lambda content: content.config["vision_config"].update(values)


TENSORS: dict[str, Callable[[FolderContent], Any]] = {
    "scales of two layers": swap(f"{MLP}.gate_proj.weight_scale", f"{MLP}.up_proj.weight_scale"),
    "sign of a deq_scale": scaled(f"{ATTENTION}.v_proj.deq_scale", -1, 3),
    "a bit of a weight": lambda c: c.tensors[f"{ATTENTION}.k_proj.weight"].flip(77, 1),
    "input_offset in a group": plus(f"{MLP}.up_proj.input_offset", 1),
    "input_offset of o_proj": plus(f"{ATTENTION}.o_proj.input_offset", 1),
    "quant_bias": plus("visual.blocks.0.attn.qkv.quant_bias", 1, 3),
    "a renamed norm": lambda c: rename(c, "model.layers.0.input_layernorm.weight", "model.layers.0.input_norm.weight"),
    "another dtype": lambda c: add(c, f"{Q}.deq_scale", get(c, f"{Q}.deq_scale"), "I64", "W8A8"),
    "a transposed weight": lambda c: reshape(c, f"{MLP}.up_proj.weight", [64, 96]),
    "a transposed square": change(f"{ATTENTION}.q_proj.weight", lambda values: values.T),
    "a missing entry": lambda c: c.description.pop("visual.merger.mlp.0.weight"),
    "an entry with another scheme": lambda c: c.description.update({f"{MLP}.down_proj.weight": "W8A8"}),
    "a norm channel": scaled("visual.blocks.0.norm2.weight", 2, 7),
    "two layers": swap("model.layers.0.", "model.layers.1."),
    "k and v": swap(f"{ATTENTION}.k_proj.", f"{ATTENTION}.v_proj."),
    "down_proj times 1.01": scaled(f"{MLP}.down_proj.weight", 1.01),
    "o_proj of zeros": scaled(f"{ATTENTION}.o_proj.weight", 0),
    "down_proj times 1.05": scaled(f"{MLP}.down_proj.weight", 1.05),
    "a column times 1.1": scaled(f"{MLP}.down_proj.weight", 1.1, (slice(None), 4)),
    "a bias": drop("visual.blocks.0.mlp.up_proj.bias"),
    "two rows": swap_rows("lm_head.weight"),
    "two rows with their scales": swap_rows(*(f"{ATTENTION}.o_proj.{each}" for each in ("weight", "weight_scale"))),
    "merger times 1.01": scaled("visual.merger.mlp.2.weight", 1.01),
    "two embeddings": swap_rows("model.embed_tokens.weight"),
    "a norm times 1.01": scaled("model.norm.weight", 1.01),
    "the head, tied in config.json": lambda c: (drop("lm_head.weight")(c), configure(tie_word_embeddings=True)(c)),
}  # fmt: skip
CONFIG: dict[str, tuple[Callable[[FolderContent], Any], str]] = {
    "dtype": (configure(torch_dtype="float16"), "dtype"),
    "a key that vLLM reads instead": (configure(compression_config={}), "compression_config"),
    "no class": (configure(architectures=None), "architectures"),
    "rope_theta": (configure(rope_theta=1e6), "rope_theta"),
    "rope_theta, inside": (configure(text_config={"rope_theta": 1e6}), "rope_theta"),
    "sections": (configure(rope_scaling={"type": "mrope", "mrope_section": [3, 3, 2]}), "mrope_section"),
    "yarn": (configure(rope_scaling={"type": "yarn", "mrope_section": [2, 3, 3], "factor": 4.0}), "rope_type"),
    "rms_norm_eps": (configure(rms_norm_eps=1e-5), "rms_norm_eps"),
    "hidden_act": (configure(hidden_act="gelu"), "hidden_act"),
    "positions": (configure(max_position_embeddings=128), "max_position_embeddings"),
    "a sliding window": (configure(use_sliding_window=True, sliding_window=8, max_window_layers=1), "sliding_window"),
    "the image token": (configure(image_token_id=40), "image_token_id"),
    "a window of the tower": (vision(window_size=56), "vision_config.window_size"),
    "full attention": (vision(fullatt_block_indexes=[]), "vision_config.fullatt_block_indexes"),
    "the tower's activation": (vision(hidden_act="gelu"), "vision_config.hidden_act"),
    "heads of the tower": (vision(num_heads=4), "vision_config.num_heads"),
    "a missing key": (lambda c: c.config.pop("rms_norm_eps"), "rms_norm_eps"),
}


@pytest.fixture(scope="module")
def content() -> FolderContent:
    return make_content()


@pytest.fixture(scope="module")
def source(content: FolderContent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = content.write_source(tmp_path_factory.mktemp("source") / "float")
    for name, value in side_files(content.config).items():
        (folder / name).write_text(json.dumps(value))
    return folder


def test_the_undamaged_folder(content: FolderContent, source: Path, tmp_path: Path) -> None:
    """Catches a false fault, or a comparison that is not made."""
    result = verify_folder(content.write(tmp_path / "out"), model_path=source)
    assert texts(result) == "" and result.warnings == []
    assert result.examined["float config"] > 25 and result.examined["float files"] > 4
    assert result.examined["side files"] > 5


@pytest.mark.parametrize("damage", TENSORS)
def test_a_damaged_tensor_is_found(content: FolderContent, source: Path, tmp_path: Path, damage: str) -> None:
    """Catches a damage that structure, arithmetic and the float checkpoint together do not show."""
    damaged = copy.deepcopy(content)
    TENSORS[damage](damaged)
    assert not verify_folder(damaged.write(tmp_path / "out"), model_path=source).ok


@pytest.mark.parametrize("damage", CONFIG)
def test_a_changed_config_is_found(content: FolderContent, source: Path, tmp_path: Path, damage: str) -> None:
    """Catches a key of config.json that changes what the model computes and is not held against the float model's."""
    damaged = copy.deepcopy(content)
    edit, key = CONFIG[damage]
    edit(damaged)
    assert key in texts(verify_folder(damaged.write(tmp_path / "out"), model_path=source))


def edited(name: str, **values: Any) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return apply


def gone(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def swap_tokens(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"word1": 2, "word2": 1}
    (folder / "tokenizer.json").write_text(json.dumps(content))


SURPLUS = (
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "video_preprocessor_config.json",
    "processor_config.json", "pytorch_model.bin", "model.gguf", "params.json", "modeling_qwen.py",
)  # fmt: skip
# name: change, where the fault is, whether the folder itself shows it
FILES: dict[str, tuple[Callable[[Path], Any], str, bool]] = {
    "no tokenizer": (gone("tokenizer.json"), "tokenizer.json", False),
    "an empty tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json", True),
    "two tokens": (swap_tokens, "tokenizer.json", False),
    "a token without a row": (
        edited("tokenizer.json", added_tokens=[{"id": 48, "content": "<x>"}]),
        "tokenizer.json",
        True,
    ),
    "a normalizer": (edited("tokenizer.json", normalizer={"type": "Lowercase"}), "tokenizer.json", False),
    "another end": (edited("tokenizer_config.json", eos_token="word1"), "tokenizer_config.json", False),
    "another class": (edited("tokenizer_config.json", tokenizer_class="T"), "tokenizer_config.json", False),
    "no template": (gone("chat_template.json"), "chat_template.json", False),
    "another template": (edited("chat_template.json", chat_template="{{ 1 }}"), "chat_template.json", False),
    "half a template": (edited("chat_template.json", chat_template="{% if a"), "chat_template.json", True),
    "a second template": (lambda f: (f / "chat_template.jinja").write_text("x"), "chat_template.jinja", False),
    "a template of the tokenizer": (
        edited("tokenizer_config.json", chat_template="x"),
        "tokenizer_config.json",
        False,
    ),
    "colors": (edited("preprocessor_config.json", image_mean=[0.5] * 3), "preprocessor_config.json", False),
    "another processor of images": (
        edited("preprocessor_config.json", image_processor_type="CLIPImageProcessor"),
        "preprocessor_config.json",
        False,
    ),
    "patches": (edited("preprocessor_config.json", patch_size=16), "preprocessor_config.json", True),
    "the end of generation": (edited("generation_config.json", eos_token_id=99), "generation_config.json", True),
    "an id that is a list": (edited("generation_config.json", pad_token_id=[[1]]), "generation_config.json", True),
    "an id that is an object": (edited("generation_config.json", pad_token_id={}), "generation_config.json", True),
    "brackets": (lambda f: (f / "chat_template.jinja").write_text("{{ " + "(" * 5000), "chat_template.jinja", True),
    "conditions": (edited("chat_template.json", chat_template="{% if a %}" * 3000), "chat_template.json", True),
    "another tokenizer file": (
        edited("tokenizer_config.json", tokenizer_file="/tmp/t.json"),
        "tokenizer_config.json",
        True,
    ),
    "a second description": (
        lambda f: (f / "quant_model_description_w8a8.json").write_text("{}"),
        "quant_model_description_w8a8.json",
        True,
    ),
    "named templates": (
        edited("tokenizer_config.json", chat_template=[{"name": "rag", "template": "x"}]),
        "tokenizer_config.json",
        False,
    ),
    "a folder of templates": (
        lambda f: (
            (f / "additional_chat_templates").mkdir(),
            (f / "additional_chat_templates" / "a.jinja").write_text("x"),
        ),
        "additional_chat_templates/a.jinja",
        False,
    ),
    **{f"a surplus {name}": (lambda f, name=name: (f / name).write_text("{}"), name, False) for name in SURPLUS},
    "temperature": (edited("generation_config.json", temperature=2.0), "generation_config.json", False),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json", True),
    "a quantization of ModelOpt": (
        lambda f: (f / "hf_quant_config.json").write_text("{}"),
        "hf_quant_config.json",
        True,
    ),
    "another file of weights": (
        lambda f: (f / "model.safetensors").write_bytes(safetensors_bytes({}, {"format": "pt"})),
        "model.safetensors",
        True,
    ),
}


@pytest.mark.parametrize("damage", FILES)
def test_a_damaged_side_file_is_found(content: FolderContent, source: Path, tmp_path: Path, damage: str) -> None:
    """Catches tokens, prompts or pixels that differ from the float model's, with weights that are right."""
    edit, where, alone = FILES[damage]
    folder = content.write(tmp_path / "out")
    edit(folder)
    faults = [fault for fault in verify_folder(folder, model_path=source).faults if fault.where.startswith(where)]
    assert faults and any(fault.check not in FLOAT_CHECKS for fault in faults) == alone


@pytest.mark.parametrize(("own", "is_found"), [({"processor_class": "A"}, False), ({"processor_class": "B"}, True)])
def test_a_class_that_stands_in_another_file(
    content: FolderContent, source: Path, tmp_path: Path, own: dict[str, Any], is_found: bool
) -> None:
    """Catches a processor of another class, and a false fault where the folder names it in another file."""
    other, folder = tmp_path / "float", content.write(tmp_path / "out")
    shutil.copytree(source, other)
    (other / "processor_config.json").write_text(json.dumps({"processor_class": "A"}))
    edited("preprocessor_config.json", **own)(folder)
    named = [fault.what for fault in verify_folder(folder, model_path=other).faults if "processor_class" in fault.what]
    assert bool(named) == is_found


def test_files_in_another_form_are_no_fault(content: FolderContent, source: Path, tmp_path: Path) -> None:
    """Catches a false fault where the folder has the older form of what transformers 5 saved."""
    other, folder = tmp_path / "float", content.write(tmp_path / "out")
    dataclasses.replace(content, side_files=False).write_source(other)
    settings = {"min_pixels": 3136, "max_pixels": 50176, "patch_size": 14, "merge_size": 2}
    written = {
        "preprocessor_config.json": settings | {"image_processor_type": "Qwen2VLImageProcessor"},
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["<a>", "<b>"]},
        "chat_template.json": {"chat_template": "{{ messages }}"},
    }
    size = {"shortest_edge": 3136, "longest_edge": 50176}
    newer = {
        "processor_config.json": {"image_processor": {"size": size, "patch_size": 14, "merge_size": 2}},
        "tokenizer_config.json": {
            "tokenizer_class": "TokenizersBackend",
            "backend": "tokenizers",
            "extra_special_tokens": ["<b>", "<a>"],
        },
    }
    for place, files in ((folder, written), (other, newer)):
        for name, value in files.items():
            (place / name).write_text(json.dumps(value))
    (other / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copyfile(folder / name, other / name)
    result = verify_folder(folder, model_path=other)
    assert [fault.what for fault in result.faults] == [
        "chat_template.jinja has no chat template; the float checkpoint's has one"
    ]
