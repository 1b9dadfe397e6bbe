"""Output of `vlqc verify --locate` at 80 columns, the width of logs and pipes."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.compiled_folder import make_content
from vlqc.verify.attribution.ablation import Attribution, GroupEffect, LayerGroup, ModalityPower
from vlqc.verify.attribution.group_error import GroupError
from vlqc.verify.attribution.ranking import add_ranking
from vlqc.verify.findings import RANKING, VerificationResult
from vlqc.verify.structure.structure import check_structure

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


def test_advice_for_text_alone(tmp_path: Path) -> None:
    """Catches columns for images that no sample has, and an exclusion that would not raise the SQNR."""
    result = VerificationResult("out")
    compiled = check_structure(make_content().write(tmp_path / "out"), None, result)

    def power(value: float) -> ModalityPower:
        return ModalityPower({"text": value, "image": 0.0, "video": 0.0})

    def effect(alone: float, without: float) -> GroupEffect:
        return GroupEffect(power(alone), power(without), GroupError(1.0, 0.5, 0.5))

    groups = {
        LayerGroup("model.layers.0", ("model.layers.0.self_attn.o_proj",)): effect(alone=6.0, without=10.1),
        LayerGroup("model.layers.1", ("model.layers.1.self_attn.o_proj",)): effect(alone=5.0, without=5.0),
    }
    add_ranking(Attribution(power(1000.0), power(10.0), power(0.0), groups), compiled, result)
    rows = result.facts[RANKING]
    assert [(row["share %"], row["gain dB"]) for row in rows] == [(60.0, -0.04), (50.0, 3.01)]
    assert all("text dB" in row and "image dB" not in row for row in rows)
    assert ["--exclude" in advice.fix for advice in result.advice] == [False, True]
    assert "3.01 dB" in result.advice[1].what and "-0.04" not in result.advice[0].what
