"""Quantizes a tiny checkpoint with outliers in four ways and compares the answers.

    python -m tools.demo.demo FOLDER       # replaces FOLDER

The tiny Qwen2.5-VL of tools/demo/tiny_vl reads colored digits in images. Outliers are added without changing the
function of the model: 2 % of the channels of every edge in both towers, times 128. `vlqc compile` then runs on images
and questions of the model's task, and the compiled folders are loaded and evaluated.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import vlqc
from tools.demo import plant_outliers, tiny_task
from vlqc.reporting.summary import weight_bytes

TINY = Path(__file__).parent / "tiny_vl"
CALIBRATION_IMAGES = 32
EVALUATION_IMAGES = 256  # unseen renderings, 8 answers each
RUNS = {  # title: options of vlqc compile
    "W8A8, no smoothing, min-max": ["--rotate", "none", "--anti_method", "none", "--act_method", "1"],
    "W8A8, no smoothing, histogram": ["--rotate", "none", "--anti_method", "none"],
    "W8A8, m2, min-max": ["--rotate", "none", "--act_method", "1"],
    "W8A8, m2, histogram": ["--rotate", "none"],
    "W8A8, rotations, histogram": ["--anti_method", "none"],
    "W8A8, rotations, m2, histogram (default)": [],
}


def main(folder: Path) -> None:
    """Adds outliers, compiles, verifies, loads and evaluates; prints the table."""
    shutil.rmtree(folder, ignore_errors=True)
    step(f"Adding outliers to {TINY.name}: 2 % of the channels of every edge, times 128")
    planted = folder / "planted"
    plant_outliers.plant(TINY, planted, alpha=128, share=0.02, seed=0)
    images = tiny_task.write_calibration(folder / "calibration", CALIBRATION_IMAGES, seed=1)

    model = float_model(planted)
    reference = tiny_task.answer_logits(model, EVALUATION_IMAGES)
    rows = [("float", weight_bytes(planted), tiny_task.accuracy(model, EVALUATION_IMAGES), float("inf"))]
    for number, (title, options) in enumerate(RUNS.items()):
        save = folder / f"compiled-{number}"
        step(title)
        paths = ["--model_path", str(planted), "--calib_images", str(images), "--save_directory", str(save)]
        command("compile", *paths, *options, quiet=number + 1 < len(RUNS))
        model = vlqc.load(save)
        ratio = sqnr(reference, tiny_task.answer_logits(model, EVALUATION_IMAGES))
        rows.append((title, weight_bytes(save), tiny_task.accuracy(model, EVALUATION_IMAGES), ratio))

    step("Verifying the default against the float checkpoint")
    command("verify", str(save), "--model_path", str(planted), "--calib_images", str(images), quiet=True)
    print("no faults")

    step(f"{8 * EVALUATION_IMAGES} questions about {EVALUATION_IMAGES} images that are not calibration images")
    table = Table()
    table.add_column("")
    for column in ("weights", "correct answers", "logit SQNR"):
        table.add_column(column, justify="right")
    for title, size, accuracy, ratio in rows:
        decibels = "" if ratio == float("inf") else f"{ratio:.1f} dB"
        table.add_row(title, f"{size / 2**20:.1f} MiB", f"{accuracy:.2f} %", decibels)
    Console().print(table)


def step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def command(*arguments: str, quiet: bool) -> None:
    """Prints and runs a `vlqc` command; prints its output unless `quiet`."""
    print("$ vlqc", shlex.join(arguments), flush=True)
    run = subprocess.run([sys.executable, "-m", "vlqc", *arguments], capture_output=quiet, text=True, check=False)
    if run.returncode:
        sys.exit(f"{run.stdout or ''}{run.stderr or ''}\nvlqc failed with exit code {run.returncode}")


def float_model(folder: Path) -> nn.Module:
    from transformers import Qwen2_5_VLForConditionalGeneration

    model: nn.Module = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    return model.float().eval()


def sqnr(reference: Tensor, quantized: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB."""
    noise = (reference.double() - quantized.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
