"""What the bytes of a result depend on, in words: two runs with the same facts write the same result.

A run that was interrupted is continued only if all of them are what they were.
"""

import functools
import hashlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from vlqc.checkpoint import digest_of
from vlqc.file_digest import file_digest
from vlqc.model import FloatModel
from vlqc.options import Options
from vlqc.options import flag_of as flag

Facts = dict[str, str]
DIGITS = 16  # hexadecimal digits of a hash in a fact
PACKAGES = ("torch", "transformers", "safetensors", "numpy")
# Options that do not change what is written: where from and where to, and how it is run.
IMMATERIAL = {
    "model_path", "save_directory", "calib_images", "overwrite", "resume", "start_over", "memory_budget", "dump_ir",
    "strict_target", "pipeline", "timings", "dump_stages", "dump_formats", "print_after",
}  # fmt: skip
NOTHING = "nothing"
NAMED = 6  # differences that an error lists


def facts_of(options: Options, pipeline: str, model: FloatModel, samples: Sequence[Mapping[str, Tensor]]) -> Facts:
    """Everything that a result depends on but the values of the weights, which are compared as they are read."""
    checkpoint = model.checkpoint
    facts = {"vlqc": f"{_version('vlqc')}, sources {_sources()}", "python": platform.python_version()}
    facts |= {package: _version(package) for package in PACKAGES}
    facts["threads"] = str(torch.get_num_threads())
    facts["device"] = _device(options.device_type)
    facts["arithmetic of this machine"] = _arithmetic()
    for name in sorted(Options.model_fields.keys() - IMMATERIAL):
        facts[flag(name)] = str(getattr(options, name))
    facts["pipeline"] = pipeline
    facts["config.json"] = _short(file_digest(checkpoint.folder / "config.json"))
    for file in checkpoint.files:
        facts[f"weight file {file.name}"] = f"{file.stat().st_size} bytes, header {_short(_header_digest(file))}"
    for name in checkpoint.side_files(code=options.trust_remote_code):
        facts[f"file {name}"] = _short(file_digest(checkpoint.folder / name))
    facts["calibration samples"] = f"{len(samples)}, {_short(_samples_digest(samples))}"
    if samples:
        ids = torch.unique(torch.cat([sample["input_ids"].flatten() for sample in samples]))
        embedding = f"{model.name(model.embedding)}.weight"
        facts[f"rows of {embedding} for them"] = _short(digest_of(checkpoint.rows(embedding, ids)))
    return facts


def sources_of(classes: Iterable[type]) -> Facts:
    """Of classes that do not come with vlqc: the digest of the file in which each was written."""
    facts = {}
    for kind in classes:
        module = sys.modules.get(kind.__module__)
        file = getattr(module, "__file__", None)
        if kind.__module__.partition(".")[0] != "vlqc" and file is not None and Path(file).is_file():
            facts[f"source of {kind.__module__}"] = _short(file_digest(Path(file)))
    return facts


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


def _header_digest(file: Path) -> str:
    with file.open("rb") as opened:
        length = opened.read(8)
        return hashlib.sha256(length + opened.read(int.from_bytes(length, "little"))).hexdigest()


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
