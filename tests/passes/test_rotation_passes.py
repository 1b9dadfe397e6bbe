"""rotate-residual and rotate-heads on whole checkpoints: tensors against dense matrices, and the proof."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import vlqc
from tools.checkpoints import outlier_checkpoint
from tools.checkpoints.families import Shape
from vlqc.errors import UserError
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.rotations import AppliedRotation
from vlqc.kernels_ref.rotation import Rotation
from vlqc.passes.rotate_residual import RotateResidual
from vlqc.pipeline.rotation_plan import rotate_model

SMALL = Shape(
    layers=1, hidden=96, intermediate=64, heads=6, value_heads=2, vision_layers=1, vision_hidden=64,
    vision_intermediate=80, vision_heads=4, vocabulary=64,
)  # fmt: skip
FLOAT = (  # only the MLP of the vision block is quantized
    "rotate-residual,rotate-heads,insert-observers,"
    "assign-precision{scheme=W8A8_DYNAMIC,target=vllm-ascend,fallback=none,exclude=model.*;visual.merger.*;*.attn.*},"
    "quantize-weights{method=round},lower-linears"
)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Float tensors of all weight files, float64."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(str(path), "pt") as file:
            found |= {name: file.get_tensor(name).double().numpy() for name in file.keys()}  # noqa: SIM118
    return found


def dense(size: int, name: str) -> np.ndarray:
    return Rotation(size, 0, name).rotate(torch.eye(size)).double().numpy()


def in_blocks(weight: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Every block of columns of a weight times R."""
    blocks: np.ndarray = (weight.reshape(len(weight), -1, len(r)) @ r).reshape(weight.shape)
    return blocks


@pytest.mark.slow
def test_tensors_are_those_of_dense_rotations(tmp_path: Path) -> None:
    """Catches a tensor that is rotated with a wrong matrix, on a wrong side, without its norm, or not at all."""
    config = outlier_checkpoint.make(tmp_path / "float", 3, shape=SMALL, dtype="float32")
    samples = outlier_checkpoint.random_samples(config, 2, 7)
    vlqc.compile(model_path=tmp_path / "float", save_directory=tmp_path / "out", samples=samples, pipeline=FLOAT)
    source, stored = tensors_of(tmp_path / "float"), tensors_of(tmp_path / "out")
    language, vision = dense(96, "model.embed_tokens"), dense(64, "visual.patch_embed.proj")
    head, vision_head = dense(16, "model.layers.0.self_attn.v_proj"), dense(16, "visual.blocks.0.attn.qkv")
    block, layer, merger = "visual.blocks.0.", "model.layers.0.", "visual.merger."
    qkv = in_blocks(source[block + "attn.qkv.weight"] * source[block + "norm1.weight"], vision)
    qkv[128:] = np.concatenate([vision_head.T @ part for part in np.split(qkv[128:], 4)])
    values = in_blocks(source[layer + "self_attn.v_proj.weight"] * source[layer + "input_layernorm.weight"], language)
    gate = source[layer + "mlp.gate_proj.weight"] * source[layer + "post_attention_layernorm.weight"]
    expected = {
        "model.embed_tokens.weight": source["model.embed_tokens.weight"] @ language,
        "lm_head.weight": source["lm_head.weight"] * source["model.norm.weight"] @ language,
        "model.norm.weight": np.ones(96),
        layer + "input_layernorm.weight": np.ones(96),
        layer + "self_attn.v_proj.weight": np.concatenate([head.T @ part for part in np.split(values, 2)]),
        layer + "self_attn.o_proj.weight": language.T @ in_blocks(source[layer + "self_attn.o_proj.weight"], head),
        layer + "mlp.gate_proj.weight": gate @ language,
        layer + "mlp.down_proj.weight": language.T @ source[layer + "mlp.down_proj.weight"],
        block + "attn.qkv.weight": qkv,
        block + "attn.proj.bias": source[block + "attn.proj.bias"] @ vision,
        merger + "mlp.0.weight": in_blocks(
            source[merger + "mlp.0.weight"] * np.tile(source[merger + "ln_q.weight"], 4), vision
        ),
        merger + "mlp.2.bias": source[merger + "mlp.2.bias"] @ language,
        "visual.patch_embed.proj.weight": np.einsum("ab,a...->b...", vision, source["visual.patch_embed.proj.weight"]),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(stored[name], value, rtol=2**-8, atol=1e-5 * np.abs(value).max(), err_msg=name)
    for name in ("visual.blocks.0.mlp.gate_proj.bias", layer + "self_attn.q_proj.bias"):
        np.testing.assert_allclose(stored[name], source[name], rtol=2**-8, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.0, 1.002])
def test_a_rotation_that_changes_the_output_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """Catches a proof that passes whatever the rotated stage computes, or with a tolerance of a percent."""
    config = outlier_checkpoint.make(tmp_path / "float", 3, shape=SMALL)
    samples = outlier_checkpoint.random_samples(config, 2, 7)
    apply = AppliedRotation.apply_

    def wrong(rotation: AppliedRotation, layer: str, weight: Tensor, *others: Any) -> None:
        apply(rotation, layer, weight, *others)
        if layer.endswith("blocks.0.mlp.gate_proj"):
            weight.mul_(factor)

    monkeypatch.setattr(AppliedRotation, "apply_", wrong)
    with pytest.raises(UserError, match=r"visual\.blocks\.0"):
        vlqc.compile(model_path=tmp_path / "float", save_directory=tmp_path / "out", samples=samples, pipeline=FLOAT)
    assert not (tmp_path / "out").exists()


def test_tensors_outside_the_stages_have_the_stored_dtype(tmp_path: Path) -> None:
    """Catches a calibration on tensors that are not those of the result, and a norm whose weight is not folded."""
    outlier_checkpoint.make(tmp_path / "float", 3, shape=SMALL)
    model = StreamedModel.open(Checkpoint(tmp_path / "float"))
    rotate_model(model, [RotateResidual()])
    for name in ("model.embed_tokens.weight", "visual.patch_embed.proj.weight", "lm_head.weight", "model.norm.weight"):
        assert model.tensors.tensor(name).dtype == torch.bfloat16
    assert bool((model.tensors.tensor("model.norm.weight") == 1).all())
    assert model.tensors.rows("model.embed_tokens.weight", torch.arange(3)).dtype == torch.bfloat16
