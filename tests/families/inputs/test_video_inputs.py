"""Model inputs with videos: checks, modality, the probe, and the forward, against the models of transformers."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.families.inputs.test_inputs import IMAGE_FAMILIES
from tools.checkpoints.families import FAMILIES, config_of
from vlqc.families.inputs.text_inputs import TextInputs
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.families.registry import find_family
from vlqc.frontend.streamed_model import model_inputs

SECONDS = "second_per_grid_ts"
WORD = 20


class Built:
    """A model with random weights, its inputs, and samples for it."""

    def __init__(self, name: str) -> None:
        config = config_of(FAMILIES[name].shape, "float32", tied=False, family=name)
        family = find_family(config)
        assert family is not None
        self.family, self.inputs = family, family.inputs
        model_class: Any = getattr(transformers, FAMILIES[name].architecture)
        torch.manual_seed(0)
        self.model: Any = model_class._from_config(model_class.config_class.from_dict(config)).eval()
        self.config = self.model.config
        self.values = self.inputs.synthetic_sample(self.config)["pixel_values"].shape[1]

    def sample(self, *media: tuple[str, int, int, int], seconds: float | None = None) -> dict[str, Tensor]:
        """Some text, then images and videos in order, each ("image" or "video", steps, height, width in patches)."""
        config, generator, ids = self.config, torch.Generator().manual_seed(1), [WORD, WORD + 1, WORD + 2]
        parts: dict[str, list[Tensor]] = {"image": [], "video": []}
        grids: dict[str, list[list[int]]] = {"image": [], "video": []}
        for kind, steps, height, width in media:
            token = config.image_token_id if kind == "image" else config.video_token_id
            tokens, groups = height * width // 4, 1
            if kind == "video":
                tokens, groups = (tokens, steps) if self.timestamps else (tokens * steps, 1)
            for _ in range(groups):
                ids += [config.vision_start_token_id, *[token] * tokens, config.vision_end_token_id, WORD + 3]
            parts[kind].append(torch.randn(steps * height * width, self.values, generator=generator))
            grids[kind].append([steps, height, width])
        ids += [WORD + 4, WORD + 5]
        sample = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        for kind, pixels, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            if parts[kind]:
                sample |= {pixels: torch.cat(parts[kind]), grid: torch.tensor(grids[kind])}
        if seconds is not None and SECONDS in self.inputs.optional:
            sample[SECONDS] = torch.full((len(grids["video"]),), seconds)
        return sample

    @property
    def timestamps(self) -> bool:
        return self.family.video_format is not None and self.family.video_format.timestamps

    def plain(self, sample: dict[str, Tensor]) -> Tensor:
        """Logits of transformers' own forward."""
        arguments: dict[str, Any] = dict(sample)
        if transformers.__version__.startswith("5"):
            arguments["mm_token_type_ids"] = self.inputs.token_modality(sample["input_ids"], self.config).int()
        logits: Tensor = self.model(**arguments, use_cache=False).logits
        return logits


@pytest.fixture(scope="module")
def built() -> Any:
    models: dict[str, Built] = {}

    def build(name: str) -> Built:
        if name not in models:
            models[name] = Built(name)
        return models[name]

    return build


@pytest.mark.every_transformers
@IMAGE_FAMILIES
def test_forward_with_images_and_videos(built: Any, name: str) -> None:
    """Catches features in the wrong place, wrong positions, or a second pass through the vision tower."""
    it, passes = built(name), []
    sample = it.sample(("video", 3, 4, 6), ("image", 1, 8, 4), ("video", 2, 4, 4), ("image", 1, 4, 4), seconds=1.7)
    tower: nn.Module = it.model.get_submodule("visual" if hasattr(it.model, "visual") else "model.visual")
    hook = tower.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        expected = it.plain(sample)
        before = len(passes)
        found = it.model(**model_inputs(it.model, it.family, sample)).logits
    hook.remove()
    assert before == 2 and len(passes) == 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    shuffled = it.sample(("image", 1, 8, 4), ("video", 3, 4, 6), ("video", 2, 4, 4), ("image", 1, 4, 4), seconds=1.7)
    assert not torch.allclose(it.model(**model_inputs(it.model, it.family, shuffled)).logits, expected, atol=1e-3)


@pytest.mark.every_transformers
@IMAGE_FAMILIES
def test_forward_with_a_video(built: Any, name: str) -> None:
    """Catches a video without its seconds, or with the token types of images."""
    it = built(name)
    sample = it.sample(("video", 4, 4, 6), seconds=3.0)
    with torch.no_grad():
        found = it.model(**model_inputs(it.model, it.family, sample)).logits
        torch.testing.assert_close(found, it.plain(sample))
        if SECONDS in it.inputs.optional:
            assert not torch.allclose(found, it.plain({**sample, SECONDS: torch.tensor([0.5])}), atol=1e-3)


@IMAGE_FAMILIES
def test_checks_modality_and_probe(built: Any, name: str) -> None:
    """Catches a valid sample that is rejected, patches under the wrong modality, a probe that is no valid input."""
    it = built(name)
    inputs: TextInputs = it.inputs
    sample = it.sample(("video", 2, 20, 30), ("image", 1, 8, 4), seconds=1.0)
    assert inputs.faults("sample", sample, it.model) == []
    assert inputs.patches(sample) == 1200 + 32 and inputs.image_bytes(sample) == 1232 * it.values * 4
    modality = inputs.patch_modality(sample, it.config)
    assert modality is not None and modality.tolist() == [2] * 1200 + [1] * 32
    rows = inputs.row_modality(sample, it.config)
    assert [int((rows == number).sum()) for number in (0, 1, 2)] == [rows.numel() - 308, 8, 300]
    probe = inputs.crop(sample, it.config)
    assert inputs.faults("probe", probe, it.model) == []
    assert probe["video_grid_thw"].tolist() == [[1, 16, 12]] and "pixel_values" not in probe
    patches = sample["pixel_values_videos"][:600].reshape(10, 15, 4, -1)[:8, :6].reshape(192, -1)
    assert torch.equal(probe["pixel_values_videos"], patches)
    assert not inputs.same_images(sample, sample)  # the order of images and videos counts, too
    video = it.sample(("video", 2, 4, 4))
    assert inputs.same_images(video, {**video, "input_ids": video["input_ids"] + 1})


FAULTS = {
    "token cut off": (lambda s: s.update(input_ids=s["input_ids"][:, :-9]), "video tokens"),
    "no pixels": (lambda s: [s.pop(key) for key in ("pixel_values_videos", "video_grid_thw", SECONDS)], "without a"),
    "patches of one step": (lambda s: s.update(pixel_values_videos=s["pixel_values_videos"][:16]), "16 patches"),
    "grid of floats": (lambda s: s.update(video_grid_thw=s["video_grid_thw"].float()), "video_grid_thw is float32"),
    "seconds of two videos": (lambda s: s.update({SECONDS: [1.0, 1.0]}), f"{SECONDS} is a list"),
    "negative seconds": (lambda s: s.update({SECONDS: torch.tensor([-1.0])}), f"{SECONDS} is float32[1]"),
    "seconds as text": (lambda s: s.update({SECONDS: "1"}), f"{SECONDS} is a str"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_videos(built: Any, fault: str) -> None:
    """Catches a video that does not fit its tokens and reaches the model."""
    it = built("qwen2_5_vl")
    sample = it.sample(("video", 2, 4, 4), seconds=1.0)
    sample["attention_mask"] = torch.ones_like(sample["input_ids"])
    damage, what = FAULTS[fault]
    damage(sample)
    sample["attention_mask"] = torch.ones_like(sample["input_ids"])
    assert any(what in found.what for found in it.inputs.faults("sample", sample, it.model))


def test_seconds_as_processors_return_them() -> None:
    """Catches a list of numbers, which transformers' processor returns, that later code takes for a tensor."""
    sample: Any = {"input_ids": torch.ones(1, 3, dtype=torch.int32), SECONDS: [0.5, 1.0]}
    normalized = QWEN2_5_VL.inputs.normalized(sample)
    assert normalized["input_ids"].dtype == torch.int64 and normalized[SECONDS].tolist() == [0.5, 1.0]


@pytest.mark.qwen3_vl
def test_steps_without_timestamps(built: Any) -> None:
    """Catches a Qwen3-VL sample whose steps are not separate, which gets wrong positions."""
    it = built("qwen3_vl")
    sample = it.sample(("video", 2, 4, 4))
    ids = sample["input_ids"][0].tolist()
    first = ids.index(it.config.video_token_id)
    ids[first + 4 : first + 7], ids[first + 7 : first + 11] = [WORD] * 3, ids[first + 7 : first + 11]
    together = [*ids[:first], *[it.config.video_token_id] * 8, *ids[first + 11 :]]
    sample |= {"input_ids": torch.tensor([together]), "attention_mask": torch.ones(1, len(together)).long()}
    (fault,) = it.inputs.faults("sample", sample, it.model)
    assert "1 group" in fault.what
