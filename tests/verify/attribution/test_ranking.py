"""Output of `vlqc verify --locate` at 80 columns, the width of logs and pipes."""

import io
from typing import Any

import pytest
from rich.console import Console

from vlqc.verify.findings import RANKING, VerificationResult

GROUP = "model.layers.27.self_attn.q_proj, k_proj, v_proj"
ADVICE = "keep it in float: --exclude model.layers.27.self_attn.q_proj --exclude model.layers.27.self_attn.k_proj"
ROW: dict[str, Any] = {"group": GROUP, "scheme": "W8A8", "share": 0.4321, "weights": 12.5, "inputs": 30.25}


def printed(width: int, row: dict[str, Any]) -> list[str]:
    result = VerificationResult("out", facts={RANKING: [row] * 2})
    result.add_fault("finite", "model.norm.weight", "w" * 90, fix=ADVICE)
    written = io.StringIO()
    result.render(Console(file=written, width=width))
    return written.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 40])
def test_names_and_advice_can_be_copied(width: int) -> None:
    """Catches group names that are wrapped inside a word, and advice with a line break inside an option."""
    lines = printed(width, ROW)
    assert lines.count(GROUP) == 2 and f"    what to do: {ADVICE}" in lines
    figures = " ".join(" ".join(lines).split())
    assert "scheme W8A8, share 0.4321, weights 12.5, inputs 30.25" in figures


def test_a_wide_console_gets_a_table() -> None:
    """Catches lists where a table fits, and truncated cells."""
    for width, row in ((120, ROW), (80, {"group": "visual.merger.mlp.0", "share": 0.5})):
        lines = [line for line in printed(width, row) if row["group"] in line]
        assert len(lines) == 2 and all(line.count("│") == len(row) + 1 for line in lines)
