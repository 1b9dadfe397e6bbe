"""What a finished compilation tells its caller."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Result:
    """A compiled folder and how it came about.

    counts: number of Linears by (part, scheme), part being "vision", "merger", "language" or "other".
    bytes_before, bytes_after: sizes of all weight files. seconds: wall time.
    passes: seconds per pass, summed over stages.
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
