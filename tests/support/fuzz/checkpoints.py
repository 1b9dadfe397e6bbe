"""Fuzz targets for checkpoint folders: weight files, index, config.json, processor, tokenizer, chat template."""

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from tests.support.compiled_folder import make_content
from tests.support.fuzz.damage import as_json, damaged_bytes, damaged_json, values
from tests.support.fuzz.files import put
from tests.support.fuzz.tiny import TINY, tiny_model
from tests.support.fuzz.verdict import demand, strict
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.calibration.conversation import Conversation, ImageRef, Turn
from vlqc.frontend.calibration.images import ImageError
from vlqc.frontend.calibration.processor import SampleProcessor
from vlqc.frontend.calibration.samples import check_samples
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.checkpoint.files import INDEX
from vlqc.frontend.checkpoint.header import read_header
from vlqc.frontend.streamed_model import StreamedModel

# ---- safetensors -----------------------------------------------------------------------------------------------------

ENTRIES: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "model.a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "model.b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "F16", "shape": [0, 5], "data_offsets": [32, 32]},
    "d": {"dtype": "I8", "shape": [2], "data_offsets": [32, 34]},
}
DATA = np.arange(34, dtype=np.uint8).tobytes()
NAMES = ("model.a.weight", "model.language_model.a.weight", "c", "dtype", "shape", "data_offsets", "../c")
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "f32", "C64", "")


@dataclass(frozen=True)
class Weights:
    """A safetensors file: text of the header, error of its length field, data."""

    header: bytes
    lie: int
    data: bytes

    def bytes(self) -> bytes:
        length = min(max(len(self.header) + self.lie, 0), 2**64 - 1)
        return length.to_bytes(8, "little") + self.header + self.data


def _offsets(draw: st.DrawFn) -> Any:
    return draw(st.one_of(values(), st.lists(st.integers(-2, 40), min_size=2, max_size=2)))


@st.composite
def weights(draw: st.DrawFn) -> bytes:
    """Entries with other dtypes, shapes and offsets, duplicate or damaged; wrong lengths; data of another size."""
    kind = draw(st.sampled_from(("entry", "entry", "json", "twice", "length", "data", "bytes")))
    whole = Weights(as_json(ENTRIES), 0, DATA)
    if kind == "bytes":
        return draw(damaged_bytes(whole.bytes()))
    if kind == "length":
        lie = draw(st.one_of(st.integers(-300, 300), st.sampled_from((2**31, 2**32, 2**62, 2**63, 2**64))))
        return Weights(whole.header, lie, DATA).bytes()
    if kind == "data":
        return Weights(whole.header, 0, draw(st.binary(max_size=60))).bytes()
    if kind == "json":
        return Weights(as_json(draw(damaged_json(ENTRIES, names=NAMES))), 0, DATA).bytes()
    name = draw(st.sampled_from(tuple(ENTRIES)[1:]))
    entry = dict(ENTRIES[name])
    for key in draw(st.lists(st.sampled_from(("dtype", "shape", "data_offsets")), min_size=1, max_size=2)):
        small = st.integers(-1, 6)
        entry[key] = (
            draw(st.sampled_from(DTYPES))
            if key == "dtype"
            else draw(st.one_of(values(), st.lists(small, max_size=3)))
            if key == "shape"
            else _offsets(draw)
        )
    if kind == "twice":
        text = as_json(ENTRIES)[:-1] + b", " + as_json({draw(st.sampled_from(NAMES)): entry})[1:]
    else:
        text = as_json(ENTRIES | {name: entry})
    return Weights(text, 0, DATA).bytes()


def check_weights(case: bytes, folder: Path) -> bool:
    """Accepted weight files have a valid header, all its tensors, and can be read."""
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text("{}")
    put(folder / "model.safetensors", case)
    checkpoint = Checkpoint(folder)
    header = read_header(folder / "model.safetensors")
    demand(not header.faults, f"accepted although {header.faults}")
    demand(len(checkpoint.names) == len(header.tensors), "other tensors than in the header")
    for name in checkpoint.names:
        read = checkpoint.tensor(name)
        demand(tuple(read.shape) == checkpoint.shape(name), f"{name} has another shape than promised")
    return True


# ---- the index of weight files ---------------------------------------------------------------------------------------

PART = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
INDEX_CONTENT: dict[str, Any] = {"metadata": {"total_size": 34}, "weight_map": {"model.a.weight": PART, "d": OTHER}}
FILES = (PART, OTHER, "../secret.safetensors", "/etc/passwd", "./" + PART, "a/../" + PART, "config.json", ".", "", "~")


def index_cases() -> st.SearchStrategy[bytes]:
    placed = st.tuples(st.sampled_from(("model.a.weight", "d", "new")), st.one_of(st.sampled_from(FILES), values()))
    elsewhere = placed.map(
        lambda it: as_json(INDEX_CONTENT | {"weight_map": INDEX_CONTENT["weight_map"] | {it[0]: it[1]}})
    )
    return st.one_of(elsewhere, damaged_json(INDEX_CONTENT).map(as_json), damaged_bytes(as_json(INDEX_CONTENT)))


def check_index(case: bytes, folder: Path) -> bool:
    """Only files in the folder itself are read, for any index."""
    inside = folder / "inside"
    if not inside.exists():
        inside.mkdir()
        one = {"model.a.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
        two = {"d": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
        for place, entries in ((inside / PART, one), (inside / OTHER, two), (folder / "secret.safetensors", one)):
            place.write_bytes(Weights(as_json(entries), 0, bytes(8)).bytes())
        (inside / "config.json").write_text("{}")
    put(inside / INDEX, case)
    checkpoint = Checkpoint(inside)
    demand({path.parent for path in checkpoint.files} == {inside}, f"reads {checkpoint.files}")
    demand(checkpoint.files != [] and checkpoint.names != [], "accepted without tensors")
    strict(case)
    return True


# ---- config.json -----------------------------------------------------------------------------------------------------


def check_config_text(case: bytes, folder: Path) -> bool:
    """Reading the folder returns an object or raises UserError, for any config.json."""
    if not (folder / "model.safetensors").exists():
        make_content().write_source(folder / "source")
        (folder / "source" / "model.safetensors").rename(folder / "model.safetensors")
    put(folder / "config.json", case)
    checkpoint = Checkpoint(folder)
    demand(isinstance(strict(case), dict), "config.json is no object")
    demand(checkpoint.source_config == strict(case), "another object than the file holds")
    checkpoint.check_not_quantized()
    json.dumps(checkpoint.config, allow_nan=False).encode()
    return True


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
VISION_SIZES = ("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size", "spatial_merge_size")
IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@cache
def config() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    return read


def nested_config() -> dict[str, Any]:
    outer = ("architectures", "model_type", "vision_config", "image_token_id", "video_token_id", "torch_dtype")
    kept = {key: value for key, value in config().items() if key in outer}
    return kept | {"text_config": {key: value for key, value in config().items() if key not in outer}}


def check_config(case: Any, folder: Path) -> bool:
    """An accepted model has the sizes of its tensors, and numbers where it computes with them."""
    if not (folder / "model.safetensors").exists():
        shutil.copy(TINY / "model.safetensors", folder)
    put(folder / "config.json", as_json(case))
    checkpoint = Checkpoint(folder)
    model = StreamedModel.open(checkpoint)
    found: Any = model.module.config
    text = getattr(found, "text_config", found)
    for name in IDS:
        number = getattr(found, name, 0)
        demand(name not in case or (type(number) is int and 0 <= number < 64), f"{name} is {number!r}")
    for name in SIZES:
        demand(type(getattr(text, name)) is int, f"{name} is {getattr(text, name)!r}")
    for name in VISION_SIZES:
        demand(type(getattr(found.vision_config, name)) is int, f"vision {name}")
    demand(type(text.rms_norm_eps) in (int, float) and 0 < text.rms_norm_eps < 1, f"eps {text.rms_norm_eps!r}")
    blocks = found.vision_config.fullatt_block_indexes
    listed = "fullatt_block_indexes" in case["vision_config"]
    demand(not listed or all(type(each) is int and 0 <= each < 4 for each in blocks), f"full attention in {blocks!r}")
    demand(type(found.vision_config.window_size) is int, "window_size")
    demand(0 < found.vision_config.window_size < 10**6, "window_size")
    demand(
        type(checkpoint.config.get("tie_word_embeddings", False)) is bool, "tie_word_embeddings is not true or false"
    )
    demand(len(model.linear_layers) == 4 * 5 + 2 + 4 * 7, "other layers than in the weight files")
    return True


# ---- image processor, tokenizer, chat template -----------------------------------------------------------------------

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "preprocessor_config.json",
)


def side_file_cases() -> st.SearchStrategy[tuple[str, bytes]]:
    def of(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
        text = (TINY / name).read_bytes()
        damaged = st.one_of(damaged_json(json.loads(text)).map(as_json), damaged_bytes(text))
        return damaged.map(lambda it: (name, it))

    return st.one_of(*map(of, SIDE_FILES), of("preprocessor_config.json"))


@cache
def example_image() -> "Image.Image":
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8))


def check_side_file(case: tuple[str, bytes], folder: Path) -> bool:
    """Accepted folders give model inputs with finite numbers and known tokens."""
    name, content = case
    if not (folder / "config.json").exists():
        for each in (*SIDE_FILES, "config.json"):
            shutil.copyfile(TINY / each, folder / each)
        (folder / "model.safetensors").symlink_to(TINY / "model.safetensors")
    put(folder / name, content)
    try:
        processor = SampleProcessor(folder, QWEN2_5_VL.inputs)
        conversation = Conversation((Turn("user", (ImageRef(b""), "what is red ?")), Turn("assistant", ("blue",))))
        sample = processor.build_sample([processor.process_image(example_image())], conversation)
    except ImageError:
        return False
    except ValueError as error:  # caused by the prompt
        demand("stands for an image" in str(error) or "chat template" in str(error), f"ValueError: {error}")
        return False
    finally:
        put(folder / name, (TINY / name).read_bytes())
    check_samples([sample], tiny_model())
    return True
