"""vlqc.targets.advice: which versions do not load a result, their limits, and how to serve a folder."""

import json
import shlex

import pytest

from tests.support.reference_schemes import DYNAMIC, W4A8, W8A8
from vlqc.families.linear import Linear
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.targets.advice import engine_notes, grouped_layers, incompatibilities, parallel_notes, serve_commands
from vlqc.targets.mindie import MINDIE
from vlqc.targets.schemes import Scheme
from vlqc.targets.vllm_ascend import VLLM_ASCEND

SOME, FROM_016 = "vLLM Ascend 0.16 and later, before 0.26", "vLLM Ascend 0.16 and later"
NEVER_IN_MINDIE = "no version of MindIE loads W4A8_DYNAMIC for vision-language models"
# target, scheme, dtype, group size, scope, incompatibilities, further notes
NOTES: list[tuple[str, Scheme, str, int | None, str, list[str], list[str]]] = [
    ("both", W8A8, "bfloat16", None, "engine", [], []),
    ("vllm-ascend", W8A8, "float16", None, "engine", [], []),
    ("vllm-ascend@0.10", W8A8, "bfloat16", None, "engine", ["vLLM Ascend 0.10 does not load W8A8"], []),
    ("vllm-ascend", DYNAMIC, "bfloat16", None, "engine", [], [f"{FROM_016} load W8A8_DYNAMIC, earlier"]),
    ("vllm-ascend", DYNAMIC, "float32", None, "engine", [], [f"{FROM_016} load W8A8_DYNAMIC, earlier"]),
    ("vllm-ascend", DYNAMIC, "float16", None, "engine", ["W8A8_DYNAMIC of a float16 model"], []),
    ("vllm-ascend@0.18", DYNAMIC, "bfloat16", None, "engine", [], []),
    # In 0.15 the vision tower stays float, and the rest loads.
    ("vllm-ascend@0.15", DYNAMIC, "bfloat16", None, "engine", [], []),
    ("mindie", DYNAMIC, "float16", None, "engine", [], ["the vision tower stays float"]),
    ("vllm-ascend", W4A8, "bfloat16", 64, "engine", [], [f"{SOME} load W4A8_DYNAMIC, other versions do not"]),
    ("vllm-ascend@0.18", W4A8, "bfloat16", 128, "engine", [], []),
    ("vllm-ascend@0.18", W4A8, "bfloat16", 256, "engine", [], ["group_size 256: vLLM Ascend's int4 kernels prefer 64"]),
    ("vllm-ascend@0.18", W4A8, "bfloat16", 512, "engine", [], ["group_size 512: vLLM Ascend's int4 kernels are"]),
    ("vllm-ascend@0.26", W4A8, "bfloat16", 64, "engine", [f"0.26 does not load W4A8_DYNAMIC; {SOME} do"], []),
    ("vllm-ascend", W4A8, "float16", 64, "engine", ["W4A8_DYNAMIC of a float16 model"], []),
    ("vllm-ascend", W4A8, "bfloat16", 64, "all", ["on layers with a bias or in the vision tower"], []),
    ("mindie", W4A8, "bfloat16", 64, "engine", [NEVER_IN_MINDIE], []),
    ("mindie@2.2", W4A8, "bfloat16", 512, "all", [NEVER_IN_MINDIE], ["MindIE accepts 64 or 128 or 256 only"]),
]


@pytest.mark.parametrize(("target", "scheme", "dtype", "group_size", "scope", "refusals", "notes"), NOTES)
def test_notes(
    target: str, scheme: Scheme, dtype: str, group_size: int | None, scope: str, refusals: list[str], notes: list[str]
) -> None:
    """Catches a missing note about a folder that does not load, and a note about one that does."""
    incompatible = incompatibilities(target, QWEN2_5_VL, scheme, dtype, scope)
    actual = engine_notes(target, QWEN2_5_VL, scheme, dtype, group_size, scope)
    assert actual[: len(incompatible)] == incompatible
    for expected, sentences in ((refusals, incompatible), (notes, actual[len(incompatible) :])):
        assert len(sentences) == len(expected)
        assert all(text in sentence for text, sentence in zip(expected, sentences, strict=True)), sentences


def test_serve_commands() -> None:
    """Catches a summary that sends the user to the wrong engine, or a command that a space in the path breaks."""
    vllm, mindie = serve_commands("both", "out")
    assert vllm == "vllm serve out --quantization ascend"
    assert '"modelWeightPath": "out"' in mindie
    assert serve_commands("mindie@2.2", "out") == [mindie]
    assert serve_commands("both", "out", [MINDIE]) == [mindie] and serve_commands("vllm-ascend", "out", [MINDIE]) == []
    vllm, mindie = serve_commands("both", 'my "first" model')
    assert shlex.split(vllm) == ["vllm", "serve", 'my "first" model', "--quantization", "ascend"]
    assert json.loads("{" + mindie.partition(" in the ")[0] + "}") == {"modelWeightPath": 'my "first" model'}


GROUPED = {
    "model.layers.0.self_attn.o_proj": (Scheme.W4A8_DYNAMIC, (3584, 3584)),
    "model.layers.0.mlp.up_proj": (Scheme.W4A8_DYNAMIC, (18944, 3584)),
    "model.layers.0.mlp.down_proj": (Scheme.W8A8_DYNAMIC, (3584, 18944)),
}


@pytest.mark.parametrize(
    ("group_size", "devices"), [(256, "1 or 2 devices"), (128, "1, 2 or 4 devices"), (64, "1, 2, 4 or 8 devices")]
)
def test_groups_bound_tensor_parallelism(group_size: int, devices: str) -> None:
    """Catches a number of devices that splits a group, or layers without groups that count: Qwen2.5-VL 7B."""
    grouped = grouped_layers(QWEN2_5_VL, GROUPED)
    (note,) = parallel_notes("vllm-ascend", grouped, group_size)
    assert devices in note
    assert parallel_notes("vllm-ascend", grouped_layers(QWEN2_5_VL, {}), group_size) == []


def test_one_group_is_too_few() -> None:
    """Catches a group as large as the inputs, which the operator refuses on any number of devices."""
    assert VLLM_ASCEND.parallel_sizes([Linear(512, 512)], 512) == ()
    assert VLLM_ASCEND.parallel_sizes([Linear(512, 512)], 256) == (1, 2, 4, 8, 16)
