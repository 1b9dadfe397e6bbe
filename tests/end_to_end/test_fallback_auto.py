"""--fallback auto from end to end: the tiny trained checkpoint with planted outliers, compiled to a target."""

import filecmp
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vlqc
from tests.support.naive_w8a8 import load_float, logits, signal_to_noise
from tools.demo import plant_outliers, tiny_task
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.reporting.html.schema import DATA_FILE
from vlqc.reporting.plan import plan_compilation
from vlqc.reporting.summary import Result
from vlqc.targets.rules import group_faults
from vlqc.targets.schemes import Scheme
from vlqc.targets.versions import layer_schemes

FOUR_BITS = {"w_bit": 4, "is_lowbit": True, "is_dynamic": True, "open_outlier": False}
Sample = dict[str, Tensor]
Searched = Callable[[str, float], tuple[Result, Path]]
LAYOUTS: dict[str, dict[str, object]] = {
    "vllm-ascend": {"target": "vllm-ascend", "part_file_size": 1},
    "mindie": {"mindie_format": True},
    "both": {"target": "both"},
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "planted"
    plant_outliers.plant(Path(tiny_task.__file__).parent / "tiny_vl", folder, alpha=128, share=0.02, seed=0)
    return folder


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return tiny_task.samples(4, seed=1)


def compiled(planted: Path, samples: list[Sample], save: Path, **options: object) -> Result:
    """Rounds weights to the nearest: the fastest method, and verify can check every integer.

    Without rotations, for which the planted checkpoint has too different magnitudes within a head.
    """
    arguments = {"model_path": planted, "save_directory": save, "samples": samples, "weight_method": "round"}
    return vlqc.compile(fallback="auto", rotate="none", **arguments, **options)


@pytest.fixture(scope="module")
def searched(planted: Path, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """Target and least SQNR -> result and folder, compiled once."""

    @cache
    def search(target: str, least: float) -> tuple[Result, Path]:
        save = tmp_path_factory.mktemp("searched") / f"{least:g}"
        return compiled(planted, samples, save, min_sqnr=least, **LAYOUTS[target]), save

    return search


def schemes(save: Path) -> dict[str, Scheme]:
    """Scheme per layer, from the folder's description."""
    (description,) = save.glob("quant_model_description*.json")
    return layer_schemes(json.loads(description.read_text()))


def floats(result: Result) -> int:
    return sum(row.scheme == Scheme.FLOAT for row in result.precision)


@pytest.mark.parametrize(
    "target",  # what is written for an engine concerns no code of transformers
    [pytest.param(name, marks=pytest.mark.every_transformers if name == "vllm-ascend" else ()) for name in LAYOUTS],
)
def test_a_higher_sqnr_leaves_more_in_float(planted: Path, searched: Searched, target: str) -> None:
    """Catches an SQNR that has no effect or is not reached, and a folder that its engine does not load."""
    floats_and_bytes = []
    for least in (20.0, 44.0):
        result, save = searched(target, least)
        assert result.predicted_sqnr is not None and result.predicted_sqnr >= least
        report = vlqc.verify_folder(save, engine=target, model_path=planted)
        assert report.ok and not report.warnings
        assert not group_faults(target, QWEN2_5_VL, schemes(save))
        assert [path.name for path in save.parent.iterdir()] == [save.name] and not list(save.glob(".*"))
        floats_and_bytes.append((floats(result), result.bytes_after))
    assert floats_and_bytes[0][0] == 0 and floats_and_bytes == sorted(set(floats_and_bytes))


@pytest.mark.every_transformers
def test_the_prediction_holds_on_the_calibration_inputs(
    planted: Path, samples: list[Sample], searched: Searched
) -> None:
    """Catches a prediction that leaves out a group, counts one twice, or mistakes amplitude for power.

    The prediction adds up noise along the residual stream. In this trained model part of the noise decays on the way:
    the prediction is up to 6.7 dB below the measured SQNR; with random weights it was at most 1 dB above.
    """
    reference = logits(load_float(planted), samples)
    for least in (20.0, 44.0):
        result, save = searched("vllm-ascend", least)
        loaded = logits(vlqc.load(save), samples)
        assert result.predicted_sqnr is not None
        assert -2 < signal_to_noise(reference, loaded) - result.predicted_sqnr < 9


def test_same_input_same_bytes(planted: Path, samples: list[Sample], searched: Searched, tmp_path: Path) -> None:
    """Catches an order of choices, groups or files that depends on anything but the input."""
    _, one = searched("vllm-ascend", 44.0)
    compiled(planted, samples, tmp_path / "two", min_sqnr=44.0, **LAYOUTS["vllm-ascend"])
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert filecmp.cmpfiles(one, tmp_path / "two", names, shallow=False) == (names, [], [])


def test_no_float_group_is_everything_quantized(planted: Path, samples: list[Sample], tmp_path: Path) -> None:
    """Catches reference exclusions in a search, and a folder other than that of the same schemes without a search."""
    result = compiled(planted, samples, tmp_path / "auto", max_float_groups=0, target="vllm-ascend")
    assert floats(result) == 0 and {scheme for part, scheme in result.counts if part != "other"} == {"W8A8"}
    assert schemes(tmp_path / "auto")["model.layers.3.mlp.down_proj"] == Scheme.W8A8
    arguments = {"model_path": planted, "samples": samples, "weight_method": "round", "target": "vllm-ascend"}
    arguments["rotate"] = "none"
    vlqc.compile(save_directory=tmp_path / "none", fallback="none", **arguments)
    names = sorted(path.name for path in (tmp_path / "none").iterdir() if path.name not in (DATA_FILE, "MANIFEST.json"))
    assert filecmp.cmpfiles(tmp_path / "auto", tmp_path / "none", names, shallow=False) == (names, [], [])


def test_so_many_float_groups(planted: Path, samples: list[Sample], tmp_path: Path) -> None:
    """Catches counts, table, notes and folder that contradict each other."""
    result = compiled(planted, samples, tmp_path / "out", max_float_groups=3, target="vllm-ascend")
    chosen, description = [row for row in result.precision if row.scheme == Scheme.FLOAT], schemes(tmp_path / "out")
    assert len(chosen) == floats(result) == 3
    assert {name for row in chosen for name in row.sites} == {
        name for row in result.precision for name in row.sites if description[name] == Scheme.FLOAT
    }
    assert sum(row.noise_share for row in result.precision) == pytest.approx(1)
    (note,) = [note for note in result.notes if "auto" in note]
    assert note.startswith("--fallback auto: 3 groups stay float: ") and "; predicted SQNR " in note
    quantized = sum(count for (_, scheme), count in result.counts.items() if scheme == "W8A8")
    assert quantized == sum(mark == Scheme.W8A8 for mark in description.values())


def test_files_are_within_max_bytes(planted: Path, samples: list[Sample], tmp_path: Path) -> None:
    """Catches headers, float tensors or scales that are not counted, a limit that is far from used, candidates that the
    asked scheme excludes, and a limit whose fault is found after the calibration."""
    result = compiled(planted, samples, tmp_path / "out", max_bytes="3.6MB", target="vllm-ascend", is_dynamic=True)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 3_500_000 < result.bytes_after == size <= 3_600_000
    chosen, offered = ({*of} for of in zip(*((row.scheme, row.candidates) for row in result.precision), strict=True))
    assert chosen >= {Scheme.W8A8_DYNAMIC, Scheme.W8A16}
    assert {each.scheme for of in offered for each in of} == {*Scheme} - {Scheme.W8A8_MIX}
    verification = vlqc.verify_folder(tmp_path / "out", engine="vllm-ascend", model_path=planted)
    assert verification.ok and not verification.warnings
    plan = plan_compilation(
        model_path=planted, samples=samples, fallback="auto", max_bytes="4MB", rotate="none", target="vllm-ascend"
    )
    assert plan.bytes_range is not None
    smallest, largest = plan.bytes_range
    for size, stated in ((smallest - 1, f"--max_bytes {smallest} or more"), (largest, "is no limit")):
        with pytest.raises(vlqc.UserError, match=stated):
            compiled(planted, samples, tmp_path / "never", max_bytes=size, target="vllm-ascend")


def test_four_bits_fall_back_in_two_steps(planted: Path, samples: list[Sample], tmp_path: Path) -> None:
    """Catches 4-bit groups that fall back to float only, and packed tensors damaged when they are read back."""
    low = compiled(planted, samples, tmp_path / "low", min_sqnr=5, **FOUR_BITS)
    high = compiled(planted, samples, tmp_path / "high", min_sqnr=(low.predicted_sqnr or 0) + 8, **FOUR_BITS)
    assert {row.scheme for row in low.precision} == {Scheme.W4A8_DYNAMIC, Scheme.W8A8_DYNAMIC}
    moved = [row for row in high.precision if row.scheme != row.assigned]
    assert Scheme.W8A8_DYNAMIC in {row.scheme for row in moved}
    for name in ("low", "high"):
        report = vlqc.verify_folder(tmp_path / name, engine="vllm-ascend")
        assert report.ok and not report.warnings


def test_out_of_reach(planted: Path, samples: list[Sample], tmp_path: Path) -> None:
    """Catches a copy of the source that is written as if it were a quantized checkpoint."""
    with pytest.raises(vlqc.UserError, match=r"\d\d\.\d dB[\s\S]*--min_sqnr"):
        compiled(planted, samples[:1], tmp_path / "out", min_sqnr=100)
    assert not (tmp_path / "out").exists()


def test_a_pipeline_must_measure(planted: Path, samples: list[Sample], tmp_path: Path) -> None:
    """Catches a search without measurements, because the user's pipeline lacks the pass that measures."""
    text = "insert-observers,assign-precision,quantize-activations,quantize-weights,lower-linears"
    with pytest.raises(vlqc.UserError, match="lacks measure-sensitivity"):
        vlqc.compile(
            model_path=planted,
            save_directory=tmp_path / "out",
            samples=samples,
            fallback="auto",
            min_sqnr=30,
            pipeline=text,
        )


def test_exclusions_hold(planted: Path, samples: list[Sample], tmp_path: Path) -> None:
    """Catches a search that quantizes layers which the user excluded, or counts them among its float groups."""
    result = compiled(
        planted, samples[:2], tmp_path / "out", max_float_groups=1, target="vllm-ascend", exclude=["*.down_proj"]
    )
    stored = schemes(tmp_path / "out")
    assert all(scheme == Scheme.FLOAT for layer, scheme in stored.items() if layer.endswith("down_proj"))
    assert floats(result) == 1 and all("down_proj" not in name for row in result.precision for name in row.sites)
    assert torch.is_tensor(vlqc.load(tmp_path / "out").model.norm.weight)
