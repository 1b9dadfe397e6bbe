"""The command that makes a folder again: what differs from the defaults, with placeholders for this machine's paths."""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlqc.options.options import Options, flag_of, option_info

PLACES = {"model_path": "MODEL_PATH", "calib_images": "PICTURES", "save_directory": "SAVE_DIRECTORY"}
# What changes how a compilation runs, but no byte of what comes out.
WITHOUT_TRACE = {
    "overwrite", "memory_budget", "strict_target", "dump_ir", "dump_stages", "dump_formats", "print_after", "timings",
    "resume", "start_over",
}  # fmt: skip


def command(options: Options, pipeline: str | None, *, ready_samples: bool) -> tuple[str, ...]:
    """Words of a command line. pipeline: the text of passes that came through Python, None where options build them."""
    given = {name: getattr(options, name) for name in Options.model_fields if name not in WITHOUT_TRACE}
    if pipeline is not None:
        given["pipeline"] = pipeline
    if ready_samples:
        del given["calib_images"]
    words = ["vlqc", "compile"]
    for name, value in given.items():
        field = Options.model_fields[name]
        if name in PLACES:
            words += [flag_of(name), PLACES[name]]
        elif value != field.default:
            words += _words(name, value, bare=option_info(name).is_flag)
    return tuple(words)


def shell_text(words: Sequence[str]) -> str:
    """Command words -> text for a shell, one option a line."""
    lines: list[str] = []
    line: list[str] = []
    for word in words:
        if word.startswith("--") and line:
            lines.append(" ".join(line))
            line = []
        line.append(shlex.quote(word))
    return " \\\n    ".join([*lines, " ".join(line)])


def without_places(texts: Iterable[str], options: Options) -> tuple[str, ...]:
    """Texts in which the paths that the user named are placeholders: they say nothing on another machine."""
    known = set[tuple[str, str]]()
    for name, word in PLACES.items():
        path = Path(getattr(options, name))
        known |= {
            (str(form), word) for form in (path, path.absolute(), path.resolve()) if len(str(form)) > 2
        }  # not "."
    replaced = []
    for text in texts:
        for form, word in sorted(known, key=lambda it: (-len(it[0]), it)):
            text = text.replace(form, word)
        replaced.append(text)
    return tuple(replaced)


def _words(name: str, value: Any, *, bare: bool) -> list[str]:
    if bare:
        return [flag_of(name)]
    values = value if isinstance(value, tuple) else (value,)
    return [word for each in values for word in (flag_of(name), str(each))]
