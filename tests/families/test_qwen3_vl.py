"""Qwen3-VL: ties in both parts of config.json, mergers between blocks, and rotary embeddings of newer versions."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tools.checkpoints.families import FAMILIES, config_of
from tools.checkpoints.outlier_checkpoint import make
from vlqc.errors import UserError
from vlqc.families.qwen3_vl import QWEN3_VL
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.checkpoint.config_schema import config_faults

TIE = "tie_word_embeddings"


def config(**vision: Any) -> dict[str, Any]:
    content = copy.deepcopy(config_of(FAMILIES["qwen3_vl"].shape, "bfloat16", tied=False, family="qwen3_vl"))
    content["vision_config"] |= vision
    return content


@pytest.mark.parametrize(
    ("top", "inner", "tied"),
    [
        (True, True, True),
        (True, None, True),  # as transformers 5 writes it
        (None, True, True),
        (True, False, False),
        (False, None, False),
        (None, None, False),
    ],
)
def test_ties_are_written_where_engines_read_them(top: bool | None, inner: bool | None, tied: bool) -> None:
    """Catches a result without lm_head whose config.json an engine takes for untied."""
    content = config()
    for part, value in ((content, top), (content["text_config"], inner)):
        part.pop(TIE, None)
        if value is not None:
            part[TIE] = value
    emitted = QWEN3_VL.engine_config(content)
    assert QWEN3_VL.is_tied(content) == QWEN3_VL.is_tied(emitted) == tied
    assert bool(emitted["text_config"].get(TIE)) == tied


def test_a_stored_head_contradicts_a_tie_at_the_top_alone(tmp_path: Path) -> None:
    """Catches a head that is dropped: transformers 4 and the engines do not tie such a model."""
    content = make(tmp_path / "model", family="qwen3_vl", tied=False)
    content[TIE] = True
    content["text_config"].pop(TIE, None)
    (tmp_path / "model" / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        Checkpoint(tmp_path / "model").check_config()


def stages(blocks: int, mergers: int) -> list[str]:
    """In registration order."""
    return [
        *(f"model.visual.blocks.{number}" for number in range(blocks)),
        "model.visual.merger",
        *(f"model.visual.deepstack_merger_list.{number}" for number in range(mergers)),
        "model.language_model.layers.0",
    ]


@pytest.mark.parametrize("indices", [[0, 1, 2], [1, 3, 4], [4, 2, 0]])
def test_a_merger_runs_after_its_block(indices: list[int]) -> None:
    """Catches the registration order, in which mergers follow the tower, and mergers in the order of their numbers."""
    names = stages(5, 3)
    order = QWEN3_VL.stage_order(names, config(deepstack_visual_indexes=indices))
    assert sorted(order) == sorted(names) and order[-1] == names[-1]
    for number, block in enumerate(indices):
        place = order.index(f"model.visual.deepstack_merger_list.{number}")
        assert order[place - 1] == f"model.visual.blocks.{block}"
    kept = QWEN3_VL.outputs_read_later(order)
    assert kept == {f"model.visual.deepstack_merger_list.{number}" for number in range(3)} | {
        f"model.visual.blocks.{block}" for block in indices
    }


def test_missing_indices_are_those_of_the_config_class() -> None:
    """Catches mergers without a place where config.json leaves the key out."""
    content = config()
    del content["vision_config"]["deepstack_visual_indexes"]
    order = QWEN3_VL.stage_order(stages(27, 3), content)
    for number, block in enumerate((8, 16, 24)):
        place = order.index(f"model.visual.deepstack_merger_list.{number}")
        assert order[place - 1] == f"model.visual.blocks.{block}"


@pytest.mark.parametrize("indices", [[0, 0, 1], [0, 1, 99], [-1], "0", None, [0.5], [0] * 100_000])
def test_invalid_indices_are_one_fault(indices: Any) -> None:
    """Catches indices that a model is built from although a merger would never run, or a million times."""
    faults = config_faults(QWEN3_VL, config(deepstack_visual_indexes=indices), "config.json", 1 << 20, 1000)
    assert len(faults) == 1 and "deepstack_visual_indexes" in faults[0].what
