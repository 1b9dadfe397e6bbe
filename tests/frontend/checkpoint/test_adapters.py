"""Adapters that are merged while tensors are read: the arithmetic, the names, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.adapters import double, low_rank, random, rounded, write_adapter
from tests.support.checkpoints import write
from vlqc.errors import UserError
from vlqc.frontend.checkpoint.checkpoint import Checkpoint

Q, GATE, EMBEDDING, PATCH, HEAD = (
    "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj", "model.embed_tokens", "visual.patch_embed.proj",
    "lm_head",
)  # fmt: skip
BF16 = torch.bfloat16
WEIGHTS = {
    f"{Q}.weight": random(6, 4, seed=10, dtype=BF16),
    f"{Q}.bias": random(6, seed=11, dtype=BF16),
    f"{GATE}.weight": random(5, 4, seed=12, dtype=BF16),
    f"{EMBEDDING}.weight": random(9, 4, seed=13, dtype=BF16),
    f"{PATCH}.weight": random(4, 3, 2, 2, 2, seed=14, dtype=BF16),
    f"{HEAD}.weight": random(9, 4, seed=15, dtype=BF16),
}


def checkpoint(folder: Path, *lora: Path, weights: dict[str, Tensor] = WEIGHTS, **config: Any) -> Checkpoint:
    write(folder / "model", weights)
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", **config}))
    return Checkpoint(folder / "model", lora)


def refusal(folder: Path, *lora: Path, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint(folder, *lora, **more)
    return str(caught.value)


def product(tensors: dict[str, Tensor], path: str) -> np.ndarray:
    return double(tensors[f"{path}.lora_B.weight"]) @ double(tensors[f"{path}.lora_A.weight"])


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"q_proj": 10}}, 5.0),
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1, "k_proj": 8}}, 0.5),
        ({"alpha_pattern": {r"^model\.layers\.\d+\.(?:mlp|self_attn)\.[qk]_proj$": 10}}, 5.0),
        ({"alpha_pattern": {"attn.q_proj|layers.1": 1, r".*\.q(_proj)?": 10}}, 5.0),
        ({"r": 16, "rank_pattern": {"layers.0.self_attn.q_proj": 2, "q": 9}}, 3.0),
        ({"fan_in_fan_out": True, "init_lora_weights": "gaussian", "lora_dropout": 0.1}, 3.0),
    ],
)
def test_a_product_is_added_with_its_scaling(tmp_path: Path, config: dict[str, Any], scaling: float) -> None:
    """Catches alpha and rank of another layer, sqrt(r) in the wrong place, and a product that is rounded by itself."""
    tensors = low_rank(Q, 6, 4)
    merged = checkpoint(tmp_path, write_adapter(tmp_path / "a", tensors, **config))
    expected = rounded(double(WEIGHTS[f"{Q}.weight"]) + scaling * product(tensors, Q), BF16)
    assert torch.equal(merged.tensor(f"{Q}.weight"), expected) and merged.stored_dtype(f"{Q}.weight") == BF16
    assert torch.equal(merged.tensor(f"{GATE}.weight"), WEIGHTS[f"{GATE}.weight"])
    assert torch.equal(merged.estimate(f"{Q}.weight"), expected)


@pytest.mark.parametrize("start", ["", "model.", "_orig_mod.", "base_model.model."])
@pytest.mark.parametrize("suffix", ["weight", "default.weight"])
def test_names_of_every_version_and_wrapper(tmp_path: Path, start: str, suffix: str) -> None:
    """Catches an adapter that is not found because another transformers version or wrapper named its layers."""
    path = start + ("language_model." + Q.removeprefix("model.") if start == "model." else Q)
    tensors = low_rank(path, 6, 4)
    renamed = {name.replace("weight", suffix): tensor for name, tensor in tensors.items()}
    merged = checkpoint(tmp_path, write_adapter(tmp_path / "a", renamed))
    expected = rounded(double(WEIGHTS[f"{Q}.weight"]) + 3 * product(tensors, path), BF16)
    assert torch.equal(merged.tensor(f"{Q}.weight"), expected)


def test_embedding_convolution_bias_and_saved_modules(tmp_path: Path) -> None:
    """Catches factors that are swapped or transposed, a bias without scaling, and a module that is not replaced."""
    saved, bias = random(9, 4, seed=5), random(6, seed=6)
    a, b = random(2, 9, seed=7), random(4, 2, seed=8)
    left, right = random(4, 2, 1, 1, 1, seed=9), random(2, 3, 2, 2, 2, seed=10)
    tensors = {
        **low_rank(Q, 6, 4), f"{Q}.lora_B.bias": bias, f"{EMBEDDING}.lora_embedding_A": a,
        f"{EMBEDDING}.lora_embedding_B": b, f"{PATCH}.lora_A.weight": right, f"{PATCH}.lora_B.weight": left,
        f"{HEAD}.modules_to_save.weight": saved, f"{GATE}.base_layer.weight": WEIGHTS[f"{GATE}.weight"].float() + 1,
    }  # fmt: skip
    merged = checkpoint(tmp_path, write_adapter(tmp_path / "a", tensors, modules_to_save=[HEAD], lora_bias=True))
    table = rounded(double(WEIGHTS[f"{EMBEDDING}.weight"]) + 3 * (double(b) @ double(a)).T, BF16)
    kernel = np.einsum("or,rcthw->octhw", double(left)[:, :, 0, 0, 0], double(right))
    assert torch.equal(merged.tensor(f"{EMBEDDING}.weight"), table)
    indices = torch.tensor([[8, 0], [3, 8]])
    assert torch.equal(merged.rows(f"{EMBEDDING}.weight", indices), table[indices])
    assert torch.equal(merged.rows(f"{HEAD}.weight", indices), saved.to(BF16)[indices])
    assert torch.equal(merged.tensor(f"{PATCH}.weight"), rounded(double(WEIGHTS[f"{PATCH}.weight"]) + 3 * kernel, BF16))
    assert torch.equal(merged.tensor(f"{Q}.bias"), rounded(double(WEIGHTS[f"{Q}.bias"]) + 3 * double(bias), BF16))
    assert torch.equal(merged.tensor(f"{HEAD}.weight"), saved.to(BF16))
    assert torch.equal(merged.tensor(f"{GATE}.weight"), (WEIGHTS[f"{GATE}.weight"].float() + 1).to(BF16))


def test_dora_scales_rows_to_their_learned_norms(tmp_path: Path) -> None:
    """Catches norms over columns, of the weight without the product, or a magnitude that is multiplied twice."""
    tensors = {**low_rank(Q, 6, 4), f"{Q}.lora_magnitude_vector": random(6, seed=4).abs()}
    merged = checkpoint(tmp_path, write_adapter(tmp_path / "a", tensors, use_dora=True))
    total = double(WEIGHTS[f"{Q}.weight"]) + 3 * product(tensors, Q)
    norms = np.linalg.norm(total, axis=1, keepdims=True)
    expected = rounded(total / norms * double(tensors[f"{Q}.lora_magnitude_vector"])[:, None], BF16)
    assert torch.equal(merged.tensor(f"{Q}.weight"), expected)


def test_adapters_are_merged_in_order_and_rounded_once(tmp_path: Path) -> None:
    """Catches an adapter that is lost, another order, and a rounding to bfloat16 between two adapters."""
    one, two = low_rank(Q, 6, 4, seed=20), low_rank(Q, 6, 4, rank=3, seed=30)
    first, second = write_adapter(tmp_path / "one", one), write_adapter(tmp_path / "two", two, r=3)
    saved = write_adapter(tmp_path / "saved", {f"{Q}.weight": random(6, 4, seed=40)}, modules_to_save=["q_proj"])
    base = double(WEIGHTS[f"{Q}.weight"])
    both = checkpoint(tmp_path, first, second)
    assert torch.equal(both.tensor(f"{Q}.weight"), rounded(base + 3 * product(one, Q) + 2 * product(two, Q), BF16))
    replaced = checkpoint(tmp_path, saved, first).tensor(f"{Q}.weight")
    assert torch.equal(replaced, rounded(double(random(6, 4, seed=40)) + 3 * product(one, Q), BF16))
    assert torch.equal(checkpoint(tmp_path, first, saved).tensor(f"{Q}.weight"), random(6, 4, seed=40).to(BF16))
    assert [adapter.name for adapter in both.adapters] == ["one", "two"]
    assert both.adapters[0].sha256 != both.adapters[1].sha256


@pytest.mark.parametrize("transposed", [False, True])
def test_an_expert_in_a_tensor_of_all_experts(tmp_path: Path, transposed: bool) -> None:
    """Catches an adapter of one expert that is merged into another one, or into the wrong half of a fused tensor."""
    path = "model.language_model.layers.0.mlp.experts"
    gate_up, down = random(3, 4, 10, seed=1, dtype=BF16), random(3, 5, 4, seed=2, dtype=BF16)
    if not transposed:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    tensors = low_rank(f"{path}.1.up_proj", 5, 4)
    merged = checkpoint(
        tmp_path,
        write_adapter(tmp_path / "a", tensors),
        weights={f"{path}.gate_up_proj": gate_up, f"{path}.down_proj": down},
        model_type="qwen3_vl_moe",
        text_config={"hidden_size": 4},
    )
    stored = gate_up.transpose(1, 2) if transposed else gate_up
    for expert in range(3):
        gate, up = stored[expert, :5], stored[expert, 5:]
        if expert == 1:
            up = rounded(double(up) + 3 * product(tensors, f"{path}.1.up_proj"), BF16)
        assert torch.equal(merged.tensor(f"{path}.{expert}.gate_proj.weight"), gate)
        assert torch.equal(merged.tensor(f"{path}.{expert}.up_proj.weight"), up)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA"}, "type LOHA"),
        ({"peft_type": "PeftType.IA3"}, "type IA3"),
        ({"peft_type": "PROMPT_TUNING"}, "type PROMPT_TUNING"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "experts stored in one tensor"),
        ({"trainable_token_indices": {"embed_tokens": [3]}}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_16"}, "initialized with pissa_niter_16"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"r": 4}, "rank 2, adapter_config.json says 4"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"alpha_pattern": {"(": 8}}, "invalid pattern"),
        ({"rank_pattern": {r"((\w|\.)+)+!": 4}}, "invalid pattern"),
        ({"rank_pattern": {r"((\w|\.)+)+": 4}}, "something is repeated"),
        ({"r": "8"}, "must be a positive number"),
    ],
)
def test_a_configuration_that_cannot_be_merged(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    """Catches an adapter of another kind that is merged as if it were LoRA, or ignored."""
    assert words in refusal(tmp_path, write_adapter(tmp_path / "a", low_rank(Q, 6, 4), **config))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(f"{Q}.lora_B.weight"), "one of its two matrices is missing"),
        (lambda tensors: tensors.clear(), "holds no tensors"),
        (lambda tensors: tensors.update(low_rank("model.layers.7.mlp.up_proj", 5, 4)), "model.layers.7.mlp.up_proj"),
        (lambda tensors: tensors.update(low_rank(Q, 6, 5)), "its product is [6, 5], the weight [6, 4]"),
        (lambda tensors: tensors.update({f"{GATE}.bias": random(5)}), f"{GATE}.bias"),
        (lambda tensors: tensors.update({f"{GATE}.weight": random(7, 4)}), "it holds [7, 4], the checkpoint [5, 4]"),
        (lambda tensors: tensors.update({f"{Q}.lora_C.weight": random(2, 2)}), "is not known"),
        (lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(2, 4, dtype=torch.int8)}), "dtype I8"),
        (
            lambda tensors: tensors.update({f"{Q}.lora_A.one.weight": random(2, 4)}),
            f"{Q}.lora_A.one.weight' and 'base_model.model.{Q}.lora_A.weight' are for the same tensor",
        ),
        (lambda tensors: tensors.update({f"base_model.model.{Q}.lora_B.weight": random(6, 2)}), "the same tensor"),
        (
            lambda tensors: tensors.update({f"{HEAD}.modules_to_save.{each}.weight": random(9, 4) for each in "ab"}),
            "the same tensor",
        ),
        (
            lambda tensors: tensors.update(low_rank(GATE, 5, 4) | {f"{GATE}.lora_B.bias": random(5)}),
            f"lora_bias of {GATE} cannot be merged",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], words: str) -> None:
    """Catches tensors of an adapter that are left out without a word."""
    tensors = low_rank(Q, 6, 4)
    change(tensors)
    assert words in refusal(tmp_path, write_adapter(tmp_path / "a", tensors))


def test_folders_that_hold_no_readable_adapter(tmp_path: Path) -> None:
    """Catches a training run that is not resolved to its checkpoint, and hundreds of faults of an unfinished save."""
    for step in (90, 500):
        write_adapter(tmp_path / "output" / f"checkpoint-{step}", low_rank(Q, 6, 4))
    assert str(tmp_path / "output" / "checkpoint-500") in refusal(tmp_path, tmp_path / "output")
    empty = dict.fromkeys([*low_rank(Q, 6, 4), *low_rank(GATE, 5, 4)])
    folder = write_adapter(tmp_path / "empty", {name: torch.zeros(0) for name in empty})
    message = refusal(tmp_path, folder)
    assert "4 of 4 tensors are empty" in message and "ZeRO-3" in message and message.count("what to do") == 1
    (folder / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refusal(tmp_path, folder)


def test_an_adapter_that_needs_code_to_load(tmp_path: Path) -> None:
    """Catches a pickle that is loaded."""
    folder = write_adapter(tmp_path / "a", low_rank(Q, 6, 4))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "loading it runs code" in refusal(tmp_path, folder)


@pytest.mark.parametrize(
    ("names", "equal", "config", "refused"),
    [
        ([EMBEDDING], True, {"modules_to_save": ["embed_tokens"]}, True),
        ([EMBEDDING], True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
        ([EMBEDDING], True, {}, False),  # saved because the vocabulary was resized before training
        ([HEAD], True, {"modules_to_save": ["lm_head"]}, True),
        ([EMBEDDING, HEAD], True, {"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ([EMBEDDING, HEAD], False, {"modules_to_save": ["embed_tokens", "lm_head"]}, True),
    ],
)
def test_a_weight_that_is_used_twice(
    tmp_path: Path, names: list[str], equal: bool, config: dict[str, Any], refused: bool
) -> None:
    """Catches an adapter of the embedding that also changes the output head, or one of the head that is ignored."""
    values = {f"{name}.weight": random(9, 4, seed=0 if equal else number) for number, name in enumerate(names)}
    weights = {name: tensor for name, tensor in WEIGHTS.items() if not name.startswith(HEAD)}
    merged = checkpoint(
        tmp_path, write_adapter(tmp_path / "a", values, **config), weights=weights, tie_word_embeddings=True
    )
    if refused:
        with pytest.raises(UserError, match="one weight"):
            merged.check_shared_weight(f"{EMBEDDING}.weight", f"{HEAD}.weight")
    else:
        merged.check_shared_weight(f"{EMBEDDING}.weight", f"{HEAD}.weight")
        assert torch.equal(merged.tensor(f"{EMBEDDING}.weight"), random(9, 4).to(BF16))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("path", [EMBEDDING, HEAD])
def test_low_rank_updates_of_a_weight_that_is_used_twice(tmp_path: Path, path: str, tied: bool) -> None:
    """Catches an adapter of one use of a shared weight that is merged into both, or into none."""
    tensors = low_rank(path, 9, 4)
    if path == EMBEDDING:
        tensors = {f"{path}.lora_embedding_A": random(2, 9), f"{path}.lora_embedding_B": random(4, 2)}
    weights = {name: tensor for name, tensor in WEIGHTS.items() if not (tied and name.startswith(HEAD))}
    merged = checkpoint(tmp_path, write_adapter(tmp_path / "a", tensors), weights=weights, tie_word_embeddings=tied)
    if tied:
        with pytest.raises(UserError, match="only one use"):
            merged.check_shared_weight(f"{EMBEDDING}.weight", f"{HEAD}.weight")
    else:
        changed = [name for name in weights if not torch.equal(merged.tensor(name), weights[name])]
        assert changed == [f"{path}.weight"]


# ---- adapters beside and instead of a model --------------------------------------------------------------------------


def test_an_adapter_beside_the_weights(tmp_path: Path) -> None:
    """Catches an adapter that is taken for weights or copied, and one in the model's own folder that is not merged."""
    write_adapter(tmp_path / "model", low_rank(Q, 6, 4))
    plain = checkpoint(tmp_path)
    assert plain.names == sorted(WEIGHTS) and "adapter_config.json" not in plain.side_files().names
    assert torch.equal(plain.tensor(f"{Q}.weight"), WEIGHTS[f"{Q}.weight"])
    assert any("--lora" in note for note in plain.notes)
    merged = checkpoint(tmp_path, tmp_path / "model")
    assert not torch.equal(merged.tensor(f"{Q}.weight"), WEIGHTS[f"{Q}.weight"])
    assert not any("--lora" in note for note in merged.notes)


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_instead_of_a_model(tmp_path: Path, with_config: bool) -> None:
    """Catches an error that does not say that the folder is an adapter, and of which model."""
    folder = write_adapter(tmp_path / "a", low_rank(Q, 6, 4))
    if with_config:
        (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    message = str(caught.value)
    assert "is an adapter" in message and "--lora" in message and "elsewhere/model" in message
