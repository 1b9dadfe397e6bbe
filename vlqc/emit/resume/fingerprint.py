"""What the bytes of a result depend on, in words: two runs with the same facts write the same result.

A run that was interrupted is continued only if all of them are what they were.
"""

import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from vlqc.file_digest import file_digest
from vlqc.frontend.checkpoint.checkpoint import digest_of
from vlqc.frontend.checkpoint.header import read_header_bytes
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.options.options import Options, flag_of

Facts = dict[str, str]
DIGITS = 16  # hexadecimal digits of a hash in a fact
PACKAGES = ("torch", "transformers", "safetensors", "numpy")
# Options that do not change what is written: where from and where to, and how it is run.
IMMATERIAL = {
    "model_path", "save_directory", "calib_images", "overwrite", "resume", "start_over", "memory_budget", "dump_ir",
    "strict_target", "pipeline", "timings", "dump_stages", "dump_formats", "print_after",
}  # fmt: skip
INSTALLED = {"site-packages", "dist-packages"}  # folders of what is no part of the user's own code
NOTHING = "nothing"
NAMED = 6  # differences that an error lists


def run_fingerprint(
    options: Options, pipeline: str, model: StreamedModel, samples: Sequence[Mapping[str, Tensor]]
) -> Facts:
    """Everything that a result depends on but the values of the weights, which are compared as they are read."""
    checkpoint = model.checkpoint
    facts = {"vlqc": f"{_version('vlqc')}, sources {_sources()}", "python": platform.python_version()}
    facts |= {package: _version(package) for package in PACKAGES}
    facts["threads"] = str(torch.get_num_threads())
    facts["device"] = _device(options.device_type)
    facts["arithmetic of this machine"] = _arithmetic()
    for name in sorted(Options.model_fields.keys() - IMMATERIAL):
        facts[flag_of(name)] = str(getattr(options, name))
    facts["pipeline"] = pipeline
    facts["config.json"] = _short(file_digest(checkpoint.folder / "config.json"))
    for file in checkpoint.files:
        header = hashlib.sha256(read_header_bytes(file)).hexdigest()
        facts[f"weight file {file.name}"] = f"{file.stat().st_size} bytes, header {_short(header)}"
    for name in checkpoint.side_files(code=options.trust_remote_code):
        facts[f"file {name}"] = _short(file_digest(checkpoint.folder / name))
    facts["calibration samples"] = f"{len(samples)}, {_short(_samples_digest(samples))}"
    if samples:
        ids = torch.unique(torch.cat([sample["input_ids"].flatten() for sample in samples]))
        embedding = f"{model.name(model.embedding)}.weight"
        facts[f"rows of {embedding} for them"] = _short(digest_of(checkpoint.rows(embedding, ids)))
    return facts


def sources_of(classes: Iterable[type]) -> Facts:
    """Of classes that do not come with vlqc: digests of the files they and their bases are written in, and of every
    module loaded from beside or below them, where helpers of theirs lie; of an installed one, of its own package.
    """
    files: dict[str, Path] = {}
    for kind in classes:
        for each in kind.__mro__:
            files |= _files_of([each.__module__])
        if _files_of([kind.__module__]):
            files |= _files_of(_neighbours(kind.__module__))
    return {f"source of {name}": _short(file_digest(files[name])) for name in sorted(files)}


def _neighbours(name: str) -> Iterator[str]:
    """Modules that are loaded from the folder in which a module's top package lies, or from below it."""
    *packages, _ = name.split(".")
    top, files = name.partition(".")[0], _files_of(sys.modules)
    folder = files[name].parents[files[name].stem == "__init__"]
    while packages and folder.name == packages.pop():
        folder = folder.parent
    for other, file in files.items():
        if folder not in file.parents or other == "__main__":  # the script that starts a run may start it otherwise
            continue
        within = file.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in within) or not INSTALLED.isdisjoint(within)
        if other.partition(".")[0] == top or not (hidden or folder.name in INSTALLED):
            yield other


def _files_of(names: Iterable[str]) -> dict[str, Path]:
    """Modules -> the files they were loaded from, of those that came neither with vlqc nor with Python."""
    found = {}
    for name in list(names):
        file = getattr(sys.modules.get(name), "__dict__", {}).get("__file__")  # some modules make up what they lack
        foreign = name.partition(".")[0] not in {"vlqc", *sys.stdlib_module_names}
        if foreign and isinstance(file, str) and os.path.isfile(file):
            found[name] = Path(os.path.abspath(file))
    return found


def differences(then: Facts, now: Facts) -> list[str]:
    """Every fact that is not what it was, in words."""
    return [
        f"{name}: {then.get(name, NOTHING)} then, {now.get(name, NOTHING)} now"
        for name in [*then, *(name for name in now if name not in then)]
        if then.get(name) != now.get(name)
    ]


def listed(found: Sequence[str]) -> str:
    """The first few of many differences, in one line."""
    more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return "; ".join(found[:NAMED]) + more


def _samples_digest(samples: Sequence[Mapping[str, Tensor]]) -> str:
    found = hashlib.sha256()
    for sample in samples:
        for key, tensor in sorted(sample.items()):
            found.update(f"{key} {tensor.dtype} {list(tensor.shape)} {digest_of(tensor)}\n".encode())
    return found.hexdigest()


@functools.cache
def _sources() -> str:
    """Of vlqc itself: between two versions with one number, too, nothing may have changed."""
    here = Path(__file__).parent
    found = hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        found.update(f"{path.relative_to(here)} {file_digest(path)}\n".encode())
    for linked in ("passes", "kernels_ref"):  # links are not gone into
        for path in sorted((here / linked).glob("*.py")):
            found.update(f"{linked}/{path.name} {file_digest(path)}\n".encode())
    return _short(found.hexdigest())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "not installed"


def _device(kind: str) -> str:
    """What multiplies: another processor rounds differently."""
    if kind == "cpu":
        return f"cpu, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{kind}, {getattr(torch, kind).get_device_name()}"


def _arithmetic() -> str:
    """Digest of fixed products, a convolution and functions on the CPU: libraries choose their routines, and with
    them how they round, by processor, environment and settings, some of which no name of a processor tells."""
    found = hashlib.sha256()
    rows, weight = _fractions(96, 1031), _fractions(515, 1031)  # larger than a block and no multiple of one
    patches, kernels = _fractions(16, 3, 2, 14, 14), _fractions(80, 3, 2, 14, 14)
    for dtype in (torch.float32, torch.bfloat16):
        left, right = rows.to(dtype), weight.to(dtype)
        for result in (
            functional.linear(left, right, right[:, 0].contiguous()),
            functional.linear(left[:3], right),  # few rows take another way
            functional.conv3d(patches.to(dtype), kernels.to(dtype), stride=(2, 14, 14)),
            functional.softmax(8 * left, dim=-1),
            functional.gelu(left),
            left.exp(),
        ):
            found.update(digest_of(result).encode())
    return _short(found.hexdigest())


def _fractions(*shape: int) -> Tensor:
    """float32 in [-0.5, 0.5), the same ones everywhere: with 24 bits each, so that products have to be rounded."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") - 0.5


def _short(digest: str) -> str:
    return digest[:DIGITS]
