"""vlqc.reporting.html.collector and .schema: metrics against independent measurements."""

import filecmp
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

import vlqc
from tests.support import tiny
from tools.demo import tiny_task
from vlqc.errors import UserError
from vlqc.families.qwen2_5_vl import original_name
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.ir.observation import ChannelRange
from vlqc.options.options import Options
from vlqc.options.scheme_flags import FLAGS
from vlqc.reporting.html.collector import StageMetrics, curve, group_data, smoothing_scales
from vlqc.reporting.html.command_line import command, replace_paths, shell_text
from vlqc.reporting.html.schema import DATA_FILE, SHARES, InputData, ReportData, StageData, Timings, read_report_data
from vlqc.reporting.summary import CompilationSummary, Result

SAMPLES = tiny.mixed_samples()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, ReportData, Path]:
    """A compilation with report data and timings; the mlp of the last layer stays in float, one down_proj does not."""
    folder = tmp_path_factory.mktemp("report")
    result = vlqc.compile(
        model_path=tiny.TINY,
        save_directory=folder / "out",
        samples=SAMPLES,
        exclude=["model.layers.3.mlp.*"],
        include=["model.layers.0.mlp.down_proj"],
        timings=folder / "timings.json",
        rotate="none",  # the float model's inputs are compared
    )
    return result, read_report_data(folder / "out"), folder / "timings.json"


def stage_of(data: ReportData, name: str) -> StageData:
    return next(stage for stage in data.stages if stage.name == name)


def input_of(data: ReportData, site: str) -> InputData:
    return next(read for stage in data.stages for read in stage.inputs if site in read.sites)


def test_report_data_agrees_with_the_result(compiled: tuple[Result, ReportData, Path]) -> None:
    """Catches counts, sizes, notes or schemes that differ from those of the result and the description."""
    result, data, _ = compiled
    assert data.counts() == result.counts
    assert (data.bytes_before, list(data.notes)) == (result.bytes_before, result.notes)
    assert [stage.name for stage in data.stages] == tiny.STAGES
    description = json.loads((result.folder / "quant_model_description.json").read_text())
    for site in (site for stage in data.stages for site in stage.sites):
        assert description[f"{site.name}.weight"] == site.scheme
    reasons = {site.name: site.reason for site in stage_of(data, "model.layers.3").sites}
    assert reasons["model.layers.3.mlp.up_proj"] == "excluded by model.layers.3.mlp.*"
    images = sum(int((sample["input_ids"] == tiny_task.IMAGE).sum()) for sample in SAMPLES)
    every = sum(sample["input_ids"].numel() for sample in SAMPLES)
    assert stage_of(data, "model.layers.1").rows == {"text": every - images, "image": images}
    assert (stage_of(data, "model.layers.1").samples, stage_of(data, "visual.merger").samples) == (4, 3)


def test_static_ranges_are_the_stored_ones(compiled: tuple[Result, ReportData, Path]) -> None:
    """Catches a range with the wrong sign of the offset, or of another site."""
    result, data, _ = compiled
    stored = load_file(result.folder / "quant_model_weight_w8a8.safetensors")
    checked = 0
    for site in (site for stage in data.stages for site in stage.sites if site.scheme == "W8A8"):
        scale, offset = (float(stored[f"{site.name}.input_{part}"]) for part in ("scale", "offset"))
        assert site.low == pytest.approx((-128 - offset) * scale, rel=1e-3)
        assert site.high == pytest.approx((127 - offset) * scale, rel=1e-3)
        checked += 1
    assert checked == 39


@torch.no_grad()
def test_ranges_before_smoothing_are_those_of_the_float_model(compiled: tuple[Result, ReportData, Path]) -> None:
    """Catches ranges taken after smoothing, of the wrong modality, of some samples only, or of another node."""
    peaks_of: dict[tuple[str, str], NDArray[np.float64]] = {}
    layers = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj", "model.layers.1.self_attn.o_proj")
    model, modality = tiny.plain(), torch.zeros(0, dtype=torch.bool)

    def record_peaks(layer: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).abs().double().numpy()
            for name, mine in (("image", modality.numpy()), ("text", ~modality.numpy())):
                if mine.any():
                    known = peaks_of.get((layer, name), np.zeros(rows.shape[1]))
                    peaks_of[layer, name] = np.maximum(known, rows[mine].max(axis=0))

        return hook

    handles = [
        module.register_forward_pre_hook(record_peaks(original_name(path)))
        for path, module in model.named_modules()
        if original_name(path) in layers
    ]
    for sample in SAMPLES:
        modality = sample["input_ids"].flatten() == tiny_task.IMAGE
        tiny.plain_logits(sample)
    for handle in handles:
        handle.remove()
    assert len(peaks_of) == 6
    for (layer, name), peaks in peaks_of.items():
        curve_before = input_of(compiled[1], layer).before[name]  # type: ignore[index]
        falling = np.sort(peaks)[::-1]
        expected = [falling[round(share * (len(falling) - 1))] for share in SHARES]
        np.testing.assert_allclose(curve_before, expected, rtol=0.02)  # some processors multiply in bfloat16


@torch.no_grad()
@pytest.mark.parametrize("name", ["visual.blocks.1", "model.layers.2"])
def test_the_sqnr_of_a_stage_is_that_of_the_folder(name: str, compiled: tuple[Result, ReportData, Path]) -> None:
    """Catches a quantized reference, the output of another stage, and confused modalities.

    The reference is the output of the loaded folder's stage for the inputs of the float stage.
    """
    result, data, _ = compiled
    stage = tiny.recorded_stages()[name]
    loaded = {original_name(path): module for path, module in vlqc.load(result.folder).named_modules()}
    outputs = (stage.output, loaded[name](*stage.call.args, **stage.call.kwargs))
    signal, other = (tiny.tensors_of(output)[0].flatten(0, -2).double().numpy() for output in outputs)
    modality = np.ones(len(signal)) if stage.call.modality is None else stage.call.modality.numpy()
    for number, word in enumerate(("text", "image")):
        mine = modality == number
        measured = stage_of(data, name).sqnr.get(word)  # type: ignore[call-overload]
        assert mine.any() == (measured is not None)
        if measured is not None:
            power = (signal[mine] ** 2).mean(axis=1)
            relative = ((other - signal)[mine] ** 2).mean(axis=1) / np.maximum(power, 0.1 * np.median(power))
            assert measured == pytest.approx(-10 * np.log10(relative.mean()), abs=0.3)


def test_a_stage_in_float_has_no_sqnr(compiled: tuple[Result, ReportData, Path]) -> None:
    """Catches infinite decibels, which JSON does not have."""
    assert stage_of(compiled[1], "visual.merger").sqnr == {}


def test_scales_after_a_shift() -> None:
    """Catches scales computed from magnitudes, which a shift changes, and a division by zero for a constant channel."""
    low, high = torch.tensor([-4.0, -1.0, 0.0, 2.0]), torch.tensor([8.0, 3.0, 0.0, 2.0])
    ranges = {"text": ChannelRange(2, low, high, (low + high).double(), (low**2 + high**2).double())}
    seen = vlqc.Observation(4, ranges, kept=torch.stack([low, high]))
    changed = seen.rescaled(torch.tensor([4.0, 0.5, 1.0, 2.0])).shifted(torch.tensor([0.5, -3.0, 0.0, 1.0]))
    torch.testing.assert_close(smoothing_scales(seen, changed), torch.tensor([4.0, 0.5, 1.0, 1.0]))


def test_a_curve_is_descending() -> None:
    """Catches a curve in the order of the channels, or without its first or last value."""
    values = curve(torch.arange(1000.0)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))])
    assert values == tuple(sorted(values, reverse=True)) and (values[0], values[-1]) == (999.0, 0.0)
    assert values[SHARES.index(0.5)] == pytest.approx(499.5, abs=1)


def test_schemes_of_a_search(tmp_path: Path) -> None:
    """Catches schemes from before the search, and static ranges of layers that became dynamic."""
    result = vlqc.compile(
        model_path=tiny.TINY,
        save_directory=tmp_path / "out",
        samples=SAMPLES,
        fallback="auto",
        max_float_groups=3,
        act_method=1,
        weight_method="round",
    )
    data = read_report_data(tmp_path / "out")
    assert data.counts() == result.counts
    assert data.predicted == pytest.approx(result.predicted_sqnr, rel=1e-3)
    assert [group_data(row) for row in result.precision] == list(data.groups)
    for row, group in zip(result.precision, data.groups, strict=True):
        assert {each.scheme for each in group.candidates} == {"W8A8", "FLOAT"}  # those of both engines
        chosen = next(each for each in group.candidates if each.scheme == group.scheme)
        assert (chosen.sqnr, chosen.bytes) == (pytest.approx(row.sqnr, rel=1e-3), row.bytes)
    sites = {site.name: site for stage in data.stages for site in stage.sites}
    moved = [row for row in result.precision if row.scheme != row.assigned]
    assert len(moved) == 3
    for row in result.precision:
        for name in row.sites:
            assert sites[name].scheme == str(row.scheme)
            assert sites[name].predicted == pytest.approx(row.sqnr, rel=1e-3)
            assert ("search" in sites[name].reason) == (row in moved) == (sites[name].low is None)


def test_report_data_does_not_depend_on_the_machine(compiled: tuple[Result, ReportData, Path], tmp_path: Path) -> None:
    """Catches paths, times and hash order in vlqc_report.json: other paths and memory budget."""
    result, data, _ = compiled
    shutil.copytree(tiny.TINY, tmp_path / "elsewhere")
    vlqc.compile(
        model_path=tmp_path / "elsewhere",
        save_directory=tmp_path / "out",
        samples=SAMPLES,
        exclude=["model.layers.3.mlp.*"],
        include=["model.layers.0.mlp.down_proj"],
        dump_ir=tmp_path / "dump",
        memory_budget=1,
        rotate="none",
    )
    assert filecmp.cmp(result.folder / DATA_FILE, tmp_path / "out" / DATA_FILE, shallow=False)
    assert str(tmp_path.parent) not in (result.folder / DATA_FILE).read_text()
    assert data.command == (
        *("vlqc", "compile", "--model_path", "MODEL_PATH", "--save_directory", "SAVE_DIRECTORY"),
        *("--exclude", "model.layers.3.mlp.*", "--include", "model.layers.0.mlp.down_proj"),
        *("--rotate", "none"),
    )


def test_stages_are_restored_from_json(compiled: tuple[Result, ReportData, Path]) -> None:
    """Catches stage data that changes in the journal, so that a resumed run writes another file."""
    kept = []
    for stage in compiled[1].stages:
        before = StageMetrics()
        before.stages = [stage]
        kept.append(json.loads(json.dumps(before.last_stage())))
    after = StageMetrics()
    after.restore(kept)
    assert tuple(after.stages) == compiled[1].stages


def test_notes_of_a_run_stay_out_of_the_folder(tmp_path: Path) -> None:
    """Catches a folder that differs because its run was interrupted once."""
    data = []
    for notes in ([], ["resumed after 3 of 9 stages"]):
        options = Options.without_paths(model_path=tiny.TINY)
        shown: list[str] = []
        summary = CompilationSummary(options, Checkpoint(tiny.TINY), options.scheme, shown.append)
        summary.add_notes(["of the output"])
        summary.add_notes(notes, of_run=True)
        assert shown[-1] == ([*notes, "of the output"])[0] and summary.notes == shown
        summary.write_report_data(tmp_path, [], ready_samples=True)
        data.append((tmp_path / DATA_FILE).read_bytes())
    assert data[0] == data[1] and b"of the output" in data[0]


def test_timings_add_up(compiled: tuple[Result, ReportData, Path]) -> None:
    """Catches a pass or a stage without its time, and timings inside the folder."""
    result, data, path = compiled
    timings = Timings.read(path)
    assert {row.name: row.seconds for row in timings.passes} == result.passes
    assert [row.name for row in timings.stages] == [stage.name for stage in data.stages]
    assert sum(row.seconds for row in timings.stages) < timings.seconds <= result.seconds
    assert sum(row.raised_bytes for row in timings.passes) <= timings.peak_bytes <= result.peak_memory_bytes
    assert not [name for name in result.folder.iterdir() if "timings" in name.name]


@pytest.mark.parametrize("place", ["model/t.json", "save/t.json", "nowhere/t.json", "model"])
def test_timings_outside_of_both_folders(place: str, tmp_path: Path) -> None:
    """Catches a file of timings inside a checkpoint, and a path that cannot be written, found after hours of work."""
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="--timings"):
        Options.from_user(model_path=tmp_path / "model", save_directory=tmp_path / "save", timings=tmp_path / place)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False, "group_size": 128},
        {"mindie_format": True, "exclude": ("a*", "b?c"), "anti_method": "m4", "anti_alpha": 0.75},
        {"fallback": "auto", "min_sqnr": 30.5, "shift": True, "modality_balance": False, "target": "vllm-ascend@0.18"},
        {
            "pipeline": "insert-observers{tokens=64},lower-linears",
            "max_tokens": 300,
            "seed": 4,
            "skip_bad_images": True,
        },
    ],
)
def test_the_command_line_gives_the_same_options(values: dict[str, Any]) -> None:
    """Catches an option that is omitted, misspelt, or included with its default value."""
    options = Options.without_paths(**values)
    words = command(options, None, names_samples=True)
    flags: dict[str, Any] = {}
    rest = list(words[2:])
    while rest:
        name = rest.pop(0).removeprefix("--")
        value = rest.pop(0) if rest and not rest[0].startswith("--") else True
        flags[name] = (*flags.get(name, ()), value) if name in ("exclude", "include") else value
    places = {"model_path": "MODEL_PATH", "save_directory": "SAVE_DIRECTORY", "calib_images": "IMAGES"}
    assert {name: flags.pop(name) for name in places} == places
    assert set(flags) == (set(values) - set(FLAGS) | {"scheme"} if set(values) & set(FLAGS) else set(values))
    assert Options.without_paths(**flags) == options


def test_the_command_line_is_quoted() -> None:
    """Catches a glob that the shell would expand."""
    text = shell_text(("vlqc", "compile", "--exclude", "model.*", "--seed", "1"))
    assert text == "vlqc compile \\\n    --exclude 'model.*' \\\n    --seed 1"


def test_paths_become_placeholders(tmp_path: Path) -> None:
    """Catches a note with a path of the user in the compiled folder."""
    folders = {name: tmp_path / name for name in ("model_path", "calib_images", "save_directory")}
    options = Options.without_paths(**folders)
    replaced = replace_paths([f"skipped {tmp_path}/calib_images/a.jpg: bad", "a sentence."], options)
    assert replaced == ("skipped IMAGES/a.jpg: bad", "a sentence.")
