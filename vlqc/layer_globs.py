"""Patterns over checkpoint layer names: what --exclude and --include mean, checked before anything runs."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from vlqc.errors import Fault, UserError, near_miss


def check_globs(layers: Iterable[str], **globs: tuple[str, ...]) -> None:
    """UserError for every pattern that matches no layer; keyword names are the flags they came with."""
    known = list(layers)
    faults = []
    for flag, patterns in globs.items():
        for pattern in patterns:
            if not any(fnmatchcase(layer, pattern) for layer in known):
                named = f"layers are named like {known[0]}, {known[-1]}" if known else "the model has none"
                fix = near_miss(pattern, known) or named
                faults.append(Fault(f"--{flag} {pattern} matches no layer", fix=fix))
    if faults:
        raise UserError(*faults)
