"""The whole path on the tiny trained checkpoint with planted outliers: compile, load back, compare."""

import filecmp
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import vlqc
from tests.support.naive_w8a8 import load_float, signal_to_noise
from tests.support.renamed_modules import rename_children
from tools.demo import plant_outliers, tiny_task
from vlqc.families.qwen2_5_vl import original_name
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.streamed_model import StreamedModel, build_meta_model
from vlqc.ir.execution import StageRun
from vlqc.ir.stage import Stage

TINY = Path(tiny_task.__file__).parent / "tiny_vl"
EVALUATED = 64  # images, 8 answers each: half a point is 2.6 answers
Sample = dict[str, Tensor]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]  # the same path wherever there is a GPU


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with 2 % of the channels of every edge times 128: the same function, full of outliers."""
    folder = tmp_path_factory.mktemp("checkpoints") / "planted"
    plant_outliers.plant(TINY, folder, alpha=128, share=0.02, seed=0)
    return folder


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return tiny_task.samples(16, seed=1)


@pytest.fixture(scope="module")
def compiled(planted: Path, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled") / "m2"
    vlqc.compile(model_path=planted, save_directory=folder, samples=samples, rotate="none")
    return folder


@pytest.mark.every_transformers
@pytest.mark.parametrize("device_type", DEVICES)
def test_accuracy_survives_with_smoothing(
    planted: Path, samples: list[Sample], tmp_path: Path, device_type: str
) -> None:
    """Catches anything wrong between calibration and the loaded folder: a wrong scale anywhere costs answers."""
    save = tmp_path / "out"
    vlqc.compile(model_path=planted, save_directory=save, samples=samples, device_type=device_type)
    floating = tiny_task.accuracy(load_float(planted), EVALUATED)
    assert abs(floating - tiny_task.accuracy(vlqc.load(save), EVALUATED)) <= 0.5


@pytest.mark.every_transformers
def test_accuracy_collapses_without_smoothing(planted: Path, samples: list[Sample], tmp_path: Path) -> None:
    """Catches outliers that were not planted, and smoothing or rotation although none was selected."""
    save, options = tmp_path / "none", {"anti_method": "none", "rotate": "none", "act_method": 1}
    vlqc.compile(model_path=planted, save_directory=save, samples=samples, **options)
    assert tiny_task.accuracy(vlqc.load(tmp_path / "none"), EVALUATED) < 30


@pytest.mark.every_transformers
def test_same_input_same_bytes(planted: Path, samples: list[Sample], compiled: Path, tmp_path: Path) -> None:
    """Catches dates, paths, hash order, and uninitialized memory in anything that is written."""
    vlqc.compile(model_path=planted, save_directory=tmp_path / "again", samples=samples, rotate="none")
    names = sorted(path.name for path in compiled.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert filecmp.cmpfiles(compiled, tmp_path / "again", names, shallow=False) == (names, [], [])


@pytest.mark.every_transformers
def test_load_agrees_with_fake_quantization(compiled: Path, planted: Path) -> None:
    """Catches a runtime that computes anything but the stored integers, e.g. a wrong offset or bias correction.

    The reference is the Hugging Face model in float32 with weights integers*scale, inputs rounded to the stored grid,
    and the bias that quant_bias stands for (whole steps of deq_scale). Layer by layer, on the same inputs, the two may
    differ by the rounding of float32 sums: 2^-24 of their largest terms, which planted rows make 100 times the RMS of
    the output; 1e-4 of the RMS are allowed, 2e-5 were seen, a bias off by one step is 1e-3. Over the whole model such a
    difference now and then moves a value across a rounding boundary, by one step: 65 to 84 dB were seen where the
    quantization error itself is at 42 dB; 55 dB are demanded.
    """
    reference, loaded = fake_quantized(compiled, planted), vlqc.load(compiled)
    layers = {original_name(path): module for path, module in loaded.named_modules()}
    differences = {}

    def compare(layer: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            differences[layer] = float((layers[layer](args[0]) - output).abs().max() / output.square().mean().sqrt())

        return hook

    quantized = [layer for layer, module in layers.items() if hasattr(module, "scheme")]
    watched = {original_name(path): module for path, module in reference.named_modules()}
    for layer in quantized:
        watched[layer].register_forward_hook(compare(layer))
    logits = tiny_task.answer_logits(reference, 16)
    assert len(differences) == len(quantized) == 40
    assert max(differences.values()) < 1e-4
    assert signal_to_noise(logits, tiny_task.answer_logits(loaded, 16)) > 55


def fake_quantized(compiled: Path, planted: Path) -> nn.Module:
    """The Hugging Face model that computes in float32 what the folder's integers stand for."""
    tensors = {name: value for path in compiled.glob("*.safetensors") for name, value in load_file(path).items()}
    model = load_float(planted)
    state = {}
    for name in model.state_dict():
        original = original_name(name)
        state[name] = tensors[original].float() * tensors.get(original + "_scale", torch.ones(1))
    model.load_state_dict(state)
    for path, module in model.named_modules():
        layer = original_name(path)
        if f"{layer}.input_scale" in tensors:  # one without a bias may have got one that takes its mean error off
            whole = tensors[f"{layer}.weight"].long().sum(1) * tensors[f"{layer}.input_offset"].long()
            bias = (tensors[f"{layer}.quant_bias"] + whole) * tensors[f"{layer}.deq_scale"]
            module.bias = nn.Parameter(bias, requires_grad=False)
            scale, offset = tensors[f"{layer}.input_scale"], tensors[f"{layer}.input_offset"]
            module.register_forward_pre_hook(fake_quantizer(scale, offset))
    return model


def fake_quantizer(scale: Tensor, offset: Tensor) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    """A hook that rounds a module's input as the operator does: with the reciprocal of the scale."""

    def hook(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        return (torch.clamp(torch.round(args[0] * (1 / scale) + offset), -128, 127) - offset) * scale

    return hook


@pytest.mark.every_transformers
def test_one_forward_one_read_one_stage(
    planted: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a second pass over the samples, a weight read twice, and weights of other stages left in memory."""
    reads: Counter[str] = Counter()
    forwards: Counter[tuple[str, int]] = Counter()
    alive: list[set[str]] = []
    models: list[StreamedModel] = []
    read, make, run = Checkpoint.tensor, StreamedModel.open, StageRun.forward

    def counted_read(self: Checkpoint, name: str) -> Tensor:
        reads[name] += self.folder == planted
        return read(self, name)

    def watched_make(*args: Any, **kwargs: Any) -> StreamedModel:
        models.append(make(*args, **kwargs))
        return models[0]

    def watch(stage: Stage) -> None:
        real = {name for name, parameter in models[0].parameters(models[0].module).items() if not parameter.is_meta}
        alive.append({name for name in real if not name.startswith(stage.name + ".")})
        stage.module.register_forward_pre_hook(
            lambda module, args, kwargs: forwards.update([(stage.name, id((*args, *kwargs.values())[0]))]),
            with_kwargs=True,
        )

    def watched_run(self: StageRun, *args: Any) -> None:
        watch(self)
        run(self, *args)

    monkeypatch.setattr(Checkpoint, "tensor", counted_read)
    monkeypatch.setattr(StreamedModel, "open", watched_make)
    monkeypatch.setattr(StageRun, "forward", watched_run)
    vlqc.compile(model_path=planted, save_directory=tmp_path / "out", samples=samples)

    assert set(reads) == set(Checkpoint(planted).names) and set(reads.values()) == {1}
    outside = {"model.norm.weight", "visual.patch_embed.proj.weight"}
    assert alive and all(names <= outside for names in alive)
    for stage in models[0].stages:
        counts = sorted(count for (name, _), count in forwards.items() if name == stage)
        assert len(counts) == len(samples)
        assert counts[:-1] == [1] * (len(samples) - 1)  # every sample once ...
        assert counts[-1] <= 5  # ... but the one that proofs run on: before and after all folds, as float and integers


@pytest.mark.every_transformers
def test_names_do_not_matter(
    planted: Path, samples: list[Sample], compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches anything found by what a module is called instead of by what it does: same edges, same integers."""

    def renamed(checkpoint: Checkpoint, **kwargs: Any) -> StreamedModel:
        module = build_meta_model(checkpoint.folder, checkpoint.config)
        names = rename_children(module)
        return StreamedModel(module, checkpoint, lambda path: original_name(names(path)))

    monkeypatch.setattr(StreamedModel, "open", renamed)
    vlqc.compile(
        model_path=planted,
        save_directory=tmp_path / "renamed",
        samples=samples,
        dump_ir=tmp_path / "dump",
        rotate="none",
    )
    names = sorted(path.name for path in compiled.iterdir())
    assert filecmp.cmpfiles(compiled, tmp_path / "renamed", names, shallow=False) == (names, [], [])
    (file,) = (tmp_path / "dump" / "model.layers.0").glob("*-after-smooth-m2.vlqc")
    edges = file.read_text().partition("\nedges {\n")[2].partition("\n}\n")[0]
    for consumer in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        assert f'"model.layers.0.{consumer}"' in edges


def test_dumps_show_every_stage_after_every_pass(planted: Path, samples: list[Sample], tmp_path: Path) -> None:
    """Catches a pass or stage without its text, and text that cannot be read back."""
    pipeline = "insert-observers,assign-precision,quantize-activations{method=minmax},quantize-weights,lower-linears"
    vlqc.compile(
        model_path=planted,
        save_directory=tmp_path / "o",
        samples=samples[:2],
        dump_ir=tmp_path / "d",
        pipeline=pipeline,
    )
    passes = ["insert-observers", "assign-precision", "quantize-activations", "quantize-weights", "lower-linears"]
    expected = ["00-traced.vlqc", *(f"{number:02}-after-{name}.vlqc" for number, name in enumerate(passes, 1))]
    stages = {path.name: sorted(file.name for file in path.iterdir()) for path in (tmp_path / "d").iterdir()}
    blocks = [f"visual.blocks.{k}" for k in range(4)] + ["visual.merger"] + [f"model.layers.{k}" for k in range(4)]
    assert stages == {name: expected for name in blocks}
    for file in (tmp_path / "d").glob("*/*.vlqc"):
        text = file.read_text()
        assert vlqc.print_stage(vlqc.parse_stage(text)) == text


def test_result_tells_what_became_what(planted: Path, samples: list[Sample], tmp_path: Path) -> None:
    """Catches a summary that does not match the description of the folder."""
    result = vlqc.compile(model_path=planted, save_directory=tmp_path / "o", samples=samples[:2])
    description = json.loads((tmp_path / "o" / "quant_model_description.json").read_text())
    quantized = [name for name, mark in description.items() if name.endswith(".weight") and mark == "W8A8"]
    assert sum(count for (_, scheme), count in result.counts.items() if scheme == "W8A8") == len(quantized) == 40
    assert result.bytes_before == (planted / "model.safetensors").stat().st_size
    assert result.bytes_after == (tmp_path / "o" / "quant_model_weight_w8a8.safetensors").stat().st_size
    assert sum("float32" in note and "bfloat16" in note for note in result.notes) == 1
    assert next(iter(result.passes)) == "rotate-residual" and result.peak_memory_bytes > 2**26


def test_a_failure_leaves_nothing_behind(planted: Path, samples: list[Sample], tmp_path: Path) -> None:
    """Catches half-written folders: the last tensor read is broken, after all stages were written."""
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(planted / "model.safetensors")
    tensors["lm_head.weight"][3, 4] = torch.nan
    save_file(tensors, broken / "model.safetensors")
    (broken / "config.json").write_text((planted / "config.json").read_text())
    with pytest.raises(vlqc.UserError, match=r"weight lm_head\.weight holds NaN or Inf"):
        vlqc.compile(model_path=broken, save_directory=tmp_path / "o", samples=samples[:1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_an_empty_matrix_is_no_fault(samples: list[Sample], tmp_path: Path) -> None:
    """Catches a verdict on blocks that were added to a trained model and start as zeros."""
    from safetensors.torch import save_file

    model = tmp_path / "model"
    model.mkdir()
    tensors = load_file(TINY / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
    save_file(tensors, model / "model.safetensors")
    (model / "config.json").write_text((TINY / "config.json").read_text())
    vlqc.compile(model_path=model, save_directory=tmp_path / "out", samples=samples[:2])
    report = vlqc.verify_folder(tmp_path / "out")
    assert report.ok and any("o_proj" in finding.where for finding in report.warnings)


def test_a_compiled_folder_is_not_compiled_again(compiled: Path, samples: list[Sample], tmp_path: Path) -> None:
    """Catches integers that are taken for weights: the result would be sound in form and garbage in value."""
    with pytest.raises(vlqc.UserError, match="quantized already"):
        vlqc.compile(model_path=compiled, save_directory=tmp_path / "out", samples=samples[:1])
    assert not (tmp_path / "out").exists()


def test_own_passes(planted: Path, samples: list[Sample], tmp_path: Path) -> None:
    """Catches a Python API that takes no pass of the user's, or runs it on something else than the stages."""
    seen = []

    @dataclass(frozen=True)
    class CountSites(vlqc.Pass):
        name: ClassVar[str] = "count-sites"
        kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
        summary: ClassVar[str] = "say how many linears a stage has"

        def run(self, stage: Stage) -> bool:
            seen.append((stage.name, len(stage.sites)))
            return False

    passes = vlqc.parse_pipeline(
        "insert-observers,assign-precision,quantize-activations,quantize-weights,lower-linears"
    )
    vlqc.compile(
        model_path=planted,
        save_directory=tmp_path / "o",
        samples=samples[:1],
        passes=[*passes[:2], CountSites(), *passes[2:]],
    )
    assert seen[0] == ("visual.blocks.0", 5) and seen[4] == ("visual.merger", 2) and len(seen) == 9
