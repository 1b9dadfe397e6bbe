"""Accuracy with smoothing, on random checkpoints with outliers of every kind in the vision and the language model."""

from pathlib import Path

import pytest

import vlqc
from tests.support.naive_w8a8 import load_float, logits, signal_to_noise
from tools.checkpoints import outlier_checkpoint as make_outlier_checkpoint

NAIVE = (7.0, 13.0)  # dB without smoothing and rotations
# dB with six calibration samples, at least 0.5 below the measured values; the reference tool reaches 27.4 to 29.1 with
# m2, 17.4 to 19.3 with m4, 31.5 to 32.4 per token, and 11.0 to 11.8 with 4 bits.
SMOOTHED, DYNAMIC, FOUR_BITS = 30.0, 34.5, 16.5
ROTATED = 33.0  # dB with rotations and without smoothing: six samples are too few for its ranges
IN_GROUPS = {"w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False, "w4a8_scope": "all"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.every_transformers), 1])
def test_smoothing_keeps_the_logits(tmp_path: Path, seed: int) -> None:
    """Catches missing edges, scales searched on wrong statistics, and folds that leave out a consumer."""
    config = make_outlier_checkpoint.make(tmp_path / "float", seed=seed)
    calibration = make_outlier_checkpoint.random_samples(config, 6, seed=100 + seed)
    unseen = make_outlier_checkpoint.random_samples(config, 6, seed=900 + seed)
    reference = logits(load_float(tmp_path / "float"), unseen)

    def sqnr(**options: object) -> float:
        save = tmp_path / "compiled"
        vlqc.compile(model_path=tmp_path / "float", save_directory=save, samples=calibration, overwrite=True, **options)
        return signal_to_noise(reference, logits(vlqc.load(save), unseen))

    assert NAIVE[0] < sqnr(anti_method="none", rotate="none", act_method=1) < NAIVE[1]
    assert sqnr(rotate="none", act_method=1) > SMOOTHED
    assert sqnr(rotate="none") > SMOOTHED
    assert sqnr(rotate="none", anti_method="m4") > SMOOTHED
    assert sqnr(rotate="none", is_dynamic=True) > DYNAMIC
    assert sqnr(group_size=256, rotate="none", **IN_GROUPS) > FOUR_BITS
    assert sqnr(anti_method="none") > ROTATED
    assert sqnr(is_dynamic=True) > DYNAMIC + 0.5
    assert sqnr(group_size=256, **IN_GROUPS) > FOUR_BITS + 0.5
