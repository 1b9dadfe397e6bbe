"""Reading checkpoint folders: every layout gives the same tensors, every damage one clear error."""

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from vlqc.checkpoint import Checkpoint, original_name
from vlqc.checkpoint_files import INDEX
from vlqc.errors import UserError

TENSORS = {
    "lm_head.weight": torch.arange(20, dtype=torch.float32).reshape(5, 4),
    "model.embed_tokens.weight": torch.arange(40, dtype=torch.bfloat16).reshape(10, 4) / 8,
    "model.layers.0.self_attn.q_proj.bias": torch.tensor([0.5, -2.0, 3.0], dtype=torch.float16),
    "model.layers.0.self_attn.q_proj.weight": torch.arange(12.0).reshape(3, 4).to(torch.bfloat16),
    "visual.blocks.0.attn.qkv.weight": torch.full((6, 2), -0.125),
    "visual.patch_embed.proj.weight": torch.randn(4, 3, 2, 2, 2, generator=torch.Generator().manual_seed(0)),
}
NEW_NAMES = {
    "lm_head.weight": "lm_head.weight",
    "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.bias": "model.language_model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.q_proj.weight": "model.language_model.layers.0.self_attn.q_proj.weight",
    "visual.blocks.0.attn.qkv.weight": "model.visual.blocks.0.attn.qkv.weight",
    "visual.patch_embed.proj.weight": "model.visual.patch_embed.proj.weight",
}


def one_file(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")


def indexed(folder: Path, tensors: dict[str, Tensor]) -> None:
    weight_map = {name: f"model-{number % 3 + 1:05}-of-00003.safetensors" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def many_without_index(folder: Path, tensors: dict[str, Tensor]) -> None:
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, folder / f"part{number}.safetensors")


def indexed_beside_a_stale_file(folder: Path, tensors: dict[str, Tensor]) -> None:
    indexed(folder, tensors)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors")


LAYOUTS = [one_file, indexed, many_without_index, indexed_beside_a_stale_file]


def write(folder: Path, tensors: dict[str, Tensor] = TENSORS, layout: Callable[..., None] = one_file) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "made_up"}')
    layout(folder, tensors)
    return folder


def fault_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    return str(caught.value)


# ---- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", ["old", "new"])
def test_every_layout_gives_every_tensor_as_stored(tmp_path: Path, layout: Callable[..., None], names: str) -> None:
    """Catches a shard that is not read, a stale file that is, a renamed tensor, a changed dtype, shape or value."""
    stored = {NEW_NAMES[name] if names == "new" else name: tensor for name, tensor in TENSORS.items()}
    checkpoint = Checkpoint(write(tmp_path, stored, layout))
    assert checkpoint.names == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert name in checkpoint
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.stored_dtype(name) == tensor.dtype
        read = checkpoint.tensor(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("model.visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.visuals.weight", "model.visuals.weight"),
    ],
)
def test_original_names(name: str, original: str) -> None:
    """Catches a prefix that is cut where it is none, or not cut where it is."""
    assert original_name(name) == original


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.booleans())
def test_rows_are_gathered_exactly(indices: list[int], nested: bool) -> None:
    """Catches rows in the wrong order, repeated rows that are lost, or another shape than that of the indices."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint(write(Path(folder)))
        wanted = torch.tensor([indices, indices[::-1]] if nested else indices)
        rows = checkpoint.rows("model.embed_tokens.weight", wanted)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, TENSORS["model.embed_tokens.weight"][wanted])


def test_dtype_is_that_of_most_elements(tmp_path: Path) -> None:
    """Catches a vote per tensor: many little float32 norms do not make a bfloat16 checkpoint float32."""
    norms = {f"norm{number}.weight": torch.ones(3) for number in range(5)}
    checkpoint = Checkpoint(write(tmp_path, {"w": torch.ones(4, 8, dtype=torch.bfloat16), **norms}))
    assert checkpoint.dtype == torch.bfloat16


def test_bytes_are_those_of_the_weight_files(tmp_path: Path) -> None:
    """Catches a size that forgets shards, or counts files that are not read."""
    checkpoint = Checkpoint(write(tmp_path, layout=indexed_beside_a_stale_file))
    assert checkpoint.bytes == sum(path.stat().st_size for path in tmp_path.glob("model-*-of-*.safetensors"))


def test_side_files_are_what_an_engine_needs_beside_weights(tmp_path: Path) -> None:
    """Catches copied weights, indices, code or folders, and a tokenizer that is left behind (as a link, too)."""
    write(tmp_path)
    wanted = [
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "tokenizer.json",
    ]
    for name in [
        *wanted,
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "old.pt",
        "x.gguf",
        ".hidden",
        "code.py",
    ]:
        (tmp_path / name).write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "blob").write_text("x")
    (tmp_path / "vocab.json").symlink_to("cache/blob")
    (tmp_path / "broken.txt").symlink_to("nowhere")
    assert Checkpoint(tmp_path).side_files() == [*wanted, "vocab.json"]


def test_a_cache_of_links_is_read(tmp_path: Path) -> None:
    """Catches a reader that refuses the Hugging Face cache, whose snapshots are links into a folder of blobs."""
    repository = tmp_path / "models--somebody--something"
    real, snapshot = write(repository / "blobs"), repository / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    for path in real.iterdir():
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    assert torch.equal(Checkpoint(snapshot).tensor("lm_head.weight"), TENSORS["lm_head.weight"])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("cache", [False, True])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str, cache: bool) -> None:
    """Catches a checkpoint that has a file of this machine read and copied, also one that looks like a cache."""
    folder = write(tmp_path / "models--a" / "snapshots" / "0a1b2c" if cache else tmp_path / "model")
    other = tmp_path / "models--b" / "blobs"
    other.mkdir(parents=True)
    (folder / name).touch()
    (folder / name).rename(other / "secret")
    (folder / name).symlink_to(other / "secret")
    told = fault_of(folder)
    assert f"{name} is a link out of the checkpoint folder" in told and str(other / "secret") in told


def test_reading_cannot_write(tmp_path: Path) -> None:
    """Catches a mapping that carries changes of a tensor into the user's checkpoint."""
    before = (write(tmp_path) / "model.safetensors").read_bytes()
    tensor = Checkpoint(tmp_path).tensor("lm_head.weight")
    tensor.add_(1)
    del tensor
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert torch.equal(Checkpoint(tmp_path).tensor("lm_head.weight"), TENSORS["lm_head.weight"])


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """Catches a traceback, or an error that does not say which folder."""
    assert str(tmp_path / "nowhere") in fault_of(tmp_path / "nowhere")


def test_a_folder_without_config(tmp_path: Path) -> None:
    """Catches a folder of mere weights that is taken for a checkpoint."""
    write(tmp_path)
    (tmp_path / "config.json").unlink()
    assert re.search(r"no config\.json", fault_of(tmp_path))


@pytest.mark.parametrize("text", ["{", "[1]", '"words"', "\xff"])
def test_a_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    """Catches a traceback of the JSON reader, and a config that is used though it is a list or a word."""
    write(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    message = fault_of(tmp_path)
    assert "config.json" in message and str(tmp_path) in message


@pytest.mark.parametrize("other", [None, "pytorch_model.bin"])
def test_a_folder_without_safetensors(tmp_path: Path, other: str | None) -> None:
    """Catches .bin files being loaded (which runs code) or their folder being called empty."""
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if other:
        (tmp_path / other).write_bytes(b"x")
    message = fault_of(tmp_path)
    assert "no *.safetensors" in message and "convert" in message


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_shard_is_named(tmp_path: Path, kept: int) -> None:
    """Catches a shard that was cut short while copying and is read as far as it goes."""
    write(tmp_path, layout=indexed)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:kept])
    assert shard.name in fault_of(tmp_path)


def test_all_damaged_shards_are_named_at_once(tmp_path: Path) -> None:
    """Catches an error that stops at the first of several damaged files."""
    write(tmp_path, layout=indexed)
    for number in (1, 3):
        (tmp_path / f"model-0000{number}-of-00003.safetensors").write_bytes(b"\0" * 50)
    message = fault_of(tmp_path)
    assert "model-00001" in message and "model-00003" in message and "model-00002" not in message


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    """Catches a half-finished download that is compiled without the missing shard's tensors."""
    write(tmp_path, layout=indexed)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    assert "model-00003-of-00003.safetensors is missing" in fault_of(tmp_path)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "below/outside.safetensors", "..", ""]
)
def test_an_index_does_not_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """Catches an index that makes the compiler read files elsewhere, though they exist."""
    folder = write(tmp_path / "inner")
    (folder / "below").mkdir()
    for outside in (tmp_path, folder / "below"):
        save_file({"lm_head.weight": torch.ones(1)}, outside / "outside.safetensors")
    listed = str(tmp_path / "outside.safetensors") if name.startswith("/") else name
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": listed}}))
    message = fault_of(folder)
    assert repr(listed) in message and "own folder" in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_an_index_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    """Catches a traceback from a damaged index."""
    write(tmp_path, layout=indexed)
    (tmp_path / INDEX).write_text(text)
    assert INDEX in fault_of(tmp_path)


def test_a_tensor_stored_twice_names_both_files(tmp_path: Path) -> None:
    """Catches a stale file beside the right one: which of the two counts would be chance."""
    write(tmp_path)
    save_file({"model.language_model.embed_tokens.weight": torch.ones(10, 4)}, tmp_path / "old.safetensors")
    message = fault_of(tmp_path)
    assert "model.embed_tokens.weight is stored twice" in message
    assert "old.safetensors" in message and "model.safetensors" in message


def test_weight_files_without_tensors(tmp_path: Path) -> None:
    """Catches an empty file that is reported as hundreds of missing tensors."""
    assert "no tensors" in fault_of(write(tmp_path, {}))


def test_a_dtype_that_is_not_read_is_named(tmp_path: Path) -> None:
    """Catches an 8-bit float checkpoint that ends in a traceback."""
    message = fault_of(write(tmp_path, {"w": torch.ones(2, 2).to(torch.float8_e4m3fn)}))
    assert "tensor w has dtype F8_E4M3" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [[torch.nan], [torch.inf], [-torch.inf, torch.nan, torch.inf]])
def test_nan_and_inf_are_named_and_counted(tmp_path: Path, dtype: torch.dtype, bad: list[float]) -> None:
    """Catches a damaged weight that is quantized into nonsense."""
    weight = torch.ones(4, 5)
    weight.view(-1)[7 : 7 + len(bad)] = torch.tensor(bad)
    checkpoint = Checkpoint(write(tmp_path, {"good": torch.ones(2), "model.damaged.weight": weight.to(dtype)}))
    assert torch.equal(checkpoint.tensor("good"), torch.ones(2))
    with pytest.raises(UserError) as caught:
        checkpoint.tensor("model.damaged.weight")
    message = str(caught.value)
    assert "model.damaged.weight holds NaN or Inf" in message and "model.safetensors" in message
    assert f"{len(bad)} of 20 values" in message


def test_missing_and_misshapen_tensors_are_listed_together(tmp_path: Path) -> None:
    """Catches an error that names the first missing tensor only, or lets a wrong shape pass."""
    checkpoint = Checkpoint(write(tmp_path))
    checkpoint.expect([("lm_head.weight", (5, 4))])
    wanted = [("lm_head.weight", (5, 4)), ("a", (1,)), ("visual.blocks.0.attn.qkv.weight", (2, 6)), ("b", (2, 3))]
    with pytest.raises(UserError) as caught:
        checkpoint.expect(wanted)
    whats = [fault.what for fault in caught.value.faults]
    assert whats == [
        "tensor a is missing",
        "tensor visual.blocks.0.attn.qkv.weight has shape [6, 2]",
        "tensor b is missing",
    ]
    assert "[2, 6]" in caught.value.faults[1].why and "[2, 3]" in caught.value.faults[2].why


def test_no_float_tensor(tmp_path: Path) -> None:
    """Catches a traceback where the dtype of the weights is asked of a folder that holds integers only."""
    checkpoint = Checkpoint(write(tmp_path, {"w": torch.ones(3, dtype=torch.int8)}))
    with pytest.raises(UserError, match="no float tensor"):
        _ = checkpoint.dtype


def test_an_unreadable_config_is_an_error_of_the_user(tmp_path: Path) -> None:
    """Catches a traceback where config.json is a folder."""
    write(tmp_path)
    os.remove(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    assert "config.json cannot be read" in fault_of(tmp_path)
