"""Options from a YAML file: `vlqc compile --recipe FILE`.

    # w8a8.yaml
    model_path: Qwen2.5-VL-7B-Instruct
    calib_images: pictures
    save_directory: Qwen2.5-VL-7B-W8A8
    anti_method: m4
    exclude: ["*.o_proj"]

Names and values are those of the command line, and a value means what it means there: every scalar stays the text that
stands in the file until its option reads it. So YAML's own ideas of `yes`, `010`, `1:30` or a date never come in. A
recipe is passed from hand to hand, so it says what to compute, never what code to run: tags, anchors, trust in a
checkpoint's code and `module:Class` in a pipeline are refused.
"""

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from vlqc.errors import Fault, UserError
from vlqc.formatting import did_you_mean
from vlqc.options.option_values import Refused, extra_of, flag_of, read_bool, read_value
from vlqc.pipeline.spec import names_in

LARGEST_FILE = 2**16  # bytes; YAML's readers are slow, and what is sensible takes one of these 64 KiB
DEEPEST = 2  # a list in a mapping
ABSENT = ("null", "~")  # YAML's words for None, beside that of the command line
EXAMPLE = "write one option a line, for example anti_method: m4"


def read_recipe(file: Any, known: Mapping[str, FieldInfo]) -> dict[str, Any]:
    """A file -> values by option name, with underscores. UserError with every fault in it, each with its line."""
    path = Path(file)
    text = _text_of(path)
    try:
        faults = list(_foreign_faults(path, text))
        if faults:
            raise UserError(*faults)
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        why = str(getattr(error, "problem", None) or getattr(error, "reason", None) or "it is no YAML")
        raise UserError(Fault("the recipe cannot be read", where, why)) from error
    if root is None:
        raise UserError(Fault("the recipe is empty", str(path), fix=EXAMPLE))
    if not isinstance(root, yaml.MappingNode):
        raise UserError(Fault("the recipe is no list of options with values", str(path), fix=EXAMPLE))
    values: dict[str, Any] = {}
    for key, node in root.value:
        where = f"{path}, line {key.start_mark.line + 1}"
        try:
            name, value = _entry(key, node, where, known)
            if name in values:
                raise Refused(Fault(f"{name} is given twice", where))
            values[name] = value
        except Refused as refused:
            faults.append(refused.fault)
    if faults:
        raise UserError(*faults)
    return values


def _text_of(path: Path) -> str:
    what, where = "the recipe cannot be read", str(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(Fault(what, where, "it is not an ordinary file"))
        if status.st_size > LARGEST_FILE:
            raise UserError(Fault(what, where, f"it is larger than {LARGEST_FILE} bytes"))
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(Fault(what, where, getattr(error, "strerror", None) or str(error))) from error


def _foreign_faults(path: Path, text: str) -> Iterator[Fault]:
    """What a list of options has no use for, and what YAML's readers have been attacked with."""
    documents = depth = 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        where = f"{path}, line {event.start_mark.line + 1}"
        documents += isinstance(event, yaml.DocumentStartEvent)
        if documents > 1:
            yield Fault("the recipe holds a second document", where, fix="give one recipe a file")
            return
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            yield Fault("the recipe is nested too deeply", where, fix=EXAMPLE)
            return
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            yield Fault("anchors and aliases have no place in a recipe", where, fix="write the value out")
        if getattr(event, "tag", None) is not None:
            yield Fault(f"the tag {event.tag} has no place in a recipe", where, fix="leave the tag out")


def _entry(key: Any, node: Any, where: str, known: Mapping[str, FieldInfo]) -> tuple[str, Any]:
    """One line: option name and value, read as its option reads it. Refused otherwise."""
    if not isinstance(key, yaml.ScalarNode):
        raise Refused(Fault("the name of an option is a word", where, fix=EXAMPLE))
    given = str(key.value)
    name = given.removeprefix("--").replace("-", "_")
    if name not in known:
        fix = did_you_mean(name, known) or "vlqc compile --help lists the options"
        raise Refused(Fault(f"there is no option {given}", where, fix=fix))
    many = extra_of(known[name])["kind"] == "globs"
    try:
        value = read_value(name, known[name], _plain(name, node, where, many=many))
        _require_harmless(name, value, where)
    except Refused as refused:
        fault = refused.fault
        raise Refused(Fault(fault.what, fault.where or where, fault.why, fault.fix)) from refused
    return name, value


def _plain(name: str, node: Any, where: str, *, many: bool) -> Any:
    """A node -> its text, or the texts of a list where the option takes several."""
    if isinstance(node, yaml.ScalarNode):
        if node.value == "" and node.style is None:
            fix = f"give it one, or leave {name} out; {name}: None is none on purpose"
            raise Refused(Fault(f"{name} has no value", where, fix=fix))
        return None if node.value in ABSENT and node.style is None else node.value
    if many and isinstance(node, yaml.SequenceNode) and all(isinstance(it, yaml.ScalarNode) for it in node.value):
        return [it.value for it in node.value]
    wanted = "a pattern or a list of patterns" if many else "one value"
    raise Refused(
        Fault(f"{name} takes {wanted}", where, fix=EXAMPLE if not many else "for example exclude: ['*.o_proj']")
    )


def _require_harmless(name: str, value: Any, where: str) -> None:
    """What makes code run is the word of whoever runs it, on the command line."""
    if name == "trust_remote_code" and read_bool(name, value):
        why = "a recipe is passed from hand to hand, and this would run a checkpoint's code"
        raise Refused(Fault("a recipe cannot trust code", where, why, f"give {flag_of(name)} True on the command line"))
    if name == "pipeline" and value is not None and any(":" in each for each in names_in(value)):
        why = "module:Class would import that module"
        raise Refused(Fault("a recipe cannot name code", where, why, "give --pipeline on the command line"))
