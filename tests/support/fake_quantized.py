"""A compiled folder simulated in floating point on the Hugging Face model, from the folder's tensors alone.

Written against transformers and NumPy, so that `vlqc.load` is compared with arithmetic that is not the compiler's.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from vlqc.families.registry import family_of
from vlqc.kernels_ref.quant_linear import QuantLinear

Array = npt.NDArray[Any]


def folder_tensors(folder: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors of a folder as NumPy arrays, floats as float64, and the description."""
    tensors: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                tensor = file.get_tensor(name)
                tensors[name] = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    return tensors, json.loads(next(folder.glob("quant_model_description*.json")).read_text())


@torch.no_grad()
def fake_quantized(folder: Path, source: Path) -> nn.Module:
    """The float32 Hugging Face model of `source` with the folder's weights dequantized, and inputs rounded by hooks."""
    config = json.loads((source / "config.json").read_text())
    model: nn.Module = getattr(transformers, config["architectures"][0]).from_pretrained(source).float().eval()
    family_of(config, "config.json").prepare(model)  # experts as linear layers; equal to the original by its own tests
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.zeros(parameter.shape), requires_grad=False))
    tensors, description = folder_tensors(folder)
    for path, module in model.named_modules():
        weight = tensors.get(f"{path}.weight")
        scheme = description.get(f"{path}.weight", "FLOAT")
        if isinstance(module, nn.Linear) and weight is not None and scheme != "FLOAT":
            dequantized = weight.astype(np.float64) * tensors[f"{path}.weight_scale"]
            module.weight.copy_(torch.from_numpy(dequantized))
            if scheme == "W8A8":
                module.register_forward_pre_hook(
                    per_tensor(tensors[f"{path}.input_scale"].item(), tensors[f"{path}.input_offset"].item())
                )
            else:
                module.register_forward_pre_hook(per_token)
            if module.bias is not None:
                module.bias.copy_(torch.from_numpy(tensors[f"{path}.bias"]))
        else:
            for name, parameter in module.named_parameters(recurse=False):
                if f"{path}.{name}" in tensors:
                    parameter.copy_(torch.from_numpy(tensors[f"{path}.{name}"]))
    return model


def deviations(simulated: nn.Module, loaded: nn.Module, run: Callable[[nn.Module], Tensor]) -> tuple[float, float]:
    """How far both models are apart when rounding in one layer does not change what other layers read.

    The outputs of the loaded model's quantized layers replace those of the simulated one, layer by layer. Returns the
    relative error of a quantized layer's output for the same input, the largest of all layers, and that of what `run`
    returns, which only float operations contribute to.
    """
    outputs: list[tuple[str, Tensor]] = []
    layers = {path: module for path, module in loaded.named_modules() if isinstance(module, QuantLinear)}
    handles = [
        module.register_forward_hook(lambda _, __, output, path=path: outputs.append((path, output)))
        for path, module in layers.items()
    ]
    expected = run(loaded)
    largest = 0.0

    def replace(path: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            nonlocal largest
            recorded_path, recorded = outputs.pop(0)
            assert recorded_path == path
            largest = max(largest, float((output - recorded).norm() / recorded.norm()))
            return recorded

        return hook

    handles += [simulated.get_submodule(path).register_forward_hook(replace(path)) for path in layers]
    actual = run(simulated)
    for handle in handles:
        handle.remove()
    return largest, float((actual - expected).norm() / expected.norm())


def per_tensor(scale: float, offset: float) -> Any:
    """A hook that rounds the input to 8 bits with a stored scale and offset."""

    def round_input(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        x = inputs[0].double().numpy()
        rounded = (np.clip(np.rint(x / scale + offset), -128, 127) - offset) * scale
        return (torch.from_numpy(rounded).float(),)

    return round_input


def per_token(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """A hook that rounds the input to 8 bits with one symmetric scale per token."""
    x = inputs[0].double().numpy()
    scale = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-30) / 127
    return (torch.from_numpy(np.clip(np.rint(x / scale), -128, 127) * scale).float(),)
