"""The checkpoints of `tools/bench/reference.py`, each with calibration and evaluation inputs."""

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from tools.checkpoints import outlier_checkpoint as outliers
from tools.checkpoints import smol_vl as smol
from tools.checkpoints.families import Shape
from tools.demo import plant_outliers, tiny_task

Samples = list[dict[str, Tensor]]

# Calibration and evaluation never share a seed, a split or a text.
CALIBRATION_SEED, EVALUATION_SEED = 100, 900
SAMPLES, EVALUATION_SAMPLES = 30, 12  # both tools recommend 30 images
TINY, TINY_ALPHA = Path(__file__).parents[1] / "demo" / "tiny_vl", 128.0
TINY_CALIBRATION, TINY_EVALUATION, TINY_ACCURACY = 32, 64, 256  # images
SMOL_CALIBRATION, SMOL_EVALUATION, SMOL_LENGTH = 18, 16, 256  # excerpts, and tokens of one; two follow an image
RECIPE_SCHEME = "static-m2-act1"
LARGE_SAMPLES, LARGE_EVALUATION, LARGE_GRID = 8, 2, (24, 32)  # 192 image tokens

# The MLP of the vision tower is wider by four than elsewhere: 4-bit weights need a multiple of eight outputs, and both
# tools have to quantize the same layers.
STANDARD = Shape(vision_intermediate=344)
DEEP = Shape(layers=4, vision_layers=4, vision_intermediate=344)
SHAPES = {"standard": (STANDARD, 0.0), "deep": (DEEP, 0.0), "dead": (STANDARD, 0.04)}  # shape, share of dead channels
# Sizes that every scheme quantizes: inputs are multiples of the group size, except of float layers.
FAMILIES = {
    "qwen2-vl": Shape(vision_intermediate=1024),
    "qwen3-vl": Shape(layers=3, vision_layers=4, vision_intermediate=768, head=96, deepstack=(0, 1, 2)),
}
LARGE = Shape(
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
    """A float checkpoint in `folder`. accuracy: percentage of correct answers of a model, if there is a task; text:
    whether `evaluation` is real text, so that perplexity applies; has_recipe: msModelSlim has no options for this
    model, but a recipe, which has the scheme RECIPE_SCHEME."""

    name: str
    seed: int
    folder: Path
    calibration: Samples
    evaluation: Samples
    group_size: int = 256
    accuracy: Callable[[nn.Module], float] | None = None
    text: bool = False
    has_recipe: bool = False


def outlier_cases(folder: Path, seeds: list[int], shapes: list[str]) -> Iterator[Case]:
    """Random weights with outliers in both towers, a massive token and, in the shape "dead", dead channels."""
    for name in shapes:
        shape, dead = SHAPES[name]
        for seed in seeds:
            target = folder / f"{name}-{seed}"
            config = outliers.make(target, seed, shape=shape, dead=dead)
            calibration = outliers.random_samples(config, SAMPLES, CALIBRATION_SEED + seed)
            evaluation = outliers.random_samples(config, EVALUATION_SAMPLES, EVALUATION_SEED + seed)
            yield Case(f"outliers, {name}", seed, target, calibration, evaluation)


def family_case(folder: Path, name: str, seed: int) -> Case:
    """Random weights with outliers, as in `outlier_cases`, for the family of this name."""
    target = folder / name
    config = outliers.make(target, seed, shape=FAMILIES[name], family=name.replace("-", "_"))
    calibration = outliers.random_samples(config, SAMPLES, CALIBRATION_SEED + seed)
    evaluation = outliers.random_samples(config, EVALUATION_SAMPLES, EVALUATION_SEED + seed)
    return Case(f"outliers, {name}", seed, target, calibration, evaluation, has_recipe=name == "qwen3-vl")


def tiny_cases(folder: Path, seeds: list[int]) -> Iterator[Case]:
    """The trained tiny model with planted outliers; its hidden size allows groups of 64."""
    for seed in seeds:
        target = folder / f"tiny-{seed}"
        plant_outliers.plant(TINY, target, TINY_ALPHA, seed=seed)
        calibration = tiny_task.samples(TINY_CALIBRATION, CALIBRATION_SEED + seed, "train")
        evaluation = tiny_task.samples(TINY_EVALUATION, EVALUATION_SEED + seed, "test")

        def accuracy(model: nn.Module, seed: int = EVALUATION_SEED + seed) -> float:
            return tiny_task.accuracy(model, TINY_ACCURACY, seed)

        yield Case("tiny, planted", seed, target, calibration, evaluation, 64, accuracy)


def smol_case(
    folder: Path,
    python: Path,
    packages: Path | None = None,
    counts: tuple[int, int] = (SMOL_CALIBRATION, SMOL_EVALUATION),
    dtype: str = "float32",
) -> Case:
    """Real weights, written by `python`; calibrated on one half of Python's help topics. lm_head is a copy of the
    embedding: msModelSlim cannot save two tensors that share memory, and a stream with a tied head is not rotated.

    packages: folder of packages that `python` lacks; counts: of excerpts for calibration and for evaluation.
    """
    from transformers import AutoTokenizer

    target = folder / "smol"
    command = [str(python), str(Path(smol.__file__)), str(target), "--untied", "--dtype", dtype]
    environment = None
    if packages is not None:
        path = [str(packages), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    tokenizer = AutoTokenizer.from_pretrained(target)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    calibrating, evaluating = counts
    calibration = smol.text_samples(encode, smol.CALIBRATION, calibrating, SMOL_LENGTH)
    for number in (0, calibrating // 2):
        calibration[number] = smol.with_image(calibration[number], CALIBRATION_SEED + number)
    evaluation = smol.text_samples(encode, smol.EVALUATION, evaluating, SMOL_LENGTH)
    return Case("smol, real weights", 0, target, calibration, evaluation, 64, text=True)


def large_case(folder: Path, seed: int) -> Case:
    """170 million random parameters, to measure CPU time and memory."""
    target = folder / "large"
    config = outliers.make(target, seed, shape=LARGE)
    calibration = outliers.random_samples(config, LARGE_SAMPLES, CALIBRATION_SEED + seed, (LARGE_GRID,))
    evaluation = outliers.random_samples(config, LARGE_EVALUATION, EVALUATION_SEED + seed, (LARGE_GRID,))
    return Case("large, 170 M parameters", seed, target, calibration, evaluation)
