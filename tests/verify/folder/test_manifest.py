"""MANIFEST.json: what the emitter writes, and every way in which a folder can differ from it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlqc.emit.manifest import write_manifest
from vlqc.verify.findings import VerificationResult
from vlqc.verify.folder.manifest import check_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "quant_model_weight_w8a8.safetensors").write_bytes(bytes(range(256)) * 5000)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "empty").touch()
    write_manifest(tmp_path)
    return tmp_path


def faults(folder: Path) -> list[str]:
    result = VerificationResult(str(folder))
    check_manifest(folder, result)
    return [finding.what for finding in result.faults]


def manifest(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "MANIFEST.json").read_text())
    return read


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = manifest(folder)
    change(content)
    (folder / "MANIFEST.json").write_text(json.dumps(content))


def test_what_is_written(folder: Path) -> None:
    """Catches a file that is left out, the list listing itself, another order, sizes or digests of something else."""
    files = manifest(folder)["files"]
    assert list(files) == ["config.json", "empty", "quant_model_weight_w8a8.safetensors"]
    for name, entry in files.items():
        raw = (folder / name).read_bytes()
        assert entry == {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    before = (folder / "MANIFEST.json").read_bytes()
    write_manifest(folder)
    assert (folder / "MANIFEST.json").read_bytes() == before
    assert faults(folder) == []


def byte_changed(folder: Path) -> None:
    path = folder / "quant_model_weight_w8a8.safetensors"
    raw = bytearray(path.read_bytes())
    raw[777_777] ^= 1
    path.write_bytes(bytes(raw))


def folder_for_file(folder: Path) -> None:
    (folder / "empty").unlink()
    (folder / "empty").mkdir()


def files(content: dict[str, Any], name: str, **change: Any) -> None:
    content["files"][name] |= change


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte": (byte_changed, "quant_model_weight_w8a8.safetensors was changed"),
    "a size": (lambda it: (it / "config.json").write_text("{} "), "config.json has 3 bytes, 2 were written"),
    "a file gone": (lambda it: (it / "config.json").unlink(), "config.json is missing"),
    "a file more": (lambda it: (it / "config2.json").touch(), "config2.json is not in MANIFEST.json"),
    "a folder more": (lambda it: (it / "more").mkdir(), "more is not in MANIFEST.json"),
    "a folder for a file": (folder_for_file, "empty is no file"),
    "no JSON": (lambda it: (it / "MANIFEST.json").write_text("{"), "MANIFEST.json cannot be read as JSON"),
    "no object": (lambda it: (it / "MANIFEST.json").write_text("[1]"), "MANIFEST.json is not a JSON object"),
    "no list": (lambda it: rewritten(it, lambda c: c.pop("files")), "MANIFEST.json has no list of files"),
    "a list of names": (lambda it: rewritten(it, lambda c: c.update(files=["a"])), "MANIFEST.json has no list"),
    "another kind": (lambda it: rewritten(it, lambda c: c.update(manifest=2)), "MANIFEST.json has no list of files"),
    "a path": (
        lambda it: rewritten(it, lambda c: c["files"].update({"../x": c["files"]["empty"]})),
        "MANIFEST.json is damaged at '../x'",
    ),
    "a size in words": (
        lambda it: rewritten(it, lambda c: files(c, "empty", size="0")),
        "MANIFEST.json is damaged at 'empty'",
    ),
    "half a digest": (
        lambda it: rewritten(it, lambda c: files(c, "empty", sha256="0" * 32)),
        "MANIFEST.json is damaged at 'empty'",
    ),
    "another digest": (lambda it: rewritten(it, lambda c: files(c, "empty", sha256="0" * 64)), "empty was changed"),
    "a file twice": (
        lambda it: (it / "MANIFEST.json").write_text('{"manifest": 1, "manifest": 1, "files": {}}'),
        "MANIFEST.json cannot be read as JSON",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(folder: Path, damage: str) -> None:
    """Catches a difference between the folder and its list that is not told, or told of something else."""
    apply, words = DAMAGES[damage]
    apply(folder)
    (told,) = faults(folder)
    assert told.startswith(words)


def test_a_folder_without_a_list_is_fine(folder: Path) -> None:
    """Catches a folder of another tool that fails for lacking a file it never had."""
    (folder / "MANIFEST.json").unlink()
    result = VerificationResult(str(folder))
    check_manifest(folder, result)
    assert result.ok and "no MANIFEST.json" in result.facts["manifest"]


def test_a_link_out_of_the_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Catches a file of the same bytes elsewhere, which may be another one tomorrow: the list alone cannot tell."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "config.json"
    (folder / "config.json").rename(elsewhere)
    (folder / "config.json").symlink_to(elsewhere)
    assert faults(folder) == ["config.json is a link out of the compiled folder"]
