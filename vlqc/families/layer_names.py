"""Patterns over checkpoint layer names."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether a checkpoint name matches one of the glob patterns (case-sensitive, `*` also matches dots)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def layer_pattern(name: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.*.mlp.up_proj: the same layer of every block."""
    return re.sub(r"\.\d+\.", ".*.", name)
