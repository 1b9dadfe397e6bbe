"""Results of `tools/bench/reference.py`, and those of an earlier run that need not be measured again."""

import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.bench.metrics import Agreement
from tools.bench.process import Usage
from tools.bench.reference_cases import Case

MSMODELSLIM, VLQC = "msModelSlim", "vlqc"
FLOOR = "plain 8-bit weights"


@dataclass(frozen=True)
class Row:
    """Result of one run.

    tool: MSMODELSLIM, VLQC, or FLOOR, which has no usage. rotate: option of vlqc. accuracy in percent; perplexity
    relative to float; weights_only: SQNR in dB with float activations. sites: scheme of each quantized layer. source:
    digest of what the result depends on, see `source_of`.
    """

    case: str
    seed: int
    scheme: str
    tool: str
    agreement: Agreement
    accuracy: float | None = None
    perplexity: float | None = None
    weights_only: float | None = None
    usage: Usage | None = None
    rotate: str | None = None
    sites: dict[str, str] = field(default_factory=dict)
    source: str = ""

    @property
    def label(self) -> str:
        """The tool, and the option of vlqc if it is not the default."""
        return self.tool if self.rotate in (None, "auto") else f"{self.tool} --rotate {self.rotate}"

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Row":
        """A row from its JSON object. Raises TypeError if it is not one."""
        usage = values["usage"]
        nested = {"agreement": Agreement(**values["agreement"]), "usage": usage and Usage(**usage)}
        return cls(**{**values, **nested})


def digest_of(case: Case) -> int:
    """CRC-32 of the float weights, the calibration inputs and the evaluation inputs of a case."""
    digest = 0
    for path in sorted(case.folder.glob("*.safetensors")):
        digest = zlib.crc32(path.read_bytes(), digest)
    for sample in (*case.calibration, *case.evaluation):
        for name in sorted(sample):
            digest = zlib.crc32(sample[name].numpy().tobytes(), zlib.crc32(name.encode(), digest))
    return digest


def source_of(digest: int, options: dict[str, Any]) -> str:
    """Digest of a case -> that of a run on it with these options, eight hexadecimal digits."""
    return f"{zlib.crc32(json.dumps(options, sort_keys=True).encode(), digest):08x}"


class KnownRows:
    """Rows of earlier runs of MSMODELSLIM and FLOOR. Those of vlqc are left out: vlqc is what changes."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.rows = {(row.tool, row.case, row.seed, row.scheme, row.source): row for row in rows if row.tool != VLQC}

    def find(self, tool: str, case: Case, scheme: str, source: str) -> Row | None:
        """The row of this run; None if there is none, or one on other weights, inputs or options."""
        return self.rows.get((tool, case.name, case.seed, scheme, source))


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of `write_rows`. Raises OSError, ValueError, TypeError or KeyError."""
    return [Row.of(values) for values in json.loads(path.read_text(encoding="utf-8"))]


def write_rows(path: Path, rows: list[Row]) -> None:
    """Writes the rows as JSON."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
