"""Helpers for the checks of fuzz targets.

A check returns whether a case was accepted. It lets UserError pass, which means that the case was rejected, and raises
`Wrong` if invalid input was accepted. Any other exception is a defect of vlqc.
"""

import json
from typing import Any


class Wrong(AssertionError):
    """Invalid input was accepted."""


def demand(holds: bool, what: str) -> None:
    if not holds:
        raise Wrong(what)


def strict(text: bytes) -> Any:
    """Parses JSON strictly. Raises Wrong for NaN, Infinity and duplicate keys."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        demand(len(dict(pairs)) == len(pairs), "duplicate key")
        return dict(pairs)

    def no_constant(word: str) -> Any:
        raise Wrong(f"{word} is not JSON")

    return json.loads(text.decode(), object_pairs_hook=once, parse_constant=no_constant)
