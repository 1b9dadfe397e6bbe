"""The streamed model: parameters on meta, stages, loading and freeing of weights, invalid checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support import tiny
from vlqc.errors import UserError
from vlqc.families.qwen2_5_vl import QWEN2_5_VL
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.streamed_model import StreamedModel, build_meta_model, find_stages, model_inputs, parameters_on_meta

OUTSIDE = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "visual.patch_embed.proj.weight"]


@pytest.mark.every_transformers
def test_parameters_are_on_meta_and_buffers_have_values() -> None:
    """Catches a model that takes its full memory, and rotary frequencies without values."""
    model = tiny.float_model().module
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    buffers, expected = dict(model.named_buffers()), dict(tiny.plain().named_buffers())
    assert buffers.keys() == expected.keys() and buffers
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected[name]), name
    assert not model.training


def test_register_parameter_is_restored() -> None:
    """Catches modules of the caller that are created on meta after a model was built, or after an exception."""
    with parameters_on_meta():
        inside = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), parameters_on_meta():
        _ = 1 / 0
    assert inside.weight.is_meta and inside.bias.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.every_transformers
def test_stages_are_blocks_merger_and_layers_in_running_order() -> None:
    """Catches a stage that is missing, extra, misnamed or out of order."""
    model = tiny.float_model()
    assert list(model.stages) == tiny.STAGES
    assert [model.is_language(stage) for stage in model.stages.values()] == [False] * 5 + [True] * 4
    assert [model.name(stage) for stage in model.stages.values()] == tiny.STAGES


@pytest.mark.every_transformers
def test_every_checkpoint_tensor_has_its_parameter() -> None:
    """Catches a checkpoint tensor without a parameter, or a parameter under another name."""
    model = tiny.float_model()
    parameters = model.parameters(model.module)
    assert sorted(parameters) == model.checkpoint.names
    assert model.non_stage_parameters() == OUTSIDE


class Other(nn.Module):
    """Another architecture: towers with other names, a connector, a head, nested lists of experts."""

    def __init__(self) -> None:
        super().__init__()
        expert = lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU())  # noqa: E731
        block = lambda: nn.ModuleDict({"experts": nn.ModuleList([expert(), expert()]), "gate": nn.Linear(3, 2)})  # noqa: E731
        self.eye = nn.ModuleDict({"stem": nn.Conv2d(3, 3, 1), "rungs": nn.ModuleList([block(), block()])})
        self.bridge = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3))
        self.mind = nn.ModuleDict(
            {"table": nn.Embedding(4, 3), "steps": nn.ModuleList([block()]), "norms": nn.ModuleList([nn.LayerNorm(3)])}
        )
        self.mouth = nn.Linear(3, 4)


def test_stages_are_found_by_structure_not_by_name() -> None:
    """Catches a search by name, and experts, heads, stems, embeddings or lists of norms as stages."""
    other = Other()
    paths = {module: path for path, module in other.named_modules()}
    assert [paths[stage] for stage in find_stages(other)] == ["eye.rungs.0", "eye.rungs.1", "bridge", "mind.steps.0"]


@pytest.mark.every_transformers
def test_materialize_and_to_meta() -> None:
    """Catches weights that stay in memory, are views of the mapped file, not float32, or of another stage."""
    model = tiny.float_model()
    stage = model.stages["model.layers.1"]
    stored = load_file(tiny.TINY / "model.safetensors")
    cast = {name: tensor.to(torch.bfloat16) for name, tensor in stored.items()}
    model.materialize(stage, lambda name: cast[name])
    filled = model.parameters(stage)
    assert len(filled) == 12
    for name, parameter in filled.items():
        assert parameter.dtype == torch.float32 and not parameter.requires_grad
        assert torch.equal(parameter, cast[name].float())
    model.materialize(stage, lambda name: stored[name])
    model.parameters(stage)["model.layers.1.mlp.up_proj.weight"].zero_()
    assert stored["model.layers.1.mlp.up_proj.weight"].any(), "the source was written to"
    assert {parameter.device.type for parameter in model.module.parameters()} == {"cpu", "meta"}
    model.to_meta(stage)
    assert {parameter.device.type for parameter in model.module.parameters()} == {"meta"}
    assert {p.dtype for p in stage.parameters()} == {torch.float32}


@pytest.mark.every_transformers
@pytest.mark.parametrize("head", [False, True])
def test_non_stage_weights_loads_only_what_runs(head: bool) -> None:
    """Catches an output head, embedding or stage that is loaded without need, and weights that stay in memory."""
    model, read = tiny.float_model(), []

    def note(name: str) -> Tensor:
        read.append(name)
        return model.checkpoint.tensor(name)

    ids = torch.tensor([[3, 60, 3]])
    with model.non_stage_weights(note, head=head):
        expected = [name for name in OUTSIDE if "embed_tokens" not in name and (head or "lm_head" not in name)]
        assert sorted(read) == expected
        real = {name for name, parameter in model.parameters(model.module).items() if not parameter.is_meta}
        assert sorted(real) == expected
        assert torch.equal(model.embedding(ids), model.checkpoint.tensor("model.embed_tokens.weight")[ids])
    assert {parameter.device.type for parameter in model.module.parameters()} == {"meta"}
    with pytest.raises(Exception, match="meta"):  # the real table's forward is back
        model.embedding(ids).sum().item()


@pytest.mark.every_transformers
def test_non_stage_weights_cleans_up_after_an_error() -> None:
    """Catches weights that stay in memory, or an embedding that stays replaced, if reading fails."""
    model = tiny.float_model()

    def fail(name: str) -> Tensor:
        if name == "model.norm.weight":
            raise OSError("disk")
        return model.checkpoint.tensor(name)

    with pytest.raises(OSError, match="disk"), model.non_stage_weights(fail):
        pass
    assert {parameter.device.type for parameter in model.module.parameters()} == {"meta"}


@pytest.mark.every_transformers
def test_a_tied_head_is_not_expected_in_the_checkpoint(tmp_path: Path) -> None:
    """Catches "lm_head.weight is missing" for models with tied embeddings."""
    folder = tiny.damaged(
        tmp_path, tensors=lambda t: t.pop("lm_head.weight"), config=lambda c: c.update(tie_word_embeddings=True)
    )
    model = tiny.float_model(folder)
    assert model.tied and "lm_head.weight" not in model.non_stage_parameters()
    table = model.checkpoint.tensor("model.embed_tokens.weight")
    with model.non_stage_weights(model.checkpoint.tensor, head=True):
        head = model.module.get_output_embeddings()
        assert torch.equal(head.weight, table)


@pytest.mark.every_transformers
def test_a_checkpoint_that_does_not_fit_its_config(tmp_path: Path) -> None:
    """Catches a traceback in place of a list of the missing tensors and those with another shape."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["visual.merger.mlp.2.bias"]
        tensors["model.layers.3.mlp.up_proj.weight"] = torch.ones(3, 192)

    with pytest.raises(UserError) as caught:
        tiny.float_model(tiny.damaged(tmp_path, tensors=spoil))
    assert sorted(fault.what for fault in caught.value.faults) == [
        "tensor model.layers.3.mlp.up_proj.weight has shape [3, 192]",
        "tensor visual.merger.mlp.2.bias is missing",
    ]


@pytest.mark.every_transformers
def test_added_tokens_are_one_fault(tmp_path: Path) -> None:
    """Catches added tokens that are reported as two wrong shapes, without the key to change."""

    def add(tensors: dict[str, Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:8]])

    with pytest.raises(UserError) as caught:
        tiny.float_model(tiny.damaged(tmp_path, tensors=add))
    (fault,) = caught.value.faults
    assert "vocab_size" in fault.fix and "72" in fault.fix


@pytest.mark.every_transformers
@pytest.mark.parametrize("architectures", [["Nonsense"], ["AutoConfig"], "Qwen2VLModel", {"0": 1}])
def test_an_unknown_architecture(tmp_path: Path, architectures: list[str] | None) -> None:
    """Catches a traceback for a class that transformers does not have, or that is not a model."""
    folder = tiny.damaged(tmp_path, config=lambda c: c.update(architectures=architectures))
    with pytest.raises(UserError, match="unsupported architecture"):
        build_meta_model(folder, Checkpoint(folder).config)


@pytest.mark.every_transformers
@pytest.mark.parametrize(
    "change", [{"vision_config": "nonsense"}, {"hidden_act": "nonsense"}, {"num_attention_heads": 0}]
)
def test_a_config_that_no_model_can_be_built_from(tmp_path: Path, change: dict[str, object]) -> None:
    """Catches a traceback for a damaged config.json."""
    folder = tiny.damaged(tmp_path, config=lambda c: c.update(change))
    with pytest.raises(UserError, match="cannot create the model"):
        build_meta_model(folder, Checkpoint(folder).config)


@pytest.mark.every_transformers
def test_unsupported_model_type(tmp_path: Path) -> None:
    """Catches a model type that could be traced, but for which no engine rules are known."""
    folder = tiny.damaged(tmp_path, config=lambda c: c.update(model_type="nonsense"))
    with pytest.raises(UserError, match="unsupported model type 'nonsense'"):
        build_meta_model(folder, Checkpoint(folder).config)


def test_a_model_without_blocks_is_unsupported(tmp_path: Path) -> None:
    """Catches a compilation without stages, which would write a float copy."""

    class Bare(nn.Module):
        config = type("Config", (), {"tie_word_embeddings": False})

        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(4, 3), nn.Linear(3, 4)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    with pytest.raises(UserError, match="unsupported architecture"):
        StreamedModel(Bare(), Checkpoint(tiny.TINY))


@pytest.mark.every_transformers
def test_model_inputs_fit_the_installed_transformers() -> None:
    """Catches inputs that the installed transformers rejects, or that give wrong outputs without token types."""
    model, sample = tiny.plain(), tiny.synthetic_sample((4, 8))
    types = (sample["input_ids"] == 5).int()
    bare, typed = (
        model_inputs(model, QWEN2_5_VL, sample),
        model_inputs(model, QWEN2_5_VL, {**sample, "mm_token_type_ids": types}),
    )
    assert bare.keys() == typed.keys()
    assert bare["use_cache"] is False
    if "mm_token_type_ids" in bare:
        assert torch.equal(bare["mm_token_type_ids"], types)
    with torch.no_grad():
        assert torch.equal(model(**bare).logits, model(**typed).logits)


@pytest.mark.parametrize("key", ["language", "vision"])
def test_layers_missing_in_the_config(key: str, tmp_path: Path) -> None:
    """Catches layers of the checkpoint that are ignored silently."""

    def shorter(config: dict[str, Any]) -> None:
        if key == "language":
            config["num_hidden_layers"] = 3
        else:
            config["vision_config"] |= {"depth": 3, "fullatt_block_indexes": [1]}

    folder = tiny.damaged(tmp_path, config=shorter)
    with pytest.raises(UserError, match=r"unexpected tensor .*(layers|blocks)\.3\."):
        tiny.float_model(folder)


def test_an_unused_tensor_is_only_listed(tmp_path: Path) -> None:
    """Catches an error for old checkpoints, which contain rotary frequencies."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = tiny.damaged(tmp_path, tensors=lambda tensors: tensors.update({name: torch.ones(4)}))
    assert tiny.float_model(folder).unused_tensors() == [name]


@pytest.mark.parametrize("scaling", [None, {"type": "mrope"}, {"type": "mrope", "mrope_section": [999, 1, 1]}])
def test_invalid_rotary_sections(scaling: object, tmp_path: Path) -> None:
    """Catches an error that appears only in the first decoder layer, after the vision tower."""
    folder = tiny.damaged(tmp_path, config=lambda config: config.update(rope_scaling=scaling))
    with pytest.raises(UserError, match="rope_scaling is ") as caught:
        tiny.float_model(folder)
    assert "half of a head" in str(caught.value)
