"""The report: one page of HTML about a compiled folder, from what the compilation left in it."""

from pathlib import Path

from vlqc.errors import Fault, UserError
from vlqc.files import sha256_of
from vlqc.formatting import escape_control_chars
from vlqc.options.paths import output_faults
from vlqc.reporting.html.page import Made, render
from vlqc.reporting.html.schema import FILE, Facts, read_facts
from vlqc.reporting.html.timings import Timings
from vlqc.reporting.html.verification import read_verification
from vlqc.targets.advice import serve_commands
from vlqc.targets.versions import loading_engines
from vlqc.verify.findings import VerificationResult
from vlqc.verify.folder.contents import MANIFEST, FolderFiles, open_folder

__all__ = ["report_text", "write_report"]

PAGES = (".html", ".htm")


def write_report(
    folder: str | Path,
    output: str | Path = "vlqc_report.html",
    *,
    timings: str | Path | None = None,
    verification: str | Path | None = None,
) -> None:
    """Writes the page about a compiled folder. UserError: it tells nothing, no page can be written, or a file is
    damaged or of another folder.

    timings: what `timings=` of a compilation wrote; verification: what `vlqc verify --locate --json_file` wrote.
    """
    folder, output = Path(folder), Path(output)
    if output.exists() and output.suffix.lower() not in PAGES:
        why, fix = "a file of that name exists and is no page", "name a file that ends with .html"
        raise UserError(Fault(f"--output {output} is not written", why=why, fix=fix))
    if faults := output_faults(f"--output {output} is not written", output, "--output"):
        raise UserError(*faults)
    text = report_text(folder, timings=timings, verification=verification)
    try:
        output.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        fix = "name a file in an existing folder with --output"
        raise UserError(Fault(f"the report cannot be written to {output}", why=str(error), fix=fix)) from None


def report_text(folder: Path, *, timings: str | Path | None = None, verification: str | Path | None = None) -> str:
    """The page: the same text for the same files, wherever they lie."""
    facts = read_facts(folder)
    content = open_folder(folder, VerificationResult(str(folder)))
    times = None if timings is None else timings_of(Path(timings), facts)
    verified = None if verification is None else read_verification(Path(verification))
    for path, told in ((timings, times), (verification, verified)):
        if path is not None and told is not None and told.manifest:
            _require_same(Path(path), told.manifest, folder)
    return render(made_of(content, facts), facts, times, verified)


def _require_same(path: Path, manifest: str, folder: Path) -> None:
    """UserError for a file that speaks of another folder: `manifest` is the SHA-256 of that one's list of files."""
    listed = folder / MANIFEST
    own = sha256_of(listed) if listed.is_file() else ""
    if manifest != own:
        has = f"that of {folder} has {own[:12]}" if own else f"{folder} has none"
        why = f"its folder's {MANIFEST} has SHA-256 {manifest[:12]}, {has}"
        fix = "give the file that was written for this folder"
        raise UserError(Fault(f"{path.name} is of another folder than {folder}", str(path), why, fix))


def timings_of(path: Path, facts: Facts) -> Timings:
    """UserError for timings of another model."""
    timings = Timings.read(path)
    strange = {it.name for it in timings.stages} - {stage.name for stage in facts.stages}
    if strange:
        why, fix = f"the folder has no {sorted(strange)[0]}", "give the file that was written together with the folder"
        raise UserError(Fault("the timings are of another compilation", str(path), why, fix))
    return timings


def made_of(content: FolderFiles, facts: Facts) -> Made:
    """What the folder itself says beside its report."""
    if not content.description or not content.config:
        fix = "`vlqc verify` says what is wrong with it"
        raise UserError(Fault("the folder is not whole", str(content.path), f"beside {FILE} files are missing", fix))
    name = escape_control_chars(content.path.resolve().name)  # which may be no UTF-8
    return Made(
        name=name,
        kind=_kind(content.config),
        engines=loading_engines(content.description, facts.dtype, content.config),
        serve=serve_commands(facts.target, name),
        bytes=sum(path.stat().st_size for path in content.weights),
    )


def _kind(config: dict[str, object]) -> str:
    """Qwen2_5_VLForConditionalGeneration -> its first word, and how large the towers are."""
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else str(config.get("model_type"))
    vision = config.get("vision_config")
    parts = [name.removesuffix("ForConditionalGeneration").replace("_", " ").replace("Qwen2 5 VL", "Qwen2.5-VL")]
    for label, of, layers in (("language", config, "num_hidden_layers"), ("vision", vision, "depth")):
        if isinstance(of, dict) and isinstance(of.get(layers), int):
            parts.append(f"{label}: {of[layers]} layers of {of.get('hidden_size', '?')}")
    return " · ".join(parts)
