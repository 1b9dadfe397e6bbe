"""JSON that strangers wrote: read strictly, in bounded memory, and every fault told in the user's terms; JSON to print.

Python's own reader takes NaN, and of a key that is given twice the last value: another reader, an engine's among them,
may see something else there. So both are faults here.
"""

import hashlib
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlqc.errors import Fault, UserError
from vlqc.formatting import escape_control_chars

LARGEST_FILE = 64 * 2**20  # bytes; the index of the largest checkpoint takes less than one of these 64 parts
REPAIR = "copy the file from its origin again"


def parse_json(text: str) -> Any:
    """Text -> what it says. ValueError with the reason for anything that is not strictly JSON."""
    try:
        read = json.loads(text, object_pairs_hook=_each_key_once, parse_constant=_no_number)
        json.dumps(read, ensure_ascii=False, allow_nan=False).encode()  # half of a surrogate pair is no character
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except OverflowError:
        raise ValueError("it holds a number that is too large") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds {error.object[error.start]!a}, which is half a character") from None
    return read


def read_regular_file(path: Path) -> bytes:
    """All of an ordinary file. ValueError with the reason for anything else, and beyond LARGEST_FILE; OSError."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
        raise ValueError("it is not an ordinary file")
    if status.st_size > LARGEST_FILE:
        raise ValueError(f"it has {status.st_size} bytes, and {LARGEST_FILE} are plenty")
    return path.read_bytes()


def read_json_object(path: Path, *, missing: Callable[[], UserError] | None = None) -> dict[str, Any]:
    """The object in a file. UserError for any other content; missing: what to raise where there is no such file."""
    what = f"{path.name} cannot be read"
    try:
        read = parse_json(read_regular_file(path).decode())
    except FileNotFoundError as error:
        raise (missing() if missing else UserError(Fault(what, str(path), str(error), REPAIR))) from None
    except (OSError, ValueError) as error:
        raise UserError(Fault(what, str(path), str(error), REPAIR)) from None
    if not isinstance(read, dict):
        raise UserError(Fault(f"{path.name} is not a JSON object", str(path), fix=REPAIR))
    return read


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for key, value in pairs:
        if key in read:
            raise ValueError(f"the key {key!r} is given twice")
        read[key] = value
    return read


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def format_json(value: Any) -> str:
    """A value -> JSON that any reader takes and any terminal shows; numbers that are none (NaN, infinity) are null."""
    return escape_control_chars(json.dumps(_strict(value), indent=2, ensure_ascii=False, allow_nan=False)) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None  # NaN is below nothing
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
