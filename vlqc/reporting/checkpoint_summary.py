"""Content of a float or compiled checkpoint by part of the model: `vlqc inspect`. Reads headers and small tensors."""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlqc.errors import UserError
from vlqc.families.family import ModelFamily, Part
from vlqc.families.registry import find_family, known_model_types
from vlqc.files import format_json, read_json_object
from vlqc.formatting import escape_control_chars, format_bytes
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.reporting.html.schema import read_report_data
from vlqc.reporting.rotations import rotated_parts, rotation_text
from vlqc.targets.caches import describe_caches, described_caches
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import find_layout

QUANTIZATION_PARAMETERS = ("input_scale", "input_offset", "weight_scale", "kv_cache_scale")


@dataclass(frozen=True)
class PartSummary:
    """Tensors of one part of the model that are stored with one scheme.

    linears: number of linear layers. dtypes: of weights and biases, the most frequent first. bytes: of all tensors,
    including scales.
    """

    part: str
    scheme: str
    linears: int
    tensors: int
    bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class ParameterRange:
    """Minimum, median and maximum of a quantization parameter over one part of the model."""

    part: str
    parameter: str
    values: int
    min: float
    median: float
    max: float


@dataclass
class CheckpointSummary:
    """Result of `inspect_folder`.

    facts: values of config.json that identify the model, and of a compiled folder what is rotated and which adapters
    are merged. files: size of each weight file in bytes. notes: how the weight files are read.
    """

    folder: str
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[PartSummary] = field(default_factory=list)
    ranges: list[ParameterRange] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON-compatible values; deterministic for the same folder."""
        return asdict(self)

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return format_json(self.to_dict())

    def render(self, console: Console) -> None:
        """Prints the facts, a table of parts and, if anything is quantized, a table of ranges."""
        console.print(Text(escape_control_chars(self.folder), "bold"), soft_wrap=True)
        for name, value in self.facts.items():
            console.print(Text(escape_control_chars(f"  {name}: {value}")), soft_wrap=True)
        for name, size in self.files.items():
            console.print(Text(f"  {escape_control_chars(name)}: {format_bytes(size)}"), soft_wrap=True)
        for note in self.notes:
            console.print(Text(escape_control_chars(f"  note: {note}")), soft_wrap=True)
        parts = _table("Tensors", ("part", "scheme", "dtype"), ("linear layers", "tensors", "size"))
        for row in self.rows:
            numbers = (str(row.linears), str(row.tensors), format_bytes(row.bytes))
            parts.add_row(row.part, Text(escape_control_chars(row.scheme)), ", ".join(row.dtypes), *numbers)
        console.print(parts)
        if self.ranges:
            ranges = _table("Quantization parameters", ("part", "parameter"), ("values", "min", "median", "max"))
            for each in self.ranges:
                values = (f"{value:.4g}" for value in (each.min, each.median, each.max))
                ranges.add_row(each.part, each.parameter, str(each.values), *values)
            console.print(ranges)


def inspect_folder(folder: Path) -> CheckpointSummary:
    """Summarizes a float or compiled checkpoint. UserError if the folder or a file in it is missing or invalid."""
    checkpoint = Checkpoint(folder)
    family, description = find_family(checkpoint.source_config), _description(folder)
    schemes = _schemes(description)
    names: dict[tuple[str, str], list[str]] = defaultdict(list)  # by (part, scheme)
    for name in checkpoint.names:
        names[_subpart(name, family), _scheme_of(name, schemes)].append(name)
    titles = _subparts(family)
    ordered = sorted(names, key=lambda key: (titles.index(key[0]), key[1]))
    return CheckpointSummary(
        folder=str(folder),
        facts=_facts(checkpoint.config, family, bool(schemes))
        | _cache(description, family)
        | (_provenance(folder, family) if schemes else {}),
        rows=[_part_summary(part, scheme, names[part, scheme], checkpoint, family) for part, scheme in ordered],
        ranges=_ranges(checkpoint, family) if schemes else [],
        files={path.name: path.stat().st_size for path in checkpoint.files},
        notes=checkpoint.notes,
    )


def _description(folder: Path) -> dict[str, Any]:
    """The description of a compiled folder; empty for a float folder."""
    described = find_layout(path.name for path in folder.iterdir())
    return {} if described is None else read_json_object(folder / described[1])


def _schemes(description: dict[str, Any]) -> dict[str, str]:
    """Description -> scheme by layer."""
    return {
        name.removesuffix(".weight"): scheme
        for name, scheme in description.items()
        if name.endswith(".weight") and isinstance(scheme, str)
    }


def _cache(description: dict[str, Any], family: ModelFamily | None) -> dict[str, str]:
    """In how many layers keys and values are cached as integers; empty if in none."""
    text = describe_caches(described_caches(family, description)) if family else ""
    return {"KV cache": text} if text else {}


def _scheme_of(name: str, schemes: dict[str, str]) -> str:
    """The scheme of the layer that a tensor belongs to; FLOAT for tensors of layers without a weight."""
    return schemes.get(name.rpartition(".")[0], Scheme.FLOAT)


def _part_summary(
    part: str, scheme: str, names: list[str], checkpoint: Checkpoint, family: ModelFamily | None
) -> PartSummary:
    linears = [name for name in names if _is_linear(name, checkpoint, family)]
    weights_and_biases = [name for name in names if name.endswith((".weight", ".bias"))] or names
    elements: Counter[str] = Counter()
    for name in weights_and_biases:
        elements[_dtype_name(checkpoint, name)] += prod(checkpoint.shape(name))
    size = sum(prod(checkpoint.shape(name)) * checkpoint.stored_dtype(name).itemsize for name in names)
    dtypes = tuple(dtype for dtype, _ in elements.most_common())
    return PartSummary(part, scheme, len(linears), len(names), size, dtypes)


def _is_linear(name: str, checkpoint: Checkpoint, family: ModelFamily | None) -> bool:
    """Whether a tensor is the weight of a linear layer; without a family, whether it is a matrix."""
    layer, _, tensor = name.rpartition(".")
    if tensor != "weight" or len(checkpoint.shape(name)) != 2:
        return False
    return family is None or family.role(layer) is not None or layer == family.output_head


def _dtype_name(checkpoint: Checkpoint, name: str) -> str:
    return str(checkpoint.stored_dtype(name)).removeprefix("torch.")


def _subparts(family: ModelFamily | None) -> list[str]:
    return [*(title for _, title in (family.subparts if family else ())), Part.OTHER]


def _subpart(name: str, family: ModelFamily | None) -> str:
    return family.subpart(name) if family else Part.OTHER


def _ranges(checkpoint: Checkpoint, family: ModelFamily | None) -> list[ParameterRange]:
    tensors: dict[tuple[str, str], list[torch.Tensor]] = defaultdict(list)  # by (part, parameter)
    for name in checkpoint.names:
        parameter = name.rpartition(".")[2]
        if parameter in QUANTIZATION_PARAMETERS:
            tensors[_subpart(name, family), parameter].append(checkpoint.tensor(name).flatten().to(torch.float64))
    ranges, titles = [], _subparts(family)
    order = sorted(tensors, key=lambda key: (titles.index(key[0]), QUANTIZATION_PARAMETERS.index(key[1])))
    for part, parameter in order:
        values = torch.cat(tensors[part, parameter])
        if values.numel():
            smallest, median, largest = (float(each) for each in (values.min(), values.median(), values.max()))
            ranges.append(ParameterRange(part, parameter, values.numel(), smallest, median, largest))
    return ranges


def _facts(config: dict[str, Any], family: ModelFamily | None, compiled: bool) -> dict[str, Any]:
    """Values of config.json that identify the model."""
    facts = {"model": config.get("model_type"), "kind": "compiled" if compiled else "float"}
    if family:
        facts |= family.config_values(config)
    else:
        facts["family"] = f"none, so the parts are unknown; supported: {', '.join(known_model_types())}"
    return {name: value for name, value in facts.items() if value is not None}


def _provenance(folder: Path, family: ModelFamily | None) -> dict[str, str]:
    """What vlqc_report.json of a compiled folder says about rotations and merged adapters."""
    try:
        data = read_report_data(folder)
    except UserError as error:
        return {"rotated": f"unknown, because {error.faults[0].what}"}
    facts = {"rotated": rotation_text(rotated_parts([entry.group() for entry in data.rotations], family))}
    if not data.calibrated:
        facts["calibration"] = "none, compiled from the weights alone"
    if data.adapters:
        facts["merged adapters"] = ", ".join(adapter.name for adapter in data.adapters)
    return facts


def _table(title: str, text_columns: tuple[str, ...], number_columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in text_columns:
        table.add_column(column)
    for column in number_columns:
        table.add_column(column, justify="right")
    return table
