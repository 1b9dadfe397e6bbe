"""Patterns of layer names in adapters: regular expressions of a subset in which no input makes a search take long.

An adapter comes from elsewhere, and Python's `re` takes exponential time for some expressions. Here the set of all
positions that a part of the pattern can reach is computed at once, so the time is at most the length of the pattern
times the square of that of the name.
"""

import re
from collections.abc import Callable

Positions = frozenset[int]
Part = Callable[[str, Positions], Positions]  # text, positions before the part -> positions after it

LONGEST = 1000  # characters of a pattern
TOKEN = re.compile(r"\\[.dw]|\[[\w.-]+\]|\(\?:|[\w.()|*+?^$-]", re.ASCII)
QUANTIFIERS = "*+?"
ACCEPTED = "only names, `.`, `*`, `+`, `?`, `|`, `^`, `$`, `[...]`, groups, and `\\.`, `\\d` and `\\w` are accepted"


class LayerPattern:
    """A regular expression over layer names. ValueError for one that is not accepted."""

    def __init__(self, pattern: str) -> None:
        if len(pattern) > LONGEST:
            raise ValueError(f"it has more than {LONGEST} characters")
        self._tokens = []
        position = 0
        while position < len(pattern):
            token = TOKEN.match(pattern, position)
            if token is None:
                raise ValueError(ACCEPTED)
            self._tokens.append(token[0])
            position = token.end()
        self._tokens.reverse()
        self._part, _ = self._choice(0)
        if self._tokens:
            raise ValueError("a bracket is closed that is not open")

    def matches_end(self, name: str) -> bool:
        """Whether it matches the whole name, or what follows one of its dots, as PEFT matches it."""
        starts = frozenset((0, *(number + 1 for number, letter in enumerate(name) if letter == ".")))
        return len(name) in self._part(name, starts)

    def _choice(self, depth: int) -> tuple[Part, bool]:
        """Parts up to the end of the group; whether one of them is repeated."""
        if depth > 20:
            raise ValueError("its groups are nested too deeply")
        choices: list[list[Part]] = [[]]
        repeats = False
        while self._tokens and self._tokens[-1] != ")":
            token = self._tokens.pop()
            if token == "|":
                choices.append([])
                continue
            if token in QUANTIFIERS:
                raise ValueError(f"{token} follows nothing that can be repeated")
            part, is_group, inner = self._item(token, depth)
            repeats |= inner
            if self._tokens and self._tokens[-1] in QUANTIFIERS:
                part = self._quantified(part, is_group, inner)
                repeats = True
            choices[-1].append(part)
        return _any_of([_sequence(parts) for parts in choices]), repeats

    def _item(self, token: str, depth: int) -> tuple[Part, bool, bool]:
        """The part that begins with a token, whether it is a group, and whether something is repeated in it."""
        if token in ("(", "(?:"):
            part, repeats = self._choice(depth + 1)
            if not self._tokens:
                raise ValueError("a bracket is not closed")
            self._tokens.pop()
            return part, True, repeats
        if token in "^$":
            return _start if token == "^" else _end, True, True
        return _letter(token), False, False

    def _quantified(self, part: Part, is_group: bool, inner: bool) -> Part:
        quantifier = self._tokens.pop()
        if self._tokens and self._tokens[-1] == "?":  # lazy: the same names match
            self._tokens.pop()
        if self._tokens and self._tokens[-1] in QUANTIFIERS:
            raise ValueError("a quantifier follows another one")
        if is_group and inner:
            raise ValueError("a group is repeated in which something is repeated")
        return _repeated(part, at_least_once=quantifier == "+", once=quantifier == "?")


def _letter(token: str) -> Part:
    try:
        matches = re.compile(token).fullmatch
    except re.error as error:
        raise ValueError(str(error)) from None
    return lambda text, at: frozenset(each + 1 for each in at if each < len(text) and matches(text[each]))


def _start(text: str, at: Positions) -> Positions:
    return at & {0}


def _end(text: str, at: Positions) -> Positions:
    return at & {len(text)}


def _sequence(parts: list[Part]) -> Part:
    def apply(text: str, at: Positions) -> Positions:
        for part in parts:
            at = part(text, at)
        return at

    return apply


def _any_of(parts: list[Part]) -> Part:
    return parts[0] if len(parts) == 1 else lambda text, at: frozenset().union(*(part(text, at) for part in parts))


def _repeated(part: Part, *, at_least_once: bool, once: bool) -> Part:
    def apply(text: str, at: Positions) -> Positions:
        reached = frozenset[int]() if at_least_once else at
        new = at
        while new:
            new = part(text, new) - reached
            reached |= new
            if once:
                break
        return reached

    return apply
