"""Every model family from a synthetic checkpoint with outliers to a verified folder and back."""

import filecmp
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vlqc
from tests.support import naive_w8a8
from tests.support.fake_quantized import deviations, fake_quantized
from tests.support.interrupted_runs import fail_at_stage
from tests.support.renamed_modules import rename_children
from tests.support.subprocesses import run_python
from tools.checkpoints.outlier_checkpoint import make, random_samples
from vlqc.cli.commands import app
from vlqc.families.layer_names import layer_pattern
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.streamed_model import StreamedModel, build_meta_model
from vlqc.verify import verify_folder
from vlqc.verify.findings import RANKING

PHOTOS = Path(__file__).parents[1] / "photos"
NEW = pytest.mark.qwen3_vl
FAMILIES = [
    "qwen2_vl",
    "qwen2",
    pytest.param("qwen3", marks=NEW),
    pytest.param("qwen3_vl", marks=NEW),
    pytest.param("qwen3_vl_moe", marks=NEW),
]
SCHEMES: dict[str, dict[str, Any]] = {"static": {}, "dynamic": {"is_dynamic": True}}
OTHER_SCHEMES: dict[str, dict[str, Any]] = {
    "m4": {"anti_method": "m4"},
    "int4": {
        "w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False, "anti_method": "m4",
        "target": "vllm-ascend@0.18",
    },
}  # fmt: skip
LEAST = {"static": 28.0, "dynamic": 33.0, "m4": 28.0, "int4": 14.0}  # SQNR of the logits, dB
TIED = ("qwen2", "qwen3_vl")  # the output head shares the embedding's weight, as in the small published models
PLAIN = 15.0  # that of W8A8 without smoothing stays below it
Sample = dict[str, Tensor]


class Case:
    """A float checkpoint, its samples, and the folder of each scheme, compiled on first use."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder, self.source = family, folder, folder / "float"
        self.config = make(self.source, family=family, tied=family in TIED)
        self.samples = random_samples(self.config, 6, seed=100)
        self.unseen = random_samples(self.config, 4, seed=7)

    def compiled(self, scheme: str) -> Path:
        result = self.folder / scheme
        if not result.exists():
            vlqc.compile(model_path=self.source, save_directory=result, samples=self.samples, **self.options(scheme))
        return result

    def options(self, scheme: str) -> dict[str, Any]:
        return {"target": "vllm-ascend", **(SCHEMES | OTHER_SCHEMES)[scheme]}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def logits_of(case: Case, model: nn.Module) -> Tensor:
    return naive_w8a8.logits(model, case.unseen)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_accuracy_with_outliers(case: Case, scheme: str) -> None:
    """Catches an edge that is not found, a fold that is not applied, and a layer that is run wrongly."""
    reference = naive_w8a8.load_float(case.source)
    expected = logits_of(case, reference)
    plain = naive_w8a8.signal_to_noise(expected, logits_of(case, naive_w8a8.quantized(reference, case.samples)))
    compiled = naive_w8a8.signal_to_noise(expected, logits_of(case, vlqc.load(case.compiled(scheme))))
    assert plain < PLAIN and compiled >= LEAST[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_loaded_folder_equals_a_simulation(case: Case, scheme: str) -> None:
    """Catches a tensor under another layer's name, a wrong scale or offset, and a norm or router left unscaled."""
    folder = case.compiled(scheme)
    of_layers, of_logits = deviations(fake_quantized(folder, case.source), vlqc.load(folder), partial(logits_of, case))
    # A layer's input within float32 rounding of the middle between two integers is rounded the other way.
    assert of_layers < 2e-3 and of_logits < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_verify_compares_every_tensor(case: Case, scheme: str) -> None:
    """Catches a fault in an undamaged folder, and tensors that no check reads."""
    result = verify_folder(
        case.compiled(scheme), model_path=case.source, samples=case.unseen[:2], min_sqnr=LEAST[scheme]
    )
    assert result.ok, [fault.what for fault in result.faults]
    assert result.facts["loads in"]
    names = {name for path in case.source.glob("*.safetensors") for name in load_file(path)}
    stacked = [name for name in names if ".experts." in name]  # one tensor of all experts
    assert result.examined["float weights"] >= len(names) - len(stacked)


def test_verify_finds_one_damaged_channel(case: Case, tmp_path: Path) -> None:
    """Catches a norm, bias or scale that is compared with nothing, and with it an edge that verification lacks."""
    folder = case.compiled("static")
    (file,) = folder.glob("*.safetensors")
    tensors, damaged = load_file(file), tmp_path / "damaged"
    damaged.mkdir()
    for path in folder.iterdir():
        if path != file and path.name != "MANIFEST.json":
            (damaged / path.name).symlink_to(path)
    vectors = [name for name, tensor in tensors.items() if tensor.ndim == 1 and tensor.is_floating_point()]
    of_norms = {layer_pattern(name): name for name in vectors if "norm" in name or "ln_q" in name}
    for name in of_norms.values():
        changed = tensors[name].clone()
        changed[3] = changed[3] * 1.25 + 0.01
        save_file(tensors | {name: changed}, damaged / file.name, metadata={"format": "pt"})
        result = verify_folder(damaged, model_path=case.source)
        assert any(fault.check == "float weights" for fault in result.faults), name


def test_locate_explains_the_error_of_the_logits(case: Case) -> None:
    """Catches variants of the model that share a tensor which the model writes into: transformers 4 adds image features
    to the outputs of decoder layers in place."""
    result = verify_folder(case.compiled("static"), model_path=case.source, samples=case.unseen[:2], locate=True)
    shares = [row["share %"] for row in result.facts[RANKING]]
    assert result.ok and 60 < sum(shares) < 200 and max(shares) < 90


def test_resume_gives_the_same_bytes(case: Case, tmp_path: Path) -> None:
    """Catches outputs that a later stage reads and that are not saved, such as those of mergers between blocks."""
    whole = case.compiled("static")
    stages = list(StreamedModel.open(Checkpoint(case.source)).stages)
    mergers = [number for number, stage in enumerate(stages) if "merger_list.1" in stage]
    for number in {mergers[0] + 1 if mergers else 1, len(stages) - 1}:
        target = tmp_path / str(number)
        options = {"model_path": case.source, "save_directory": target, "samples": case.samples}
        with fail_at_stage(stages[number], KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            vlqc.compile(**options, **case.options("static"))
        vlqc.compile(**options, **case.options("static"), resume=True)
        names = sorted(path.name for path in whole.iterdir())
        assert filecmp.cmpfiles(whole, target, names, shallow=False) == (names, [], [])


@pytest.mark.one_version
def test_names_of_modules_do_not_matter(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches anything found by what a module is called instead of by what it does: same edges, same integers."""

    def renamed(checkpoint: Checkpoint, **kwargs: Any) -> StreamedModel:
        module = build_meta_model(checkpoint.folder, checkpoint.config)
        names: Callable[[str], str] = rename_children(module)
        return StreamedModel(module, checkpoint, lambda path: checkpoint.family.checkpoint_name(names(path)))

    whole = case.compiled("static")
    monkeypatch.setattr(StreamedModel, "open", renamed)
    target = tmp_path / "renamed"
    vlqc.compile(model_path=case.source, save_directory=target, samples=case.samples, **case.options("static"))
    names = sorted(path.name for path in whole.iterdir())
    assert filecmp.cmpfiles(whole, target, names, shallow=False) == (names, [], [])


@pytest.mark.one_version
def test_config_is_the_source_with_keys_of_the_engines(case: Case) -> None:
    """Catches a config that transformers has rewritten, and one in another form than the published models have."""
    emitted = json.loads((case.compiled("static") / "config.json").read_text())
    added = {"torch_dtype", "quantize"}

    def compare(source: dict[str, Any], result: dict[str, Any]) -> None:
        # null is the same as a missing key
        source = {key: value for key, value in source.items() if value is not None or key in result}
        assert source.keys() <= result.keys() and result.keys() - source.keys() <= added
        for key, value in source.items():
            if isinstance(value, dict):
                compare(value, result[key])
            else:
                assert result[key] == value, key

    compare(case.config, emitted)


@pytest.mark.one_version
@pytest.mark.parametrize("scheme", OTHER_SCHEMES)
def test_other_schemes(case: Case, scheme: str) -> None:
    """Catches a scheme or smoothing method that works for one family only."""
    folder, least = case.compiled(scheme), LEAST[scheme]
    result = verify_folder(folder, model_path=case.source, samples=case.unseen[:2], min_sqnr=least)
    assert result.ok, [fault.what for fault in result.faults]
    assert "vLLM Ascend" in str(result.facts["loads in"])


@pytest.mark.one_version
def test_dump_and_report(case: Case, tmp_path: Path) -> None:
    """Catches a stage that is not dumped, and a page without the layers of a part of the model."""
    done = CliRunner().invoke(app, ["dump", str(case.source), "--output", str(tmp_path / "dump")])
    assert done.exit_code == 0, done.output
    stages = list(StreamedModel.open(Checkpoint(case.source)).stages)
    assert sorted(path.name for path in (tmp_path / "dump").iterdir() if path.is_dir()) == sorted(stages)
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(case.compiled("static")), "--output", str(page)])
    assert done.exit_code == 0, done.output
    text = page.read_text(encoding="utf-8")
    assert all(stage in text for stage in stages)


@pytest.mark.one_version
@pytest.mark.parametrize("family", ["qwen2", pytest.param("qwen3_vl_moe", marks=NEW)])
def test_two_processes_give_the_bytes_of_one(family: str, tmp_path: Path) -> None:
    """Catches a decision that depends on the samples of one process, such as which experts received tokens."""
    case = Case(family, tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    has_images = "vision_config" in case.config
    words, photos = ("one", "two", "three"), ("chelsea.jpg", "rocket.jpg", "text.jpg")
    images = [{"image": str(PHOTOS / photo)} if has_images else {} for photo in photos]
    lines = [{"prompt": f"{word} and {word}", **image} for word, image in zip(words, images, strict=True)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = []
    for count in (1, 2):
        results.append(tmp_path / f"of {count}")
        arguments = ["-m", "vlqc", "compile", "--model_path", case.source, "--calib_images", prompts,
                     "--save_directory", results[-1], "--max_tokens", 100]  # fmt: skip
        done = run_python(*arguments, processes=count)
        assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in results[0].iterdir())
    assert filecmp.cmpfiles(*results, names, shallow=False) == (names, [], [])
