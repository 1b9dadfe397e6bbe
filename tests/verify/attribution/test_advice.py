"""Advice of `vlqc verify --locate`: its options exist and reduce the error, and it is printed."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console
from torch import Tensor

import vlqc
from tests.support import compiled_folder
from tests.support.ablation_folders import SAMPLES, SMALL, verify_with_locate
from tests.support.compiled_folder import make_content
from tools.checkpoints import outlier_checkpoint as make_outlier_checkpoint
from vlqc.cli.commands import app
from vlqc.errors import UserError
from vlqc.options.options import Options
from vlqc.verify import verify_folder
from vlqc.verify.findings import RANKING

# ---- advice ----------------------------------------------------------------------------------------------------------


def test_a_clipped_group_ranks_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a ranking by anything but the error, and clipping that is not measured or reported."""
    plain, bad = compiled_folder.input_range, "model.layers.0.mlp."
    monkeypatch.setattr(
        compiled_folder, "input_range", lambda layer: (0.003, 0) if layer.startswith(bad) else plain(layer)
    )
    content = make_content()
    source, folder = content.write_source(tmp_path / "float"), content.write(tmp_path / "out")
    result = verify_with_locate(folder, source, SAMPLES)
    first = result.facts[RANKING][0]
    assert (first["group"], first["gain rank"]) == ("model.layers.0.mlp.{gate,up}_proj", 1)
    advice = result.advice[0]
    assert "image inputs" in advice.why and first["inputs %"] > 90
    assert "--calib_images" in advice.fix
    monkeypatch.undo()  # restores the right range
    better = verify_folder(make_content().write(tmp_path / "better"), model_path=source, samples=SAMPLES)
    assert better.facts["logits against float"]["SQNR dB"] > result.facts["logits against float"]["SQNR dB"] + 3


def options_in(fix: str) -> list[dict[str, str]]:
    """ "--a b --c d: effect; --e f (words): effect" -> the options of each piece of advice."""
    parsed = []
    for piece in fix.split("; "):
        words = shlex.split(re.sub(r"\(.*?\)|(?<=--calib_images )[^:]*", "", piece.partition(": ")[0]))
        parsed.append(dict(zip((word.removeprefix("--") for word in words[::2]), [*words[1::2], ""], strict=False)))
    return parsed


@pytest.fixture
def outliers(tmp_path: Path) -> Callable[..., tuple[Path, list[dict[str, Tensor]]]]:
    """compiled(**options) -> compiled folder of a checkpoint with outliers, and samples not used for calibration."""
    config = make_outlier_checkpoint.make(tmp_path / "float", seed=3, shape=SMALL)
    calibration = make_outlier_checkpoint.random_samples(config, 4, seed=1)

    def compiled(pixels: float = 1.0, **options: Any) -> tuple[Path, list[dict[str, Tensor]]]:
        others = make_outlier_checkpoint.random_samples(config, 3, seed=2)
        samples = [sample | {"pixel_values": pixels * sample["pixel_values"]} for sample in calibration]
        if "calib_images" in options:  # more images, like those of the comparison
            samples += others
        options.pop("calib_images", None)
        folder = tmp_path / "out"
        vlqc.compile(model_path=tmp_path / "float", save_directory=folder, samples=samples, overwrite=True, **options)
        return folder, others

    return compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"anti_method": "none", "rotate": "none"}, "anti_method"),
        ({"scheme": "w4a8"}, "scheme"),
        ({"anti_method": "m4", "anti_alpha": "0.1"}, "scheme"),
    ],
)
def test_advice_reduces_the_error(
    tmp_path: Path, outliers: Callable[..., tuple[Path, list[dict[str, Tensor]]]], options: dict[str, str], named: str
) -> None:
    """Catches advice that does not help, options that do not exist, and a wrong gain for an exclusion."""
    folder, samples = outliers(**options)
    result = verify_with_locate(folder, tmp_path / "float", samples, locate_tokens=10_000)
    before = result.facts["logits against float"]["SQNR dB"]
    assert len(result.advice) == 3
    for advice in result.advice:
        assert set().union(*options_in(advice.fix)) <= Options.model_fields.keys(), advice.fix
    tried = options_in(result.advice[0].fix)
    assert any(named in one for one in tried)
    assert "exclude" in tried[-1]
    for one in tried:
        folder, _ = outliers(**(options | one))
        after = verify_folder(folder, model_path=tmp_path / "float", samples=samples)
        gain = after.facts["logits against float"]["SQNR dB"] - before
        assert gain > 0.2, one
        if "exclude" in one:
            assert gain == pytest.approx(result.facts[RANKING][0]["gain dB"], abs=0.5)


@pytest.mark.slow
def test_images_unlike_those_of_calibration_are_detected(
    tmp_path: Path, outliers: Callable[..., tuple[Path, list[dict[str, Tensor]]]]
) -> None:
    """Catches missing advice for ranges that were calibrated on different images."""
    folder, samples = outliers(pixels=0.001, include="visual.*")
    result = verify_with_locate(folder, tmp_path / "float", samples)
    clipped = [advice for advice in result.advice if "inputs lie outside" in advice.why]
    assert clipped and clipped[0].where.startswith("visual.") and "--calib_images" in clipped[0].fix
    folder, _ = outliers(include="visual.*")
    after = verify_folder(folder, model_path=tmp_path / "float", samples=samples)
    assert after.facts["logits against float"]["SQNR dB"] > result.facts["logits against float"]["SQNR dB"] + 1


# ---- printed result --------------------------------------------------------------------------------------------------


def test_the_ranking_is_printed_and_repeatable(tmp_path: Path) -> None:
    """Catches figures that are only in the JSON, advice that counts as a fault, and results that vary."""
    content = make_content()
    source, folder = content.write_source(tmp_path / "float"), content.write(tmp_path / "out")
    result = verify_with_locate(folder, source, SAMPLES)
    console = Console(width=160, record=True, file=(tmp_path / "screen").open("w"))
    result.render(console)
    shown = console.export_text()
    assert result.ok and "advice [locate] 1. " in shown and "what to do: " in shown
    assert "model.layers.0.self_attn.{q,k,v}_proj" in shown and "gain rank" in shown
    assert result.to_json() == verify_with_locate(folder, source, SAMPLES).to_json()


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    """Catches an option that has no effect without another one, and a traceback."""
    with pytest.raises(UserError, match=r"--locate needs --model_path[\s\S]*--locate needs --calib_images"):
        verify_folder(tmp_path, locate=True)
    with pytest.raises(UserError, match="--locate_tokens needs --locate"):
        verify_folder(tmp_path, locate_tokens=5)
    with pytest.raises(UserError, match="--locate_tokens is 0"):
        verify_folder(tmp_path, model_path=tmp_path, samples=SAMPLES, locate=True, locate_tokens=0)
    ended = CliRunner().invoke(app, ["verify", str(tmp_path), "--locate", "--locate_tokens", "9"])
    assert ended.exit_code == 2 and "--locate needs --model_path" in ended.stderr
