"""What a shell completes behind an option. It waits for the answer, so nothing heavy is imported for it."""

import ast
from collections.abc import Callable, Iterator
from importlib.util import find_spec

from vlqc.pipeline.plugins import installed_places

Completer = Callable[[str], list[str]]  # what was typed so far -> what may stand there


def one_of(words: list[str]) -> Completer:
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def several_of(words: list[str]) -> Completer:
    """Words with commas between them, each once: behind `text,o` comes `text,onnx`."""

    def complete(incomplete: str) -> list[str]:
        given, comma, begun = incomplete.rpartition(",")
        return [given + comma + word for word in words if word.startswith(begun) and word not in given.split(",")]

    return complete


def one_pass(incomplete: str) -> list[str]:
    return one_of(list(pass_names()))(incomplete)


def pass_names() -> Iterator[str]:
    """Names of vlqc's own passes and of those that installed packages offer.

    The table is read from the text of `vlqc.pipeline.registry`: its import takes seconds, for torch.
    """
    spec = find_spec("vlqc.pipeline.registry")
    source = spec.loader.get_source(spec.name) if spec is not None and hasattr(spec.loader, "get_source") else None  # type: ignore[union-attr]
    told: dict[str, ast.expr] = {}
    for statement in ast.parse(source or "").body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        if isinstance(target, ast.Name) and isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value:
            told[target.id] = statement.value
    if "REGISTRY" in told:
        yield from ast.literal_eval(told["REGISTRY"])
    if "ENTRY_POINTS" in told:
        yield from installed_places(ast.literal_eval(told["ENTRY_POINTS"]))
