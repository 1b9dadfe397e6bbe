"""Names of tensors with what training wrappers add to them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import NEW_NAMES, TENSORS, fault_of, write
from vlqc.frontend.checkpoint.checkpoint import Checkpoint

PREFIXES = ["base_model.model.", "module.", "_orig_mod.", "module._orig_mod.", "policy.actor.", "thinker.", "model."]


def renamed(prefix: str, names: str = "old") -> dict[str, Tensor]:
    return {prefix + (NEW_NAMES[name] if names == "new" else name): tensor for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("names", ["old", "new"])
def test_a_prefix_of_all_names(tmp_path: Path, prefix: str, names: str) -> None:
    """Catches a checkpoint of a wrapped model that is reported as hundreds of missing tensors."""
    checkpoint = Checkpoint(write(tmp_path, renamed(prefix, names)))
    assert checkpoint.names == sorted(TENSORS) and len(checkpoint.notes) >= 1
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_wrappers_inside_names(tmp_path: Path) -> None:
    """Catches FSDP's and PEFT's components in the middle of a name."""
    inside = {
        name.replace(".0.", ".0._fsdp_wrapped_module.").replace("q_proj.", "q_proj.base_layer."): tensor
        for name, tensor in TENSORS.items()
    }
    checkpoint = Checkpoint(write(tmp_path, inside))
    assert checkpoint.names == sorted(TENSORS) and any("--lora" in note for note in checkpoint.notes)


def test_names_of_the_model_stay(tmp_path: Path) -> None:
    """Catches a prefix that is taken off names that are right, or a second set of weights that is an error."""
    copies = {f"ema.{name}": tensor.clone() for name, tensor in TENSORS.items()}
    checkpoint = Checkpoint(write(tmp_path, {**TENSORS, **copies, "rope.inv_freq": torch.ones(2)}))
    assert set(TENSORS) < set(checkpoint.names) and "ema.lm_head.weight" in checkpoint and not checkpoint.notes


@pytest.mark.parametrize("parts", [("module.", "other."), ("module.", "")])
def test_different_prefixes_are_an_error(tmp_path: Path, parts: tuple[str, str]) -> None:
    """Catches one of two prefixes that is taken off, so that half of the tensors are missing."""
    tensors = {parts[name.startswith("visual")] + name: tensor for name, tensor in TENSORS.items()}
    message = fault_of(write(tmp_path, tensors))
    assert "different prefixes" in message and "'module.' before 2 names" in message


def test_every_second_name_with_a_prefix(tmp_path: Path) -> None:
    """Catches names with a prefix that pass for a copy of those without it, so that half of the tensors are missing."""
    tensors = {"module." * (number % 2) + name: tensor for number, (name, tensor) in enumerate(TENSORS.items())}
    message = fault_of(write(tmp_path, tensors))
    assert "'module.' before 1 name" in message and "none before 2 names" in message


def test_a_name_without_the_prefix_of_all_others(tmp_path: Path) -> None:
    """Catches a tensor that is silently given another name."""
    tensors = renamed("module.")
    tensors["lm_head.weight"] = tensors.pop("module.lm_head.weight")
    assert "lm_head.weight" in fault_of(write(tmp_path, tensors))


@pytest.mark.parametrize("part", ["lora_A.default.weight", "lora_embedding_B", "modules_to_save.default.weight"])
def test_an_adapter_among_the_weights(tmp_path: Path, part: str) -> None:
    """Catches a checkpoint that was saved before its adapter was merged, and is compiled without the adapter."""
    name = f"base_model.model.model.layers.0.self_attn.q_proj.{part}"
    message = fault_of(write(tmp_path, {**renamed("base_model.model."), name: torch.ones(2, 4)}))
    assert "not merged" in message and name in message and "merge_and_unload" in message


def test_a_part_of_the_model(tmp_path: Path) -> None:
    """Catches hundreds of missing tensors for a decoder that was saved without the model around it."""
    inner = {name.removeprefix("model."): tensor for name, tensor in TENSORS.items() if name.startswith("model.")}
    message = fault_of(write(tmp_path, inner))
    assert "lack the prefix 'model.'" in message and message.count("what to do") == 1
