"""Which frames of a video are used, and their size: against qwen_vl_utils itself."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tests.support.videos import vision_process
from vlqc.families.inputs.video_processing import SampledFrames, VideoProcessing
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.families.qwen3_vl import QWEN3_VL

PROCESSING = {14: QWEN2_5_VL.inputs.videos, 16: QWEN3_VL.inputs.videos}


@pytest.fixture(scope="module")
def reference() -> Iterator[Any]:
    with vision_process() as module:
        yield module


def given_only(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


MAYBE = st.none() | st.integers(2, 60)


ALL_DEFAULTS: Any = dict.fromkeys(("fps", "nframes", "smallest", "largest", "start", "end"))


@given(
    total=st.integers(1, 3000),
    video_fps=st.sampled_from([0.5, 12.0, 23.976, 25.0, 30.0, 59.94, 120.0]),
    fps=st.none() | st.sampled_from([0.1, 1, 2, 7.5, 30]),
    nframes=MAYBE,
    smallest=MAYBE,
    largest=MAYBE,
    start=st.none() | st.floats(0, 60),
    end=st.none() | st.floats(0, 60),
)
@example(total=1, video_fps=25.0, **ALL_DEFAULTS)
@example(total=3, video_fps=25.0, **ALL_DEFAULTS)
@example(total=90000, video_fps=25.0, **ALL_DEFAULTS)
def test_frames_are_chosen_like_the_reference(reference: Any, total: int, video_fps: float, **wishes: Any) -> None:
    """Catches other frames than those of qwen_vl_utils, and settings that only one of both refuses."""
    names = {"smallest": "min_frames", "largest": "max_frames", "start": "video_start", "end": "video_end"}
    settings = given_only(**{names.get(name, name): value for name, value in wishes.items()})
    assume(not {"fps", "nframes"} <= settings.keys())
    processing: Any = PROCESSING[14]
    try:
        first, last, count = reference.calculate_video_frame_range(settings, total, video_fps)
        frames = reference.smart_nframes(settings, total_frames=count, video_fps=video_fps)
        expected = torch.linspace(first, last, frames).round().long().tolist()
    except ValueError:
        expected = None
    try:
        first, last = processing.frame_range(
            total, video_fps, settings.pop("video_start", None), settings.pop("video_end", None)
        )
        found = list(processing.spread(first, last, processing.frame_count(last - first + 1, video_fps, **settings)))
    except ValueError:
        found = None
    assert found == expected


SIZE = st.integers(1, 4000)


@pytest.mark.parametrize("patch", PROCESSING)
@given(
    height=SIZE,
    width=SIZE,
    frames=st.integers(1, 400).map(lambda half: 2 * half),
    least=st.none() | st.integers(1, 300_000),
    most=st.none() | st.integers(1, 2_000_000),
    total=st.none() | st.integers(10**5, 10**8),
    resized=st.none() | st.tuples(SIZE, SIZE),
)
@example(height=1080, width=1920, frames=768, least=None, most=None, total=None, resized=None)
def test_frames_have_the_size_of_the_reference(
    reference: Any, patch: int, height: int, width: int, **wishes: Any
) -> None:
    """Catches frames of another size than those of qwen_vl_utils."""
    names = {"least": "min_pixels", "most": "max_pixels", "total": "total_pixels"}
    frames, resized = wishes.pop("frames"), wishes.pop("resized") or (None, None)
    settings = given_only(**{names[name]: value for name, value in wishes.items()})
    settings |= given_only(resized_height=resized[0], resized_width=resized[1])
    processing: Any = PROCESSING[patch]
    sizes: list[tuple[int, int] | None] = []

    def resize(video: Any, size: tuple[int, int], **_: Any) -> torch.Tensor:
        sizes.append((size[0], size[1]))
        return torch.zeros(1)

    with pytest.MonkeyPatch.context() as patched:
        frame = torch.empty(1).expand(frames, 3, height, width)
        patched.setitem(reference.VIDEO_READER_BACKENDS, "torchvision", lambda settings: (frame, {}, 2.0))
        patched.setattr(reference.transforms.functional, "resize", resize)
        try:
            reference.fetch_video({"video": "a.mp4", **settings}, image_patch_size=patch)
        except (ValueError, AssertionError):
            sizes.append(None)
    assume(sizes[0] is None or 0 not in sizes[0])  # qwen_vl_utils rounds extreme shapes to sides of zero pixels
    try:
        found = processing.frame_size(height, width, frames, **settings)
    except ValueError:
        found = None
    assert found == sizes[0]


def cubic_weights(length: int, size: int) -> np.ndarray:
    """[size, length]: bicubic interpolation with a = -0.5, widened to the scale where an image shrinks."""
    scale = length / size
    support = max(scale, 1.0)
    centers = (np.arange(size) + 0.5) * scale - 0.5
    x = np.abs(np.arange(length)[None] - centers[:, None]) / support
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    normalized: np.ndarray = weights / weights.sum(1, keepdims=True)
    return normalized


@pytest.mark.parametrize("size", [(28, 56), (84, 112), (48, 28)])
def test_frames_are_resized(size: tuple[int, int]) -> None:
    """Catches another filter, missing antialiasing, or values that wrap around."""
    frame = np.random.default_rng(0).integers(0, 256, (3, 48, 64)).astype(np.uint8)
    expected = cubic_weights(48, size[0]) @ frame.astype(float) @ cubic_weights(64, size[1]).T
    found = VideoProcessing.resize(torch.from_numpy(frame), *size).numpy()
    assert np.abs(found - expected.clip(0, 255)).max() < 0.51


def test_times_of_the_steps() -> None:
    """Catches the time of a step's first frame in place of the mean of its frames, and an odd last frame."""
    assert VideoProcessing.times(SampledFrames((0, 6, 12, 18), 12.0, 2.0), 2) == (0.25, 1.25)
    assert VideoProcessing.times(SampledFrames((0, 6, 12), 12.0, 2.0), 2) == (0.25, 1.0)
