"""Helpers for the trained tiny Qwen2.5-VL of tools/demo/tiny_vl: models, samples, recorded stages, damaged copies."""

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tools.demo import tiny_task
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.sequential import SequentialForward, StageInputs
from vlqc.frontend.streamed_model import StreamedModel, model_inputs
from vlqc.ir.execution import Call

TINY = Path(__file__).parents[2] / "tools" / "demo" / "tiny_vl"
PATCH_VALUES = 1176  # 3 colors x 2 frames x 14 x 14 pixels
STAGES = [*(f"visual.blocks.{n}" for n in range(4)), "visual.merger", *(f"model.layers.{n}" for n in range(4))]


def config() -> dict[str, Any]:
    """A fresh copy of the tiny model's config.json."""
    document: dict[str, Any] = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    return document


def damaged(
    folder: Path,
    *,
    tensors: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
    config: Callable[[dict[str, Any]], None] = lambda config: None,
) -> Path:
    """A copy of the tiny checkpoint in `folder`, modified in place by `tensors` and `config`."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    loaded = load_file(TINY / "model.safetensors")
    tensors(loaded)
    save_file(loaded, folder / "model.safetensors", {"format": "pt"})
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config(document)
    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


@functools.cache
def plain() -> nn.Module:
    """The float32 model as transformers loads it, the reference of the tests. Cached: do not modify it."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model: nn.Module = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY).float().eval()
    return model


@torch.no_grad()
def plain_logits(sample: dict[str, Tensor], model: nn.Module | None = None) -> Tensor:
    """Logits float32 [1, S, 64] of an ordinary forward."""
    model = model or plain()
    logits: Tensor = model(**model_inputs(model, QWEN2_5_VL, sample)).logits
    return logits


def float_model(folder: Path = TINY) -> StreamedModel:
    """A new model without weights."""
    return StreamedModel.open(Checkpoint(folder))


def synthetic_sample(*grids: tuple[int, int], words: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """A sample with one random image per grid (patches down, patches across), or with text only."""
    random = torch.Generator().manual_seed(seed)
    ids = [tiny_task.BEGIN]
    for down, across in grids:
        ids += [tiny_task.VISION_START, *[tiny_task.IMAGE] * (down * across // 4), tiny_task.VISION_END]
    ids += torch.randint(8, 64, (words,), generator=random).tolist()
    sample = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    if grids:
        patches = sum(down * across for down, across in grids)
        sample["pixel_values"] = torch.randn(patches, PATCH_VALUES, generator=random)
        sample["image_grid_thw"] = torch.tensor([(1, down, across) for down, across in grids])
    return sample


def with_other_text(sample: dict[str, Tensor], *words: int) -> dict[str, Tensor]:
    """A sample with copies of the same image tensors and other text tokens after them."""
    ids = sample["input_ids"][0].tolist()
    images = ids[: len(ids) - ids[::-1].index(tiny_task.VISION_END)]
    input_ids = torch.tensor([[*images, *words]])
    copies = {key: sample[key].clone() for key in ("pixel_values", "image_grid_thw")}
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **copies}


def mixed_samples() -> list[dict[str, Tensor]]:
    """Samples with one image, none, two images of different sizes, one larger image; all shapes differ."""
    return [
        synthetic_sample((4, 8), seed=1),
        synthetic_sample(words=9, seed=2),
        synthetic_sample((4, 4), (6, 4), seed=3),
        synthetic_sample((8, 10), seed=4),
    ]


def run_float_stage(model: StreamedModel, inputs: StageInputs) -> None:
    """Sets the outputs of the float stage, with its weights in memory only during the call."""
    model.materialize(inputs.module, model.checkpoint.tensor)
    with torch.no_grad():
        inputs.outputs = [inputs.module(*call.args, **call.kwargs) for call in inputs.calls]
    model.to_meta(inputs.module)


@dataclass(frozen=True)
class RecordedStage:
    """A stage with its real weights, the arguments of one call, and the output of that call."""

    name: str
    module: nn.Module
    call: Call
    output: Any
    path: str  # in the module tree


@functools.cache
def recorded_stages() -> dict[str, RecordedStage]:
    """Every stage of the tiny model by name, called with the sample with the larger image. Cached: do not modify it."""
    model, stages = float_model(), {}
    read_tensor = model.checkpoint.tensor
    with (
        torch.no_grad(),
        model.non_stage_weights(read_tensor),
        SequentialForward(model, [mixed_samples()[3]]) as forward,
    ):
        for inputs in forward:
            model.materialize(inputs.module, read_tensor)
            (call,) = inputs.calls
            inputs.outputs = [inputs.module(*call.args, **call.kwargs)]
            stages[inputs.name] = RecordedStage(
                inputs.name, inputs.module, call, inputs.outputs[0], model.path(inputs.module)
            )
    return stages


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in the output of a stage."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [value for value in values if isinstance(value, Tensor)]
