"""What a shell completes behind an option. It waits for the answer, so nothing heavy is imported for it."""

from collections.abc import Callable

from vlqc.pipeline.registry import REGISTRY, plugin_passes

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
    return one_of([*REGISTRY, *plugin_passes()])(incomplete)
