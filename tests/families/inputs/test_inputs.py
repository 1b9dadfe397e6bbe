"""Model inputs of every family: samples that are made up, cut out or changed, against the models of transformers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tools.checkpoints.families import FAMILIES, config_of
from vlqc.families.inputs.text_inputs import PROBE_TOKENS, TextInputs
from vlqc.families.registry import find_family
from vlqc.frontend.streamed_model import parameters_on_meta

QWEN3_VL = pytest.param("qwen3_vl", marks=pytest.mark.qwen3_vl)
QWEN3 = [] if not hasattr(transformers, "Qwen3ForCausalLM") else ["qwen3"]
QWEN3_VL_MOE = pytest.param("qwen3_vl_moe", marks=pytest.mark.qwen3_vl)
WITH_IMAGES = ["qwen2_5_vl", "qwen2_vl", QWEN3_VL, QWEN3_VL_MOE]
EVERY_FAMILY = pytest.mark.parametrize("name", [*WITH_IMAGES, "qwen2", *QWEN3])
IMAGE_FAMILIES = pytest.mark.parametrize("name", WITH_IMAGES)


def inputs_and_model(name: str) -> tuple[TextInputs, nn.Module]:
    """The family's inputs and a model without weights."""
    config = config_of(FAMILIES[name].shape, "float32", tied=False, family=name)
    family = find_family(config)
    assert family is not None
    model_class: Any = getattr(transformers, FAMILIES[name].architecture)
    with parameters_on_meta():
        model: nn.Module = model_class._from_config(model_class.config_class.from_dict(config))
    return family.inputs, model


@EVERY_FAMILY
@pytest.mark.parametrize("smallest", [True, False])
def test_synthetic_samples_are_valid(name: str, smallest: bool) -> None:
    """Catches a made-up sample that the checks reject, that depends on more than its seed, or lacks an image."""
    inputs, model = inputs_and_model(name)
    sample = inputs.synthetic_sample(model.config, smallest=smallest)
    again = inputs.synthetic_sample(model.config, smallest=smallest)
    other = inputs.synthetic_sample(model.config, seed=1, smallest=smallest)
    assert inputs.faults("sample", sample, model) == []
    assert all(torch.equal(sample[key], again[key]) for key in sample)
    assert not torch.equal(sample["input_ids"], other["input_ids"])
    has_vision = FAMILIES[name].vision is not None
    assert inputs.has_images(sample) == has_vision == (inputs.processing is not None)
    tokens = inputs.is_image_token(sample["input_ids"], model.config).sum()
    if has_vision:
        assert int(tokens) * inputs.patches_per_token(model.config) == inputs.patches(sample)
        assert inputs.image_bytes(sample) == sample["pixel_values"].numel() * 4
        assert int(tokens) == (4 if smallest else 24)  # 2 x 2, or 4 x 6: a window has 4 x 4
    else:
        assert int(tokens) == inputs.patches(sample) == inputs.image_bytes(sample) == 0
        assert inputs.patches_per_token(model.config) == 1


@EVERY_FAMILY
def test_cut_out_samples_are_valid(name: str) -> None:
    """Catches a probe that the checks reject, that is not smaller, or loses the first tokens."""
    inputs, model = inputs_and_model(name)
    if FAMILIES[name].vision is None:
        ids = torch.randint(8, 64, (1, 700), generator=torch.Generator().manual_seed(0))
        sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        sample["attention_mask"][0, :3] = 0
        probe = inputs.crop(sample, model.config)
        assert probe["input_ids"].tolist() == [ids[0, 3 : 3 + PROBE_TOKENS].tolist()]
    else:
        sample = inputs.synthetic_sample(model.config)
        grid = torch.tensor([[1, 24, 32]])
        values = sample["pixel_values"].shape[1]
        image = sample["input_ids"][:, 9:10].expand(1, 24 * 32 // 4)  # begins after 8 words and the start of an image
        assert bool(inputs.is_image_token(image, model.config).all())
        ids = torch.cat([sample["input_ids"][:, :9], image, sample["input_ids"][:, -9:]], dim=1)
        sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        sample |= {"pixel_values": torch.zeros(24 * 32, values), "image_grid_thw": grid}
        probe = inputs.crop(sample, model.config)
        assert probe["input_ids"][0, :9].tolist() == ids[0, :9].tolist()
        assert inputs.same_images(sample, sample) and not inputs.same_images(sample, probe)
    assert inputs.faults("sample", sample, model) == inputs.faults("probe", probe, model) == []
    assert bool((probe["attention_mask"] == 1).all()) and 0 < inputs.rows(probe) < inputs.rows(sample)


@IMAGE_FAMILIES
def test_patches_of_another_family(name: str) -> None:
    """Catches patches or image tokens of another family's size that reach the model."""
    inputs, model = inputs_and_model(name)
    sample = inputs.synthetic_sample(model.config)
    other = 1176 if sample["pixel_values"].shape[1] == 1536 else 1536
    sample["pixel_values"] = torch.zeros(len(sample["pixel_values"]), other)
    (fault,) = inputs.faults("sample", sample, model)
    assert str(other) in fault.what and str(other) not in fault.why


@pytest.mark.parametrize("name", ["qwen2", *QWEN3])
@pytest.mark.parametrize("key", ["pixel_values", "image_grid_thw", "mm_token_type_ids", "pixel_values_videos", "x"])
def test_text_only_models_have_no_images(name: str, key: str) -> None:
    """Catches an image that a text-only model gets as an argument."""
    inputs, model = inputs_and_model(name)
    sample = {**inputs.synthetic_sample(model.config), key: torch.ones(1)}
    (fault,) = inputs.faults("sample", sample, model)
    assert key in fault.what and "image" not in fault.fix


@EVERY_FAMILY
def test_arguments_of_the_forward(name: str) -> None:
    """Catches an argument that some transformers version does not accept, or token types without image tokens."""
    inputs, model = inputs_and_model(name)
    sample = inputs.synthetic_sample(model.config)
    for accepted in (("input_ids",), ("input_ids", "mm_token_type_ids")):
        arguments = inputs.forward_arguments(sample, model, accepted)
        assert arguments.pop("use_cache") is False
        types = arguments.pop("mm_token_type_ids", None)
        assert arguments.keys() == sample.keys()
        assert (types is not None) == (inputs.processing is not None and "mm_token_type_ids" in accepted)
        if types is not None:
            assert torch.equal(types.bool(), inputs.is_image_token(sample["input_ids"], model.config))


IDS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1)), min_size=1, max_size=20)


@given(IDS)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen2", "qwen3"])
def test_modality_of_rows(name: str, tokens: list[tuple[int, int]]) -> None:
    """Catches padding that counts as text, videos as images, or text as an image in a text-only model."""
    family = find_family({"model_type": name})
    assert family is not None
    ids, mask = (torch.tensor([values]) for values in zip(*tokens, strict=True))
    modality = {5: 1, 6: 2} if family.inputs.processing is not None else {}
    expected = [-1 if not kept else modality.get(token, 0) for token, kept in tokens]
    config = SimpleNamespace(image_token_id=5, video_token_id=6)
    assert family.inputs.row_modality({"input_ids": ids, "attention_mask": mask}, config).tolist() == expected
