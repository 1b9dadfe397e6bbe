"""How much accuracy smoothing brings back on random checkpoints with outliers of every kind in both towers."""

from pathlib import Path

import make_outlier_checkpoint
import pytest
from naive_w8a8 import load_float, logits, signal_to_noise

import vlqc

NAIVE = (7.0, 13.0)  # dB without smoothing: what makes such a checkpoint worth smoothing
SMOOTHED = 28.0  # dB with m2 or m4; the reference tool reaches 26.95 to 28.14, and 22.84, on one like it
DYNAMIC = 33.0  # dB with m2; the reference tool reaches 32.73


@pytest.mark.every_transformers
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_smoothing_keeps_the_logits(tmp_path: Path, seed: int) -> None:
    """Catches edges that are not found, scales searched on wrong statistics, and folds that miss a consumer."""
    config = make_outlier_checkpoint.make(tmp_path / "float", seed=seed)
    calibration = make_outlier_checkpoint.random_samples(config, 6, seed=100 + seed)
    unseen = make_outlier_checkpoint.random_samples(config, 6, seed=900 + seed)
    reference = logits(load_float(tmp_path / "float"), unseen)

    def sqnr(**options: object) -> float:
        save = tmp_path / "compiled"
        vlqc.compile(model_path=tmp_path / "float", save_directory=save, samples=calibration, overwrite=True, **options)
        return signal_to_noise(reference, logits(vlqc.load(save), unseen))

    assert NAIVE[0] < sqnr(anti_method="none", act_method=1) < NAIVE[1]
    assert sqnr(act_method=1) > SMOOTHED
    assert sqnr() > SMOOTHED
    assert sqnr(anti_method="m4") > SMOOTHED
    assert sqnr(is_dynamic=True) > DYNAMIC
