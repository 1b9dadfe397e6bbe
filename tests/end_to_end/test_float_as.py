"""A compilation with --float_as w8a16."""

from pathlib import Path

import pytest

import vlqc
from tests.support.interrupted_runs import compile_into, small_checkpoint
from tests.support.resume_runs import QUICK, SAMPLES
from vlqc.reporting.plan import plan_compilation
from vlqc.targets.schemes import Scheme
from vlqc.targets.versions import layer_schemes
from vlqc.verify.loader import read_description


@pytest.mark.slow
def test_a_folder_with_weights_only_in_place_of_float(tmp_path: Path) -> None:
    """Catches down_proj in float, a plan with another size, and a folder that verification refuses or that computes
    something else."""
    checkpoint, out = small_checkpoint(tmp_path / "float"), tmp_path / "out"
    plan = plan_compilation(
        model_path=checkpoint, save_directory=out, samples=SAMPLES, float_as="W8A16", scheme="w8a8-dynamic", **QUICK
    )
    result = compile_into(out, checkpoint, scheme="w8a8_dynamic", float_as="w8a16")
    assert plan.bytes_after == result.bytes_after and plan.engines == result.engines == ["vLLM Ascend 0.16 and later"]
    schemes = layer_schemes(read_description(out))
    replaced = [layer for layer, scheme in schemes.items() if scheme == Scheme("W8A16")]
    assert replaced == [f"model.layers.{number}.mlp.down_proj" for number in range(2)]
    verification = vlqc.verify_folder(out, model_path=checkpoint, samples=SAMPLES)
    assert verification.ok, verification.faults
    assert verification.facts["logits against float"]["SQNR dB"] > 25
    report = (out / "vlqc_report.json").read_text(encoding="utf-8")
    assert '"--scheme","w8a8_dynamic"' in report and '"--float_as","w8a16"' in report
