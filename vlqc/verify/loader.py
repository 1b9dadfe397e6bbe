"""Loads a compiled folder as a PyTorch model whose quantized layers run in the reference arithmetic.

The accuracy of a folder is measured with it, without an NPU. Only the folder is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from vlqc.errors import Fault, UserError
from vlqc.files import read_json_object
from vlqc.formatting import did_you_mean
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.streamed_model import build_meta_model
from vlqc.kernels_ref.kv_cache import QuantizedCacheAttention
from vlqc.kernels_ref.norm import ShiftedNorm
from vlqc.kernels_ref.quant_linear import layers_with_both
from vlqc.targets.cache_schemes import CacheScheme
from vlqc.targets.caches import described_caches, projections
from vlqc.targets.schemes import DEFAULT_SCHEME, Scheme
from vlqc.targets.target import ENGINES, find_layout


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    quantized_cache: bool = True,
    static_inputs: bool = False,
) -> nn.Module:
    """The model of a compiled folder, in eval mode, with the forward signature of the float model.

    dtype: of everything but the integer operators; float32 to measure accuracy, bfloat16 or float16 to compute as the
    device does. trust_remote_code: run model code from the folder. quantized_cache: in layers whose folder has scales
    for the KV cache, attention reads quantized keys and values, those of the same call as well; False: float ones.
    static_inputs: how W8A8_MIX layers quantize their inputs. False: with one scale per token, as in ordinary serving;
    True: with the stored scale, as on the decode nodes of a deployment that separates them from prefill nodes. It is
    the attribute `static_input` of these layers.
    Raises UserError, with all faults at once, for an incomplete folder.
    """
    folder = Path(folder)
    checkpoint = Checkpoint(folder)
    description = read_description(folder)
    checkpoint.check_config()
    model = build_meta_model(folder, checkpoint.config, trust_remote_code=trust_remote_code)
    loader = WeightLoader(checkpoint, description, dtype, quantized_cache=quantized_cache)
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = checkpoint.family.is_tied(checkpoint.config)
    for path, module in list(model.named_modules()):
        if not (tied and module is head):
            loader.fill(model, path, module)
    if loader.faults:
        raise UserError(*loader.faults)
    if tied:
        head.weight = model.get_input_embeddings().weight  # type: ignore[operator]
    for layer in layers_with_both(model):
        layer.static_input = static_inputs
    return model


@contextmanager
def float_caches(root: nn.Module) -> Iterator[None]:
    """Context in which attention in `root`, a loaded model or a part of it, reads keys and values in float."""
    wrapped = [module for module in root.modules() if isinstance(module, QuantizedCacheAttention)]
    for module in wrapped:
        module.forward = module.float_attention.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in wrapped:
            del module.__dict__["forward"]


def has_quantized_cache(root: nn.Module) -> bool:
    """Whether attention in a loaded model, or a part of it, reads quantized keys and values."""
    return any(isinstance(module, QuantizedCacheAttention) for module in root.modules())


def read_description(folder: Path) -> dict[str, str]:
    """quant_model_description*.json: tensor name -> scheme, and keys of the whole folder. UserError without one."""
    described = find_layout(path.name for path in folder.iterdir())
    if described is None:
        why = f"{ENGINES[0].description_name(DEFAULT_SCHEME)} is missing"
        raise UserError(Fault("not a compiled folder", str(folder), why, "pass a folder that vlqc compile wrote"))
    return read_json_object(folder / described[1])


class WeightLoader:
    """Loads the tensors of a compiled folder into the modules of a model and collects faults.

    checkpoint, description: of the folder; dtype: of the float parameters; quantized_cache: as in `load`; faults: of
    all modules filled so far.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        description: dict[str, str],
        dtype: torch.dtype,
        *,
        quantized_cache: bool = True,
    ) -> None:
        self.checkpoint, self.description, self.dtype = checkpoint, description, dtype
        self.faults: list[Fault] = []
        caches = described_caches(checkpoint.family, description) if quantized_cache else {}
        layers = (name.removesuffix(".weight") for name in description)
        self._caches = {
            attention: (pair, scheme)
            for attention, pair in projections(checkpoint.family, layers).items()
            if (scheme := caches.get(attention)) is not None
        }

    def fill(self, model: nn.Module, path: str, module: nn.Module) -> None:
        """Loads the module at `path` of the model, without its children, or replaces a quantized linear layer."""
        name = self.checkpoint.family.module_name(path)
        entry = str(self.description.get(f"{name}.weight", Scheme.FLOAT))
        if isinstance(module, nn.Linear):
            if entry not in tuple(Scheme):
                why = did_you_mean(entry, map(str, Scheme)) or f"supported schemes: {', '.join(Scheme)}"
                self.faults.append(Fault(f"{name} has the unknown scheme {entry}", str(self.checkpoint.folder), why))
                return
            if (scheme := Scheme(entry)).is_quantized:
                self._quantize(model, path, module, name, scheme)
                return
        for part, parameter in list(module.named_parameters(recurse=False)):
            value = self._read(f"{name}.{part}", tuple(parameter.shape))
            if value is not None:
                setattr(module, part, nn.Parameter(value.to(self.dtype, copy=True), requires_grad=False))
        if f"{name}.bias" in self.checkpoint and [part for part, _ in module.named_parameters()] == ["weight"]:
            bias = self._read(f"{name}.bias", tuple(module.get_parameter("weight").shape))
            if bias is not None and not isinstance(module, nn.Linear):
                model.set_submodule(path, ShiftedNorm(module, bias.to(self.dtype)))

        if name in self._caches:
            self._quantize_cache(model, path, module, *self._caches[name])

    def _quantize_cache(
        self, model: nn.Module, path: str, attention: nn.Module, pair: tuple[str, str], scheme: CacheScheme
    ) -> None:
        """Replaces an attention module by one that reads quantized keys and values."""
        scales = []
        for layer in pair:
            tensors = {part.suffix: self._read(f"{layer}.{part.suffix}") for part in scheme.spec.stored}
            for suffix, tensor in tensors.items():
                if suffix.endswith("scale") and tensor is not None:
                    scales.append(tensor.float())
                elif tensor is not None and bool(tensor.any()):
                    where, why = str(self.checkpoint.folder), "engines do not subtract it in decoding"
                    self.faults.append(Fault(f"{layer}.{suffix} is not 0", where, why))
        if len(scales) < len(pair):
            return
        key_scale, value_scale = scales
        try:
            model.set_submodule(path, QuantizedCacheAttention(attention, key_scale, value_scale))
        except ValueError as error:
            self.faults.append(Fault(f"{path} cannot be loaded", str(self.checkpoint.folder), str(error)))

    def _quantize(self, model: nn.Module, path: str, linear: nn.Linear, name: str, scheme: Scheme) -> None:
        tensors = {
            part.suffix: self._read(f"{name}.{part.suffix}")
            for part in scheme.spec.stored
            if not part.only_packed or f"{name}.{part.suffix}" in self.checkpoint
        }
        bias = None if linear.bias is None else self._read(f"{name}.bias")
        found = {part: tensor for part, tensor in tensors.items() if tensor is not None}
        if len(found) < len(tensors):
            return
        try:
            model.set_submodule(path, scheme.spec.quant_linear().from_stored(found, bias))
        except ValueError as error:
            self.faults.append(Fault(f"layer {name} cannot be loaded", str(self.checkpoint.folder), str(error)))

    def _read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor | None:
        where = str(self.checkpoint.folder)
        if name not in self.checkpoint:
            self.faults.append(Fault(f"tensor {name} is missing", where, fix="run vlqc verify, then compile again"))
            return None
        if shape is not None and self.checkpoint.shape(name) != shape:
            has = list(self.checkpoint.shape(name))
            self.faults.append(Fault(f"tensor {name} has shape {has}", where, f"config.json implies {list(shape)}"))
            return None
        if shape is not None and not self.checkpoint.stored_dtype(name).is_floating_point:
            why = "the description gives no scheme for its integers"
            self.faults.append(Fault(f"tensor {name} holds integers but is described as FLOAT", where, why))
            return None
        return self.checkpoint.tensor(name)
