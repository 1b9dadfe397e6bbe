"""What a compiled folder tells of how it came about: `vlqc_report.json`, the same bytes for the same input and options.

Nothing in it depends on the machine, its paths or its clock: those are in a file of their own, see `timings`.
"""

import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from vlqc.errors import Fault, UserError
from vlqc.files import read_regular_file

FILE = "vlqc_report.json"
LARGEST = 3.4e38  # of the magnitudes that a report tells of: about the largest float32
# Of the channels in the order of their largest magnitude, the largest first: those at which a curve is kept. Outliers
# are few, so the shares lie close together where they are.
SHARES = (
    0.0, 0.001, 0.002, 0.004, 0.007, 0.012, 0.02, 0.035, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0,
)  # fmt: skip


def _as_long_as_shares(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) != len(SHARES):
        raise ValueError(f"a curve has {len(SHARES)} values, this one {len(values)}")
    return values


Finite = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Magnitude = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Curve = Annotated[tuple[Magnitude, ...], AfterValidator(_as_long_as_shares)]  # values at SHARES, falling
Count = Annotated[int, Field(ge=0, lt=2**63)]
SchemeWord = Literal["W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC", "FLOAT"]
Modality = Literal["text", "image"]
Name = Annotated[str, StringConstraints(max_length=4096)]


class Told(BaseModel):
    """Something that vlqc wrote as JSON and reads back, held to every word."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """UserError: unreadable, too large, or not what vlqc wrote."""
        fix = "copy the file again, or make it again"
        try:
            return cls.model_validate_json(read_regular_file(path))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            why = f"{where}: {first['msg']}" if where else first["msg"]
            raise UserError(Fault(f"{path.name} is damaged, or of another version", str(path), why, fix)) from None
        except (OSError, ValueError) as error:
            raise UserError(Fault(f"{path.name} cannot be read", str(path), str(error), fix)) from None


class SiteFacts(Told):
    """One Linear. shape: (outputs, inputs); low, high: what its static input range represents; predicted: of a search,
    the SQNR in dB of logits that only the rounding of its group disturbs."""

    name: Name
    shape: tuple[Count, Count]
    scheme: SchemeWord
    group_size: Count | None = None
    reason: Name = ""
    low: Finite | None = None
    high: Finite | None = None
    predicted: Finite | None = None


class InputFacts(Told):
    """What sites read. Curves are of the largest magnitude per channel, by modality; scales: by which smoothing divided
    the channels, None where it left them alone."""

    sites: Annotated[tuple[Name, ...], Field(min_length=1)]
    channels: Count
    before: dict[Modality, Curve]
    after: dict[Modality, Curve]
    scales: Curve | None = None


class StageFacts(Told):
    """sqnr: of the stage's output when it alone is quantized, in dB, by modality; without a value where nothing is
    rounded. rows: that entered it, by modality."""

    name: Name
    part: Name
    samples: Count
    rows: dict[Modality, Count]
    sqnr: dict[Modality, Finite]
    sites: tuple[SiteFacts, ...]
    inputs: tuple[InputFacts, ...]


class Facts(Told):
    """command: words of `vlqc compile` with placeholders for paths, options at their default left out; ready_samples:
    whether samples came ready through Python; heads: Linears outside stages, which stay float; predicted: of a
    precision search, the SQNR of the logits in dB."""

    format: Literal["vlqc report 1"] = "vlqc report 1"
    version: Name
    command: tuple[Name, ...]
    ready_samples: bool
    pipeline: Annotated[str, StringConstraints(max_length=1 << 20)]
    target: Name
    dtype: Literal["bfloat16", "float16"]
    bytes_before: Count
    heads: tuple[Name, ...]
    notes: tuple[Annotated[str, StringConstraints(max_length=1 << 20)], ...]
    predicted: Finite | None
    stages: tuple[StageFacts, ...]

    def counts(self) -> dict[tuple[str, str], int]:
        """Number of Linears by (part, scheme), as in `Result`."""
        found: dict[tuple[str, str], int] = {}
        every = [(stage.part, site.scheme) for stage in self.stages for site in stage.sites]
        for part, scheme in [*every, *(("other", "FLOAT") for _ in self.heads)]:
            found[part, scheme] = found.get((part, scheme), 0) + 1
        return found

    def write(self, folder: Path) -> None:
        """A file that says just this already is left alone."""
        path, content = folder / FILE, (self.model_dump_json() + "\n").encode()
        if not path.is_file() or path.read_bytes() != content:
            path.write_bytes(content)


def read_facts(folder: Path) -> Facts:
    """Of a compiled folder. UserError: no such folder, no such file, or not what vlqc wrote."""
    path = folder / FILE
    if not folder.is_dir():
        raise UserError(Fault(f"there is no folder {folder}", fix="give the --save_directory of a compilation"))
    if not path.is_file():
        why = f"it has no {FILE}: another tool or an older vlqc made it, or the file was left behind"
        raise UserError(Fault("the folder tells nothing of how it was made", str(folder), why, "compile it again"))
    return Facts.read(path)


def rounded(value: float) -> float:
    """To four digits, which is more than any picture shows; what is beyond LARGEST, infinity too, becomes that."""
    return 0.0 if math.isnan(value) else float(f"{max(-LARGEST, min(value, LARGEST)):.4g}")
