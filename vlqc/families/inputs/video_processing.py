"""Videos -> patches: which frames are used, their size, their patches and their tokens in the text.

The rules, names and defaults are those of qwen_vl_utils 0.0.14, which the published models were evaluated with.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlqc.families.inputs.image_processing import ImageProcessing, Patches
from vlqc.families.inputs.input_format import VideoFormat
from vlqc.families.inputs.smart_resize import smart_resize


@dataclass(frozen=True)
class SampledFrames:
    """Which frames of a video are used.

    indices: of the frames, ascending; fps: frames per second of the numbering that `indices` belong to; sample_fps:
    frames per second of the selected frames.
    """

    indices: tuple[int, ...]
    fps: float
    sample_fps: float


@dataclass(frozen=True)
class VideoPatches:
    """The patches of one video: pixel_values [P, C*T*p*p] float32, grid [1, 3] int64 (temporal steps, and patches in
    height and width); times: seconds of every temporal step; seconds_per_step: between two steps."""

    pixels: Tensor
    grid: Tensor
    times: tuple[float, ...]
    seconds_per_step: float


@dataclass(frozen=True)
class VideoTokens:
    """Tokens of a video: times of its temporal steps in seconds, and video tokens per step."""

    times: tuple[float, ...]
    per_step: int

    @property
    def total(self) -> int:
        """Video tokens of all steps."""
        return len(self.times) * self.per_step


class VideoProcessing:
    """The video preprocessing of one family. `processor` is an image processor of transformers that needs Pillow only.

    images: of the family; form: limits and tokens.
    """

    def __init__(self, images: ImageProcessing, form: VideoFormat) -> None:
        self.images, self.form = images, form

    # ---- which frames ------------------------------------------------------------------------------------------------

    def frame_range(self, total: int, fps: float, start: float | None, end: float | None) -> tuple[int, int]:
        """First and last frame between two times in seconds. ValueError if there are not at least two frames.

        total: number of frames; fps: of the video.
        """
        seconds = total / fps
        first = 0 if start is None else math.ceil(max(0.0, min(start, seconds)) * fps)
        last = total - 1 if end is None else min(math.floor(max(0.0, min(end, seconds)) * fps), total - 1)
        if (start is not None or end is not None) and first >= last:
            raise ValueError(
                f"there are no two frames between video_start and video_end: the video has {seconds:.2f} s"
            )
        return first, last

    def frame_count(
        self,
        total: int,
        video_fps: float,
        *,
        fps: float | None = None,
        nframes: int | None = None,
        min_frames: int | None = None,
        max_frames: int | None = None,
    ) -> int:
        """How many of `total` frames are used, a multiple of the frames of a temporal step. fps or nframes: as wished.

        The function smart_nframes of qwen_vl_utils.

        Raises:
            ValueError: if there are too few frames.
        """
        factor = self.form.frame_factor
        if nframes is not None:
            count = round(nframes / factor) * factor
        else:
            smallest = math.ceil((self.form.min_frames if min_frames is None else min_frames) / factor) * factor
            limit = min(self.form.max_frames, total) if max_frames is None else max_frames
            largest = limit // factor * factor
            wished = total / video_fps * (self.form.fps if fps is None else fps)
            count = math.floor(min(max(wished, smallest), largest, total) / factor) * factor
        if not factor <= count <= total:
            what = f"nframes is {nframes}" if nframes is not None else f"{count} frames would be used"
            raise ValueError(f"{what}, and the video has {total}: between {factor} and all of them can be used")
        return count

    @staticmethod
    def spread(first: int, last: int, count: int) -> tuple[int, ...]:
        """`count` evenly spread frames from the first to the last, as torch.linspace rounds them."""
        return tuple(torch.linspace(first, last, count).round().long().tolist())

    # ---- their size --------------------------------------------------------------------------------------------------

    def frame_size(
        self,
        height: int,
        width: int,
        frames: int,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        total_pixels: int | None = None,
        resized_height: int | None = None,
        resized_width: int | None = None,
    ) -> tuple[int, int]:
        """Height and width to which the frames of a video are resized, multiples of token_side.

        The settings are those of a video in qwen_vl_utils: pixels of a frame, and of all frames. Raises ValueError as
        `smart_resize`.
        """
        side, form = self.images.form.token_side, self.form
        if resized_height is not None and resized_width is not None:
            limits = self.images.form.min_tokens * side**2, self.images.form.max_pixels
            return smart_resize(resized_height, resized_width, side, *limits)
        smallest = form.min_tokens * side**2 if min_pixels is None else min_pixels
        total = form.total_tokens * side**2 if total_pixels is None else total_pixels
        share = total / frames * form.frame_factor
        largest = max(min(form.max_tokens * side**2, share), int(smallest * 1.05))
        largest = largest if max_pixels is None else min(max_pixels, largest)
        return smart_resize(height, width, side, smallest, largest, "min_pixels" if min_pixels is None else "")

    def listed_frame_size(self, height: int, width: int, **pixels: int | None) -> tuple[int, int]:
        """Height and width to which an image in a list of frames is resized before `frame_size` applies.

        qwen_vl_utils reads it as an image whose tokens are twice as wide and high. pixels: as in `frame_size`.
        """
        side, form = 2 * self.images.form.token_side, self.images.form
        resized = pixels.get("resized_height"), pixels.get("resized_width")
        least, most = form.min_tokens * side**2, form.max_tokens * side**2
        if resized[0] is not None and resized[1] is not None:
            return smart_resize(resized[0], resized[1], side, least, most)
        smallest, largest = pixels.get("min_pixels"), pixels.get("max_pixels")
        limits = (least if smallest is None else smallest, most if largest is None else largest)
        default = "min_pixels" if smallest is None else "max_pixels" if largest is None else ""
        return smart_resize(height, width, side, *limits, default)

    @staticmethod
    def resize(frame: Tensor, height: int, width: int) -> Tensor:
        """uint8 [3, H, W] -> uint8 [3, height, width], bicubic with antialiasing, as torchvision resizes frames."""
        resized = torch.nn.functional.interpolate(
            frame[None].float(), (height, width), mode="bicubic", align_corners=False, antialias=True
        )
        return resized[0].clamp(0, 255).round().to(torch.uint8)

    # ---- patches and tokens ------------------------------------------------------------------------------------------

    def process(self, processor: Any, frames: Tensor, sampled: SampledFrames) -> VideoPatches:
        """Resized frames, uint8 [N, 3, height, width] -> patches. Raises what the image processor raises.

        An image is a step of equal frames, so that every frame is processed as an image, and the patches of one step
        take their values from its frames in turn. Of an odd number of frames the last one is repeated.
        """
        step = int(processor.temporal_patch_size)
        frames = torch.cat([frames, frames[-1:].expand(-len(frames) % step, -1, -1, -1)])
        steps, grid = [], torch.empty(0)
        for begin in range(0, len(frames), step):
            parts = []
            for offset, frame in enumerate(frames[begin : begin + step]):
                patches, grid = self._process_frame(processor, frame.permute(1, 2, 0).contiguous())
                # [P, C*T*p*p] -> [P, C, p*p] of one frame
                parts.append(patches.reshape(len(patches), len(frame), step, -1)[:, :, offset])
            steps.append(torch.stack(parts, dim=2).flatten(1))
        grid = torch.tensor([[len(steps), *grid[0, 1:].tolist()]])
        return VideoPatches(torch.cat(steps), grid, self.times(sampled, step), step / sampled.sample_fps)

    def _process_frame(self, processor: Any, frame: Tensor) -> Patches:
        """uint8 [height, width, 3] -> the patches of a step of equal frames."""
        from PIL import Image

        options = {} if self.form.resized_again else {"do_resize": False}
        inputs = processor(images=[Image.fromarray(frame.numpy())], return_tensors="pt", **options)
        return inputs["pixel_values"].to(torch.float32), inputs["image_grid_thw"]

    @staticmethod
    def times(sampled: SampledFrames, step: int) -> tuple[float, ...]:
        """Seconds of every temporal step: the mean of its first and its last frame."""
        indices = [*sampled.indices, *[sampled.indices[-1]] * (-len(sampled.indices) % step)]
        seconds = [index / sampled.fps for index in indices]
        return tuple((seconds[at] + seconds[at + step - 1]) / 2 for at in range(0, len(seconds), step))

    def times_with(self, processor: Any, sampled: SampledFrames) -> tuple[float, ...]:
        """`times` for the temporal steps of an image processor."""
        return self.times(sampled, int(processor.temporal_patch_size))

    def frame_tokens(self, processor: Any, height: int, width: int) -> int:
        """Video tokens of a temporal step with frames of this size in pixels, before the image processor resizes them.

        A black frame is processed, because versions of transformers read the limits from different attributes. Raises
        what the image processor raises.
        """
        patches = self._process_frame(processor, torch.zeros(height, width, 3, dtype=torch.uint8))
        return self.images.image_tokens(processor, patches)

    def step_tokens(self, processor: Any, video: VideoPatches) -> int:
        """Number of video tokens of one temporal step."""
        return int(video.grid[0, 1:].prod()) // int(processor.merge_size**2)

    def placeholder(self, video_token: str, video: VideoTokens) -> str:
        """The text that takes the place of one video token between vision_start and vision_end, or of all three if
        `form.timestamps`."""
        if not self.form.timestamps:
            return video_token * video.total
        step = f"{self.images.form.vision_start}{video_token * video.per_step}{self.images.form.vision_end}"
        return "".join(f"<{seconds:.1f} seconds>{step}" for seconds in video.times)

    def expected_token(self, config: Mapping[str, Any], default: int | None) -> Any:
        """Id of the video token in config.json, the default if it has none."""
        return config.get("video_token_id", default)

    def model_inputs(self, videos: Sequence[VideoPatches]) -> dict[str, Tensor]:
        """The video tensors of a sample; without videos none."""
        if not videos:
            return {}
        tensors = {
            "pixel_values_videos": torch.cat([video.pixels for video in videos]),
            "video_grid_thw": torch.cat([video.grid for video in videos]),
        }
        if self.form.seconds:
            tensors["second_per_grid_ts"] = torch.tensor([video.seconds_per_step for video in videos])
        return tensors
