"""rotate_model: which heads are rotated, and passes that rotate twice."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tools.checkpoints import outlier_checkpoint
from tools.checkpoints.families import Shape
from vlqc.errors import UserError
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.passes.rotate_heads import RotateHeads
from vlqc.passes.rotate_residual import RotateResidual
from vlqc.pipeline.rotation_plan import rotate_model

SMALL = Shape(
    layers=2, hidden=96, intermediate=64, heads=6, value_heads=2, vision_layers=1, vision_hidden=64,
    vision_intermediate=80, vision_heads=4, vocabulary=64,
)  # fmt: skip


def test_heads_with_unbalanced_channels_are_not_rotated(tmp_path: Path) -> None:
    """Catches a rotation of channels that only cancel in magnitude, and wrong channels of grouped heads."""
    outlier_checkpoint.make(tmp_path / "float", 3, shape=SMALL)
    path = tmp_path / "float" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.v_proj.weight"][21] *= 64  # channel 5 of the second of two heads of 16
    for head in (3, 4, 5):  # that read it
        tensors["model.layers.1.self_attn.o_proj.weight"][:, 16 * head + 5] /= 64
    save_file(tensors, path, {"format": "pt"})
    plan = rotate_model(StreamedModel.open(Checkpoint(tmp_path / "float")), [RotateHeads()])
    assert plan.unbalanced_heads == ("model.layers.1.self_attn.v_proj",)
    names = [rotation.rotation.name for rotation in plan.rotations]
    assert names == ["visual.blocks.0.attn.qkv", "model.layers.0.self_attn.v_proj"]


def test_values_are_rotated_once(tmp_path: Path) -> None:
    """Catches a second rotation pass that is ignored."""
    outlier_checkpoint.make(tmp_path / "float", 3, shape=SMALL)
    with pytest.raises(UserError, match="rotate-residual"):
        rotate_model(StreamedModel.open(Checkpoint(tmp_path / "float")), [RotateResidual(), RotateResidual(seed=1)])


@pytest.mark.qwen3_vl
@pytest.mark.one_version
def test_the_norm_of_a_single_key_head_is_no_residual_stream(tmp_path: Path) -> None:
    """Catches a note that the residual stream is not rotated, for the outputs of one layer that nothing else reads."""
    shape = replace(SMALL, heads=2, value_heads=1, layers=3, vision_layers=3)
    outlier_checkpoint.make(tmp_path / "float", 3, shape=shape, family="qwen3_vl")
    plan = rotate_model(StreamedModel.open(Checkpoint(tmp_path / "float")), [RotateResidual()])
    assert len(plan.rotations) == 2 and not plan.obstacles
