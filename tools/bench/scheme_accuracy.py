"""Accuracy and size of every scheme, with and without rotations, and with an int8 key-value cache.

    python -m tools.bench.scheme_accuracy [--rotate none,auto] [--seeds 0] [--compilations W8A8,...] [--json FILE]
        [--known_json FILE] [--weights .weights]

Two kinds of checkpoints in bfloat16 are compiled: random ones with outliers in both towers, one per seed, whose logits
are compared with those of the float model; and the weights of SmolLM2-135M as the decoder of a Qwen2.5-VL, whose
perplexity on texts is also compared. Calibration and evaluation share no inputs. A folder with an int8 cache is
measured as it is, with all keys and values rounded, and with float ones. Layers with two kinds of arithmetic are
measured with each.

The size is that of the weight file relative to the source, also for the shapes of Qwen2.5-VL-7B, without compiling it;
only a compilation knows which layers `--fallback auto` selects.
"""

import argparse
import itertools
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import nn

import vlqc
from tools.bench import metrics, scale_checkpoint
from tools.bench import reference_cases as cases
from tools.bench.reference import Float, load_float, measure_float, names_of, score
from tools.bench.reference_environment import weight_packages
from vlqc.errors import UserError
from vlqc.kernels_ref.quant_linear import MixQuantLinear
from vlqc.options.options import Options
from vlqc.reporting.plan import plan_compilation

ROOT = Path(__file__).parents[2]
ROTATIONS = ("none", "auto")
COUNTS = (6, 8)  # excerpts of SmolLM2's texts for calibration and evaluation, 256 tokens each
PLANNED = "7B"
DYNAMIC, STATIC = "dynamic", "static"


@dataclass(frozen=True)
class Compilation:
    """Options of a compilation.

    uses_data: whether it gets calibration samples, which an int8 cache needs; share: with `--fallback auto`, the
    maximum size of the result relative to the source.
    """

    options: Mapping[str, Any]
    uses_data: bool = True
    share: float | None = None


COMPILATIONS = {
    "W8A8": Compilation({"scheme": "w8a8"}),
    "W8A8_DYNAMIC": Compilation({"scheme": "w8a8_dynamic"}),
    "W8A8_MIX": Compilation({"scheme": "w8a8_mix"}),
    "W8A16 from weights": Compilation({"scheme": "w8a16"}, uses_data=False),
    "W8A16": Compilation({"scheme": "w8a16"}),
    "W4A8 group 64": Compilation({"scheme": "w4a8", "open_outlier": False}),
    "W8A8 with W8A16": Compilation({"scheme": "w8a8", "float_as": "w8a16"}),
    "W8A8_DYNAMIC with W8A16": Compilation({"scheme": "w8a8_dynamic", "float_as": "w8a16"}),
    "auto 75 %": Compilation({}, share=0.75),
    "auto 70 %": Compilation({}, share=0.70),
}


@dataclass(frozen=True)
class Row:
    """One measured model.

    arithmetic: DYNAMIC or STATIC of layers that have both, otherwise ""; cache: whether keys and values are int8; sqnr:
    of the logits, dB; kl: mean KL(float || quantized) of the next token in nats; perplexity: relative to float, None
    without texts; size: of the weights relative to the source.
    """

    checkpoint: str
    seed: int
    compilation: str
    rotate: str
    arithmetic: str
    cache: bool
    sqnr: float
    kl: float
    perplexity: float | None
    size: float

    @property
    def label(self) -> str:
        """Compilation, arithmetic and cache as text."""
        arithmetic = f" run as {self.arithmetic}" if self.arithmetic else ""
        return f"{self.compilation}{arithmetic}{' + int8 cache' if self.cache else ''}"


@dataclass
class Bench:
    """The runs: names of COMPILATIONS, rotations, a folder for the results. known: rows not to be measured again.
    refused: messages of those that vlqc does not compile, by name."""

    compilations: list[str]
    rotations: list[str]
    folder: Path
    known: list[Row] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def rows(self, case: cases.Case) -> Iterator[Row]:
        """The rows of a checkpoint, as they are measured."""
        reference = self.float_of(case)
        for compilation, rotate in itertools.product(self.compilations, self.rotations):
            run = (case.name, case.seed, compilation, rotate)
            known = [row for row in self.known if (row.checkpoint, row.seed, row.compilation, row.rotate) == run]
            yield from known or self.measured(case, reference, compilation, rotate)

    def float_of(self, case: cases.Case) -> Float:
        """The float model's results."""
        return measure_float(case, load_float(case.folder))

    def measured(self, case: cases.Case, reference: Float, name: str, rotate: str) -> Iterator[Row]:
        """The rows of one compilation."""
        compilation, save = COMPILATIONS[name], self.folder / f"{name}, {rotate}"
        source = weight_bytes(case.folder)
        options = {**compilation.options, "rotate": rotate, "target": "vllm-ascend"}
        if compilation.share is not None:
            options |= {"fallback": "auto", "max_bytes": int(compilation.share * source)}
        if compilation.uses_data and self.has_cache(name, options):
            options |= {"kv_cache": "int8"}
        samples = case.calibration if compilation.uses_data else None
        try:
            vlqc.compile(model_path=case.folder, save_directory=save, overwrite=True, samples=samples, **options)
        except UserError as error:
            self.refused[f"{name}, {case.name}, --rotate {rotate}"] = str(error)
            return
        size = weight_bytes(save) / source
        for cache, arithmetic, model in variants(vlqc.load(save)):
            agreement, _, perplexity = score(case, reference, model)
            run = (case.name, case.seed, name, rotate, arithmetic, cache)
            yield Row(*run, agreement.sqnr, agreement.kl, perplexity, size)
        shutil.rmtree(save)

    def has_cache(self, name: str, options: Mapping[str, Any]) -> bool:
        """Whether these options allow an int8 cache."""
        try:
            Options.without_paths(**options, kv_cache="int8")
        except UserError as error:
            self.refused[f"{name} + int8 cache"] = str(error)
            return False
        return True


def variants(model: nn.Module) -> Iterator[tuple[bool, str, nn.Module]]:
    """(whether keys and values are int8, arithmetic, the model with these) for all that it has; changes it in place."""
    both = [layer for layer in model.modules() if isinstance(layer, MixQuantLinear)]
    for cache in (True, False) if metrics.has_quantized_cache(model) else (False,):
        model = model if cache else metrics.with_float_cache(model)
        for arithmetic in (DYNAMIC, STATIC) if both else ("",):
            for layer in both:
                layer.static_input = arithmetic == STATIC
            yield cache, arithmetic, model


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def planned_sizes(compilations: list[str], folder: Path) -> dict[str, float]:
    """Name -> size of the result for a checkpoint with the shapes of PLANNED, relative to it, where a plan knows it."""
    case = scale_checkpoint.Case.of(PLANNED)
    scale_checkpoint.make(folder, case, values=False)
    samples, sizes = scale_checkpoint.samples_of(case.config, 1, 64), {}
    for name in compilations:
        if COMPILATIONS[name].share is None:
            plan = plan_compilation(model_path=folder, samples=samples, rotate="none", **COMPILATIONS[name].options)
            sizes[name] = plan.bytes_after / plan.bytes_before
    return sizes


def cases_of(seeds: list[int], packages: Path, folder: Path) -> Iterator[cases.Case]:
    """The checkpoints, one at a time."""
    yield from cases.outlier_cases(folder, seeds, ["standard"])
    yield cases.smol_case(folder, Path(sys.executable), packages, COUNTS, "bfloat16")


def show(rows: list[Row], planned: Mapping[str, float], console: Console) -> None:
    """Prints a row per compilation, arithmetic and cache, with medians over the seeds per checkpoint and rotation."""
    rotations = list(dict.fromkeys(row.rotate for row in rows))
    checkpoints = list(dict.fromkeys(row.checkpoint for row in rows))
    texts = [name for name in checkpoints if any(row.perplexity for row in rows if row.checkpoint == name)]
    columns = [(name, rotate, "sqnr", "dB", "{:.1f}") for name in checkpoints for rotate in rotations]
    columns += [(name, rotate, "kl", "KL", "{:.2g}") for name in texts for rotate in rotations]
    columns += [(name, rotate, "perplexity", "perplexity", "{:.4f}") for name in texts for rotate in rotations]
    columns += [(name, rotations[-1], "size", "size", "{:.1%}") for name in checkpoints]
    titles = [f"{name}\n{title}, {rotate}" for name, rotate, _, title, _ in columns]
    table = Table(
        Column("compilation", no_wrap=True), *(Column(title, justify="right") for title in titles), f"{PLANNED}\nsize"
    )
    order = list(COMPILATIONS)
    labels = sorted({(order.index(row.compilation), row.cache, row.arithmetic, row.label) for row in rows})
    for compilation, label in ((order[each[0]], each[-1]) for each in labels):
        of_label = [row for row in rows if row.label == label]
        cells = []
        for name, rotate, value, _, form in columns:
            found = [getattr(row, value) for row in of_label if (row.checkpoint, row.rotate) == (name, rotate)]
            known = [each for each in found if each is not None]
            cells.append(form.format(statistics.median(known)) if known else "")
        table.add_row(label, *cells, f"{planned[compilation]:.1%}" if compilation in planned else "")
    console.print(table)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Accuracy and size of every scheme.")
    parser.add_argument(
        "--compilations", type=lambda text: names_of(text, list(COMPILATIONS)), default=list(COMPILATIONS)
    )
    parser.add_argument("--rotate", type=lambda text: names_of(text, list(ROTATIONS)), default=list(ROTATIONS))
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--weights", type=Path, default=ROOT / ".weights", help="folder of the weights' packages")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--known_json", type=Path, help="file of --json, whose rows are not measured again")
    return parser.parse_args(arguments)


def main() -> int:
    """Entry point: prints a line per row, then the table."""
    options = parsed()
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        known = json.loads(options.known_json.read_text(encoding="utf-8")) if options.known_json else []
        bench = Bench(options.compilations, options.rotate, folder, [Row(**each) for each in known])
        planned = planned_sizes(options.compilations, folder / PLANNED)
        for case in cases_of(options.seeds, weight_packages(options.weights), folder):
            for row in bench.rows(case):
                print(
                    f"{row.checkpoint}, seed {row.seed}, --rotate {row.rotate}: {row.label}: {row.sqnr:.2f} dB",
                    flush=True,
                )
                rows.append(row)
                if options.json:
                    options.json.write_text(json.dumps([asdict(each) for each in rows], indent=1) + "\n")
    show(rows, planned, Console(width=None if sys.stdout.isatty() else 200))
    for compilation, message in bench.refused.items():
        print(f"{compilation}: {message}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
