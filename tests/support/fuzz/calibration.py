"""Fuzz targets for calibration data: JSON lines, images, preprocessed samples."""

import io
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from tests.support.fuzz.damage import as_json, damaged_bytes, damaged_json, values
from tests.support.fuzz.files import put
from tests.support.fuzz.tiny import tiny_model
from tests.support.fuzz.verdict import demand, strict
from vlqc.frontend.calibration.formats import EMPTY, FORMATS, LINE_KEYS, LINES
from vlqc.frontend.calibration.images import ImageError, read_image
from vlqc.frontend.calibration.samples import check_samples
from vlqc.frontend.calibration.sources import list_samples

# ---- calibration data ------------------------------------------------------------------------------------------------

LINE = {"image": ["a.png", "b/c.png"], "prompt": "What is this?", "response": "A cat."}
OTHER_LINES: tuple[dict[str, Any], ...] = (
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image", "image": "file:///a%20b.png", "max_pixels": 50176}, "x"]},
            {"role": "assistant", "content": "<image>A cat."},
        ],
        "images": ["data:image/png;base64,AAAA"],
    },
    {"conversations": [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Ho"}], "image": "a.png"},
    {"query": "Hi", "response": "Ho", "history": [["a", "b"]], "system": "Be brief.", "images": ["a.png"]},
    {"instruction": "Hi", "input": "you", "output": "Ho"},
)


def line_cases() -> st.SearchStrategy[bytes]:
    one = st.one_of(
        damaged_json(LINE, names=(*LINE_KEYS, "video", "images", "")).map(as_json),
        st.tuples(st.sampled_from((*LINE_KEYS, "x")), values()).map(lambda it: as_json({**LINE, it[0]: it[1]})),
        damaged_bytes(as_json(LINE)),
        *(damaged_json(line).map(as_json) for line in OTHER_LINES),
        values().map(as_json),
    )
    return st.lists(one, min_size=1, max_size=3).map(b"\n".join)


def check_lines(case: bytes, folder: Path) -> bool:
    """Accepted lines are strict JSON with valid UTF-8 texts and names, in the own format with known keys only."""
    source = folder / "lines.jsonl"
    put(source, case)
    requests = list_samples(source).conversations
    lines = [line for line in case.decode("utf-8-sig").split("\n") if line.strip()]
    if lines[0].lstrip().startswith("["):  # the file may be one list
        return True
    demand(len(lines) == len(requests), "lines were lost")
    for line, request in zip(lines, requests, strict=True):
        given = strict(line.encode())
        if isinstance(given, dict) and not any(form.key in given for form in FORMATS if form is not LINES):
            filled = {key for key, value in given.items() if value not in EMPTY}
            demand(filled <= set(LINES.keys), f"unknown key in {given}")
        for text in (*(turn.text for turn in request.turns), *(image.name for image in request.images)):
            text.encode()
        for image in request.images[:1]:
            try:
                read_image(image.source)
            except ImageError:
                continue
    return True


# ---- images ----------------------------------------------------------------------------------------------------------


@cache
def image_files() -> dict[str, bytes]:
    """Small image files by suffix and kind, for all common kinds."""
    random = np.random.default_rng(1)
    color = Image.fromarray(random.integers(0, 256, (13, 17, 3), dtype=np.uint8))
    clear = Image.fromarray(random.integers(0, 256, (9, 9, 4), dtype=np.uint8))
    deep = Image.fromarray(random.integers(0, 65536, (8, 5)).astype(np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6
    made: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "png": (color, "PNG", {}),
        "png 1x1": (color.crop((0, 0, 1, 1)), "PNG", {}),
        "png 16 bits": (deep, "PNG", {}),
        "png rgba": (clear, "PNG", {}),
        "png palette": (clear.quantize(8), "PNG", {}),
        "png wide": (color.resize((3000, 1)), "PNG", {}),
        "jpg": (color, "JPEG", {}),
        "jpg cmyk": (color.convert("CMYK"), "JPEG", {}),
        "jpg turned": (color, "JPEG", {"exif": turned}),
        "jpg progressive": (color, "JPEG", {"progressive": True}),
        "gif moving": (color, "GIF", {"save_all": True, "append_images": [color.rotate(90)]}),
        "webp": (clear, "WEBP", {"lossless": True}),
        "webp moving": (color, "WEBP", {"save_all": True, "append_images": [color.rotate(90)]}),
        "bmp": (color, "BMP", {}),
        "tif": (color, "TIFF", {}),
        "tif lzw": (color, "TIFF", {"compression": "tiff_lzw"}),
        "tif cmyk": (color.convert("CMYK"), "TIFF", {}),
        "tif float": (color.convert("F"), "TIFF", {}),
    }
    files = {}
    for kind, (image, form, more) in made.items():
        file = io.BytesIO()
        image.save(file, form, **more)
        files[kind] = file.getvalue()
    return files


def image_cases() -> st.SearchStrategy[tuple[str, bytes]]:
    def of(kind: str, content: bytes) -> st.SearchStrategy[tuple[str, bytes]]:
        whole = st.sampled_from(("png", "jpg", "gif", "bmp", "webp", "tif", "tiff")).map(lambda it: (it, content))
        damaged = damaged_bytes(content).map(lambda it: (kind.partition(" ")[0], it))
        return st.one_of(damaged, damaged, damaged, whole)

    return st.one_of(*(of(kind, content) for kind, content in image_files().items()))


def check_image(case: tuple[str, bytes], folder: Path) -> bool:
    """Accepted images are complete and in 8-bit RGB."""
    ending, content = case
    path = folder / f"x.{ending}"
    put(path, content)
    try:
        read = read_image(path)
    except ImageError as refused:
        demand(str(refused).strip() != "", "refused without a reason")
        return False
    with Image.open(io.BytesIO(content)) as opened:
        demand(sorted(read.size) == sorted(opened.size), f"{read.size} of {opened.size}")
    demand(read.mode == "RGB" and np.asarray(read).dtype == np.uint8, f"mode {read.mode}")
    return True


# ---- preprocessed samples --------------------------------------------------------------------------------------------


@st.composite
def sample_cases(draw: st.DrawFn) -> Any:
    """A valid sample in which one to three tensors have other dtypes, shapes or values, or are missing."""
    sample: dict[Any, Any] = {
        "input_ids": torch.tensor([[1, 3, 5, 5, 4, 9]]),
        "attention_mask": torch.ones(1, 6, dtype=torch.int64),
        "pixel_values": torch.zeros(8, 1176),
        "image_grid_thw": torch.tensor([[1, 2, 4]]),
    }
    dtypes = (torch.int64, torch.float32, torch.float16, torch.bool, torch.int8, torch.complex64, torch.bfloat16)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(list(sample) or ["input_ids"]))
        what = draw(st.sampled_from(("dtype", "shape", "value", "other", "remove", "rename", "number")))
        held = sample.get(name)
        if what == "remove":
            sample.pop(name, None)
        elif what == "rename":
            sample[draw(st.sampled_from(("pixel_values_videos", "x", 3, None)))] = sample.pop(name, None)
        elif what == "other" or not isinstance(held, torch.Tensor):
            sample[name] = draw(values())
        elif what == "dtype":
            sample[name] = held.to(draw(st.sampled_from(dtypes)))
        elif what == "shape":
            sample[name] = torch.zeros(draw(st.lists(st.integers(0, 4), max_size=4)), dtype=held.dtype)
        elif held.numel() and held.dtype == torch.int64:
            changed = held.clone().flatten()
            changed[draw(st.integers(0, held.numel() - 1))] = draw(
                st.sampled_from((-1, 0, 2, 5, 63, 64, 2**31, 2**62, 2**62 + 2, -(2**63)))
            )
            sample[name] = changed.reshape(held.shape)
        elif held.numel() and held.dtype.is_floating_point:
            sample[name] = held + draw(st.sampled_from((math.nan, math.inf, 1e30, -1e30, 1e-42)))
    return draw(st.sampled_from(([sample], [sample], [sample], [], [3], sample, [sample, None])))


def check_ready_samples(case: Any, folder: Path) -> bool:
    """Accepted samples fit the forward of the model."""
    (sample,) = check_samples(case, tiny_model())
    ids = sample["input_ids"]
    demand(ids.dtype == torch.int64 and ids.ndim == 2 and 0 <= int(ids.min()) <= int(ids.max()) < 64, "input_ids")
    if "pixel_values" in sample:
        pixels = sample["pixel_values"]
        demand(pixels.is_floating_point() and bool((pixels.abs() <= 1e4).all()), "pixel_values")
        demand(int((ids == 5).sum()) * 4 == len(pixels), "image tokens do not fit")
    demand(all(isinstance(key, str) for key in sample), "a key that is no text")
    return True
