"""PassManager: the checks of what a pass reports and changes."""

import re
import typing
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.support.small_stage import Lowered, decided, traced
from vlqc.errors import InternalError, third_party_fix
from vlqc.ir.execution import StageRun
from vlqc.ir.printer import print_stage
from vlqc.ir.stage import Stage
from vlqc.ir.tensor_digest import TOLERANCE, fingerprints, max_relative_error
from vlqc.pipeline import manager
from vlqc.pipeline.manager import PassManager
from vlqc.pipeline.pass_api import Pass
from vlqc.targets.schemes import Scheme


def pass_of(kind: str, work: Any, name: str = "made-up") -> Pass:
    """A third-party pass: a frozen dataclass that derives from Pass and defines run, nothing else."""
    body = {"name": name, "kind": kind, "summary": "", "run": lambda self, stage: work(stage)}
    made = type("MadeUp", (Pass,), body)
    step: Pass = typing.cast(Any, dataclass(frozen=True)(made))()
    return step


def scale_weight(stage: Stage) -> bool:
    stage.module.get_parameter("mlp.up.weight").mul_(2)
    stage.module.get_parameter("mlp.down.weight").div_(2)
    return True


def decide(stage: Stage) -> bool:
    for site in stage.sites.values():
        site.scheme, site.reason = Scheme.FLOAT, "by request"
    return True


def test_third_party_passes_run() -> None:
    """Catches a subclass of Pass that PassManager does not run, time, or pass to its callbacks."""
    events: list[Any] = []
    manager = PassManager(
        [pass_of("analysis", decide, "decide"), pass_of("rewrite", scale_weight, "scale")],
        before=lambda stage, coming: events.append(("before", coming.name)),
        after=lambda stage, number, done: events.append((number, done.name, "by request" in print_stage(stage))),
    )
    manager.run(traced())
    assert events == [("before", "decide"), (0, "decide", True), ("before", "scale"), (1, "scale", True)]
    assert set(manager.seconds) == {"decide", "scale"}


def test_a_pass_without_run_says_so() -> None:
    """Catches a missing `run` that counts as a pass without changes."""
    with pytest.raises(TypeError, match=r"\brun\b"):
        PassManager([Pass()]).run(traced())


def test_an_analysis_must_not_change_weights() -> None:
    """Catches an analysis that modifies a weight, with or without reporting it."""
    for says in (True, False):
        step = pass_of("analysis", lambda stage, says=says: scale_weight(stage) and says)
        with pytest.raises(
            InternalError, match=r"made-up\b.* analysis .*mlp\.down\.weight, mlp\.up\.weight\b.*visual\.blocks\.0"
        ):
            PassManager([step]).run(traced())


CHANGES: dict[str, Any] = {
    "a weight": scale_weight,
    "a weight behind autograd's back": lambda stage: stage.module.get_parameter("norm1.bias").data[3].add_(2**-20),
    "a buffer": lambda stage: stage.module.get_buffer("position").add_(2**-20),
    "a module": lambda stage: stage.module.register_buffer("new", torch.zeros(1)),
    "a scheme": decide,
    "a reason": lambda stage: setattr(stage.sites["visual.blocks.0.mlp.down"], "reason", "else"),
    "edges": lambda stage: setattr(stage, "edges", ()),
    "an argument in the graph": lambda stage: setattr(
        stage.node("reshape"), "args", (stage.node("attn_qkv"), 2, -1, 2, 2)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_rewrite_that_hides_a_change(change: str) -> None:
    """Catches a change that a pass does not report: cached text and statistics would be stale."""

    def work(stage: Stage) -> bool:
        CHANGES[change](stage)
        return False

    with pytest.raises(InternalError, match=r"made-up\b.*\bFalse\b.*visual\.blocks\.0"):
        PassManager([pass_of("rewrite", work)]).run(traced())
    PassManager([pass_of("rewrite", lambda stage: work(stage) or True)]).run(traced())


def spoil(stage: Stage) -> bool:
    for site in stage.sites.values():
        stage.linear(site).weight.mul_(1.5)
    return True


def test_a_rewrite_must_not_change_what_the_stage_computes() -> None:
    """Catches a third-party rewrite with a wrong formula."""
    words = r"changed the output of visual\.blocks\.0 [\s\S]*check tests.pipeline.test_manager:MadeUp"
    for work in (spoil, lambda stage: stage.module.get_parameter("mlp.down.bias").fill_(torch.inf).numel() > 0):
        with pytest.raises(InternalError, match=words if work is spoil else "made-up"):
            PassManager([pass_of("rewrite", work)]).run(traced())
    PassManager([pass_of("rewrite", spoil)], verify=False).run(traced())


def spoil_behind_autograd(stage: Stage) -> bool:
    for site in stage.sites.values():
        stage.linear(site).weight.data.mul_(1.5)
    return True


def test_outputs_are_not_reused_after_a_third_party_pass() -> None:
    """Catches an output from before a write that PyTorch does not count, in the same check or in a later pass."""
    with pytest.raises(InternalError, match="changed the output"):
        PassManager([pass_of("rewrite", spoil_behind_autograd)]).run(traced())
    stage = traced()
    before = stage.execution.probe_output()
    PassManager([pass_of("rewrite", spoil_behind_autograd)], verify=False).run(stage)
    assert not torch.equal(stage.execution.probe_output(reuse=True), before)


def test_digests_of_unmodified_tensors_are_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches digests of all weights after every built-in rewrite, and none after a third-party one."""
    computed: list[set[str]] = []
    monkeypatch.setattr(manager, "fingerprints", lambda named: (computed.append(set(named)), fingerprints(named))[1])
    own = pass_of("rewrite", scale_weight)
    monkeypatch.setattr(type(own), "__module__", "vlqc.passes.made_up")
    PassManager([own, pass_of("rewrite", lambda stage: False)]).run(traced())
    assert computed[1] == {"mlp.up.weight", "mlp.down.weight"} and computed[0] == computed[2] > computed[1]


def test_a_rewrite_may_lower() -> None:
    """Catches a lowering pass that is refused because integers change the output."""

    def lower(stage: Stage) -> bool:
        for site in stage.sites.values():
            if site.weight is not None:
                site.weight.scale.mul_(1.5)
                stage.module.set_submodule(site.target, Lowered(stage.linear(site), site))
        return True

    stage = decided()
    before = stage.execution.probe_output()
    steps = [pass_of("rewrite", lower, "lower"), pass_of("rewrite", lambda stage: False, "behind-it")]
    PassManager(steps).run(stage)
    assert max_relative_error(before, stage.execution.probe_output()) > TOLERANCE


def test_only_a_strangers_rewrite_costs_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches forwards for built-in rewrites, which check themselves."""
    ran: list[str] = []
    run_probe = StageRun.probe_output
    monkeypatch.setattr(StageRun, "probe_output", lambda run, **options: (ran.append(run.name), run_probe(run))[1])
    own = pass_of("rewrite", scale_weight)
    monkeypatch.setattr(type(own), "__module__", "vlqc.passes.made_up")
    PassManager([own, pass_of("analysis", lambda stage: False)]).run(traced())
    assert ran == []
    PassManager([pass_of("rewrite", scale_weight)]).run(traced())
    assert len(ran) == 2


def test_a_pass_without_a_return() -> None:
    """Catches a missing return value that is reported as a hidden change."""
    for returned in (None, 1):
        step = pass_of("analysis", lambda stage, returned=returned: decide(stage) and returned)
        with pytest.raises(InternalError, match=rf"run returned {returned} on .*True or False") as caught:
            PassManager([step]).run(traced())
        (fault,) = caught.value.faults
        assert "\n" not in fault.what and fault.fix == third_party_fix("tests.pipeline.test_manager:MadeUp")


@pytest.mark.parametrize("kind", ["analysis", "rewrite"])
def test_a_pass_that_claims_a_change(kind: str) -> None:
    """Catches a pass that returns True without a change."""
    PassManager([pass_of(kind, lambda stage: False)]).run(decided())
    with pytest.raises(InternalError, match="returned True but changed nothing") as caught:
        PassManager([pass_of(kind, lambda stage: True)]).run(decided())
    assert caught.value.exit_code == 70


def test_the_second_pass_is_held_to_what_the_first_left() -> None:
    """Catches a change of the first pass that is attributed to the second."""
    first = pass_of("rewrite", scale_weight)
    PassManager([first, pass_of("analysis", lambda stage: False)]).run(traced())
    with pytest.raises(InternalError, match="liar"):
        PassManager([first, pass_of("analysis", lambda stage: True, "liar")]).run(traced())


def test_an_invalid_stage_is_refused_with_all_its_faults() -> None:
    """Catches an invalid stage that is not reported at once, with all faults and its text."""

    def work(stage: Stage) -> bool:
        decide(stage)
        stage.sites["visual.blocks.0.mlp.up"].scheme = None
        stage.module.get_parameter("norm2.weight").fill_(torch.nan)
        return True

    with pytest.raises(InternalError) as caught:
        PassManager([pass_of("rewrite", work)]).run(traced())
    message = str(caught.value)
    assert re.search(r"visual\.blocks\.0\b.*\bmade-up\b", message)
    assert "schemes" in message and re.search(r"norm2\.weight\b.*\bNaN\b", message)
    assert '\nstage "visual.blocks.0" part=vision' in message


def test_without_verify_nothing_is_checked() -> None:
    """Catches checks that run in spite of verify=False."""
    after: list[int] = []
    step = pass_of("analysis", scale_weight)
    PassManager([step], verify=False, after=lambda stage, number, done: after.append(number)).run(traced())
    assert after == [0]
