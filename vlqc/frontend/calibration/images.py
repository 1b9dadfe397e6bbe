"""Reads an image file as an upright 8-bit RGB image, with Pillow."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "GIF", "TIFF")  # Pillow's names of the formats with these suffixes
VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
MISSING = "there is no such file"
WHITE = (255, 255, 255)
MAX_PIXELS = 1 << 26  # about 8000 x 8000, several times what the models use: bounds the memory of one file


class ImageError(Exception):
    """An image that cannot be used, with the reason."""


def is_image(path: Path) -> bool:
    """Whether the name is that of an image. Hidden files, such as the `._x.jpg` of macOS, are not images."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def is_video(path: Path) -> bool:
    """Whether the name is that of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".")


def read_image(source: Path | bytes) -> "Image":
    """The first frame as RGB, rotated by its EXIF tag, transparent pixels on white.

    source: an image file, or its bytes.

    Raises:
        ImageError: if it is not a readable image in one of FORMATS, or has more than MAX_PIXELS pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if isinstance(source, Path) and not source.is_file():
            raise ImageError(why_not_a_file(source))
        # The content decides about the format, not the suffix: without a list of formats, Pillow would pass some files
        # to other programs (EPS to Ghostscript).
        Image.init()  # registers all formats
        file = source if isinstance(source, Path) else io.BytesIO(source)
        with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ImageError(f"too many pixels: {opened.width} x {opened.height}, at most {MAX_PIXELS} are allowed")
            opened.load()  # frame 0 of an animation
            return _to_rgb(ImageOps.exif_transpose(opened))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError("not an image, or of an unsupported format") from error
    except OSError as error:  # without the name, which the caller states and which may be long
        raise ImageError(error.strerror or str(error).strip() or type(error).__name__) from error
    except Exception as error:  # decoders raise SyntaxError, struct.error, IndexError and others on damaged files
        raise ImageError(str(error).strip() or type(error).__name__) from error


def why_not_a_file(path: Path) -> str:
    """The reason why a path is no regular file."""
    if path.is_dir():
        return "it is a folder"
    if path.is_symlink() and not path.exists():
        return "it is a broken link"
    return "it is not a regular file" if path.exists() else MISSING


def _to_rgb(image: "Image") -> "Image":
    """Any mode -> RGB. Transparent pixels become white, as in qwen_vl_utils; 16-bit grays keep their upper 8 bits."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I"):
        gray = np.asarray(image)
        # Pillow's own conversion clips at 255, which makes a 16-bit scan white.
        image = Image.fromarray(np.clip(gray >> 8 if gray.max(initial=0) > 255 else gray, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        on_white = Image.new("RGB", image.size, WHITE)
        on_white.paste(image, mask=image.getchannel("A"))
        return on_white
    return image.convert("RGB")
