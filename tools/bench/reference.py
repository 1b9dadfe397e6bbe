"""Compares msModelSlim 26.1.0 and vlqc on the same checkpoint, inputs, layers and evaluator: accuracy and cost.

    python -m tools.bench.reference [--checkpoint outliers,tiny,smol,large,qwen2-vl,qwen3-vl]
        [--schemes static-m2-act1,...] [--seeds 0,1,2,3,4] [--shapes standard,deep,dead] [--rotate none,auto]
        [--json FILE] [--known_json FILE] [--reference_env .reference] [--threads 1] [--option NAME=VALUE ...]

msModelSlim runs as in its example script for Qwen2.5-VL, on the CPU, in an environment that this script creates (see
`reference_environment.py`). Both tools get the same input tensors. Both folders are loaded by
`vlqc.load(folder, dtype=torch.float32)`: stored integers in integer arithmetic, float32 elsewhere; the logits are
compared with those of the float model in float32. Each tool runs in a new process, so that imports, loading and saving
are included in its cost. vlqc runs once for each value of --rotate.

--known_json: results of msModelSlim from a file that --json wrote, so that only vlqc runs. A result is used again only
if weights, inputs and options are the same, and its quantized layers are compared with those of vlqc.

qwen3-vl requires an overlay with transformers 4.57 in PYTHONPATH, which both tools then use. The example script does
not know the model: its m4 raises "the config of model must have num_attention_heads, n_head or num_heads", its m2 finds
no norm to smooth. In its place runs msModelSlim's recipe for Qwen3-VL (rotation, smoothing, W8A8 static with min-max),
on the same inputs and in float32; there is none for the other schemes. For qwen2-vl the script runs, with an adapter to
the transformers version (`reference_runner.py`).

Evaluation inputs are never calibration inputs: they differ in their seed, for the tiny model in the renderings, for
real text in the topics.

Exit status 1 if the folders do not quantize the same layers with the same schemes.

"weights only": the same folder with float activations, an upper bound for any choice of activation scales. "plain 8-bit
weights": the float checkpoint with rounded weights, without smoothing.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vlqc
from tools.bench import metrics
from tools.bench import reference_cases as cases
from tools.bench.process import CommandFailed, Usage, measured
from tools.bench.reference_environment import reference_python
from tools.bench.reference_rows import (
    FLOOR,
    MSMODELSLIM,
    VLQC,
    KnownRows,
    Row,
    digest_of,
    read_rows,
    source_of,
    write_rows,
)
from tools.bench.reference_table import show

ROOT = Path(__file__).parents[2]
RUNNER = ROOT / "tools" / "bench" / "reference_runner.py"

LOW_BIT = {"w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False, "act_method": 1}
SCHEMES: dict[str, dict[str, Any]] = {
    "static-m2-act1": {"act_method": 1},
    "static-m2-act2": {},
    "static-m2-act2-shift": {"shift": True},  # msModelSlim has it for other models only, and runs without
    "static-m4-act1": {"anti_method": "m4", "act_method": 1},
    "static-m4-act2": {"anti_method": "m4"},
    "dynamic-m2": {"is_dynamic": True},
    "w4a8-m2": {**LOW_BIT, "w4a8_scope": "all"},
    "w4a8-m4": {**LOW_BIT, "w4a8_scope": "all", "anti_method": "m4"},
    "static-none-act1": {"anti_method": "none", "act_method": 1},
    "static-none-act2": {"anti_method": "none"},
}
# Schemes without a counterpart in msModelSlim's script, run with vlqc only: all linear layers except lm_head; also the
# language model's down_proj; 4 bits in the group size of the engine; precision search for an SQNR.
VLQC_ONLY: dict[str, dict[str, Any]] = {
    "static-m2-all": {"fallback": "none"},
    "static-m2-down": {"include": ["model.layers.*.mlp.down_proj"]},
    "w4a8-m2-g64": {**LOW_BIT, "group_size": 64},
    "w4a8-m2-g64-all": {**LOW_BIT, "group_size": 64, "w4a8_scope": "all"},
    "static-m2-auto": {"fallback": "auto", "min_sqnr": 30},
}
CHECKPOINTS = ["outliers", "tiny", "smol", "large", *cases.FAMILIES]
ROTATIONS = ["none", "heads", "all", "auto"]
COST_SCHEMES = ("static-m2-act2", "static-m4-act2")  # of the large checkpoint


@dataclass(frozen=True)
class Float:
    """Logits of the float model, its loss in nats and its accuracy in percent."""

    logits: list[Tensor]
    loss: float
    accuracy: float | None


class DifferentSites(Exception):
    """The two folders do not quantize the same layers; one line per layer."""


@dataclass(frozen=True)
class Run:
    """One tool; rotate: the option of vlqc, None for msModelSlim."""

    tool: str
    rotate: str | None = None


@dataclass(frozen=True)
class Bench:
    """Environment of the runs.

    python: interpreter with msModelSlim; rotations: values of vlqc's option `rotate`, a run for each; options:
    additional options of vlqc; known: rows that are not measured again.
    """

    python: Path
    folder: Path
    threads: int
    rotations: list[str]
    options: dict[str, str]
    known: KnownRows

    def rows(self, case: cases.Case, schemes: list[str]) -> Iterator[Row]:
        """Results of both tools for each scheme, as they finish. Raises DifferentSites, CommandFailed."""
        reference = measure_float(case, load_float(case.folder))
        torch.save(case.calibration, self.folder / "inputs.pt")
        digest = digest_of(case)
        layers: dict[str, str] = {}  # of the first scheme; FLOOR rounds the same layers
        for scheme in schemes:
            rows = [self.row(run, case, reference, scheme, digest) for run in self.runs(case, scheme)]
            for row in rows[1:]:
                check_sites(rows[0], row)
            layers = layers or rows[0].sites
            yield from rows
        yield self.floor(case, reference, layers, digest)

    def runs(self, case: cases.Case, scheme: str) -> list[Run]:
        """The runs of a scheme, in the order of the table."""
        has_reference = scheme == cases.RECIPE_SCHEME if case.has_recipe else scheme not in VLQC_ONLY
        rotated = [Run(VLQC, rotate) for rotate in self.rotations]
        return [Run(MSMODELSLIM), *rotated] if has_reference else rotated

    def row(self, run: Run, case: cases.Case, reference: Float, scheme: str, digest: int) -> Row:
        """The result of one run: a known one, or compiled and evaluated."""
        options = {"group_size": case.group_size, **{**SCHEMES, **VLQC_ONLY}[scheme]}
        if run.tool == VLQC:
            options |= {"rotate": run.rotate, **self.options}
        source = source_of(digest, options)
        if known := self.known.find(run.tool, case, scheme, source):
            return known
        save = self.folder / run.tool
        usage = self.quantize(run.tool, case, save, options)
        row = evaluate(case, reference, save, scheme, run.tool, usage)
        return replace(row, rotate=run.rotate, sites=metrics.sites_of(metrics.description_of(save)), source=source)

    def floor(self, case: cases.Case, reference: Float, layers: dict[str, str], digest: int) -> Row:
        """The result with the weights of these layers rounded."""
        source = source_of(digest, {"layers": sorted(layers)})
        if known := self.known.find(FLOOR, case, FLOOR, source):
            return known
        rounded = metrics.round_weights(load_float(case.folder), layers)
        scores = score(case, reference, rounded)
        return Row(case.name, case.seed, FLOOR, FLOOR, *scores, sites=dict(layers), source=source)

    def quantize(self, tool: str, case: cases.Case, save: Path, options: dict[str, Any]) -> Usage:
        """Runs one tool, which writes the folder `save`; an existing folder is replaced."""
        shutil.rmtree(save, ignore_errors=True)
        python = self.python if tool == MSMODELSLIM else Path(sys.executable)
        environment = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment["PYTHONPATH"] = import_path(tool, case)
        command = [str(python), str(RUNNER), tool.lower(), str(case.folder), str(self.folder / "inputs.pt"), str(save)]
        return measured([*command, json.dumps(options)], environment)


def import_path(tool: str, case: cases.Case) -> str:
    """PYTHONPATH of a tool, with this process's transformers; msModelSlim has its own, except for a recipe."""
    import transformers

    overlay = str(Path(transformers.__file__).parents[1])
    if tool == VLQC:
        return os.pathsep.join([str(ROOT), overlay])
    return overlay if case.has_recipe else ""


def check_sites(first: Row, second: Row) -> None:
    """Raises DifferentSites if the two folders do not quantize the same layers."""
    if different := metrics.different_sites(first.sites, second.sites):
        both = f"{first.case}, {first.scheme}: {first.label} against {second.label}"
        raise DifferentSites("\n".join([both, *different]))


def load_float(folder: Path) -> nn.Module:
    """The checkpoint in float32."""
    import transformers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model: nn.Module = getattr(transformers, config["architectures"][0]).from_pretrained(folder)
    return model.float().eval()


def measure_float(case: cases.Case, model: nn.Module) -> Float:
    """Logits, loss and accuracy of the float model on the evaluation inputs."""
    logits = metrics.logits_of(model, case.evaluation)
    loss = metrics.agreement(logits, logits, [sample["input_ids"] for sample in case.evaluation]).loss
    return Float(logits, loss, case.accuracy(model) if case.accuracy else None)


def score(case: cases.Case, reference: Float, model: nn.Module) -> tuple[metrics.Agreement, float | None, float | None]:
    """Agreement with float, accuracy in percent and perplexity relative to float; None where not applicable."""
    result = metrics.model_agreement(reference.logits, model, case.evaluation)
    perplexity = float(torch.tensor(result.loss - reference.loss).exp()) if case.text else None
    return result, case.accuracy(model) if case.accuracy else None, perplexity


def evaluate(case: cases.Case, reference: Float, save: Path, scheme: str, tool: str, usage: Usage) -> Row:
    """Loads and evaluates a compiled folder."""
    model = vlqc.load(save, dtype=torch.float32)
    scores = score(case, reference, model)
    weights_only = metrics.model_agreement(
        reference.logits, metrics.without_activation_rounding(model), case.evaluation
    )
    return Row(case.name, case.seed, scheme, tool, *scores, weights_only=weights_only.sqnr, usage=usage)


def cases_of(options: argparse.Namespace, python: Path, folder: Path) -> Iterator[cases.Case]:
    """The checkpoints of --checkpoint, --seeds and --shapes, one at a time; one seed of those that take long."""
    first = options.seeds[0]
    for name in options.checkpoint:
        if name == "outliers":
            yield from cases.outlier_cases(folder, options.seeds, options.shapes)
        elif name == "tiny":
            yield from cases.tiny_cases(folder, options.seeds)
        elif name == "smol":
            yield cases.smol_case(folder, python)
        elif name == "large":
            yield cases.large_case(folder, first)
        else:
            yield cases.family_case(folder, name, first)


def names_of(text: str, choices: list[str]) -> list[str]:
    """Comma-separated names -> list. Raises ArgumentTypeError for a name that is not one of the choices."""
    names = text.split(",")
    if unknown := [name for name in names if name not in choices]:
        raise argparse.ArgumentTypeError(f"unknown name {', '.join(unknown)}; choose from {', '.join(choices)}")
    return names


def named_value(text: str) -> tuple[str, str]:
    """ "NAME=VALUE" -> both."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    return name, value


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Compare accuracy and cost of msModelSlim and vlqc.")
    parser.add_argument(
        "--checkpoint", type=lambda text: names_of(text, CHECKPOINTS), default=["outliers"], help=", ".join(CHECKPOINTS)
    )
    parser.add_argument(
        "--schemes", type=lambda text: names_of(text, [*SCHEMES, *VLQC_ONLY]), help=", ".join([*SCHEMES, *VLQC_ONLY])
    )
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2, 3, 4])
    parser.add_argument("--shapes", type=lambda text: names_of(text, list(cases.SHAPES)), default=["standard"])
    parser.add_argument(
        "--rotate", type=lambda text: names_of(text, ROTATIONS), default=["none", "auto"], help=", ".join(ROTATIONS)
    )
    parser.add_argument("--json", type=Path, help="also write all results to this file")
    parser.add_argument("--known_json", type=Path, help="file of --json, whose rows of msModelSlim are used again")
    parser.add_argument("--reference_env", type=Path, default=ROOT / ".reference", help="environment of msModelSlim")
    parser.add_argument("--threads", type=int, default=1, help="number of threads of both tools")
    parser.add_argument("--option", type=named_value, action="append", default=[], help="NAME=VALUE, an option of vlqc")
    options = parser.parse_args(arguments)
    options.schemes = options.schemes or list(COST_SCHEMES if options.checkpoint == ["large"] else SCHEMES)
    return options


def main() -> int:
    """Entry point: prints a line per run, then the table."""
    options = parsed()
    torch.set_num_threads(options.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # otherwise the tokenizer warns for each new process
    python = reference_python(options.reference_env, with_weights="smol" in options.checkpoint).absolute()
    known = KnownRows(read_rows(options.known_json) if options.known_json else [])
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            bench = Bench(python, folder, options.threads, options.rotate, dict(options.option), known)
            for case in cases_of(options, python, folder):
                for row in bench.rows(case, options.schemes):
                    print(
                        f"{row.case}, seed {row.seed}: {row.scheme}, {row.label}: {row.agreement.sqnr:.2f} dB",
                        flush=True,
                    )
                    rows.append(row)
                    if options.json:  # after each row, as a run takes long and may be interrupted
                        write_rows(options.json, rows)
                shutil.rmtree(case.folder)
    except (DifferentSites, CommandFailed) as error:
        print(error, file=sys.stderr)
        return 1
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
