"""What the user is told of engines: what cannot be loaded, by which versions, and how to serve a folder."""

import json
import shlex

import pytest

from tests.support.reference_schemes import DYNAMIC, W4A8, W8A8
from vlqc.targets.advice import cannot_load, engine_notes, serve_commands
from vlqc.targets.engines import Scheme

SOME, FROM_016 = "vLLM Ascend 0.16 to 0.26.0rc", "vLLM Ascend 0.16 and later"
NEVER_IN_MINDIE = "no version of MindIE loads W4A8_DYNAMIC for vision-language models"
# target, scheme, dtype, group size, scope -> why an engine of the target cannot load it; what else is to be said
TOLD: list[tuple[str, Scheme, str, int | None, str, list[str], list[str]]] = [
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
    ("vllm-ascend", W4A8, "bfloat16", 64, "engine", [], [f"{SOME} load W4A8_DYNAMIC, later versions do not"]),
    ("vllm-ascend@0.18", W4A8, "bfloat16", 128, "engine", [], []),
    ("vllm-ascend@0.18", W4A8, "bfloat16", 256, "engine", [], ["group_size 256: vLLM Ascend's int4 kernels prefer 64"]),
    ("vllm-ascend@0.18", W4A8, "bfloat16", 512, "engine", [], ["group_size 512: vLLM Ascend's int4 kernels are"]),
    ("vllm-ascend@0.26", W4A8, "bfloat16", 64, "engine", [f"0.26 does not load W4A8_DYNAMIC; {SOME} do"], []),
    ("vllm-ascend", W4A8, "float16", 64, "engine", ["W4A8_DYNAMIC of a float16 model"], []),
    ("vllm-ascend", W4A8, "bfloat16", 64, "all", ["on layers with a bias or in the vision tower"], []),
    ("mindie", W4A8, "bfloat16", 64, "engine", [NEVER_IN_MINDIE], []),
    ("mindie@2.2", W4A8, "bfloat16", 512, "all", [NEVER_IN_MINDIE], ["MindIE accepts 64 or 128 or 256 only"]),
]


@pytest.mark.parametrize(("target", "scheme", "dtype", "group_size", "scope", "refusals", "notes"), TOLD)
def test_what_the_user_is_told(
    target: str, scheme: Scheme, dtype: str, group_size: int | None, scope: str, refusals: list[str], notes: list[str]
) -> None:
    """Catches silence about a folder that will not load, and a refusal of one that will."""
    refused = cannot_load(target, scheme, dtype, scope)
    told = engine_notes(target, scheme, dtype, group_size, scope)
    assert told[: len(refused)] == refused
    for expected, found in ((refusals, refused), (notes, told[len(refused) :])):
        assert len(found) == len(expected)
        assert all(text in sentence for text, sentence in zip(expected, found, strict=True)), found


def test_serve_commands() -> None:
    """Catches a summary that sends the user to the wrong engine, or a command that a space in the path breaks."""
    vllm, mindie = serve_commands("both", "out")
    assert vllm == "vllm serve out --quantization ascend"
    assert '"modelWeightPath": "out"' in mindie
    assert serve_commands("mindie@2.2", "out") == [mindie]
    vllm, mindie = serve_commands("both", 'my "first" model')
    assert shlex.split(vllm) == ["vllm", "serve", 'my "first" model', "--quantization", "ascend"]
    assert json.loads("{" + mindie.partition(" in the ")[0] + "}") == {"modelWeightPath": 'my "first" model'}
