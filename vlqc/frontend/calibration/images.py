"""One picture file -> an upright 8-bit RGB picture, as Qwen2.5-VL's own preparation wants it. Through Pillow only."""

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlqc.errors import Fault, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "GIF", "TIFF")  # Pillow's names of what the endings stand for
VIDEO_ENDINGS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
WHITE = (255, 255, 255)
MOST_PIXELS = 1 << 26  # some 8000 x 8000, several times what the models look at: bounds what a file can make us hold


class BadPicture(Exception):
    """A picture that cannot be used; the text says why."""


def is_picture(path: Path) -> bool:
    """Whether the name says picture. Hidden files (the `._x.jpg` that macOS leaves behind) are none."""
    return path.suffix.lower() in PICTURE_ENDINGS and not path.name.startswith(".")


def is_video(path: Path) -> bool:
    """Whether the name says video."""
    return path.suffix.lower() in VIDEO_ENDINGS and not path.name.startswith(".")


def read_picture(path: Path) -> "Image":
    """First frame, turned upright by its EXIF tag, on white where transparent, RGB. Raises BadPicture."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if not path.is_file():
            raise BadPicture(_no_file(path))
        # By their content, whatever the name says: Pillow knows formats that it leaves to other programs (EPS goes to
        # Ghostscript), and a stranger's file is no reason to start one.
        Image.init()  # else it does not know all of them yet
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise BadPicture(f"too many pixels: {opened.width} x {opened.height}, {MOST_PIXELS} are allowed")
            opened.load()  # frame 0 of an animation; everything else is lazy until here
            upright = ImageOps.exif_transpose(opened)
            return _to_rgb(upright)
    except BadPicture:
        raise
    except Image.DecompressionBombError as error:
        raise BadPicture(f"too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise BadPicture("it is not a picture, or of an unknown format") from error
    except Exception as error:  # decoders raise nearly anything on damaged bytes: SyntaxError, struct.error, IndexError
        raise BadPicture(str(error).strip() or type(error).__name__) from error


def _no_file(path: Path) -> str:
    if path.is_dir():
        return "it is a folder"
    if path.is_symlink() and not path.exists():
        return "it is a link that leads nowhere"
    return "it is not an ordinary file" if path.exists() else "there is no such file"


def _to_rgb(picture: "Image") -> "Image":
    """Any mode -> RGB. Transparent parts become white, as in qwen_vl_utils; 16-bit greys keep their upper 8 bits."""
    import numpy as np
    from PIL import Image

    if picture.mode.startswith("I"):
        grey = np.asarray(picture)
        # Pillow's own conversion clips at 255, which turns a 16-bit scan all white
        picture = Image.fromarray(np.clip(grey >> 8 if grey.max(initial=0) > 255 else grey, 0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        on_white = Image.new("RGB", picture.size, WHITE)
        on_white.paste(picture, mask=picture.getchannel("A"))
        return on_white
    return picture.convert("RGB")


def load_process_vision_info() -> Callable[..., Any]:
    """`qwen_vl_utils.process_vision_info`, with or without torchvision. UserError if it cannot be imported."""
    try:
        with _torchvision_stand_in():
            from qwen_vl_utils import process_vision_info
    except Exception as error:  # a broken torchvision raises RuntimeError, a missing part ImportError
        fix = "install qwen_vl_utils (and a torchvision that fits the installed torch, or none)"
        raise UserError(Fault("qwen_vl_utils cannot be imported", why=str(error), fix=fix)) from error
    loaded: Callable[..., Any] = process_vision_info
    return loaded


@contextmanager
def _torchvision_stand_in() -> Iterator[None]:
    """While it lasts, `import torchvision` finds empty modules, if the real one is not installed.

    qwen_vl_utils imports torchvision at the top, but uses it for videos only.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        yield
        return
    names = ("torchvision", "torchvision.io", "torchvision.transforms")
    modules = {name: types.ModuleType(name) for name in names}
    modules["torchvision"].__dict__.update(
        __version__="0", io=modules["torchvision.io"], transforms=modules["torchvision.transforms"]
    )
    modules["torchvision.transforms"].__dict__["InterpolationMode"] = None
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
