"""Faults of numbers that no single byte shows: zeros, noise, common factors, and input ranges that fit their scales."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.compiled_folder import FolderContent, make_content
from tests.support.damaged_folder import LAYER, PROJ, UP, Q, compensated, integers, set_integers, steps_of, texts
from tests.support.tensors import rounded, stored
from vlqc.emit.manifest import write_manifest
from vlqc.kernels_ref.quant_linear import StaticQuantLinear
from vlqc.verify import verify_folder
from vlqc.verify.accuracy import LastHidden, _check_logits
from vlqc.verify.clipping import ClippingRecorder
from vlqc.verify.findings import VerificationResult
from vlqc.verify.float_match.cancellation import ProducerSide, find_uncancelled
from vlqc.verify.float_match.scale_fit import Scales

NORM, DOWN = f"{LAYER}.input_layernorm", f"{LAYER}.mlp.down_proj"
Change = Callable[[FolderContent], object]
Ints = npt.NDArray[np.int64]


def multiply(content: FolderContent, name: str, factor: float | np.ndarray) -> None:
    """Multiplies a bfloat16 tensor."""
    tensor = content.tensors[name]
    values = (np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    content.tensors[name] = stored(rounded(values * np.asarray(factor, np.float32), "BF16"), "BF16")


def refit(
    content: FolderContent, layer: str, input_scale: float | None = None, steps: np.ndarray | None = None
) -> None:
    """Replaces input_scale or integers, with deq_scale and quant_bias that fit them."""
    read = {name: np.frombuffer(content.tensors[f"{layer}.{name}"].data, np.float32) for name in
            ("input_scale", "input_offset", "weight_scale", "deq_scale")}  # fmt: skip
    before = np.frombuffer(content.tensors[f"{layer}.quant_bias"].data, np.int32).astype(np.float64)
    bias = (before + read["input_offset"] * integers(content, layer).sum(axis=1)) * read["deq_scale"]
    if f"{layer}.bias" in content.tensors:
        bits = np.frombuffer(content.tensors[f"{layer}.bias"].data, np.uint16).astype(np.uint32) << 16
        bias = bits.view(np.float32).astype(np.float64)
    if steps is not None:
        content.tensors[f"{layer}.weight"] = stored(steps, "I8")
    scale = read["input_scale"] if input_scale is None else rounded(np.array([input_scale]), "BF16")
    deq_scale = (scale * read["weight_scale"]).astype(np.float32)
    quant_bias = np.rint(bias / deq_scale - read["input_offset"] * integers(content, layer).sum(axis=1))
    content.tensors[f"{layer}.input_scale"] = stored(scale, "F32")
    content.tensors[f"{layer}.deq_scale"] = stored(deq_scale, "F32")
    content.tensors[f"{layer}.quant_bias"] = stored(quant_bias, "I32")


def zeroed(layer: str, columns: slice) -> Change:
    def change(content: FolderContent) -> None:
        values = integers(content, layer)
        values[:, columns] = 0
        refit(content, layer, steps=values)

    return change


def noisy(layer: str, steps: int, rows: slice = slice(None), untouched: float = 0.0) -> Change:
    """Adds noise to some rows, except in column 0 and a share of the others."""

    def change(content: FolderContent) -> None:
        values, rng = integers(content, layer), np.random.default_rng(3)
        noise = steps * (2 * rng.integers(0, 2, values.shape) - 1)
        noise[:, rng.random(values.shape[1]) < untouched] = noise[:, 0] = 0
        values[rows] += noise[rows]
        refit(content, layer, steps=np.clip(values, -127, 127))

    return change


def coarse(layer: str, step: int) -> Change:
    """Leaves multiples of `step` in all columns except column 0."""

    def change(content: FolderContent) -> None:
        values = integers(content, layer)
        values[:, 1:] = np.clip(np.rint(values[:, 1:] / step) * step, -127, 127)
        refit(content, layer, steps=values)

    return change


# what is damaged -> the change, and the tensor that is named
DAMAGES: dict[str, tuple[Change, str]] = {
    "down_proj times 1.01": (lambda content: multiply(content, f"{DOWN}.weight", 1.01), DOWN),
    "norm times 1.01": (lambda content: multiply(content, f"{NORM}.weight", 1.01), NORM),
    "merger times 1.01": (lambda content: multiply(content, "visual.merger.mlp.0.weight", 1.01), "visual.merger.ln_q"),
    "zeros": (zeroed(UP, slice(None)), UP),
    "zeros in a column of a group's member": (zeroed(Q, slice(5, 6)), Q),
    "zeros behind scaled rows": (zeroed(PROJ, slice(None)), PROJ),
    "zeros in a float column": (lambda content: multiply(content, f"{DOWN}.weight", np.arange(96) != 7), DOWN),
    "noise of one step": (noisy(Q, 1), Q),
    "noise of many steps": (noisy(UP, 6), UP),
    "noise in two thirds of the columns": (noisy(UP, 4, untouched=1 / 3), UP),
    "noise in a row": (noisy(Q, 3, slice(3, 4)), Q),
    "multiples of 4": (coarse(Q, 4), Q),
    "multiples of 16": (coarse(Q, 16), Q),
    "truncated": (lambda content: refit(content, UP, steps=integers(content, UP) // 2 * 2), UP),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damage_that_fits_its_scales_is_named(tmp_path: Path, kind: str) -> None:
    """Catches a fit that follows the damage, or that a scale of 0 ends."""
    content = make_content()
    change, name = DAMAGES[kind]
    change(content)
    result = verify_folder(content.write(tmp_path / "out"), model_path=content.write_source(tmp_path / "float"))
    found = [fault for fault in result.faults if fault.check == "float weights"]
    assert any(fault.where.startswith(name) for fault in found), texts(result)


def test_errors_that_rounding_to_nearest_cannot_have_are_faults_of_a_folder_that_states_it(tmp_path: Path) -> None:
    """Catches compensated errors, or noise in a few columns, in a folder whose pipeline compensates none."""
    content = make_content(smooth=False)
    set_integers(content, PROJ, compensated(steps_of(content, PROJ), (-127, 127), 0.5))
    folder, source = content.write(tmp_path / "out"), content.write_source(tmp_path / "float")
    for method, named in (("", []), ("{method=gptq}", []), ("{method=round}", [f"{PROJ}.weight"])):
        (folder / "vlqc_report.json").write_text(json.dumps({"pipeline": f"smooth-m2,quantize-weights{method}"}))
        write_manifest(folder)
        result = verify_folder(folder, model_path=source)
        assert [fault.where for fault in result.faults] == named, texts(result)


def test_a_float_matrix_of_zeros_is_no_fault(tmp_path: Path) -> None:
    """Catches a fault for a layer that the float checkpoint has as zeros."""
    content = make_content(smooth=False)
    zeros = np.zeros(content.source[f"{DOWN}.weight"].shape)
    content.source[f"{DOWN}.weight"] = content.tensors[f"{DOWN}.weight"] = stored(zeros, "BF16")
    result = verify_folder(content.write(tmp_path / "out"), model_path=content.write_source(tmp_path / "float"))
    assert texts(result) == ""
    assert [(warning.check, warning.where) for warning in result.warnings] == [("zeros", f"{DOWN}.weight")]


def test_a_quantized_matrix_of_zeros_is_a_fault_without_the_float_model(tmp_path: Path) -> None:
    """Catches zeros in place of all weights, which leave no other row to compare the scales with."""
    content = make_content()
    set_integers(content, PROJ, np.zeros((32, 32), np.int64))
    assert f"[integers] {PROJ}.weight: dead channels" in texts(verify_folder(content.write(tmp_path / "out")))


def test_weights_of_narrow_layers_that_compensate_a_little_are_no_fault(tmp_path: Path) -> None:
    """Catches faults for a few weights off the nearest integer, where a layer has few weights and few of them are."""
    for share in (0.02, 0.05, 0.1):
        content = make_content(smooth=False)
        set_integers(content, PROJ, compensated(steps_of(content, PROJ), (-127, 127), share))
        folder = content.write(tmp_path / f"out{share}")
        result = verify_folder(folder, model_path=content.write_source(tmp_path / f"float{share}"))
        assert texts(result) == "", share


@given(st.integers(0, 2**32 - 1), st.floats(1e-4, 0.02), st.sampled_from([0.0, 2.0**-8]))
@settings(max_examples=40)
def test_scales_cancel_within_their_uncertainty(seed: int, sigma: float, rounding: float) -> None:
    """Catches a tolerance that is exceeded by chance, and one that hides many of its standard deviations."""
    rng = np.random.default_rng(seed)
    count = 256
    scale = np.exp(rng.normal(0, 1, count))
    left = rng.normal(0, 1, (2, count)) * sigma
    columns = Scales.known((scale * (1 + left[0])).astype(np.float32), np.full(count, sigma, np.float32))
    error = rng.uniform(-rounding, rounding, count)

    def side(factor: float | np.ndarray) -> ProducerSide:
        values = (1 + left[1]) * (1 + error) * factor / scale
        return ProducerSide(np.arange(count), values, np.abs(values) * sigma, np.full(count, rounding))

    clean = find_uncancelled(columns, [side(1.0)])
    assert not clean.channels.size and clean.common is None
    common = 1 + 12 * (2**0.5 * 1.75 * sigma + rounding) / count**0.5
    found = find_uncancelled(columns, [side(common)])
    assert found.common is not None or found.channels.size
    one = np.ones(count)
    one[17] = 1 + 20 * sigma + 2 * rounding
    assert 17 in find_uncancelled(columns, [side(one)]).channels
    one[17] = 0
    assert 17 in find_uncancelled(columns, [side(one)]).channels


def test_a_consistently_changed_input_scale_contradicts_the_report(tmp_path: Path) -> None:
    """Catches an input range that is halved for a whole group, with all tensors that depend on it."""
    content = make_content()
    group = [f"{LAYER}.self_attn.{name}_proj" for name in "qkv"]
    scale, offset = (
        float(np.frombuffer(content.tensors[f"{Q}.input_{name}"].data, np.float32)[0]) for name in ("scale", "offset")
    )
    low, high = (float(f"{(limit - offset) * scale:.4g}") for limit in (-128, 127))
    sites = [{"name": name, "low": low, "high": high} for name in group] + [{"name": DOWN, "low": None}, {"low": 0}, 7]

    def result_of(name: str) -> VerificationResult:
        folder = content.write(tmp_path / name)
        (folder / "vlqc_report.json").write_text(json.dumps({"stages": [{"sites": sites}, {}, None]}))
        write_manifest(folder)
        return verify_folder(folder)

    result = result_of("whole")
    assert texts(result) == "" and result.examined["input ranges"] == 3
    for layer in group:
        refit(content, layer, input_scale=scale / 2)
    faults = result_of("halved").faults
    assert [(fault.check, fault.where) for fault in faults] == [
        ("input ranges", f"{name}.input_scale") for name in group
    ]


def test_a_range_that_clips_its_inputs_is_a_warning() -> None:
    """Catches a range of which the half is missing, and a warning for one that clips a few values."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 256, generator=generator)
    for scale, expected, far in ((8 / 255, [], []), (4 / 255, ["layer"], []), (1 / 255, ["layer"], ["layer"])):
        weight, ones = torch.ones(4, 256, dtype=torch.int8), torch.ones(4, 1)
        layer = StaticQuantLinear.from_float(weight, ones, scale, 0.0, None, torch.bfloat16)
        recorder, result = ClippingRecorder(), VerificationResult("folder")
        model = torch.nn.ModuleDict({"layer": layer})
        with recorder.watching(model):
            layer(inputs)
        layer(inputs * 100)  # after the run
        recorder.add_warnings(str, result)
        assert [warning.where for warning in result.warnings] == expected
        assert recorder.far_too_small() == far
        assert result.examined["input ranges"] == 1


def test_broken_logits_are_a_fault_without_a_minimum() -> None:
    """Catches a verdict of ok for a model of which only noise is left, or little more because ranges are too small."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 16, generator=generator)
    samples = [{"attention_mask": torch.ones(1, 5, dtype=torch.int64)}]
    for error, clipped, count in ((0.1, ["layer"], 0), (0.95, [], 1), (0.4, [], 0), (0.4, ["layer"], 1)):
        result = VerificationResult("folder")
        other = rows + error * torch.randn(5, 16, generator=generator)
        head = torch.nn.Identity()
        _check_logits(LastHidden(head, [rows]), LastHidden(head, [other]), samples, None, result, clipped)
        assert len(result.faults) == count
