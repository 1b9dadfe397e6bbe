"""A folder in W8A8_MIX whose other layers of the language model are W8A16: compiled, verified, loaded, damaged."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vlqc
from tests.support.naive_w8a8 import signal_to_noise
from tools.bench.scheme_table import run
from tools.checkpoints import outlier_checkpoint as outliers
from tools.checkpoints.families import Shape
from vlqc.kernels_ref.quant_linear import DynamicQuantLinear, MixQuantLinear, StaticQuantLinear, WeightOnlyQuantLinear
from vlqc.reporting.dumps.bundle import read_bundle
from vlqc.targets.schemes import Scheme
from vlqc.verify.findings import RANKING, VerificationResult

SHAPE = Shape(
    layers=1, hidden=128, intermediate=192, heads=2, vision_layers=1, vision_hidden=64, vision_intermediate=72,
    vocabulary=64,
)  # fmt: skip
WEIGHTS, LAYER = "quant_model_weight_w8a8_mix.safetensors", "model.layers.0"
MIX, FLOAT_INPUT = f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.down_proj"
Change = Callable[[dict[str, Tensor]], None]


@dataclass(frozen=True)
class Compiled:
    source: Path
    folder: Path
    dumps: Path
    samples: list[dict[str, Tensor]]
    verification: VerificationResult


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    root = tmp_path_factory.mktemp("mix")
    source, folder, dumps = root / "float", root / "out", root / "ir"
    samples = outliers.random_samples(outliers.make(source, shape=SHAPE), 2)
    vlqc.compile(
        model_path=source, save_directory=folder, samples=samples, scheme="w8a8_mix", float_as="w8a16",
        dump_ir=dumps, dump_stages=LAYER, dump_formats="onnx,bundle",
    )  # fmt: skip
    result = vlqc.verify_folder(folder, model_path=source, samples=samples, locate=True, locate_tokens=16)
    return Compiled(source, folder, dumps / LAYER, samples, result)


def test_layers_and_versions(compiled: Compiled) -> None:
    """Catches W8A16 where no version runs it, layers that stay float although it would do, and a folder named after
    another scheme."""
    description = json.loads((compiled.folder / "quant_model_description.json").read_text())
    schemes = {name.removesuffix(".weight"): each for name, each in description.items() if name.endswith(".weight")}
    assert description["model_quant_type"] == schemes[MIX] == "W8A8_MIX" and schemes[FLOAT_INPUT] == "W8A16"
    assert {schemes[f"visual.{layer}"] for layer in ("merger.mlp.0", "blocks.0.mlp.down_proj")} == {"FLOAT"}
    assert compiled.verification.faults == []
    assert compiled.verification.facts["loads in"] == ["vLLM Ascend 0.16 and later"]


def test_verify_states_both_kinds_of_arithmetic(compiled: Compiled) -> None:
    """Catches one arithmetic measured twice, and figures of one that are shown for the other."""
    model = nn.ModuleList([vlqc.load(compiled.folder, static_inputs=static) for static in (False, True)])
    names = ("logits against float", "logits against float, static inputs")
    figures = [compiled.verification.facts[name]["SQNR dB"] for name in names]
    from transformers import Qwen2_5_VLForConditionalGeneration

    reference = run(Qwen2_5_VLForConditionalGeneration.from_pretrained(compiled.source).float(), compiled.samples)
    expected = [signal_to_noise(reference, run(each, compiled.samples)) for each in model]
    assert figures == pytest.approx(expected, abs=0.01) and min(figures) > 30 and figures[0] > figures[1] + 0.5
    assert "W8A8_MIX" in " ".join(compiled.verification.facts)
    rows = compiled.verification.facts["stages against float"]
    assert all(row["SQNR dB"] != row["SQNR dB (static inputs)"] for row in rows if row["stage"] == LAYER)


def test_layers_of_a_loaded_model(compiled: Compiled) -> None:
    """Catches a layer that is loaded as another scheme, or in the arithmetic that was not asked for."""
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    for static, other in ((False, DynamicQuantLinear), (True, StaticQuantLinear)):
        model = vlqc.load(compiled.folder, static_inputs=static)
        layer = model.get_submodule(MIX)
        assert isinstance(layer, MixQuantLinear)
        stored = dict(layer.named_buffers())
        needed = ("weight", "weight_scale", "weight_offset")
        extra = ("input_scale", "input_offset", "quant_bias", "deq_scale") if static else ()
        assert torch.equal(layer(x), other(**{name: stored[name] for name in needed + extra})(x))
        assert isinstance(model.get_submodule(FLOAT_INPUT), WeightOnlyQuantLinear)


def test_dumps_locate_and_report(compiled: Compiled, tmp_path: Path) -> None:
    """Catches a layer that is dumped or exported as another one, a group that is not ranked, and one that the report
    page shows as another scheme."""
    bundle = max(compiled.dumps.glob("*.bundle"))
    stage = read_bundle(bundle)
    kinds = [type(stage.module.get_submodule(site.target)) for site in stage.sites.values()]
    assert (kinds.count(MixQuantLinear), kinds.count(WeightOnlyQuantLinear)) == (6, 1)
    operations = [node.op_type for node in onnx.load(bundle.with_suffix(".onnx")).graph.node]
    assert operations.count("QuantizeLinear") == 6 and operations.count("DequantizeLinear") == 13
    ranked = {row["group"]: row for row in compiled.verification.facts[RANKING]}
    assert ranked[FLOAT_INPUT]["scheme"] == "W8A16" and ranked[FLOAT_INPUT]["inputs %"] == 0
    assert not any("stored range" in advice.why for advice in compiled.verification.advice)
    (tmp_path / "verify.json").write_text(compiled.verification.to_json())
    vlqc.write_report(compiled.folder, tmp_path / "report.html", verification=tmp_path / "verify.json")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(scheme.spec.report.title in page for scheme in (Scheme.W8A8_MIX, Scheme.W8A16))
    assert "<dt>SQNR dB (static inputs)</dt>" in page
    # At the stages, at the figures of the logits and at the ranking: in which arithmetic they were measured.
    assert page.count("quantized per token") == 3


def flipped(name: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[7] ^= 64

    return change


def multiplied(name: str, factor: float) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] *= factor

    return change


def shifted(name: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[0] += 1

    return change


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("deq_scale", multiplied(f"{MIX}.deq_scale", 1.25)),
        ("deq_scale", multiplied(f"{MIX}.weight_scale", 0.5)),
        ("scales", multiplied(f"{MIX}.weight_scale", 1.001)),  # no value of bfloat16
        ("quant_bias", shifted(f"{MIX}.quant_bias")),
        ("quant_bias", flipped(f"{MIX}.weight")),
        ("quant_bias", shifted(f"{MIX}.input_offset")),
        ("scales", shifted(f"{FLOAT_INPUT}.weight_offset")),
        ("scales", multiplied(f"{FLOAT_INPUT}.weight_scale", 1.001)),
        ("scales", multiplied(f"{FLOAT_INPUT}.weight_scale", -1.0)),
        ("tensors", lambda tensors: tensors.pop(f"{FLOAT_INPUT}.weight_scale")),
        ("tensors", lambda tensors: tensors.pop(f"{MIX}.input_scale")),
    ],
)
def test_damage_is_found(compiled: Compiled, tmp_path: Path, check: str, change: Change) -> None:
    """Catches a tensor of one of these schemes that is not checked, without the float checkpoint."""
    assert check in {fault.check for fault in damaged(compiled, tmp_path, change).faults}


@pytest.mark.parametrize("layer", [MIX, FLOAT_INPUT])
def test_damaged_weights_differ_from_the_source(compiled: Compiled, tmp_path: Path, layer: str) -> None:
    """Catches integers that are not compared with the float checkpoint."""
    result = damaged(compiled, tmp_path, flipped(f"{layer}.weight"), compiled.source)
    assert "float weights" in {fault.check for fault in result.faults}


def damaged(compiled: Compiled, folder: Path, change: Change, source: Path | None = None) -> VerificationResult:
    """A changed copy of the folder, verified."""
    copy = folder / "copy"
    shutil.copytree(compiled.folder, copy)
    tensors = load_file(copy / WEIGHTS)
    change(tensors)
    save_file(tensors, copy / WEIGHTS, {"format": "pt"})
    return vlqc.verify_folder(copy, model_path=source)
