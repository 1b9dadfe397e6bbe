"""The command line that reproduces a folder: options that differ from their defaults, with placeholders for paths."""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlqc.options.constraints import PASS_OPTIONS
from vlqc.options.fields import default_value, flag_of, option_info, option_text
from vlqc.options.options import Options
from vlqc.options.scheme_flags import flags_of_scheme

PLACEHOLDERS = {
    "model_path": "MODEL_PATH", "calib_images": "IMAGES", "save_directory": "SAVE_DIRECTORY", "lora": "LORA",
}  # fmt: skip
# Options that do not change the output.
WITHOUT_EFFECT = {
    "overwrite", "memory_budget", "strict_target", "dump_ir", "dump_stages", "dump_formats", "print_after", "timings",
    "resume", "start_over",
}  # fmt: skip


def command(options: Options, pipeline: str | None, *, names_samples: bool) -> tuple[str, ...]:
    """Words of the command line.

    pipeline: text of passes that were passed through Python; None if the options determine them. names_samples:
    whether the samples are those of calib_images: none were passed through Python, and some were needed.
    """
    values = {name: getattr(options, name) for name in Options.model_fields if name not in WITHOUT_EFFECT}
    if pipeline is not None:
        values["pipeline"] = pipeline
    if values["pipeline"] is not None:
        values = {name: value for name, value in values.items() if name not in PASS_OPTIONS}
    if not names_samples:
        del values["calib_images"]
    words, implied = ["vlqc", "compile"], flags_of_scheme(options.scheme)
    for name, value in values.items():
        if name in implied and value == implied[name]:
            continue
        if name in PLACEHOLDERS:
            words += [word for _ in _paths(value) for word in (flag_of(name), PLACEHOLDERS[name])]
        elif value != default_value(name, options.scheme):
            words += [flag_of(name)] if option_info(name).is_flag else _with_values(name, value)
    return tuple(words)


def _paths(value: Path | tuple[Path, ...]) -> tuple[Path, ...]:
    return value if isinstance(value, tuple) else (value,)


def _with_values(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, tuple) else (value,)
    return [word for each in values for word in (flag_of(name), option_text(each))]


def shell_text(words: Sequence[str]) -> str:
    """Quoted for a shell, one option per line."""
    lines: list[str] = []
    line: list[str] = []
    for word in words:
        if word.startswith("--") and line:
            lines.append(" ".join(line))
            line = []
        line.append(shlex.quote(word))
    return " \\\n    ".join([*lines, " ".join(line)])


def replace_paths(texts: Iterable[str], options: Options) -> tuple[str, ...]:
    """Texts with placeholders in place of the user's paths, which would make the output depend on the machine."""
    paths = set[tuple[str, str]]()
    for name, placeholder in PLACEHOLDERS.items():
        for path in _paths(getattr(options, name)):
            forms = map(str, (path, path.absolute(), path.resolve()))
            paths |= {(form, placeholder) for form in forms if len(form) > 2}  # not "."
    replaced = []
    for text in texts:
        for form, placeholder in sorted(paths, key=lambda row: (-len(row[0]), row)):
            text = text.replace(form, placeholder)
        replaced.append(text)
    return tuple(replaced)
