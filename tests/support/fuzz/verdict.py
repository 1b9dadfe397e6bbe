"""What must be true of a case of the fuzzer, and how it is said that it is not.

A check returns whether the case was accepted; it lets UserError pass, which is a refusal in the user's terms, and
raises `Wrong` where something was accepted that is wrong. Anything else that it raises is a fault of vlqc.
"""

import json
from typing import Any


class Wrong(AssertionError):
    """Something wrong that was accepted."""


def demand(holds: bool, what: str) -> None:
    if not holds:
        raise Wrong(what)


def strict(text: bytes) -> Any:
    """JSON as its standard has it: no NaN, no key twice. Wrong where that is not so."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        demand(len(dict(pairs)) == len(pairs), "a key was given twice")
        return dict(pairs)

    def no_constant(word: str) -> Any:
        raise Wrong(f"{word} is no JSON")

    return json.loads(text.decode(), object_pairs_hook=once, parse_constant=no_constant)
