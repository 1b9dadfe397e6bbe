"""Planted outliers change activations on exactly the chosen channels, and nothing else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support.naive_w8a8 import load_float, logits, quantized
from tools.demo import plant_outliers
from tools.demo import tiny_task as task

TINY = Path(task.__file__).parent / "tiny_vl"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    folder = tmp_path_factory.mktemp("planted")
    return folder, plant_outliers.plant(TINY, folder)


def checkpoint_name(module: str) -> str:
    """The checkpoint's name of a module of whatever transformers is installed."""
    return module.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def linear_inputs(model: nn.Module, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Input [tokens, K] of every Linear for the samples, under the checkpoint's names."""
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def keep(_: nn.Module, inputs: tuple[Tensor], name: str = checkpoint_name(name)) -> None:
                seen.setdefault(name, []).append(inputs[0].flatten(0, -2))

            module.register_forward_pre_hook(keep)
    logits(model, samples)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_the_function_is_unchanged(planted: tuple[Path, dict[str, list[int]]]) -> None:
    """Catches a wrong column, row or missing bias on any edge: alpha is a power of two, so nothing may be lost."""
    samples = task.samples(3, seed=1, split="test")
    before, after = logits(load_float(TINY), samples), logits(load_float(planted[0]), samples)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_exactly_the_chosen_channels_grow(planted: tuple[Path, dict[str, list[int]]]) -> None:
    """Catches an edge that is forgotten or mapped to other columns: inputs grow 128 times there and nowhere else.

    The places are derived here once more, by hand, from the tiny model's sizes.
    """
    folder, chosen = planted
    expected: dict[str, set[int]] = {"visual.merger.mlp.0": set()}
    for channel in chosen["visual.merger.ln_q.weight"]:
        expected["visual.merger.mlp.0"] |= {channel, 128 + channel, 256 + channel, 384 + channel}
    for index in range(4):
        block, layer = f"visual.blocks.{index}", f"model.layers.{index}"
        expected[f"{block}.attn.qkv"] = set(chosen[f"{block}.norm1.weight"])
        expected[f"{block}.attn.proj"] = set(chosen[f"{block}.attn.qkv.weight"])
        expected[f"{block}.mlp.down_proj"] = set(chosen[f"{block}.mlp.up_proj.weight"])
        expected[f"{layer}.mlp.down_proj"] = set(chosen[f"{layer}.mlp.up_proj.weight"])
        # Two value heads of 32 channels serve three query heads each.
        expected[f"{layer}.self_attn.o_proj"] = {
            96 * (channel // 32) + 32 * copy + channel % 32
            for channel in chosen[f"{layer}.self_attn.v_proj.weight"]
            for copy in range(3)
        }
        for name in "qkv":
            expected[f"{layer}.self_attn.{name}_proj"] = set(chosen[f"{layer}.input_layernorm.weight"])
        for name in ("gate", "up"):
            expected[f"{block}.mlp.{name}_proj"] = set(chosen[f"{block}.norm2.weight"])
            expected[f"{layer}.mlp.{name}_proj"] = set(chosen[f"{layer}.post_attention_layernorm.weight"])
    samples = task.samples(2, seed=3)
    before, after = linear_inputs(load_float(TINY), samples), linear_inputs(load_float(folder), samples)
    assert set(before) == set(expected) | {"visual.merger.mlp.2", "lm_head"}
    for name in before:
        ratio = after[name].norm(dim=0) / before[name].norm(dim=0)
        wanted = torch.ones_like(ratio)
        wanted[sorted(expected.get(name, ()))] = 128.0
        torch.testing.assert_close(ratio, wanted, rtol=1e-3, atol=0)


def test_share_alpha_and_seed_are_obeyed(tmp_path: Path, planted: tuple[Path, dict[str, list[int]]]) -> None:
    """Catches options that are parsed and forgotten, and a choice that differs from run to run."""
    again = plant_outliers.plant(TINY, tmp_path / "again")
    other = plant_outliers.plant(TINY, tmp_path / "other", alpha=2.0, share=0.05, seed=1)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "again", planted[0])]
    assert again == planted[1] and weights[0] == weights[1]
    assert {len(again[f"visual.blocks.{i}.norm1.weight"]) for i in range(4)} == {3}  # 2 % of 128, rounded up
    assert {len(other[f"visual.blocks.{i}.norm1.weight"]) for i in range(4)} == {7}
    assert any(set(again[name]) - set(other[name]) for name in again)
    name = "visual.blocks.2.norm2.weight"
    ratio = load_file(tmp_path / "other" / "model.safetensors")[name] / load_file(TINY / "model.safetensors")[name]
    assert ratio.unique().tolist() == [1.0, 2.0]


def test_every_other_file_is_copied(planted: tuple[Path, dict[str, list[int]]]) -> None:
    """Catches a target folder that cannot be loaded or used with pictures, for want of a tokenizer or processor."""
    files = {path.name for path in TINY.iterdir()}
    assert {path.name for path in planted[0].iterdir()} == files
    for name in files - {"model.safetensors"}:
        assert (planted[0] / name).read_bytes() == (TINY / name).read_bytes()


def test_an_alpha_beyond_the_number_format_is_refused(tmp_path: Path) -> None:
    """Catches infinities in a float16 checkpoint, and a half-written target after the refusal."""
    source = tmp_path / "half"
    source.mkdir()
    half = {name: tensor.half() for name, tensor in load_file(TINY / "model.safetensors").items()}
    save_file(half, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(json.loads((TINY / "config.json").read_text())))
    with pytest.raises(ValueError, match="too large"):
        plant_outliers.plant(source, tmp_path / "target", alpha=2.0**20)
    assert not (tmp_path / "target").exists()


def test_naive_quantization_collapses(planted: tuple[Path, dict[str, list[int]]]) -> None:
    """Catches outliers that have become harmless: W8A8 without smoothing must fail, and only because of them."""
    calibration = task.samples(16, seed=0)
    assert task.accuracy(quantized(load_float(planted[0]), calibration), count=64) < 30.0
    assert task.accuracy(quantized(load_float(TINY), calibration), count=64) > 98.0
