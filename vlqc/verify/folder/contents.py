"""Checks the files of a compiled folder: weight files and their index, config, description, and side files."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlqc.errors import Fault, UserError
from vlqc.formatting import excerpt
from vlqc.targets.engine import Engine
from vlqc.targets.schemes import DEFAULT_SCHEME
from vlqc.targets.target import ENGINES, find_layout
from vlqc.verify.findings import COMPILE_AGAIN, COPY_AGAIN, VerificationResult, format_list
from vlqc.verify.folder.reader import StoredTensor, read_json, read_json_object, read_tensors

WEIGHT_FILE = re.compile(r"quant_model_weight_(?P<type>.+?)(-(?P<number>\d{5})-of-(?P<total>\d{5}))?\.safetensors")
DESCRIPTION = re.compile(r"quant_model_description.*\.json")
MANIFEST = "MANIFEST.json"
NAME = 120  # characters of a tensor's name in a message
ADAPTER = "adapter_config.json"

IMAGE_SETTINGS = "preprocessor_config.json"
# Needed to serve images and text; a folder compiled from `samples` may lack them. (title, alternatives)
SIDE_FILES = (
    ("a tokenizer", ("tokenizer.json", "vocab.json", "tokenizer.model")),
    ("tokenizer_config.json", ("tokenizer_config.json",)),
    (IMAGE_SETTINGS, (IMAGE_SETTINGS, "processor_config.json")),  # the latter from transformers 5 on
    ("generation_config.json", ("generation_config.json",)),
)


@dataclass
class FolderFiles:
    """The content of a folder; that of a file which cannot be read is empty.

    names: of all files; layout: the engine whose description it has; description_name: of that file.
    """

    path: Path
    names: list[str]
    layout: Engine
    description_name: str
    weights: list[Path] = field(default_factory=list)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def open_folder(path: Path, result: VerificationResult) -> FolderFiles:
    """Reads a folder, with a fault for every file that cannot be read. UserError if it is not a compiled folder."""
    names = _names(path)
    described = find_layout(names)
    default = ENGINES[0]  # of a folder whose description is missing
    layout, description_name = described or (default, default.description_name(DEFAULT_SCHEME))
    folder = FolderFiles(path, names, layout, description_name)
    folder.weights = [path / name for name in names if WEIGHT_FILE.fullmatch(name)]
    if described is None and not folder.weights:
        is_float = any(name.endswith(".safetensors") for name in names)
        raise UserError(
            Fault(
                "not a compiled folder",
                str(path),
                f"it has neither {description_name} nor quant_model_weight_*.safetensors",
                "this looks like a float checkpoint: compile it first, or pass it as --model_path"
                if is_float
                else "pass the folder that `vlqc compile --save_directory` wrote",
            )
        )
    for check, name in (("description", folder.description_name), ("config", "config.json")):
        result.add_examined(check)
        content, error = read_json_object(path / name) if name in names else (None, "is missing")
        if content is None:
            result.add_fault(check, name, f"{name} {error}", "engines cannot load the folder without it", COPY_AGAIN)
        elif check == "config":
            folder.config = content
        else:
            folder.description = content
    for file in folder.weights:
        _open_weights(file, folder.tensors, result)
    return folder


def _names(path: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        reason = "it does not exist" if not path.exists() else error.strerror or str(error)
        raise UserError(Fault("cannot read folder", str(path), reason, "pass an existing folder")) from None


def _open_weights(file: Path, tensors: dict[str, StoredTensor], result: VerificationResult) -> None:
    of_file, metadata, errors = read_tensors(file)
    result.add_examined("files")
    for error in errors:
        result.add_fault("files", file.name, error, "the file is damaged", COPY_AGAIN)
    if not errors and metadata.get("format") != "pt":
        result.add_fault(
            "files",
            file.name,
            f"metadata format is {metadata.get('format')!r} instead of 'pt'",
            "transformers and the engines reject safetensors files without it",
            COMPILE_AGAIN,
        )
    for name, tensor in of_file.items():
        if name in tensors:
            result.add_fault(
                "files",
                file.name,
                f"tensor {excerpt(name, NAME)} is also in {tensors[name].file.name}",
                "engines reject a tensor in two files, or keep the one that they read last",
                COMPILE_AGAIN,
            )
        tensors[name] = tensor


def check_files(folder: FolderFiles, type_name: str, result: VerificationResult, *, has_images: bool = True) -> None:
    """Checks names and numbers of the weight files, their index, and that no other weight files lie beside them.

    type_name: the folder's type in lower case, "w8a8"; has_images: whether the model reads images.
    """
    names = _names(folder.path)
    result.add_examined("files", len(names))
    known = {file.name for file in folder.weights}
    for name in names:
        stray_index = name.endswith(".safetensors.index.json") and name != _index_name(type_name)
        if (name.endswith(".safetensors") and name not in known) or stray_index:
            result.add_fault(
                "files",
                name,
                f"{name} does not belong to a compiled folder",
                "engines load every *.safetensors file, and may ignore all files that are not listed in a "
                "model.safetensors.index.json",
                "remove it",
            )
    for name in names:
        is_other = DESCRIPTION.fullmatch(name) and name != folder.description_name
        if is_other and read_json(folder.path / name)[0] != folder.description:
            what, why = f"{name} is a second description, with other entries", "each engine reads only one of them"
            result.add_fault("files", name, what, why, "remove it")
    if ADAPTER in names:
        why = "transformers and the engines take the folder for an adapter of another model"
        result.add_fault("files", ADAPTER, f"{ADAPTER} does not belong to a compiled folder", why, "remove it")
    if not folder.weights:
        what = "quant_model_weight_*.safetensors is missing"
        result.add_fault("files", str(folder.path), what, "the folder has no weights", COPY_AGAIN)
    for name in sorted(known):
        match = WEIGHT_FILE.fullmatch(name)
        if match and match["type"] != type_name:
            expected = name.replace(match["type"], type_name, 1)
            why = f"the name contains the folder's type, which is {type_name} by its layers' schemes"
            result.add_fault("files", name, f"named {name} instead of {expected}", why, COMPILE_AGAIN)
    _check_numbers(sorted(known), result)
    _check_index(folder, type_name, result)
    for title, choices in SIDE_FILES:
        if not any(choice in names for choice in choices) and (has_images or title != IMAGE_SETTINGS):
            result.add_warning(
                "files",
                title,
                f"{title} is missing",
                "engines need it to serve images and text; a folder compiled from `samples` has none",
                "copy it from the float checkpoint",
            )


def check_side_files(folder: FolderFiles, result: VerificationResult) -> None:
    """Checks that every other JSON file can be read, because engines read them only when they start."""
    for name in _names(folder.path):
        checked = name in (MANIFEST, "config.json", folder.description_name) or name.endswith(".safetensors.index.json")
        if not name.endswith(".json") or checked:
            continue
        result.add_examined("files")
        if error := read_json(folder.path / name)[1]:
            why, fix = "engines cannot read it either", "copy it from the float checkpoint"
            result.add_fault("files", name, f"{name} {error}", why, fix)


def _check_numbers(names: list[str], result: VerificationResult) -> None:
    """Files named -0000i-of-0000K must have the same K and all numbers 1 to K, and no unnumbered file beside them."""
    matches = [match for name in names if (match := WEIGHT_FILE.fullmatch(name))]
    numbered = [match for match in matches if match["number"]]
    unnumbered = [match for match in matches if not match["number"]]
    totals = {int(match["total"]) for match in numbered}
    numbers = [int(match["number"]) for match in numbered]
    if len(unnumbered) > 1 or (unnumbered and numbered) or len(totals) > 1:
        why = "they are numbered for different totals, or not at all"
        result.add_fault("files", format_list(names), "weight files of different sets", why, COMPILE_AGAIN)
    elif totals and numbers != list(range(1, max(totals) + 1)):
        missing = sorted(set(range(1, max(totals) + 1)) - set(numbers))
        result.add_fault(
            "files",
            format_list(names),
            f"missing weight files: {format_list(missing)} of {max(totals)}",
            "an engine may load the folder without an error and run their layers on uninitialized memory",
            COPY_AGAIN,
        )


def _index_name(type_name: str) -> str:
    return f"quant_model_weight_{type_name}.safetensors.index.json"


def _check_index(folder: FolderFiles, type_name: str, result: VerificationResult) -> None:
    name = _index_name(type_name)
    if not (folder.path / name).exists():
        if len(folder.weights) > 1:
            result.add_fault("index", name, f"{name} is missing", "several weight files need an index", COPY_AGAIN)
        return
    content, error = read_json_object(folder.path / name)
    if content is None:
        result.add_fault("index", name, f"{name} {error}", "engines find the weight files by it", COPY_AGAIN)
        return
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, Mapping):
        result.add_fault("index", name, f"{name} has no weight_map", "engines find the weight files by it", COPY_AGAIN)
        return
    result.add_examined("index", len(weight_map))
    why = "engines load a tensor from the file that the index gives"
    for tensor in sorted(folder.tensors.keys() | weight_map.keys()):
        stored, listed = folder.tensors.get(tensor), weight_map.get(tensor)
        shown = excerpt(tensor, NAME)
        if stored is None:
            result.add_fault("index", name, f"it lists {shown}, which no file contains", why, COPY_AGAIN)
        elif tensor not in weight_map:
            result.add_fault("index", name, f"it does not list {shown} of {stored.file.name}", why, COMPILE_AGAIN)
        elif listed != stored.file.name:
            what = f"it lists {shown} in {excerpt(listed)} instead of {stored.file.name!r}"
            result.add_fault("index", name, what, why, COMPILE_AGAIN)
    metadata = content.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    size = sum(tensor.nbytes for tensor in folder.tensors.values())
    if total != size:
        what, why = (
            f"metadata.total_size is {excerpt(total)} instead of {size}",
            "it is the size of all tensors in bytes",
        )
        result.add_fault("index", name, what, why, COMPILE_AGAIN)
