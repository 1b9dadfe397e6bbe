"""vlqc.targets.target: targets as text."""

import pytest

from vlqc.errors import UserError
from vlqc.targets.target import parse_target


@pytest.mark.parametrize(
    ("text", "engines", "version"),
    [
        ("vllm-ascend", ("vllm-ascend",), None),
        ("vllm-ascend@0.18", ("vllm-ascend",), "0.18"),
        ("mindie@2.2.RC1", ("mindie",), "2.2.RC1"),
        ("both", ("vllm-ascend", "mindie"), None),
        (" MindIE @ 2.2 ", ("mindie",), "2.2"),
    ],
)
def test_targets(text: str, engines: tuple[str, ...], version: str | None) -> None:
    """Catches a version dropped or taken for a part of the engine's name."""
    target = parse_target(text)
    assert ([engine.name for engine in target.engines], target.version) == (list(engines), version)
    assert parse_target(str(target)) == target


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("vllm", "did you mean vllm-ascend?"),
        ("vllm_ascend", "did you mean vllm-ascend?"),
        ("vllm-ascend==0.18", "did you mean vllm-ascend@0.18?"),
        ("mindie2.2", "did you mean mindie@2.2?"),
        ("", "choose from vllm-ascend, mindie, both"),
        ("tensorrt", "choose from vllm-ascend, mindie, both"),
        ("both@0.18", "both without a version"),
        ("vllm-ascend@", "pass a version such as 0.18"),
        ("mindie@newest", "pass a version such as 2.2"),
        ("mindie@2.2@1", "pass a version such as 2.2"),
    ],
)
def test_what_is_no_target_is_refused_with_a_hint(text: str, hint: str) -> None:
    """Catches a traceback, or a misspelt target that is treated as one without rules, and so without limits."""
    with pytest.raises(UserError, match="--engine") as caught:
        parse_target(text, "--engine")
    assert hint in str(caught.value)
