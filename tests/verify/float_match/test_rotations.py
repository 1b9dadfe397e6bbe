"""Verification of rotated folders: as sharp as without rotations, and a wrong statement about them is one fault."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.compiled_folder import FolderContent, make_content
from tests.support.damaged_folder import LAYER, Q, named, texts
from tests.support.float_model import CONFIG
from tests.support.rotation_matrices import LANGUAGE, VISION, all_rotations, rotate_model
from tests.support.tensors import ITEM, Array, stored
from tests.verify.float_match.test_compare import WRONG_BYTES
from vlqc.emit.manifest import write_manifest
from vlqc.verify import verify_folder
from vlqc.verify.findings import VerificationResult

Seeds = dict[tuple[str, str], int]
SIZES = {LANGUAGE: 64, VISION: 32}
ALL = all_rotations(CONFIG)
HEADS = {key: seed for key, seed in ALL.items() if key[0] == "attention heads"}


def rotated(seeds: Seeds, **arguments: Any) -> FolderContent:
    return make_content(rotate=lambda values, config: rotate_model(values, config, seeds), **arguments)


def entries(seeds: Seeds, scale: int = 1) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "seed": seed, "size": SIZES.get((kind, name), 16) * scale, "names": [name]}
        for (kind, name), seed in seeds.items()
    ]


def verified(content: FolderContent, tmp_path: Path, statement: Any, *, tied: bool = False) -> VerificationResult:
    folder, source = content.write(tmp_path / "out"), content.write_source(tmp_path / "float")
    if tied:
        config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
        (source / "config.json").write_text(json.dumps(config))
    if statement is not None:
        (folder / "vlqc_report.json").write_text(json.dumps({"rotations": statement}))
    write_manifest(folder)
    return verify_folder(folder, model_path=source)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [("W8A8", "bfloat16"), ("W8A8", "float16"), ("W8A8_DYNAMIC", "bfloat16"), ("W4A8_DYNAMIC", "bfloat16")],
)
def test_a_rotated_folder_has_no_faults(tmp_path: Path, scheme: str, dtype: str, smooth: bool) -> None:
    """Catches a tensor that is not rotated as in the folder, and bit-wise comparison of rotated tensors."""
    content = rotated(ALL, scheme=scheme, dtype=dtype, smooth=smooth)
    result = verified(content, tmp_path, entries(ALL, 2 if scheme == "W4A8_DYNAMIC" else 1))
    assert result.ok, texts(result)
    assert len(result.facts["rotations"]) == len(ALL)


def test_an_output_head_that_the_float_checkpoint_ties(tmp_path: Path) -> None:
    """Catches a head that is looked for in the source, or taken from the embedding without the final norm."""
    content = rotated(ALL, tied=True)
    content.config["tie_word_embeddings"] = False
    assert "lm_head.weight" not in content.source and "lm_head.weight" in content.tensors
    result = verified(content, tmp_path, entries(ALL), tied=True)
    assert result.ok, texts(result)


@pytest.mark.parametrize("kind", WRONG_BYTES)
def test_one_wrong_byte_of_a_rotated_folder_is_named(tmp_path: Path, kind: str) -> None:
    """Catches a tolerance for rotated tensors that hides wrong values."""
    content = rotated(ALL)
    name, element, byte, bits, _ = WRONG_BYTES[kind]
    content.tensors[name].flip(element * ITEM[content.tensors[name].dtype] + byte, bits)
    result = verified(content, tmp_path, entries(ALL))
    assert named(result, name.rpartition(".")[0]), texts(result)
    assert len(result.faults) <= 4, texts(result)


# what the weights have, what vlqc_report.json says, words of each fault
LIES: dict[str, tuple[Seeds, Seeds | None, list[str]]] = {
    "no statement": (ALL, None, ["patch_embed.proj: not rotated", "attention heads"]),
    "empty statement": (ALL, {}, ["patch_embed.proj: not rotated", "attention heads"]),
    "not rotated": ({}, ALL, ["patch_embed.proj: rotated with seed 0", "attention heads"]),
    "heads not rotated": ({LANGUAGE: 0, VISION: 0}, ALL, ["attention heads"]),
    "one head more": (ALL, {key: 0 for key in list(ALL)[:-1]}, ["layers.1.self_attn.v_proj"]),
    "vision not rotated": ({LANGUAGE: 0} | HEADS, ALL, ["patch_embed.proj: rotated with seed 0"]),
    "another stream": ({LANGUAGE: 0}, {VISION: 0}, ["embed_tokens: not", "patch_embed.proj: rotated"]),
    "default seed": (ALL, ALL | {LANGUAGE: 5}, ["rotated with seed 5 according to vlqc_report.json"]),
    "unknown seed": (ALL | {LANGUAGE: 7}, ALL | {LANGUAGE: 5}, ["residual stream of model.embed_tokens are not"]),
    "unknown seed of heads": (ALL | dict.fromkeys(HEADS, 7), ALL, ["attention heads"]),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_wrong_statement_is_one_fault_for_each_kind(tmp_path: Path, kind: str) -> None:
    """Catches a wrong statement that is not found, or is a fault of every tensor."""
    seeds, stated_seeds, words = LIES[kind]
    result = verified(rotated(seeds), tmp_path, None if stated_seeds is None else entries(stated_seeds))
    assert len(result.faults) == len(words), texts(result)
    assert all(word in fault.what for word, fault in zip(words, result.faults, strict=True)), texts(result)


def test_a_damaged_tensor_is_named_beside_a_wrong_statement(tmp_path: Path) -> None:
    """Catches faults that a wrong statement hides."""
    content = rotated(ALL)
    content.tensors[f"{Q}.weight"].flip(1000, 0x04)
    result = verified(content, tmp_path, [])
    assert named(result, Q) and len(result.faults) <= 5, texts(result)


@pytest.mark.parametrize("stated_seeds", [{}, ALL])
def test_another_checkpoint_is_one_fault_for_each_stream(tmp_path: Path, stated_seeds: Seeds) -> None:
    """Catches a rotation that fits no better than the stated one but by chance, and a fault of every tensor."""
    content, rng = rotated(ALL), np.random.default_rng(9)
    for name, tensor in content.source.items():
        content.source[name] = stored(rng.standard_normal(tensor.shape) * 0.3, "BF16")
    result = verified(content, tmp_path, entries(stated_seeds))
    assert len(result.faults) == 2, texts(result)
    assert all("not those of the float checkpoint" in fault.what for fault in result.faults), texts(result)


def unrotated_stage(values: dict[str, Array], config: dict[str, Any]) -> None:
    before = dict(values)
    rotate_model(values, config, ALL)
    values |= {name: value for name, value in before.items() if name.startswith("model.layers.1.")}


def swapped_heads(values: dict[str, Array], config: dict[str, Any]) -> None:
    rotate_model(values, config, ALL)
    for suffix in ("weight", "bias"):
        name = f"{LAYER}.self_attn.v_proj.{suffix}"
        values[name] = np.concatenate([values[name][16:], values[name][:16]])


def one_head_unrotated(values: dict[str, Array], config: dict[str, Any]) -> None:
    plain = dict(values)
    rotate_model(values, config, ALL)
    rotate_model(plain, config, {LANGUAGE: 0, VISION: 0})
    for suffix in ("weight", "bias"):
        name = f"{LAYER}.self_attn.v_proj.{suffix}"
        values[name] = np.concatenate([plain[name][:16], values[name][16:]])


@pytest.mark.parametrize(
    ("rotate", "where"),
    [
        (unrotated_stage, "model.layers.1"),
        (swapped_heads, f"{LAYER}.self_attn.v_proj"),
        (one_head_unrotated, f"{LAYER}.self_attn.v_proj"),
    ],
)
def test_a_part_that_is_rotated_otherwise(tmp_path: Path, rotate: Callable[..., None], where: str) -> None:
    """Catches a stage or a head that differs from the others, or hundreds of faults for it."""
    result = verified(make_content(rotate=rotate), tmp_path, entries(ALL))
    assert named(result, where) and len(result.faults) <= 3, texts(result)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("residual stream", "not a list"),
        ([7], "entry 0"),
        ([{"kind": "residual stream", "seed": 0, "size": 64}], "entry 0"),
        ([{"kind": "MLP", "seed": 0, "size": 64, "names": ["model.embed_tokens"]}], "entry 0"),
        ([{"kind": "residual stream", "seed": -1, "size": 64, "names": ["model.embed_tokens"]}], "entry 0"),
        ([{"kind": "residual stream", "seed": 0, "size": 64, "names": [[]]}], "entry 0"),
        ([{"kind": [], "seed": 0, "size": 64, "names": ["model.embed_tokens"]}], "entry 0"),
        ([{"kind": "residual stream", "seed": 0, "size": 64, "names": ["model.norm"]}], "has no"),
        ([{"kind": "residual stream", "seed": 0, "size": 32, "names": ["model.embed_tokens"]}], "size 32"),
        (entries({LANGUAGE: 0}) * 2, "twice"),
    ],
)
def test_a_damaged_statement_is_a_fault(tmp_path: Path, statement: Any, words: str) -> None:
    """Catches a statement that stops verification, or is ignored."""
    result = verified(make_content(), tmp_path, statement)
    assert any(fault.check == "rotations" and words in fault.what for fault in result.faults), texts(result)


def test_wrong_values_of_a_rotated_embedding_are_counted(tmp_path: Path) -> None:
    """Catches a comparison of rotated tensors by more than one rounding: the neighbor of a value is another value."""
    content = rotated(ALL)
    tensor = content.tensors["model.embed_tokens.weight"]
    values = np.abs((np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16).view(np.float32))
    elements = np.flatnonzero(values > 0.1)[::50]  # float32 determines nearly all roundings of larger values
    for element in elements:
        tensor.flip(2 * int(element), 0x01)
    result = verified(content, tmp_path, entries(ALL))
    assert len(elements) > 40
    assert int(result.faults[0].what.split()[0]) > 0.9 * len(elements), texts(result)
