"""Parses the text of a stage into a snapshot: `print_stage(parse_stage(text)) == text` for every printed text.

Nothing in the text is executed or imported (see `syntax`). The snapshot has a real `fx.Graph` but no module: targets of
`call_module` nodes are checkpoint names, and tensors are the summaries in the text.
"""

import re
from collections.abc import Container
from typing import TypeVar

import torch
from torch import fx

from vlqc.errors import Fault, UserError
from vlqc.formatting import did_you_mean
from vlqc.ir.rotations import ROTATED_PARTS, AppliedRotation, RotationKind
from vlqc.ir.snapshot import (
    SCALES,
    WEIGHT_PARTS,
    CacheObservationSummary,
    CacheSummary,
    EdgeSummary,
    MapSummary,
    ObservationSummary,
    StageSnapshot,
    TensorSummary,
)
from vlqc.ir.stage import CacheSite, InputQuantization, Site
from vlqc.ir.syntax import STRING, Expression, unquote
from vlqc.kernels_ref.rotation import Rotation
from vlqc.targets.cache_schemes import CacheScheme
from vlqc.targets.schemes import Scheme

T = TypeVar("T")
NUMBER = r"-?(?:inf|nan|\d[\w.+-]*)"
DIGEST = r"[0-9a-f]{8}"
SHAPE = r"(?:\d{1,18}(?:, \d{1,18})*)?"
ROTATION_KINDS = "|".join(RotationKind)
TYPE_AT_END = re.compile(rf" : (\w+)\[({SHAPE})\](?: absmax=({NUMBER}) digest=({DIGEST}))?$")


def parse_stage(text: str) -> StageSnapshot:
    """UserError for every line that cannot be parsed, with its number, a caret and what was expected."""
    reader = _Reader()
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                reader.read(_Line(number, line))
            except UserError as error:
                reader.faults += error.faults
    if not reader.faults and (reader.section or reader.stage is None):
        expected = "}" if reader.section else 'stage "NAME" part=PART dtype=DTYPE {'
        reader.faults.append(Fault(f"the text ends where {expected} is expected", where="end of the text"))
    if reader.faults or reader.stage is None:
        raise UserError(*reader.faults)
    return reader.stage


class _Line:
    """One line with the column up to which it has been read; lines never continue."""

    def __init__(self, number: int, text: str) -> None:
        self.number, self.text = number, text
        self.column = len(text) - len(text.lstrip())

    def fault(self, what: str, column: int | None = None, fix: str = "") -> UserError:
        column = self.column if column is None else min(column, len(self.text))
        where = f"line {self.number}, column {column + 1}\n    {self.text}\n    {' ' * column}^"
        return UserError(Fault(what, where, fix=fix))

    def matches(self, pattern: str) -> bool:
        return re.compile(pattern).match(self.text, self.column) is not None

    def take(self, pattern: str, expected: str) -> re.Match[str]:
        match = re.compile(pattern).match(self.text, self.column)
        if match is None:
            raise self.fault(f"expected {expected}")
        self.column = match.end()
        return match

    def end(self) -> None:
        if self.column < len(self.text.rstrip()):
            raise self.fault("expected the end of the line")

    def string(self, expected: str) -> str:
        column = self.column
        quoted = self.take(STRING, f'{expected} in "quotes"').group()
        try:
            return unquote(quoted)
        except (SyntaxError, ValueError) as error:
            raise self.fault(f"this string cannot be read: {error}", column) from None

    def new(self, what: str, known: Container[str]) -> str:
        """A string that is not in `known`."""
        return self.require_new(self.string(what), known)

    def require_new(self, value: T, known: Container[T]) -> T:
        if value in known:
            raise self.fault(f"{value} appears twice")
        return value

    def skip(self, text: str) -> bool:
        """Reads a text if it is next. Returns whether it is."""
        if not self.text.startswith(text, self.column):
            return False
        self.column += len(text)
        return True

    def flag(self, word: str) -> bool:
        """Reads a space and a word if they are next. Returns whether they are."""
        return self.matches(rf" {word}\b") and self.skip(f" {word}")

    def number_after(self, label: str) -> float:
        self.take(re.escape(label), f"{label}NUMBER")
        column = self.column
        try:
            return float(self.take(NUMBER, "a number").group())
        except ValueError:
            raise self.fault("expected a number", column) from None

    def dtype(self) -> torch.dtype:
        column = self.column
        name = self.take(r"\w+", "a dtype such as float32").group()
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            known = [word for word in dir(torch) if isinstance(getattr(torch, word), torch.dtype)]
            raise self.fault("expected a dtype such as float32", column, did_you_mean(name, known))
        return dtype

    def digest(self) -> str:
        return self.take(f" digest=({DIGEST})", "digest= and eight hexadecimal digits").group(1)

    def summary(self) -> TensorSummary:
        dtype = str(self.dtype()).removeprefix("torch.")
        shape = _shape(self.take(rf"\[({SHAPE})\]", "a shape such as [32, 128]").group(1))
        return TensorSummary(dtype, shape, self.number_after(" absmax="), self.digest())

    def map(self) -> MapSummary:
        used, total = self.take(r" (\d{1,18}) of (\d{1,18})", "a count such as ' 3 of 4'").groups()
        return MapSummary(int(used), int(total), self.digest())


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(", ") if size)


class _Reader:
    """Reads a text line by line; keeps the open section and what has been read."""

    def __init__(self) -> None:
        self.stage: StageSnapshot | None = None
        self.section = ""  # the open section
        self.sections_read: set[str] = set()
        self.nodes: dict[str, fx.Node] = {}
        self.rotations: list[_RotationFields] = []
        self.faults: list[Fault] = []

    def read(self, line: _Line) -> None:
        if not self.section:
            self._open(line)
        elif line.matches(r"\}\s*$"):
            if self.section == "rotations" and self.stage is not None:
                self.stage.rotations = tuple(fields.rotation() for fields in self.rotations)
            self.section = ""
        elif self.stage is not None and self.section in self.sections_read:
            getattr(self, f"_read_{self.section}")(self.stage, line)

    def _open(self, line: _Line) -> None:
        sections = (
            ["tensors", "sites", "caches", "edges", "rotations", "observations"] if self.sections_read else ["stage"]
        )
        column = line.column
        word = line.take(r"\w*", "a section").group()
        if word not in sections or word in self.sections_read:
            expected = [section for section in sections if section not in self.sections_read]
            self.section = "?"  # its lines are passed over
            raise line.fault(
                f"expected {' or '.join(expected) or 'the end of the text'}", column, did_you_mean(word, expected)
            )
        self.sections_read.add(word)
        self.section = word
        if word == "stage":
            line.take(" ", "a space")
            name = line.string("the name of the stage")
            part = line.take(r" part=(\w+)", "part= and the part of the model").group(1)
            line.take(" dtype=", "dtype=")
            self.stage = StageSnapshot(name, part, line.dtype(), fx.Graph())
        line.take(r" \{", "{")
        line.end()
        if word == "edges" and self.stage is not None:
            self.stage.edges = ()

    def _read_stage(self, stage: StageSnapshot, line: _Line) -> None:
        if line.matches("return "):
            line.take("return ", "return")
            stage.graph.create_node("output", "output", (self._expression(line, len(line.text)).value(),))
            return
        name = line.take(r"%(\w+) = ", "%NAME = ... or return ...").group(1)
        if name in self.nodes:
            raise line.fault(f"%{name} is defined twice", line.text.index("%"))
        end_of_type = TYPE_AT_END.search(line.text)
        try:
            expression = self._expression(line, end_of_type.start() if end_of_type else len(line.text))
            node = stage.graph.create_node(*expression.operation(), name=name)
        except UserError:
            self.nodes[name] = fx.Graph().placeholder(name)  # so that its users are not faulted as well
            raise
        self.nodes[name] = node
        if node.name != name:
            raise line.fault(f"a graph cannot name a node %{name}", line.text.index("%"), f"take %{node.name}")
        if end_of_type:
            line.column = end_of_type.start(1)
            node.meta["dtype"], node.meta["shape"] = line.dtype(), _shape(end_of_type[2])
            if end_of_type[3]:
                line.column = end_of_type.start(1)
                node.meta["summary"] = line.summary()

    def _read_tensors(self, stage: StageSnapshot, line: _Line) -> None:
        name = line.new("the name of a tensor", stage.tensors)
        line.take(" ", "a space")
        stage.tensors[name] = line.summary()
        line.end()

    def _read_sites(self, stage: StageSnapshot, line: _Line) -> None:
        name = line.new("the name of a site", stage.sites)
        outputs, inputs = line.take(r" \[(\d{1,18}), (\d{1,18})\]", "a shape such as ' [384, 128]'").groups()
        site = Site(name, name, line.take(r" from %(\w+)", "' from %NODE'").group(1), (int(outputs), int(inputs)))
        stage.sites[name] = site
        if line.skip(" scheme="):
            word = line.take(rf"(?:{'|'.join(sorted(Scheme, reverse=True))})\b", f"one of {', '.join(Scheme)}").group()
            site.scheme = Scheme(word)
        if line.matches(" group_size="):
            site.group_size = int(line.take(r" group_size=(\d{1,18})", "' group_size=' and a whole number").group(1))
        site.added_bias = line.flag("added_bias")
        if line.skip(" reason="):
            site.reason = line.string("the reason")
        if line.matches(r" input\("):
            scale, offset = line.number_after(" input(scale="), line.number_after(", offset=")
            line.take(r"\)", ")")
            site.input = InputQuantization(scale, offset)
        if line.matches(r" weight\("):
            expected = WEIGHT_PARTS if site.group_size is not None else WEIGHT_PARTS[:2]
            stage.weights[name] = weight = []
            for word in expected:
                line.take(rf" {word}\(", f"{word}(")
                weight.append(line.summary())
                line.take(r"\)", ")")
        line.end()

    def _read_caches(self, stage: StageSnapshot, line: _Line) -> None:
        name = line.new("the name of an attention module", stage.caches)
        line.take(" keys ", "' keys '")
        key = line.string("the name of a projection")
        line.take(" values ", "' values '")
        value = line.string("the name of a projection")
        heads, size = line.take(r" \[(\d{1,18}), (\d{1,18})\]", "heads and their size such as ' [2, 128]'").groups()
        node = line.take(r" at %(\w+)", "' at %NODE'").group(1)
        site = stage.caches[name] = CacheSite(name, name, key, value, node, int(heads), int(size))
        if line.skip(" scheme="):
            word = line.take(rf"(?:{'|'.join(CacheScheme)})\b", f"one of {', '.join(CacheScheme)}").group()
            site.scheme = CacheScheme(word)
        if line.skip(" reason="):
            site.reason = line.string("the reason")
        if line.matches(" sqnr="):
            site.sqnr = line.number_after(" sqnr=")
        scales: dict[str, TensorSummary] = {}
        for word in SCALES:
            if line.skip(f" {word}("):
                scales[word] = line.summary()
                line.take(r"\)", ")")
        stage.cache_summaries[name] = CacheSummary(scales, _read_cache_observation(line))
        line.end()

    def _read_edges(self, stage: StageSnapshot, line: _Line) -> None:
        producer, usable = line.string("the name of a producer"), line.map()
        line.take(" ->", "' ->'")
        consumers: dict[str, MapSummary] = {}
        while not consumers or line.matches(","):
            line.take(", " if consumers else " ", "a space")
            name = line.new("the name of a consumer", consumers)
            consumers[name] = line.map()
        line.end()
        stage.edges = (*(stage.edges or ()), EdgeSummary(producer, usable, consumers))

    def _read_rotations(self, stage: StageSnapshot, line: _Line) -> None:
        if line.matches(ROTATION_KINDS):
            self.rotations.append(_RotationFields())
            self.rotations[-1].read_header(line)
        elif self.rotations:
            self.rotations[-1].read(line)
        else:
            self.rotations.append(_RotationFields())  # so that its lines are not faulted as well
            raise line.fault(f"expected {' or '.join(RotationKind)}")
        line.end()

    def _read_observations(self, stage: StageSnapshot, line: _Line) -> None:
        observations = stage.observations
        name = line.require_new(line.take(r"%(\w+)", "%NODE").group(1), observations)
        channels = int(line.take(r" channels=(\d{1,18})", "' channels=' and a whole number").group(1))
        rows: dict[str, int] = {}
        while line.matches(r" (?!kept=)\w+=\d{1,18}(?= )") and not line.matches(" min="):
            modality, count = line.take(r" (\w+)=(\d{1,18})", "rows of a modality").groups()
            rows[modality] = int(count)
        low, high = (line.number_after(" min="), line.number_after(" max=")) if rows else (None, None)
        kept = int(line.take(r" kept=(\d{1,18})", "' kept=' and a whole number").group(1))
        observations[name] = ObservationSummary(channels, rows, low, high, kept, line.digest())
        line.end()

    def _expression(self, line: _Line, end: int) -> Expression:
        start = line.column
        return Expression(line.text[start:end], self.nodes, lambda what, at, fix: line.fault(what, start + at, fix))


def _read_cache_observation(line: _Line) -> CacheObservationSummary | None:
    """What was observed of a cache; None at the end of the line."""
    if not line.matches(r" \w"):
        return None
    rows: dict[str, int] = {}
    while not line.matches(" key_absmax="):
        modality, count = line.take(r" (\w+)=(\d{1,18})(?= )", "rows of a modality, or key_absmax=").groups()
        rows[modality] = int(count)
    keys, values = line.number_after(" key_absmax="), line.number_after(" value_absmax=")
    kept, queries = line.take(r" kept=(\d{1,18}) queries=(\d{1,18})", "' kept=' and ' queries='").groups()
    return CacheObservationSummary(rows, keys, values, int(kept), int(queries), line.digest())


class _RotationFields:
    """What the lines of one rotation say so far."""

    def __init__(self) -> None:
        self.kind, self.matrix, self.done = RotationKind.RESIDUAL, Rotation(1, 0, ""), False
        self.writers: dict[str, tuple[int, ...]] = {}
        self.readers: dict[str, str | None] = {}
        self.norms: dict[str, None] = {}  # in order, like the following
        self.tables: dict[str, None] = {}
        self.inputs: dict[str, None] = {}
        self.outputs: dict[int, None] = {}
        self.absmax: dict[str, tuple[float, float]] = {}

    def read_header(self, line: _Line) -> None:
        self.kind = RotationKind(line.take(ROTATION_KINDS, " or ".join(RotationKind)).group())
        line.take(" ", "a space")
        column, name = line.column, line.string("the name of the rotation")
        if any("\ud800" <= character <= "\udfff" for character in name):  # the signs are computed from its UTF-8
            raise line.fault("a name must be Unicode text", column)
        size = int(line.take(r" size=([1-9]\d{0,17})", "' size=' and a positive number").group(1))
        seed = int(line.take(r" seed=(\d{1,18})", "' seed=' and a whole number").group(1))
        self.matrix = Rotation(size, seed, name, keeps_mean=line.flag("keeps_mean"))
        self.done = line.flag("done")

    def read(self, line: _Line) -> None:
        match line.take(
            r"(input|output|norm|columns|rows|table) ", "input, output, norm, columns, rows or table"
        ).group(1):
            case "input":
                self.inputs[line.new("the name of an input", self.inputs)] = None
            case "output":
                position = int(line.take(r"\d{1,18}", "the position of an output").group())
                self.outputs[line.require_new(position, self.outputs)] = None
            case "norm":
                self.norms[line.new("the name of a norm", self.norms)] = None
            case "columns":
                layer = line.new("the name of a layer", self.readers)
                self.readers[layer] = line.string("the name of a norm") if line.skip(" after ") else None
                self._read_absmax(line, layer)
            case "rows":
                layer = line.new("the name of a layer", self.writers)
                starts = line.take(r" at (\d{1,18}(?:, \d{1,18})*)", "' at ' and numbers of rows").group(1)
                self.writers[layer] = tuple(map(int, starts.split(", ")))
                self._read_absmax(line, layer)
            case "table":
                layer = line.new("the name of a layer", self.writers)
                self.writers[layer], self.tables[layer] = (0,), None
                self._read_absmax(line, layer)

    def _read_absmax(self, line: _Line, layer: str) -> None:
        for part in ROTATED_PARTS:
            if line.skip(f" {part}(absmax "):
                before, after = line.number_after(""), line.number_after(" -> ")
                line.take(r"\)", ")")
                self.absmax[f"{layer}.{part}"] = before, after

    def rotation(self) -> AppliedRotation:
        return AppliedRotation(
            kind=self.kind,
            rotation=self.matrix,
            writers=self.writers,
            readers=self.readers,
            norms=tuple(self.norms),
            tables=tuple(self.tables),
            inputs=tuple(self.inputs),
            outputs=tuple(self.outputs),
            done=self.done,
            absmax=self.absmax,
        )
