"""vlqc.targets.target: targets as text."""

import ast
from pathlib import Path

import pytest

import vlqc
from vlqc.errors import UserError
from vlqc.targets.target import ENGINES, find_layout, parse_target, written_for


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


def test_only_the_list_of_engines_imports_them() -> None:
    """Catches a module with the rules of one engine, which a third engine would have to repeat."""
    root = Path(vlqc.__file__).parent
    modules = {type(engine).__module__ for engine in ENGINES}
    allowed = {root / "targets" / "target.py"}
    for path in sorted(set(root.rglob("*.py")) - allowed):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.module in modules), f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    ("files", "config", "layout", "engines"),
    [
        (["quant_model_description.json"], {}, "vllm-ascend", "vllm-ascend"),
        (["quant_model_description.json"], {"quantize": "w8a8"}, "vllm-ascend", "both"),
        (["quant_model_description_w8a8.json"], {"quantize": "w8a8"}, "mindie", "mindie"),
        (["quant_model_description_w8a8.json", "quant_model_description.json"], {}, "vllm-ascend", "vllm-ascend"),
    ],
)
def test_the_layout_of_a_folder(files: list[str], config: dict[str, str], layout: str, engines: str) -> None:
    """Catches a folder read in the layout of the wrong engine, or verified for one that it was not written for."""
    found = find_layout(["config.json", *files])
    assert found is not None and found[0].name == layout and found[1] in files
    assert str(written_for(found[0], config)) == engines
    assert find_layout(["config.json", "model.safetensors"]) is None
