"""Fuzz target for video files."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import strategies as st

from tests.support.fuzz.damage import damaged_bytes
from tests.support.fuzz.files import put
from tests.support.fuzz.verdict import demand
from tests.support.videos import write_video
from vlqc.frontend.calibration.videos import FewerFramesError, VideoError, decode_frames, read_stream

KINDS = {"mp4": "mpeg4", "mov": "libx264", "mkv": "ffv1", "webm": "libvpx", "avi": "mpeg4", "flv": "flv", "wmv": "wmv2"}


@cache
def video_files() -> dict[str, bytes]:
    """Small video files by suffix."""
    with TemporaryDirectory() as folder:
        return {
            suffix: write_video(Path(folder) / f"x.{suffix}", frames=4, codec=codec).read_bytes()
            for suffix, codec in KINDS.items()
        }


def video_cases() -> st.SearchStrategy[bytes]:
    return st.one_of(
        *(damaged_bytes(content) for content in video_files().values()), st.sampled_from([*video_files().values()])
    )


def check_video(case: bytes, folder: Path) -> bool:
    """Accepted videos have frames of the stated size, as many as there are."""
    path = folder / "x.mp4"  # the content decides about the format
    put(path, case)
    try:
        stream = read_stream(path)
        frames = decode_frames(path, range(stream.frames), lambda array: array)
    except VideoError as refused:
        demand(str(refused).strip() != "", "refused without a reason")
        return False
    except FewerFramesError:
        return False
    demand(len(frames) == stream.frames > 0 and stream.fps > 0, f"{len(frames)} frames")
    demand(all(frame.dtype == np.uint8 and frame.ndim == 3 for frame in frames), "no RGB frames")
    return True
