"""Fingerprint of a run: everything that the bytes of the result depend on, as readable key-value pairs.

An interrupted run is resumed only if its fingerprint is the same.
"""

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import vlqc
from vlqc.files import sha256_of
from vlqc.frontend.checkpoint.checkpoint import tensor_sha256
from vlqc.frontend.checkpoint.header import read_header_bytes
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.import_paths import import_path
from vlqc.options.fields import flag_of
from vlqc.options.options import Options

Fingerprint = dict[str, str]
HASH_DIGITS = 16  # hexadecimal digits
PACKAGES = ("torch", "transformers", "safetensors", "numpy")
# Options that do not change the emitted bytes.
IGNORED_OPTIONS = {
    "model_path", "save_directory", "calib_images", "overwrite", "resume", "start_over", "memory_budget", "dump_ir",
    "lora", "strict_target", "pipeline", "family", "follow_links", "timings", "dump_stages", "dump_formats",
    "print_after",
}  # fmt: skip
SITE_PACKAGES = {"site-packages", "dist-packages"}  # folders of installed packages
MISSING = "missing"
SAMPLES, ROWS = "calibration samples", "rows of "
MAX_DIFFERENCES = 6  # listed in an error message


def run_fingerprint(
    options: Options, pipeline: str, model: StreamedModel, samples: Sequence[Mapping[str, Tensor]]
) -> Fingerprint:
    """Fingerprint of a run, without the values of the weights, which are compared when they are read."""
    checkpoint = model.checkpoint
    fingerprint = {"vlqc": f"{_version('vlqc')}, sources {_vlqc_sources()}", "python": platform.python_version()}
    fingerprint |= {package: _version(package) for package in PACKAGES}
    fingerprint["threads"] = str(torch.get_num_threads())
    fingerprint["device"] = _device(options.device_type)
    fingerprint["floating-point results"] = _numerics()
    for name in sorted(Options.model_fields.keys() - IGNORED_OPTIONS):
        fingerprint[flag_of(name)] = str(getattr(options, name))
    fingerprint["model family"] = import_path(type(model.family))
    fingerprint["pipeline"] = pipeline
    fingerprint["config.json"] = _short(sha256_of(checkpoint.folder / "config.json"))
    for file in checkpoint.files:
        header = hashlib.sha256(read_header_bytes(file)).hexdigest()
        fingerprint[f"weight file {file.name}"] = f"{file.stat().st_size} bytes, header {_short(header)}"
    for number, adapter in enumerate(checkpoint.adapters, 1):
        fingerprint[f"adapter {number}"] = _short(adapter.sha256)
    for name in checkpoint.side_files(code=options.trust_remote_code).names:
        fingerprint[f"file {name}"] = _short(sha256_of(checkpoint.folder / name))
    fingerprint[SAMPLES] = f"{len(samples)}, {_short(_samples_digest(samples))}"
    if samples:
        ids = torch.unique(torch.cat([sample["input_ids"].flatten() for sample in samples]))
        embedding = f"{model.name(model.embedding)}.weight"
        fingerprint[f"{ROWS}{embedding} in use"] = _short(tensor_sha256(checkpoint.rows(embedding, ids)))
    return fingerprint


def source_digests(classes: Iterable[type]) -> Fingerprint:
    """Digests of the source files of classes from outside vlqc, of their bases, and of modules they may import.

    The latter are all loaded modules below the folder of the class's top-level package; for a class from an installed
    package, the modules of that package.
    """
    files: dict[str, Path] = {}
    for kind in classes:
        for base in kind.__mro__:
            files |= _source_files([base.__module__])
        if _source_files([kind.__module__]):
            files |= _source_files(_nearby_modules(kind.__module__))
    return {f"source of {name}": _short(sha256_of(files[name])) for name in sorted(files)}


def _nearby_modules(name: str) -> Iterator[str]:
    """Names of loaded modules whose files lie below the folder that contains a module's top-level package."""
    *packages, _ = name.split(".")
    top_level, files = name.partition(".")[0], _source_files(sys.modules)
    folder = files[name].parents[files[name].stem == "__init__"]
    while packages and folder.name == packages.pop():
        folder = folder.parent
    for other, file in files.items():
        if folder not in file.parents or other == "__main__":  # the calling script may differ, as in `resume=True`
            continue
        parts = file.relative_to(folder).parts
        excluded = any(part.startswith(".") for part in parts) or not SITE_PACKAGES.isdisjoint(parts)
        if other.partition(".")[0] == top_level or not (excluded or folder.name in SITE_PACKAGES):
            yield other


def _source_files(names: Iterable[str]) -> dict[str, Path]:
    """Module name -> source file, without modules of vlqc and of the standard library."""
    files = {}
    for name in list(names):
        # Not getattr: some modules define a __getattr__ that imports on access.
        file = getattr(sys.modules.get(name), "__dict__", {}).get("__file__")
        external = name.partition(".")[0] not in {"vlqc", *sys.stdlib_module_names}
        if external and isinstance(file, str) and os.path.isfile(file):
            files[name] = Path(os.path.abspath(file))
    return files


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """One line per key whose value differs, without those that follow from others."""
    keys = [key for key in [*before, *(key for key in now if key not in before)] if before.get(key) != now.get(key)]
    if SAMPLES in keys:  # other samples have other tokens
        keys = [key for key in keys if not key.startswith(ROWS)]
    return [_difference(key, before.get(key, MISSING), now.get(key, MISSING)) for key in keys]


def _difference(key: str, before: str, now: str) -> str:
    if key == SAMPLES:
        (old, *_), (new, *_) = before.split(","), now.split(",")
        count = f"{old} samples" if old == new else f"{old} samples before, {new} now"
        return f"the calibration data differ, in content or order ({count})"
    if all(re.fullmatch(rf"[0-9a-f]{{{HASH_DIGITS}}}", value) for value in (before, now)):
        return f"{key}: other content than before"
    return f"{key}: {before} before, {now} now"


def abbreviate(lines: Sequence[str]) -> str:
    """The first MAX_DIFFERENCES lines in one, and how many more there are."""
    more = f"; and {len(lines) - MAX_DIFFERENCES} more" if len(lines) > MAX_DIFFERENCES else ""
    return "; ".join(lines[:MAX_DIFFERENCES]) + more


def _samples_digest(samples: Sequence[Mapping[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        for key, tensor in sorted(sample.items()):
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)} {tensor_sha256(tensor)}\n".encode())
    return digest.hexdigest()


@functools.cache
def _vlqc_sources() -> str:
    """Digest of vlqc's own source files: they may change without a new version number."""
    root = Path(vlqc.__file__).parent
    digest = hashlib.sha256()
    files = set(root.rglob("*.py"))
    for link in ("passes", "kernels_ref"):  # rglob does not follow links
        files.update((root / link).rglob("*.py"))
    for path in sorted(files):
        digest.update(f"{path.relative_to(root)} {sha256_of(path)}\n".encode())
    return _short(digest.hexdigest())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "not installed"


def _device(device_type: str) -> str:
    """Name of the processor or device that multiplies, because rounding depends on it."""
    if device_type == "cpu":
        return f"cpu, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{device_type}, {getattr(torch, device_type).get_device_name()}"


def _numerics() -> str:
    """Digest of the results of fixed matrix products, a convolution and functions on the CPU.

    Libraries select their routines, and thus their rounding, by processor, environment variables and settings; the
    name of the processor alone does not determine them.
    """
    digest = hashlib.sha256()
    rows, weight = _uniform(96, 1031), _uniform(515, 1031)  # larger than a block of a routine, and not a multiple of it
    patches, kernels = _uniform(16, 3, 2, 14, 14), _uniform(80, 3, 2, 14, 14)
    for dtype in (torch.float32, torch.bfloat16):
        left, right = rows.to(dtype), weight.to(dtype)
        for result in (
            functional.linear(left, right, right[:, 0].contiguous()),
            functional.linear(left[:3], right),  # few rows: another routine
            functional.conv3d(patches.to(dtype), kernels.to(dtype), stride=(2, 14, 14)),
            functional.softmax(8 * left, dim=-1),
            functional.gelu(left),
            left.exp(),
        ):
            digest.update(tensor_sha256(result).encode())
    return _short(digest.hexdigest())


def _uniform(*shape: int) -> Tensor:
    """float32 in [-0.5, 0.5), always the same; 24 significant bits each, so that every product has to be rounded."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") - 0.5


def _short(digest: str) -> str:
    return digest[:HASH_DIGITS]
