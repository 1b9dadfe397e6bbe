"""Verification of one wrong byte in any tensor of any scheme: with the float checkpoint it is always detected."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.compiled_folder import FolderContent, make_content
from tests.support.damaged_folder import (
    BLOCK,
    LAYER,
    PROJ,
    UP,
    Q,
    compensated,
    integers,
    named,
    set_integers,
    steps_of,
    texts,
)
from tests.support.tensors import ITEM, stored
from vlqc.verify import verify_folder

# kind: tensor, element, byte of the element, bits to flip, whether it is detectable without the float checkpoint
WRONG_BYTES = {
    "weight": (f"{Q}.weight", 1000, 0, 0x01, True),
    "weight, high bit": (f"{Q}.weight", 77, 0, 0x80, True),
    # With input_offset 0 quant_bias does not depend on the integers, so the float weight is needed.
    "weight of a layer with offset 0": (f"{PROJ}.weight", 500, 0, 0x10, False),
    "weight_scale": (f"{Q}.weight_scale", 3, 0, 0x01, True),
    "weight_scale of a layer with offset 0": (f"{PROJ}.weight_scale", 3, 2, 0x10, True),
    "weight_offset": (f"{Q}.weight_offset", 5, 1, 0x04, True),
    "input_scale": (f"{Q}.input_scale", 0, 2, 0x01, True),
    "input_scale, below its dtype": (f"{PROJ}.input_scale", 0, 0, 0x01, True),
    "input_offset": (f"{Q}.input_offset", 0, 3, 0x80, True),
    "quant_bias": (f"{Q}.quant_bias", 9, 0, 0x01, True),
    "deq_scale": (f"{Q}.deq_scale", 9, 0, 0x01, True),
    "bias": (f"{Q}.bias", 4, 0, 0x40, True),
    "bias, by less than a step": (f"{Q}.bias", 4, 0, 0x01, True),
    "bias of scaled rows": (f"{LAYER}.self_attn.v_proj.bias", 4, 0, 0x40, True),
    # No other tensor of the folder depends on float tensors.
    "norm weight": (f"{LAYER}.input_layernorm.weight", 7, 0, 0x20, False),
    "final norm weight": ("model.norm.weight", 7, 0, 0x01, False),
    "float weight behind a scaled producer": (f"{LAYER}.mlp.down_proj.weight", 321, 0, 0x10, False),
    "float weight behind a norm": ("visual.merger.mlp.0.weight", 4321, 1, 0x40, False),
    "float weight that nothing touches": ("visual.merger.mlp.2.weight", 1, 0, 0x01, False),
    "bias of a float layer": ("visual.merger.mlp.2.bias", 1, 0, 0x01, False),
    "embedding": ("model.embed_tokens.weight", 11, 0, 0x01, False),
    "output head": ("lm_head.weight", 11, 0, 0x01, False),
    "patch embedding": ("visual.patch_embed.proj.weight", 11, 0, 0x01, False),
}


def damaged(kind: str, dtype: str = "bfloat16") -> tuple[FolderContent, str]:
    content = make_content(dtype=dtype)
    name, element, byte, bits, _ = WRONG_BYTES[kind]
    content.tensors[name].flip(element * ITEM[content.tensors[name].dtype] + byte, bits)
    return content, name


@pytest.mark.parametrize("kind", WRONG_BYTES)
def test_one_wrong_byte_is_named_with_the_float_model(tmp_path: Path, kind: str) -> None:
    """Catches a kind of tensor that is not compared with the float checkpoint."""
    content, name = damaged(kind)
    result = verify_folder(content.write(tmp_path / "out"), model_path=content.write_source(tmp_path / "float"))
    assert named(result, name.rpartition(".")[0]), texts(result)


@pytest.mark.parametrize("kind", WRONG_BYTES)
def test_one_wrong_byte_is_named_without_the_float_model_if_detectable(tmp_path: Path, kind: str) -> None:
    """Catches a value that is no longer recomputed, and a list of undetectable bytes that is wrong."""
    content, name = damaged(kind)
    result = verify_folder(content.write(tmp_path / "out"))
    assert named(result, name.rpartition(".")[0]) == WRONG_BYTES[kind][-1], texts(result)


def test_a_wrong_byte_in_the_int64_form_of_deq_scale(tmp_path: Path) -> None:
    """Catches a deq_scale of float16 folders of which only one half is checked."""
    for byte in (0, 3, 4, 7):
        content = make_content(dtype="float16")
        content.tensors[f"{Q}.deq_scale"].flip(8 * 9 + byte, 0x02)
        result = verify_folder(content.write(tmp_path / f"out{byte}"))
        assert any(finding.check == "deq_scale" and f"{Q}.deq_scale" == finding.where for finding in result.faults)


O = f"{LAYER}.self_attn.o_proj"  # noqa: E741
GATE, DOWN = f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.down_proj"
NORM = f"{LAYER}.post_attention_layernorm"
DYNAMIC, GROUPS = {"scheme": "W8A8_DYNAMIC"}, {"scheme": "W4A8_DYNAMIC"}
UNPACKED, SHIFT = GROUPS | {"mindie": True}, {"shift": True}
# kind: arguments of make_content, tensor, element, byte, bits, layer to name, detectable without the float checkpoint
WRONG_BYTES_ELSEWHERE: dict[str, tuple[dict[str, Any], str, int, int, int, str, bool]] = {
    "dynamic weight": (DYNAMIC, f"{Q}.weight", 1000, 0, 0x04, Q, False),
    "dynamic weight, low bit": (DYNAMIC, f"{Q}.weight", 1000, 0, 0x01, Q, False),
    "dynamic weight of scaled rows": (DYNAMIC, f"{UP}.weight", 1000, 0, 0x04, UP, False),
    "dynamic weight_scale below its dtype": (DYNAMIC, f"{Q}.weight_scale", 3, 1, 0x01, Q, True),
    "dynamic weight_scale, sign": (DYNAMIC, f"{Q}.weight_scale", 3, 3, 0x80, Q, True),
    "dynamic weight_scale, another value of its dtype": (DYNAMIC, f"{Q}.weight_scale", 3, 2, 0x08, Q, False),
    "dynamic weight_offset": (DYNAMIC, f"{Q}.weight_offset", 5, 1, 0x04, Q, True),
    "dynamic bias": (DYNAMIC, f"{Q}.bias", 4, 0, 0x01, Q, False),
    "packed weight, low nibble": (GROUPS, f"{O}.weight", 1000, 0, 0x01, O, True),
    "packed weight, high nibble": (GROUPS, f"{O}.weight", 1000, 0, 0x10, O, True),
    "packed weight, column-parallel": (GROUPS, f"{GATE}.weight", 1000, 0, 0x80, GATE, True),
    "packed weight, 8-bit neighbor": (GROUPS, f"{Q}.weight", 1000, 0, 0x40, Q, False),
    "weight_scale of groups": (GROUPS, f"{O}.weight_scale", 3, 2, 0x01, O, True),
    "weight_scale of groups, sign": (GROUPS, f"{O}.weight_scale", 3, 3, 0x80, O, True),
    "weight_scale_second": (GROUPS, f"{GATE}.weight_scale_second", 9, 2, 0x01, GATE, True),
    "weight_scale_second below its dtype": (GROUPS, f"{GATE}.weight_scale_second", 9, 0, 0x01, GATE, True),
    "weight_offset_second": (GROUPS, f"{GATE}.weight_offset_second", 9, 0, 0x01, GATE, True),
    "scale_bias": (GROUPS, f"{O}.scale_bias", 77, 1, 0x10, O, True),
    "scale_bias, column-parallel": (GROUPS, f"{GATE}.scale_bias", 77, 2, 0x10, GATE, True),
    "unpacked weight": (UNPACKED, f"{O}.weight", 1000, 0, 0x04, O, False),
    "unpacked weight beyond 4 bits": (UNPACKED, f"{O}.weight", 1000, 0, 0x20, O, True),
    "unpacked weight_scale_second": (UNPACKED, f"{GATE}.weight_scale_second", 9, 2, 0x40, GATE, False),
    "shift, taken back by a bias": (SHIFT, f"{LAYER}.input_layernorm.bias", 7, 1, 0x80, Q, False),
    "shift, taken back by quant_bias": (SHIFT, f"{NORM}.bias", 7, 1, 0x80, GATE, True),
    "quant_bias that takes a shift back": (SHIFT, f"{GATE}.quant_bias", 5, 1, 0x10, GATE, True),
    "bias that takes a shift back": (SHIFT, f"{Q}.bias", 5, 0, 0x40, Q, True),
    "vision bias that takes a shift back": (
        SHIFT,
        f"{BLOCK}.mlp.up_proj.bias",
        5,
        0,
        0x40,
        f"{BLOCK}.mlp.up_proj",
        True,
    ),
}


@pytest.mark.parametrize("kind", WRONG_BYTES_ELSEWHERE)
def test_one_wrong_byte_of_every_scheme(tmp_path: Path, kind: str) -> None:
    """Catches a tensor of a scheme, layout or shift that is not checked, with or without the float checkpoint."""
    options, name, element, byte, bits, where, alone = WRONG_BYTES_ELSEWHERE[kind]
    content = make_content(**options)
    content.tensors[name].flip(element * ITEM[content.tensors[name].dtype] + byte, bits)
    if content.mindie and f"{name}.module" in content.tensors:
        content.tensors[f"{name}.module"] = content.tensors[name]
    folder = content.write(tmp_path / "out")
    result = verify_folder(folder)
    assert named(result, where) == alone, texts(result)
    result = verify_folder(folder, model_path=content.write_source(tmp_path / "float"))
    assert named(result, where), texts(result)


def test_swapped_nibbles_are_named(tmp_path: Path) -> None:
    """Catches packing with the even row in the high nibble, where all shapes and ranges are right."""
    content = make_content(scheme="W4A8_DYNAMIC")
    tensor = content.tensors[f"{O}.weight"]
    tensor.data = bytes((byte & 15) << 4 | byte >> 4 for byte in tensor.data)
    result = verify_folder(content.write(tmp_path / "out"), model_path=content.write_source(tmp_path / "float"))
    assert {finding.check for finding in result.faults} == {"scale_bias", "float weights"}
    assert f"[float weights] {O}.weight: SQNR " in texts(result)


def test_groups_of_another_size_are_named(tmp_path: Path) -> None:
    """Catches group scales of the wrong groups, where every tensor has the right shape."""
    content = make_content(scheme="W4A8_DYNAMIC")
    tensor = content.tensors[f"{GATE}.weight_scale_second"]
    tensor.data = np.roll(np.frombuffer(tensor.data, np.float32), 1).tobytes()
    assert f"[scale_bias] {GATE}.scale_bias: channels" in texts(verify_folder(content.write(tmp_path / "out")))


def test_better_rounding_of_4_bits_is_no_damage(tmp_path: Path) -> None:
    """Catches faults for error-gptq_quantize 4-bit rounding, and damage that is not detected then."""
    content = make_content(scheme="W4A8_DYNAMIC", mindie=True, smooth=False)
    set_integers(content, O, compensated(steps_of(content, O), (-8, 7)))
    source = content.write_source(tmp_path / "float")
    assert texts(verify_folder(content.write(tmp_path / "out"), model_path=source)) == ""
    set_integers(content, O, integers(content, O)[::-1])
    result = verify_folder(content.write(tmp_path / "reversed"), model_path=source)
    assert f"{O}.weight: SQNR " in texts(result)


def test_a_shift_that_is_not_compensated(tmp_path: Path) -> None:
    """Catches a norm bias before layers that have neither a bias nor a quant_bias, or of a norm that nothing shifts."""
    content = make_content(scheme="W8A8_DYNAMIC")
    content.tensors[f"{NORM}.bias"] = stored(np.ones(64), "BF16")
    content.description[f"{NORM}.bias"] = "FLOAT"
    content.tensors["model.norm.bias"] = stored(np.ones(64), "BF16")
    content.description["model.norm.bias"] = "FLOAT"
    result = verify_folder(content.write(tmp_path / "out"))
    assert [(finding.check, finding.where) for finding in result.faults] == [
        ("tensors", "model.norm.bias"),
        ("shifts", f"{NORM}.bias"),
        ("shifts", f"{NORM}.bias"),
    ]


def test_a_float16_weight_among_subnormal_numbers(tmp_path: Path) -> None:
    """Catches faults for scaled float16 weights among subnormal numbers."""
    content = make_content(dtype="float16", smooth=False)
    weight = np.frombuffer(content.source[f"{DOWN}.weight"].data, np.float16).astype(np.float32).reshape(64, 96)
    weight[:, 1::2] *= 1e-4
    content.source[f"{DOWN}.weight"] = stored(weight, "F16")
    small = weight.astype(np.float16).astype(np.float32)
    content.tensors[f"{DOWN}.weight"] = stored(small * np.float32(0.7), "F16")
    up = np.frombuffer(content.tensors[f"{UP}.weight_scale"].data, np.float32).reshape(-1, 1)
    input_scale = np.frombuffer(content.tensors[f"{UP}.input_scale"].data, np.float32)
    content.tensors[f"{UP}.weight_scale"] = stored(up / np.float32(0.7), "F32")
    deq_scale = (input_scale * (up / np.float32(0.7))).reshape(-1)
    content.tensors[f"{UP}.deq_scale"] = stored(deq_scale.view(np.uint32).astype(np.int64), "I64")
    result = verify_folder(content.write(tmp_path / "out"), model_path=content.write_source(tmp_path / "float"))
    assert texts(result) == ""
    content.tensors[f"{DOWN}.weight"].flip(2 * 1000, 0x40)
    result = verify_folder(content.write(tmp_path / "bad"), model_path=content.write_source(tmp_path / "float2"))
    assert f"[float weights] {DOWN}.weight: 1 of 6144" in texts(result)


def test_a_checkpoint_of_another_model_type(tmp_path: Path) -> None:
    """Catches one fault per weight for a --model_path of another model."""
    content = make_content()
    folder, source = content.write(tmp_path / "out"), content.write_source(tmp_path / "float")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    result = verify_folder(folder, model_path=source)
    assert [fault.what for fault in result.faults] == ["--model_path is qwen2, the folder is qwen2_5_vl"]
