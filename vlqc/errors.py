"""Errors: UserError for invalid input (exit code 2), InternalError for bugs of vlqc (exit code 70)."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlqc.formatting import escape_control_chars


@dataclass(frozen=True)
class Fault:
    """One fault: what is wrong, where, why, and how to fix it. Only `what` is required."""

    what: str
    where: str = ""
    why: str = ""
    fix: str = ""

    def __post_init__(self) -> None:
        for name in ("what", "where", "why", "fix"):
            object.__setattr__(self, name, _bounded(getattr(self, name)))

    def __str__(self) -> str:
        lines = [self.what]
        for label, text in (("where", self.where), ("why", self.why), ("what to do", self.fix)):
            if text:
                lines.append(f"  {label}: {text}")
        return escape_control_chars("\n".join(lines))


def _bounded(text: str) -> str:
    """At most about LONGEST_TEXT characters: a message that quotes a file must not print megabytes of it."""
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 40]}... ({len(text):,} characters)"


LONGEST_TEXT = 4000  # characters of what, where, why and fix, each
SHOWN_FAULTS = 20  # of the same kind


def first_faults(faults: Sequence[Fault], what: str) -> list[Fault]:
    """The first SHOWN_FAULTS of many similar faults, and one that counts the others. what: plural noun for them."""
    rest = len(faults) - SHOWN_FAULTS
    if rest <= 1:  # one more fault takes no more space than a count of it
        return list(faults)
    return [*faults[:SHOWN_FAULTS], Fault(f"{rest} more {what}")]


THIRD_PARTY = ", which is not part of vlqc"


def third_party_fix(import_path: str) -> str:
    """`Fault.fix` for an error in third-party code. import_path: as module:Class."""
    return f"check {import_path}{THIRD_PARTY}"


def third_party_notes(error: BaseException) -> list[str]:
    """Those notes of an error that attribute it to third-party code."""
    return [note for note in getattr(error, "__notes__", ()) if note.endswith(THIRD_PARTY)]


class VlqcError(Exception):
    """Base of the errors that vlqc raises deliberately. Its text is that of its faults."""

    exit_code = 1

    def __init__(self, *faults: Fault) -> None:
        self.faults = faults
        super().__init__("\n".join(str(fault) for fault in faults))


class UserError(VlqcError):
    """Invalid input, with all faults of that input."""

    exit_code = 2

    def __init__(self, *faults: Fault | str) -> None:
        super().__init__(*(fault if isinstance(fault, Fault) else Fault(fault) for fault in faults))


class InternalError(VlqcError):
    """A violated invariant, for example a fold that changes the output."""

    exit_code = 70

    def __init__(
        self,
        message: str,
        fix: str = "this is a bug in vlqc; report it with the last bundle of --dump_ir DIR --dump_formats bundle",
    ) -> None:
        super().__init__(Fault(message, fix=fix))
