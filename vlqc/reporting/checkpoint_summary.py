"""What a float or compiled checkpoint holds, per part of the model. Reads headers, and only small tensors."""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlqc.files import format_json, read_json_object
from vlqc.formatting import escape_control_chars, format_bytes
from vlqc.frontend.checkpoint.checkpoint import Checkpoint

PARTS = ("vision blocks", "merger", "vision, other", "language layers", "embeddings", "lm_head", "other")
RANGED = ("input_scale", "input_offset", "weight_scale")
DESCRIPTIONS = "quant_model_description*.json"


@dataclass(frozen=True)
class Row:
    """The tensors of one part of the model that are stored under one scheme.

    linears: matrices of Linears among them; dtypes: of their weights, biases and tables; bytes: of all tensors, scales
    included.
    """

    part: str
    scheme: str
    linears: int
    tensors: int
    bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """Smallest, middle and largest value of one kind of quantization parameter over one part of the model."""

    part: str
    parameter: str
    values: int
    min: float
    median: float
    max: float


@dataclass
class Inspection:
    """Result of `inspect_folder`."""

    folder: str
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    ranges: list[Range] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)  # name -> bytes, weight files

    def to_dict(self) -> dict[str, Any]:
        """As a value of JSON: the same folder gives the same."""
        return asdict(self)

    def to_json(self) -> str:
        """As JSON text."""
        return format_json(self.to_dict())

    def render(self, console: Console) -> None:
        """Print facts, then a table of parts, then one of ranges if anything is quantized."""
        console.print(Text(escape_control_chars(self.folder), "bold"), soft_wrap=True)
        for name, value in self.facts.items():
            console.print(Text(escape_control_chars(f"  {name}: {value}")), soft_wrap=True)
        for name, size in self.files.items():
            console.print(Text(f"  {escape_control_chars(name)}: {format_bytes(size)}"), soft_wrap=True)
        parts = _table("What is in it", ("part", "scheme", "dtype"), ("linears", "tensors", "size"))
        for row in self.rows:
            figures = (str(row.linears), str(row.tensors), format_bytes(row.bytes))
            parts.add_row(row.part, Text(escape_control_chars(row.scheme)), ", ".join(row.dtypes), *figures)
        console.print(parts)
        if self.ranges:
            ranges = _table("Ranges", ("part", "parameter"), ("values", "min", "median", "max"))
            for each in self.ranges:
                values = (f"{value:.4g}" for value in (each.min, each.median, each.max))
                ranges.add_row(each.part, each.parameter, str(each.values), *values)
            console.print(ranges)


def inspect_folder(folder: Path) -> Inspection:
    """A float or compiled checkpoint folder -> Inspection. UserError if it is none or its files are damaged."""
    checkpoint = Checkpoint(folder)
    schemes = _schemes(folder)
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in checkpoint.names:
        kinds[part_of(name), _scheme_of(name, schemes)].append(name)
    ordered = sorted(kinds, key=lambda kind: (PARTS.index(kind[0]), kind[1]))
    return Inspection(
        folder=str(folder),
        facts=_facts(checkpoint.config, bool(schemes)),
        rows=[_row(part, scheme, kinds[part, scheme], checkpoint) for part, scheme in ordered],
        ranges=_ranges(checkpoint) if schemes else [],
        files={path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))},
    )


def part_of(name: str) -> str:
    """Original tensor name -> one of PARTS."""
    prefixes = {
        "visual.blocks.": "vision blocks",
        "visual.merger.": "merger",
        "visual.": "vision, other",
        "model.layers.": "language layers",
        "model.embed_tokens.": "embeddings",
        "lm_head.": "lm_head",
    }
    return next((part for prefix, part in prefixes.items() if name.startswith(prefix)), "other")


def _schemes(folder: Path) -> dict[str, str]:
    """Layer -> scheme, from the description that a compiled folder carries; empty for a float folder."""
    schemes: dict[str, str] = {}
    for path in sorted(folder.glob(DESCRIPTIONS)):
        entries = {name: word for name, word in read_json_object(path).items() if isinstance(word, str)}
        schemes |= {name.removesuffix(".weight"): word for name, word in entries.items() if name.endswith(".weight")}
    return schemes


def _scheme_of(name: str, schemes: dict[str, str]) -> str:
    """A tensor belongs to the scheme of its layer's weight; what has no weight of its own is FLOAT."""
    return schemes.get(name.rpartition(".")[0], "FLOAT")


def _row(part: str, scheme: str, names: list[str], checkpoint: Checkpoint) -> Row:
    linears = [name for name in names if _is_linear(name, checkpoint)]
    plain = [name for name in names if name.endswith((".weight", ".bias"))] or names
    by_size: Counter[str] = Counter()
    for name in plain:
        by_size[_dtype_name(checkpoint, name)] += prod(checkpoint.shape(name))
    size = sum(prod(checkpoint.shape(name)) * checkpoint.stored_dtype(name).itemsize for name in names)
    return Row(part, scheme, len(linears), len(names), size, tuple(dtype for dtype, _ in by_size.most_common()))


def _is_linear(name: str, checkpoint: Checkpoint) -> bool:
    """Matrices are Linears, except tables of embeddings; the patch embedding is a convolution and has more axes."""
    return name.endswith(".weight") and len(checkpoint.shape(name)) == 2 and "embed" not in name


def _dtype_name(checkpoint: Checkpoint, name: str) -> str:
    return str(checkpoint.stored_dtype(name)).removeprefix("torch.")


def _ranges(checkpoint: Checkpoint) -> list[Range]:
    found: dict[tuple[str, str], list[torch.Tensor]] = defaultdict(list)
    for name in checkpoint.names:
        parameter = name.rpartition(".")[2]
        if parameter in RANGED:
            found[part_of(name), parameter].append(checkpoint.tensor(name).flatten().to(torch.float64))
    ranges = []
    for part, parameter in sorted(found, key=lambda kind: (PARTS.index(kind[0]), RANGED.index(kind[1]))):
        values = torch.cat(found[part, parameter])
        if values.numel():
            smallest, median, largest = (float(each) for each in (values.min(), values.median(), values.max()))
            ranges.append(Range(part, parameter, values.numel(), smallest, median, largest))
    return ranges


def _facts(config: dict[str, Any], compiled: bool) -> dict[str, Any]:
    """The few things of config.json that tell one model from another; newer files nest the language model's."""
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    vision = config["vision_config"] if isinstance(config.get("vision_config"), dict) else {}
    facts = {
        "model": config.get("model_type"),
        "kind": "compiled" if compiled else "float",
        "dtype": config.get("torch_dtype", config.get("dtype", text.get("dtype"))),
        "language layers": text.get("num_hidden_layers"),
        "hidden size": text.get("hidden_size"),
        "vision blocks": vision.get("depth"),
        "tied embeddings": config.get("tie_word_embeddings", text.get("tie_word_embeddings")),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _table(title: str, words: tuple[str, ...], figures: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in words:
        table.add_column(column)
    for column in figures:
        table.add_column(column, justify="right")
    return table
