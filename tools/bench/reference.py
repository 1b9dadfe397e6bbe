"""Compares msModelSlim 26.1.0 and vlqc on the same checkpoint, inputs, layers and evaluator: accuracy and cost.

    python -m tools.bench.reference --checkpoint {outliers,tiny,smol,large} [--schemes static-m2-act1,...]
        [--seeds 0,1,2,3,4] [--shapes standard,deep,dead] [--json FILE] [--reference_env .reference] [--threads 1]
        [--option NAME=VALUE ...]

msModelSlim runs as in its example script for Qwen2.5-VL, on the CPU, in an environment that this script creates (see
`reference_environment.py`). Both tools get the same input tensors. Both folders are loaded by
`vlqc.load(folder, dtype=torch.float32)`: stored integers in integer arithmetic, float32 elsewhere; the logits are
compared with those of the float model in float32. Each tool runs in a new process, so that imports, loading and saving
are included in its cost.

Evaluation inputs are never calibration inputs: they differ in their seed, for the tiny model in the renderings, for
real text in the topics.

Exit status 1 if the two folders do not quantize the same layers with the same schemes.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vlqc
from tools.bench import metrics
from tools.bench import reference_cases as cases
from tools.bench.process import CommandFailed, Usage, measured
from tools.bench.reference_environment import reference_python
from tools.bench.reference_table import show

ROOT = Path(__file__).parents[2]
RUNNER = ROOT / "tools" / "bench" / "reference_runner.py"
MSMODELSLIM, VLQC = TOOLS = ("msModelSlim", "vlqc")
FLOOR = "plain 8-bit weights"

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
COST_SCHEMES = ("static-m2-act2", "static-m4-act2")  # of the large checkpoint


@dataclass(frozen=True)
class Row:
    """Result of one run. tool: one of TOOLS, or FLOOR, which has no usage. accuracy in percent; perplexity relative to
    float; weights_only: SQNR in dB with float activations."""

    case: str
    seed: int
    scheme: str
    tool: str
    agreement: metrics.Agreement
    accuracy: float | None = None
    perplexity: float | None = None
    weights_only: float | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class Float:
    """Logits of the float model, its loss in nats and its accuracy in percent."""

    logits: list[Tensor]
    loss: float
    accuracy: float | None


class DifferentSites(Exception):
    """The two folders do not quantize the same layers; one line per layer."""


@dataclass(frozen=True)
class Bench:
    """Environment of the runs. python: interpreter with msModelSlim; options: additional options of vlqc."""

    python: Path
    folder: Path
    threads: int
    options: dict[str, str]

    def rows(self, case: cases.Case, schemes: list[str]) -> Iterator[Row]:
        """Results of both tools for each scheme, as they finish. Raises DifferentSites, CommandFailed."""
        model = load_float(case.folder)
        reference = measure_float(case, model)
        inputs = self.folder / "inputs.pt"
        torch.save(case.calibration, inputs)
        layers: dict[str, str] = {}  # of the first scheme; FLOOR rounds the same layers
        for scheme in schemes:
            folders, rows = {}, []
            for tool in (VLQC,) if scheme in VLQC_ONLY else TOOLS:
                folders[tool] = save = self.folder / tool
                usage = self.quantize(tool, case, inputs, save, scheme)
                rows.append(evaluate(case, reference, save, scheme, tool, usage))
            sites = [metrics.sites_of(metrics.description_of(folder)) for folder in folders.values()]
            if different := metrics.different_sites(sites[0], sites[-1]):
                raise DifferentSites(f"{case.name}, {scheme}: {MSMODELSLIM} against {VLQC}\n" + "\n".join(different))
            layers = layers or sites[-1]
            yield from rows
        rounded = metrics.round_weights(model, layers)
        yield Row(case.name, case.seed, FLOOR, FLOOR, *score(case, reference, rounded))

    def quantize(self, tool: str, case: cases.Case, inputs: Path, save: Path, scheme: str) -> Usage:
        """Runs one tool, which writes the folder `save`; an existing folder is replaced."""
        shutil.rmtree(save, ignore_errors=True)
        options = {
            "group_size": case.group_size,
            **{**SCHEMES, **VLQC_ONLY}[scheme],
            **(self.options if tool == VLQC else {}),
        }
        python = self.python if tool == MSMODELSLIM else Path(sys.executable)
        environment = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment["PYTHONPATH"] = str(ROOT) if tool == VLQC else ""
        command = [str(python), str(RUNNER), tool.lower(), str(case.folder), str(inputs), str(save)]
        return measured([*command, json.dumps(options)], environment)


def load_float(folder: Path) -> nn.Module:
    """The checkpoint in float32."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model: nn.Module = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
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
    """The checkpoints of --checkpoint, --seeds and --shapes, one at a time."""
    if options.checkpoint == "outliers":
        yield from cases.outlier_cases(folder, options.seeds, options.shapes)
    elif options.checkpoint == "tiny":
        yield from cases.tiny_cases(folder, options.seeds)
    elif options.checkpoint == "smol":
        yield cases.smol_case(folder, python)
    else:
        yield cases.large_case(folder, options.seeds[0])


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
    parser.add_argument("--checkpoint", choices=("outliers", "tiny", "smol", "large"), default="outliers")
    parser.add_argument(
        "--schemes", type=lambda text: names_of(text, [*SCHEMES, *VLQC_ONLY]), help=", ".join([*SCHEMES, *VLQC_ONLY])
    )
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2, 3, 4])
    parser.add_argument("--shapes", type=lambda text: names_of(text, list(cases.SHAPES)), default=["standard"])
    parser.add_argument("--json", type=Path, help="also write all results to this file")
    parser.add_argument("--reference_env", type=Path, default=ROOT / ".reference", help="environment of msModelSlim")
    parser.add_argument("--threads", type=int, default=1, help="number of threads of both tools")
    parser.add_argument("--option", type=named_value, action="append", default=[], help="NAME=VALUE, an option of vlqc")
    options = parser.parse_args(arguments)
    options.schemes = options.schemes or list(COST_SCHEMES if options.checkpoint == "large" else SCHEMES)
    return options


def main() -> int:
    """Entry point: prints a line per run, then the table."""
    options = parsed()
    torch.set_num_threads(options.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # otherwise the tokenizer warns for each new process
    python = reference_python(options.reference_env, with_weights=options.checkpoint == "smol").absolute()
    rows: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as temporary:
            bench = Bench(python, Path(temporary), options.threads, dict(options.option))
            for case in cases_of(options, python, Path(temporary)):
                for row in bench.rows(case, options.schemes):
                    print(
                        f"{row.case}, seed {row.seed}: {row.scheme}, {row.tool}: {row.agreement.sqnr:.2f} dB",
                        flush=True,
                    )
                    rows.append(asdict(row))
                    if options.json:  # after each row, as a run takes long and may be interrupted
                        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
                shutil.rmtree(case.folder)
    except (DifferentSites, CommandFailed) as error:
        print(error, file=sys.stderr)
        return 1
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
