"""Reads adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors.

An adapter is read as a list of updates of tensors of the float checkpoint, in the arithmetic of PEFT's
`merge_and_unload`: LoRA (Hu et al., 2021) adds `scaling * B A`; DoRA (Liu et al., 2024) scales the rows of the sum to
the norms that it learned; a module that was trained as a whole replaces its tensors. No tensor is read here.
"""

import contextlib
import functools
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlqc.errors import Fault, UserError
from vlqc.families.family import ModelFamily
from vlqc.files import is_lfs_pointer, read_json_object, sha256_of
from vlqc.formatting import enumerate_first, excerpt, pluralize
from vlqc.frontend.checkpoint.header import TensorEntry, read_header
from vlqc.frontend.checkpoint.layer_patterns import LayerPattern
from vlqc.frontend.checkpoint.names import find_prefix, without_wrappers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UNSAFE_WEIGHTS = "adapter_model.bin"
FLAG = "--lora"
PREFIX = "base_model.model."  # in front of the names of a PEFT model
DTYPES = ("F32", "BF16", "F16", "F64")
MERGE = "merge it with PEFT's merge_and_unload(), and pass the merged checkpoint as --model_path"
# Values of init_lora_weights with which the weights of the base model are not changed when training begins.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Keys of adapter_config.json with a value under which the adapter is more than an addition to matrices.
UNSUPPORTED = {
    "target_parameters": "parameters that are not the weight of a layer, such as experts stored in one tensor",
    "trainable_token_indices": "single rows of the embedding (trainable_token_indices)",
    "layer_replication": "layers that are repeated (layer_replication)",
    "alora_invocation_tokens": "activation by certain tokens (aLoRA)",
    "megatron_config": "Megatron's parallel layers",
    "arrow_config": "routing between adapters (Arrow)",
}  # fmt: skip
SHOWN = 5  # names in a message

LOW_RANK = re.compile(r"(?P<path>.+)\.lora_(?P<factor>[AB])(?:\.(?!weight$|bias$)[^.]+)?\.(?P<kind>weight|bias)")
EMBEDDING = re.compile(r"(?P<path>.+)\.lora_embedding_(?P<factor>[AB])(?:\.[^.]+)?")
MAGNITUDE = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(?:\.[^.]+)*")
SAVED = re.compile(r"\.modules_to_save(?:\.(?!weight$|bias$)[^.]+)?(?=\.(?:.+\.)?[^.]+$)")


@dataclass(frozen=True)
class AdapterTensor:
    """A tensor in the file of an adapter: stored name, file, dtype code, shape, and where its data begins and ends."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Update:
    """What one adapter does to a tensor W.

    W becomes `value`; then W + scaling * B A, or its rows scaled to the norms `magnitude`; then W + scaling * bias.

    a, b: of a linear layer or convolution [r, inputs..] and [outputs, r..]; of an embedding, transposed, [r, rows] and
    [columns, r].
    """

    value: AdapterTensor | None = None
    a: AdapterTensor | None = None
    b: AdapterTensor | None = None
    is_embedding: bool = False
    magnitude: AdapterTensor | None = None
    bias: AdapterTensor | None = None
    scaling: float = 1.0


@dataclass(frozen=True)
class AdapterId:
    """name: of the folder; sha256: of the digests of both files, hexadecimal."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Adapter:
    """An adapter that is read.

    id: for reports, without paths; updates: by the path of a module or the name of a tensor, as the adapter calls it;
    modules_to_save: their names in adapter_config.json; ties: whether it keeps the output head and the embedding equal.
    """

    folder: Path
    id: AdapterId
    updates: dict[str, Update]
    modules_to_save: tuple[str, ...] = ()
    ties: bool = False

    def fault(self, what: str, why: str = "", fix: str = MERGE) -> Fault:
        return Fault(what, str(self.folder), why, fix)


def read_adapters(folders: Sequence[Path]) -> list[Adapter]:
    """The adapters in these folders, in order. UserError with the faults of all of them."""
    adapters: list[Adapter] = []
    faults: list[Fault] = []
    for folder in folders:
        try:
            adapters.append(read_adapter(folder))
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(*faults)
    return adapters


def read_adapter(folder: Path) -> Adapter:
    """UserError for a folder without the two files, a kind of adapter that cannot be merged, and damaged files."""
    if not folder.is_dir():
        raise UserError(Fault(f"{FLAG}: no such folder", str(folder), fix="pass the folder of an adapter"))
    config = read_json_object(folder / CONFIG, missing=lambda: UserError(_without_config(folder)))
    if faults := list(_config_faults(config, str(folder))):
        raise UserError(*faults)
    if not (folder / WEIGHTS).is_file():
        raise UserError(_weights_fault(folder))
    try:
        header = read_header(folder / WEIGHTS)
        errors = header.faults
    except (OSError, ValueError) as error:
        header, errors = None, [str(error)]
    if header is None or errors:
        fix = "run `git lfs pull` in the folder" if is_lfs_pointer(folder / WEIGHTS) else "copy the file again"
        raise UserError(Fault("the adapter cannot be read", str(folder / WEIGHTS), "; ".join(errors[:SHOWN]), fix))
    updates, faults = _updates(folder, header.tensors, config)
    if not faults and not updates:
        faults.append(Fault("the adapter holds no tensors", str(folder / WEIGHTS), fix="save the adapter again"))
    if faults:
        raise UserError(*faults)
    digests = " ".join(sha256_of(folder / name) for name in (CONFIG, WEIGHTS))
    saved = config.get("modules_to_save")
    return Adapter(
        folder,
        AdapterId(folder.resolve().name, hashlib.sha256(digests.encode()).hexdigest()),
        updates,
        tuple(map(str, saved)) if isinstance(saved, list) else (),
        bool(config.get("ensure_weight_tying")),
    )


def _without_config(folder: Path) -> Fault:
    """The fault of a folder that is not an adapter; the newest checkpoint of a training run inside it is named."""
    below = [path for path in folder.glob("checkpoint-*") if is_adapter(path) and path.name[11:].isdecimal()]
    fix = f"pass the folder that holds {CONFIG}"
    if below:
        fix = f"pass its newest checkpoint: {FLAG} {max(below, key=lambda path: int(path.name[11:]))}"
    return Fault(f"the folder has no {CONFIG}", str(folder), "it is not an adapter of PEFT", fix)


def is_adapter(folder: Path) -> bool:
    """Whether a folder has the configuration of an adapter."""
    return (folder / CONFIG).is_file()


def adapter_as_model(folder: Path) -> Fault:
    """For a folder with an adapter and without a model that is passed as --model_path."""
    base = ""
    with contextlib.suppress(UserError):  # reported when the folder is passed with --lora
        base = str(read_json_object(folder / CONFIG).get("base_model_name_or_path") or "")
    why = "it holds an adapter without the weights of its float model" + (f", which is {base}" if base else "")
    fix = f"pass the float model as --model_path, and this folder with {FLAG}"
    return Fault("the folder is an adapter, not a model", str(folder), why, fix)


# ---- adapter_config.json ---------------------------------------------------------------------------------------------


def _config_faults(config: Mapping[str, Any], where: str) -> Iterator[Fault]:
    """What in the configuration of an adapter cannot be merged."""
    kind = str(config.get("peft_type", "none")).rpartition(".")[2]
    if kind.upper() != "LORA":
        what = f"adapters of type {enumerate_first([kind])} cannot be merged"
        yield Fault(what, where, "only LoRA and DoRA are supported", MERGE)
        return
    for key, what in UNSUPPORTED.items():
        if config.get(key):
            yield Fault(f"the adapter changes {what}", where, "vlqc merges LoRA layers only", MERGE)
    for key, value in config.items():
        if key.startswith("use_") and value and key not in ("use_rslora", "use_dora"):
            yield Fault(f"the adapter has {key}", where, "vlqc does not know its arithmetic", MERGE)
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        why = "it changes the weights of the float model when training begins, which the adapter does not hold"
        fix = "convert it to a plain LoRA with PEFT (path_initial_model_for_weight_conversion), or merge it with PEFT"
        yield Fault(f"the adapter was initialized with {enumerate_first([str(init)])}", where, why, fix)
    numbers = {"r": config.get("r", 8), "lora_alpha": config.get("lora_alpha", 8)}
    for pattern in ("rank_pattern", "alpha_pattern"):
        entries = config.get(pattern) or {}
        if not isinstance(entries, Mapping):
            yield Fault(f"{pattern} is not an object", where, fix="save the adapter again")
            continue
        numbers |= {f"{pattern}[{excerpt(key)}]": value for key, value in entries.items()}
        for key in entries:
            try:
                _pattern(key)
            except ValueError as error:
                what = f"{pattern} has the invalid pattern {excerpt(key)}"
                yield Fault(what, where, str(error), "save the adapter again with names of layers")
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            what, why = f"{key} of the adapter is {excerpt(value)}", "it must be a positive number"
            yield Fault(what, where, why, "save the adapter again")


def _pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first key that matches a module's path, as PEFT matches it."""
    return next((value for key, value in patterns.items() if _pattern(key).matches_end(path)), default)


@functools.cache
def _pattern(key: str) -> LayerPattern:
    return LayerPattern(key)


def _scaling(config: Mapping[str, Any], path: str, rank: int) -> float:
    alpha = _pattern_value(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


# ---- adapter_model.safetensors ---------------------------------------------------------------------------------------


def _weights_fault(folder: Path) -> Fault:
    if (folder / UNSAFE_WEIGHTS).is_file():
        why = "loading it runs code"
        fix = "load the adapter with PEFT and save it again with save_pretrained(), which writes safetensors"
        return Fault(f"{UNSAFE_WEIGHTS} is not read", str(folder), why, fix)
    return Fault(f"the adapter has no {WEIGHTS}", str(folder), fix="copy the adapter again")


def _updates(
    folder: Path, tensors: Mapping[str, TensorEntry], config: Mapping[str, Any]
) -> tuple[dict[str, Update], list[Fault]]:
    """Tensors of an adapter -> updates by name in the adapter, and faults."""
    file, faults = folder / WEIGHTS, []
    if empty := [name for name, entry in tensors.items() if entry.shape == (0,)]:
        what = f"{len(empty)} of {pluralize(len(tensors), 'tensor')} are empty, of shape [0], such as {empty[0]}"
        why = "saved by DeepSpeed ZeRO-3 without gathering the weights"
        fix = "save the adapter again with stage3_gather_16bit_weights_on_model_save"
        return {}, [Fault(what, str(file), why, fix)]
    layers: dict[str, dict[str, AdapterTensor]] = {}  # path of a module -> part -> tensor
    values: dict[str, AdapterTensor] = {}

    def add(table: dict[str, AdapterTensor], key: str, tensor: AdapterTensor) -> None:
        if (other := table.setdefault(key, tensor)) is not tensor:
            what = f"{excerpt(other.name, 120)} and {excerpt(tensor.name, 120)} are for the same tensor"
            fix = "save the adapter again, without any other one"
            faults.append(Fault(what, str(file), "only one of them can count", fix))

    for stored, entry in tensors.items():
        tensor = AdapterTensor(stored, file, entry.dtype, entry.shape, entry.begin, entry.end)
        name = without_wrappers(_without_prefix(stored))
        if entry.dtype not in DTYPES:
            faults.append(Fault(f"{stored} has dtype {entry.dtype}", str(file), "it must be a float dtype", MERGE))
        elif match := LOW_RANK.fullmatch(name):
            add(layers.setdefault(match["path"], {}), f"{match['factor']}.{match['kind']}", tensor)
        elif match := EMBEDDING.fullmatch(name):
            add(layers.setdefault(match["path"], {}), f"embedding {match['factor']}", tensor)
        elif match := MAGNITUDE.fullmatch(name):
            add(layers.setdefault(match["path"], {}), "magnitude", tensor)
        elif any(part.startswith("lora_") for part in name.split(".")):
            faults.append(Fault(f"{stored} is not known", str(file), "it is no part of a LoRA layer", MERGE))
        else:
            add(values, SAVED.sub("", name), tensor)
    updates = {name: Update(value=value) for name, value in values.items()}
    for path, parts in layers.items():
        try:
            of_layer = _layer_updates(path, parts, config)
        except ValueError as error:
            faults.append(Fault(f"the adapter of {path} cannot be merged", str(file), str(error), MERGE))
            continue
        for name, update in of_layer.items():
            value = values.get(name)
            updates[name] = update if value is None else Update(**{**vars(update), "value": value})
    return updates, faults


def _without_prefix(name: str) -> str:
    while name.startswith(PREFIX):
        name = name.removeprefix(PREFIX)
    return name


def _layer_updates(path: str, parts: Mapping[str, AdapterTensor], config: Mapping[str, Any]) -> dict[str, Update]:
    """The updates of weight and bias of a layer by name. ValueError if the tensors of the adapter do not fit."""
    is_embedding = any(part.startswith("embedding") for part in parts)
    a, b = (parts.get(f"embedding {factor}" if is_embedding else f"{factor}.weight") for factor in "AB")
    if a is None or b is None:
        raise ValueError(f"one of its two matrices is missing: it has {', '.join(sorted(parts))}")
    rank = a.shape[0] if a.shape else 0
    if len(a.shape) < 2 or len(b.shape) != len(a.shape) or not rank or math.prod(b.shape) != b.shape[0] * rank:
        raise ValueError(f"A {list(a.shape)} and B {list(b.shape)} are not factors of a matrix")
    stated = _pattern_value(config.get("rank_pattern") or {}, path, config.get("r", 8))
    if stated != rank:
        raise ValueError(f"A has rank {rank}, adapter_config.json says {stated}")
    magnitude = parts.get("magnitude")
    if (magnitude is not None) != bool(config.get("use_dora")):
        missing = "is missing" if magnitude is None else "exists, but use_dora is not set"
        raise ValueError(f"lora_magnitude_vector {missing}")
    if magnitude is not None and (is_embedding or len(a.shape) > 2):
        raise ValueError("DoRA is supported for linear layers only")
    if "A.bias" in parts:
        raise ValueError("A has a bias")
    scaling = _scaling(config, path, rank)
    updates = {f"{path}.weight": Update(None, a, b, is_embedding, magnitude, None, scaling)}
    if (bias := parts.get("B.bias")) is not None:
        if magnitude is not None:
            raise ValueError("it has both lora_bias and DoRA")
        updates[f"{path}.bias"] = Update(bias=bias, scaling=scaling)
    return updates


# ---- an adapter and a checkpoint -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatchedAdapter:
    """An adapter whose names are those of a checkpoint.

    updates: by checkpoint name, without that of an output head that shares the embedding's weight: head.
    """

    adapter: Adapter
    updates: dict[str, Update]
    head: Update | None


def match_adapter(
    adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], family: ModelFamily | None, *, tied: bool
) -> tuple[MatchedAdapter, list[Fault]]:
    """Finds the tensors of a checkpoint that an adapter changes, and faults.

    shapes: of the tensors of the checkpoint; tied: whether its output head shares the embedding's weight. Names in the
    adapter are those of the modules of any transformers version, with or without prefixes of training wrappers.
    """
    prefix, faults = find_prefix(adapter.updates, family, str(adapter.folder))
    table = f"{family.output_head}.weight" if family and tied else None
    updates: dict[str, Update] = {}
    missing: list[str] = []
    head = None
    for name, update in adapter.updates.items():
        plain = name.removeprefix(prefix)
        plain = family.checkpoint_name(plain) if family else plain
        if plain == table:
            head = update
            continue
        found = plain if plain in shapes else None
        if found is None and update.bias is not None and update.value is None:
            layer = name.rpartition(".")[0]
            faults.append(adapter.fault(f"lora_bias of {layer} cannot be merged", "the layer has no bias"))
        elif found is None:
            missing.append(name)
        elif found in updates:
            faults.append(adapter.fault(f"the adapter has two updates of {found}"))
        elif why := _misfit(update, shapes[found]):
            faults.append(adapter.fault(f"the adapter does not fit {found}", why, _fix_of_misfit(update)))
        else:
            updates[found] = update
    if missing and not faults:
        shown = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else "")
        why = f"{pluralize(len(missing), 'tensor')} of {len(adapter.updates)} that the adapter changes: {shown}"
        fix = "pass the adapter of this model, or the model of this adapter"
        faults.append(adapter.fault("the checkpoint has no layers of the names in the adapter", why, fix))
    return MatchedAdapter(adapter, updates, head), faults


def _misfit(update: Update, shape: tuple[int, ...]) -> str:
    """Why an update does not fit a tensor of this shape; "" if it does."""
    if update.value is not None and update.value.shape != shape:
        return f"it holds {list(update.value.shape)}, the checkpoint {list(shape)}"
    if update.bias is not None and update.bias.shape != shape:
        return f"its bias is {list(update.bias.shape)}, that of the checkpoint {list(shape)}"
    if update.a is None or update.b is None:
        return ""
    outputs, inputs = (update.a.shape[1:], update.b.shape[:1]) if update.is_embedding else (
        update.b.shape[:1], update.a.shape[1:]
    )  # fmt: skip
    if (*outputs, *inputs) != shape:
        return f"its product is {[*outputs, *inputs]}, the weight {list(shape)}"
    if update.magnitude is not None and math.prod(update.magnitude.shape) != shape[0]:
        return f"lora_magnitude_vector has {list(update.magnitude.shape)} values for {shape[0]} rows"
    return ""


def _fix_of_misfit(update: Update) -> str:
    if update.value is not None and len(update.value.shape) == 2:
        return f"if tokens were added in training: resize the model's embeddings with PEFT's base model, then {MERGE}"
    return "pass the adapter of this model, or the model of this adapter"


def shared_weight_faults(matched: MatchedAdapter, embedding: str, table: str) -> list[Fault]:
    """For a model whose output head shares the embedding's weight: faults of an adapter that changes one of them.

    embedding, table: names of the two weights.
    """
    adapter, head = matched.adapter, matched.head
    both = [update for update in (matched.updates.get(embedding), head) if update is not None]
    if not both:
        return []
    names = f"{embedding} and {table} are one weight"
    fix = "untie the embeddings of the float model, store both weights, and merge the adapter there"
    if any(update.a is not None for update in both):
        what = "the adapter changes only one use of a weight that is used twice"
        return [adapter.fault(what, names, fix)]
    if len(both) == 2 and not _same_values(both[0].value, both[1].value):
        return [adapter.fault("the adapter has different weights for the embedding and the output head", names, fix)]
    trained = any(f".{embedding}".endswith(f".{name}.weight") for name in adapter.modules_to_save)
    if len(both) == 1 and (head is not None or (trained and not adapter.ties)):
        return [adapter.fault("the adapter replaces only one use of a weight that is used twice", names, fix)]
    return []


def _same_values(one: AdapterTensor | None, other: AdapterTensor | None) -> bool:
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return _read(one) == _read(other)


def _read(tensor: AdapterTensor) -> bytes:
    with tensor.file.open("rb") as file:
        file.seek(tensor.begin)
        return file.read(tensor.end - tensor.begin)
