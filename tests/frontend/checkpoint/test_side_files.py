"""vlqc.frontend.checkpoint.side_files: which files a compiled folder has beside its weights, and their form."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.calibration_files import TINY, model_without, write_image
from vlqc.errors import UserError
from vlqc.families.inputs.input_format import QWEN_PIPELINE
from vlqc.families.qwen2 import QWEN2
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.families.qwen3_vl import QWEN3_VL
from vlqc.frontend.calibration.dataset import load_samples
from vlqc.frontend.checkpoint.side_files import SideFiles, side_files, tokenizer_settings
from vlqc.targets.side_files import unread_files

NEEDED = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "qwen.tiktoken", "added_tokens.json",
    "special_tokens_map.json", "generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE", "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
)  # fmt: skip
LEFT_OUT = (
    "trainer_state.json", "training_args.bin", "latest", "events.out.tfevents.1", "optimizer.pt", "zero_to_fp32.py",
    "vocab.pkl",
    "global_step10/", "adapter_config.json", "adapter_model.safetensors", "model.gguf", "pytorch_model.bin.index.json",
    "quantize_config.json", "quant_model_description.json", "MANIFEST.json", "all_results.json", "modeling_own.py",
)  # fmt: skip
SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_pad|>"]
V5_TOKENIZER: dict[str, Any] = {
    "backend": "tokenizers",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "extra_special_tokens": SPECIAL,
    "is_local": True,
    "pad_token": "<pad>",
    "processor_class": "Qwen2_5_VLProcessor",
    "tokenizer_class": "TokenizersBackend",
    "unk_token": "<unk>",
}


def stored(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def written(source: SideFiles, target: Path) -> Path:
    target.mkdir()
    source.write(target)
    return target


def saved_by_transformers_5(tmp_path: Path) -> Path:
    """The tiny checkpoint's JSON files as transformers 5 saves them."""
    left_out = ("preprocessor_config.json", "tokenizer_config.json", "chat_template.json", "special_tokens_map.json")
    model = model_without(tmp_path, *left_out)
    images = stored(TINY, "preprocessor_config.json")
    kind = images.pop("processor_class")
    size = {"shortest_edge": 6272, "longest_edge": 100 * 28 * 28}
    images = {key: value for key, value in images.items() if key not in ("min_pixels", "max_pixels")} | {"size": size}
    videos = images | {"video_processor_type": "Qwen2VLVideoProcessor", "max_frames": 16}
    del videos["image_processor_type"]
    content = {"image_processor": images, "processor_class": kind, "video_processor": videos}
    (model / "processor_config.json").write_text(json.dumps(content))
    (model / "tokenizer_config.json").write_text(json.dumps(V5_TOKENIZER))
    (model / "chat_template.jinja").write_text(stored(TINY, "chat_template.json")["chat_template"])
    return model


def test_what_is_copied(tmp_path: Path) -> None:
    """Catches leftovers of training, weights or code that are copied, and files of engines or people that are not."""
    for name in (*NEEDED, *LEFT_OUT, ".hidden", "config.json", "model.safetensors"):
        path = tmp_path / name
        (path if name.endswith("/") else path.parent).mkdir(exist_ok=True)
        if not name.endswith("/"):
            path.write_text("{}" if path.suffix == ".json" else "x")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "blob").write_text("x")
    (tmp_path / "README").symlink_to("cache/blob")
    (tmp_path / "tokenizer.spm").symlink_to("nowhere")
    files = side_files(tmp_path, QWEN2_5_VL, weights=["model.safetensors"])
    assert set(files.names) == {*NEEDED, "README"}
    assert set(files.left_out) == {*LEFT_OUT, "cache/", "tokenizer.spm"}
    target = written(files, tmp_path / "out")
    copied = [path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()]
    assert sorted(copied) == sorted(files.names)
    (note,) = files.notes()
    assert "MANIFEST.json" in note
    assert f"{len(files.left_out) - 5} more" in note


def test_code_and_what_it_names(tmp_path: Path) -> None:
    """Catches trusted code that is copied without the file that it opens."""
    for name in ("own.py", "own_words.bin", "other.bin"):
        (tmp_path / name).write_text("open('own_words.bin')")
    assert side_files(tmp_path, QWEN2_5_VL, code=True).names == ("own.py", "own_words.bin")
    assert side_files(tmp_path, QWEN2_5_VL).names == ()


def test_files_of_transformers_4_are_copies(tmp_path: Path) -> None:
    """Catches a published file that is written anew although every version reads it."""
    assert side_files(TINY, QWEN2_5_VL).converted == ()
    settings = {"image_processor_type": "Qwen2VLImageProcessorFast", "size": {"longest_edge": 9, "shortest_edge": 4}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))  # as published for Qwen3-VL
    assert side_files(tmp_path, QWEN3_VL).converted == ()


@pytest.mark.every_transformers
def test_files_of_transformers_5_mean_the_same(tmp_path: Path) -> None:
    """Catches a tokenizer, image settings or a template that the installed version does not read, or reads as others
    than the stored ones, which `load_samples` reads itself."""
    from transformers import AutoTokenizer

    model = saved_by_transformers_5(tmp_path)
    target = written(side_files(model, QWEN2_5_VL), tmp_path / "out")
    (target / "config.json").write_text((model / "config.json").read_text())
    assert not (target / "processor_config.json").exists()
    images, videos = stored(target, "preprocessor_config.json"), stored(target, "video_preprocessor_config.json")
    assert images["processor_class"] == "Qwen2_5_VLProcessor"
    for settings in (images, videos):
        assert (settings["min_pixels"], settings["max_pixels"]) == (6272, 78400)
    assert videos["max_frames"] == 16
    expected = AutoTokenizer.from_pretrained(TINY)
    read = AutoTokenizer.from_pretrained(target)
    text = "a red square <|image_pad|> what <eos>"
    assert read(text)["input_ids"] == expected(text)["input_ids"]
    assert read.decode(read(text)["input_ids"], skip_special_tokens=True) == "red"
    assert read.chat_template == expected.chat_template
    image = write_image(tmp_path / "a.png", 420, 420)
    (before,), (after,) = load_samples(model, image).samples, load_samples(target, image).samples
    assert before["image_grid_thw"].tolist() == after["image_grid_thw"].tolist() == [[1, 20, 20]]
    assert before["input_ids"].tolist() == after["input_ids"].tolist()


def of_family(content: dict[str, Any]) -> None:
    content |= QWEN_PIPELINE


def another_pattern(content: dict[str, Any]) -> None:
    content |= QWEN_PIPELINE | {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}


@pytest.mark.parametrize(
    ("change", "expected"), [(of_family, "Qwen2Tokenizer"), (another_pattern, "PreTrainedTokenizerFast")]
)
def test_class_for_any_tokenizer(tmp_path: Path, change: Callable[[dict[str, Any]], None], expected: str) -> None:
    """Catches a family's class for another tokenizer.json, whose parts transformers 5 would replace by its own."""
    tokenizer = stored(TINY, "tokenizer.json")
    change(tokenizer)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(V5_TOKENIZER | {"image_token": "<|image_pad|>"}))
    settings = stored(written(side_files(tmp_path, QWEN2_5_VL), tmp_path / "out"), "tokenizer_config.json")
    assert settings["tokenizer_class"] == expected
    assert settings["additional_special_tokens"] == SPECIAL
    assert settings["extra_special_tokens"] == {"image_token": "<|image_pad|>"}


def test_template_only_with_the_tokenizer(tmp_path: Path) -> None:
    """Catches a chat template that the processor of transformers 4.49 does not find."""
    templates = [{"name": "tools", "template": "b"}, {"name": "default", "template": "a"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    files = side_files(tmp_path, QWEN2_5_VL)
    assert stored(written(files, tmp_path / "out"), "chat_template.json") == {"chat_template": "a"}
    assert files.converted == ("chat_template.json",)
    assert side_files(tmp_path, QWEN2).converted == ()
    (tmp_path / "chat_template.jinja").write_text("a")
    assert side_files(tmp_path, QWEN2_5_VL).converted == ()


def test_template_beside_the_tokenizer_of_a_text_model(tmp_path: Path) -> None:
    """Catches a chat template in a file that the tokenizer of an older version does not read."""
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("a")
    target = written(side_files(tmp_path, QWEN2), tmp_path / "out")
    assert stored(target, "tokenizer_config.json") == {"chat_template": "a"}


@pytest.mark.parametrize(
    ("merges", "expected"),
    [([["a", "b"], ["ab", "c"]], ["a b", "ab c"]), (["a b"], ["a b"]), ([["a ", "b"]], [["a ", "b"]]), ([], [])],
)
def test_merges_of_a_text_model(tmp_path: Path, merges: list[Any], expected: list[Any]) -> None:
    """Catches merges that tokenizers 0.19, which MindIE runs Qwen2 with, does not read, or that mean others as text."""
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "merges": merges}, "version": "1.0"}))
    files = side_files(tmp_path, QWEN2)
    assert stored(written(files, tmp_path / "out"), "tokenizer.json")["model"] == {"type": "BPE", "merges": expected}
    assert bool(files.converted) == (merges != expected)
    assert side_files(tmp_path, QWEN3_VL).converted == ()
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordLevel"}}')
    assert side_files(tmp_path, QWEN2).converted == ()  # a model without merges gets none


@pytest.mark.parametrize("value", [5, "x", [], ["x"], [{"name": ["x"]}], {}, {"x": 1}, None], ids=repr)
def test_values_of_other_types(tmp_path: Path, value: Any) -> None:
    """Catches an exception other than UserError for settings of another type than those of transformers."""
    keys = ("chat_template", "extra_special_tokens", "model_specific_special_tokens", "tokenizer_class")
    keys += ("image_processor", "video_processor", "processor_class", "size", "image_processor_type", "model")
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "tokenizer.json"):
        (tmp_path / name).write_text(json.dumps(dict.fromkeys(keys, value) | {"backend": value}))
    written(side_files(tmp_path, QWEN2_5_VL), tmp_path / "out")
    written(side_files(tmp_path, QWEN2), tmp_path / "text")
    for family in (QWEN2, QWEN2_5_VL):
        unread_files(tmp_path, family, "4.43.1", by_processor=True)


@pytest.mark.parametrize("metadata", [b"", b"---\nlicense: x\n---\n", b"---\r\nlicense: x\r\n---\r\n"])
def test_model_card(tmp_path: Path, metadata: bytes) -> None:
    """Catches the float model's card for the quantized model without a word, or with broken metadata."""
    (tmp_path / "README.md").write_bytes(metadata + b"# Model\n")
    card = (written(side_files(tmp_path, QWEN2_5_VL), tmp_path / "out") / "README.md").read_bytes()
    assert card.startswith(metadata)
    assert card.endswith(b"\n# Model\n")
    assert b"quantized" in card


def test_paths_of_files_elsewhere(tmp_path: Path) -> None:
    """Catches a tokenizer that transformers reads from a path in its settings, and the name of a folder of a machine
    that is published."""
    model = model_without(tmp_path)
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    paths = {"tokenizer_file": "/tmp/other.json", "vocab_file": "vocab.json", "name_or_path": "/data/model"}
    path.write_text(json.dumps({**settings, **paths, "special_tokens_map_file": None}))
    written = tokenizer_settings(json.loads(path.read_text()), model, QWEN2_5_VL.text_format)
    assert written == {**settings, "special_tokens_map_file": None}
    (tmp_path / "images").mkdir()
    write_image(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match="tokenizer_file is"):
        load_samples(model, tmp_path / "images")


@pytest.mark.parametrize("settings", [{}, {"tokenizer_file": "/tmp/other.json"}], ids=["empty", "a path alone"])
def test_settings_without_keys_are_written(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Catches a file of settings that is dropped, and that verification then misses, because it has no keys left."""
    model = model_without(tmp_path)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    out = written(side_files(model, QWEN2_5_VL), tmp_path / "out")
    assert "chat_template" in stored(out, "chat_template.json") and stored(out, "tokenizer_config.json") == {}
