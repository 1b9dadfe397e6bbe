"""An image file -> upright RGB image. Expected pixels are written out by hand."""

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
    """Catches photos whose EXIF rotation is ignored."""
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
    """Catches transparent pixels that show the color below them."""
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image = image.convert(mode) if mode != "P" else image.quantize(4)
    image.save(tmp_path / "logo.png")
    assert pixels(tmp_path / "logo.png").tolist() == [[list(WHITE), [0, 0, 0]]]


def test_sixteen_bit_grey_keeps_its_shades(tmp_path: Path) -> None:
    """Catches 16-bit images that are clipped to white."""
    gray = np.array([[0, 0x4000, 0x80FF, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(gray).save(tmp_path / "scan.png")
    assert pixels(tmp_path / "scan.png")[0, :, 0].tolist() == [0, 0x40, 0x80, 0xFF]


@pytest.mark.parametrize("mode", WHITES)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    """Catches an image mode that fails to convert, or loses white."""
    Image.new(mode, (3, 2), WHITES[mode]).save(tmp_path / "x.tiff")
    assert np.abs(pixels(tmp_path / "x.tiff").astype(int) - 255).max() <= 1


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    """Catches another frame than the first."""
    frames = [Image.new("RGB", (2, 2), color) for color in (RED, BLUE)]
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
    """Catches an exception of a decoder that is not turned into ImageError."""
    write(tmp_path / "bad.png")
    with pytest.raises(ImageError, match=reason):
        read_image(tmp_path / "bad.png")


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a small file that decodes to more pixels than fit in memory."""
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="too many pixels"):
        read_image(tmp_path / "bomb.png")


def test_images_with_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gigabytes of memory for a huge image, and a limit that is off by one pixel."""
    monkeypatch.setattr("vlqc.frontend.calibration.images.MAX_PIXELS", 110)
    for height in (11, 12):
        Image.new("L", (10, height)).save(tmp_path / f"{height}.png")
    assert read_image(tmp_path / "11.png").size == (10, 11)
    with pytest.raises(ImageError, match="too many pixels: 10 x 12"):
        read_image(tmp_path / "12.png")


def test_what_counts_as_an_image() -> None:
    """Catches upper-case suffixes that are ignored, and macOS's `._` files that are read."""
    assert all(is_image(Path(name)) for name in ("a.JPG", "a.jpeg", "a.Png", "a.bmp", "a.webp", "a.gif", "a.TIF"))
    assert not any(is_image(Path(name)) for name in ("a.txt", "._a.jpg", "jpg", "a.mp4"))
