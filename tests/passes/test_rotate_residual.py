"""rotate-residual on the exact stage: what it changes, as text and in numbers. See also `test_rotation_passes`."""

from collections.abc import Callable

import torch

from tests.support.exact_stage import LANGUAGE, planned_stage, text_after_rotation
from vlqc.ir.execution import Call
from vlqc.passes.rotate_residual import RotateResidual


def test_golden(golden: Callable[[str, str], None]) -> None:
    """Any change of what is rotated on the exact stage, or of how the text shows it, shows here as text."""
    golden("after-rotate-residual.vlqc", text_after_rotation(1))


def test_outputs_are_those_of_the_float_stage_times_r() -> None:
    """Catches a proof that compares the wrong values: here R is a dense matrix, for a call that is not the probe."""
    before, after = planned_stage(), planned_stage()
    assert RotateResidual().run(after) and not RotateResidual().run(after)
    r = after.rotations[0].rotation.rotate(torch.eye(4))
    rows = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.25, 0.0, -1.0, 2.0]])
    expected = before.execution.probe_output(Call(0, (rows,), {})) @ r
    torch.testing.assert_close(after.execution.probe_output(Call(0, (rows @ r,), {})), expected, rtol=0, atol=1e-4)


def test_the_largest_magnitudes_before_and_after() -> None:
    """Catches magnitudes of the wrong tensor, or measured at the wrong time, and tensors that are left out."""
    before, after = planned_stage(), planned_stage()
    RotateResidual().run(after)
    residual, heads = after.rotations
    paths = {path for path, _ in before.module.named_parameters() if "norm" not in path} - {"attn.qkv.bias"}
    assert residual.done and not heads.done and not heads.absmax
    assert residual.absmax == {
        LANGUAGE + path: tuple(float(stage.module.get_parameter(path).abs().max()) for stage in (before, after))
        for path in paths
    }
