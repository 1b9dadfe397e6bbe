"""rotate-heads on the exact stage: what it changes, as text and in numbers. See also `test_rotation_passes`."""

from collections.abc import Callable

import torch

from tests.support.exact_stage import planned_stage, text_after_rotation
from vlqc.passes.rotate_heads import RotateHeads


def test_golden(golden: Callable[[str, str], None]) -> None:
    """Any change of what is rotated on the exact stage, or of how the text shows it, shows here as text."""
    golden("after-rotate-heads.vlqc", text_after_rotation(2))


def test_the_output_and_all_other_rows_stay_the_same() -> None:
    """Catches a rotation of query or key rows, or one that the output projection does not undo."""
    before, after = planned_stage(), planned_stage()
    assert RotateHeads().run(after) and not RotateHeads().run(after)
    old, new = (stage.module.get_parameter("attn.qkv.weight") for stage in (before, after))
    assert torch.equal(old[:8], new[:8]) and not torch.equal(old[8:], new[8:])
    torch.testing.assert_close(after.execution.probe_output(), before.execution.probe_output(), rtol=0, atol=1e-5)
