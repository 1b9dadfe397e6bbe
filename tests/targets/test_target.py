"""vlqc.targets.target: the text of a target, and the order of versions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlqc.errors import UserError
from vlqc.targets.target import Version, parse_target

# oldest first; every release's candidates come before it
ORDER = ["0.9", "0.10.2rc1", "0.10.2rc2", "0.10.2", "0.11.0rc1", "0.11", "0.11.0.post1", "0.16", "0.17.0rc1", "0.18"]
ORDER += ["0.18.1", "0.25.4", "0.26.0.dev1", "0.26.0rc1", "0.26.0rc2", "0.26.0rc", "0.26", "0.100", "1.0rc1", "1"]


def test_versions_are_in_order() -> None:
    """Catches versions compared as text (0.9 after 0.10) and release candidates after their release."""
    places = [Version.parse(text) for text in ORDER]
    assert places == sorted(places)
    assert len(set(places)) == len(places)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(0, 9), st.integers(0, 3))
def test_candidates_come_before_their_release(release: list[int], number: int, zeros: int) -> None:
    """Catches a release without its trailing zeros taken for another one, in any spelling of a candidate."""
    text = ".".join(map(str, release))
    place = Version.parse(text)
    assert Version.parse("v" + text + ".0" * zeros) == place
    candidate = Version.parse(f"{text}rc{number}")
    assert Version.parse(f"{text}.RC{number}") == candidate < Version.parse(f"{text}rc{number + 1}") < place
    assert candidate < Version.parse(f"{text}rc") < place < Version.parse(f"{text}.post1") < Version.parse(f"{text}.1")


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
    assert (target.engines, target.version) == (engines, version)
    assert parse_target(str(target)) == target


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("vllm", "did you mean vllm-ascend?"),
        ("vllm_ascend", "did you mean vllm-ascend?"),
        ("vllm-ascend==0.18", "did you mean vllm-ascend@0.18?"),
        ("mindie2.2", "did you mean mindie@2.2?"),
        ("", "known are vllm-ascend, mindie, both"),
        ("tensorrt", "known are vllm-ascend, mindie, both"),
        ("both@0.18", "give both without a version"),
        ("vllm-ascend@", "give a version such as 0.18"),
        ("mindie@newest", "give a version such as 2.2"),
        ("mindie@2.2@1", "give a version such as 2.2"),
    ],
)
def test_what_is_no_target_is_refused_with_a_hint(text: str, hint: str) -> None:
    """Catches a traceback, or a misspelt target answered with an empty, and therefore permissive, set of rules."""
    with pytest.raises(UserError, match="--engine") as caught:
        parse_target(text, "--engine")
    assert hint in str(caught.value)
