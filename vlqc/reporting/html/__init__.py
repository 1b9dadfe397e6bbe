"""The report: one HTML page about a compiled folder."""

from pathlib import Path

from vlqc.errors import Fault, UserError
from vlqc.families.registry import find_family
from vlqc.files import sha256_of
from vlqc.formatting import escape_control_chars, pluralize
from vlqc.options.paths import output_faults
from vlqc.reporting.html.page import FolderInfo, render
from vlqc.reporting.html.schema import DATA_FILE, ReportData, Timings, read_report_data
from vlqc.reporting.html.verification import read_verification
from vlqc.reporting.rotations import rotated_parts, rotation_text
from vlqc.targets.advice import serve_commands
from vlqc.targets.versions import loading_ranges
from vlqc.verify.findings import VerificationResult
from vlqc.verify.folder.contents import MANIFEST, FolderFiles, open_folder

__all__ = ["report_text", "write_report"]

PAGE_SUFFIXES = (".html", ".htm")


def write_report(
    folder: str | Path,
    output: str | Path = "vlqc_report.html",
    *,
    timings: str | Path | None = None,
    verification: str | Path | None = None,
) -> None:
    """Writes the report page of a compiled folder.

    Args:
        folder: the save folder of a compilation.
        output: the HTML file to write.
        timings: the file that the compilation wrote with `timings=`.
        verification: the file that `vlqc verify --locate --json_file` wrote.

    Raises:
        UserError: the folder has no vlqc_report.json, the page cannot be written, or a file is invalid or belongs to
            another folder.
    """
    folder, output = Path(folder), Path(output)
    what = f"cannot write --output {output}"
    if output.exists() and output.suffix.lower() not in PAGE_SUFFIXES:
        raise UserError(Fault(what, why="the file exists and is not an HTML page", fix="choose a name ending in .html"))
    if faults := output_faults(what, output, "--output"):
        raise UserError(*faults)
    text = report_text(folder, timings=timings, verification=verification)
    try:
        output.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(Fault(what, why=str(error), fix="choose a file in an existing folder")) from None


def report_text(folder: Path, *, timings: str | Path | None = None, verification: str | Path | None = None) -> str:
    """The HTML of the page. It depends on the content of the files only, not on their paths."""
    data = read_report_data(folder)
    files = open_folder(folder, VerificationResult(str(folder)))
    times = None if timings is None else read_timings(Path(timings), data)
    verified = None if verification is None else read_verification(Path(verification))
    for path, content in ((timings, times), (verification, verified)):
        if path is not None and content is not None and content.manifest:
            _require_same_folder(Path(path), content.manifest, folder)
    return render(folder_info(files, data), data, times, verified)


def read_timings(path: Path, data: ReportData) -> Timings:
    """UserError for timings of a model with other stages."""
    timings = Timings.read(path)
    unknown = {stage.name for stage in timings.stages} - {stage.name for stage in data.stages}
    if unknown:
        why, fix = f"the folder has no stage {min(unknown)}", "pass the timings of the compilation of this folder"
        raise UserError(Fault("the timings belong to another compilation", str(path), why, fix))
    return timings


def _require_same_folder(path: Path, manifest: str, folder: Path) -> None:
    """UserError if a file belongs to another folder. manifest: SHA-256 of MANIFEST.json of the file's folder."""
    own_manifest = folder / MANIFEST
    own = sha256_of(own_manifest) if own_manifest.is_file() else ""
    if manifest != own:
        actual = f"that of {folder} has {own[:12]}" if own else f"{folder} has none"
        why = f"the {MANIFEST} of its folder has SHA-256 {manifest[:12]}, {actual}"
        fix = "pass the file that was written for this folder"
        raise UserError(Fault(f"{path.name} belongs to another folder than {folder}", str(path), why, fix))


def folder_info(files: FolderFiles, data: ReportData) -> FolderInfo:
    """UserError if the description or config.json is missing or invalid."""
    if not files.description or not files.config:
        why, fix = f"other files than {DATA_FILE} are missing or invalid", "run `vlqc verify` on the folder"
        raise UserError(Fault("the folder is incomplete", str(files.path), why, fix))
    name = escape_control_chars(files.path.resolve().name)  # may not be UTF-8
    loading = loading_ranges(files.description, data.dtype, files.config)
    return FolderInfo(
        name=name,
        model=_model_title(files.config),
        engines=list(map(str, loading)),
        serve=serve_commands(data.target, name, [versions.engine for versions in loading]),
        bytes=sum(path.stat().st_size for path in files.weights),
        rotations=rotation_text(rotated_parts([entry.group() for entry in data.rotations], find_family(files.config))),
    )


def _model_title(config: dict[str, object]) -> str:
    """Family and sizes: "Qwen2.5-VL · language: 28 layers of 3584 · vision: 32 layers of 1280"."""
    family = find_family(config)
    if family is None:
        architectures = config.get("architectures")
        return str(architectures[0] if isinstance(architectures, list) and architectures else "unknown model")
    values, words = family.config_values(config), [family.title]
    for label, layers, size in (
        ("language", "language layers", "hidden size"),
        ("vision", "vision blocks", "vision hidden size"),
    ):
        if isinstance(values.get(layers), int):
            words.append(f"{label}: {pluralize(values[layers], 'layer')} of {values.get(size) or '?'}")
    return " · ".join(words)
