"""What the note on rotations and vlqc/docs/formats.md say about adapters and draft models, in a compiled folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

import vlqc
from tools.checkpoints import outlier_checkpoint as outliers
from tools.checkpoints.families import Shape

pytestmark = pytest.mark.slow

SHAPE = Shape(
    layers=1, hidden=256, intermediate=256, heads=4, vision_layers=1, vision_hidden=128, vision_intermediate=136,
    vocabulary=64,
)  # fmt: skip
ADAPTED, HEAD = ("q_proj", "o_proj"), "lm_head"  # layers that adapters read; its input is the hidden states
CLOSE = 0.5  # of the input in the float model: errors of rounding are below, those of another basis or scale above


def layer_inputs(model: nn.Module, sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """Last word of the name of a layer of the language model -> what it reads."""
    read: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args: read.__setitem__(name, args[0].detach().float())

    names = {name: name.rpartition(".")[2] for name, _ in model.named_modules()}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(keep(last))
        for name, last in names.items()
        if last in (*ADAPTED, HEAD)
    ]
    with torch.no_grad():
        model(**sample)
    for hook in hooks:
        hook.remove()
    return read


@pytest.mark.parametrize(
    ("rotate", "anti_method", "unchanged"),
    [("none", "none", {*ADAPTED, HEAD}), ("heads", "m2", {HEAD}), ("auto", "none", set[str]())],
)
def test_what_stays_as_in_the_float_model(tmp_path: Path, rotate: str, anti_method: str, unchanged: set[str]) -> None:
    """Catches an option that changes what adapters or draft models read although the note recommends it for them."""
    config = outliers.make(tmp_path / "float", shape=SHAPE)
    samples = outliers.random_samples(config, 2)
    vlqc.compile(
        model_path=tmp_path / "float", save_directory=tmp_path / "int8", samples=samples, is_dynamic=True,
        weight_method="round", rotate=rotate, anti_method=anti_method,
    )  # fmt: skip
    original = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "float", torch_dtype=torch.float32).eval()
    expected, found = layer_inputs(original, samples[0]), layer_inputs(vlqc.load(tmp_path / "int8"), samples[0])
    errors = {name: float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected}
    assert {name for name, error in errors.items() if error < CLOSE} == unchanged, errors
