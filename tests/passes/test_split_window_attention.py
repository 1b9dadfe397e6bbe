"""split-window-attention: equal numbers at the cost of the windows; whatever is no window stays as it is."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import tiny
from tests.support.exact_stage import exact_stage
from tests.support.random_stage import decoder, staged, through
from tests.support.stages import materialized_stage
from tests.support.windowed_stage import (
    DEPTH,
    HEADS,
    HIDDEN,
    KINDS,
    Attention,
    Counter,
    block_stage,
    mask_of,
    real_stages,
    scores_of,
    split,
)
from vlqc.frontend.sequential import SequentialForward
from vlqc.ir.execution import Call
from vlqc.ir.parser import parse_stage
from vlqc.ir.printer import print_stage
from vlqc.ir.scale_propagation import find_edges
from vlqc.ir.stage import Stage
from vlqc.kernels_ref.attention import ATTENTION, attention_arguments
from vlqc.passes import split_window_attention as tested
from vlqc.passes.insert_observers import InsertObservers
from vlqc.passes.split_window_attention import SplitWindowAttention
from vlqc.pipeline.manager import PassManager

# ---- the text --------------------------------------------------------------------------------------------------------


def test_golden(golden: Callable[[str, str], None]) -> None:
    """Any change of what the pass does to a graph shows here as text; the text reads back."""
    text = print_stage(through(exact_stage(), SplitWindowAttention()))
    golden("after-split-window-attention.vlqc", text)
    assert print_stage(parse_stage(text)) == text


def test_channels_still_flow() -> None:
    """Catches a graph in which v is no longer seen to reach proj: its outliers could not be smoothed any more."""
    before, after = (find_edges(stage.module, stage.graph) for stage in (exact_stage(), split(exact_stage())))
    assert [edge.producer for edge in before] == [edge.producer for edge in after]
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.usable, other.usable) and one.consumers.keys() == other.consumers.keys()
        assert all(torch.equal(one.consumers[target], other.consumers[target]) for target in one.consumers)


# ---- a stage ---------------------------------------------------------------------------------------------------------

SAMPLES = ([4, 4, 2, 4, 1], [4], [1, 1, 1, 5, 5, 3], [2, 2])


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_keeps_its_outputs(kind: str) -> None:
    """Catches windows of the probe that are forced on the other samples, and a pass that did nothing at all."""
    stage = block_stage(*SAMPLES, kind=kind)
    dense = scores_of(stage)
    assert dense == sum(sum(windows) ** 2 for windows in SAMPLES)
    expected, names = stage.execution.outputs, [name for name, _ in stage.module.named_parameters()]
    manager = PassManager([SplitWindowAttention()])
    manager.run(stage)
    assert not stage.notes and [name for name, _ in stage.module.named_parameters()] == names
    assert scores_of(stage) == sum(length**2 for windows in SAMPLES for length in windows) < dense / 2
    for one, other in zip(expected, stage.execution.outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    manager.run(stage)  # a second time there is nothing left to split, and the manager holds the pass to that


def test_a_sample_does_not_depend_on_the_others() -> None:
    """Catches windows of several samples in one batch: the same sample has to give the same bytes in any company."""
    together, expected = split(block_stage(*SAMPLES)), []
    together.execution.forward()
    for call in together.execution.calls:
        alone = block_stage(*SAMPLES)
        alone.execution.calls = alone.execution.calls[call.sample : call.sample + 1]
        alone.execution.probe = together.execution.probe
        split(alone).execution.forward()
        expected += alone.execution.outputs
    assert all(torch.equal(one, other) for one, other in zip(together.execution.outputs, expected, strict=True))


def test_one_window_needs_no_mask() -> None:
    """Catches full attention that keeps its mask, and several images that attend to each other."""
    stage = block_stage([9], [5, 4], [3, 3, 3])
    stage.execution.forward()
    expected = stage.execution.outputs
    through(stage, SplitWindowAttention())
    with Counter() as counter:
        stage.execution.forward()
    assert (counter.scores, counter.masks) == (81 + 25 + 16 + 27, 0)
    for one, other in zip(expected, stage.execution.outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_sites_observers_and_other_modules_see_nothing_of_it() -> None:
    """Catches a stand-in that hides children: observed inputs, replaced linears and copies must reach what runs."""
    plain, stage = block_stage(*SAMPLES), block_stage(*SAMPLES)
    through(plain, InsertObservers())
    through(stage, SplitWindowAttention(), InsertObservers())
    assert stage.observations.keys() == plain.observations.keys()
    for source, attended in plain.observations.items():
        torch.testing.assert_close(stage.observations[source].maximum(), attended.maximum())
    copied = copy.deepcopy(stage.module)
    stage.module.set_submodule("attn.proj", nn.Identity())
    stage.execution.forward()
    replaced = stage.execution.outputs[0]
    plain.module.set_submodule("attn.proj", nn.Identity())
    plain.execution.forward()
    torch.testing.assert_close(replaced, plain.execution.outputs[0])
    call = stage.execution.calls[0]
    assert not torch.allclose(copied(*call.args, **call.kwargs), replaced)  # it has its own proj
    assert stage.module.get_submodule("attn").kind == "bool"  # attributes are those of the module it stands for


def test_a_linear_that_reads_attention_itself() -> None:
    """Catches a site whose source is the node that was replaced."""

    class PerHead(Attention):
        def __init__(self) -> None:
            super().__init__("bool")
            self.per_head = nn.Linear(DEPTH, DEPTH)

        def forward(self, rows: Tensor, windows: Tensor) -> Tensor:
            q, k, v = self.qkv(rows).reshape(len(rows), 3, HEADS, DEPTH).permute(1, 2, 0, 3).unbind(0)
            attended = nn.functional.scaled_dot_product_attention(q, k, v, mask_of(windows.tolist()))
            mixed: Tensor = self.per_head(attended)
            return mixed.transpose(0, 1).reshape(rows.shape)

    plain = block_stage([3, 2])
    plain.module.set_submodule("attn", PerHead().requires_grad_(False))
    stage = through(staged(plain.module, list(plain.execution.calls), name="visual.blocks.0"), SplitWindowAttention())
    assert stage.sites["visual.blocks.0.attn.per_head"].source == "cat"


def test_no_hooks_stay() -> None:
    """Catches hooks of the proof that go on counting modules."""
    stage = split(block_stage([3, 2]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in stage.module.modules())


# ---- what stays as it is ---------------------------------------------------------------------------------------------


def unsplittable() -> dict[str, Stage]:
    """Stages in which there is nothing to split."""
    block = block_stage([3, 3], kind="causal")
    attention = block_stage([3, 3]).module.get_submodule("attn")
    nameless = staged(attention, [Call(0, (torch.randn(6, HIDDEN), torch.tensor([3, 3])), {})])
    return {"text": decoder(), "another mask": block, "no module to stand for": nameless}


@pytest.mark.parametrize("name", ["text", "another mask", "no module to stand for"])
def test_untouched(name: str) -> None:
    """Catches a stage without windows that is changed, or noted about."""
    stage = unsplittable()[name]
    before, modules = print_stage(stage), dict(stage.module.named_modules())
    assert not SplitWindowAttention().run(stage)
    assert print_stage(stage) == before and dict(stage.module.named_modules()) == modules and not stage.notes


def test_dropout_stays_random() -> None:
    """Catches a call with dropout that is split, which would drop other scores, or none."""
    q, k, v = torch.randn(3, HEADS, 4, DEPTH, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    expected = ATTENTION(q, k, v, mask_of([2, 2]), dropout_p=0.5)
    torch.manual_seed(1)
    with tested.SplitWindows():
        assert torch.equal(ATTENTION(q, k, v, mask_of([2, 2]), dropout_p=0.5), expected)


def test_attention_inside_a_leaf_is_left_alone() -> None:
    """Catches calls of attention that are matched with the wrong nodes: one of them is in no node."""

    class Leaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(HIDDEN))

        def forward(self, rows: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(rows[None], rows[None], rows[None])[0] * self.weight

    stage = block_stage([3, 3])
    block = stage.module
    block.set_submodule("norm", Leaf().requires_grad_(False))
    assert not SplitWindowAttention().run(staged(block, list(stage.execution.calls), name="visual.blocks.0"))


# ---- the proof -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", [[4, 3, 3], [10]])
def test_a_split_that_changes_the_output_is_left_out(probe: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rewrite without proof: a split that lets windows see each other, unnoticed with one window only."""

    def wrong(query: Tensor, key: Tensor, value: Tensor, windows: list[int], **kwargs: Any) -> Tensor:
        return ATTENTION(query, key, value, **kwargs)

    stage = block_stage(probe)
    before, attention = print_stage(stage), stage.module.get_submodule("attn")
    monkeypatch.setattr(tested, "windowed_attention", wrong)
    assert not SplitWindowAttention().run(stage)
    assert print_stage(stage) == before and stage.module.get_submodule("attn") is attention
    (note,) = stage.notes
    assert "visual.blocks.0.attn " in note


def test_the_stand_in_is_proven_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a module that runs otherwise under its stand-in, although attention alone came out right."""
    stage = block_stage([4, 3])
    attention = stage.module.get_submodule("attn")
    plain = tested.Windowed.forward
    monkeypatch.setattr(tested.Windowed, "forward", lambda self, *args: plain(self, *args) * 1.001)
    assert not SplitWindowAttention().run(stage)
    assert stage.module.get_submodule("attn") is attention and len(stage.notes) == 1


# ---- the real model --------------------------------------------------------------------------------------------------


@pytest.mark.every_transformers
def test_the_real_model_computes_windows_only() -> None:
    """Catches a vision tower that still computes all pairs of patches, in the transformers version at hand."""
    sample = tiny.synthetic_sample((8, 10), (4, 6), words=4)
    per_block = {"visual.blocks.0": windows_on_grid((8, 10), (4, 6)), "visual.blocks.1": [80, 24]}
    with real_stages(sample, tiny.synthetic_sample((4, 4))) as stages:
        for stage in stages:
            attention = [node for node in stage.graph.nodes if node.target is ATTENTION]
            masked = any(attention_arguments(node.args, node.kwargs).get("attn_mask") for node in attention)
            stage.execution.forward()
            expected, modules = stage.execution.outputs, dict(stage.module.named_modules())
            assert SplitWindowAttention().run(stage) == (masked and stage.part == "vision") and not stage.notes
            if stage.name in per_block:
                assert scores_of(stage) == sum(length**2 for length in [*per_block[stage.name], *([16])])
            else:
                stage.execution.forward()
            for one, other in zip(expected, stage.execution.outputs, strict=True):
                for left, right in zip(tiny.tensors_of(one), tiny.tensors_of(other), strict=True):
                    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    assert dict(stage.module.named_modules()) == modules


def windows_on_grid(*grids: tuple[int, int]) -> list[int]:
    """Patches per window of the tiny model: squares of 4 x 4 patches, smaller at the lower and right edges."""
    sides = [
        ([min(4, down - y) for y in range(0, down, 4)], [min(4, w - x) for x in range(0, w, 4)]) for down, w in grids
    ]
    return [tall * wide for rows, columns in sides for tall in rows for wide in columns]


def test_stand_ins_are_gone_with_the_stage() -> None:
    """Catches wrappers that stay in the model after their stage is emitted."""
    model = tiny.float_model()
    before = dict(model.module.named_modules())
    read = model.checkpoint.tensor
    with (
        torch.no_grad(),
        model.non_stage_weights(read),
        SequentialForward(model, [tiny.synthetic_sample((8, 8))]) as forward,
    ):
        for inputs in forward:
            with materialized_stage(model, inputs, torch.bfloat16, read) as stage:
                SplitWindowAttention().run(stage)
                stage.execution.forward()
                inputs.outputs = stage.execution.outputs
    assert dict(model.module.named_modules()) == before
