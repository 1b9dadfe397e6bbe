"""Fuzz targets for `vlqc verify`: damaged compiled folders."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.support.compiled_folder import make_content
from tests.support.float_model import CONFIG
from tests.support.fuzz.damage import as_json, damaged_json, values
from tests.support.fuzz.files import put
from tests.support.fuzz.verdict import demand
from vlqc.verify import verify_folder
from vlqc.verify.loader import read_description

WEIGHTS_FILE = "quant_model_weight_w8a8.safetensors"


@cache
def compiled_config() -> dict[str, Any]:
    return json.loads(json.dumps(CONFIG))  # type: ignore[no-any-return]


@cache
def compiled_files(folder: Path) -> dict[str, bytes]:
    make_content().write(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def folder_cases() -> st.SearchStrategy[tuple[str, Any]]:
    parts = ("dtype", "shape", "data_offsets")
    return st.one_of(
        damaged_json(compiled_config()).map(lambda it: ("config.json", as_json(it))),
        st.tuples(st.just("header"), st.tuples(st.integers(0, 140), st.sampled_from(parts)), values()),
        st.tuples(st.just("word"), st.integers(0, 140), values()),
        damaged_json({"a.weight": "FLOAT"}, names=("\ud800.weight", "\x1b[2J.bias")).map(lambda it: ("words", it)),
        st.tuples(st.just("bytes"), st.integers(0, 60_000), st.binary(min_size=1, max_size=40)),
    )  # fmt: skip


def check_folder(case: tuple[Any, ...], folder: Path) -> bool:
    """`vlqc verify` returns a result that can be encoded, and finds damaged headers and descriptions."""
    target = folder / "out"
    files = compiled_files(target)
    kind = case[0]
    if kind == "config.json":
        name, content = case
        wrong = False
    elif kind == "header":
        name, wrong = WEIGHTS_FILE, True
        whole = files[name]
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length])
        entry = header[list(header)[1 + case[1][0] % (len(header) - 1)]]
        wrong = entry[case[1][1]] != case[2]
        entry[case[1][1]] = case[2]
        text = as_json(header)
        content = len(text).to_bytes(8, "little") + text + whole[8 + length :]
    elif kind == "word":
        name = "quant_model_description.json"
        described = json.loads(files[name])
        key = sorted(described)[case[1] % len(described)]
        wrong = described[key] != case[2]
        described[key] = case[2]
        content = as_json(described)
    elif kind == "words":
        name, wrong = "quant_model_description.json", True
        content = as_json(case[1] if isinstance(case[1], list) else json.loads(files[name]) | dict(case[1]))
        wrong = content != as_json(json.loads(files[name]))
    else:
        name, wrong = WEIGHTS_FILE, False
        whole = files[name]
        content = whole[: case[1]] + case[2] + whole[case[1] + len(case[2]) :]
    put(target / name, content)
    try:
        report = verify_folder(target)
        report.to_json().encode()
        if kind == "word":
            read_description(target)
    finally:
        put(target / name, files[name])
    demand(not wrong or not report.ok, f"{case[:2]} was not found")
    return report.ok
