"""msModelSlim 26.1.0 and vlqc side by side: the same checkpoint, inputs, sites and evaluator; accuracy and cost.

    python -m tools.bench.reference --checkpoint {outliers,tiny,smol,large} [--schemes static-m2-act1,...]
        [--seeds 0,1,2,3,4] [--shapes standard,deep,dead] [--json FILE] [--reference_env .reference] [--threads 1]
        [--option NAME=VALUE ...]

msModelSlim runs as its own example script for Qwen2.5-VL runs it, in an environment that this tool makes (see
`reference_environment.py`), on the CPU. Both sides get the same ready tensors. What they write is loaded by
`vlqc.load(folder, dtype=torch.float32)`: stored integers in integer arithmetic, float32 around them; it reads both
folders. Compared are the logits of the float model, also in float32. Every side of every run is a process of its own,
so that both are charged for their imports, loading and saving.

Nothing is ever tuned on the inputs that are evaluated: these differ from the calibration inputs in their seed, for the
tiny model in the renderings, for real text in the topics.

Exit status 1 if the two folders do not quantize the same layers with the same schemes.

"weights only" is the same folder with its activations left float: no choice of activation scales can do better than
that. "plain 8-bit weights" is the float checkpoint with rounded weights, without smoothing.
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
REFERENCE, OURS = SIDES = ("msModelSlim", "vlqc")
FLOOR = "plain 8-bit weights"

LOW_BIT = {"w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False, "act_method": 1}
SCHEMES: dict[str, dict[str, Any]] = {
    "static-m2-act1": {"act_method": 1},
    "static-m2-act2": {},
    "static-m2-act2-shift": {"shift": True},  # which msModelSlim has for other models only: it runs without
    "static-m4-act1": {"anti_method": "m4", "act_method": 1},
    "static-m4-act2": {"anti_method": "m4"},
    "dynamic-m2": {"is_dynamic": True},
    "w4a8-m2": {**LOW_BIT, "w4a8_scope": "all"},
    "w4a8-m4": {**LOW_BIT, "w4a8_scope": "all", "anti_method": "m4"},
    "static-none-act1": {"anti_method": "none", "act_method": 1},
    "static-none-act2": {"anti_method": "none"},
}
# What msModelSlim's script cannot be asked for: vlqc runs alone. Every linear but lm_head; the LLM's down_proj beside
# the usual sites; four bits in groups that engines prefer; the cheapest set of groups for a given SQNR.
OURS_ONLY: dict[str, dict[str, Any]] = {
    "static-m2-all": {"fallback": "none"},
    "static-m2-down": {"include": ["model.layers.*.mlp.down_proj"]},
    "w4a8-m2-g64": {**LOW_BIT, "group_size": 64},
    "w4a8-m2-g64-all": {**LOW_BIT, "group_size": 64, "w4a8_scope": "all"},
    "static-m2-auto": {"fallback": "auto", "min_sqnr": 30},
}
COST_SCHEMES = ("static-m2-act2", "static-m4-act2")  # of the large checkpoint, where msModelSlim takes its time


@dataclass(frozen=True)
class Row:
    """One run. side: a side or FLOOR, which costs nothing. accuracy in percent; perplexity relative to float;
    weights_only: SQNR in dB with float activations."""

    case: str
    seed: int
    scheme: str
    side: str
    agreement: metrics.Agreement
    accuracy: float | None = None
    perplexity: float | None = None
    weights_only: float | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class Float:
    """The float model's logits, and its own loss in nats and accuracy in percent."""

    logits: list[Tensor]
    loss: float
    accuracy: float | None


class DifferentSites(Exception):
    """The two folders do not quantize the same layers; one line each."""


@dataclass(frozen=True)
class Bench:
    """Where both sides run. options: extra options of vlqc."""

    python: Path
    folder: Path
    threads: int
    options: dict[str, str]

    def rows(self, case: cases.Case, schemes: list[str]) -> Iterator[Row]:
        """Both sides of every scheme, as soon as they are known. DifferentSites, CommandFailed."""
        model = load_float(case.folder)
        reference = measure_float(case, model)
        inputs = self.folder / "inputs.pt"
        torch.save(case.calibration, inputs)
        layers: dict[str, str] = {}  # of the first scheme: what the floor rounds
        for scheme in schemes:
            folders, rows = {}, []
            for side in (OURS,) if scheme in OURS_ONLY else SIDES:
                folders[side] = save = self.folder / side
                usage = self.quantize(side, case, inputs, save, scheme)
                rows.append(evaluate(case, reference, save, scheme, side, usage))
            found = [metrics.sites_of(metrics.description_of(written)) for written in folders.values()]
            if different := metrics.different_sites(found[0], found[-1]):
                raise DifferentSites(f"{case.name}, {scheme}: {REFERENCE} against {OURS}\n" + "\n".join(different))
            layers = layers or found[-1]
            yield from rows
        rounded = metrics.round_weights(model, layers)
        yield Row(case.name, case.seed, FLOOR, FLOOR, *score(case, reference, rounded))

    def quantize(self, side: str, case: cases.Case, inputs: Path, save: Path, scheme: str) -> Usage:
        """Runs one side into the folder `save`, which is made anew."""
        shutil.rmtree(save, ignore_errors=True)
        options = {
            "group_size": case.group_size,
            **{**SCHEMES, **OURS_ONLY}[scheme],
            **(self.options if side == OURS else {}),
        }
        python = self.python if side == REFERENCE else Path(sys.executable)
        environment = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment["PYTHONPATH"] = str(ROOT) if side == OURS else ""
        command = [str(python), str(RUNNER), side.lower(), str(case.folder), str(inputs), str(save)]
        return measured([*command, json.dumps(options)], environment)


def load_float(folder: Path) -> nn.Module:
    """The checkpoint in float32."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model: nn.Module = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    return model.float().eval()


def measure_float(case: cases.Case, model: nn.Module) -> Float:
    """What the float model says to the unseen inputs."""
    logits = metrics.logits_of(model, case.unseen)
    loss = metrics.agreement(logits, logits, [sample["input_ids"] for sample in case.unseen]).loss
    return Float(logits, loss, case.accuracy(model) if case.accuracy else None)


def score(case: cases.Case, reference: Float, model: nn.Module) -> tuple[metrics.Agreement, float | None, float | None]:
    """Agreement with float, accuracy in percent and perplexity relative to float, None where they mean nothing."""
    found = metrics.model_agreement(reference.logits, model, case.unseen)
    perplexity = float(torch.tensor(found.loss - reference.loss).exp()) if case.text else None
    return found, case.accuracy(model) if case.accuracy else None, perplexity


def evaluate(case: cases.Case, reference: Float, save: Path, scheme: str, side: str, usage: Usage) -> Row:
    """Loads a written folder and compares it."""
    model = vlqc.load(save, dtype=torch.float32)
    figures = score(case, reference, model)
    alone = metrics.model_agreement(reference.logits, metrics.without_activation_rounding(model), case.unseen)
    return Row(case.name, case.seed, scheme, side, *figures, weights_only=alone.sqnr, usage=usage)


def cases_of(options: argparse.Namespace, python: Path, folder: Path) -> Iterator[cases.Case]:
    """The checkpoints that the command line asks for, one at a time."""
    if options.checkpoint == "outliers":
        yield from cases.outlier_cases(folder, options.seeds, options.shapes)
    elif options.checkpoint == "tiny":
        yield from cases.tiny_cases(folder, options.seeds)
    elif options.checkpoint == "smol":
        yield cases.smol_case(folder, python)
    else:
        yield cases.large_case(folder, options.seeds[0])


def chosen(text: str, known: list[str]) -> list[str]:
    """Names separated by commas -> those names. ArgumentTypeError for one that is not known."""
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: known are {', '.join(known)}")
    return names


def named_value(text: str) -> tuple[str, str]:
    """ "NAME=VALUE" -> both."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    return name, value


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="msModelSlim and vlqc side by side: accuracy and cost.")
    parser.add_argument("--checkpoint", choices=("outliers", "tiny", "smol", "large"), default="outliers")
    parser.add_argument(
        "--schemes", type=lambda text: chosen(text, [*SCHEMES, *OURS_ONLY]), help=", ".join([*SCHEMES, *OURS_ONLY])
    )
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2, 3, 4])
    parser.add_argument("--shapes", type=lambda text: chosen(text, list(cases.SHAPES)), default=["standard"])
    parser.add_argument("--json", type=Path, help="also write every run as JSON")
    parser.add_argument(
        "--reference_env", type=Path, default=ROOT / ".reference", help="where msModelSlim is installed"
    )
    parser.add_argument("--threads", type=int, default=1, help="of both sides")
    parser.add_argument("--option", type=named_value, action="append", default=[], help="NAME=VALUE, for vlqc alone")
    options = parser.parse_args(arguments)
    options.schemes = options.schemes or list(COST_SCHEMES if options.checkpoint == "large" else SCHEMES)
    return options


def main() -> int:
    """Runs, prints a line per run, then the table."""
    options = parsed()
    torch.set_num_threads(options.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer would warn of every process that is started
    python = reference_python(options.reference_env, with_weights=options.checkpoint == "smol").absolute()
    rows: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as temporary:
            bench = Bench(python, Path(temporary), options.threads, dict(options.option))
            for case in cases_of(options, python, Path(temporary)):
                for row in bench.rows(case, options.schemes):
                    print(
                        f"{row.case}, seed {row.seed}: {row.scheme}, {row.side}: {row.agreement.sqnr:.2f} dB",
                        flush=True,
                    )
                    rows.append(asdict(row))
                    if options.json:  # after every row: a run takes long, and may be ended before its time
                        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
                shutil.rmtree(case.folder)
    except (DifferentSites, CommandFailed) as error:
        print(error, file=sys.stderr)
        return 1
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
