"""Verification of a folder's numbers: recomputed from each other, and compared with the float checkpoint."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.compiled_folder import FolderContent, make_content
from tests.support.damaged_folder import LAYER, PROJ, UP, compensated, integers, set_integers, steps_of, texts
from tests.support.tensors import rounded, stored
from vlqc.errors import UserError
from vlqc.verify import verify_folder
from vlqc.verify.folder.reader import round_to

Array = npt.NDArray[np.float32]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_correct_folder_agrees_with_its_source(tmp_path: Path, dtype: str, smooth: bool) -> None:
    """Catches a comparison that mistakes smoothing, or rounding to the folder's dtype, for damage."""
    content = make_content(dtype=dtype, smooth=smooth)
    result = verify_folder(content.write(tmp_path / "out"), model_path=content.write_source(tmp_path / "float"))
    assert texts(result) == ""
    assert result.examined["float weights"] == len(content.source)
    assert 40 < result.facts["weights furthest from float"][0]["SQNR dB"] < 48  # eight bits of normal weights


# ---- rules that no single byte breaks --------------------------------------------------------------------------------


def row(number: int, value: object) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    def change(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        values = values.copy()
        values[number] = value
        return values

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (row(4, 0), "dead channels 4"),
        (row(6, 127), "saturated channels 6"),
        (row(7, np.where(np.arange(32) % 2, -127, 127)), "saturated channels 7"),
        (row(8, np.arange(-128, -96)), "-128 in channels 8"),
    ],
)
def test_implausible_channels_are_named(
    tmp_path: Path, change: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]], expected: str
) -> None:
    """Catches a dead or clipped channel that is not reported because scales and sums still match."""
    content = make_content()
    set_integers(content, PROJ, change(integers(content, PROJ)))
    result = verify_folder(content.write(tmp_path / "out"))
    warned = [f"[{warning.check}] {warning.where}: {warning.what}" for warning in result.warnings]
    named = f"[integers] {PROJ}.weight: {expected}"
    assert named in texts(result) or named in warned


def test_a_poorly_used_range_is_a_warning(tmp_path: Path) -> None:
    """Catches a fault for a folder that is valid but coarse, and a missing warning."""
    content = make_content()
    set_integers(content, PROJ, integers(content, PROJ) // 2)
    result = verify_folder(content.write(tmp_path / "out"))
    assert result.ok
    assert result.warnings[0].where == f"{PROJ}.weight" and " 63 " in result.warnings[0].what


def test_a_channel_of_zero_float_weights_is_no_fault(tmp_path: Path) -> None:
    """Catches a fault for a pruned channel (zero weights, scale at its floor)."""
    content = make_content()
    scale = np.frombuffer(content.tensors[f"{PROJ}.weight_scale"].data, np.float32).copy().reshape(-1, 1)
    bias = np.frombuffer(content.tensors[f"{PROJ}.bias"].data, np.uint16).copy()
    scale[4], bias[4] = 2.0**-23, 0
    content.tensors[f"{PROJ}.weight_scale"] = stored(scale, "F32")
    content.tensors[f"{PROJ}.bias"].data = bias.tobytes()
    input_scale = np.frombuffer(content.tensors[f"{PROJ}.input_scale"].data, np.float32)
    content.tensors[f"{PROJ}.deq_scale"] = stored((input_scale * scale).reshape(-1), "F32")
    quant_bias = np.frombuffer(content.tensors[f"{PROJ}.quant_bias"].data, np.int32).copy()
    quant_bias[4] = 0
    content.tensors[f"{PROJ}.quant_bias"] = stored(quant_bias, "I32")
    set_integers(content, PROJ, row(4, 0)(integers(content, PROJ)))
    result = verify_folder(content.write(tmp_path / "out"))
    assert texts(result) == ""
    assert result.warnings[0].where == f"{PROJ}.weight" and "channels 4" in result.warnings[0].what


def test_members_of_a_group_share_their_input_scale(tmp_path: Path) -> None:
    """Catches a group whose members are consistent, but not with each other: engines use one scale for all."""
    content = make_content()
    other = make_content()
    layer = f"{LAYER}.self_attn.k_proj"
    scale = rounded(np.array([0.5], np.float32), "BF16")
    weight_scale = np.frombuffer(other.tensors[f"{layer}.weight_scale"].data, np.float32)
    deq_scale = scale * weight_scale
    bits = np.frombuffer(other.tensors[f"{layer}.bias"].data, np.uint16).astype(np.uint32) << 16
    sums = integers(other, layer).sum(axis=1)
    content.tensors[f"{layer}.input_scale"] = stored(scale, "F32")
    content.tensors[f"{layer}.deq_scale"] = stored(deq_scale, "F32")
    exact = bits.view(np.float32).astype(np.float64) / deq_scale.astype(np.float64) + 7 * sums
    content.tensors[f"{layer}.quant_bias"] = stored(np.rint(exact), "I32")
    result = verify_folder(content.write(tmp_path / "out"))
    assert [finding.check for finding in result.faults] == ["groups"]
    assert "k_proj has input_scale 0.5" in texts(result)


@pytest.mark.parametrize("value", [0.5, 128.0, -129.0, np.nan])
def test_an_offset_that_is_not_int8(tmp_path: Path, value: float) -> None:
    """Catches an offset that engines would round or wrap."""
    content = make_content()
    content.tensors[f"{PROJ}.input_offset"] = stored(np.array([value]), "F32")
    assert f"[scales] {PROJ}.input_offset" in texts(verify_folder(content.write(tmp_path / "out")))


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_scales_are_positive_and_finite(tmp_path: Path, value: float) -> None:
    """Catches a scale that turns a channel into zeros, its negative, or NaN."""
    content = make_content()
    scale = np.frombuffer(content.tensors[f"{PROJ}.weight_scale"].data, np.float32).copy()
    scale[2] = value
    content.tensors[f"{PROJ}.weight_scale"] = stored(scale.reshape(-1, 1), "F32")
    assert f"[scales] {PROJ}.weight_scale: " in texts(verify_folder(content.write(tmp_path / "out")))


def test_nan_in_a_float_tensor_is_located(tmp_path: Path) -> None:
    """Catches a NaN that neither loading nor a check of shapes detects."""
    content = make_content()
    values = np.zeros((48, 64), np.float32)
    values[40, 3] = np.nan
    content.tensors["model.embed_tokens.weight"] = stored(values, "F32")
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    content.tensors["model.embed_tokens.weight"].dtype = "BF16"
    content.tensors["model.embed_tokens.weight"].data = bits.tobytes()
    assert "[finite] model.embed_tokens.weight: NaN or Inf, first at [40, 3]" in texts(
        verify_folder(content.write(tmp_path / "out"))
    )


def test_a_folder_of_the_reference_tool_passes(tmp_path: Path) -> None:
    """Catches a fault for scales that are stored and multiplied in bfloat16, which engines load."""
    content = make_content(smooth=False)
    for name in [name for name in content.tensors if name.endswith(".deq_scale")]:
        layer = name.removesuffix(".deq_scale")
        scale = np.frombuffer(content.tensors[f"{layer}.weight_scale"].data, np.float32).reshape(-1, 1)
        input_scale = np.frombuffer(content.tensors[f"{layer}.input_scale"].data, np.float32)
        offset = np.frombuffer(content.tensors[f"{layer}.input_offset"].data, np.float32)
        coarse = rounded(scale, "BF16")
        deq_scale = rounded(coarse * input_scale, "BF16").reshape(-1)
        bias = content.tensors.get(f"{layer}.bias")
        values = np.zeros(len(deq_scale), np.float32)
        if bias:
            values = (np.frombuffer(bias.data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        steps = rounded(values / deq_scale, "BF16") - offset * integers(content, layer).sum(axis=1)
        content.tensors[name] = stored(deq_scale, "F32")
        content.tensors[f"{layer}.weight_scale"] = stored(coarse, "BF16")
        content.tensors[f"{layer}.weight_offset"] = stored(np.zeros(coarse.shape), "I64")
        content.tensors[f"{layer}.input_scale"] = stored(input_scale, "BF16")
        content.tensors[f"{layer}.input_offset"] = stored(offset, "BF16")
        content.tensors[f"{layer}.quant_bias"] = stored(np.rint(steps), "I32")
    assert texts(verify_folder(content.write(tmp_path / "out"))) == ""


# ---- against the float checkpoint ------------------------------------------------------------------------------------


def scale_stored(content: FolderContent, name: str, factor: Array) -> None:
    tensor = content.tensors[name]
    bits = np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16
    content.tensors[name] = stored(bits.view(np.float32).reshape(tensor.shape) * factor, "BF16")


def test_a_fold_that_does_not_cancel_is_named(tmp_path: Path) -> None:
    """Catches smoothing folded into the norm but not into its consumers, or into the wrong channel of a consumer."""
    source = make_content().write_source(tmp_path / "float")
    factor = np.ones(64, np.float32)
    factor[[3, 9]] = 1.25
    content = make_content()
    scale_stored(content, f"{LAYER}.post_attention_layernorm.weight", factor)
    result = verify_folder(content.write(tmp_path / "norm"), model_path=source)
    assert f"[float weights] {LAYER}.post_attention_layernorm.weight: channels 3, 9: " in texts(result)
    content = make_content()
    factor = np.ones(96, np.float32)
    factor[[3, 9]] = 1.25
    scale_stored(content, f"{LAYER}.mlp.down_proj.weight", factor)
    result = verify_folder(content.write(tmp_path / "down"), model_path=source)
    assert f"[float weights] {LAYER}.mlp.down_proj.weight: channels 3, 9: " in texts(result)
    content = make_content()
    content.tensors[f"{UP}.weight"] = stored(np.roll(integers(content, UP), 1, axis=1), "I8")
    result = verify_folder(content.write(tmp_path / "rolled"), model_path=source)
    assert f"[float weights] {UP}.weight: SQNR " in texts(result)


def test_better_rounding_than_the_nearest_is_no_damage(tmp_path: Path) -> None:
    """Catches faults for weights that a method moves by one step from the nearest integer."""
    content = make_content(smooth=False)
    values = compensated(steps_of(content, PROJ), (-127, 127))
    assert (values != integers(content, PROJ)).mean() > 0.1
    set_integers(content, PROJ, values)
    source = content.write_source(tmp_path / "float")
    assert texts(verify_folder(content.write(tmp_path / "out"), model_path=source)) == ""
    content.tensors[f"{PROJ}.weight"].flip(100, 0x40)
    result = verify_folder(content.write(tmp_path / "damaged"), model_path=source)
    assert re.search(rf"{PROJ}\.weight: 1 of 1024 .*\[3, 4\]", texts(result))


def test_clipped_weights_are_no_damage(tmp_path: Path) -> None:
    """Catches faults for a clipping method's largest weights, stored as +-127."""
    content = make_content(smooth=False)
    bits = np.frombuffer(content.source[f"{PROJ}.weight"].data, np.uint16).astype(np.uint32) << 16
    weight = bits.view(np.float32).reshape(32, 32)
    scale = np.abs(weight).max(axis=1, keepdims=True) * np.float32(0.8 / 127)
    set_integers(content, PROJ, np.clip(np.rint(weight / scale), -127, 127).astype(np.int64))
    content.tensors[f"{PROJ}.weight_scale"] = stored(scale, "F32")
    input_scale = np.frombuffer(content.tensors[f"{PROJ}.input_scale"].data, np.float32)
    deq_scale = (input_scale * scale).reshape(-1)
    bias = (np.frombuffer(content.tensors[f"{PROJ}.bias"].data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    content.tensors[f"{PROJ}.deq_scale"] = stored(deq_scale, "F32")
    content.tensors[f"{PROJ}.quant_bias"] = stored(np.rint(bias.astype(np.float64) / deq_scale), "I32")
    source = content.write_source(tmp_path / "float")
    assert texts(verify_folder(content.write(tmp_path / "out"), model_path=source)) == ""


def test_the_checkpoint_of_another_model_is_detected(tmp_path: Path) -> None:
    """Catches a comparison without faults because it compared nothing."""
    content = make_content()
    folder = content.write(tmp_path / "out")
    del content.source["model.layers.1.mlp.down_proj.weight"]
    content.source["lm_head.weight"].shape = [64, 48]
    result = verify_folder(folder, model_path=content.write_source(tmp_path / "float"))
    assert {(fault.check, fault.where) for fault in result.faults} == {
        ("float weights", "model.layers.1.mlp.down_proj.weight"),
        ("float weights", "lm_head.weight"),
    }
    assert "BF16 [64, 48]" in texts(result)


def test_newer_names_in_the_float_checkpoint_are_read(tmp_path: Path) -> None:
    """Catches missing tensors in a source that newer transformers saved."""
    content = make_content()
    renamed = {}
    for name, tensor in content.source.items():
        new = f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)
        renamed[new if not name.startswith("lm_head") else name] = tensor
    content.source = renamed
    result = verify_folder(content.write(tmp_path / "out"), model_path=content.write_source(tmp_path / "float"))
    assert texts(result) == ""


def test_a_damaged_float_checkpoint_is_a_user_error(tmp_path: Path) -> None:
    """Catches a damaged source that is reported as a fault of the compiled folder."""
    content = make_content()
    source = content.write_source(tmp_path / "float")
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        verify_folder(content.write(tmp_path / "out"), model_path=source)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_rounding_to_the_folders_dtype(value: float) -> None:
    """Catches rounding that is not to the nearest, ties to even."""
    exact = np.array([value], np.float32)
    nearest = round_to("BF16", exact)
    bits = nearest.view(np.uint32)
    assert bits[0] & 0xFFFF == 0
    if np.isfinite(nearest[0]):
        step = abs(float(np.array([bits[0] + 0x10000], np.uint32).view(np.float32)[0]) - float(nearest[0]))
        if np.isfinite(step):
            assert abs(float(nearest[0]) - value) <= step / 2
            tie = abs(float(nearest[0]) - value) == step / 2 and step > 0
            assert not tie or bits[0] & 0x10000 == 0
    with np.errstate(over="ignore"):
        assert np.array_equal(round_to("F16", exact), exact.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(("factor", "is_found"), [(2.0**20, True), (1.0, False)])
def test_weights_that_overflow_in_float16(tmp_path: Path, factor: float, is_found: bool) -> None:
    """Catches W8A16 weights that engines multiply with their scale to Inf."""
    layer = "model.layers.0.mlp.up_proj"
    content = make_content(scheme="W8A8_DYNAMIC", dtype="float16")
    content.description |= {f"{layer}.{suffix}": "W8A16" for suffix in ("weight", "weight_scale", "weight_offset")}
    scale = np.frombuffer(content.tensors[f"{layer}.weight_scale"].data, np.float32).reshape(-1, 1)
    content.tensors[f"{layer}.weight_scale"] = stored(scale * np.float32(factor), "F32")
    assert ("weights beyond F16" in texts(verify_folder(content.write(tmp_path / "out")))) == is_found
