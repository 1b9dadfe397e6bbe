"""What a compilation took on this machine: `--timings FILE`, beside the result and never in it."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from vlqc.errors import Fault, UserError
from vlqc.reporting.html.schema import Count, Magnitude, Name, Told

PACKAGES = ("vlqc", "torch", "transformers", "safetensors")


class PassTime(Told):
    """Over all stages; raised_bytes: by how much the peak of the process grew while the pass ran."""

    name: Name
    seconds: Magnitude
    raised_bytes: Count


class StageTime(Told):
    name: Name
    seconds: Magnitude


class Timings(Told):
    """seconds: of the whole compilation; versions: of packages and Python.

    manifest: SHA-256 of the folder's MANIFEST.json, empty in files of older versions; kept: stages that an interrupted
    run had finished: all else is of those that ran after the interruption.
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
        """UserError if it cannot be written; the compiled folder stands by then."""
        try:
            path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            why, fix = f"{error}; the compiled folder is complete", "name another file the next time"
            raise UserError(Fault("the timings cannot be written", str(path), why, fix)) from None


def machine() -> tuple[str, int, dict[str, str]]:
    """(system, processors that this process may use, versions)"""
    versions = {"python": platform.python_version()} | {name: known for name in PACKAGES if (known := installed(name))}
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{platform.system()} {platform.machine()}", usable, versions


def installed(package: str) -> str:
    """Its version; empty where it runs from a checkout that is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
