"""Compilations with --kv_cache int8: what the folder holds, layers that are left out, the search, resume and ONNX."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vlqc
from tests.reporting.onnx.test_export import of_probe, run
from tests.support.ablation_folders import SMALL
from tools.checkpoints import outlier_checkpoint as outliers
from vlqc.reporting.dumps.bundle import read_bundle
from vlqc.reporting.html import write_report
from vlqc.reporting.html.schema import read_report_data
from vlqc.reporting.plan import plan_compilation
from vlqc.reporting.summary import Result
from vlqc.verify import verify_folder

LAYERS = ("model.layers.0", "model.layers.1")
FAST = {"weight_method": "round", "anti_method": "none", "rotate": "none"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "float"
    outliers.make(folder, dtype="bfloat16", shape=SMALL)
    return folder


@pytest.fixture(scope="module")
def samples(source: Path) -> list[dict[str, Tensor]]:
    return outliers.random_samples(json.loads((source / "config.json").read_text()), 2)


def compiled(source: Path, samples: list[dict[str, Tensor]], save: Path, **options: Any) -> Result:
    return vlqc.compile(model_path=source, samples=samples, save_directory=save, **{**FAST, **options})


@pytest.fixture(scope="module")
def searched(source: Path, samples: list[dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled with a search that leaves groups in float, and dumps of one layer in all formats."""
    root = tmp_path_factory.mktemp("searched")
    dumps = {"dump_ir": root / "ir", "dump_formats": "onnx,bundle", "dump_stages": "model.layers.1"}
    compiled(source, samples, root / "out", kv_cache="int8", fallback="auto", max_float_groups=6, **dumps)
    return root


def caches(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return {name: tensor for name, tensor in load_file(file).items() if ".kv_cache_" in name}


def test_scales_do_not_depend_on_the_search(searched: Path) -> None:
    """Catches scales that are dropped, or written twice, with a projection for which the search chose another scheme,
    and a folder that vlqc's own checks do not accept."""
    folder = searched / "out"
    description = json.loads((folder / "quant_model_description.json").read_text())
    assert description["kv_cache_type"] == "C8" and "quantize" not in json.loads((folder / "config.json").read_text())
    projections = [f"{layer}.self_attn.{member}_proj" for layer in LAYERS for member in "kv"]
    assert any(description[f"{layer}.weight"] == "FLOAT" for layer in projections)
    names = {f"{layer}.kv_cache_{suffix}" for layer in projections for suffix in ("scale", "offset")}
    assert caches(folder).keys() == names and all(description[name] == "C8" for name in names)
    result = verify_folder(folder)
    assert result.ok and result.facts["loads in"] == ["vLLM Ascend 0.25.1rc1 and later"]
    assert result.examined["KV cache"] == 2


def test_report(searched: Path, tmp_path: Path) -> None:
    """Catches a report that does not state the scales of the folder, and a page without the table of layers."""
    stated = {cache.name: cache for stage in read_report_data(searched / "out").stages for cache in stage.caches}
    assert list(stated) == [f"{layer}.self_attn" for layer in LAYERS]
    for name, cache in stated.items():
        scale = caches(searched / "out")[f"{name}.v_proj.kv_cache_scale"].double()
        assert cache.value == pytest.approx((float(scale.square().mean().sqrt()), float(scale.max())), rel=1e-3)
        assert cache.sqnr is not None and cache.sqnr > 20
    write_report(searched / "out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert 'id="cache"' in page and f"{LAYERS[1]}.self_attn</code>" in page


def test_onnx_reads_rounded_keys_and_values(searched: Path) -> None:
    """Catches an exported layer that attends to float keys, or rounds them with the scales of another head."""
    (bundle,), (model,) = (list((searched / "ir").rglob(f"*lower-cache.{each}")) for each in ("bundle", "onnx"))
    stage = read_bundle(bundle)
    with torch.no_grad():
        reference = stage.execution.probe_output()
    (before,) = (searched / "ir").rglob("*lower-linears.onnx")
    assert changed_rows(reference, run(model, of_probe(stage))) < 0.05  # of 58, one with a rounding that flipped
    assert changed_rows(reference, run(before, of_probe(stage))) > 0.9


def changed_rows(reference: Tensor, output: Any) -> float:
    """Share of the rows in which two outputs differ by more than float32 sums in another order."""
    return float(((torch.from_numpy(output).reshape(reference.shape) - reference).abs().amax(1) > 1e-4).float().mean())


def test_layers_that_are_left_out(source: Path, samples: list[dict[str, Tensor]], tmp_path: Path) -> None:
    """Catches a header that quantizes a cache for which the folder has no scales, a user who is not told, notes on a
    cache that the folder does not have, and a command for an engine for which the passes were not chosen."""
    pipeline = (
        "insert-observers{caches=true},assign-precision{target=vllm-ascend},quantize-activations,"
        "quantize-weights{method=round},"
        "quantize-cache{min_sqnr=90},lower-linears,lower-cache"
    )
    arguments = {"model_path": source, "samples": samples, "save_directory": tmp_path / "out"}
    result = vlqc.compile(pipeline=pipeline, **arguments)
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert "kv_cache_type" not in description and not caches(tmp_path / "out")
    assert any("in float in all layers" in note for note in result.notes)
    assert result.engines == ["vLLM Ascend 0.10.2rc2 and later"] and len(result.serve) == 1
    assert not any(word in note for note in result.notes for word in ("int8", "0.25.1rc1", "block-size", "MindIE"))
    assert read_report_data(tmp_path / "out").notes == tuple(result.notes)


def test_plan(source: Path, samples: list[dict[str, Tensor]], tmp_path: Path) -> None:
    """Catches a plan without the memory of the cache, the size of the scales, or the versions that load them."""
    arguments = {"model_path": source, "samples": samples, "save_directory": tmp_path / "out", **FAST}
    plain, plan = (plan_compilation(kv_cache=cache, **arguments) for cache in ("none", "int8"))
    channels = len(LAYERS) * SMALL.value_heads * SMALL.hidden // SMALL.heads
    assert (plan.cache_before, plan.cache_after) == (2 * 2 * channels, 2 * channels)
    assert plain.cache_after == plain.cache_before == plan.cache_before
    assert plan.engines == ["vLLM Ascend 0.25.1rc1 and later"]
    assert plan.bytes_after - plain.bytes_after == 2 * 2 * 4 * channels  # scales and offsets, float32
