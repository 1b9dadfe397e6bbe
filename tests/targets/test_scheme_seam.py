"""A scheme is one row of vlqc.targets.schemes and its quantized layer: the rest of the compiler works from these."""

import ast
from pathlib import Path

import onnx
import pytest
import torch

import vlqc
from tests.support import tiny
from tests.support.made_up_schemes import FLOAT_INPUT, UNION, FloatInputLinear, UnionLinear, register
from tests.support.naive_w8a8 import signal_to_noise
from vlqc.kernels_ref.quant_linear import QuantLinear
from vlqc.reporting.dumps.bundle import read_bundle
from vlqc.targets.schemes import Scheme, SchemeSpec, quant_linears
from vlqc.targets.target import ENGINES

STAGE, LEAST = "model.layers.1", {"FLOAT_INPUT": 45, "UNION": 36}  # dB; 51 and 41 were measured
ROOT = Path(__file__).parents[2]
PRODUCT = [path for top in ("vlqc", "passes", "kernels_ref") for path in sorted((ROOT / top).rglob("*.py"))]
NAMING = ["vlqc.targets.schemes", *(type(engine).__module__ for engine in ENGINES)]  # modules that name schemes
MADE_UP = pytest.mark.parametrize(
    ("spec", "layer"), [(FLOAT_INPUT, FloatInputLinear), (UNION, UnionLinear)], ids=["float input", "union"]
)
PIPELINE = (
    "insert-observers,assign-precision{{scheme={scheme},target=vllm-ascend,fallback=none}},smooth-m2,"
    "quantize-activations,quantize-weights,measure-sensitivity{{target=vllm-ascend}},lower-linears"
)


def test_only_engines_compare_schemes() -> None:
    """Catches a branch for one scheme or one quantized layer, which the next scheme would have to repeat: the code asks
    `scheme.spec`, and the layer's own methods."""
    names, layers = {str(scheme) for scheme in Scheme}, {layer.__name__ for layer in quant_linears()}
    for path in PRODUCT:
        inside = path.relative_to(ROOT)
        if ".".join(inside.with_suffix("").parts) in NAMING:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{inside}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Scheme":
                assert node.attr not in names - {"FLOAT"}, where  # FLOAT is the scheme of all that is not quantized
            if inside.parts[0] != "kernels_ref" and isinstance(node, ast.Name | ast.alias):
                assert (node.id if isinstance(node, ast.Name) else node.name) not in layers, where
            if isinstance(node, ast.Compare | ast.Match):
                parts = [part for each in ast.iter_child_nodes(node) for part in ast.walk(each)]
                assert not any(isinstance(part, ast.Attribute) and part.attr in names for part in parts), where
                assert not any(isinstance(part, ast.Constant) and part.value in names for part in parts), where


@pytest.mark.slow
@MADE_UP
def test_one_row_is_a_scheme(
    spec: SchemeSpec, layer: type[QuantLinear], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a part of the compiler that has its own list of schemes: passes, search, writer, verification, loading,
    dumps or report would refuse the new one, or treat it as another."""
    scheme = register(monkeypatch, spec, layer)
    samples, out, dumps = tiny.mixed_samples(), tmp_path / "out", tmp_path / "ir"
    result = vlqc.compile(
        model_path=tiny.TINY, save_directory=out, samples=samples, target="vllm-ascend", fallback="auto",
        max_float_groups=1, pipeline=PIPELINE.format(scheme=scheme), dump_ir=dumps, dump_stages=STAGE,
        dump_formats="text,onnx,bundle",
    )  # fmt: skip
    assert {row.scheme for row in result.precision} == {scheme, Scheme.FLOAT}
    verification = vlqc.verify_folder(out, model_path=tiny.TINY, samples=samples, locate=True, locate_tokens=32)
    assert verification.ok, verification.faults
    loaded = vlqc.load(out)
    assert {type(module) for module in loaded.modules() if isinstance(module, QuantLinear)} == {layer}
    reference, logits = (
        torch.cat([tiny.plain_logits(each, model).flatten() for each in samples]) for model in (None, loaded)
    )
    assert signal_to_noise(reference, logits) > LEAST[scheme]
    vlqc.write_report(out, tmp_path / "report.html")
    assert spec.report.title in (tmp_path / "report.html").read_text(encoding="utf-8")
    text = max((dumps / STAGE).glob("*.vlqc")).read_text(encoding="utf-8")
    assert {site.scheme for site in vlqc.parse_stage(text).sites.values()} == {scheme}
    bundle = max((dumps / STAGE).glob("*.bundle"))
    stage = read_bundle(bundle)
    kinds = {type(stage.module.get_submodule(site.target)) for site in stage.sites.values()}
    assert kinds == {layer}
    operations = [node.op_type for node in onnx.load(bundle.with_suffix(".onnx")).graph.node]
    assert operations.count("QuantizeLinear") == len(stage.sites) * spec.activation.is_quantized
