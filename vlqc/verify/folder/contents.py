"""Which files a compiled folder holds: weight files, their index, the description, what the processor needs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlqc.errors import Fault, UserError
from vlqc.targets.engine import Engine
from vlqc.targets.mindie import MINDIE
from vlqc.targets.vllm_ascend import VLLM_ASCEND
from vlqc.verify.findings import VerificationResult, format_list
from vlqc.verify.folder.reader import StoredTensor, read_json, read_json_object, read_tensors

WEIGHT_FILE = re.compile(r"quant_model_weight_(?P<type>.+?)(-(?P<number>\d{5})-of-(?P<total>\d{5}))?\.safetensors")
MANIFEST = "MANIFEST.json"
DESCRIPTION = "quant_model_description.json"
MINDIE_DESCRIPTION = re.compile(r"quant_model_description_.+\.json")

# What serving pictures takes besides the weights; a folder compiled from ready tensors may lack them.
SIDE_FILES = (
    ("a tokenizer", ("tokenizer.json", "vocab.json", "tokenizer.model")),
    ("tokenizer_config.json", ("tokenizer_config.json",)),
    ("preprocessor_config.json", ("preprocessor_config.json",)),
    ("generation_config.json", ("generation_config.json",)),
)


@dataclass
class FolderFiles:
    """What was read of a folder. A file that cannot be read is reported and its content left empty."""

    path: Path
    layout: Engine  # whose description file it has
    weights: list[Path] = field(default_factory=list)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    description_name: str = DESCRIPTION
    config: dict[str, Any] = field(default_factory=dict)


def open_folder(path: Path, result: VerificationResult) -> FolderFiles:
    """Folder -> what is in it, with a finding for every file that cannot be read. UserError: not a compiled folder."""
    names = _names(path)
    mindie = sorted(name for name in names if MINDIE_DESCRIPTION.fullmatch(name))
    folder = FolderFiles(path, MINDIE if mindie and DESCRIPTION not in names else VLLM_ASCEND)
    folder.weights = [path / name for name in names if WEIGHT_FILE.fullmatch(name)]
    if DESCRIPTION not in names and not mindie and not folder.weights:
        is_float = any(name.endswith(".safetensors") for name in names)
        raise UserError(
            Fault(
                f"{path} is not a compiled folder",
                str(path),
                f"it has neither {DESCRIPTION} nor quant_model_weight_*.safetensors",
                "this looks like a float checkpoint: compile it first, or give it as --model_path"
                if is_float
                else "give the folder that `vlqc compile --save_directory` wrote",
            )
        )
    if mindie and folder.layout == MINDIE:
        folder.description_name = mindie[0]
    for check, name in (("description", folder.description_name), ("config", "config.json")):
        result.add_examined(check)
        content, trouble = read_json_object(path / name) if name in names else (None, "is missing")
        if content is None:
            result.add_fault(check, name, f"{name} {trouble}", "engines read it before anything else", "compile again")
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
        raise UserError(Fault(f"cannot read the folder {path}", str(path), reason, "give an existing folder")) from None


def _open_weights(file: Path, tensors: dict[str, StoredTensor], result: VerificationResult) -> None:
    found, metadata, troubles = read_tensors(file)
    result.add_examined("files")
    for trouble in troubles:
        result.add_fault("files", file.name, trouble, "the file is damaged", "copy the folder again, or compile again")
    if not troubles and metadata.get("format") != "pt":
        result.add_fault(
            "files",
            file.name,
            f'its metadata says format {metadata.get("format")!r}, not "pt"',
            "transformers and the engines refuse safetensors files without it",
        )
    for name, tensor in found.items():
        if name in tensors:
            result.add_fault(
                "files",
                file.name,
                f"tensor {name!r} is also in {tensors[name].file.name}",
                "MindIE refuses a tensor in two files, vLLM Ascend keeps whichever it reads last",
            )
        tensors[name] = tensor


def check_files(folder: FolderFiles, type_name: str, result: VerificationResult) -> None:
    """Names of weight files against the folder's type (lower case, e.g. "w8a8"), stray files, index, side files."""
    names = _names(folder.path)
    result.add_examined("files", len(names))
    known = {file.name for file in folder.weights}
    for name in names:
        stray_index = name.endswith(".safetensors.index.json") and name != _index_name(type_name)
        if (name.endswith(".safetensors") and name not in known) or stray_index:
            result.add_fault(
                "files",
                name,
                f"{name} does not belong here",
                "engines load every *.safetensors file; given a model.safetensors.index.json, vLLM Ascend drops every "
                "file that is not named in it",
                "remove it",
            )
    if not folder.weights:
        result.add_fault("files", str(folder.path), "there is no quant_model_weight_*.safetensors", "", "compile again")
    for name in sorted(known):
        match = WEIGHT_FILE.fullmatch(name)
        if match and match["type"] != type_name:
            expected = name.replace(match["type"], type_name, 1)
            result.add_fault(
                "files", name, f"a folder of type {type_name} names this file {expected}", "", "compile again"
            )
    _check_numbers(sorted(known), result)
    _check_index(folder, type_name, result)
    for title, choices in SIDE_FILES:
        if not any(choice in names for choice in choices):
            result.add_warning(
                "files",
                title,
                f"{title} is missing",
                "an engine needs it to serve pictures and text; a folder compiled from ready tensors has none",
                "copy it from the float checkpoint",
            )


def check_side_files(folder: FolderFiles, result: VerificationResult) -> None:
    """Every other JSON file of a folder: engines read them when they start, long after it was copied."""
    for name in _names(folder.path):
        ours = name in (MANIFEST, "config.json", folder.description_name) or name.endswith(".safetensors.index.json")
        if not name.endswith(".json") or ours:  # those are looked at, each in its check
            continue
        result.add_examined("files")
        if trouble := read_json(folder.path / name)[1]:
            why, fix = "what serves the folder could not read it either", "copy it from the float checkpoint"
            result.add_fault("files", name, f"{name} {trouble}", why, fix)


def _check_numbers(names: list[str], result: VerificationResult) -> None:
    """-0000i-of-0000K: all of one K, numbers 1 to K complete; no unnumbered file beside them."""
    matches = [match for name in names if (match := WEIGHT_FILE.fullmatch(name))]
    numbered = [match for match in matches if match["number"]]
    unnumbered = [match for match in matches if not match["number"]]
    totals = {int(match["total"]) for match in numbered}
    numbers = [int(match["number"]) for match in numbered]
    if len(unnumbered) > 1 or (unnumbered and numbered) or len(totals) > 1:
        result.add_fault("files", format_list(names), "these weight files do not belong together", "", "compile again")
    elif totals and numbers != list(range(1, max(totals) + 1)):
        missing = sorted(set(range(1, max(totals) + 1)) - set(numbers))
        result.add_fault(
            "files",
            format_list(names),
            f"weight files {format_list(missing)} of {max(totals)} are missing",
            "vLLM Ascend does not notice: the layers in them would stay uninitialised",
            "copy the folder again",
        )


def _index_name(type_name: str) -> str:
    return f"quant_model_weight_{type_name}.safetensors.index.json"


def _check_index(folder: FolderFiles, type_name: str, result: VerificationResult) -> None:
    name = _index_name(type_name)
    if not (folder.path / name).exists():
        if len(folder.weights) > 1:
            result.add_fault("index", name, f"{name} is missing", "several weight files need an index", "compile again")
        return
    content, trouble = read_json_object(folder.path / name)
    if content is None:
        result.add_fault("index", name, f"{name} {trouble}")
        return
    placed = content.get("weight_map")
    if not isinstance(placed, Mapping):
        result.add_fault("index", name, "it has no weight_map")
        return
    result.add_examined("index", len(placed))
    for tensor in sorted(folder.tensors.keys() | placed.keys()):
        stored = folder.tensors.get(tensor)
        if stored is None:
            result.add_fault("index", name, f"it lists {tensor!r}, which no file contains")
        elif tensor not in placed:
            result.add_fault("index", name, f"it does not list {tensor!r}, which is in {stored.file.name}")
        elif placed[tensor] != stored.file.name:
            result.add_fault("index", name, f"it places {tensor!r} in {placed[tensor]!r}; it is in {stored.file.name}")
    metadata = content.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    size = sum(tensor.nbytes for tensor in folder.tensors.values())
    if total != size:
        result.add_fault("index", name, f"metadata.total_size is {total!r}; the tensors take {size} bytes")
