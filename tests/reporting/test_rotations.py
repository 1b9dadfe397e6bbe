"""vlqc.reporting.rotations: what is rotated and what that breaks, for plans with known layers."""

import pytest

from vlqc.families.qwen2_5_vl import Qwen25VL
from vlqc.ir.rotations import Rotatable, RotationKind, RotationPlan, make_plan
from vlqc.passes.quantize_weights import QuantizeWeights
from vlqc.passes.smooth_m2 import SmoothM2
from vlqc.reporting.rotations import adapter_notes, rotated_parts, rotation_notes, rotation_text

FAMILY = Qwen25VL()
LANGUAGE = Rotatable(
    RotationKind.RESIDUAL, "model.embed_tokens", 16, {"model.embed_tokens": (0,)}, ("model.embed_tokens",),
    {"lm_head": "model.norm"},
)  # fmt: skip
VISION = Rotatable(
    RotationKind.RESIDUAL, "visual.patch_embed.proj", 8, {"visual.patch_embed.proj": (0,)}, (),
    {"visual.merger.mlp.0": "visual.merger.ln_q"},
)  # fmt: skip
HEADS = [
    Rotatable(RotationKind.HEADS, name, 4, {name: (0,)}, (), {})
    for name in ("visual.blocks.0.attn.qkv", "model.layers.0.self_attn.v_proj")
]


def plan(*rotatable: Rotatable, obstacles: dict[str, str] | None = None) -> RotationPlan:
    return make_plan([(each, 0) for each in rotatable], [], obstacles=obstacles)


@pytest.mark.parametrize(
    ("rotated", "text"),
    [
        ([], "none"),
        (HEADS[:1], "attention heads of 1 layer"),
        ([VISION, *HEADS], "residual stream: vision tower; attention heads of 2 layers"),
        ([LANGUAGE, VISION, *HEADS], "residual streams: vision tower, language model; attention heads of 2 layers"),
    ],
    ids=["nothing", "heads", "vision and heads", "all"],
)
def test_what_is_rotated(rotated: list[Rotatable], text: str) -> None:
    """Catches a stream or head that is not counted, or that is named after the wrong part."""
    assert rotation_text(rotated_parts(plan(*rotated).groups(), FAMILY)) == text


def test_a_model_without_a_family() -> None:
    """Catches streams that disappear where the parts of the model are unknown."""
    text = rotation_text(rotated_parts(plan(LANGUAGE, VISION).groups(), None))
    assert LANGUAGE.name in text and VISION.name in text


def test_one_note_names_what_does_not_fit() -> None:
    """Catches a warning about draft models where the hidden states are as before, and a way out that does not help."""
    assert rotation_notes(plan(), FAMILY) == []
    (inside,) = rotation_notes(plan(VISION, *HEADS), FAMILY)  # neither embeddings nor logits
    (hidden,) = rotation_notes(plan(LANGUAGE, VISION, *HEADS), FAMILY)
    assert "--rotate heads" in hidden and "--rotate heads" not in inside
    assert all("LoRA" in note and "--rotate none --anti_method none" in note for note in (inside, hidden))


def test_streams_that_are_not_rotated() -> None:
    """Catches a stream that is left out without its reason."""
    obstacles = {LANGUAGE.name: "a reason", "extra.embed": "another reason"}
    _, language, extra = rotation_notes(plan(VISION, obstacles=obstacles), FAMILY)
    assert "language model" in language and language.endswith(": a reason")
    assert "extra.embed" in extra and extra.endswith(": another reason")


def test_adapters_do_not_fit_smoothed_weights_either() -> None:
    """Catches a smoothed folder without a note, on which a served adapter is wrong without an error."""
    (note,) = adapter_notes([SmoothM2()], plan())
    assert "smoothed" in note and "--lora" in note
    assert adapter_notes([SmoothM2()], plan(VISION, *HEADS)) == []  # the note on the rotation says so
    assert adapter_notes([QuantizeWeights()], plan()) == []
