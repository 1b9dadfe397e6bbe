"""assign-precision: the seed's exclusions, uniform groups, and nothing that an engine refuses."""

from collections.abc import Callable

import pytest
import torch
from exact_stage import text_after
from random_stage import decoder, staged, through
from torch import Tensor, nn

from vlqc.engines import Scheme, assignment_faults
from vlqc.ir import Call, Site, Stage
from vlqc.passes.assign_precision import AssignPrecision, choose
from vlqc.printer import print_stage

# Every linear of the model: by the seed's list these stay float ...
FLOAT_BY_SEED = (
    "visual.blocks.3.mlp.down_proj",
    "visual.merger.mlp.0",
    "visual.merger.mlp.2",
    "model.layers.27.mlp.down_proj",
    "lm_head",
)
# ... and these do not.
QUANTIZED_BY_SEED = (
    "visual.blocks.3.attn.qkv",
    "visual.blocks.3.attn.proj",
    "visual.blocks.3.mlp.gate_proj",
    "visual.blocks.3.mlp.up_proj",
    *(f"model.layers.27.self_attn.{part}_proj" for part in "qkvo"),
    "model.layers.27.mlp.gate_proj",
    "model.layers.27.mlp.up_proj",
)
GROUPS = (
    ("model.layers.27.self_attn.q_proj", "model.layers.27.self_attn.k_proj", "model.layers.27.self_attn.v_proj"),
    ("model.layers.27.mlp.gate_proj", "model.layers.27.mlp.up_proj"),
    ("visual.blocks.3.mlp.gate_proj", "visual.blocks.3.mlp.up_proj"),
)


def members_with(name: str) -> list[Site]:
    names = next((group for group in GROUPS if name in group), (name,))
    return [Site(member, member, "x", (4, 4)) for member in names]


def test_golden(golden: Callable[[str, str], None]) -> None:
    """Any change of what the pass decides for the exact stage shows here as text."""
    golden("after-assign-precision.vlqc", text_after("assign-precision"))


@pytest.mark.parametrize("target", ["vllm-ascend", "mindie", "both"])
def test_seed_exclusions(target: str) -> None:
    """A layer that the reference script keeps in float quantized by default, or one that it quantizes left out."""
    for name in FLOAT_BY_SEED:
        scheme, reason = choose(members_with(name), Scheme.W8A8, True, target)
        assert (scheme, reason) == (Scheme.FLOAT, "kept in float by the seed's exclusions"), name
    for name in QUANTIZED_BY_SEED:
        assert choose(members_with(name), Scheme.W8A8, True, target) == (Scheme.W8A8, ""), name


@pytest.mark.parametrize(
    ("name", "target", "refused"),
    [
        ("visual.blocks.3.mlp.down_proj", "vllm-ascend", False),
        ("visual.blocks.3.mlp.down_proj", "mindie", True),  # built in float there, whatever the folder says
        ("visual.blocks.3.mlp.down_proj", "both", True),
        ("model.layers.27.mlp.down_proj", "both", False),
        ("visual.merger.mlp.2", "both", False),
        ("lm_head", "vllm-ascend", True),
        ("model.layers.27.self_attn.gate", "both", True),  # a layer that no table knows
    ],
)
def test_without_the_seed_only_engines_decide(name: str, target: str, refused: bool) -> None:
    """A scheme that an engine of the target refuses, or fear of one that it accepts."""
    scheme, reason = choose(members_with(name), Scheme.W8A8, False, target)
    assert scheme == (Scheme.FLOAT if refused else Scheme.W8A8)
    assert reason == (f"W8A8 is not accepted here by {target}" if refused else "")


@pytest.mark.parametrize("fallback", ["seed", "none"])
@pytest.mark.parametrize("target", ["vllm-ascend", "mindie", "both"])
def test_engines_accept_what_comes_out(fallback: str, target: str) -> None:
    """A group with two schemes or a refused one: checked by the engine table's own rule for finished assignments."""
    stage = decoder()
    through(stage, AssignPrecision(fallback=fallback, target=target))  # type: ignore[arg-type]
    schemes = {site.name: site.scheme or Scheme.FLOAT for site in stage.sites.values()}
    assert assignment_faults(target, schemes) == []
    assert all(len({(site.scheme, site.reason) for site in members}) == 1 for members in stage.groups().values())
    floats = {name for name, scheme in schemes.items() if scheme == Scheme.FLOAT}
    assert floats == ({"model.layers.0.mlp.down_proj"} if fallback == "seed" else set())


class Unequal(nn.Module):
    """gate and up read different rows, so that one engine's fused group is two groups of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("gate_proj", "up_proj", "down_proj")})

    def forward(self, rows: Tensor) -> Tensor:
        lowered: Tensor = self.mlp["down_proj"](self.mlp["gate_proj"](rows).relu() * self.mlp["up_proj"](rows + 1))
        return lowered


def unequal() -> Stage:
    return staged(Unequal().requires_grad_(False), [Call(0, (torch.ones(3, 4),), {})])


def test_fused_member_that_reads_another_input() -> None:
    """Engines multiply gate and up as one matrix with one input scale: two inputs must never be quantized apart."""
    stage = through(unequal(), AssignPrecision(fallback="none"))
    reasons = {site.target: (site.scheme, site.reason) for site in stage.sites.values()}
    why = "the engine fuses it with model.layers.0.mlp.{}, which reads another input"
    assert reasons == {
        "mlp.gate_proj": (Scheme.FLOAT, why.format("up_proj")),
        "mlp.up_proj": (Scheme.FLOAT, why.format("gate_proj")),
        "mlp.down_proj": (Scheme.W8A8, ""),
    }


def test_one_refused_member_keeps_its_whole_group_float() -> None:
    """A stranger that reads the same rows as q, k and v: one group of the graph, so one scheme."""
    members = [*members_with(GROUPS[0][0]), Site("model.layers.27.extra", "extra", "x", (4, 4))]
    for order in (members, members[::-1]):
        scheme, reason = choose(order, Scheme.W8A8, True, "both")
        assert scheme == Scheme.FLOAT and reason == "W8A8 is not accepted here by both"


@pytest.mark.parametrize("scheme", ["W8A8", "FLOAT"])
def test_second_run_changes_nothing(scheme: str) -> None:
    """A pass that always claims a change is refused by the manager as a lie."""
    step, stage = AssignPrecision(scheme=scheme), decoder()  # type: ignore[arg-type]
    assert step.run(stage) is True
    text = print_stage(stage)
    assert step.run(stage) is False and print_stage(stage) == text


def test_everything_float_on_request() -> None:
    """`scheme=FLOAT` has to reach every site."""
    stage = through(decoder(), AssignPrecision(scheme="FLOAT", fallback="none"))
    assert {site.scheme for site in stage.sites.values()} == {Scheme.FLOAT}
