"""The float model without weights: what is where, which parts are stages, how they are filled and emptied."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support import tiny
from vlqc.errors import UserError
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.streamed_model import StreamedModel, build, find_stages, model_inputs, parameters_on_meta

OUTSIDE = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "visual.patch_embed.proj.weight"]


@pytest.mark.every_transformers
def test_parameters_are_on_meta_and_buffers_are_real() -> None:
    """Catches a model that takes its full memory, and rotary frequencies that are lost with the weights."""
    model = tiny.float_model().module
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    buffers, expected = dict(model.named_buffers()), dict(tiny.plain().named_buffers())
    assert buffers.keys() == expected.keys() and buffers
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected[name]), name
    assert not model.training


def test_the_registering_of_parameters_is_put_back() -> None:
    """Catches modules of the caller that land on meta after a model was built, or after building failed."""
    with parameters_on_meta():
        inside = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), parameters_on_meta():
        _ = 1 / 0
    assert inside.weight.is_meta and inside.bias.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.every_transformers
def test_stages_are_blocks_merger_and_layers_in_running_order() -> None:
    """Catches a stage that is overlooked, invented, misnamed or out of order."""
    model = tiny.float_model()
    assert list(model.stages) == tiny.STAGES
    assert [model.is_language(stage) for stage in model.stages.values()] == [False] * 5 + [True] * 4
    assert [model.name(stage) for stage in model.stages.values()] == tiny.STAGES


@pytest.mark.every_transformers
def test_every_checkpoint_tensor_has_its_parameter() -> None:
    """Catches a tensor of the checkpoint that nothing in the model asks for, or a parameter under a foreign name."""
    model = tiny.float_model()
    parameters = model.parameters(model.module)
    assert sorted(parameters) == model.checkpoint.names
    assert model.non_stage_parameters() == OUTSIDE


class Other(nn.Module):
    """A model of another make: towers with other names, a connector, a head, nested lists of experts."""

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
    """Catches a search by name, experts taken for stages, and heads, stems, tables or lists of norms taken for them."""
    other = Other()
    paths = {module: path for path, module in other.named_modules()}
    assert [paths[stage] for stage in find_stages(other)] == ["eye.rungs.0", "eye.rungs.1", "bridge", "mind.steps.0"]


@pytest.mark.every_transformers
def test_fill_and_empty() -> None:
    """Catches weights that stay behind, that are views of the mapped file, not float32, or of another stage."""
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
def test_ready_outside_reads_what_runs_and_nothing_more(head: bool) -> None:
    """Catches the output head or the whole embedding table in memory, a stage that is filled, and leftovers."""
    model, read = tiny.float_model(), []

    def note(name: str) -> Tensor:
        read.append(name)
        return model.checkpoint.tensor(name)

    ids = torch.tensor([[3, 60, 3]])
    with model.non_stage_weights(note, head=head):
        wanted = [name for name in OUTSIDE if "embed_tokens" not in name and (head or "lm_head" not in name)]
        assert sorted(read) == wanted
        real = {name for name, parameter in model.parameters(model.module).items() if not parameter.is_meta}
        assert sorted(real) == wanted
        assert torch.equal(model.embedding(ids), model.checkpoint.tensor("model.embed_tokens.weight")[ids])
    assert {parameter.device.type for parameter in model.module.parameters()} == {"meta"}
    with pytest.raises(Exception, match="meta"):  # the real table's forward is back
        model.embedding(ids).sum().item()


@pytest.mark.every_transformers
def test_ready_outside_leaves_nothing_after_an_error() -> None:
    """Catches weights that stay in memory, or an embedding that stays replaced, when reading fails half way."""
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
    """Catches "lm_head.weight is missing" for small models, whose head is their embedding table."""
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
    """Catches a traceback deep in transformers in place of a list of what is missing or misshapen."""

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
@pytest.mark.parametrize("architectures", [["Nonsense"], ["AutoConfig"], [], None])
def test_an_unknown_architecture(tmp_path: Path, architectures: list[str] | None) -> None:
    """Catches a traceback for a model that transformers does not have, or a name in it that is no model."""
    folder = tiny.damaged(tmp_path, config=lambda c: c.update(architectures=architectures))
    with pytest.raises(UserError, match="architecture is not known"):
        build(folder, Checkpoint(folder).config)


@pytest.mark.every_transformers
@pytest.mark.parametrize(
    "change", [{"vision_config": "nonsense"}, {"hidden_act": "nonsense"}, {"num_attention_heads": 0}]
)
def test_a_config_that_no_model_can_be_built_from(tmp_path: Path, change: dict[str, object]) -> None:
    """Catches a traceback for a damaged config.json."""
    folder = tiny.damaged(tmp_path, config=lambda c: c.update(change))
    with pytest.raises(UserError, match=r"cannot be built"):
        build(folder, Checkpoint(folder).config)


@pytest.mark.every_transformers
def test_a_model_of_another_type(tmp_path: Path) -> None:
    """Catches a model that could be traced, but whose engines' rules nobody has written down."""
    folder = tiny.damaged(tmp_path, config=lambda c: c.update(model_type="nonsense"))
    with pytest.raises(UserError, match="model_type is nonsense"):
        build(folder, Checkpoint(folder).config)


def test_a_model_without_blocks_cannot_be_compiled(tmp_path: Path) -> None:
    """Catches a compilation that writes a float copy because it found nothing to do."""

    class Bare(nn.Module):
        config = type("Config", (), {"tie_word_embeddings": False})

        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(4, 3), nn.Linear(3, 4)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    with pytest.raises(UserError, match="cannot be traced"):
        StreamedModel(Bare(), Checkpoint(tiny.TINY))


@pytest.mark.every_transformers
def test_model_inputs_fit_the_installed_transformers() -> None:
    """Catches inputs that this transformers refuses, and versions that are silently wrong without token types."""
    model, sample = tiny.plain(), tiny.made_up((4, 8))
    types = (sample["input_ids"] == 5).int()
    bare, typed = model_inputs(model, sample), model_inputs(model, {**sample, "mm_token_type_ids": types})
    assert bare.keys() == typed.keys()
    assert bare["use_cache"] is False
    if "mm_token_type_ids" in bare:
        assert torch.equal(bare["mm_token_type_ids"], types)
    with torch.no_grad():
        assert torch.equal(model(**bare).logits, model(**typed).logits)


@pytest.mark.parametrize("key", ["language", "vision"])
def test_layers_that_the_config_does_not_count(key: str, tmp_path: Path) -> None:
    """Catches a model that is cut short without a word; a tensor of a known layer may be too many."""

    def shorter(config: dict[str, Any]) -> None:
        if key == "language":
            config["num_hidden_layers"] = 3
        else:
            config["vision_config"] |= {"depth": 3, "fullatt_block_indexes": [1]}

    model = tiny.float_model(tiny.damaged(tmp_path, config=shorter))
    with pytest.raises(UserError, match=r"(layers|blocks)\.3\..* belongs to a layer that config.json does not count"):
        model.unknown_tensors()


def test_a_tensor_too_many_is_only_named(tmp_path: Path) -> None:
    """Catches a refusal of old checkpoints, which keep the frequencies of their rotary embeddings."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = tiny.damaged(tmp_path, tensors=lambda tensors: tensors.update({name: torch.ones(4)}))
    assert tiny.float_model(folder).unknown_tensors() == [name]


@pytest.mark.parametrize("scaling", [None, {"type": "mrope"}, {"type": "mrope", "mrope_section": [999, 1, 1]}])
def test_rotary_sections_that_do_not_fit(scaling: object, tmp_path: Path) -> None:
    """Catches what only the first layer of the language model would stumble over, after all of the vision tower."""
    folder = tiny.damaged(tmp_path, config=lambda config: config.update(rope_scaling=scaling))
    with pytest.raises(UserError, match="rope_scaling is ") as caught:
        tiny.float_model(folder)
    assert "half of a head" in str(caught.value)
