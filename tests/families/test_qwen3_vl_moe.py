"""Qwen3-VL-MoE: experts of both transformers versions as linear layers, and what becomes of them in a compilation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vlqc
from tools.checkpoints import outlier_checkpoint
from vlqc.errors import UserError
from vlqc.families.experts import MixtureOfExperts
from vlqc.families.qwen3_vl_moe import QWEN3_VL_MOE
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.verify import verify_folder

LAYER = "model.language_model.layers.1"
EXPERTS = f"{LAYER}.mlp.experts"
UNREACHED = 7  # the expert that `outlier_checkpoint` sends no token to


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe") / "float"
    outlier_checkpoint.make(folder, seed=0, family="qwen3_vl_moe")
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def rewritten(folder: Path, target: Path, tensors: dict[str, Tensor], **text: Any) -> Path:
    """The folder with other tensors, and other values in text_config."""
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= text
    (target / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target


def reference_mixture(rows: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, used: int) -> Tensor:
    """Row by row from the formulas: rows [T, H], router [E, H], gate_up [E, H, 2I], down [E, I, H]."""
    outputs = torch.zeros_like(rows)
    for number, row in enumerate(rows):
        shares = (router @ row).double().softmax(0)
        chosen = shares.argsort(descending=True)[:used]
        for expert in chosen.tolist():
            gate, up = (row @ gate_up[expert]).chunk(2)
            share = shares[expert] / shares[chosen].sum()
            outputs[number] += share * ((torch.nn.functional.silu(gate) * up) @ down[expert])
    return outputs


def mixture(count: int = 5, used: int = 2) -> MixtureOfExperts:
    """A mixture with random weights."""
    generator = torch.Generator().manual_seed(0)
    made = MixtureOfExperts(12, 6, count, used, nn.SiLU())
    for path, parameter in list(made.named_parameters()):
        owner, _, name = path.rpartition(".")
        value = torch.randn(parameter.shape, generator=generator)
        setattr(made.get_submodule(owner), name, nn.Parameter(value, requires_grad=False))
    return made


def test_mixture_equals_its_formulas() -> None:
    """Would catch a wrong choice of experts, a share that is not renormalized, and outputs added to wrong rows."""
    made = mixture()
    rows = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1))
    parts = dict(made.named_parameters())
    gate_up = torch.stack(
        [torch.cat([parts[f"experts.{n}.gate_proj.weight"], parts[f"experts.{n}.up_proj.weight"]]).T for n in range(5)]
    )
    down = torch.stack([parts[f"experts.{n}.down_proj.weight"].T for n in range(5)])
    expected = reference_mixture(rows.reshape(-1, 12), parts["gate.weight"], gate_up, down, 2)
    torch.testing.assert_close(made(rows).reshape(-1, 12), expected)


def test_mixture_runs_each_expert_on_its_rows_only() -> None:
    """Would catch an expert that runs on all rows, and one that is left out because no row chooses it."""
    made, seen = mixture(), {}
    made.gate.weight[3] = 0
    made.gate.weight[3, 0] = -1e4
    for number, expert in enumerate(made.experts):
        expert.register_forward_pre_hook(
            lambda module, args, number=number: seen.update({number: (len(args[0]), module.row_positions.tolist())})
        )
    rows = torch.rand(9, 12, generator=torch.Generator().manual_seed(1)) + 1
    made(rows)
    assert sum(count for count, _ in seen.values()) == 9 * 2
    assert seen[3] == (0, [])
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert all(module.row_positions is None for module in made.experts)


@pytest.mark.parametrize("hidden", [192, 96, 64], ids=["hidden is 2I", "hidden is I", "all differ"])
@pytest.mark.parametrize("transposed", [True, False])
def test_orientation_of_fused_tensors_follows_from_their_shapes(hidden: int, transposed: bool) -> None:
    """Published files hold inputs x outputs, those that transformers 5 saved the reverse; one of the two tensors of a
    layer may be square. Would catch a matrix that is transposed once too often, which no shape shows."""
    shapes = {f"{EXPERTS}.gate_up_proj": (2, hidden, 192), f"{EXPERTS}.down_proj": (2, 96, hidden)}
    if not transposed:
        shapes = {name: (shape[0], shape[2], shape[1]) for name, shape in shapes.items()}
    split = QWEN3_VL_MOE.matrices(shapes, {"text_config": {"hidden_size": hidden}})
    places = {name: place for parts in split.values() for name, place in parts.items()}
    assert len(places) == 6
    assert {place.transposed for place in places.values()} == {transposed}
    up, down = places[f"{EXPERTS}.1.up_proj.weight"], places[f"{EXPERTS}.1.down_proj.weight"]
    assert (up.index, up.begin, up.end) == (1, 96, 192)
    assert up.shape(shapes[f"{EXPERTS}.gate_up_proj"]) == (96, hidden)
    assert down.shape(shapes[f"{EXPERTS}.down_proj"]) == (hidden, 96)


def test_checkpoint_reads_experts_from_every_layout(folder: Path, tmp_path: Path) -> None:
    """Would catch gate and up that are swapped, and an expert that is read from another one's place."""
    tensors = weights(folder)
    straight = {name: x.transpose(1, 2) if x.ndim == 3 else x for name, x in tensors.items()}
    unfused = {name: tensor for name, tensor in tensors.items() if tensor.ndim != 3}
    for name, fused in tensors.items():
        prefix, _, last = name.rpartition(".")
        if fused.ndim == 3:
            for expert, matrix in enumerate(fused):
                parts = matrix.chunk(2, dim=1) if last == "gate_up_proj" else (matrix,)
                layers = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
                unfused |= {
                    f"{prefix}.{expert}.{layer}.weight": part.T for layer, part in zip(layers, parts, strict=True)
                }
    published = Checkpoint(folder)
    for saved in (straight, unfused):
        other = Checkpoint(rewritten(folder, tmp_path / str(len(saved)), saved))
        assert other.names == published.names
        assert all(torch.equal(other.tensor(name), published.tensor(name)) for name in published.names)
    expected = tensors[f"{EXPERTS}.gate_up_proj"][5, :, 96:].T
    assert torch.equal(published.tensor(f"{EXPERTS}.5.up_proj.weight"), expected)


@pytest.mark.qwen3_vl
def test_wrong_sizes_are_one_fault_per_stored_tensor(folder: Path, tmp_path: Path) -> None:
    """Would catch hundreds of messages, one per expert, and a run that starts with experts cut in the wrong place."""
    cut = {name: x[..., :-2] if name == f"{EXPERTS}.gate_up_proj" else x for name, x in weights(folder).items()}
    with pytest.raises(UserError) as error:
        StreamedModel.open(Checkpoint(rewritten(folder, tmp_path / "cut", cut)))
    assert [fault.what for fault in error.value.faults] == [f"tensor {EXPERTS}.gate_up_proj has shape [8, 256, 190]"]


@pytest.mark.qwen3_vl
def test_prepared_model_computes_as_transformers_does(folder: Path) -> None:
    """Would catch a difference from the experts of transformers 4.57 or 5, whose own modules are replaced."""
    from transformers import Qwen3VLMoeForConditionalGeneration as Original

    original = Original.from_pretrained(folder, dtype=torch.float32).eval().get_submodule(f"{LAYER}.mlp")
    model = StreamedModel.open(Checkpoint(folder))
    model.materialize(model.stages[LAYER], model.checkpoint.tensor)
    rows = torch.randn(2, 40, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = original(rows)
        actual = model.stages[LAYER].get_submodule("mlp")(rows)
    torch.testing.assert_close(actual, expected[0] if isinstance(expected, tuple) else expected)


@pytest.mark.qwen3_vl
@pytest.mark.slow
def test_compiled_folder(folder: Path, tmp_path: Path) -> None:
    """Would catch experts of one layer in several schemes, a router that is quantized or not compensated, fused tensors
    in the result, and a folder that computes something else than the float model."""
    options: dict[str, Any] = {"model_path": folder, "calib_images": "tests/photos", "target": "vllm-ascend"}
    result = vlqc.compile(save_directory=tmp_path / "out", **options)
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    layers = ("gate_proj", "up_proj", "down_proj")
    experts = {f"{EXPERTS}.{expert}.{layer}.weight" for expert in range(8) for layer in layers}
    assert {description[name] for name in experts} == {"W8A8_DYNAMIC"}
    assert description[f"{LAYER}.mlp.gate.weight"] == "FLOAT"
    assert description[f"{LAYER}.self_attn.q_proj.weight"] == "W8A8"
    vlqc.compile(save_directory=tmp_path / "unrotated", rotate="none", **options)
    stored, source = weights(tmp_path / "unrotated"), weights(folder)
    assert all(tensor.ndim < 3 or "patch_embed" in name for name, tensor in stored.items())
    norm = f"{LAYER}.post_attention_layernorm.weight"
    scale = source[norm].float() / stored[norm].float()
    router = source[f"{LAYER}.mlp.gate.weight"].float() * scale
    assert bool((scale != 1).any())
    assert torch.equal(stored[f"{LAYER}.mlp.gate.weight"].float(), router)  # the same choices, bit for bit
    gate_up = source[f"{EXPERTS}.gate_up_proj"][UNREACHED, :, :96].T.float() * scale
    integers = stored[f"{EXPERTS}.{UNREACHED}.gate_proj.weight"]
    step = stored[f"{EXPERTS}.{UNREACHED}.gate_proj.weight_scale"]
    assert float((gate_up / step - integers).abs().max()) < 0.51  # no token: rounded to nearest
    assert sum("received no calibration tokens" in note for note in result.notes) == 1
    verified = verify_folder(tmp_path / "out", model_path=folder, calib_images="tests/photos")
    assert verified.ok
    assert verified.facts["logits against float"]["SQNR dB"] > 28


@pytest.mark.qwen3_vl
@pytest.mark.slow
def test_excluding_one_expert_excludes_its_layer(folder: Path, tmp_path: Path) -> None:
    """Would catch one expert in float among quantized ones, whose type engines take from the first."""
    options: dict[str, Any] = {"model_path": folder, "calib_images": "tests/photos", "target": "vllm-ascend"}
    result = vlqc.compile(save_directory=tmp_path / "out", exclude=(f"{EXPERTS}.3.up_proj",), **options)
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    schemes = {description[name] for name in description if name.startswith(f"{EXPERTS}.")}
    assert schemes == {"FLOAT"}
    assert any(f"{EXPERTS}.3.up_proj" in note for note in result.notes)
    assert description["model.language_model.layers.0.mlp.experts.0.up_proj.weight"] == "W8A8_DYNAMIC"
