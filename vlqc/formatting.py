"""Text for people: numbers with units, plurals, suggestions, and untrusted names made safe to print."""

import difflib
import re
from collections.abc import Iterable, Sequence

LONGEST_WORD = 40  # characters
DATA = re.compile(rf"[A-Za-z0-9+/=_-]{{{LONGEST_WORD},}}")  # base64


def pluralize(number: int, what: str, plural: str = "") -> str:
    """1, "stage" -> "1 stage"; 2, "stage" -> "2 stages". plural: of a word that does not just add an s."""
    return f"{number} {what if number == 1 else plural or f'{what}s'}"


def excerpt(value: object, length: int = 60) -> str:
    """A value from the user's data for messages: its representation, of long ones the beginning and the size."""
    text = value[: length + 1] if isinstance(value, str) else value
    shown = repr(text)
    if len(shown) <= length + 2:
        return shown
    size = f"{len(value):,} characters" if isinstance(value, str) else f"a {type(value).__name__}"
    return f"{shown[:length]}... ({size})"


def brief(value: object, length: int = 20) -> str:
    """A value from the user's JSON for messages, without data: of long texts the beginning and the size, of texts with
    long runs without blanks, which may be base64 data, the size only."""
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} with {pluralize(len(value), 'item')}"
    if not isinstance(value, str):
        return excerpt(value, length)
    size = f"{len(value):,} characters"
    if DATA.search(value[: length + LONGEST_WORD]):
        return f"text of {size}"
    return repr(value) if len(value) <= length else f"{value[:length]!r}... ({size})"


def enumerate_first(words: Sequence[str], most: int = 8) -> str:
    """The first words of a list, each shortened, and how many others there are: "a, b and 3 more"."""
    shown = ", ".join(word if len(word) <= 80 else f"{word[:80]}..." for word in words[:most])
    return shown if len(words) <= most else f"{shown} and {len(words) - most} more"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence naming the closest known words, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else ""


def escape_control_chars(text: str) -> str:
    """The text as a terminal can show it: what would move the cursor, hide or recolor is written out, as \\x1b.

    File and tensor names are untrusted: otherwise a crafted name could hide an error message with escape sequences.
    """
    shown = (each if each.isprintable() or each in "\n\t" else _escape(each) for each in text)
    return "".join(shown)


def _escape(letter: str) -> str:
    number = ord(letter)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"


def format_duration(seconds: float) -> str:
    """0.5 -> "0.5 s", 75 -> "1:15", 4000 -> "1:06:40"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_sqnr(decibels: float) -> str:
    """33.14 -> "33.1 dB"; beyond 1000 dB, where the noise is zero, "no noise"."""
    return "no noise" if decibels > 1000 else f"{decibels:.1f} dB"


def format_bytes(count: float) -> str:
    """Bytes in units of 1024: "4.0 KiB", "11.1 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
