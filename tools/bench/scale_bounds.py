"""Lower bounds for the time of each phase of a compilation: amounts of work divided by rates of the machine.

Rates are measured with the compilation's number of threads. Amounts of work are computed from the shapes.
"""

import math
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tools.bench.scale_checkpoint import MERGE, Case, tensor_shapes
from vlqc.ir.tensor_digest import fingerprint
from vlqc.passes.algorithms.error_model import MAX_INPUT_ROWS, MAX_WEIGHT_ROWS
from vlqc.passes.algorithms.hessian import COLUMNS_PER_BLOCK
from vlqc.passes.algorithms.weight_clipping import INT8_SHARES
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.smooth_m2 import BALANCE_EXPONENTS, SmoothM2

BLOCK = 4 << 20
CANDIDATES, CONFIRMED = 1 + len(BALANCE_EXPONENTS) * SmoothM2.candidates, 1 + SmoothM2.confirm
FACTORIZATIONS = 3  # of a Hessian, on average
MOST_KEPT, KEPT_BYTES = (
    InsertObservers.tokens,
    InsertObservers.megabytes << 20,
)  # rows of an input that are kept for searches
WINDOW = 64  # vision rows
ROWS_AT_A_TIME = 64


@dataclass(frozen=True)
class Rates:
    """read, write: bytes per second, disk; bfloat16, float32: FLOP/s, matrix products; others: values per second."""

    read: float
    write: float
    bfloat16: float
    float32: float
    rounding: float
    elementwise: float
    digest: float


def measured_rates(folder: Path, weights: Path, max_bytes: int = 1 << 30) -> Rates:
    """folder: on the disk of the result; weights: a file on the disk of the checkpoint."""
    side = 3584
    rows, weight = torch.randn(512, side), torch.randn(side, side)
    half_rows, half = rows.bfloat16(), weight.bfloat16()
    work = 2 * rows.numel() * side
    return Rates(
        _read_rate(weights, max_bytes),
        _write_rate(folder, max_bytes // 2),
        work / _seconds(lambda: half_rows @ half.T),
        work / _seconds(lambda: rows @ weight.T),
        weight.numel() / _seconds(lambda: _round(weight)),
        weight.numel() / _seconds(lambda: [part.mul_(1.0) for part in weight.split(ROWS_AT_A_TIME)]),
        weight.numel() / _seconds(lambda: fingerprint(weight)),
    )


def _round(weight: Tensor) -> None:
    """Rounds in place in the cache, without storing results."""
    buffer = torch.empty(ROWS_AT_A_TIME, weight.shape[1])
    for part in weight.split(ROWS_AT_A_TIME):
        torch.div(part, 0.01, out=buffer).round_().clamp_(-127, 127)


def _seconds(work: Callable[[], object], times: int = 3) -> float:
    """The shortest of several runs."""
    work()
    durations = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        durations.append(time.perf_counter() - started)
    return min(durations)


def _read_rate(file: Path, max_bytes: int) -> float:
    buffer = memoryview(bytearray(BLOCK))
    handle = os.open(file, os.O_RDONLY)
    try:
        size = min(max_bytes, file.stat().st_size)
        os.posix_fadvise(handle, 0, size, os.POSIX_FADV_DONTNEED)  # drop from the page cache
        started = time.perf_counter()
        for position in range(0, size, BLOCK):
            os.preadv(handle, [buffer], position)
        return size / (time.perf_counter() - started)
    finally:
        os.close(handle)


def _write_rate(folder: Path, size: int) -> float:
    path, block = folder / ".rate", os.urandom(BLOCK)
    started = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(size // BLOCK):
                file.write(block)
            os.fsync(file.fileno())
        return size / (time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)


def drop_from_page_cache(folder: Path) -> None:
    """Drops the weight files of a folder from the page cache."""
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


@dataclass(frozen=True)
class Work:
    """Minimal work. *_flops: matrix products; *_values: values read or written once."""

    read_bytes: int
    write_bytes: int
    forward_flops: float
    attention_flops: float
    proof_flops: float
    search_values: float
    search_flops: float
    weight_flops: float
    weight_values: float
    stage_values: float

    def bounds(self, rates: Rates) -> dict[str, float]:
        """Phase -> seconds."""
        return {
            "reading": self.read_bytes / rates.read,
            "forward": self.forward_flops / rates.bfloat16 + self.attention_flops / rates.float32,
            "proofs": self.proof_flops / rates.float32,
            "smoothing": self.search_values / rates.elementwise + self.search_flops / rates.float32,
            "weights": self.weight_flops / rates.float32 + len(INT8_SHARES) * self.weight_values / rates.rounding,
            "activation ranges": self.weight_values / rates.elementwise,
            "checks": 2 * self.stage_values / rates.digest,
            "writing": self.write_bytes / rates.write,
            "verifying": self.write_bytes / rates.read,
        }


def work_of(
    case: Case, samples: int, tokens: int, patches: int, written: int, proof_rows: int, quantized: Collection[str]
) -> Work:
    """tokens, patches: rows of one sample in the language model and in the vision tower; quantized: names of weights.

    Float layers take part in forwards and fold checks, but not in searches and rounding.
    """
    shapes = tensor_shapes(case)
    linears = linear_shapes(case)
    used, experts = case.shape.used_experts, case.shape.experts

    def rows(name: str) -> float:
        if ".experts." in name:
            return tokens * used / experts
        if "merger" in name:
            return patches // MERGE**2
        return patches if name.startswith(case.vision_prefix) else tokens

    chosen = {name: shape for name, shape in linears.items() if name in quantized}
    values = sum(math.prod(shape) for shape in chosen.values())
    forward = sum(2 * math.prod(shape) * rows(name) * samples for name, shape in linears.items())
    proofs = sum(2 * 2 * math.prod(shape) * min(rows(name), proof_rows) for name, shape in linears.items())
    shared = ("k_proj.weight", "v_proj.weight", "up_proj.weight")  # read the same input as another layer
    inputs = [shape[1] for name, shape in chosen.items() if not name.endswith(shared)]
    weight_flops = 0.0
    for outputs, columns in chosen.values():
        weight_flops += outputs * columns * min(columns, COLUMNS_PER_BLOCK)
    for columns in inputs:
        width, kept = min(columns, COLUMNS_PER_BLOCK), min(MOST_KEPT, KEPT_BYTES // (4 * columns), samples * tokens)
        weight_flops += columns / width * (width**2 * kept + (FACTORIZATIONS + 1) * width**3 / 3)
    return Work(
        read_bytes=2 * sum(math.prod(shape) for shape in shapes.values()),
        write_bytes=written,
        forward_flops=forward,
        attention_flops=_attention(case, samples, tokens, patches),
        proof_flops=proofs,
        search_values=CANDIDATES * MAX_WEIGHT_ROWS * sum(inputs),
        search_flops=CONFIRMED * 4.0 * MAX_WEIGHT_ROWS * MAX_INPUT_ROWS * sum(inputs),
        weight_flops=weight_flops,
        weight_values=values,
        stage_values=sum(math.prod(shape) for shape in linears.values()),
    )


def linear_shapes(case: Case) -> dict[str, tuple[int, int]]:
    """Name of the weight -> outputs and inputs of every linear layer but the output head; experts one by one."""
    linears: dict[str, tuple[int, int]] = {}
    for name, shape in tensor_shapes(case).items():
        if len(shape) == 3:
            experts, inputs, outputs = shape
            stem, _, kind = name.rpartition(".")
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
            for expert in range(experts):
                for part in parts:
                    linears[f"{stem}.{expert}.{part}.weight"] = (outputs // len(parts), inputs)
        elif len(shape) == 2 and not any(outside in name for outside in ("embed_tokens", "pos_embed", "lm_head")):
            linears[name] = (shape[0], shape[1])
    return linears


def _attention(case: Case, samples: int, tokens: int, patches: int) -> float:
    shape = case.shape
    full = len(case.full_attention_blocks)
    vision = 4.0 * shape.vision_hidden * patches * (full * patches + (case.vision_layers - full) * WINDOW)
    text = 2.0 * shape.layers * shape.heads * shape.head_size * tokens**2  # half of the scores are masked
    return samples * (vision + text)
