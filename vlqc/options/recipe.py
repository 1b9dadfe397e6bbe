"""Reads option values from a YAML file: `vlqc compile --recipe FILE`.

    # w8a8.yaml
    model_path: Qwen2.5-VL-7B-Instruct
    calib_images: images
    save_directory: Qwen2.5-VL-7B-W8A8
    anti_method: m4
    exclude: ["*.o_proj"]

Names and values are those of the command line. Every scalar stays text, so that YAML's own reading of `no`, `010` and
`1:30` does not apply. Recipes are shared between users, so they cannot make code run: tags, anchors, trust_remote_code
and `module:Class` are refused.
"""

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from vlqc.errors import Fault, UserError

LARGEST_FILE = 2**16  # bytes; PyYAML is slow, and a recipe with every option takes less than a tenth of this
DEEPEST = 2  # a list in a mapping
NULL_WORDS = ("null", "~")
EXAMPLE = "write one option per line, for example anti_method: m4"


@dataclass(frozen=True)
class Entry:
    """One value of a recipe, as text, list of texts or None, and the line it was read from."""

    value: Any
    where: str


def read_recipe(file: Any) -> dict[str, Entry]:
    """Entries by option name, with underscores. Names and values are not checked here.

    Raises:
        UserError: if the file is not a plain YAML mapping of option names to values, or would make code run.
    """
    path = Path(file)
    root = _root_node(path)
    if root is None:
        raise UserError(Fault("the recipe is empty", str(path), fix=EXAMPLE))
    if not isinstance(root, yaml.MappingNode):
        raise UserError(Fault("the recipe is not a YAML mapping", str(path), fix=EXAMPLE))
    entries: dict[str, Entry] = {}
    faults: list[Fault] = []
    for key, node in root.value:
        where = f"{path}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            faults.append(Fault("an option name is not a word", where, fix=EXAMPLE))
            continue
        name, value = key.value.removeprefix("--").replace("-", "_"), _value_of(node)
        if name in entries:
            faults.append(Fault(f"{name} is given twice", where))
        elif value == "":
            faults.append(Fault(f"{name} has no value", where, fix=f"add a value, or write {name}: None"))
        else:
            entries[name] = Entry(value, where)
            faults += _code_faults(name, value, where)
    if faults:
        raise UserError(*faults)
    return entries


class _Loader(yaml.BaseLoader):  # type: ignore[misc]
    """Keeps scalars as text. Refuses anchors, aliases, tags and deep nesting, with which YAML parsers are attacked."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not allowed", problem_mark=event.start_mark)
        if event.tag is not None:
            raise yaml.MarkedYAMLError(problem=f"the tag {event.tag} is not allowed", problem_mark=event.start_mark)
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem="it is nested too deeply", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _root_node(path: Path) -> Any:
    what, where = "the recipe cannot be read", str(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
            raise UserError(Fault(what, where, "it is not a regular file"))
        if status.st_size > LARGEST_FILE:
            raise UserError(Fault(what, where, f"it is larger than {LARGEST_FILE} bytes"))
        return _Loader(path.read_text(encoding="utf-8")).get_single_node()
    except yaml.YAMLError as error:
        if mark := getattr(error, "problem_mark", None):
            where = f"{path}, line {mark.line + 1}"
        why = getattr(error, "problem", None) or getattr(error, "reason", None) or "it is not YAML"
        raise UserError(Fault(what, where, str(why), "check the indentation and the colons there")) from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(Fault(what, where, why, "check the path of --recipe")) from error


def _value_of(node: Any) -> Any:
    """A node -> its text, None, or the list or dict of texts that it holds."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.value in NULL_WORDS and node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_value_of(item) for item in node.value]
    return {str(_value_of(key)): _value_of(value) for key, value in node.value}


def _code_faults(name: str, value: Any, where: str) -> list[Fault]:
    """Faults of the options that run code or follow links, which are allowed on the command line only."""
    if name == "trust_remote_code" and _is_true(value):
        why = "a recipe is shared between users, and this option runs code from the checkpoint folder"
        fix = "add --trust_remote_code True to the command line"
        return [Fault("a recipe cannot set trust_remote_code", where, why, fix)]
    if name == "follow_links" and _is_true(value):
        why = "a recipe is shared between users, and this option copies files to which links in the model folder lead"
        return [Fault("a recipe cannot set follow_links", where, why, "add --follow_links to the command line")]
    if name in ("pipeline", "family") and ":" in str(value):
        why = "a recipe is shared between users, and module:Class imports that module"
        return [Fault("a recipe cannot name code", where, why, f"add --{name} to the command line")]
    return []


def _is_true(value: Any) -> bool:
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:  # reported when the options are checked
        return False
