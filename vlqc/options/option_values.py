"""One given value of an option, text from a command line or a value from Python -> the value that the option holds."""

import re
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from vlqc.errors import Fault, UserError
from vlqc.formatting import did_you_mean
from vlqc.targets.target import parse_target

TRUE_WORDS, FALSE_WORDS = ("true", "1", "yes"), ("false", "0", "no")
FEWEST = 1  # what a count must be at least, unless its option says otherwise
NOT_IN_A_GLOB = re.compile(r"[\s,;{}]")  # no layer name holds them, and the text of a pipeline separates with them


class Refused(ValueError):
    """A fault on its way through pydantic, which lets nothing but a ValueError pass."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        super().__init__(str(fault))


def flag_of(name: str) -> str:
    return f"--{name}"


def extra_of(field: FieldInfo) -> dict[str, Any]:
    """What an option stores with its field beside the help text: panel, values (empty: any), flag, kind, bounds."""
    extra = field.json_schema_extra
    return {"flag": False, "kind": None, **(extra if isinstance(extra, dict) else {})}


def read_value(name: str, field: FieldInfo, value: Any) -> Any:
    """One given value -> bool, int, float, str, Path, tuple of str or None, whichever the field holds.

    Raises Refused.
    """
    extra = extra_of(field)
    kinds = typing.get_args(field.annotation) or (field.annotation,)
    if extra["kind"] == "globs":
        return _read_globs(name, value)
    if type(None) in kinds and (value is None or str(value).lower() == "none"):
        return None
    if extra["kind"] == "target":
        return _read_target(name, value)
    if bool in kinds:
        return read_bool(name, value)
    if Path in kinds:
        return _read_path(name, value)
    if float in kinds:
        return _read_share(name, value, extra["least"], extra["most"])
    if int in kinds:
        return _read_int(name, value, extra["values"], extra.get("least", FEWEST))
    read = _read_text(name, value)
    if extra["kind"] == "formats":
        return _read_words(name, read, extra["values"])
    if extra["values"] and read not in extra["values"]:
        raise _not_one_of(name, value, extra["values"])
    return read


def read_bool(name: str, value: Any) -> bool:
    """True, False, or one of the words for them."""
    word = str(value).lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise _refused(name, value, "it is neither True nor False", f"give {flag_of(name)} True or {flag_of(name)} False")


def _read_path(name: str, value: Any) -> Path:
    if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
        raise _refused(name, repr(value), "it is not the name of a file or folder")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise _refused(name, value, "there is no such user, whose home folder ~ would name") from error


def _read_int(name: str, value: Any, allowed: list[int], least: int) -> int:
    # bool is an int in Python, but `w_bit=True` is a slip; 18 digits are enough for anybody
    number = None if isinstance(value, bool) or not re.fullmatch(r"[+-]?\d{1,18}", str(value).strip()) else int(value)
    if allowed and number not in allowed:
        raise _not_one_of(name, value, allowed)
    if number is None and re.fullmatch(r"\+?\d+", str(value).strip()):
        raise _refused(name, value, "it is larger than any that makes sense", f"for example {flag_of(name)} 4")
    if number is None or (not allowed and number < least):
        wanted = "a whole number" + (f" above {least - 1}" if least else ", 0 or more")
        raise _refused(name, value, f"it is not {wanted}", f"for example {flag_of(name)} 4")
    return number


def _read_share(name: str, value: Any, least: float, most: float) -> float:
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not least <= number <= most:  # so is NaN turned away
        raise _refused(name, value, f"it is not a number from {least} to {most}", f"for example {flag_of(name)} 0.5")
    return number


def _read_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _refused(name, repr(value), f"it is not text but {type(value).__name__}")
    return value


def _read_words(name: str, value: str, allowed: list[str]) -> str:
    """Words separated by commas, each once, in the given order."""
    words = list(dict.fromkeys(word.strip().lower() for word in value.split(",") if word.strip()))
    for word in words or [""]:
        if word not in allowed:
            raise _not_one_of(name, word, allowed)
    return ",".join(words)


def _read_target(name: str, value: Any) -> str:
    """The target's normal form: `MindIE@2.2` is mindie@2.2."""
    try:
        return str(parse_target(_read_text(name, value), flag_of(name)))
    except UserError as error:
        raise Refused(error.faults[0]) from error


def _read_globs(name: str, value: Any) -> tuple[str, ...]:
    """One pattern or several, each once, in the given order."""
    given = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
        raise _refused(name, repr(value), "it is neither a pattern nor a list of patterns")
    for pattern in given:
        if not pattern or NOT_IN_A_GLOB.search(pattern):
            one, other = (f"{flag_of(name)} {each}" for each in ("'visual.blocks.*.attn.proj'", "'*.o_proj'"))
            raise _refused(name, repr(pattern), "it is not one pattern over layer names", f"for example {one} {other}")
    return tuple(dict.fromkeys(given))


def _refused(name: str, value: object, why: str, fix: str = "") -> Refused:
    return Refused(Fault(f"{flag_of(name)} {value}", why=why, fix=fix))


def _not_one_of(name: str, value: Any, allowed: list[Any]) -> Refused:
    words = [str(each) for each in allowed]
    choices = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    return _refused(
        name, value, f"{flag_of(name)} is {choices}", did_you_mean(str(value), words) or f"choose {choices}"
    )
