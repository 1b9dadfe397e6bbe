"""Small videos made with PyAV, and qwen_vl_utils with PyAV as its decoder and a stand-in for torchvision."""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

WIDTH, HEIGHT = 64, 48


def frame_array(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """An image whose brightness is 8 times its number; the upper left quarter is red, the lower right one blue."""
    array = np.full((height, width, 3), 8 * number % 256, dtype=np.uint8)
    array[: height // 2, : width // 2] = (200, 0, 0)
    array[height // 2 :, width // 2 :] = (0, 0, 200)
    return array


def write_video(
    path: Path,
    frames: int = 8,
    rate: int = 4,
    width: int = WIDTH,
    height: int = HEIGHT,
    codec: str = "mpeg4",
    times: list[int] | None = None,
) -> Path:
    """A video of `frame_array`. times: of the frames in hundredths of a second, for variable rates."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 4_000_000
        if times:
            stream.codec_context.time_base = Fraction(1, 100)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(frame_array(number, width, height), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decode_all(path: Path) -> tuple[list[np.ndarray], float]:
    """Every frame as RGB, and the frame rate, by PyAV's simplest calls."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return frames, float(stream.average_rate or 0)


def _torchvision_resize(video: Tensor, size: list[int], interpolation: object, antialias: bool) -> Tensor:
    """What torchvision computes for uint8 frames: in float32, clamped and rounded."""
    resized = torch.nn.functional.interpolate(video.float(), size=size, mode="bicubic", antialias=antialias)
    return resized.clamp(0, 255).round().to(torch.uint8)


@contextmanager
def vision_process() -> Iterator[Any]:
    """The module qwen_vl_utils.vision_process, which cannot be imported without torchvision."""
    names = ("torchvision", "torchvision.io", "torchvision.transforms")
    stand_in = types.ModuleType("torchvision")
    transforms: Any = types.ModuleType("torchvision.transforms")
    transforms.InterpolationMode = types.SimpleNamespace(BICUBIC="bicubic")
    transforms.functional = types.SimpleNamespace(resize=_torchvision_resize)
    stand_in.__dict__.update(__version__="0.0", io=types.ModuleType("torchvision.io"), transforms=transforms)
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(zip(names, (stand_in, stand_in.__dict__["io"], transforms), strict=True))
    try:
        from qwen_vl_utils import vision_process as module

        def read(settings: dict[str, Any]) -> tuple[Tensor, dict[str, Any], float]:
            frames, fps = decode_all(Path(settings["video"]))
            first, last, total = module.calculate_video_frame_range(settings, len(frames), fps)
            count = module.smart_nframes(settings, total_frames=total, video_fps=fps)
            indices = torch.linspace(first, last, count).round().long().tolist()
            video = torch.from_numpy(np.stack([frames[index] for index in indices])).permute(0, 3, 1, 2)
            metadata = {"fps": fps, "frames_indices": indices, "total_num_frames": total}
            return video, metadata, count / max(total, 1e-6) * fps

        module.VIDEO_READER_BACKENDS["torchvision"] = read
        module.get_video_reader_backend = lambda: "torchvision"
        yield module
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
