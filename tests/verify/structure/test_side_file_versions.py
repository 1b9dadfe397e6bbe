"""Files beside the weights that only some versions of transformers read, and with them only some engine versions."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.compiled_folder import make_content
from vlqc.families.qwen2 import QWEN2
from vlqc.families.qwen3 import QWEN3
from vlqc.families.registry import FAMILIES
from vlqc.targets.target import ENGINES
from vlqc.targets.versions import unread_in
from vlqc.verify import verify_folder

NEW_CLASS = {"tokenizer_config.json": {"tokenizer_class": "TokenizersBackend"}}
NEW_LIST = {"tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": ["<a>"]}}
NESTED = {"processor_config.json": {"image_processor": {"patch_size": 14}}, "preprocessor_config.json": None}
TEMPLATE = {"tokenizer_config.json": {"chat_template": "x"}, "chat_template.json": None, "chat_template.jinja": None}
PIL = {"preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessorPil"}}
FROM_5 = ["vLLM Ascend 0.19.1rc1 and later"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    make_content().write(folder / "vllm")
    make_content(mindie=True).write(folder / "mindie")
    return folder


def changed(folder: Path, files: dict[str, Any], target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).hardlink_to(path)
    for name, content in files.items():
        (target / name).unlink(missing_ok=True)
        if content is not None:
            (target / name).write_text(json.dumps(content))
    return target


@pytest.mark.parametrize(
    ("files", "loads_in", "refused_by", "accepted_by"),
    [
        (NEW_CLASS, FROM_5, ("vllm-ascend@0.18", "mindie"), ("vllm-ascend@0.19.1rc1", "vllm-ascend")),
        (NEW_LIST, FROM_5, ("vllm-ascend@0.10.2rc2", "mindie@2.2"), ("vllm-ascend@0.23",)),
        (NESTED, ["vLLM Ascend 0.11 and later"], ("vllm-ascend@0.10.2rc2", "mindie@2.2"), ("vllm-ascend@0.18",)),
        (TEMPLATE, ["vLLM Ascend 0.10.2rc2 and later"], ("mindie@2.2",), ("vllm-ascend@0.10.2rc2",)),
        (PIL, FROM_5, ("vllm-ascend@0.18", "mindie@2.2"), ("vllm-ascend@0.24",)),
    ],
    ids=["class", "list", "nested", "template", "pil"],
)
def test_versions_that_read_all_files(
    folders: Path,
    tmp_path: Path,
    files: dict[str, Any],
    loads_in: list[str],
    refused_by: tuple[str, ...],
    accepted_by: tuple[str, ...],
) -> None:
    """Catches a version that is said to load a folder whose tokenizer, settings or template it cannot read, and a
    version that is refused although it can."""
    places = {kind: changed(folders / kind, files, tmp_path / kind) for kind in ("vllm", "mindie")}
    assert verify_folder(places["vllm"]).facts["loads in"] == loads_in
    assert verify_folder(places["mindie"]).facts["loads in"] == ["no known engine version"]
    for engine in (*refused_by, *accepted_by):
        result = verify_folder(places["vllm" if engine.startswith("vllm") else "mindie"], engine=engine)
        named = [fault for fault in result.faults if fault.where in files and "transformers" in fault.why]
        assert bool(named) == (engine in refused_by), engine


def test_settings_in_the_processor_file_are_settings(folders: Path, tmp_path: Path) -> None:
    """Catches a warning about a missing preprocessor_config.json where engines read processor_config.json."""
    result = verify_folder(changed(folders / "vllm", NESTED, tmp_path / "out"), engine="vllm-ascend@0.18")
    assert [warning.what for warning in result.warnings] == []


@pytest.mark.parametrize(
    ("files", "family", "faults"),
    [
        ({"tokenizer.json": {"model": {"merges": [["a", "b"]]}}}, QWEN2, 1),  # transformers 4.43.1
        ({"tokenizer.json": {"model": {"merges": ["a b"]}}}, QWEN2, 0),
        ({"tokenizer.json": {"model": {"merges": [["a", "b"]]}}}, QWEN3, 0),  # 4.51.0
        ({"chat_template.jinja": "x"}, QWEN2, 1),
        ({"chat_template.jinja": "x"}, QWEN3, 0),
        ({"chat_template.json": {"chat_template": "x"}}, QWEN3, 1),
        ({"chat_template.json": {"chat_template": "x"}, "tokenizer_config.json": {"chat_template": "x"}}, QWEN3, 0),
    ],
)
def test_text_models_in_mindie(tmp_path: Path, files: dict[str, Any], family: Any, faults: int) -> None:
    """Catches a tokenizer or template of a text model that the version of transformers in MindIE does not read."""
    from vlqc.targets.side_files import unread_files

    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    ((_, version),) = next(each for each in ENGINES if each.name == "mindie").transformers_versions(family)
    assert len(unread_files(tmp_path, family, version)) == faults


def test_versions_of_transformers_are_stated() -> None:
    """Catches an engine's first version of a family without a version of transformers."""
    for engine in ENGINES:
        for family in FAMILIES:
            first, versions = engine.first_version(family), engine.transformers_versions(family)
            if first is not None:
                marker: Any = [object()]
                unread: Any = {
                    (since, before): marker
                    for (since, _), before in zip(versions, [*(since for since, _ in versions[1:]), None], strict=True)
                }
                assert unread_in(first, unread) is marker
