"""The main job on a checkpoint that ships with the project: outliers in, W8A8 out, answers compared.

    python -m tools.demo.demo FOLDER       # everything is written below FOLDER, which is made anew

The tiny Qwen2.5-VL of tools/demo/tiny_vl reads coloured digits in pictures. Outliers are planted into it without
changing what it computes: 2 % of the channels of every edge in both towers, times 128.
Then `vlqc compile` runs on pictures and questions of its own task, and the written folders are loaded back.
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
CALIBRATION_PICTURES = 32
EVALUATED_PICTURES = 256  # unseen renderings, 8 answers each
RUNS = {  # title: options of vlqc compile beside the folders
    "W8A8, no smoothing, min-max": ["--anti_method", "none", "--act_method", "1"],
    "W8A8, no smoothing, histogram": ["--anti_method", "none"],
    "W8A8, m2, min-max": ["--anti_method", "m2", "--act_method", "1"],
    "W8A8, m2, histogram (default)": [],
}


def main(folder: Path) -> None:
    """Plant, compile four times, verify the default one, load back, print the table."""
    shutil.rmtree(folder, ignore_errors=True)
    step(f"Planting outliers into {TINY.name}: 2 % of the channels of every edge, times 128")
    planted = folder / "planted"
    plant_outliers.plant(TINY, planted, alpha=128, share=0.02, seed=0)
    pictures = tiny_task.write_calibration(folder / "calibration", CALIBRATION_PICTURES, seed=1)

    floating = float_model(planted)
    wanted = tiny_task.answer_logits(floating, EVALUATED_PICTURES)
    rows = [("float", weight_bytes(planted), tiny_task.accuracy(floating, EVALUATED_PICTURES), float("inf"))]
    for number, (title, options) in enumerate(RUNS.items()):
        save = folder / f"compiled-{number}"
        step(title)
        where = ["--model_path", str(planted), "--calib_images", str(pictures), "--save_directory", str(save)]
        command("compile", *where, *options, quiet=number + 1 < len(RUNS))
        model = vlqc.load(save)
        noise = sqnr(wanted, tiny_task.answer_logits(model, EVALUATED_PICTURES))
        rows.append((title, weight_bytes(save), tiny_task.accuracy(model, EVALUATED_PICTURES), noise))

    step("Verifying the default one against the float checkpoint")
    command("verify", str(save), "--model_path", str(planted), "--calib_images", str(pictures), quiet=True)
    print("no fault found")

    step(f"{8 * EVALUATED_PICTURES} questions about {EVALUATED_PICTURES} pictures that calibration did not see")
    table = Table()
    table.add_column("")
    for column in ("weights", "right answers", "logit SQNR"):
        table.add_column(column, justify="right")
    for title, size, accuracy, noise in rows:
        shown = "" if noise == float("inf") else f"{noise:.1f} dB"
        table.add_row(title, f"{size / 2**20:.1f} MiB", f"{accuracy:.2f} %", shown)
    Console().print(table)


def step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def command(*arguments: str, quiet: bool) -> None:
    """Runs `vlqc` as a user would, and shows the line; its report too, unless `quiet`."""
    print("$ vlqc", shlex.join(arguments), flush=True)
    run = subprocess.run([sys.executable, "-m", "vlqc", *arguments], capture_output=quiet, text=True, check=False)
    if run.returncode:
        sys.exit(f"{run.stdout or ''}{run.stderr or ''}\nvlqc ended with exit code {run.returncode}")


def float_model(folder: Path) -> nn.Module:
    from transformers import Qwen2_5_VLForConditionalGeneration

    model: nn.Module = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    return model.float().eval()


def sqnr(wanted: Tensor, got: Tensor) -> float:
    """Signal to quantization noise ratio, dB: how far the logits stand above their error."""
    noise = (wanted.double() - got.double()).square().sum()
    return float(10 * torch.log10(wanted.double().square().sum() / noise))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
