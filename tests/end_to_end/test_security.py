"""Untrusted files cannot exhaust the machine, write outside the output folder, or use the network."""

import io
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

import vlqc
from tests.support.compiled_folder import make_content
from tests.support.fuzz.tiny import TINY
from tests.support.tensors import safetensors_bytes
from tests.support.tiny import synthetic_sample
from tests.support.untrusted_files import edit, photo
from tools.fuzz import bounded
from vlqc.cli.commands import app
from vlqc.errors import UserError
from vlqc.frontend.calibration.dataset import load_samples
from vlqc.frontend.calibration.images import ImageError, read_image
from vlqc.frontend.calibration.sources import list_samples
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.reporting.checkpoint_summary import inspect_folder
from vlqc.verify import verify_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


# ---- time and memory -------------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG with this size in its header, and highly compressed data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + 3 * min(width, 10**5))) for _ in range(min(height, 64))) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(20_000, 20_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (100_000, 100_000)])
def test_decompression_bombs_are_rejected(tmp_path: Path, size: tuple[int, int]) -> None:
    """Catches a small image that is decompressed to gigabytes."""
    (tmp_path / "bomb.png").write_bytes(bomb(*size))
    assert (tmp_path / "bomb.png").stat().st_size < 2**20 or size[0] > 10**9
    with bounded(20.0, 2**28), pytest.raises(ImageError):
        read_image(tmp_path / "bomb.png")


PIPES: dict[str, Callable[[Path], object]] = {
    "config.json": Checkpoint,
    "model.safetensors": Checkpoint,
    "model.safetensors.index.json": inspect_folder,
    "quant_model_description.json": inspect_folder,
    "preprocessor_config.json": lambda folder: load_samples(folder, folder / "photo.png"),
    "chat_template.json": lambda folder: load_samples(folder, folder / "photo.png"),
    "lines.jsonl": lambda folder: list_samples(folder / "lines.jsonl"),
    "photo.png": lambda folder: load_samples(folder, folder / "photo.png"),
}


@pytest.mark.parametrize("name", PIPES)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_not_read(model: Path, name: str, kind: str) -> None:
    """Catches an endless wait for a pipe, and memory that is filled from a device."""
    photo(model)
    (model / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(model / name)
    else:
        (model / name).symlink_to("/dev/zero")
    with bounded(10.0):
        try:
            PIPES[name](model)
        except UserError as error:
            assert str(error)
        else:
            assert name in ("chat_template.json", "model.safetensors.index.json"), "optional files count as missing"


@pytest.mark.parametrize("name", ["config.json", "quant_model_description.json", "quant_model_weight_w8a8.safetensors"])
def test_verification_does_not_wait_for_a_pipe(tmp_path: Path, name: str) -> None:
    """Catches an endless wait of `vlqc verify`."""
    folder = make_content().write(tmp_path / "out")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with bounded(10.0):
        report = verify_folder(folder)
    assert any("is not a regular file" in finding.what for finding in report.faults)


# ---- the terminal ----------------------------------------------------------------------------------------------------


def test_names_cannot_send_escape_sequences(tmp_path: Path) -> None:
    """Catches escape sequences in names from files that are printed in errors and tables."""
    evil = "\x1b[2J\x1b]0;owned\x07\u202egnp\r"
    content = make_content()
    content.tensors[evil] = content.tensors["model.norm.weight"]
    folder = content.write(tmp_path / "out")
    screen = io.StringIO()
    report = verify_folder(folder)
    report.render(Console(file=screen, width=200))
    assert "\\x1b[2J" in screen.getvalue()
    source = content.write_source(tmp_path / "float")
    edit(source / "config.json", model_type=evil)
    config = json.loads((source / "config.json").read_text())
    (tmp_path / evil[:3]).mkdir()
    done = CliRunner().invoke(app, ["compile", "--model_path", str(source), "--save_directory", str(tmp_path / "new")])
    assert done.exit_code == 2 and config["model_type"] == evil
    inspect_folder(source).render(Console(file=screen, width=200))
    for text in (screen.getvalue(), report.to_json(), done.output, done.stderr):
        assert not any(letter in text for letter in "\x1b\x07\u202e\r")


# ---- network and file system -----------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Makes every connection and name lookup fail; yields the list of attempts."""
    attempts: list[object] = []

    def refuse(*args: object, **kwargs: object) -> None:
        attempts.append(args)
        raise OSError("no network here")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    yield attempts


@pytest.mark.every_transformers
def test_the_network_is_never_used(model: Path, tmp_path: Path, no_network: list[object]) -> None:
    """Catches a library that downloads missing files or sends telemetry."""
    edit(model / "config.json", _name_or_path="owner/model")
    (model / "generation_config.json").unlink()
    out = tmp_path / "out"
    vlqc.compile(model_path=model, save_directory=out, calib_images=photo(tmp_path), weight_method="round")
    verify_folder(out, model_path=model)
    vlqc.load(out)
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError):
        load_samples(model, photo(tmp_path))
    with pytest.raises(UserError):
        vlqc.compile(model_path="owner/model", save_directory=tmp_path / "other")
    assert no_network == []
    with pytest.raises(OSError):
        socket.create_connection(("localhost", 9))
    assert no_network != [], "the fixture must detect connections"


WATCHED = """
import os, sys
written = []
def watch(event, args):
    if event == "open" and isinstance(args[0], str) and isinstance(args[2], int):
        if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.append(os.path.realpath(args[0]))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
        written.append(event)
import torch, vlqc, transformers, vlqc.compiler, vlqc.verify, vlqc.verify.loader
from PIL import Image; Image.init()
sys.addaudithook(watch)
os.umask(0)
vlqc.compile(model_path=sys.argv[1], save_directory=sys.argv[2], calib_images=sys.argv[3], weight_method="round")
print("\\n".join(written))
"""


def test_only_the_output_folder_is_written(model: Path, tmp_path: Path) -> None:
    """Catches a write outside the output and run folders, a subprocess, and permissive file modes."""
    for path in model.rglob("*"):
        path.chmod(0o444)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in model.iterdir()}
    target = tmp_path / "parent" / "out"
    target.parent.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", WATCHED, str(model), str(target), str(photo(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    written = [line for line in done.stdout.splitlines() if not line.startswith("/dev/")]
    assert written and all(line.startswith(str(target.parent)) for line in written), written
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in model.iterdir()} == before
    assert sorted(path.name for path in target.parent.iterdir()) == ["out"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in target.iterdir()} == {0o640}


def test_header_lengths_are_checked_against_the_file_size(tmp_path: Path) -> None:
    """Catches an allocation of a header length that is larger than the file."""
    content = make_content()
    source = content.write_source(tmp_path / "float")
    whole = safetensors_bytes({}, None)
    for length in (2**62, 2**63, 2**64 - 1, 99_999_999):
        (source / "model.safetensors").write_bytes(length.to_bytes(8, "little") + whole)
        with bounded(10.0, 2**27), pytest.raises(UserError, match="weight file cannot be read"):
            Checkpoint(source)


def test_config_sizes_are_checked_against_the_tensors(tmp_path: Path) -> None:
    """Catches a model of the size in config.json, such as a billion blocks, for a weight file of kilobytes."""
    samples = [synthetic_sample((4, 4))]
    for key, value in (("hidden_size", 10**12), ("num_hidden_layers", 10**9), ("vocab_size", 2**40)):
        model = tmp_path / key
        shutil.copytree(TINY, model)
        edit(model / "config.json", **{key: value})
        with bounded(20.0), pytest.raises(UserError, match=f"{key} is {value}"):
            vlqc.compile(model_path=model, save_directory=tmp_path / "out", samples=samples)
    assert torch.is_tensor(samples[0]["input_ids"])
