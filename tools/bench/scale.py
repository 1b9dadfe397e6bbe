"""How long `vlqc compile` takes at the sizes of Qwen2.5-VL, beside what this machine could do at best; and its memory.

    python -m tools.bench.scale --size {3B,7B,32B,72B} --folder FOLDER [--layers 2] [--vision_layers 2]
        [--samples 4] [--tokens 2048] [--threads 2] [--json FILE] [--keep] [--option NAME=VALUE ...]

A checkpoint with the real shapes is written into FOLDER and compiled in a process of its own, on samples of so many
tokens, most of them of one picture. The bound of a phase is its share of reading, multiplying, rounding or writing,
divided by the rate of this machine at that, measured in the same run with as many threads. With --layers or
--vision_layers, times of all layers follow from the mean of those that ran. Where the disk has no room for them all,
fewer layers are run. Anything else that runs meanwhile spoils the figures: the load is reported.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tools.bench.scale_bounds import Rates, forget, measured_rates, work_of
from tools.bench.scale_checkpoint import SIZES, Case, checkpoint_bytes, make, samples_of
from vlqc.frontend.calibration.probe import CROP_HEIGHT, CROP_WIDTH, PROBE_ROWS

ROOT = Path(__file__).parents[2]
RUNNER = ROOT / "tools" / "bench" / "scale_runner.py"
GIB = 1 << 30
FEWEST_TOKENS = 32  # of a sample: a picture and some words
SPARE = 1.1  # of the disk's room, beyond source and result
SUM = 2.0  # how many times the sum of the bounds a run may take


def fitting(case: Case, room: int) -> Case:
    """The case, with as many layers fewer as it takes to fit into so many bytes. ValueError if not even one fits."""
    while SPARE * 2 * checkpoint_bytes(case) > room:
        if case.layers == 1:
            raise ValueError(f"{case.size} needs {2 * checkpoint_bytes(case) / GIB:.0f} GiB even with one layer")
        case = Case(case.size, max(1, case.layers * 3 // 4), case.vision_layers)
    return case


def extrapolated(figures: Mapping[str, Any], case: Case) -> dict[str, float]:
    """Seconds per phase of all layers: the mean of those of a kind that ran stands for those that did not.

    Of vision blocks those that attend to the whole picture are a kind of their own.
    """
    total: dict[str, float] = dict(figures["phases"])
    full = Case.of(case.size)
    whole = {f"visual.blocks.{number}" for number in case.whole_picture}
    blocks = {f"visual.blocks.{number}" for number in range(case.vision_layers)}
    kinds = [
        (whole, len(full.whole_picture)),
        (blocks - whole, full.vision_layers - len(full.whole_picture)),
        ({f"model.layers.{number}" for number in range(case.layers)}, full.layers),
    ]
    if not blocks - whole:  # nothing is known of those that attend to windows
        kinds[:2] = [(whole, full.vision_layers)]
    for names, count in kinds:
        ran = [phases for name, phases in figures["stages"].items() if name in names]
        for phases in ran:
            for name, seconds in phases.items():
                total[name] = total.get(name, 0.0) + seconds * (count - len(ran)) / len(ran)
    return total


def compiled(checkpoint: Path, save: Path, samples: Path, options: list[str], threads: int) -> dict[str, Any]:
    """What the runner found. SystemExit with the end of what it printed if it failed."""
    result = samples.with_name("figures.json")
    ran = subprocess.run(
        [sys.executable, str(RUNNER), str(checkpoint), str(save), str(samples), str(result), *options],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ran.returncode:
        raise SystemExit(f"the compilation failed\n{ran.stdout[-4000:]}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def quantized_weights(folder: Path) -> set[str]:
    """Names of the weights of a compiled folder that are not float."""
    described: dict[str, Any] = {}
    for path in folder.glob("quant_model_description*.json"):
        described |= json.loads(path.read_text(encoding="utf-8"))
    return {name for name, word in described.items() if name.endswith(".weight") and word != "FLOAT"}


def bench(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run, in a folder of its own inside that of the arguments: its figures, and the bounds."""
    folder = Path(tempfile.mkdtemp(prefix=f"scale-{case.size}-", dir=arguments.folder))
    try:
        return figures_of(case, folder, arguments)
    finally:
        if arguments.keep:
            print(f"checkpoint and result stay in {folder}")
        else:
            shutil.rmtree(folder)


def figures_of(case: Case, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    checkpoint, save, samples = folder / "source", folder / "result", folder / "samples.pt"
    make(checkpoint, case)
    inputs = samples_of(case.config, arguments.samples, arguments.tokens)
    torch.save(inputs, samples)
    rates = measured_rates(folder, sorted(checkpoint.glob("*.safetensors"))[0])
    forget(checkpoint)
    load = os.getloadavg()[0]
    figures = compiled(checkpoint, save, samples, arguments.option, arguments.threads)
    written = sum(path.stat().st_size for path in save.iterdir())
    patches = int(inputs[0]["pixel_values"].shape[0])
    quantized = quantized_weights(save)
    proof_rows = patches if patches <= PROBE_ROWS else CROP_HEIGHT * CROP_WIDTH
    work = work_of(case, arguments.samples, arguments.tokens, patches, written, proof_rows, quantized)
    return {
        "case": vars(case) | {"samples": arguments.samples, "tokens": arguments.tokens, "threads": arguments.threads},
        "rates": vars(rates),
        "bounds": work.bounds(rates),
        "work": vars(work),
        "load": [load, os.getloadavg()[0]],
        "all_layers": extrapolated(figures, case),
        **figures,
    }


def show(result: Mapping[str, Any], case: Case) -> None:
    """Tables of the phases, and of the machine."""
    console = Console()
    rates, bounds, phases = Rates(**result["rates"]), result["bounds"], result["phases"]
    console.print(
        f"read {rates.read / 1e9:.2f} GB/s, write {rates.write / 1e9:.2f} GB/s, bf16 {rates.bfloat16 / 1e9:.0f} and "
        f"fp32 {rates.float32 / 1e9:.0f} GFLOP/s, rounding {rates.rounding / 1e6:.0f} million weights per second; "
        f"load before and after: {result['load'][0]:.1f}, {result['load'][1]:.1f}"
    )
    ran = f"{case.layers} of {case.full.layers} layers, {case.vision_layers} of {case.full.vision_layers} vision blocks"
    table = Table(title=f"{case.size}: {ran}")
    for name in ("phase", "seconds", "CPU seconds", "bound", "times", "peak GiB", "all layers, seconds"):
        table.add_column(name, justify="left" if name == "phase" else "right")

    def row(name: str, seconds: float, cpu: float, bound: float, peak: float, every: float) -> None:
        times = f"{seconds / bound:.1f}" if bound else ""
        bound_text = f"{bound:.1f}" if bound else ""
        table.add_row(name, f"{seconds:.1f}", f"{cpu:.1f}", bound_text, times, f"{peak / GIB:.2f}", f"{every:.0f}")

    for name, seconds in sorted(phases.items(), key=lambda it: -it[1]):
        peak = result["peaks"].get(name, 0)
        row(name, seconds, result["phases_cpu"][name], bounds.get(name, 0.0), peak, result["all_layers"][name])
    kernel, total = result["kernel"], sum(bounds.values())
    every = sum(result["all_layers"].values())
    row("whole run", result["seconds"], result["cpu_seconds"], total, kernel["peak_bytes"], every)
    console.print(table)
    if (case.layers, case.vision_layers) != (case.full.layers, case.full.vision_layers):
        console.print("Not all layers ran: the last column takes the mean of those that did for the others.")
    times = result["seconds"] / total
    verdict = "met" if times <= SUM else "missed"
    console.print(f"{times:.2f} times the sum of the bounds: the aim, at most {SUM:g} times, is {verdict}")
    source, work = result["work"]["read_bytes"], result["work"]
    console.print(
        f"weights {source / GIB:.2f} GiB, read from disk {kernel['read_bytes'] / GIB:.2f} GiB; "
        f"result {work['write_bytes'] / GIB:.2f} GiB, written {kernel['write_bytes'] / GIB:.2f} GiB"
    )


def at_least(least: int) -> Callable[[str], int]:
    """For argparse: reads a whole number from `least` on."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} on")
        return int(text)

    return whole_number


def named_value(text: str) -> str:
    if not all(text.partition("=")):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of vlqc compile at real sizes.")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoint and result, on the disk to measure")
    parser.add_argument("--layers", type=at_least(1))
    parser.add_argument("--vision_layers", type=at_least(1))
    parser.add_argument("--samples", type=at_least(1), default=4)
    parser.add_argument("--tokens", type=at_least(FEWEST_TOKENS), default=2048, help="of one sample")
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and result in the folder")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", type=named_value, help="of vlqc compile"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        wanted = Case.of(arguments.size, arguments.layers, arguments.vision_layers)
        case = fitting(wanted, shutil.disk_usage(arguments.folder).free)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if case != wanted:
        print(f"The disk has room for {case.layers} of {wanted.layers} layers: only those are run.")
    result = bench(case, arguments)
    show(result, case)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
