"""Compiles, verifies, loads and evaluates every scheme in every layout and dtype, tied and untied.

    python -m tools.bench.scheme_table [--seed N] [--json FILE]      # prints a table of logit SQNR

The checkpoints are random, with outliers (tools/checkpoints/outlier_checkpoint.py); calibration and evaluation inputs
differ. Structure and arithmetic are verified for combinations that no engine version loads, too.
"""

import argparse
import itertools
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

import vlqc
from tools.checkpoints import outlier_checkpoint as make_outlier_checkpoint
from tools.demo.tiny_task import with_token_types
from vlqc.targets.versions import loading_engines

LOW_BIT = {"w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False}
SCHEMES: dict[str, dict[str, Any]] = {
    "W8A8 m2": {},
    "W8A8 m4": {"anti_method": "m4"},
    "W8A8_DYNAMIC m2": {"is_dynamic": True},
    "W4A8 group 64, m4": {**LOW_BIT, "group_size": 64, "anti_method": "m4"},
    "W4A8 group 256 all, m4": {**LOW_BIT, "group_size": 256, "anti_method": "m4", "w4a8_scope": "all"},
}
LAYOUTS: dict[str, dict[str, Any]] = {"default": {}, "mindie": {"mindie_format": True}}
DTYPES = ("bfloat16", "float16", "float32")
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
SAMPLES = 6  # for calibration, and 6 others for evaluation


@dataclass(frozen=True)
class Row:
    """One combination: logit SQNR in dB, faults of `vlqc verify`, engine versions that load the folder."""

    scheme: str
    layout: str
    dtype: str
    tied: bool
    sqnr: float
    faults: tuple[str, ...]
    loads_in: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A float checkpoint, its calibration and evaluation inputs, and its logits for the latter."""

    folder: Path
    dtype: str
    tied: bool
    calibration: list[dict[str, Tensor]]
    unseen: list[dict[str, Tensor]]
    logits: Tensor


def make_source(folder: Path, dtype: str, tied: bool, seed: int) -> Source:
    """Writes a checkpoint to `folder` and runs it in float32."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = make_outlier_checkpoint.make(folder, seed=seed, dtype=dtype, tied=tied)
    unseen = make_outlier_checkpoint.random_samples(config, SAMPLES, seed=900 + seed)
    model: nn.Module = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    calibration = make_outlier_checkpoint.random_samples(config, SAMPLES, seed=100 + seed)
    return Source(folder, dtype, tied, calibration, unseen, run(model.float().eval(), unseen))


def measure(source: Source, save: Path, scheme: str, layout: str) -> Row:
    """Compiles `source` to `save`, verifies and loads the folder, and compares logits."""
    options = {**SCHEMES[scheme], **LAYOUTS[layout]}
    vlqc.compile(model_path=source.folder, save_directory=save, samples=source.calibration, overwrite=True, **options)
    report = vlqc.verify_folder(save, model_path=source.folder)
    noise = (run(vlqc.load(save), source.unseen) - source.logits).square().sum()
    sqnr = float(10 * torch.log10(source.logits.square().sum() / noise))
    description = json.loads(next(save.glob("quant_model_description*.json")).read_text(encoding="utf-8"))
    config = json.loads((save / "config.json").read_text(encoding="utf-8"))
    faults = tuple(f"{finding.where}: {finding.what}" for finding in report.faults)
    engines = tuple(loading_engines(description, config["torch_dtype"], config))
    return Row(scheme, layout, source.dtype, source.tied, sqnr, faults, engines)


@torch.no_grad()
def run(model: nn.Module, samples: list[dict[str, Tensor]]) -> Tensor:
    """Logits float64 [all tokens, vocabulary]."""
    return torch.cat([model(**with_token_types(sample), use_cache=False).logits[0].double() for sample in samples])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="A table of logit SQNR over schemes, layouts, dtypes and tying.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the rows as JSON")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for dtype, tied in itertools.product(DTYPES, (False, True)):
            source = make_source(Path(temporary) / f"{dtype}-{tied}", dtype, tied, options.seed)
            for scheme, layout in itertools.product(SCHEMES, LAYOUTS):
                rows.append(measure(source, Path(temporary) / "compiled", scheme, layout))
    show(rows, Console())
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


def show(rows: list[Row], console: Console) -> None:
    """Prints logit SQNR per scheme and layout (rows), dtype and tying (columns), then the engines that load them."""
    columns = list(dict.fromkeys((row.dtype, row.tied) for row in rows))
    titles = [f"{SHORT[dtype]}{chr(10) + 'tied' if tied else ''}" for dtype, tied in columns]
    table = Table(Column("scheme", no_wrap=True), "layout", *(Column(title, justify="right") for title in titles))
    loading: dict[str, list[str]] = {}
    for scheme, layout in dict.fromkeys((row.scheme, row.layout) for row in rows):
        by_column = {(row.dtype, row.tied): row for row in rows if (row.scheme, row.layout) == (scheme, layout)}
        table.add_row(
            scheme, layout, *(f"{by_column[each].sqnr:.1f}{'!' * bool(by_column[each].faults)}" for each in columns)
        )
        for row in by_column.values():
            engines = "; ".join(row.loads_in) or "no version"
            loading.setdefault(engines, []).append(f"{scheme}, {layout}, {SHORT[row.dtype]}")
    console.print(table)
    for engines, combinations in loading.items():
        console.print(f"loaded by {engines}:", highlight=False)
        for combination in dict.fromkeys(combinations):
            console.print(f"    {combination}", highlight=False)


if __name__ == "__main__":
    main()
