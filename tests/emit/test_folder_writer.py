"""vlqc.emit.folder_writer: tensors, description and config.json of a folder, and the copied side files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.support import small_stage, tiny
from vlqc.emit.folder_writer import FolderWriter
from vlqc.emit.stage_tensors import EmittedTensor, float_tensor, header_bytes, stage_tensors
from vlqc.errors import InternalError, UserError
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.emitted_dtype import RequestedDtype, emitted_dtype
from vlqc.options.options import Options
from vlqc.passes.lower_linears import LowerLinears
from vlqc.targets.schemes import Scheme
from vlqc.targets.vllm_ascend import VLLM_ASCEND

QKV, LAYER = "visual.blocks.0.attn.qkv", "model.layers.0.self_attn.q_proj"


def emit(
    source: Path, folder: Path, *quantized: str, both: bool = True, part_file_size: int | None = None
) -> FolderWriter:
    """Writes the whole checkpoint; the layers named become W8A8, with all integers 1."""
    folder.mkdir()
    checkpoint = Checkpoint(source)
    options = Options.without_paths(target="both" if both else "vllm-ascend", part_file_size=part_file_size)
    writer = FolderWriter(folder, checkpoint, options)
    for layer in quantized:
        integers = torch.ones(checkpoint.shape(f"{layer}.weight"), dtype=torch.int8)
        writer.add([EmittedTensor(f"{layer}.weight", integers, Scheme.W8A8)])
    writer.copy_rest(checkpoint.names)
    writer.finish()
    return writer


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def json_in(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_every_tensor_is_written_once_with_its_scheme(tmp_path: Path) -> None:
    """Catches a lost tensor, a description with a missing or surplus entry, and a changed value."""
    emit(tiny.TINY, tmp_path / "out", QKV, LAYER)
    source, emitted = load_file(tiny.TINY / "model.safetensors"), weights(tmp_path / "out")
    description = json_in(tmp_path / "out" / "quant_model_description.json")
    assert description.pop("version") == "1.0.0"
    assert description.pop("model_quant_type") == "W8A8"
    assert description.keys() == emitted.keys() == source.keys()
    for name, tensor in emitted.items():
        quantized = name in (f"{QKV}.weight", f"{LAYER}.weight")
        assert description[name] == ("W8A8" if quantized else "FLOAT")
        assert torch.equal(tensor, torch.ones_like(tensor) if quantized else source[name].bfloat16()), name
        assert tensor.dtype == (torch.int8 if quantized else torch.bfloat16)


def test_file_names(tmp_path: Path) -> None:
    """Catches a stray weight file or an index that makes an engine drop tensors."""
    emit(tiny.TINY, tmp_path / "one", QKV)
    emit(tiny.TINY, tmp_path / "parts", QKV, part_file_size=1)
    side = {"chat_template.json", "generation_config.json", "preprocessor_config.json", "special_tokens_map.json"}
    side |= {"tokenizer.json", "tokenizer_config.json", "config.json", "quant_model_description.json"}
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names - {"ORIGIN.md"} == side | {"quant_model_weight_w8a8.safetensors"}
    names = {path.name for path in (tmp_path / "parts").iterdir()}
    assert {name for name in names if "weight" in name} == {
        "quant_model_weight_w8a8-00001-of-00001.safetensors",
        "quant_model_weight_w8a8.safetensors.index.json",
    }


def test_side_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    """Catches a tokenizer that is rewritten or left out: the engine would use other tokens."""
    emit(tiny.TINY, tmp_path / "out")
    for name in ("tokenizer.json", "chat_template.json", "preprocessor_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny.TINY / name).read_bytes()


def test_a_description_of_another_compilation_is_not_copied(tmp_path: Path) -> None:
    """Catches a stale description among the source's files that replaces the new one."""
    source = tiny.damaged(tmp_path / "in")
    for name in ("quant_model_description.json", "quant_model_description_w8a8.json"):
        (source / name).write_text('{"model_quant_type": "STALE"}')
    emit(source, tmp_path / "out", QKV)
    assert json_in(tmp_path / "out" / "quant_model_description.json")["model_quant_type"] == "W8A8"
    assert not (tmp_path / "out" / "quant_model_description_w8a8.json").exists()


def test_all_float_is_called_float(tmp_path: Path) -> None:
    """Catches a folder without a quantized layer that an engine would run as quantized."""
    emit(tiny.TINY, tmp_path / "out")
    assert json_in(tmp_path / "out" / "quant_model_description.json")["model_quant_type"] == "FLOAT"
    assert "quantize" not in json_in(tmp_path / "out" / "config.json")


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    """Catches dates, folder names or random values in any file."""
    for run in ("first", "second"):
        emit(tiny.TINY, tmp_path / run, QKV, LAYER)
    files = [{path.name: path.read_bytes() for path in (tmp_path / run).iterdir()} for run in ("first", "second")]
    assert files[0] == files[1]


def test_a_tensor_emitted_twice_is_an_internal_error(tmp_path: Path) -> None:
    """Catches a stage that writes a tensor which was copied before."""
    writer = FolderWriter(tmp_path, Checkpoint(tiny.TINY), Options.without_paths())
    writer.copy("lm_head.weight")
    writer.copy_rest(["lm_head.weight"])
    writer.copy("lm_head.weight")  # is read only
    with pytest.raises(InternalError, match=r"lm_head\.weight is written twice"):
        writer.add([EmittedTensor("lm_head.weight", torch.zeros(1), Scheme.FLOAT)])


# ---- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("both", "quantized", "top", "vision"),
    [
        (True, [QKV, LAYER], "w8a8", "w8a8"),
        (True, [LAYER], "w8a8", None),
        (True, ["visual.merger.mlp.0"], "w8a8", "w8a8"),
        (True, [], None, None),
        (False, [QKV, LAYER], None, None),
    ],
)
def test_mindies_keys(tmp_path: Path, both: bool, quantized: list[str], top: str | None, vision: str | None) -> None:
    """Catches keys that make MindIE look for integers in a float tower, or for floats in a quantized one."""
    emit(tiny.TINY, tmp_path / "out", *quantized, both=both)
    config = json_in(tmp_path / "out" / "config.json")
    assert (config.get("quantize"), config["vision_config"].get("quantize")) == (top, vision)


def test_config_keeps_everything_else_in_order(tmp_path: Path) -> None:
    """Catches keys that are lost, sorted or rewritten because a library loaded and saved the configuration."""

    def odd(config: dict[str, Any]) -> None:
        config["zeta"] = {"b": [1, 2.50, None], "a": "ü"}
        config["quantization_config"] = {"quant_method": "other"}
        config["alpha"] = 1e-6

    source = tiny.damaged(tmp_path / "in", config=odd)
    emit(source, tmp_path / "out", QKV)
    before, after = json_in(source / "config.json"), json_in(tmp_path / "out" / "config.json")
    assert "quantization_config" not in after
    assert [key for key in after if key != "quantize"] == [key for key in before if key != "quantization_config"]
    changed = {key for key in before if key in after and before[key] != after[key]}
    assert changed == {"torch_dtype", "vision_config"}
    assert after["torch_dtype"] == "bfloat16"
    assert {**before["vision_config"], "quantize": "w8a8"} == after["vision_config"]
    assert "ü" in (tmp_path / "out" / "config.json").read_text(encoding="utf-8")


def test_config_names_the_emitted_dtype(tmp_path: Path) -> None:
    """Catches an engine that runs a bfloat16 folder in float32 because config.json still says so."""

    def half(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.half() for name, tensor in tensors.items()})

    def newer(config: dict[str, Any]) -> None:
        config["dtype"] = config.pop("torch_dtype")

    source = tiny.damaged(tmp_path / "in", tensors=half, config=newer)
    emit(source, tmp_path / "out")
    config = json_in(tmp_path / "out" / "config.json")
    assert (config["dtype"], config["torch_dtype"]) == ("float16", "float16")
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float16}


def test_the_source_is_not_touched(tmp_path: Path) -> None:
    """Catches a config that is edited in place: in memory or, through a link, on the disk."""
    source = tiny.damaged(tmp_path / "in")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    writer = emit(source, tmp_path / "out", QKV)
    assert "quantize" not in writer.checkpoint.config
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


# ---- tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "requested", "emitted"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.float32, "auto", torch.bfloat16),
        (torch.float64, "auto", torch.bfloat16),
        (torch.bfloat16, "float16", torch.float16),
        (torch.float16, "bfloat16", torch.bfloat16),
        (torch.float32, "float16", torch.float16),
    ],
)
def test_emitted_dtype(stored: torch.dtype, requested: RequestedDtype, emitted: torch.dtype) -> None:
    """Catches a dtype that engines do not run, and one that was not asked for."""
    assert emitted_dtype(stored, requested) == emitted


def test_a_weight_that_float16_cannot_hold_is_named() -> None:
    """Catches a weight that becomes zeros; single small values, a bias and a weight of zeros are harmless."""
    small = torch.full((4, 8), 1e-9)
    for name, tensor in (("w", torch.cat([small, torch.ones(1, 8)])), ("b.bias", small), ("z", torch.zeros(4))):
        assert float_tensor(name, tensor, torch.float16).tensor.dtype == torch.float16
    with pytest.raises(UserError, match="w cannot be stored"):
        float_tensor("w", small, torch.float16)
    assert float_tensor("w", small, torch.bfloat16).tensor.dtype == torch.bfloat16


def test_a_value_beyond_the_emitted_dtype_is_named() -> None:
    """Catches a weight that becomes Inf when it is stored."""
    large = torch.tensor([1.0, -70000.0])
    assert float_tensor("w", large, torch.bfloat16).tensor.isfinite().all()
    with pytest.raises(UserError, match="w cannot be stored") as caught:
        float_tensor("w", large, torch.float16)
    assert "70000" in str(caught.value) and "float16" in str(caught.value)
    assert float_tensor("empty", torch.empty(0), torch.float16).tensor.shape == (0,)


def test_tensors_of_a_stage() -> None:
    """Catches a missing tensor, a float bias listed as quantized, and a name that no engine reads."""
    stage = small_stage.decided()
    LowerLinears().run(stage)
    tensors = {emitted.name: emitted for emitted in stage_tensors(stage, VLLM_ASCEND, Scheme.W8A8)}
    suffixes = "weight weight_scale weight_offset input_scale input_offset quant_bias deq_scale".split()
    expected = {}
    for layer, bias in (("attn.qkv", True), ("attn.proj", True), ("mlp.gate", False), ("mlp.up", False)):
        expected |= {f"visual.blocks.0.{layer}.{name}": Scheme.W8A8 for name in suffixes}
        expected |= {f"visual.blocks.0.{layer}.bias": Scheme.FLOAT} if bias else {}
    for layer in ("norm1", "norm2", "mlp.down"):
        expected |= {f"visual.blocks.0.{layer}.{name}": Scheme.FLOAT for name in ("weight", "bias")}
    assert {name: emitted.scheme for name, emitted in tensors.items()} == expected
    for name, emitted in tensors.items():
        if emitted.scheme == Scheme.FLOAT:
            assert emitted.tensor.dtype == torch.bfloat16, name
    assert tensors["visual.blocks.0.attn.qkv.weight"].tensor.dtype == torch.int8


def test_header_bytes() -> None:
    """Catches a header that is longer than reserved, on real names."""
    model = tiny.float_model()
    reserved = header_bytes(model.checkpoint)
    names = []
    for name in model.checkpoint.names:
        layer = name.rpartition(".")[0]
        suffixes = ("weight_scale", "weight_offset", "input_scale", "input_offset", "quant_bias", "deq_scale")
        names += [name, *(f"{layer}.{part}" for part in suffixes)] if name.endswith("weight") else [name]
        names += [f"{layer}.kv_cache_{part}" for part in ("scale", "offset") if layer.endswith(("k_proj", "v_proj"))]
    entry = {"dtype": "BF16", "shape": [100000, 100000], "data_offsets": [10**14, 10**14]}
    assert len(json.dumps(dict.fromkeys(names, entry))) < reserved


def test_metadata_is_what_loaders_want(tmp_path: Path) -> None:
    """Catches a weight file without the metadata that transformers requires."""
    emit(tiny.TINY, tmp_path / "out")
    with safe_open(tmp_path / "out" / "quant_model_weight_float.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
