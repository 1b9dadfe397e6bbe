"""Formats of calibration data, compared with what the checkpoint's own chat template makes of the same messages."""

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

import vlqc
from tests.support.calibration_files import lines, write_image
from tests.support.chat_checkpoint import TEMPLATE, write_chat_checkpoint
from tests.support.text_checkpoint import write_text_checkpoint
from vlqc.errors import UserError
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.calibration import dataset
from vlqc.frontend.calibration.conversation import ImageRef, Turn, VideoRef
from vlqc.frontend.calibration.dataset import CalibrationDataset, load_samples
from vlqc.frontend.calibration.formats import FORMATS, read_entry
from vlqc.frontend.calibration.images import read_image
from vlqc.frontend.calibration.media import image_ref
from vlqc.frontend.calibration.sources import PROMPT, list_samples

DATA = Path(__file__).parent / "data"
PAD, IMAGE = "<|image_pad|>", {"type": "image"}
VISION = f"<|vision_start|>{PAD}<|vision_end|>"
WIDTHS = {"a.png": 84, "b.png": 112}  # of images 56 pixels high: 6 and 8 image tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_checkpoint(tmp_path_factory.mktemp("formats") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed, (name, width) in enumerate(WIDTHS.items()):
        write_image(folder / name, width, seed=seed)
    shutil.copyfile(folder / "a.png", folder / "a b.png")
    return folder


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def turn(role: str, *parts: dict[str, str]) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


def expected_ids(model: Path, messages: list[dict[str, Any]], *tokens: int) -> list[int]:
    """By the tokenizer's own chat template, called as Qwen's documentation calls it. tokens: of every image."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    open_end = messages[-1]["role"] == "user"
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_end)
    pieces = rendered.split(PAD)
    assert len(pieces) == len(tokens) + 1
    for number, count in enumerate(tokens):
        pieces[number] += PAD * count
    return list(tokenizer("".join(pieces)).input_ids)


def read(model: Path, path: Path, *entries: object) -> CalibrationDataset:
    return load_samples(model, lines(path, *entries))


USER, ANSWER, SYSTEM = turn("user", IMAGE, text("Hi")), turn("assistant", text("Ho")), turn("system", text("Be brief."))
FORMS: dict[str, tuple[object, list[dict[str, Any]]]] = {
    "own": ({"image": "a.png", "prompt": "Hi", "response": "Ho"}, [USER, ANSWER]),
    "own with a tag": (
        {"image": ["a.png"], "prompt": "Look: <image> Who?"},
        [turn("user", text("Look: "), IMAGE, text(" Who?"))],
    ),
    "Qwen list": (
        [turn("system", text("Be brief.")), {"role": "user", "content": [{**IMAGE, "image": "a.png"}, text("Hi")]}],
        [SYSTEM, USER],
    ),
    "OpenAI": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, text("Hi")]},
                {"role": "assistant", "content": "Ho"},
            ]
        },
        [SYSTEM, USER, ANSWER],
    ),
    "listed images": (
        {
            "messages": [{"role": "user", "content": [{**IMAGE, "text": None}, text("Hi")]}],
            "images": [{"path": "a.png"}],
        },
        [USER],
    ),
    "ms-swift": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "<image>Hi"},
                {"role": "assistant", "content": "Ho"},
            ],
            "images": ["a.png"],
            "rejected_response": "No",
        },
        [SYSTEM, USER, ANSWER],
    ),
    "LLaMA-Factory": (
        {
            "conversations": [{"from": "human", "value": "<image>Hi"}, {"from": "gpt", "value": "Ho"}],
            "system": "Be brief.",
            "images": ["a.png"],
        },
        [SYSTEM, USER, ANSWER],
    ),
    "LLaVA": (
        {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nHi"}]},
        [turn("user", IMAGE, text("\nHi"))],
    ),
    "query": (
        {
            "query": "<image>Hi",
            "response": "Ho",
            "history": [["One?", "Two"]],
            "system": "Be brief.",
            "images": ["a.png"],
        },
        [SYSTEM, turn("user", text("One?")), turn("assistant", text("Two")), USER, ANSWER],
    ),
    "query without tags": ({"query": "Hi", "response": "Ho", "images": ["a.png"]}, [USER, ANSWER]),
    "Alpaca": (
        {"instruction": "<image>Hi", "input": "you", "output": "Ho", "images": ["a.png"]},
        [turn("user", IMAGE, text("Hi\nyou")), ANSWER],
    ),
    "msModelSlim": ({"image": "a.png", "text": "Hi"}, [USER]),
    "upper case": ({"messages": [{"role": "User", "content": "<image>Hi"}], "images": "a.png"}, [USER]),
    "VQA": ({"image": "a.png", "question": "Hi", "answer": "Ho"}, [USER, ANSWER]),
    "Qwen-VL": (
        {"conversations": [{"from": "user", "value": "1: <img>a.png</img>\nHi"}]},
        [turn("user", text("1: "), IMAGE, text("\nHi"))],
    ),
    "pairs": (
        {"conversation": [{"human": "<image>Hi", "assistant": "Ho"}], "system": "Be brief.", "images": ["a.png"]},
        [SYSTEM, USER, ANSWER],
    ),
    "pre-training": (
        {"messages": [{"role": "assistant", "content": "<image>Ho"}], "images": ["a.png"]},
        [turn("assistant", IMAGE, text("Ho"))],
    ),
}


@pytest.mark.every_transformers
@pytest.mark.parametrize("form", FORMS)
def test_every_format_gives_the_template_the_same_messages(model: Path, folder: Path, form: str) -> None:
    """Catches a lost or misplaced turn, text, image or generation prompt, and a second system prompt."""
    entry, messages = FORMS[form]
    (sample,) = read(model, folder / "x.jsonl", entry).samples
    assert sample["input_ids"].tolist() == [expected_ids(model, messages, 6)]
    assert sample["image_grid_thw"].tolist() == [[1, 4, 6]]
    (folder / "x.json").write_text(json.dumps([entry] if isinstance(entry, dict) else entry, indent=1))
    (from_list,) = load_samples(model, folder / "x.json").samples
    assert all(torch.equal(sample[name], from_list[name]) for name in sample)


def test_several_images_and_turns(model: Path, folder: Path) -> None:
    """Catches images that are given to other tags than those at their position."""
    content = "<image>One<image>"
    entry = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Ho"}] * 2}
    names = ["a.png", "b.png", "b.png", "a.png"]
    (sample,) = read(model, folder / "x.jsonl", {**entry, "images": names}).samples
    user = turn("user", IMAGE, text("One"), IMAGE)
    assert sample["input_ids"].tolist() == [expected_ids(model, [user, ANSWER] * 2, 6, 8, 8, 6)]
    assert sample["image_grid_thw"][:, 2].tolist() == [6, 8, 8, 6]


def test_files_of_documentation(model: Path) -> None:
    """Catches an ms-swift or LLaVA file that cannot be read, or whose numbers or ignored keys are not told."""
    swift, llava = load_samples(model, DATA / "ms_swift.jsonl"), load_samples(model, DATA / "llava.json")
    assert [len(sample.get("image_grid_thw", ())) for sample in swift.samples] == [0, 2, 2, 1]
    assert [len(sample.get("image_grid_thw", ())) for sample in llava.samples] == [1, 1, 0]
    assert "4 samples with 5 images" in swift.notes[0] and "3 samples with 2 images" in llava.notes[0]
    assert "rejected_response" in swift.notes[1] and "label" in swift.notes[1] and "id" in llava.notes[1]


def test_file_forms(model: Path, folder: Path) -> None:
    """Catches a .json with one object per line, a .jsonl with one list, or a .json of one object that is refused."""
    entries = [{"query": "Hi"}, {"prompt": "Ho"}]
    forms = {
        "lines.json": "\n".join(map(json.dumps, entries)),
        "list.jsonl": json.dumps(entries, indent=2),
        "object.json": json.dumps(entries[0]),
    }
    lengths = {}
    for name, content in forms.items():
        (folder / name).write_text(content)
        lengths[name] = len(list_samples(folder / name).conversations)
        (folder / name).unlink()
    assert lengths == {"lines.json": 2, "list.jsonl": 2, "object.json": 1}


@pytest.mark.parametrize(
    "name",
    ["a.png", "{folder}/a.png", "file://{folder}/a.png", "file://localhost{folder}/a%20b.png", "FILE://a.png", "data"],
)
def test_names_of_an_image(model: Path, folder: Path, name: str) -> None:
    """Catches a URL that is read as a path or not decoded, or base64 data that are not."""
    data = base64.b64encode((folder / "a.png").read_bytes()).decode()
    name = f"data:image/png;base64,{data}" if name == "data" else name.format(folder=folder)
    expected, sample = read(model, folder / "x.jsonl", {"image": "a.png", "prompt": "1"}, {"image": name}).samples
    assert torch.equal(sample["pixel_values"], expected["pixel_values"])


def test_size_settings(model: Path, folder: Path) -> None:
    """Catches settings of qwen_vl_utils that are ignored: 560 x 280 pixels are 20 x 10 image tokens."""
    write_image(folder / "large.png", 560, 280)
    settings: list[dict[str, int]] = [
        {},
        {"max_pixels": 50 * 28 * 28},
        {"resized_height": 112, "resized_width": 84},
        {"min_pixels": 800 * 28 * 28},
    ]
    entries = [[turn("user", {**IMAGE, "image": "large.png", **given})] for given in settings]
    samples = read(model, folder / "x.jsonl", *entries).samples
    grids = [sample["image_grid_thw"][0, 1:].tolist() for sample in samples]
    assert grids == [[20, 40], [10, 20], [8, 6], [40, 80]]


FAULTS: dict[str, tuple[object, str]] = {
    "more images": (
        {"messages": [turn("user", text("<image>"))], "images": ["a", "b"]},
        "1 <image> tag in .* 2 images",
    ),
    "more tags": ({"query": "<image><image>", "images": ["a"]}, "2 <image> tags in .* 1 image"),
    "tag alone": ({"query": "<image>"}, "1 <image> tag in .* 0 images"),
    "given twice": (
        {"messages": [turn("user", {**IMAGE, "image": "a"}, text("x"))], "images": ["a"]},
        "1 image in the turns, and 1 image listed",
    ),
    "empty query": ({"query": "", "response": "x"}, "asks nothing"),
    "empty request": ({"instruction": "", "input": " "}, "asks nothing"),
    "empty parts": ({"messages": [turn("user")]}, "asks nothing"),
    "empty end": ({"messages": [turn("user", text("x")), turn("assistant", text("y")), turn("user")]}, "asks nothing"),
    "rate of a file": ({"video": "a.mp4", "sample_fps": 2.0}, "sample_fps has no list or folder of frames"),
    "rate of an image": ({"image": "a.png", "fps": 2.0}, "fps has no video"),
    "size of text": ({"prompt": "x", "max_pixels": 100000}, "max_pixels has no image"),
    "frames and videos": ({"query": "x", "videos": ["a.mp4", "a.png"]}, "both images and videos"),
    "bad frame": ({"video": ["a.png", 3]}, "'video' is neither a path"),
    "bare data": ({"image": "/9j/" + "QUJD/" * 40}, "neither a path nor a data URI"),
    "list in a list": ('[{"prompt": "2"}]', "an entry is one object"),
    "all null": ({"messages": None, "query": None}, "'prompt' is not given"),
    "tool turn": ({"messages": [{"role": "tool", "content": "x"}]}, "turn 1 has the role 'tool'"),
    "no role": ({"conversations": [{"value": "x"}]}, "turn 1 is not an object with the keys role"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "content of turn 1"),
    "audio": ({"messages": [turn("user", text("x"))], "audios": ["a.wav"]}, "audio is not supported"),
    "audio part": ({"messages": [turn("user", {"type": "input_audio"})]}, "type 'input_audio'"),
    "boxes": ({"query": "<bbox>", "objects": {"bbox": [[1, 2]]}}, "<bbox>"),
    "no turns": ({"messages": []}, "not a list of turns"),
    "system alone": ({"messages": [{"role": "system", "content": "x"}]}, "neither a user turn"),
    "history": ({"query": "x", "history": ["a", "b"]}, "'history' is not a list of pairs"),
    "web": ({"image": "https://example.com/a.png"}, "read from files only"),
    "host": ({"messages": [turn("user", {**IMAGE, "image": "s3://bucket/a.png"})]}, "read from files only"),
    "setting": ([turn("user", {**IMAGE, "image": "a", "max_pixels": "1280*28*28"})], "'max_pixels' is '1280"),
    "unknown format": ({"data": [{"query": "x"}]}, "the key data belongs to no format"),
    "typing error": ({"imgae": "a", "prompt": "x"}, "'imgae'; did you mean image"),
    "calls": ([{**turn("assistant"), "content": None, "tool_calls": [{"id": 1}]}], "turn 1 has tool_calls"),
    "listed": ({"messages": [turn("user", text("x"))], "images": [7]}, "'images' is neither"),
    "part": ([turn("user", {"type": "image_url", "image_url": {"url": "http://a"}})], "'image_url' is a URL"),
    "no prefix": ({"image": f"iVBORw0KGgo{'A' * 99}"}, r"nor a data URI: text of 110 characters$"),
    "negative": ({"video": "a.mp4", "fps": -1}, "at least 0.001"),
}


def test_every_faulty_entry_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a fault without its line or index, one that hides the others, or one that is accepted."""
    monkeypatch.setattr("vlqc.errors.SHOWN_FAULTS", len(FAULTS))
    entries = [entry for entry, _ in FAULTS.values()]
    for begin in (0, 18):
        path = lines(folder / "x.jsonl", {"prompt": "fine"}, *entries[begin : begin + 18])
        with pytest.raises(UserError) as caught:
            list_samples(path)
        expected = list(FAULTS.values())[begin : begin + 18]
        for number, (fault, (_, what)) in enumerate(zip(caught.value.faults, expected, strict=True), start=2):
            assert fault.where == f"{path} line {number}"
            assert re.search(what, fault.what), (fault.what, what)
    (folder / "x.json").write_text(json.dumps([{"prompt": "fine"}, entries[0]]))
    with pytest.raises(UserError) as caught:
        list_samples(folder / "x.json")
    assert caught.value.faults[0].where == f"{folder / 'x.json'} index 1"


def test_errors_do_not_print_data(model: Path, folder: Path) -> None:
    """Catches megabytes on the terminal: base64 data in a message, or one fault for each of thousands of lines."""
    data = base64.b64encode(bytes(range(256)) * 400).decode()
    entries: list[object] = [
        {"image": f"data:image/png;base64,{data}!"},
        {"image": data},
        {"image": "a.png", "prompt": 1, data: 1},
        {"image": f"https://{data}"},
        {"image": [f"data:{data}"]},
        {"messages": [{"role": data, "content": data}]},
        {"messages": [turn("user", {"type": data})]},
        {"messages": data},
        f'{{"{data}": 1, "{data}": 2}}',
        *([{"query": 1}] * 1000),
    ]
    with pytest.raises(UserError) as caught:
        read(model, folder / "x.jsonl", *entries)
    assert len(str(caught.value)) < 5000 and len(caught.value.faults) < 30 and data[:20] not in str(caught.value)
    for entry in ({"image": f"data:image/png;base64,{data}"}, {"image": "x" * 300}, {"prompt": f"{data}{PAD}"}):
        with pytest.raises(UserError) as caught:
            read(model, folder / "x.jsonl", entry)
        assert len(str(caught.value)) < 1000


def test_missing_images_name_the_folder(model: Path, tmp_path: Path) -> None:
    """Catches an error for LLaVA's image folders that does not say where the images were looked for."""
    entry = {"image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>"}]}
    (tmp_path / "x.json").write_text(json.dumps([entry]))
    with pytest.raises(UserError) as caught:
        load_samples(model, tmp_path / "x.json")
    missing, total = caught.value.faults
    assert str(tmp_path / "coco" / "1.jpg") in missing.what and str(tmp_path) in total.fix


def test_files_that_hold_no_samples(model: Path, tmp_path: Path) -> None:
    """Catches a list of data sets that is read as samples, and a data file beside images that nobody mentions."""
    described: dict[str, object] = {
        "llama_factory": {"demo": {"file_name": "demo.json", "formatting": "sharegpt"}},
        "ms_swift": [{"dataset_path": "demo.json"}],
    }
    for content in described.values():
        (tmp_path / "dataset_info.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="describes data sets") as caught:
            list_samples(tmp_path / "dataset_info.json")
        assert str(tmp_path / "demo.json") in caught.value.faults[0].fix
    with pytest.raises(UserError, match=r"pass .*dataset_info\.json"):
        list_samples(tmp_path)
    write_image(tmp_path / "a.jfif.png").rename(tmp_path / "a.jfif")
    listed = list_samples(tmp_path)
    assert [conversation.images for conversation in listed.conversations] == [(ImageRef(tmp_path / "a.jfif"),)]
    assert "dataset_info.json" in listed.notes[0]


A = ImageRef(Path("a.png"))
FRAMES = VideoRef((A, ImageRef(Path("b.png"))))
READ: dict[str, tuple[object, bool, list[Turn]]] = {  # entry, whether the model is text-only, turns
    "text": ({"prompt": "The <video> of HTML"}, False, [Turn("user", ("The <video> of HTML",))]),
    "text of a text-only model": ({"query": "<image> <img>x</img>"}, True, [Turn("user", ("<image> <img>x</img>",))]),
    "response": (
        {"image": "a.png", "prompt": "Embed it", "response": "<image> <video>"},
        False,
        [Turn("user", (A, "Embed it")), Turn("assistant", ("<image> <video>",))],
    ),
    "answer": (
        {"query": "<image>It", "response": "<image> <img>b</img>", "images": ["a.png"]},
        False,
        [Turn("user", (A, "It")), Turn("assistant", ("<image> <img>b</img>",))],
    ),
    "other kind": ({"image": "a.png", "prompt": "<video>"}, False, [Turn("user", (A, "<video>"))]),
    "in a turn and listed": (
        {"messages": [turn("user", {**IMAGE, "image": "a.png"}, text("<image>Hi"))], "images": ["b.png"]},
        False,
        [Turn("user", (A, ImageRef(Path("b.png")), "Hi"))],
    ),
    "no response": ({"instruction": "Hi", "output": ""}, False, [Turn("user", ("Hi",))]),
    "frames": ({"query": "Hi", "videos": ["a.png", "b.png"]}, False, [Turn("user", (FRAMES, "Hi"))]),
    "frames of a part": (
        [{"role": "user", "content": [{"type": "video", "video": ["a.png", "b.png"]}, text("Hi")]}],
        False,
        [Turn("user", (FRAMES, "Hi"))],
    ),
    "videos": (
        {"video": ["a.mp4", ["a.png", "b.png"]], "prompt": "Hi"},
        False,
        [Turn("user", (VideoRef(Path("a.mp4")), FRAMES, "Hi"))],
    ),
    "percent": (
        {"image": "data:image/png;base64,%2B%2Fx%3D", "prompt": "Hi"},
        False,
        [Turn("user", (ImageRef(b"\xfb\xfc"), "Hi"))],
    ),
    "nulls": (
        {"messages": None, "query": None, "images": None, "image": "a.png", "prompt": "Hi", "response": None},
        False,
        [Turn("user", (A, "Hi"))],
    ),
    "empty columns": ({"messages": [], "question": "", "query": "Hi"}, False, [Turn("user", ("Hi",))]),
}


@pytest.mark.parametrize("name", READ)
def test_turns_of_an_entry(name: str) -> None:
    """Catches text that is taken for a tag, a tag of the assistant that an image is put into, and columns of a table
    without a value that select the format."""
    entry, text_only, turns = READ[name]
    _, conversation = read_entry(entry, Path(), "", "Qwen3" if text_only else None)
    assert list(conversation.turns) == turns


@pytest.mark.every_transformers
@pytest.mark.parametrize(
    "content", ["{{ message['content'] }}", "{{ ' ' + message['content'] }}", "{{ message['content'].strip() }}"]
)
def test_templates_for_text(tmp_path: Path, folder: Path, content: str) -> None:
    """Catches a list of parts that is printed into the prompt, or a template of this kind that is refused."""
    template = "{% for message in messages %}[{{ message['role'] }}]" + content + "{% endfor %}"
    model = write_chat_checkpoint(tmp_path / "model", template)
    calibration = read(model, folder / "x.jsonl", {"image": "a.png", "prompt": "Hi <image> Ho", "response": "1"})
    space = " " if "' '" in content else ""
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = tokenizer(f"[user]{space}Hi {VISION} Ho[assistant]{space}1".replace(PAD, PAD * 6)).input_ids
    assert calibration.samples[0]["input_ids"].tolist() == [expected]
    assert any("takes text only" in note for note in calibration.notes)


def test_a_conversation_that_the_template_refuses(tmp_path: Path, folder: Path) -> None:
    """Catches one bad line that is blamed on the chat template of the checkpoint."""
    refused = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('start with the user') }}{% endif %}"
    model = write_chat_checkpoint(tmp_path / "model", refused + TEMPLATE)
    with pytest.raises(UserError) as caught:
        read(model, folder / "x.jsonl", {"query": "Hi"}, {"messages": [{"role": "assistant", "content": "Ho"}]})
    assert caught.value.faults[0].where.endswith("line 2") and "start with the user" in caught.value.faults[0].why
    (model / "tokenizer_config.json").write_text(
        (model / "tokenizer_config.json").read_text().replace("loop.first", "undefined.x")
    )
    with pytest.raises(UserError, match=r"chat template of .* cannot be used"):
        read(model, folder / "x.jsonl", {"query": "Hi"})


def test_formats_of_text_only_models(tmp_path: Path) -> None:
    """Catches a text-only model that takes its own lines only, or an image that it ignores."""
    model = write_text_checkpoint(tmp_path / "model")
    entries = [
        {"prompt": "Hi", "response": "Ho"},
        {"messages": [turn("user", text("Hi")), turn("assistant", text("Ho"))]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"query": "Hi", "response": "Ho"},
    ]
    samples = read(model, tmp_path / "x.jsonl", *entries).samples
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    expected = expected_ids(model, messages)
    assert [sample["input_ids"][0].tolist() for sample in samples] == [expected] * 4
    with pytest.raises(UserError, match="no vision tower"):
        read(model, tmp_path / "x.jsonl", {"messages": [turn("user", {**IMAGE, "image": "a.png"})]})
    with pytest.raises(UserError, match="takes text only"):
        read(model, tmp_path / "x.jsonl", {"messages": [turn("user", IMAGE, text("Hi"))]})


def test_turns_without_a_template(tmp_path: Path, folder: Path) -> None:
    """Catches turns that are lost, or a second system prompt, where the family's default form is used."""
    model = write_chat_checkpoint(tmp_path / "model")
    expected = expected_ids(model, [SYSTEM, USER, ANSWER, turn("user", text("More?"))], 6)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    entry = {"query": "More?", "history": [["<image>Hi", "Ho"]], "system": "Be brief.", "images": ["a.png"]}
    (sample,) = read(model, folder / "x.jsonl", entry).samples
    assert sample["input_ids"].tolist() == [expected]


def test_a_name_with_percent_signs(tmp_path: Path) -> None:
    """Catches a file:// URL that is decoded although the file is called by the name as it is written."""
    written, decoded = write_image(tmp_path / "a%20b.png"), tmp_path / "a b.png"
    assert image_ref(f"file://{written}", tmp_path) == ImageRef(written)
    write_image(decoded)
    assert image_ref(f"file://{written}", tmp_path) == ImageRef(decoded)


def test_default_prompt(folder: Path) -> None:
    """Catches a line without a prompt that asks nothing."""
    (conversation,) = list_samples(lines(folder / "x.jsonl", {"image": "a.png"})).conversations
    assert conversation.request == PROMPT


def test_the_examples_of_the_documentation(folder: Path) -> None:
    """Catches an example of the page about calibration data that is not read, or a format that has none."""
    page = (Path(vlqc.__file__).parent / "docs" / "calibration_data.md").read_text(encoding="utf-8")
    section = page.partition("\n## Formats\n")[2].partition("\n## ")[0]
    examples = re.findall(r"^\|.*\| `(\{.*\})` \|$", section, re.MULTILINE)
    listed = list_samples(lines(folder / "x.jsonl", *examples))
    assert len(listed.conversations) == len(examples)
    assert all(conversation.images for conversation in listed.conversations)
    assert all(form.title in listed.notes[0] for form in FORMATS)


def test_files_of_very_many_samples(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a training set that is read until the memory is full, and one that cannot be used at all."""
    monkeypatch.setattr(dataset, "MOST_SAMPLES", 3)
    path = lines(folder / "x.jsonl", *({"query": str(number)} for number in range(4)))
    with pytest.raises(UserError, match="--max_samples"):
        load_samples(model, path)
    assert len(load_samples(model, path, max_samples=4).samples) == 4


if transformers.__version__.startswith("4.49"):  # later ones need torchvision for it

    def test_equal_to_the_stock_processor(model: Path) -> None:
        """Catches any difference from transformers' own processor in conversations with several images and turns."""
        with_tags = TEMPLATE.replace("['content'] }}", f"['content'] | replace('<image>', '{VISION}') }}}}")
        processor = transformers.AutoProcessor.from_pretrained(model)
        samples = load_samples(model, DATA / "ms_swift.jsonl").samples
        assert QWEN2_5_VL.inputs.processing is not None
        for line, sample in zip((DATA / "ms_swift.jsonl").read_text().splitlines(), samples, strict=True):
            entry = json.loads(line)
            images = [read_image(DATA / name) for name in entry.get("images", [])]
            sizes = [QWEN2_5_VL.inputs.processing.resize(image.height, image.width) for image in images]
            resized = [image.resize((width, height)) for image, (height, width) in zip(images, sizes, strict=True)]
            rendered = processor.tokenizer.apply_chat_template(
                entry["messages"], chat_template=with_tags, tokenize=False, add_generation_prompt="label" in entry
            )
            expected = processor(text=[rendered], images=resized or None, return_tensors="pt")
            assert set(expected) == set(sample)
            assert all(torch.equal(sample[name], expected[name]) for name in sample)
