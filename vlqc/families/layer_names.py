"""Patterns over checkpoint layer names."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import takewhile


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether a checkpoint name matches one of the glob patterns (case-sensitive, `*` also matches dots)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def layer_pattern(name: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.*.mlp.up_proj: the same layer of every block."""
    return re.sub(r"\.\d+\.", ".*.", name)


def combine_names(names: Sequence[str]) -> str:
    """mlp.gate_proj, mlp.up_proj -> mlp.{gate,up}_proj"""
    if len(names) == 1:
        return names[0]
    parents = {name.rpartition(".")[0] for name in names}
    members = [name.rpartition(".")[2] for name in names]
    if len(parents) > 1:
        return ", ".join(names)
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*map(reversed, members), strict=False))
    common = "".join(letters[0] for letters in same)[::-1]
    suffix = common[common.index("_") :] if "_" in common else ""  # whole words only
    parent = parents.pop()
    return f"{parent}{'.' if parent else ''}{{{','.join(member.removesuffix(suffix) for member in members)}}}{suffix}"
