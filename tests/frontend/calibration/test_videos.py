"""Frames decoded from video files: which, upright, and one error for files that cannot be used."""

import random
from pathlib import Path

import av
import numpy as np
import pytest

from tests.support.videos import HEIGHT, WIDTH, decode_all, frame_array, write_video
from vlqc.frontend.calibration import videos
from vlqc.frontend.calibration.videos import FewerFramesError, VideoError, decode_frames, read_stream

IDENTITY = bytes.fromhex("00010000" + "00" * 12 + "00010000")  # of the matrix in a track header
QUARTER_TURN = bytes.fromhex("00000000" + "00010000" + "00" * 4 + "ffff0000" + "00" * 4)  # clockwise
CONTAINERS = {
    "a.mp4": "mpeg4",
    "a.mov": "libx264",
    "a.mkv": "mpeg4",
    "a.webm": "libvpx",
    "a.avi": "mpeg4",
    "a.flv": "flv",
    "a.wmv": "wmv2",
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container(tmp_path: Path, name: str) -> None:
    """Catches a container that is refused, a frame too many, too few, or under another number."""
    path = write_video(tmp_path / name, codec=CONTAINERS[name])
    stream = read_stream(path)
    assert (stream.frames, stream.fps, stream.height, stream.width) == (8, 4.0, HEIGHT, WIDTH)
    expected, _ = decode_all(path)
    frames = decode_frames(path, (0, 3, 7), lambda array: array)
    assert all(np.array_equal(frame, expected[number]) for frame, number in zip(frames, (0, 3, 7), strict=True))
    assert abs(frames[1].astype(int) - frame_array(3)).mean() < 12  # compressed
    with pytest.raises(FewerFramesError) as caught:
        decode_frames(path, (0, 8), lambda array: array)
    assert caught.value.frames == 8


def test_rotated_by_a_phone(tmp_path: Path) -> None:
    """Catches frames that lie on their side, or are turned the wrong way."""
    path = write_video(tmp_path / "a.mp4")
    content = path.read_bytes()
    assert content.count(IDENTITY) == 2  # of the movie, of the track
    at = content.rindex(IDENTITY)
    path.write_bytes(content[:at] + QUARTER_TURN + content[at + len(QUARTER_TURN) :])
    stream = read_stream(path)
    assert (stream.height, stream.width) == (WIDTH, HEIGHT)
    (frame,) = decode_frames(path, (0,), lambda array: array)
    assert abs(frame.astype(int) - np.rot90(frame_array(0), -1)).mean() < 12


def test_variable_rate_and_odd_sizes(tmp_path: Path) -> None:
    """Catches frames that are repeated or left out where the rate varies, and a crash for odd sizes."""
    path = write_video(tmp_path / "a.mkv", codec="ffv1", width=63, height=47, times=[0, 1, 2, 50, 51, 52, 53, 200])
    stream = read_stream(path)
    assert stream.frames == 8 and 3 < stream.fps < 6 and (stream.height, stream.width) == (47, 63)
    frames = decode_frames(path, tuple(range(8)), lambda array: array)
    assert [round(float(frame[:20, 40:].mean()) / 8) for frame in frames] == list(range(8))


def audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def cut_off(path: Path) -> None:
    content = write_video(path).read_bytes()
    path.write_bytes(content[: len(content) * 7 // 10])


UNUSABLE = {
    "empty.mp4": (lambda path: path.write_bytes(b""), "the file is empty"),
    "text.mp4": (lambda path: path.write_text("no video " * 500), "not a video"),
    "missing.mp4": (lambda path: None, "no such file"),
    "folder.mp4": (lambda path: path.mkdir(), "it is a folder"),
    "audio.mp4": (audio_only, "no video stream"),
    "cut.mp4": (cut_off, "not a video|no video stream"),
    "cut.mkv": (cut_off, "cut off after 1"),
    "cut.avi": (cut_off, "damaged"),
    "codec.avi": (lambda path: write_video(path, codec="ffvhuff"), "its codec is ffvhuff"),
    "list.mp4": (
        lambda path: path.write_text(f"#EXTM3U\n#EXTINF:2,\n{write_video(path.parent / 'a.mp4')}\n#EXT-X-ENDLIST\n"),
        "not a video",
    ),
    "concat.mp4": (
        lambda path: path.write_text(f"ffconcat version 1.0\nfile {write_video(path.parent / 'a.mp4')}\n"),
        "not a video",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, a playlist that opens other files, output of FFmpeg on the terminal."""
    write, why = UNUSABLE[name]
    write(tmp_path / name)
    with pytest.raises(VideoError, match=why):
        read_stream(tmp_path / name)
    assert capfd.readouterr() == ("", "")


def test_damaged_files_end_in_one_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches any other exception for bytes that are changed at random, damaged frames that are used, and output."""
    generator, path, errors = random.Random(0), tmp_path / "b.mp4", 0
    for name in ("a.mp4", "a.mkv", "a.avi", "a.flv"):
        content = write_video(tmp_path / name, codec=CONTAINERS[name]).read_bytes()
        for _ in range(10):
            damaged = bytearray(content)
            for _ in range(40):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            path.write_bytes(damaged)
            try:
                stream = read_stream(path)
                decode_frames(path, range(stream.frames), lambda array: array)
            except (VideoError, FewerFramesError):
                errors += 1
    assert errors > 20 and capfd.readouterr() == ("", "")


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a file that exhausts time or memory."""
    path = write_video(tmp_path / "a.mp4")
    for name, limit, why in (
        ("MAX_FRAMES", 7, "more than 7 frames"),
        ("MAX_SECONDS", 1, "lasts 2 s"),
        ("MAX_SIDE", 63, "64 x 48 pixels"),
        ("MAX_PIXELS", 64 * 48 - 1, "64 x 48 pixels"),
        ("MAX_FPS", 3, "4 frames per second"),
    ):
        with monkeypatch.context() as patch, pytest.raises(VideoError, match=why):
            patch.setattr(videos, name, limit)
            read_stream(path)
