"""What a finished compilation tells its caller."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlqc.pipeline.precision_search import GroupPrecision


@dataclass
class Result:
    """A compiled folder and how it came about.

    counts: number of Linears by (part, scheme), part being "vision", "merger", "language" or "other".
    bytes_before, bytes_after: sizes of all weight files. seconds: wall time.
    passes: seconds per pass, summed over stages.
    precision, predicted_sqnr: of --fallback auto, what became of every group, and the SQNR of the logits in dB that its
    noise adds up to; measured on calibration inputs, so unseen ones come out a little worse.
    engines: what loads the folder, in words; serve: one command (or setting) per engine.
    """

    folder: Path
    counts: dict[tuple[str, str], int]
    bytes_before: int
    bytes_after: int
    seconds: float
    peak_memory_bytes: int
    notes: list[str] = field(default_factory=list)
    engines: list[str] = field(default_factory=list)
    serve: list[str] = field(default_factory=list)
    passes: dict[str, float] = field(default_factory=dict)
    precision: list[GroupPrecision] = field(default_factory=list)
    predicted_sqnr: float | None = None

    def described(self) -> dict[str, Any]:
        """The same for JSON."""
        counts = [{"part": part, "scheme": scheme, "linears": it} for (part, scheme), it in sorted(self.counts.items())]
        precision = [asdict(group) for group in self.precision]
        return {**vars(self), "folder": str(self.folder), "counts": counts, "precision": precision}

    def _repr_mimebundle_(self, include: object = None, exclude: object = None, **how: object) -> dict[str, str]:
        """As a notebook shows it: the summary that the command line prints."""
        from vlqc.reporting.notebook import mime_bundle

        return mime_bundle(self)
