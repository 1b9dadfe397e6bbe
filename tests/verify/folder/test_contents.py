"""Verification of a folder's files: shards, index, header, arbitrary bytes, and the result itself."""

import ast
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

import vlqc
from tests.support.compiled_folder import make_content
from tests.support.damaged_folder import Q, edit, edit_header, texts
from tests.support.tensors import safetensors_bytes, stored
from vlqc.errors import InternalError, UserError
from vlqc.verify import require_valid, verify_folder
from vlqc.verify.float_match.scale_fit import Scales

WEIGHTS = "quant_model_weight_w8a8.safetensors"
INDEX = WEIGHTS + ".index.json"


# ---- damage to the files ---------------------------------------------------------------------------------------------


def overlap(header: dict[str, dict[str, object]]) -> None:
    header["a"] = header[f"{Q}.deq_scale"] | {"data_offsets": header[f"{Q}.bias"]["data_offsets"], "shape": [32]}


FILE_DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "files", WEIGHTS),
    "cut inside the header": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:50]), "files", WEIGHTS),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "files", WEIGHTS),
    "a huge header": (lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 62) + b"{}"), "files", str(1 << 62)),
    "bytes behind the end": (lambda f: (f / WEIGHTS).open("ab").write(b"12"), "files", WEIGHTS),
    "no JSON in the header": (lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 4) + b"{{{{"), "files", WEIGHTS),
    "a header of nested lists": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000),
        "files",
        WEIGHTS,
    ),
    "overlapping tensors": (lambda f: edit_header(f / WEIGHTS, overlap), "files", f"{Q}.bias"),
    "a shape beyond all memory": (
        lambda f: edit_header(f / WEIGHTS, lambda h: h[f"{Q}.weight"].update(shape=[1 << 60, 1 << 60])),
        "files",
        f"{Q}.weight",
    ),
    "a negative size": (
        lambda f: edit_header(f / WEIGHTS, lambda h: h[f"{Q}.weight"].update(shape=[-64, -64])),
        "files",
        f"{Q}.weight",
    ),
    "an unknown dtype": (
        lambda f: edit_header(f / WEIGHTS, lambda h: h[f"{Q}.weight"].update(dtype="I4")),
        "files",
        "I4",
    ),
    "an entry that is a list": (lambda f: edit_header(f / WEIGHTS, lambda h: h.update(a=[1])), "files", "'a'"),  # type: ignore[call-arg]
    "a stray weight file": (lambda f: (f / "model.safetensors").write_bytes(b""), "files", "model.safetensors"),
    "a stray index": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "files",
        "model.safetensors.index",
    ),
    "a file named after another type": (
        lambda f: (f / WEIGHTS).rename(f / "quant_model_weight_w4a8_dynamic.safetensors"),
        "files",
        "w4a8_dynamic",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "files", "quant_model_weight"),
    "no config": (lambda f: (f / "config.json").unlink(), "config", "config.json"),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), "config", "config.json"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), "config", "config.json"),
    "no description": (
        lambda f: (f / "quant_model_description.json").unlink(),
        "description",
        "quant_model_description.json",
    ),
    "a tokenizer cut off": (lambda f: (f / "tokenizer.json").write_text('{"model": {'), "files", "tokenizer.json"),
    "a setting that is no JSON": (
        lambda f: (f / "preprocessor_config.json").write_text("nope"),
        "files",
        "preprocessor",
    ),
    "a setting that is a folder": (lambda f: (f / "added_tokens.json").mkdir(), "files", "added_tokens.json"),
    "a key twice": (
        lambda f: (f / "quant_model_description.json").write_text('{"version": "1.0.0", "version": "1.0.0"}'),
        "description",
        "'version'",
    ),
    "a number that is NaN": (lambda f: (f / "config.json").write_text('{"a": NaN}'), "config", "NaN"),
    "a config of 5 GiB": (lambda f: os.truncate(f / "config.json", 5 << 30), "config", str(5 << 30)),
    "a description of 5 GiB": (
        lambda f: os.truncate(f / "quant_model_description.json", 5 << 30),
        "description",
        str(5 << 30),
    ),
}


@pytest.mark.parametrize("damage", FILE_DAMAGES)
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    """Catches a traceback, or no fault, for files that a broken disk, copy or tool leaves behind."""
    change, check, named = FILE_DAMAGES[damage]
    folder = make_content().write(tmp_path / "out")
    change(folder)
    result = verify_folder(folder)
    assert any(finding.check == check and named in f"{finding.where} {finding.what}" for finding in result.faults), (
        texts(result)
    )


PART = "quant_model_weight_w8a8-00002-of-00003.safetensors"
INDEX_DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no index": (lambda f: (f / INDEX).unlink(), "index", INDEX),
    "a wrong total_size": (
        lambda f: edit(f / INDEX, lambda i: i["metadata"].update(total_size=1)),
        "index",
        "total_size",
    ),  # type: ignore[attr-defined]
    "a tensor not listed": (
        lambda f: edit(f / INDEX, lambda i: i["weight_map"].pop("lm_head.weight")),
        "index",
        "'lm_head.weight'",
    ),  # type: ignore[attr-defined]
    "a tensor in the wrong file": (
        lambda f: edit(f / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": "x"})),  # type: ignore[attr-defined]
        "index",
        "'lm_head.weight' in 'x'",
    ),
    "a tensor that is nowhere": (
        lambda f: edit(f / INDEX, lambda i: i["weight_map"].update({"a": PART})),  # type: ignore[attr-defined]
        "index",
        "'a'",
    ),
    "no weight_map": (lambda f: (f / INDEX).write_text("{}"), "index", "weight_map"),
    "a missing part": (lambda f: (f / PART).unlink(), "files", "2 of 3"),
    "a part of another set": (
        lambda f: (f / PART).rename(f / "quant_model_weight_w8a8-00002-of-00004.safetensors"),
        "files",
        "00002-of-00004",
    ),
    "a tensor in two files": (
        lambda f: (f / "quant_model_weight_w8a8-00001-of-00003.safetensors").write_bytes((f / PART).read_bytes()),
        "files",
        "00001-of-00003",
    ),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGES)
def test_damaged_shards_are_named(tmp_path: Path, damage: str) -> None:
    """Catches an index with which engines would load missing or duplicate tensors."""
    change, check, named = INDEX_DAMAGES[damage]
    content = make_content()
    content.parts = 3
    folder = content.write(tmp_path / "out")
    change(folder)
    result = verify_folder(folder)
    assert any(fault.check == check and named in f"{fault.where} {fault.what}" for fault in result.faults), texts(
        result
    )


@given(position=st.integers(0, 60_000), junk=st.binary(min_size=1, max_size=40), cut=st.booleans())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_make_it_raise(tmp_path: Path, position: int, junk: bytes, cut: bool) -> None:
    """Catches a traceback (or a huge allocation) on random damage to header or data."""
    folder = tmp_path / "out"
    if not folder.exists():
        make_content().write(folder)
    whole = safetensors_bytes(make_content().tensors, {"format": "pt"})
    end = whole[position + len(junk) :] if not cut else b""
    (folder / WEIGHTS).write_bytes(whole[:position] + junk + end)
    result = verify_folder(folder)
    assert result.examined["files"] > 0
    assert not cut or not result.ok


def test_a_manifest_beyond_memory(tmp_path: Path) -> None:
    """Catches a manifest that is read whole whatever its size: a sparse file needs no disk space."""
    folder = make_content().write(tmp_path / "out")
    (folder / "MANIFEST.json").touch()
    os.truncate(folder / "MANIFEST.json", 5 << 30)
    assert str(5 << 30) in texts(verify_folder(folder))


@pytest.mark.parametrize(("size", "check"), [(6_400, "tensors"), (10**9, "config")])
def test_sizes_beyond_memory_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, check: str
) -> None:
    """Catches arrays of the sizes in a damaged config.json, which no stored tensor has."""
    content = make_content()
    source = content.write_source(tmp_path / "float")
    folder = content.write(tmp_path / "out")
    edit(folder / "config.json", lambda config: config["vision_config"].update(hidden_size=size))
    sizes: list[int] = []
    monkeypatch.setattr(Scales, "ones", sizes.append)
    result = verify_folder(folder, model_path=source)
    assert any(fault.check == check for fault in result.faults) and not sizes


# ---- no faults ------------------------------------------------------------------------------------------------------


def test_missing_side_files_are_warnings(tmp_path: Path) -> None:
    """Catches exit code 1 for a folder made from ready tensors, whose model has no tokenizer."""
    content = make_content()
    content.side_files = False
    result = verify_folder(content.write(tmp_path / "out"))
    assert result.ok
    assert [finding.where for finding in result.warnings] == [
        "a tokenizer",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ]


def test_a_nested_config_is_fine_for_vllm_ascend(tmp_path: Path) -> None:
    """Catches sizes read from the wrong level of a nested config."""
    content = make_content()
    outer = ("architectures", "model_type", "torch_dtype", "vision_config", "tie_word_embeddings")
    inner = [key for key in content.config if key not in outer and not key.endswith("_token_id")]
    text = {key: content.config.pop(key) for key in inner}
    content.config["text_config"] = text
    assert texts(verify_folder(content.write(tmp_path / "out"))) == ""


# ---- bad input, result, independence ---------------------------------------------------------------------------------


def test_other_folders_are_user_errors(tmp_path: Path) -> None:
    """Catches a traceback, or a result with 300 missing tensors, for a wrong path."""
    content = make_content()
    with pytest.raises(UserError, match="nowhere"):
        verify_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="--model_path"):
        verify_folder(content.write_source(tmp_path / "float"))
    with pytest.raises(UserError, match="--save_directory"):
        verify_folder(tmp_path)
    folder = content.write(tmp_path / "out")
    with pytest.raises(UserError, match="vllm-ascend"):
        verify_folder(folder, engine="vllm_ascend")
    with pytest.raises(UserError, match="--model_path"):
        verify_folder(folder, calib_images=tmp_path)
    with pytest.raises(UserError, match=r"\*.safetensors"):
        verify_folder(folder, model_path=tmp_path / "nowhere")


def test_the_result_is_readable_and_repeatable(tmp_path: Path) -> None:
    """Catches a fault that is not printed, or JSON that differs between two runs."""
    content = make_content()
    content.tensors.pop(f"{Q}.quant_bias")
    folder = content.write(tmp_path / "out")
    result = verify_folder(folder)
    assert result.to_json() == verify_folder(folder).to_json()
    read = json.loads(result.to_json())
    assert read["ok"] is False
    assert read["faults"][0]["where"] == Q
    assert {"check": "tensors", "examined": 141, "faults": 1, "warnings": 0} in read["checks"]
    console = Console(width=200, record=True, quiet=False, file=(tmp_path / "screen").open("w"))
    result.render(console)
    shown = console.export_text()
    assert "FAIL" in shown
    assert f"{Q}.quant_bias" in shown
    assert result.faults[0].fix and f"what to do: {result.faults[0].fix}" in shown


def test_many_faults_are_abbreviated_in_print_only(tmp_path: Path) -> None:
    """Catches many faults of one check that hide those of others."""
    content = make_content()
    for name in [name for name in content.tensors if name.endswith(".weight_offset")]:
        content.tensors[name] = stored(np.ones(content.tensors[name].shape), "F32")
    content.tensors |= {f"stray.{number}": stored(np.ones(1), "F32") for number in range(30)}
    result = verify_folder(content.write(tmp_path / "out"))
    console = Console(width=200, record=True, file=(tmp_path / "screen").open("w"))
    result.render(console)
    shown = console.export_text()
    assert "10 more in [tensors]" in shown
    assert "weight_offset" in shown
    assert sum(finding.check == "tensors" for finding in result.faults) == 30


def test_require_valid(tmp_path: Path) -> None:
    """Catches a compiled folder with faults that is passed on without an error."""
    content = make_content()
    require_valid(content.write(tmp_path / "good"))
    content.tensors.pop("model.norm.weight")
    with pytest.raises(InternalError, match=r"model\.norm"):
        require_valid(content.write(tmp_path / "bad"))


def test_verification_is_independent_of_the_compiler() -> None:
    """Catches an import, direct or through other vlqc modules, of the emitter or the passes."""
    root = Path(vlqc.__file__).parent
    imported: set[str] = set()
    waiting = [
        ".".join(path.relative_to(root.parent).with_suffix("").parts) for path in (root / "verify").rglob("*.py")
    ]
    while waiting:
        module = waiting.pop().removesuffix(".__init__")
        if module in imported or not module.startswith("vlqc."):
            continue
        imported.add(module)
        path = root.joinpath(*module.split(".")[1:])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not file.exists():
            continue  # a name in a module, not a module
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                waiting += [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
    assert {
        "vlqc.verify.structure.structure",
        "vlqc.targets.rules",
        "vlqc.frontend.sequential",
        "vlqc.verify.loader",
    } <= imported
    assert [module for module in sorted(imported) if module.startswith(("vlqc.emit", "vlqc.passes"))] == []
