"""The trained tiny Qwen2.5-VL that ships in tools/demo/tiny_vl, as tests use it: whole, stage by stage, and damaged."""

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
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.sequential import SequentialForward, StageInputs
from vlqc.frontend.streamed_model import StreamedModel, model_inputs
from vlqc.ir.execution import Call

TINY = Path(__file__).parents[2] / "tools" / "demo" / "tiny_vl"
PATCH_VALUES = 1176  # 3 colours x 2 frames x 14 x 14 pixels
STAGES = [*(f"visual.blocks.{n}" for n in range(4)), "visual.merger", *(f"model.layers.{n}" for n in range(4))]


def config() -> dict[str, Any]:
    """A fresh copy of the tiny model's config.json."""
    read: dict[str, Any] = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    return read


def damaged(
    folder: Path,
    *,
    tensors: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
    config: Callable[[dict[str, Any]], None] = lambda config: None,
) -> Path:
    """A copy of the tiny checkpoint in `folder`, its tensors and its config.json changed in place by the callers."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    loaded = load_file(TINY / "model.safetensors")
    tensors(loaded)
    save_file(loaded, folder / "model.safetensors", {"format": "pt"})
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config(described)
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


@functools.cache
def plain() -> nn.Module:
    """The model as transformers itself loads it, float32: what everything is compared with. Not to be changed."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model: nn.Module = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY).float().eval()
    return model


@torch.no_grad()
def plain_logits(sample: dict[str, Tensor], model: nn.Module | None = None) -> Tensor:
    """Logits float32 [1, S, 64] of an ordinary forward."""
    model = model or plain()
    logits: Tensor = model(**model_inputs(model, sample)).logits
    return logits


def float_model(folder: Path = TINY) -> StreamedModel:
    """A new model without weights."""
    return StreamedModel.open(Checkpoint(folder))


def made_up(*grids: tuple[int, int], words: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """A sample with one random picture per grid (patches down, patches across), or with text only."""
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


def asked_again(sample: dict[str, Tensor], *words: int) -> dict[str, Tensor]:
    """A sample with the same pictures, in tensors of its own, and other words behind them."""
    ids = sample["input_ids"][0].tolist()
    pictures = ids[: len(ids) - ids[::-1].index(tiny_task.VISION_END)]
    again = torch.tensor([[*pictures, *words]])
    copies = {key: sample[key].clone() for key in ("pixel_values", "image_grid_thw")}
    return {"input_ids": again, "attention_mask": torch.ones_like(again), **copies}


def mixed_samples() -> list[dict[str, Tensor]]:
    """One picture, none, two pictures of different sizes, one larger picture: no two samples have the same shapes."""
    return [
        made_up((4, 8), seed=1),
        made_up(words=9, seed=2),
        made_up((4, 4), (6, 4), seed=3),
        made_up((8, 10), seed=4),
    ]


def answer(model: StreamedModel, inputs: StageInputs) -> None:
    """What a compiler that changes nothing answers: the float stage's outputs, its weights in memory only now."""
    model.materialize(inputs.module, model.checkpoint.tensor)
    with torch.no_grad():
        inputs.outputs = [inputs.module(*call.args, **call.kwargs) for call in inputs.calls]
    model.to_meta(inputs.module)


@dataclass(frozen=True)
class Lived:
    """A stage with its real weights, how one sample entered it, and what it returned."""

    name: str
    module: nn.Module
    call: Call
    output: Any
    path: str  # in the module tree


@functools.cache
def lived() -> dict[str, Lived]:
    """Every stage of the tiny model by name, as the sample with the larger picture met it. Not to be changed."""
    model, stages = float_model(), {}
    read = model.checkpoint.tensor
    with (
        torch.no_grad(),
        model.non_stage_weights(read),
        SequentialForward(model, [mixed_samples()[3]]) as forward,
    ):
        for inputs in forward:
            model.materialize(inputs.module, read)
            (call,) = inputs.calls
            inputs.outputs = [inputs.module(*call.args, **call.kwargs)]
            stages[inputs.name] = Lived(inputs.name, inputs.module, call, inputs.outputs[0], model.path(inputs.module))
    return stages


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in what a stage returned."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [value for value in values if isinstance(value, Tensor)]
