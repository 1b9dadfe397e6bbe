"""What a folder is that is not a checkpoint that can be read, and what to do about it: one fault for each situation."""

import re
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from vlqc.errors import Fault
from vlqc.files import is_lfs_pointer
from vlqc.formatting import pluralize
from vlqc.frontend.checkpoint.adapters import FLAG as ADAPTER_FLAG
from vlqc.frontend.checkpoint.adapters import is_adapter

CONFIG = "config.json"
SNAPSHOTS, BLOBS = "snapshots", "blobs"  # models--NAME/snapshots/REVISION/FILE -> ../../blobs/DIGEST
REPOSITORY = "models--"
POINTER_SUFFIXES = (".json", ".jinja", ".model", ".safetensors", ".tiktoken", ".txt")  # of files that are read
SHOWN = 3  # names in a message
LARGEST_LISTING = 10_000  # entries of a folder that are looked at
CONVERT = "convert the checkpoint to safetensors first"
# `weights_only` reads tensors and runs no code of the file; tensors that share memory are stored once each.
TO_SAFETENSORS = (
    "import sys, torch, safetensors.torch as st; "
    '[st.save_file({n: t.contiguous().clone() for n, t in torch.load(f, "cpu", weights_only=True).items()}, '
    'f.rpartition(".")[0] + ".safetensors", {"format": "pt"}) for f in sys.argv[1:]]'
)
EMPTY_FIX = (
    "save it again with stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py with --safe_serialization on "
    "the states that DeepSpeed has saved"
)


def without_config(folder: Path) -> Fault:
    """The fault of a folder without a config.json."""
    finders: tuple[Callable[[Path], Fault | None], ...] = (
        _hub_repository, _hub_cache, _training_run, _training_states, _checkpoint_below, _single_file,
    )  # fmt: skip
    for find in finders:
        if (fault := find(folder)) is not None:
            return fault
    return Fault("the folder has no config.json", str(folder), fix="pass the folder of a Hugging Face checkpoint")


def without_weights(folder: Path) -> Fault:
    """The fault of a folder with a config.json and without *.safetensors."""
    what = "the folder has no *.safetensors"
    for find in (_training_states, _single_file):
        if (fault := find(folder)) is not None:
            return Fault(what, fault.where, "; ".join(filter(None, (fault.what, fault.why))), fault.fix)
    if unfinished := [name for name in _names(folder) if re.search(r"\.(incomplete|part|aria2|crdownload|tmp)$", name)]:
        return Fault(what, str(folder), f"{_listed(unfinished)}: a download did not finish", "download it again")
    fix = f"{CONVERT}; .bin files are not read because loading them runs code"
    if nested := [inner.name for inner in _folders(folder) if any(inner.glob("*.safetensors"))]:
        fix = f"move the weight files from {nested[0]} into the folder itself"
    return Fault(what, str(folder), fix=fix)


def pointer_faults(folder: Path) -> list[Fault]:
    """The fault of a repository that was cloned without Git LFS: small texts in place of its large files."""
    pointers = [
        path.name
        for path in sorted(folder.iterdir())
        if path.name.endswith(POINTER_SUFFIXES) and path.is_file() and is_lfs_pointer(path)
    ]
    if not pointers:
        return []
    what = f"{_listed(pointers)}: {'a Git LFS pointer' if len(pointers) == 1 else 'Git LFS pointers'}, not the content"
    fix = "run `git lfs pull` in the folder, or download the files again"
    return [Fault(what, str(folder), "the repository was cloned without Git LFS", fix)]


def empty_faults(folder: Path, empty: Sequence[str], count: int) -> list[Fault]:
    """The fault of tensors of shape [0]. empty: their names; count: of all tensors."""
    if not empty:
        return []
    what = f"{len(empty)} of {pluralize(count, 'tensor')} are empty, of shape [0]: {_listed(empty)}"
    return [Fault(what, str(folder), "saved by DeepSpeed ZeRO-3 without gathering the weights", EMPTY_FIX)]


def link_fault(folder: Path, targets: dict[str, Path], flag: str) -> Fault:
    """The fault of links to files elsewhere. targets: by file name; flag: the option that allows them."""
    count = len(targets)
    links = "a link out of the checkpoint folder" if count == 1 else "links out of the checkpoint folder"
    name, target = next(iter(targets.items()))
    parents = {target.parent for target in targets.values()}
    why = f"the target of {name} is {target}"
    fix = "copy the files themselves into the folder"
    if count > 1 and len(parents) == 1 and all(name == target.name for name, target in targets.items()):
        fix = f"pass the folder of the files, {parents.pop()}"
    fix = f"{fix}, or add {flag} if you trust the folder"
    return Fault(f"{_listed([*targets])} {'is' if count == 1 else 'are'} {links}", str(folder), why, fix)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def _entries(folder: Path) -> Iterator[Path]:
    for number, path in enumerate(folder.iterdir()):
        if number == LARGEST_LISTING:
            return
        yield path


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in _entries(folder))


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in _entries(folder) if path.is_dir())


def _has_config(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


# ---- folders above a checkpoint --------------------------------------------------------------------------------------


def _snapshot(repository: Path) -> Path | None:
    """The snapshot of a repository in the Hugging Face cache: that of the branch main, else the newest one."""
    snapshots = [path for path in _folders(repository / SNAPSHOTS) if _has_config(path)]
    main = repository / "refs" / "main"
    revision = main.read_text(errors="replace").strip() if main.is_file() else ""
    named = (path for path in snapshots if path.name == revision)
    return next(named, max(snapshots, key=lambda path: path.stat().st_mtime, default=None))


def _hub_repository(folder: Path) -> Fault | None:
    if not (folder / SNAPSHOTS).is_dir():
        return None
    what, snapshot = "the folder is a repository of the Hugging Face cache, not a checkpoint", _snapshot(folder)
    if snapshot is None:
        return Fault(what, str(folder), f"no folder in {SNAPSHOTS} has a config.json", "download the model again")
    return Fault(what, str(folder), fix=f"pass its snapshot: {snapshot}")


def _hub_cache(folder: Path) -> Fault | None:
    repositories = [path for path in _folders(folder) if path.name.startswith(REPOSITORY)]
    found = [path for each in repositories if (each / SNAPSHOTS).is_dir() and (path := _snapshot(each)) is not None]
    if not found:
        return None
    return Fault("the folder is the Hugging Face cache, not a checkpoint", str(folder), fix=_pass(found))


def _training_run(folder: Path) -> Fault | None:
    steps = {
        int(match[1]): path for path in _folders(folder) if (match := re.fullmatch(r"checkpoint-(\d{1,18})", path.name))
    }
    usable = {step: path for step, path in steps.items() if _has_config(path) or is_adapter(path)}
    if not usable:
        return None
    newest = usable[max(usable)]
    fix = f"pass its newest checkpoint: {newest}"
    if not _has_config(newest):
        fix = (
            f"pass the float model as --model_path, and its newest checkpoint, an adapter, with {ADAPTER_FLAG} {newest}"
        )
    return Fault("the folder is that of a training run, not a checkpoint", str(folder), fix=fix)


def _checkpoint_below(folder: Path) -> Fault | None:
    """Checkpoints one or two folders further down, such as Qwen/Qwen2.5-VL-7B-Instruct in the cache of ModelScope."""
    below = [path for path in _folders(folder) if not path.name.startswith(".")]
    found = [path for path in below if _has_config(path)]
    found = found or [inner for path in below[:100] for inner in _folders(path)[:100] if _has_config(inner)]
    if not found:
        return None
    what = "the folder has no config.json, but a folder inside it has"
    return Fault(what, str(folder), fix=_pass(found))


def _pass(found: Sequence[Path]) -> str:
    return f"pass {found[0]}" if len(found) == 1 else f"pass one of {_listed(list(map(str, found)))}"


# ---- other formats ---------------------------------------------------------------------------------------------------


def _training_states(folder: Path) -> Fault | None:
    """States of DeepSpeed, FSDP or torch.distributed, of which each process has saved its part."""
    names = _names(folder)
    steps = [name for name in names if re.fullmatch(r"global_step\d+", name) and (folder / name).is_dir()]
    steps += [name for name in names if name.endswith(("_model_states.pt", "_optim_states.pt"))]
    if steps:
        fix = f"{CONVERT}: python zero_to_fp32.py {folder} OUTPUT --safe_serialization"
        return Fault(f"{steps[0]}: the states of a training run with DeepSpeed", str(folder), fix=fix)
    parts = [name for name in names if name.startswith("pytorch_model_fsdp") or name.endswith(".distcp")]
    if parts:
        states = folder / parts[0] if (folder / parts[0]).is_dir() else folder
        fix = f"{CONVERT}: accelerate merge-weights {states} OUTPUT"
        return Fault(f"{parts[0]}: the states of a training run with FSDP", str(folder), fix=fix)
    return None


def _single_file(folder: Path) -> Fault | None:
    """Weights in a format that is not read, without anything else."""
    names = _names(folder)
    if files := _with_suffix(names, (".gguf",)):
        fix = "pass the folder of the safetensors checkpoint from which it was converted"
        return Fault(f"{_listed(files)}: weights in the format of llama.cpp", str(folder), fix=fix)
    if files := _with_suffix(names, (".bin", ".pt", ".pth")):
        what, why = (
            f"{_listed(files)}: weights as pickles of PyTorch",
            "they are not read because loading them runs code",
        )
        fix = f"{CONVERT}: python -c {shlex.quote(TO_SAFETENSORS)} {shlex.quote(str(folder))}/{_pattern(files)}"
        return Fault(what, str(folder), why, fix)
    return None


def _pattern(files: Sequence[str]) -> str:
    """The files of weights among these, for a shell."""
    if names := [name for name in files if name.startswith("pytorch_model")]:
        files = names
    if len(files) == 1:
        return shlex.quote(files[0])
    return ("pytorch_model*" if names else "*") + Path(files[0]).suffix


def _with_suffix(names: Collection[str], suffixes: tuple[str, ...]) -> list[str]:
    return [name for name in names if name.endswith(suffixes)]
