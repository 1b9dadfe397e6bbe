"""Takes off what training wrappers add to the names of tensors, so that the names are those of the model.

`torch.compile`, FSDP, DDP, DeepSpeed and PEFT wrap modules, and a checkpoint saved from a wrapped model has their
attributes in its names: `_orig_mod.model.layers.0...`, `base_model.model.model.layers.0.self_attn.q_proj.base_layer`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vlqc.errors import Fault
from vlqc.families.family import ModelFamily
from vlqc.formatting import pluralize

# Attributes of wrappers, anywhere in a name. No module of a model is called so.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")
# Attributes of PEFT, beside which the weights are not those of the merged model.
ADAPTER_PARTS = (
    "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "modules_to_save",
    "original_module",
)  # fmt: skip
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class PlainNames:
    """names: stored name -> name without wrappers; notes: what was taken off; faults: why the names are unusable."""

    names: dict[str, str]
    notes: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def plain_names(stored: Iterable[str], family: ModelFamily | None, where: str) -> PlainNames:
    """Names of tensors in files -> names without wrappers, in any transformers version's form.

    A prefix is taken off if no name is that of a block of the family as it is, and all names are with the same prefix
    taken off. Without a family there is nothing to compare with. where: the folder, for messages.
    """
    stored, notes = list(stored), []
    if found := [name for name in stored if any(part in ADAPTER_PARTS for part in name.split("."))]:
        return PlainNames({}, faults=[_unmerged(found, where)])
    names = {name: without_wrappers(name) for name in stored}
    removed = {part for name in stored for part in name.split(".") if part in WRAPPERS}
    if removed:
        notes.append(f"{' and '.join(sorted(removed))} in tensor names, from a training wrapper, is taken off")
    if "base_layer" in removed:
        notes.append(
            "the checkpoint holds the weights beneath an adapter, without the adapter's own; merge it with --lora"
        )
    prefix, faults = find_prefix(names.values(), family, where)
    if prefix:
        notes.append(f"the prefix {prefix!r} of all tensor names, from a training wrapper, is taken off")
        names = {name: plain.removeprefix(prefix) for name, plain in names.items()}
    return PlainNames(names, notes, faults)


def without_wrappers(name: str) -> str:
    """A name without the components in WRAPPERS."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def find_prefix(names: Iterable[str], family: ModelFamily | None, where: str) -> tuple[str, list[Fault]]:
    """The prefix in front of the names of a family's blocks, "" if there is none, and faults if there are several.

    A copy of the blocks, some of whose tensors are there without its prefix, too, stays what it is.
    """
    names = list(names)
    if family is None or not family.block_lists:
        return "", []
    plain = {family.checkpoint_name(name) for name in names if _block(name, family)}
    found = {name: prefixes for name in names if (prefixes := _prefixes(name, family))}
    if plain:
        copies = {
            prefix
            for name, prefixes in found.items()
            for prefix in prefixes
            if family.checkpoint_name(name.removeprefix(prefix)) in plain
        }
        found = {name: prefixes for name, prefixes in found.items() if not copies.intersection(prefixes)}
    if not found:
        return "", [] if plain else _lacking(names, family, where)
    common = set.intersection(*map(set, found.values()))
    if plain:  # such as model.visual of a newer version of transformers, among names that all begin with model.
        common = {prefix for prefix in common if _is_in_front_of_all(prefix, names, family)}
    if not common:
        return "", [_ambiguous(Counter(prefixes[0] for prefixes in found.values()), len(plain), where)]
    prefix = min(common, key=len)
    if others := [name for name in names if not name.startswith(prefix)]:
        shown = ", ".join(others[:SHOWN])
        what = f"the names of {pluralize(len(found), 'tensor')} begin with {prefix!r}, others do not"
        fix = "save the model again, from inside its training wrapper"
        return "", [Fault(what, where, f"{len(others)} do not: {shown}", fix)]
    return prefix, []


def _is_in_front_of_all(prefix: str, names: Sequence[str], family: ModelFamily) -> bool:
    """Whether all names begin with a prefix, and those of blocks are still names of blocks without it."""
    return all(
        name.startswith(prefix) and (not _block(name, family) or _block(name.removeprefix(prefix), family))
        for name in names
    )


def _block(name: str, family: ModelFamily) -> str | None:
    return family.block(family.checkpoint_name(name))


def _prefixes(name: str, family: ModelFamily) -> list[str]:
    """The prefixes of a name behind which it is that of a tensor of a block, the shortest first."""
    if _block(name, family):
        return []
    starts = [number + 1 for number, letter in enumerate(name) if letter == "."]
    return [name[:start] for start in starts if _block(name[start:], family)]


def _lacking(names: Sequence[str], family: ModelFamily, where: str) -> list[Fault]:
    """A fault if the names are those of blocks behind a component that they lack, as of a model inside the model."""
    lists = [prefix.split(".") for prefix in family.block_lists]
    starts = {".".join(parts[:count]) + "." for parts in lists for count in range(1, len(parts))}
    for start in sorted(starts, key=len):
        count = sum(1 for name in names if _block(start + name, family))
        if count:
            what = f"the names of {pluralize(count, 'tensor')} lack the prefix {start!r}"
            why = "a part of the model was saved on its own, such as the decoder without its output head"
            return [Fault(what, where, why, "save the whole model, and pass its folder")]
    return []


def _unmerged(names: Sequence[str], where: str) -> Fault:
    why = f"{pluralize(len(names), 'tensor')} of an adapter {'is' if len(names) == 1 else 'are'} among the weights"
    fix = (
        "save the model after merge_and_unload(); or save the adapter alone, and pass the float checkpoint as "
        "--model_path and the adapter with --lora"
    )
    shown = ", ".join(names[:SHOWN])
    return Fault("the checkpoint holds an adapter that is not merged", where, f"{why}: {shown}", fix)


def _ambiguous(prefixes: Counter[str], plain: int, where: str) -> Fault:
    counts = [f"{prefix!r} before {pluralize(count, 'name')}" for prefix, count in sorted(prefixes.items())]
    counts += [f"none before {pluralize(plain, 'name')}"] if plain else []
    fix = "save the model again, from inside its training wrapper"
    return Fault("tensor names have different prefixes", where, ", ".join(counts), fix)
