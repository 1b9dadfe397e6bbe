"""One image file -> upright RGB. Expected pixels are written out by hand."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlqc.frontend.calibration.images import ImageError, is_image, read_image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
# White in the modes that TIFF files come in. LAB stores a and b with 128 for none.
WHITES = {
    "1": 1,
    "L": 255,
    "CMYK": (0, 0, 0, 0),
    "YCbCr": (255, 128, 128),
    "LAB": (255, 128, 128),
    "I": 255,
    "F": 255.0,
}


def pixels(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    """Catches phone photos that reach the model lying on their side."""
    image = Image.new("RGB", (4, 2), RED)
    image.putpixel((0, 0), BLUE)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise for display
    image.save(tmp_path / "photo.png", exif=exif)
    upright = pixels(tmp_path / "photo.png")
    assert upright.shape == (4, 2, 3)
    assert tuple(upright[0, 1]) == BLUE and tuple(upright[0, 0]) == RED


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(tmp_path: Path, mode: str) -> None:
    """Catches transparency that shows whatever colour lies beneath it."""
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image = image.convert(mode) if mode != "P" else image.quantize(4)
    image.save(tmp_path / "logo.png")
    assert pixels(tmp_path / "logo.png").tolist() == [[list(WHITE), [0, 0, 0]]]


def test_sixteen_bit_grey_keeps_its_shades(tmp_path: Path) -> None:
    """Catches the clipping that turns a 16-bit scan all white."""
    grey = np.array([[0, 0x4000, 0x80FF, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "scan.png")
    assert pixels(tmp_path / "scan.png")[0, :, 0].tolist() == [0, 0x40, 0x80, 0xFF]


@pytest.mark.parametrize("mode", WHITES)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    """Catches a mode that the conversion trips over, or that loses white."""
    Image.new(mode, (3, 2), WHITES[mode]).save(tmp_path / "x.tiff")
    assert np.abs(pixels(tmp_path / "x.tiff").astype(int) - 255).max() <= 1


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    """Catches a later frame, or all frames, being taken."""
    frames = [Image.new("RGB", (2, 2), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert (pixels(tmp_path / "moving.gif") == RED).all()


def write_truncated(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:600])


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "not an image"),
        (lambda path: path.write_text("just text"), "not an image"),
        (write_truncated, "truncated"),
    ],
)
def test_unusable_files_say_why(tmp_path: Path, write, reason: str) -> None:  # type: ignore[no-untyped-def]
    """Catches a decoder's exception that reaches the user raw."""
    write(tmp_path / "bad.png")
    with pytest.raises(ImageError, match=reason):
        read_image(tmp_path / "bad.png")


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tiny file that unpacks to more pixels than the memory holds."""
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="too many pixels"):
        read_image(tmp_path / "bomb.png")


def test_more_pixels_than_anybody_looks_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gigabytes of memory for an image that is made smaller anyway, and a limit that is one pixel off."""
    monkeypatch.setattr("vlqc.frontend.calibration.images.MAX_PIXELS", 110)
    for height in (11, 12):
        Image.new("L", (10, height)).save(tmp_path / f"{height}.png")
    assert read_image(tmp_path / "11.png").size == (10, 11)
    with pytest.raises(ImageError, match="too many pixels: 10 x 12"):
        read_image(tmp_path / "12.png")


def test_what_counts_as_an_image() -> None:
    """Catches upper-case endings being passed over, and macOS's `._` leftovers being read."""
    assert all(is_image(Path(name)) for name in ("a.JPG", "a.jpeg", "a.Png", "a.bmp", "a.webp", "a.gif", "a.TIF"))
    assert not any(is_image(Path(name)) for name in ("a.txt", "._a.jpg", "jpg", "a.mp4"))
