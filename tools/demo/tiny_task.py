"""The task of the tiny checkpoint `tools/demo/tiny_vl`: questions about images of colored digits.

An image is 56 x 112 pixels: 2 x 4 cells of 28 x 28, one merged image token of Qwen2.5-VL per cell. Each cell shows one
of ten digits in one of eight colors on a noisy background; no digit and no color occurs twice. A sequence names every
cell once, by color or by digit, followed by the other of the two: "red 7 3 blue ...". Images are drawn with Pillow's
default font; nothing is downloaded. The splits "train" and "test" use different renderings of the digits (size,
position, angle).

    python -m tools.demo.tiny_task FOLDER        # accuracy of a float checkpoint on the test split, in percent
"""

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

ROWS, COLUMNS, CELL = 2, 4, 28  # cells of an image; side of a cell in pixels
CELLS = ROWS * COLUMNS
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 40),
    "purple": (160, 50, 200),
    "cyan": (40, 200, 210),
    "orange": (240, 140, 30),
    "white": (240, 240, 240),
}

# Token ids of tools/demo/tiny_vl/tokenizer.json.
PAD, BEGIN, END, VISION_START, VISION_END, IMAGE, VIDEO, VISION_PAD = range(8)
FIRST_DIGIT, FIRST_COLOR, VOCABULARY = 12, 22, 64
WORDS = {FIRST_DIGIT + digit: str(digit) for digit in range(10)} | {
    FIRST_COLOR + index: name for index, name in enumerate(COLORS)
}
HEAD = (BEGIN, VISION_START, *[IMAGE] * CELLS, VISION_END)

# Constants of Qwen2VLImageProcessor: OpenAI CLIP's mean and standard deviation per color channel.
PATCH, MERGE, FRAMES = 14, 2, 2
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
GRID = (1, ROWS * MERGE, COLUMNS * MERGE)  # frames, patches down, patches across

BATCH = 32  # samples per draw; fixed, so that the first samples of a seed do not depend on how many are drawn
EVALUATION_SEED = 12345
ATLAS_SEEDS = {"train": 1, "test": 2}


class Drawing(NamedTuple):
    """A batch of images and their content."""

    images: npt.NDArray[np.uint8]  # [count, 56, 112, 3]
    digits: IntArray  # [count, CELLS], 0..9
    colors: IntArray  # [count, CELLS], index into COLORS


@functools.cache
def glyph_masks(split: str) -> FloatArray:
    """Opacity 0..1 of 256 renderings per digit, [10, 256, CELL, CELL]; size, position and angle depend on the split."""
    random = np.random.default_rng(ATLAS_SEEDS[split])
    masks = np.zeros((10, 256, CELL, CELL), np.float32)
    for digit in range(10):
        for rendering in range(256):
            font = ImageFont.load_default(int(random.integers(18, 26)))
            canvas = Image.new("L", (2 * CELL, 2 * CELL), 0)  # twice the cell, so that rotation cuts no corner
            center = (float(CELL + random.integers(-3, 4)), float(CELL + random.integers(-3, 4)))
            ImageDraw.Draw(canvas).text(center, str(digit), fill=255, font=font, anchor="mm")
            turned = canvas.rotate(float(random.uniform(-20, 20)), resample=Image.Resampling.BILINEAR)
            cut = turned.crop((CELL // 2, CELL // 2, CELL // 2 + CELL, CELL // 2 + CELL))
            masks[digit, rendering] = np.asarray(cut, np.float32) / 255
    return masks


def draw(count: int, random: np.random.Generator, split: str) -> Drawing:
    """Draws `count` images: their content from `random`, the renderings from `split` ("train" or "test")."""
    masks = glyph_masks(split)
    digits = np.argsort(random.random((count, 10)), 1)[:, :CELLS]
    colors = np.argsort(random.random((count, len(COLORS))), 1)[:, :CELLS]
    rendering = random.integers(0, masks.shape[1], (count, CELLS))
    opacity = masks[digits, rendering][..., None]  # [count, CELLS, CELL, CELL, 1]
    background = random.uniform(0, 70, (count, CELLS, 1, 1, 3)) + random.normal(0, 12, (count, CELLS, CELL, CELL, 1))
    paint = np.array(list(COLORS.values()), np.float32)[colors][:, :, None, None, :]
    foreground = paint * random.uniform(0.8, 1.05, (count, CELLS, 1, 1, 1))
    cells = opacity * foreground + (1 - opacity) * background
    cells = cells.reshape(count, ROWS, COLUMNS, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    images = np.clip(cells.reshape(count, ROWS * CELL, COLUMNS * CELL, 3), 0, 255).astype(np.uint8)
    return Drawing(images, digits, colors)


def write_sentences(drawing: Drawing, random: np.random.Generator) -> tuple[IntArray, BoolArray]:
    """Token ids [count, length] of one sequence per image, and a mask [count, length] of the answers."""
    count = len(drawing.images)
    order = np.argsort(random.random((count, CELLS)), 1)
    digit = FIRST_DIGIT + np.take_along_axis(drawing.digits, order, 1)
    color = FIRST_COLOR + np.take_along_axis(drawing.colors, order, 1)
    by_color = random.integers(0, 2, (count, CELLS)).astype(bool)
    pairs = np.stack([np.where(by_color, color, digit), np.where(by_color, digit, color)], 2)  # question, answer
    input_ids = np.concatenate([np.tile(HEAD, (count, 1)), pairs.reshape(count, 2 * CELLS)], 1)
    is_answer = np.zeros(input_ids.shape, bool)
    is_answer[:, len(HEAD) + 1 :: 2] = True
    return input_ids, is_answer


def cut_patches(images: npt.NDArray[np.uint8]) -> FloatArray:
    """Normalized patches [count * 32, 3 * 2 * 14 * 14] as Qwen2VLImageProcessor orders them.

    Merge block by merge block; an image counts as two equal frames.
    """
    count = len(images)
    normalized = (images.astype(np.float32) / 255 - MEAN) / DEVIATION
    blocks = normalized.transpose(0, 3, 1, 2).reshape(count, 3, ROWS, MERGE, PATCH, COLUMNS, MERGE, PATCH)
    blocks = blocks.transpose(0, 2, 5, 3, 6, 1, 4, 7)  # count, block row, block column, row, column, color, y, x
    frames = np.repeat(blocks[..., None, :, :], FRAMES, axis=-3)
    return np.ascontiguousarray(frames.reshape(count * CELLS * MERGE**2, 3 * FRAMES * PATCH**2))


def drawn_batches(count: int, seed: int, split: str) -> Iterator[tuple[Drawing, IntArray, BoolArray]]:
    """Drawings and their `write_sentences`, `count` samples in total, from one random stream per seed."""
    random = np.random.default_rng(seed)
    for start in range(0, count, BATCH):
        drawing = draw(BATCH, random, split)
        input_ids, is_answer = write_sentences(drawing, random)
        rows = slice(0, min(BATCH, count - start))
        drawing = Drawing(drawing.images[rows], drawing.digits[rows], drawing.colors[rows])
        yield drawing, input_ids[rows], is_answer[rows]


def model_inputs(images: npt.NDArray[np.uint8], input_ids: IntArray) -> dict[str, Tensor]:
    """Inputs of a forward for images [count, 56, 112, 3] and ids [count, length]; see `with_token_types`."""
    ids = torch.from_numpy(input_ids)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.from_numpy(cut_patches(images)),
        "image_grid_thw": torch.tensor([GRID] * len(images)),
    }


def samples(count: int, seed: int = 0, split: str = "train") -> list[dict[str, Tensor]]:
    """`count` model inputs of one image each; see `with_token_types` for transformers 5.

    input_ids and attention_mask int64 [1, 27], pixel_values float32 [32, 1176], image_grid_thw int64 [1, 3].
    """
    return [
        model_inputs(drawing.images[index : index + 1], input_ids[index : index + 1])
        for drawing, input_ids, _ in drawn_batches(count, seed, split)
        for index in range(len(input_ids))
    ]


def with_token_types(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, with `mm_token_type_ids` if the installed transformers is 5 or newer.

    Without them these versions silently give image tokens the positions of text tokens.
    """
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        return inputs
    return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}


@torch.no_grad()
def answers(model: nn.Module, count: int, seed: int, split: str) -> tuple[Tensor, Tensor]:
    """Teacher-forced logits float32 [8 * count, 64] of the answers, and the expected token ids [8 * count].

    `model` takes a Qwen2.5-VL forward's keyword arguments and returns an object with `logits`.
    """
    parameter = next(model.parameters(), None)
    dtype = parameter.dtype if parameter is not None and parameter.is_floating_point() else torch.float32
    logits, targets = [], []
    for drawing, input_ids, is_answer in drawn_batches(count, seed, split):
        inputs = with_token_types(model_inputs(drawing.images, input_ids))
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        mask = torch.from_numpy(is_answer)[:, 1:]  # the logits at t predict the token at t + 1
        logits.append(model(**inputs, use_cache=False).logits[:, :-1][mask].float())
        targets.append(inputs["input_ids"][:, 1:][mask])
    return torch.cat(logits), torch.cat(targets)


def answer_logits(model: nn.Module, count: int = 64, seed: int = EVALUATION_SEED) -> Tensor:
    """Logits float32 [8 * count, 64] of the answers on unseen renderings."""
    return answers(model, count, seed, "test")[0]


def accuracy(model: nn.Module, count: int = 256, seed: int = EVALUATION_SEED) -> float:
    """Percentage of correct teacher-forced answers for `count` images of unseen renderings."""
    logits, targets = answers(model, count, seed, "test")
    return 100.0 * (logits.argmax(-1) == targets).float().mean().item()


def write_calibration(folder: str | Path, count: int, seed: int = 0, split: str = "train") -> Path:
    """Writes the images of `samples(count, seed, split)` as PNG and their texts as `folder/calibration.jsonl`.

    Returns the path of the JSON lines, one per image: {"image": file name relative to the jsonl, "prompt": the first
    question, "response": the rest of the sequence}. The checkpoint's chat template
    renders prompt and response to the token ids of the sample.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for drawing, input_ids, _ in drawn_batches(count, seed, split):
        for image, ids in zip(drawing.images, input_ids, strict=True):
            name = f"{len(lines) + 1:04d}.png"
            Image.fromarray(image).save(folder / name)
            prompt, *response = [WORDS[token] for token in ids[len(HEAD) :].tolist()]
            lines.append(json.dumps({"image": name, "prompt": prompt, "response": " ".join(response)}))
    path = folder / "calibration.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def main(arguments: list[str]) -> None:
    """Prints the accuracy of the float checkpoint in a folder."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    (folder,) = arguments
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).float().eval()
    print(f"{accuracy(model):.2f} % of the answers are correct")


if __name__ == "__main__":
    main(sys.argv[1:])
