"""Measures time and memory of `vlqc compile` at the sizes of published models, and compares the time with lower bounds.

    python -m tools.bench.scale --size {3B,7B,32B,72B,qwen3-vl-8b,qwen3-vl-32b,qwen3-vl-30b-a3b} --folder FOLDER
        [--layers 2] [--vision_layers 2] [--samples 4] [--tokens 2048] [--threads 2] [--json FILE] [--keep]
        [--option NAME=VALUE ...]

Writes a checkpoint with the real shapes to FOLDER and compiles it in a new process, with samples of --tokens tokens,
most of them of one image. The lower bound of a phase is its amount of reading, matrix products, rounding or writing,
divided by the rate of this machine, measured in the same run with the same number of threads. With --layers or
--vision_layers, the time of all layers is extrapolated from the mean of those that ran. If the disk is too small for
all layers, fewer are run. Other load on the machine distorts the results, so the load is reported. Qwen3-VL needs
transformers 4.57 or later, for example with PYTHONPATH=.venv/transformers-4.57.
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

from tools.bench.scale_bounds import Rates, drop_from_page_cache, measured_rates, work_of
from tools.bench.scale_checkpoint import SIZES, Case, checkpoint_bytes, make, samples_of
from vlqc.families.inputs.image_inputs import CROP_HEIGHT, CROP_WIDTH
from vlqc.frontend.calibration.probe import PROBE_ROWS

ROOT = Path(__file__).parents[2]
RUNNER = ROOT / "tools" / "bench" / "scale_runner.py"
GIB = 1 << 30
MIN_TOKENS = 32  # of a sample: an image and some words
SPARE = 1.1  # disk space relative to that of source and result
TARGET = 2.0  # time relative to the sum of the bounds


def fitting(case: Case, free_bytes: int) -> Case:
    """The case with as many layers as fit on the disk. Raises ValueError if one layer does not fit."""
    while SPARE * 2 * checkpoint_bytes(case) > free_bytes:
        if case.layers == 1:
            raise ValueError(f"{case.size} needs {2 * checkpoint_bytes(case) / GIB:.0f} GiB even with one layer")
        case = Case(case.size, max(1, case.layers * 3 // 4), case.vision_layers)
    return case


def extrapolated(measured: Mapping[str, Any], case: Case) -> dict[str, float]:
    """Seconds per phase for all layers, extrapolated from the mean of the layers that ran.

    Vision blocks with full and with windowed attention, and mergers between vision blocks are extrapolated separately.
    """
    total: dict[str, float] = dict(measured["phases"])
    full = Case.of(case.size)
    vision, text = case.vision_prefix, case.text_prefix
    full_attention = {f"{vision}.blocks.{number}" for number in case.full_attention_blocks}
    blocks = {f"{vision}.blocks.{number}" for number in range(case.vision_layers)}
    mergers = {f"{vision}.deepstack_merger_list.{number}" for number in range(len(case.shape.deepstack))}
    kinds = [
        (full_attention, len(full.full_attention_blocks)),
        (blocks - full_attention, full.vision_layers - len(full.full_attention_blocks)),
        ({f"{text}.layers.{number}" for number in range(case.layers)}, full.layers),
        (mergers, len(full.shape.deepstack)),
    ]
    if not blocks - full_attention:  # no block with windowed attention ran
        kinds[:2] = [(full_attention, full.vision_layers)]
    for names, count in kinds:
        ran = [phases for name, phases in measured["stages"].items() if name in names]
        for phases in ran:
            for name, seconds in phases.items():
                total[name] = total.get(name, 0.0) + seconds * (count - len(ran)) / len(ran)
    return total


def compiled(checkpoint: Path, save: Path, samples: Path, options: list[str], threads: int) -> dict[str, Any]:
    """Runs the compilation and returns its measurements. Raises SystemExit with the end of its output."""
    result = samples.with_name("figures.json")
    overlays = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]  # another transformers
    ran = subprocess.run(
        [sys.executable, str(RUNNER), str(checkpoint), str(save), str(samples), str(result), *options],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join([str(ROOT), *overlays])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ran.returncode:
        raise SystemExit(f"the compilation failed\n{ran.stdout[-4000:]}")
    measured: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return measured


def quantized_weights(folder: Path) -> set[str]:
    """Names of the weights of a compiled folder that are not float."""
    description: dict[str, Any] = {}
    for path in folder.glob("quant_model_description*.json"):
        description |= json.loads(path.read_text(encoding="utf-8"))
    return {name for name, scheme in description.items() if name.endswith(".weight") and scheme != "FLOAT"}


def bench(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run in a temporary folder on the disk to measure: measurements and bounds."""
    folder = Path(tempfile.mkdtemp(prefix=f"scale-{case.size}-", dir=arguments.folder))
    try:
        return measure(case, folder, arguments)
    finally:
        if arguments.keep:
            print(f"checkpoint and result: {folder}")
        else:
            shutil.rmtree(folder)


def measure(case: Case, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    checkpoint, save, samples = folder / "source", folder / "result", folder / "samples.pt"
    make(checkpoint, case)
    inputs = samples_of(case.config, arguments.samples, arguments.tokens)
    torch.save(inputs, samples)
    rates = measured_rates(folder, sorted(checkpoint.glob("*.safetensors"))[0])
    drop_from_page_cache(checkpoint)
    load = os.getloadavg()[0]
    measured = compiled(checkpoint, save, samples, arguments.option, arguments.threads)
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
        "all_layers": extrapolated(measured, case),
        **measured,
    }


def show(result: Mapping[str, Any], case: Case) -> None:
    """Prints the table of the phases and the rates of the machine."""
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

    for name, seconds in sorted(phases.items(), key=lambda item: -item[1]):
        peak = result["peaks"].get(name, 0)
        row(name, seconds, result["phases_cpu"][name], bounds.get(name, 0.0), peak, result["all_layers"][name])
    kernel, total = result["kernel"], sum(bounds.values())
    every = sum(result["all_layers"].values())
    row("whole run", result["seconds"], result["cpu_seconds"], total, kernel["peak_bytes"], every)
    console.print(table)
    if (case.layers, case.vision_layers) != (case.full.layers, case.full.vision_layers):
        console.print("Not all layers ran: the last column is extrapolated.")
    times = result["seconds"] / total
    verdict = "met" if times <= TARGET else "missed"
    console.print(f"{times:.2f} times the sum of the bounds: target of at most {TARGET:g} {verdict}")
    source, work = result["work"]["read_bytes"], result["work"]
    console.print(
        f"weights {source / GIB:.2f} GiB, read from disk {kernel['read_bytes'] / GIB:.2f} GiB; "
        f"result {work['write_bytes'] / GIB:.2f} GiB, written {kernel['write_bytes'] / GIB:.2f} GiB"
    )


def at_least(minimum: int) -> Callable[[str], int]:
    """Type for argparse: an integer of at least `minimum`."""

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is not an integer of at least {minimum}")
        return int(text)

    return integer


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
    parser.add_argument("--tokens", type=at_least(MIN_TOKENS), default=2048, help="per sample")
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep checkpoint and result in the folder")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", type=named_value, help="option of vlqc compile"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        requested = Case.of(arguments.size, arguments.layers, arguments.vision_layers)
        case = fitting(requested, shutil.disk_usage(arguments.folder).free)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if case != requested:
        print(f"The disk has space for {case.layers} of {requested.layers} layers.")
    result = bench(case, arguments)
    show(result, case)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
