"""Files that `vlqc report` reads: vlqc_report.json of a compiled folder, and the file of --timings.

vlqc_report.json is deterministic: it depends on the checkpoint, the samples and the options, and not on the machine,
its paths or its clock. Measurements of the machine are in the file of --timings, which lies outside the folder.
"""

import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from vlqc.errors import Fault, UserError
from vlqc.families.family import Part
from vlqc.files import read_regular_file
from vlqc.ir.rotations import RotationGroup
from vlqc.targets.cache_schemes import CacheScheme
from vlqc.targets.schemes import Scheme

DATA_FILE = "vlqc_report.json"
LARGEST = 3.4e38  # bound of all magnitudes in a file: about the largest float32
# A curve has the magnitudes of channels at these quantiles, the largest channel first. Outliers are few, so the
# quantiles are dense where outliers are.
SHARES = (
    0.0, 0.001, 0.002, 0.004, 0.007, 0.012, 0.02, 0.035, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0,
)  # fmt: skip
PACKAGES = ("vlqc", "torch", "transformers", "safetensors")


def _require_curve_length(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) != len(SHARES):
        raise ValueError(f"a curve has {len(SHARES)} values, this one has {len(values)}")
    return values


def _require_scheme(value: str) -> str:
    if value not in tuple(Scheme):
        raise ValueError(f"a scheme is one of {', '.join(Scheme)}")
    return value


def _require_cache_scheme(value: str) -> str:
    if value not in tuple(CacheScheme):
        raise ValueError(f"a scheme of keys and values is one of {', '.join(CacheScheme)}")
    return value


Finite = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Magnitude = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Curve = Annotated[tuple[Magnitude, ...], AfterValidator(_require_curve_length)]  # values at SHARES, descending
Count = Annotated[int, Field(ge=0, lt=2**63)]
SchemeName = Annotated[str, AfterValidator(_require_scheme)]
CacheSchemeName = Annotated[str, AfterValidator(_require_cache_scheme)]
Modality = Literal["text", "image", "video"]
Name = Annotated[str, StringConstraints(max_length=4096)]


class StrictModel(BaseModel):
    """A JSON file of vlqc, validated strictly: no conversions, no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """UserError for a file that is unreadable, too large or invalid."""
        fix = "copy the file again, or write it again"
        try:
            return cls.model_validate_json(read_regular_file(path))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            key = ".".join(map(str, first["loc"]))
            why = f"{key}: {first['msg']}" if key else first["msg"]
            raise UserError(Fault(f"{path.name} is invalid or of another version", str(path), why, fix)) from None
        except (OSError, ValueError) as error:
            raise UserError(Fault(f"cannot read {path.name}", str(path), str(error), fix)) from None


# ---- vlqc_report.json ------------------------------------------------------------------------------------------------


class SiteData(StrictModel):
    """One linear layer.

    shape: (out_features, in_features). low, high: limits of the static int8 input range. predicted: with --fallback
    auto, SQNR of the logits in dB if only this layer's group is quantized.
    """

    name: Name
    shape: tuple[Count, Count]
    scheme: SchemeName
    group_size: Count | None = None
    reason: Name = ""
    low: Finite | None = None
    high: Finite | None = None
    predicted: Finite | None = None


class InputData(StrictModel):
    """An activation that linear layers read.

    sites: names of these layers. before, after: by modality, the curve of the largest magnitude per channel before and
    after smoothing. scales: curve of the smoothing scales by which channels were divided; None without smoothing.
    """

    sites: Annotated[tuple[Name, ...], Field(min_length=1)]
    channels: Count
    before: dict[Modality, Curve]
    after: dict[Modality, Curve]
    scales: Curve | None = None


class CacheData(StrictModel):
    """The keys and values of one attention module.

    name: of the module. scheme: in which they are cached, None for float. sqnr: of the attention's output with rounded
    keys and values, in dB, as measured where the scales were chosen. key, value: root mean square and maximum of the
    scales, None without any.
    """

    name: Name
    scheme: CacheSchemeName | None
    reason: Name = ""
    sqnr: Finite | None = None
    key: tuple[Magnitude, Magnitude] | None = None
    value: tuple[Magnitude, Magnitude] | None = None


class StageData(StrictModel):
    """One stage.

    rows: number of tokens over all samples, by modality. sqnr: by modality, SQNR of the stage's output in dB if this
    stage alone is quantized; empty if no layer of the stage is quantized.
    """

    name: Name
    part: Name
    samples: Count
    rows: dict[Modality, Count]
    sqnr: dict[Modality, Finite]
    sites: tuple[SiteData, ...]
    inputs: tuple[InputData, ...]
    caches: tuple[CacheData, ...] = ()


class CandidateData(StrictModel):
    """See `CandidatePrecision`."""

    scheme: SchemeName
    sqnr: Finite
    bytes: Count


class GroupData(StrictModel):
    """See `GroupPrecision`; its sqnr and bytes are those of the candidate with its scheme."""

    sites: Annotated[tuple[Name, ...], Field(min_length=1)]
    part: Name
    assigned: SchemeName
    scheme: SchemeName
    noise_share: Magnitude
    candidates: tuple[CandidateData, ...]


class RotationData(StrictModel):
    """See `RotationGroup`."""

    kind: Name
    seed: Count
    size: Count
    names: Annotated[tuple[Name, ...], Field(min_length=1)]

    def group(self) -> RotationGroup:
        return RotationGroup(self.kind, self.seed, self.size, self.names)


class AdapterData(StrictModel):
    """See `AdapterId`."""

    name: Name
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class ReportData(StrictModel):
    """Content of vlqc_report.json.

    command: words of the command line, with placeholders for paths and without options at their default.
    ready_samples: whether the samples were passed as tensors through Python. calibrated: whether there were samples;
    otherwise the checkpoint was compiled from its weights alone. heads: linear layers outside stages, which
    stay in float. rotations: that the weights contain. adapters: that were merged into them, in order. predicted: with
    --fallback auto, the predicted SQNR of the logits in dB. groups: with --fallback auto, the candidates of every group
    of layers.
    """

    format: Literal["vlqc report 1"] = "vlqc report 1"
    version: Name
    command: tuple[Name, ...]
    ready_samples: bool
    calibrated: bool = True
    pipeline: Annotated[str, StringConstraints(max_length=1 << 20)]
    target: Name
    dtype: Literal["bfloat16", "float16"]
    bytes_before: Count
    heads: tuple[Name, ...]
    rotations: tuple[RotationData, ...] = ()
    adapters: tuple[AdapterData, ...] = ()
    notes: tuple[Annotated[str, StringConstraints(max_length=1 << 20)], ...]
    predicted: Finite | None
    groups: tuple[GroupData, ...] = ()
    stages: tuple[StageData, ...]

    def counts(self) -> dict[tuple[str, str], int]:
        """Number of linear layers by (part, scheme), as in `Result`."""
        counts: dict[tuple[str, str], int] = {}
        layers = [(stage.part, site.scheme) for stage in self.stages for site in stage.sites]
        for part, scheme in [*layers, *((str(Part.OTHER), str(Scheme.FLOAT)) for _ in self.heads)]:
            counts[part, scheme] = counts.get((part, scheme), 0) + 1
        return counts

    def write(self, folder: Path) -> None:
        """Writes vlqc_report.json, unless the folder has it with the same content."""
        path, content = folder / DATA_FILE, (self.model_dump_json() + "\n").encode()
        if not path.is_file() or path.read_bytes() != content:
            path.write_bytes(content)


def read_report_data(folder: Path) -> ReportData:
    """vlqc_report.json of a compiled folder. UserError if the folder or the file does not exist or is invalid."""
    path = folder / DATA_FILE
    if not folder.is_dir():
        raise UserError(Fault(f"no such folder: {folder}", fix="pass the --save_directory of a compilation"))
    if not path.is_file():
        why = "another tool or an older vlqc wrote the folder, or the file was not copied"
        raise UserError(Fault(f"{DATA_FILE} is missing", str(folder), why, "compile the checkpoint again"))
    return ReportData.read(path)


def rounded(value: float) -> float:
    """The value to four significant digits, limited to +-LARGEST; NaN becomes 0."""
    return 0.0 if math.isnan(value) else float(f"{max(-LARGEST, min(value, LARGEST)):.4g}")


# ---- timings ---------------------------------------------------------------------------------------------------------


class PassTime(StrictModel):
    """A pass over all stages. raised_bytes: growth of the peak memory of the process during the pass."""

    name: Name
    seconds: Magnitude
    raised_bytes: Count


class StageTime(StrictModel):
    name: Name
    seconds: Magnitude


class Timings(StrictModel):
    """Content of the file of --timings.

    manifest: SHA-256 of the folder's MANIFEST.json; empty in files of older versions. kept: number of stages that an
    interrupted run had finished; everything else covers the stages after the interruption. seconds: wall time of the
    compilation. versions: of packages and of Python.
    """

    format: Literal["vlqc timings 1"] = "vlqc timings 1"
    manifest: Name = ""
    kept: Count = 0
    seconds: Magnitude
    peak_bytes: Count
    passes: tuple[PassTime, ...]
    stages: tuple[StageTime, ...]
    system: Name
    processors: Count
    versions: dict[Name, Name]

    def write(self, path: Path) -> None:
        """UserError if the file cannot be written."""
        try:
            path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            why, fix = f"{error}; the compiled folder is complete", "choose another file for the next run"
            raise UserError(Fault("cannot write the timings", str(path), why, fix)) from None


def machine() -> tuple[str, int, dict[str, str]]:
    """(operating system and architecture, number of processors of this process, versions of packages)"""
    packages = {name: number for name in PACKAGES if (number := installed_version(name))}
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    versions = {"python": platform.python_version()} | packages
    return f"{platform.system()} {platform.machine()}", processors, versions


def installed_version(package: str) -> str:
    """Version of a package; empty if the package is not installed, such as vlqc in a checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
