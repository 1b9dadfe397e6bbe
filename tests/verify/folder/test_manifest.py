"""MANIFEST.json: its content, and a fault for every difference between it and the folder."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlqc.emit.manifest import write_manifest
from vlqc.verify.findings import Finding, VerificationResult
from vlqc.verify.folder.manifest import check_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "quant_model_weight_w8a8.safetensors").write_bytes(bytes(range(256)) * 5000)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "empty").touch()
    write_manifest(tmp_path)
    return tmp_path


def faults(folder: Path) -> list[Finding]:
    result = VerificationResult(str(folder))
    check_manifest(folder, result)
    return result.faults


def manifest(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "MANIFEST.json").read_text())
    return read


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = manifest(folder)
    change(content)
    (folder / "MANIFEST.json").write_text(json.dumps(content))


def test_what_is_written(folder: Path) -> None:
    """Catches a file that is left out, an entry for the manifest itself, another order, wrong sizes or digests."""
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


MANIFEST, WEIGHTS = "MANIFEST.json", "quant_model_weight_w8a8.safetensors"
# what is changed, where the fault must be, and what it must name
DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a byte": (byte_changed, WEIGHTS, "SHA-256"),
    "a size": (lambda folder: (folder / "config.json").write_text("{} "), "config.json", "3 bytes instead of 2"),
    "a file removed": (lambda folder: (folder / "config.json").unlink(), "config.json", "config.json"),
    "a file added": (lambda folder: (folder / "config2.json").touch(), "config2.json", MANIFEST),
    "a folder added": (lambda folder: (folder / "more").mkdir(), "more", MANIFEST),
    "a folder for a file": (folder_for_file, "empty", "empty"),
    "no JSON": (lambda folder: (folder / MANIFEST).write_text("{"), MANIFEST, "JSON"),
    "no object": (lambda folder: (folder / MANIFEST).write_text("[1]"), MANIFEST, "JSON object"),
    "no list": (lambda folder: rewritten(folder, lambda c: c.pop("files")), MANIFEST, "list"),
    "a list of names": (lambda folder: rewritten(folder, lambda c: c.update(files=["a"])), MANIFEST, "list"),
    "another version": (lambda folder: rewritten(folder, lambda c: c.update(manifest=2)), MANIFEST, "list"),
    "a path": (
        lambda folder: rewritten(folder, lambda c: c["files"].update({"../x": c["files"]["empty"]})),
        MANIFEST,
        "'../x'",
    ),
    "a size as text": (lambda folder: rewritten(folder, lambda c: files(c, "empty", size="0")), MANIFEST, "'empty'"),
    "half a digest": (
        lambda folder: rewritten(folder, lambda c: files(c, "empty", sha256="0" * 32)),
        MANIFEST,
        "'empty'",
    ),
    "another digest": (
        lambda folder: rewritten(folder, lambda c: files(c, "empty", sha256="0" * 64)),
        "empty",
        "SHA-256",
    ),
    "a key twice": (
        lambda folder: (folder / MANIFEST).write_text('{"manifest": 1, "manifest": 1, "files": {}}'),
        MANIFEST,
        "'manifest'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(folder: Path, damage: str) -> None:
    """Catches a difference between the folder and its manifest without a fault, or a fault about another file."""
    apply, where, named = DAMAGES[damage]
    apply(folder)
    (fault,) = faults(folder)
    assert fault.where == where and named in fault.what, fault


def test_a_folder_without_a_manifest_is_valid(folder: Path) -> None:
    """Catches a fault for a folder of another tool, which has no manifest."""
    (folder / "MANIFEST.json").unlink()
    result = VerificationResult(str(folder))
    check_manifest(folder, result)
    assert result.ok and "MANIFEST.json" in result.facts["manifest"]


def test_a_link_out_of_the_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Catches a link to a file elsewhere, whose content may change later; its bytes are those in the manifest."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "config.json"
    (folder / "config.json").rename(elsewhere)
    (folder / "config.json").symlink_to(elsewhere)
    assert [fault.where for fault in faults(folder)] == ["config.json"]
