"""vlqc/docs/formats.md against what the writer writes: every file, tensor and key, in every scheme and layout."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vlqc
from tools.bench.scheme_table import LOW_BIT
from tools.checkpoints import outlier_checkpoint as outliers
from tools.checkpoints.families import Shape

pytestmark = pytest.mark.slow

PAGE = (Path(vlqc.__file__).parent / "docs" / "formats.md").read_text(encoding="utf-8")
VLLM, MINDIE = "vLLM Ascend", "MindIE"
SHAPE = Shape(
    layers=1,
    hidden=256,
    intermediate=256,
    heads=4,
    vision_layers=1,
    vision_hidden=128,
    vision_intermediate=136,
    vocabulary=64,
)
CORRECTED = (
    "insert-observers,assign-precision,quantize-activations,quantize-weights{method=round},"
    "lower-linears{correct_bias=true}"
)
GROUP, ROW_PARALLEL = 64, ("o_proj", "down_proj", "attn.proj")
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name: dtype of the source, options
    "static": ("bfloat16", {}),
    "static, mindie": ("float16", {"mindie_format": True}),
    "static, float16": ("float16", {}),
    "static, float32": ("float32", {}),
    "static, vllm-ascend": ("bfloat16", {"target": "vllm-ascend"}),
    "dynamic": ("bfloat16", {"is_dynamic": True}),
    "dynamic, mindie": ("bfloat16", {"is_dynamic": True, "mindie_format": True}),
    "mix, float inputs": ("bfloat16", {"scheme": "w8a8_mix", "float_as": "w8a16"}),
    "mix, float16": ("float16", {"scheme": "w8a8_mix"}),
    "4 bits": ("bfloat16", {**LOW_BIT, "group_size": GROUP}),
    "4 bits, all": ("float16", {**LOW_BIT, "group_size": GROUP, "w4a8_scope": "all"}),
    "4 bits, mindie": ("bfloat16", {**LOW_BIT, "group_size": GROUP, "mindie_format": True}),
    "shift": ("bfloat16", {"shift": True}),
    "shift, mindie": ("bfloat16", {"shift": True, "mindie_format": True}),
    "corrected bias": ("bfloat16", {"pipeline": CORRECTED, "weight_method": "auto"}),
    "parts": ("bfloat16", {"part_file_size": 1}),
    "rotated, tied": ("float16", {"rotate": "all"}),
    "int8 cache": ("bfloat16", {"kv_cache": "int8"}),
}


@dataclass(frozen=True)
class Row:
    """One row of a table: its cells by the table's header, in lower case."""

    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column]

    def __hash__(self) -> int:
        return hash(tuple(self.cells.values()))

    @property
    def layouts(self) -> tuple[str, ...]:
        return (VLLM, MINDIE) if self.cells.get("layout", "both") == "both" else (self.cells["layout"],)


@dataclass(frozen=True)
class Compiled:
    """A compiled folder, its source, and the options that made it."""

    source: Path
    folder: Path
    options: dict[str, Any]
    description: dict[str, Any]
    tensors: dict[str, Tensor]
    floats: dict[str, Tensor]

    @property
    def layout(self) -> str:
        return MINDIE if self.options.get("mindie_format") else VLLM

    @property
    def dtype(self) -> str:
        return str(json.loads((self.folder / "config.json").read_text())["torch_dtype"])

    @property
    def type_name(self) -> str:
        return str(self.description["model_quant_type"]).lower()


def tables(*headers: str) -> list[Row]:
    """All rows of the tables whose first header cells are these."""
    matching = []
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines())
        if tuple(head[: len(headers)]) == headers:
            matching += [Row(dict(zip(head, row, strict=True))) for row in rows]
    assert matching
    return matching


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    """Every case, by its name."""
    root, folders = tmp_path_factory.mktemp("formats"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlqc.emit.folder_writer.GIB", 2**18)  # so that a model this small needs several files
        for name, (dtype, options) in CASES.items():
            source, folder = root / f"float-{dtype}", root / name
            config = outliers.make(source, dtype=dtype, shape=SHAPE, tied=dtype == "float16")
            if dtype == "float32":
                (source / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
            samples = outliers.random_samples(config, 2)
            arguments = {"weight_method": "round", **options}
            vlqc.compile(model_path=source, save_directory=folder, samples=samples, **arguments)
            (described,) = folder.glob("quant_model_description*.json")
            weights = [load_file(file) for file in folder.glob("*.safetensors")]
            folders[name] = Compiled(
                source,
                folder,
                options,
                json.loads(described.read_text()),
                {key: tensor for file in weights for key, tensor in file.items()},
                load_file(source / "model.safetensors"),
            )
    return folders


def test_files(compiled: dict[str, Compiled]) -> None:
    """Catches a file that the page does not list, or lists for the other layout, and one that is never written."""
    rows, seen = tables("file"), set()
    for name, case in compiled.items():
        for file in case.folder.iterdir():
            row = next(row for row in rows if re.fullmatch(pattern(row["file"], case), file.name))
            assert case.layout in row.layouts, f"{name}: {file.name}"
            assert row["file"] != "`*`" or (case.source / file.name).read_bytes() == file.read_bytes()
            seen.add(row)
    assert seen == set(rows)


def pattern(cell: str, case: Compiled) -> str:
    escaped = re.escape(cell.strip("`")).replace("TYPE", case.type_name).replace("NNNNN", r"\d{5}")
    return escaped.replace(r"\*", ".*")


def test_tensors(compiled: dict[str, Compiled]) -> None:
    """Catches a tensor with another name, dtype, shape or value than the page says, and a row that never occurs."""
    rows, seen = tables("scheme", "tensor"), set()
    for name, case in compiled.items():
        for layer in sorted(layers_of(case)):
            scheme = case.description[f"{layer}.weight"]
            expected = {row["tensor"].strip("`").replace("LAYER", layer): row for row in rows_of(case, layer, rows)}
            stored = {key for key in case.tensors if key.rpartition(".")[0] == layer}
            assert stored - cache_rows(case, layer).keys() == expected.keys(), (name, layer)
            for key, row in expected.items():
                check_tensor(case, key, row)
                assert case.description[key] == ("FLOAT" if key.endswith(".bias") else scheme), key
                seen.add(row)
    assert seen == set(rows)


def cache_rows(case: Compiled, layer: str) -> dict[str, Row]:
    """Tensors of the cache of a key or value projection -> their rows."""
    if "kv_cache" not in case.options or not layer.endswith(("k_proj", "v_proj")):
        return {}
    return {row["cache tensor"].strip("`").replace("PROJECTION", layer): row for row in tables("cache tensor")}


def test_cache_tensors(compiled: dict[str, Compiled]) -> None:
    """Catches scales of a cache with another name, dtype, shape or word than the page says."""
    case = compiled["int8 cache"]
    rows = {key: row for layer in layers_of(case) for key, row in cache_rows(case, layer).items()}
    assert rows.keys() == {key for key in case.tensors if ".kv_cache_" in key} and len(rows) == 4
    for key, row in rows.items():
        outputs = len(case.floats[f"{key.rpartition('.')[0]}.weight"])
        assert str(case.tensors[key].dtype) == f"torch.{row['dtype']}" and row["shape"] == "[C]"
        assert list(case.tensors[key].shape) == [outputs] and case.description[key] == "C8"
        if row["value"] == "0":
            assert not case.tensors[key].any()
        else:
            assert bool((case.tensors[key] > 0).all()) and torch.equal(
                case.tensors[key].bfloat16().float(), case.tensors[key]
            )


def layers_of(case: Compiled) -> set[str]:
    """Linear layers and embeddings of the source."""
    return {key.removesuffix(".weight") for key, tensor in case.floats.items() if tensor.ndim == 2}


def rows_of(case: Compiled, layer: str, rows: list[Row]) -> Iterator[Row]:
    """The rows that apply to a layer: its scheme's, under the condition in their presence."""
    holds = {
        "": True,
        "if the source has it": f"{layer}.bias" in case.floats,
        "if dt is bfloat16": case.dtype == "bfloat16",
        "if dt is float16": case.dtype == "float16",
        "in the vLLM Ascend layout": case.layout == VLLM,
        "in the MindIE layout": case.layout == MINDIE,
        "row-parallel layers": layer.endswith(ROW_PARALLEL),
        "column-parallel layers": not layer.endswith(ROW_PARALLEL),
    }
    for row in rows:
        conditions = row["presence"].removeprefix("MUST").strip().split(", ")
        if row["scheme"] == case.description[f"{layer}.weight"] and all(holds[each] for each in conditions):
            yield row


def check_tensor(case: Compiled, key: str, row: Row) -> None:
    tensor, layer = case.tensors[key], key.rpartition(".")[0]
    outputs, columns = case.floats[f"{layer}.weight"].shape
    dtype = case.dtype if row["dtype"] == "dt" else row["dtype"]
    assert str(tensor.dtype) == f"torch.{dtype}", key
    shape = row["shape"]
    if shape == "source":
        assert tensor.shape == case.floats[key].shape, key
    else:
        sizes = {"N/2": outputs // 2, "N": outputs, "K": columns, "K/G": columns // GROUP, "1": 1, "16": 16}
        assert list(tensor.shape) == [sizes[size] for size in shape.strip("[]").split(", ")], key
    value = row["value"]
    if bounds := re.match(r"(?:integral, )?(-?\d+)\.\.(\d+)", value):
        assert int(bounds[1]) <= float(tensor.min()) and float(tensor.max()) <= int(bounds[2]), key
    if "representable in dt" in value:
        assert torch.equal(tensor.to(getattr(torch, case.dtype)).to(tensor.dtype), tensor), key
    if "integral" in value:
        assert torch.equal(tensor, tensor.round()), key
    if value == "0":
        assert not tensor.any(), key


def test_norms(compiled: dict[str, Compiled]) -> None:
    """Catches a norm tensor that the page does not list, or lists for another layout."""
    rows, seen = tables("tensor"), set()
    for case in compiled.values():
        norms = {
            key.removesuffix(".weight") for key, tensor in case.floats.items() if tensor.ndim == 1 and "bias" not in key
        }
        for norm in norms:
            shifted = f"{norm}.bias" in case.tensors
            expected = {}
            for row in rows:
                if case.layout in row.layouts and (row["presence"] == "MUST" or shifted):
                    expected[row["tensor"].strip("`").replace("NORM", norm)] = row
            assert {key for key in case.tensors if key.startswith(f"{norm}.")} == expected.keys()
            for key, row in expected.items():
                word = "FLOAT" if row["word in the description"] == "FLOAT" else case.description["model_quant_type"]
                assert case.description[key] == word, key
                assert case.tensors[key].shape == case.floats[f"{norm}.weight"].shape, key
                assert str(case.tensors[key].dtype) == f"torch.{case.dtype}", key
                seen.add(row)
    assert seen == set(rows)


def test_no_other_tensors(compiled: dict[str, Compiled]) -> None:
    """Catches a tensor that belongs to no layer of the source, a tied head written twice, and a wrong description."""
    for case in compiled.values():
        owners = {key.rpartition(".")[0] for key in case.floats} | untied_heads(case)
        assert {key.rpartition(".")[0].removesuffix(".module") for key in case.tensors} == owners
        assert {key for key in case.description if "." in key} == case.tensors.keys()


def untied_heads(case: Compiled) -> set[str]:
    return {"lm_head"} if case.options.get("rotate") == "all" else set()


def test_description_keys(compiled: dict[str, Compiled]) -> None:
    """Catches a key of the description that the page does not list, lists for another layout, or that never occurs."""
    rows = {row["key"].strip("`"): row for row in tables("key")}
    covered = set()
    for case in compiled.values():
        keys = {key for key in case.description if "." not in key}
        assert all(case.layout in rows[key].layouts for key in keys)
        assert {key for key, row in rows.items() if row["presence"] == "MUST" and case.layout in row.layouts} <= keys
        assert ("group_size" in keys) == ("W4A8_DYNAMIC" in case.description.values())
        assert ("quant_bias_correction" in keys) == ("pipeline" in case.options)
        assert ("kv_cache_type" in keys) == ("kv_cache" in case.options)
        covered |= keys
    assert covered == rows.keys()


def test_config_keys(compiled: dict[str, Compiled]) -> None:
    """Catches a key of config.json that is changed without being listed, and a listed one that never changes."""
    listed = {row["config key"].strip("`") for row in tables("config key")}
    covered = set()
    for case in compiled.values():
        source, config = (nested(path / "config.json") for path in (case.source, case.folder))
        changed = {key for key in {*source, *config} if source.get(key) != config.get(key)}
        assert changed <= listed
        both = (
            case.layout == MINDIE or case.options.keys() <= {"part_file_size", "rotate"} or "pipeline" in case.options
        )
        assert ("quantize" in config) == both
        assert ("quantization_config" in config) == (case.layout == MINDIE)
        vision = any(key.startswith("visual.") and word != "FLOAT" for key, word in case.description.items())
        assert ("vision_config.quantize" in config) == (both and vision)
        assert config.get("dtype", case.dtype) == config["torch_dtype"] == case.dtype
        covered |= changed
    assert covered == listed


def nested(file: Path) -> dict[str, Any]:
    """config.json, the keys of its vision part as `vision_config.KEY`."""
    config = json.loads(file.read_text())
    vision = config.pop("vision_config")
    return config | {f"vision_config.{key}": value for key, value in vision.items()}
