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
from vlqc.formatting import brief, escape_control_chars

LARGEST_FILE = 64 * 2**20  # bytes; the index of the largest published checkpoint has less than 1 MiB
REPAIR = "copy the file from its origin again"
FOLLOW_LINKS = "--follow_links"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
LONGEST_LFS_POINTER = 1024  # bytes; the limit of the format

_trusted_folders: set[Path] = set()


def trust_links(folder: Path) -> None:
    """Allows the links in a checkpoint folder to lead anywhere, in this process: the user has said so."""
    _trusted_folders.add(folder.resolve())


def are_links_trusted(folder: Path) -> bool:
    return folder.resolve() in _trusted_folders


def parse_json(text: str, *, is_line: bool = False) -> Any:
    """Strict JSON text -> value. ValueError with the reason if it is anything else.

    is_line: the text is one line of a file, and reasons name no line.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_reject_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # fails for infinity and lone surrogates
    except json.JSONDecodeError as error:
        raise ValueError(_syntax_error(error, is_line)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except OverflowError:
        raise ValueError("it holds a number that is too large") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds the lone surrogate {error.object[error.start]!a}") from None
    return value


def _syntax_error(error: json.JSONDecodeError, is_line: bool) -> str:
    """What the text is, or has, that is no JSON."""
    text, rest = error.doc, error.doc[error.pos :].lstrip()
    line = "it" if is_line else f"line {error.doc.count(chr(10), 0, len(error.doc) - len(rest)) + 1}"
    if not text.strip():
        return "it is empty"
    if text.startswith("\ufeff"):
        return "it begins with a byte order mark: save it as UTF-8 without one"
    if text.lstrip().startswith("<"):
        return "it is a web page, not JSON"
    if rest.startswith(("//", "/*", "#")):
        return f"{line} holds a comment, which JSON does not have"
    if rest.startswith(("}", "]")) and text[: error.pos].rstrip().endswith(","):
        return f"{line} holds {rest[0]} behind a comma"
    return f"{error.msg} at character {error.colno}" if is_line else str(error)


def _decode(content: bytes) -> str:
    """UTF-8 -> text. ValueError with the reason if it is anything else."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16: save it as UTF-8 without a byte order mark")
    return content.decode()


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
        value = parse_json(_decode(read_regular_file(path)))
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
            raise ValueError(f"the key {brief(key)} is given twice")
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


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the text that Git LFS keeps in place of a large file."""
    if path.stat().st_size > LONGEST_LFS_POINTER:
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
