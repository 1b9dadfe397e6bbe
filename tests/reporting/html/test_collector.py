"""vlqc.reporting.html.collector and .schema: they say what happened, and nothing of the machine."""

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
from vlqc.reporting.html.collector import StageMetrics, curve, smoothing_scales
from vlqc.reporting.html.command_line import command, replace_paths, shell_text
from vlqc.reporting.html.schema import DATA_FILE, SHARES, InputData, ReportData, StageData, Timings, read_report_data
from vlqc.reporting.summary import CompilationSummary, Result

SAMPLES = tiny.mixed_samples()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, ReportData, Path]:
    """A compilation with its report and timings; the last layer's mlp stays float, one down_proj does not."""
    folder = tmp_path_factory.mktemp("report")
    result = vlqc.compile(
        model_path=tiny.TINY,
        save_directory=folder / "out",
        samples=SAMPLES,
        exclude=["model.layers.3.mlp.*"],
        include=["model.layers.0.mlp.down_proj"],
        timings=folder / "timings.json",
    )
    return result, read_report_data(folder / "out"), folder / "timings.json"


def stage_of(facts: ReportData, name: str) -> StageData:
    return next(stage for stage in facts.stages if stage.name == name)


def input_of(facts: ReportData, site: str) -> InputData:
    return next(read for stage in facts.stages for read in stage.inputs if site in read.sites)


def test_facts_are_those_of_the_result(made: tuple[Result, ReportData, Path]) -> None:
    """Catches a report that counts, weighs or warns otherwise than the compilation itself."""
    result, facts, _ = made
    assert facts.counts() == result.counts
    assert (facts.bytes_before, list(facts.notes)) == (result.bytes_before, result.notes)
    assert [stage.name for stage in facts.stages] == tiny.STAGES
    description = json.loads((result.folder / "quant_model_description.json").read_text())
    for site in (site for stage in facts.stages for site in stage.sites):
        assert description[f"{site.name}.weight"] == site.scheme
    reasons = {site.name: site.reason for site in stage_of(facts, "model.layers.3").sites}
    assert reasons["model.layers.3.mlp.up_proj"] == "excluded by model.layers.3.mlp.*"
    images = sum(int((sample["input_ids"] == tiny_task.IMAGE).sum()) for sample in SAMPLES)
    every = sum(sample["input_ids"].numel() for sample in SAMPLES)
    assert stage_of(facts, "model.layers.1").rows == {"text": every - images, "image": images}
    assert (stage_of(facts, "model.layers.1").samples, stage_of(facts, "visual.merger").samples) == (4, 3)


def test_static_ranges_are_the_stored_ones(made: tuple[Result, ReportData, Path]) -> None:
    """Catches a range with the offset's sign turned, or of another site."""
    result, facts, _ = made
    stored = load_file(result.folder / "quant_model_weight_w8a8.safetensors")
    found = 0
    for site in (site for stage in facts.stages for site in stage.sites if site.scheme == "W8A8"):
        scale, offset = (float(stored[f"{site.name}.input_{part}"]) for part in ("scale", "offset"))
        assert site.low == pytest.approx((-128 - offset) * scale, rel=1e-3)
        assert site.high == pytest.approx((127 - offset) * scale, rel=1e-3)
        found += 1
    assert found == 39


@torch.no_grad()
def test_ranges_before_smoothing_are_those_of_the_float_model(made: tuple[Result, ReportData, Path]) -> None:
    """Catches ranges taken after the fold, of the wrong modality, of some samples only, or of another node."""
    seen: dict[tuple[str, str], NDArray[np.float64]] = {}
    watched = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj", "model.layers.1.self_attn.o_proj")
    model, modality = tiny.plain(), torch.zeros(0, dtype=torch.bool)

    def watch(layer: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).abs().double().numpy()
            for name, mine in (("image", modality.numpy()), ("text", ~modality.numpy())):
                if mine.any():
                    known = seen.get((layer, name), np.zeros(rows.shape[1]))
                    seen[layer, name] = np.maximum(known, rows[mine].max(axis=0))

        return hook

    handles = [
        module.register_forward_pre_hook(watch(original_name(path)))
        for path, module in model.named_modules()
        if original_name(path) in watched
    ]
    for sample in SAMPLES:
        modality = sample["input_ids"].flatten() == tiny_task.IMAGE
        tiny.plain_logits(sample)
    for handle in handles:
        handle.remove()
    assert len(seen) == 6
    for (layer, name), peaks in seen.items():
        told = input_of(made[1], layer).before[name]  # type: ignore[index]
        falling = np.sort(peaks)[::-1]
        expected = [falling[round(share * (len(falling) - 1))] for share in SHARES]
        np.testing.assert_allclose(told, expected, rtol=0.02)  # processors that multiply bfloat16 do so


@torch.no_grad()
@pytest.mark.parametrize("name", ["visual.blocks.1", "model.layers.2"])
def test_the_sqnr_of_a_stage_is_that_of_the_folder(name: str, made: tuple[Result, ReportData, Path]) -> None:
    """Catches a signal that is already rounded, noise of another stage, padding or modalities mixed up.

    What the stage of the loaded folder returns for the very inputs of the float one is the reference.
    """
    result, facts, _ = made
    lived = tiny.lived()[name]
    loaded = {original_name(path): module for path, module in vlqc.load(result.folder).named_modules()}
    outputs = (lived.output, loaded[name](*lived.call.args, **lived.call.kwargs))
    signal, other = (tiny.tensors_of(it)[0].flatten(0, -2).double().numpy() for it in outputs)
    modality = np.ones(len(signal)) if lived.call.modality is None else lived.call.modality.numpy()
    for number, word in enumerate(("text", "image")):
        mine = modality == number
        told = stage_of(facts, name).sqnr.get(word)  # type: ignore[call-overload]
        assert mine.any() == (told is not None)
        if told is not None:
            power = (signal[mine] ** 2).mean(axis=1)
            relative = ((other - signal)[mine] ** 2).mean(axis=1) / np.maximum(power, 0.1 * np.median(power))
            assert told == pytest.approx(-10 * np.log10(relative.mean()), abs=0.3)


def test_a_stage_in_float_has_no_sqnr(made: tuple[Result, ReportData, Path]) -> None:
    """Catches infinite decibels, which are no JSON."""
    assert stage_of(made[1], "visual.merger").sqnr == {}


def test_scales_survive_a_shift() -> None:
    """Catches scales read off magnitudes, which a shift changes, and a dead channel that divides by zero."""
    low, high = torch.tensor([-4.0, -1.0, 0.0, 2.0]), torch.tensor([8.0, 3.0, 0.0, 2.0])
    ranges = {"text": ChannelRange(2, low, high, (low + high).double(), (low**2 + high**2).double())}
    seen = vlqc.Observation(4, ranges, kept=torch.stack([low, high]))
    changed = seen.rescaled(torch.tensor([4.0, 0.5, 1.0, 2.0])).shifted(torch.tensor([0.5, -3.0, 0.0, 1.0]))
    torch.testing.assert_close(smoothing_scales(seen, changed), torch.tensor([4.0, 0.5, 1.0, 1.0]))


def test_a_curve_falls_from_the_largest_to_the_smallest() -> None:
    """Catches a curve in the order of the channels, or one that misses an end."""
    values = curve(torch.arange(1000.0)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))])
    assert values == tuple(sorted(values, reverse=True)) and (values[0], values[-1]) == (999.0, 0.0)
    assert values[SHARES.index(0.5)] == pytest.approx(499.5, abs=1)


def test_the_search_is_told(tmp_path: Path) -> None:
    """Catches a report that shows the schemes of before the search, or static ranges of what became dynamic."""
    result = vlqc.compile(
        model_path=tiny.TINY,
        save_directory=tmp_path / "out",
        samples=SAMPLES,
        fallback="auto",
        max_float_groups=3,
        act_method=1,
        weight_method="round",
    )
    facts = read_report_data(tmp_path / "out")
    assert facts.counts() == result.counts
    assert facts.predicted == pytest.approx(result.predicted_sqnr, rel=1e-3)
    sites = {site.name: site for stage in facts.stages for site in stage.sites}
    moved = [row for row in result.precision if row.scheme != row.assigned]
    assert len(moved) == 3
    for row in result.precision:
        for name in row.sites:
            assert sites[name].scheme == str(row.scheme)
            assert sites[name].predicted == pytest.approx(row.sqnr, rel=1e-3)
            assert ("search" in sites[name].reason) == (row in moved) == (sites[name].low is None)


def test_nothing_of_the_machine(made: tuple[Result, ReportData, Path], tmp_path: Path) -> None:
    """Catches paths, times and hash order in the folder: another place and other running options, the same bytes."""
    result, facts, _ = made
    shutil.copytree(tiny.TINY, tmp_path / "elsewhere")
    vlqc.compile(
        model_path=tmp_path / "elsewhere",
        save_directory=tmp_path / "out",
        samples=SAMPLES,
        exclude=["model.layers.3.mlp.*"],
        include=["model.layers.0.mlp.down_proj"],
        dump_ir=tmp_path / "dump",
        memory_budget=1,
    )
    assert filecmp.cmp(result.folder / DATA_FILE, tmp_path / "out" / DATA_FILE, shallow=False)
    assert str(tmp_path.parent) not in (result.folder / DATA_FILE).read_text()
    assert facts.command == (
        *("vlqc", "compile", "--model_path", "MODEL_PATH", "--save_directory", "SAVE_DIRECTORY"),
        *("--exclude", "model.layers.3.mlp.*", "--include", "model.layers.0.mlp.down_proj"),
    )


def test_stages_survive_a_journal(made: tuple[Result, ReportData, Path]) -> None:
    """Catches facts that come back changed after an interruption: the folder would not have the same bytes."""
    kept = []
    for stage in made[1].stages:
        before = StageMetrics()
        before.stages = [stage]
        kept.append(json.loads(json.dumps(before.last_stage())))
    after = StageMetrics()
    after.restore(kept)
    assert tuple(after.stages) == made[1].stages


def test_notes_of_a_run_stay_out_of_the_folder(tmp_path: Path) -> None:
    """Catches a folder that differs because the run that made it was interrupted once."""
    facts = []
    for notes in ([], ["went on after 3 of 9 stages"]):
        options = Options.without_paths(model_path=tiny.TINY)
        shown: list[str] = []
        summary = CompilationSummary(options, Checkpoint(tiny.TINY), shown.append)
        summary.add_notes(["for everybody"])
        summary.add_notes(notes, of_run=True)
        assert shown[-1] == ([*notes, "for everybody"])[0] and summary.notes == shown
        summary.write_report_data(tmp_path, [], ready_samples=True)
        facts.append((tmp_path / DATA_FILE).read_bytes())
    assert facts[0] == facts[1] and b"for everybody" in facts[0]


def test_timings_add_up(made: tuple[Result, ReportData, Path]) -> None:
    """Catches a pass or a stage without its time, and timings inside the folder."""
    result, facts, path = made
    timings = Timings.read(path)
    assert {it.name: it.seconds for it in timings.passes} == result.passes
    assert [it.name for it in timings.stages] == [stage.name for stage in facts.stages]
    assert sum(it.seconds for it in timings.stages) < timings.seconds <= result.seconds
    assert sum(it.raised_bytes for it in timings.passes) <= timings.peak_bytes <= result.peak_memory_bytes
    assert not [name for name in result.folder.iterdir() if "timings" in name.name]


@pytest.mark.parametrize("place", ["model/t.json", "save/t.json", "nowhere/t.json", "model"])
def test_timings_have_to_lie_elsewhere(place: str, tmp_path: Path) -> None:
    """Catches a file of this machine in a checkpoint, and one that cannot be written after hours of work."""
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="--timings"):
        Options.from_user(model_path=tmp_path / "model", save_directory=tmp_path / "save", timings=tmp_path / place)


@pytest.mark.parametrize(
    "given",
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
def test_the_command_makes_the_same_options(given: dict[str, Any]) -> None:
    """Catches an option that is left out, spelt otherwise, or given where it has its default."""
    options = Options.without_paths(**given)
    words = command(options, None, ready_samples=False)
    flags: dict[str, Any] = {}
    rest = list(words[2:])
    while rest:
        name = rest.pop(0).removeprefix("--")
        value = rest.pop(0) if rest and not rest[0].startswith("--") else True
        flags[name] = (*flags.get(name, ()), value) if name in ("exclude", "include") else value
    places = {"model_path": "MODEL_PATH", "save_directory": "SAVE_DIRECTORY", "calib_images": "IMAGES"}
    assert {name: flags.pop(name) for name in places} == places
    assert set(flags) == set(given)
    assert Options.without_paths(**flags) == options


def test_the_command_survives_a_shell() -> None:
    """Catches a glob that the shell would expand."""
    text = shell_text(("vlqc", "compile", "--exclude", "model.*", "--seed", "1"))
    assert text == "vlqc compile \\\n    --exclude 'model.*' \\\n    --seed 1"


def test_paths_become_placeholders(tmp_path: Path) -> None:
    """Catches a note that carries somebody's folders into a checkpoint."""
    folders = {name: tmp_path / name for name in ("model_path", "calib_images", "save_directory")}
    options = Options.without_paths(**folders)
    told = replace_paths([f"skipped {tmp_path}/calib_images/a.jpg: bad", "a sentence."], options)
    assert told == ("skipped IMAGES/a.jpg: bad", "a sentence.")
