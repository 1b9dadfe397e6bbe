"""The checkpoints of `tools/bench/reference.py`, each with calibration inputs and other, unseen ones to evaluate on."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from tools.checkpoints import outlier_checkpoint as outliers
from tools.checkpoints import smol_vl as smol
from tools.demo import plant_outliers, tiny_task

Samples = list[dict[str, Tensor]]

# Calibration and evaluation never share a seed, a split or a text.
CALIBRATION_SEED, EVALUATION_SEED = 100, 900
SAMPLES, UNSEEN = 30, 12  # both tools advise 30 pictures
TINY, TINY_ALPHA = Path(__file__).parents[1] / "demo" / "tiny_vl", 128.0
TINY_CALIBRATION, TINY_UNSEEN, TINY_ANSWERED = 32, 64, 256  # pictures; the last ones for the accuracy
SMOL_CALIBRATION, SMOL_UNSEEN, SMOL_LENGTH = 18, 16, 256  # pieces of text and their tokens
SMOL_PICTURES = (0, 9)  # the calibration pieces that follow a picture
LARGE_SAMPLES, LARGE_UNSEEN, LARGE_GRID = 8, 2, (24, 32)  # 192 image tokens

# The vision tower's MLP is wider by four than in the other tools: 4-bit weights are stored eight rows at a time, and
# both sides have to quantize the same layers.
STANDARD = outliers.Shape(vision_intermediate=344)
DEEP = outliers.Shape(layers=4, vision_layers=4, vision_intermediate=344)
SHAPES = {"standard": (STANDARD, 0.0), "deep": (DEEP, 0.0), "dead": (STANDARD, 0.04)}  # and the share of dead channels
LARGE = outliers.Shape(
    layers=8,
    hidden=1024,
    intermediate=4096,
    heads=16,
    value_heads=4,
    vision_layers=8,
    vision_hidden=640,
    vision_intermediate=1708,
    vision_heads=8,
)


@dataclass(frozen=True)
class Case:
    """A float checkpoint in `folder`. accuracy: percent of right answers of a model, where there is a task; text:
    whether `unseen` is real text, of which perplexity means something."""

    name: str
    seed: int
    folder: Path
    calibration: Samples
    unseen: Samples
    group_size: int = 256
    accuracy: Callable[[nn.Module], float] | None = None
    text: bool = False


def outlier_cases(folder: Path, seeds: list[int], shapes: list[str]) -> Iterator[Case]:
    """Random weights with outliers in both towers, a massive token and, in the shape "dead", dead channels."""
    for name in shapes:
        shape, dead = SHAPES[name]
        for seed in seeds:
            target = folder / f"{name}-{seed}"
            config = outliers.make(target, seed, shape=shape, dead=dead)
            calibration = outliers.random_samples(config, SAMPLES, CALIBRATION_SEED + seed)
            unseen = outliers.random_samples(config, UNSEEN, EVALUATION_SEED + seed)
            yield Case(f"outliers, {name}", seed, target, calibration, unseen)


def tiny_cases(folder: Path, seeds: list[int]) -> Iterator[Case]:
    """The trained tiny model with planted outliers; its hidden size allows groups of 64."""
    for seed in seeds:
        target = folder / f"tiny-{seed}"
        plant_outliers.plant(TINY, target, TINY_ALPHA, seed=seed)
        calibration = tiny_task.samples(TINY_CALIBRATION, CALIBRATION_SEED + seed, "train")
        unseen = tiny_task.samples(TINY_UNSEEN, EVALUATION_SEED + seed, "test")

        def accuracy(model: nn.Module, seed: int = EVALUATION_SEED + seed) -> float:
            return tiny_task.accuracy(model, TINY_ANSWERED, seed)

        yield Case("tiny, planted", seed, target, calibration, unseen, 64, accuracy)


def smol_case(folder: Path, python: Path) -> Case:
    """Real weights, made by `python`, whose environment holds them; calibrated on one half of Python's help
    topics. lm_head is a copy of the embedding: msModelSlim cannot save the two when they share memory."""
    from transformers import AutoTokenizer

    target = folder / "smol"
    script = Path(smol.__file__)
    subprocess.run([str(python), str(script), str(target), "--untied"], check=True, capture_output=True)
    tokenizer = AutoTokenizer.from_pretrained(target)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    calibration = smol.text_samples(encode, smol.CALIBRATION, SMOL_CALIBRATION, SMOL_LENGTH)
    for number in SMOL_PICTURES:
        calibration[number] = smol.with_picture(calibration[number], CALIBRATION_SEED + number)
    unseen = smol.text_samples(encode, smol.EVALUATION, SMOL_UNSEEN, SMOL_LENGTH)
    return Case("smol, real weights", 0, target, calibration, unseen, 64, text=True)


def large_case(folder: Path, seed: int) -> Case:
    """170 million random parameters, for CPU time and memory."""
    target = folder / "large"
    config = outliers.make(target, seed, shape=LARGE)
    calibration = outliers.random_samples(config, LARGE_SAMPLES, CALIBRATION_SEED + seed, (LARGE_GRID,))
    unseen = outliers.random_samples(config, LARGE_UNSEEN, EVALUATION_SEED + seed, (LARGE_GRID,))
    return Case("large, 170 M parameters", seed, target, calibration, unseen)
