"""The resize rule of qwen_vl_utils, for images and for the frames of videos."""

import math

MAX_ASPECT_RATIO = 200  # of the sides


def smart_resize(
    height: int, width: int, side: int, min_pixels: float, max_pixels: float, default: str = ""
) -> tuple[int, int]:
    """Pixels of an image -> pixels to which it is resized.

    The function of that name in qwen_vl_utils 0.0.14: both sides become multiples of `side`, the number of pixels lies
    between the limits, and the aspect ratio is kept as closely as possible. That package cannot be imported without
    torchvision, and the function of that name in transformers treats images with a side below `side` differently.

    default: name of the limit that is not given, for messages.

    Raises:
        ValueError: if one side is more than MAX_ASPECT_RATIO times as long as the other, or the limits are exchanged.
    """
    if max_pixels < min_pixels:
        limits = {"max_pixels": max_pixels, "min_pixels": min_pixels}
        most, least = (f"{limits[name]:.0f}{', the default' if name == default else ''}" for name in limits)
        both = "; give both limits" if default else ""
        raise ValueError(f"max_pixels is {most}, which is less than min_pixels: {least}{both}")
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise ValueError(f"the aspect ratio must be at most {MAX_ASPECT_RATIO}, it is {ratio:g}")
    rows, columns = (max(1, round(pixels / side)) for pixels in (height, width))
    if rows * columns * side**2 > max_pixels:
        factor = math.sqrt((height * width) / max_pixels)
        rows, columns = (max(1, math.floor(pixels / factor / side)) for pixels in (height, width))
    elif rows * columns * side**2 < min_pixels:
        factor = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(pixels * factor / side) for pixels in (height, width))
    return rows * side, columns * side
