"""Reads untrusted JSON files strictly and in bounded memory, and writes JSON for output.

Python's own parser accepts NaN, and takes the last of several values with the same key. Other parsers, such as that of
an engine, may take another one, so both are errors here.
"""

import hashlib
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlqc.errors import Fault, UserError
from vlqc.formatting import escape_control_chars, excerpt

LARGEST_FILE = 64 * 2**20  # bytes; the index of the largest published checkpoint has less than 1 MiB
REPAIR = "copy the file from its origin again"


def parse_json(text: str) -> Any:
    """Strict JSON text -> value. ValueError with the reason if it is anything else."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_reject_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # fails for infinity and lone surrogates
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except OverflowError:
        raise ValueError("it holds a number that is too large") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds the lone surrogate {error.object[error.start]!a}") from None
    return value


def read_regular_file(path: Path) -> bytes:
    """Content of a file. OSError; ValueError if it is not a regular file, or has more than LARGEST_FILE bytes."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
        raise ValueError("it is not a regular file")
    if status.st_size > LARGEST_FILE:
        raise ValueError(f"it has {status.st_size} bytes, at most {LARGEST_FILE} are allowed")
    return path.read_bytes()


def read_json_object(path: Path, *, missing: Callable[[], UserError] | None = None) -> dict[str, Any]:
    """The object in a JSON file. UserError for any other content; missing: returns the error for a missing file."""
    what = f"{path.name} cannot be read"
    try:
        value = parse_json(read_regular_file(path).decode())
    except FileNotFoundError as error:
        raise (missing() if missing else UserError(Fault(what, str(path), str(error), REPAIR))) from None
    except (OSError, ValueError) as error:
        raise UserError(Fault(what, str(path), str(error), REPAIR)) from None
    if not isinstance(value, dict):
        raise UserError(Fault(f"{path.name} is not a JSON object", str(path), fix=REPAIR))
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {excerpt(key)} is given twice")
        values[key] = value
    return values


def _reject_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


def format_json(value: Any) -> str:
    """A value -> strict JSON without control characters. NaN and infinity become null, other types their text."""
    return escape_control_chars(json.dumps(_json_types(value), indent=2, ensure_ascii=False, allow_nan=False)) + "\n"


def _json_types(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_types(item) for item in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None  # false for NaN, too
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
