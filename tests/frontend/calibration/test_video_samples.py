"""Samples with videos: the same model inputs as from the processors of transformers, budgets, and faulty videos."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.frontend.calibration.test_image_families import make
from tests.support.calibration_files import TINY, lines, model_without, write_image
from tests.support.videos import vision_process, write_video
from vlqc.errors import UserError
from vlqc.families.inputs.video_processing import SampledFrames, VideoTokens
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.families.qwen3_vl import QWEN3_VL
from vlqc.frontend.calibration import video_frames
from vlqc.frontend.calibration.conversation import ImageRef, VideoRef
from vlqc.frontend.calibration.dataset import CalibrationDataset, load_samples
from vlqc.frontend.calibration.images import ImageError
from vlqc.frontend.calibration.sources import list_samples

VIDEO = 6  # the tiny tokenizer's number of the video token
PROMPT = "What happens"
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "frames": {"nframes": 5, "min_pixels": 4 * 28 * 28, "max_pixels": 9 * 28 * 28},
    "range": {"fps": 4.0, "video_start": 0.5, "video_end": 2.2, "total_pixels": 20000},
    "resized": {"fps": 1, "min_frames": 2, "max_frames": 4, "resized_height": 50, "resized_width": 90},
}
LISTS: dict[str, dict[str, Any]] = {
    "list": {},
    "list with a rate": {"sample_fps": 5.0, "raw_fps": 20.0, "min_pixels": 30000},
}


@pytest.fixture(scope="module")
def reference() -> Iterator[Any]:
    with vision_process() as module:
        yield module


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds, 12 frames of 63 x 48 pixels."""
    return write_video(tmp_path_factory.mktemp("clip") / "a.mkv", frames=12, width=63, codec="ffv1")


def write_frames(folder: Path, count: int) -> list[str]:
    folder.mkdir()
    return [str(write_image(folder / f"f{number}.png", 70, 50, seed=number)) for number in range(count)]


def sample_of(tmp_path: Path, line: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    (sample,) = load_samples(TINY, lines(tmp_path / "q.jsonl", {"prompt": PROMPT, **line}), **options).samples
    return sample


if transformers.__version__.startswith("4.49"):  # later ones need torchvision for it

    @pytest.mark.parametrize("case", [*CASES, *LISTS])
    def test_equal_to_the_stock_processor(tmp_path: Path, reference: Any, clip: Path, case: str) -> None:
        """Catches any difference from qwen_vl_utils and transformers' own processor."""
        settings = CASES.get(case) or LISTS.get(case, {})
        video = write_frames(tmp_path / "frames", 5) if case in LISTS else str(clip)
        content = [{"type": "video", "video": video, **settings}, {"type": "text", "text": PROMPT}]
        messages = [{"role": "user", "content": content}]
        processor = transformers.AutoProcessor.from_pretrained(TINY)
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        _, videos, options = reference.process_vision_info(messages, return_video_kwargs=True)
        expected = processor(text=[text], videos=videos, fps=options["fps"], return_tensors="pt")
        sample = sample_of(tmp_path, {"video": video, **settings})
        assert set(sample) == set(expected)
        assert all(torch.equal(sample[name], torch.as_tensor(expected[name])) for name in sample)
        if case in LISTS:
            folder = sample_of(tmp_path, {"video": str(tmp_path / "frames"), **settings})
            assert all(torch.equal(sample[name], folder[name]) for name in sample)


if transformers.__version__.startswith("4.57"):

    @pytest.mark.qwen3_vl
    def test_tokens_and_patches_of_qwen3_vl(tmp_path: Path, reference: Any, clip: Path) -> None:
        """Catches any difference from Qwen3-VL's own processor, whose video processor needs torchvision.

        In its place the image processor makes the patches: in this version it takes videos, too.
        """
        model = make(tmp_path, "qwen3_vl")
        content = [{"type": "video", "video": str(clip)}, {"type": "text", "text": PROMPT}]
        messages = [{"role": "user", "content": content}]
        _, ((frames, metadata),) = reference.process_vision_info(
            messages, return_video_metadata=True, image_patch_size=16
        )
        images = transformers.Qwen2VLImageProcessor.from_pretrained(model)
        made = images(images=None, videos=[frames], do_resize=False, return_tensors="pt")
        made["video_metadata"] = [SimpleNamespace(**metadata)]
        stock: Any = object.__new__(transformers.Qwen3VLProcessor)
        stock.tokenizer = transformers.AutoTokenizer.from_pretrained(model)

        def process(**_: Any) -> Any:
            return made

        process.merge_size = 2  # type: ignore[attr-defined]
        stock.image_processor, stock.video_processor = images, process
        stock.image_token, stock.video_token, stock.image_token_id, stock.video_token_id = (
            *("<|image_pad|>", "<|video_pad|>"),
            *(VIDEO - 1, VIDEO),
        )
        stock.vision_start_token, stock.vision_end_token = "<|vision_start|>", "<|vision_end|>"
        text = "<bos><|vision_start|><|video_pad|><|vision_end|> " + PROMPT
        expected = stock(text=[text], videos=[frames], return_tensors="pt")
        source = lines(tmp_path / "q.jsonl", {"prompt": PROMPT, "video": str(clip)})
        (sample,) = load_samples(model, source).samples
        assert "second_per_grid_ts" not in sample
        for name in sample:
            torch.testing.assert_close(sample[name], expected[name].to(sample[name].dtype), rtol=0, atol=1e-6)

    @pytest.mark.qwen3_vl
    def test_timestamps() -> None:
        """Catches times that Qwen3-VL's own processor does not write."""
        sampled = SampledFrames((0, 7, 15, 22, 29, 37), 23.976, 3.2)
        processing: Any = QWEN3_VL.inputs.videos
        times = processing.times(sampled, 2)
        stock: Any = object.__new__(transformers.Qwen3VLProcessor)
        expected = stock._calculate_timestamps(list(sampled.indices), sampled.fps, 2)
        step = "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
        assert processing.placeholder("<|video_pad|>", VideoTokens(times, 2)) == "".join(
            f"<{seconds:.1f} seconds>{step}" for seconds in expected
        )


def test_image_and_video_in_one_sample(tmp_path: Path, clip: Path) -> None:
    """Catches an image or a video that takes the place of the other, or is lost."""
    image = str(write_image(tmp_path / "a.png", 84, 56))
    both = sample_of(tmp_path, {"image": image, "video": str(clip)})
    alone = sample_of(tmp_path, {"video": str(clip)})
    assert torch.equal(both["pixel_values_videos"], alone["pixel_values_videos"])
    assert both["image_grid_thw"].tolist() == [[1, 4, 6]]
    tokens = both["input_ids"][0].tolist()
    assert tokens.count(VIDEO - 1) == 6 and tokens.count(VIDEO) == alone["input_ids"][0].tolist().count(VIDEO)


def grid_of(sample: dict[str, Tensor]) -> list[int]:
    ((steps, height, width),) = sample["video_grid_thw"].tolist()
    return [steps, height, width]


def test_token_budget(tmp_path: Path, clip: Path) -> None:
    """Catches text or frames that are cut off, smaller frames where fewer are enough, an unused budget."""
    line = {"video": str(clip), "fps": 4.0}
    full = sample_of(tmp_path, line)
    assert grid_of(full)[0] == 6
    step, text = grid_of(full)[1] * grid_of(full)[2] // 4, full["input_ids"].shape[1]
    text -= 6 * step
    fewer = sample_of(tmp_path, line, max_tokens=text + 5 * step + 3)
    assert grid_of(fewer) == [5, *grid_of(full)[1:]]
    assert fewer["second_per_grid_ts"].tolist() == pytest.approx([6 / 5 * float(full["second_per_grid_ts"])])
    smaller = sample_of(tmp_path, line, max_tokens=text + step)
    steps, height, width = grid_of(smaller)
    assert steps == 2 and step * 0.6 < steps * height * width // 4 <= step
    assert smaller["input_ids"].shape[1] == text + steps * height * width // 4
    smallest = sample_of(tmp_path, line, max_tokens=text + 8)
    assert grid_of(smallest)[0] == 2
    with pytest.raises(UserError, match=f"at least 8 tokens for its videos and {text}"):
        sample_of(tmp_path, line, max_tokens=text + 7)
    (note,) = [
        note
        for note in load_samples(TINY, tmp_path / "q.jsonl", max_tokens=text + 8).notes
        if "fewer or smaller frames" in note
    ]
    assert note.startswith("1 of 1 video")


def test_budget_with_images(tmp_path: Path, clip: Path) -> None:
    """Catches a sample with images and a video that exceeds the budget or is refused."""
    image = str(write_image(tmp_path / "a.png", 280, 280))
    full = sample_of(tmp_path, {"image": [image, image], "video": str(clip)})
    for limit in (full["input_ids"].shape[1] - 1, 250, 60):
        sample = sample_of(tmp_path, {"image": [image, image], "video": str(clip)}, max_tokens=limit)
        assert limit * 0.6 < sample["input_ids"].shape[1] <= limit and len(sample["image_grid_thw"]) == 2


def tiny_with(tmp_path: Path, least: int, most: int) -> Path:
    """The tiny checkpoint whose image processor has these limits, in image tokens."""
    model = model_without(tmp_path)
    path = model / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    settings |= {"min_pixels": least * 784, "max_pixels": most * 784}
    settings["size"] = {"shortest_edge": least * 784, "longest_edge": most * 784}
    path.write_text(json.dumps(settings))
    return model


@pytest.mark.every_transformers
@pytest.mark.parametrize(("least", "most"), [(160, 1280), (4, 64), (4, 1280)])
def test_budget_after_the_image_processor(tmp_path: Path, clip: Path, least: int, most: int) -> None:
    """Catches tokens that are counted before the image processor enlarges or reduces the frames."""
    model = tiny_with(tmp_path, least, most)
    source = lines(tmp_path / "q.jsonl", {"video": str(clip), "prompt": PROMPT, "fps": 4.0})

    def load(max_tokens: int | None) -> CalibrationDataset:
        return load_samples(model, source, max_tokens=max_tokens)

    (full,) = load(None).samples
    length, per_step = full["input_ids"].shape[1], grid_of(full)[1] * grid_of(full)[2] // 4
    text = length - 6 * per_step
    as_it_is = load(length)
    assert torch.equal(as_it_is.samples[0]["pixel_values_videos"], full["pixel_values_videos"])
    assert not any("fewer or smaller" in note for note in as_it_is.notes)
    for limit in (length - 1, text + 2 * per_step, text + 2 * least + 10):
        fitted = load(limit)
        assert limit * 0.6 < fitted.samples[0]["input_ids"].shape[1] <= limit
        assert any("1 of 1 video with fewer or smaller frames" in note for note in fitted.notes)
    with pytest.raises(UserError, match=f"at least {2 * least} tokens for its videos"):
        load(text + 2 * least - 1)


@pytest.mark.parametrize(("limit", "steps"), [(2, 1), (5, 2), (6, 3), (100, 3)])
def test_maximum_number_of_frames(tmp_path: Path, clip: Path, limit: int, steps: int) -> None:
    """Catches a video with more frames than asked for, an odd number of them, or frames from its beginning only."""
    sample = sample_of(tmp_path, {"video": str(clip)}, max_frames=limit)
    assert grid_of(sample)[0] == steps
    frames = write_frames(tmp_path / "frames", 6)
    first, last = (sample_of(tmp_path, {"video": [frames[0], frames[5]]}), sample_of(tmp_path, {"frames": frames}))
    if limit == 2:
        few = sample_of(tmp_path, {"frames": frames}, max_frames=2)
        assert torch.equal(few["pixel_values_videos"], first["pixel_values_videos"]) and grid_of(last)[0] == 3


def test_frames_of_a_list_by_nframes(tmp_path: Path) -> None:
    """Catches a number of frames that is rounded otherwise for lists than for files."""
    frames = write_frames(tmp_path / "frames", 8)
    for wished, steps in ((2, 1), (3, 2), (5, 2), (6, 3), (40, 4)):
        assert grid_of(sample_of(tmp_path, {"frames": frames, "nframes": wished}))[0] == steps


def test_size_of_frames_after_the_maximum_number(tmp_path: Path) -> None:
    """Catches frames whose size is that of more frames than are used, and a missing note."""
    total = {"total_pixels": 60 * 784, "min_pixels": 4 * 784}
    clip = write_video(tmp_path / "a.mkv", width=168, height=168, codec="ffv1")
    frames = [str(write_image(tmp_path / f"{number}.png", 168, 168, seed=number)) for number in range(8)]
    for media in ({"video": str(clip), "fps": 4.0}, {"frames": frames}):
        line: dict[str, Any] = {**media, **total}
        by_line, all_frames = sample_of(tmp_path, {**line, "max_frames": 4}), sample_of(tmp_path, line)
        by_option = sample_of(tmp_path, line, max_frames=4)
        assert by_option.keys() == by_line.keys()
        assert all(torch.equal(by_option[name], by_line[name]) for name in by_line)
        assert grid_of(by_line)[0] == 2 and grid_of(by_line)[1] > grid_of(all_frames)[1]
        notes = load_samples(TINY, tmp_path / "q.jsonl", max_frames=4).notes
        assert any("1 of 1 video with fewer frames by --max_frames 4" in note for note in notes)
        assert not any("--max_frames" in note for note in load_samples(TINY, tmp_path / "q.jsonl", max_frames=40).notes)


def test_listed_frames_are_resized_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches all frames of a list in memory at their full size."""
    order: list[str] = []
    for name in ("read_image", "VideoPlan._resize"):
        owner, attribute = (video_frames.VideoPlan, "_resize") if "." in name else (video_frames, name)
        real = getattr(owner, attribute)

        def recorded(*values: Any, real: Any = real, attribute: str = attribute) -> Any:
            order.append(attribute)
            return real(*values)

        monkeypatch.setattr(owner, attribute, recorded)
    sample_of(tmp_path, {"frames": write_frames(tmp_path / "frames", 4)})
    assert order == ["read_image", *["read_image", "_resize"] * 4]


@pytest.mark.parametrize("key", ["fps", "sample_fps", "raw_fps"])
def test_lowest_rates(tmp_path: Path, key: str) -> None:
    """Catches rates for which the seconds of a temporal step, or its time, are infinite."""
    frames = write_frames(tmp_path / "frames", 2)
    for rate in (1e-300, 0.00099, 0):
        with pytest.raises(UserError) as caught:
            sample_of(tmp_path, {"frames": frames, key: rate})
        message = str(caught.value)
        assert "line 1" in message and repr(key) in message and "q.jsonl" in message
    seconds = sample_of(tmp_path, {"frames": frames, key: 0.001})["second_per_grid_ts"]
    assert bool(torch.isfinite(seconds).all())


def test_videos_of_a_folder(tmp_path: Path, clip: Path) -> None:
    """Catches videos of a folder that are left out, and one that ends the run although bad ones are to be skipped."""
    folder = tmp_path / "media"
    folder.mkdir()
    write_image(folder / "b.png")
    (folder / "a.MKV").write_bytes(clip.read_bytes())
    (folder / "c.mp4").write_bytes(b"no video")
    with pytest.raises(UserError) as caught:
        load_samples(TINY, folder)
    assert [fault.what for fault in caught.value.faults[:-1]] == [f"video {folder / 'c.mp4'} cannot be used"]
    assert caught.value.faults[-1].fix.endswith("to skip these videos")
    calibration = load_samples(TINY, folder, skip_bad_images=True)
    assert ["pixel_values_videos" in sample for sample in calibration.samples] == [True, False]
    assert any(note.startswith(f"skipped video {folder / 'c.mp4'}: not a video") for note in calibration.notes)
    assert any("1 calibration image and 1 calibration video" in note for note in calibration.notes)
    (alone,) = load_samples(TINY, folder / "a.MKV").samples
    assert torch.equal(alone["pixel_values_videos"], calibration.samples[0]["pixel_values_videos"])
    without = list_samples(folder, no_videos="MyVL")
    assert len(without.conversations) == 1 and "ignored 2 videos" in without.notes[0]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ({"video": "missing.mp4"}, "no such file"),
        ({"video": "empty"}, "it has no frames"),
        ({"video": "clips"}, "the video a.mp4: name the file"),
        ({"video": ["a.png", "b.png"]}, "different sizes"),
        ({"video": ["a.png", "c.png"]}, "frame .*c.png: .*no such file"),
        ({"video": ["a.png", "a.png"], "video_start": 1.0}, "video_start is for video files"),
        ({"video": "clip", "nframes": 14}, "nframes is 14, and the video has 12"),
        ({"video": "clip", "video_start": 9.0}, "no two frames"),
        ({"video": "clip", "max_pixels": 1000}, "less than min_pixels: .*, the default"),
        ({"image": "a.mp4"}, 'write "video"'),
        ({"video": "clip", "prompt": "a <|video_pad|>"}, "which stands for a video"),
    ],
)
def test_faulty_videos(tmp_path: Path, clip: Path, line: dict[str, Any], why: str) -> None:
    """Catches a traceback, or an error without the video, for settings and files that cannot be used."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").touch()
    write_image(tmp_path / "a.png", 70, 50)
    write_image(tmp_path / "b.png", 300, 50)
    if line.get("video") == "clip":
        line = {**line, "video": str(clip)}
    with pytest.raises(UserError, match=why):
        sample_of(tmp_path, line)


@pytest.mark.parametrize("source", [Path("a" * 300), Path("a" * 300, "b.mp4"), (ImageRef(Path("a" * 300)),)])
def test_names_that_are_too_long(source: Any) -> None:
    """Catches a traceback for names that the file system does not take."""
    with pytest.raises(ImageError, match="File name too long"):
        video_frames.plan_video(VideoRef(source), QWEN2_5_VL.inputs.videos)


def test_more_packets_than_frames(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a failure for files whose packets do not each hold one frame."""
    real = video_frames.read_stream
    monkeypatch.setattr(video_frames, "read_stream", lambda path: replace(real(path), frames=15))
    found = sample_of(tmp_path, {"video": str(clip), "fps": 4.0})
    monkeypatch.undo()
    expected = sample_of(tmp_path, {"video": str(clip), "fps": 4.0})
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_frames_of_a_folder_are_ordered_by_number(tmp_path: Path) -> None:
    """Catches frame 10 before frame 2."""
    for number in (1, 2, 10):
        write_image(tmp_path / f"frame_{number}.png")
    assert [image.name[-6:] for image in video_frames._listed(VideoRef(tmp_path))] == ["_1.png", "_2.png", "10.png"]
