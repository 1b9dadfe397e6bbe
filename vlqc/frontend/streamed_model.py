"""A transformers model whose weights are loaded one module at a time; until then its parameters are on meta."""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from vlqc.errors import Fault, UserError
from vlqc.families.family import DTYPE_KEYS, ModelFamily
from vlqc.families.layer_names import layer_pattern, matches_any
from vlqc.families.registry import family_of
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.device import resolve_device
from vlqc.frontend.distributed import current_process_group
from vlqc.frontend.emitted_dtype import RequestedDtype, emitted_dtype
from vlqc.frontend.rotated_tensors import RotatedTensors
from vlqc.import_paths import import_path
from vlqc.ir.memory import file_backed, release_pages, release_unused_memory
from vlqc.ir.rotations import RotationPlan
from vlqc.options.options import Options

CPU = torch.device("cpu")
DTYPE_RENAMED = (4, 56)  # version of transformers from which on `torch_dtype` is deprecated


class _EmptyOnMeta(TorchFunctionMode):
    """Places tensors of `torch.empty`, of which constructors make large parameters, on the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        return func(*args, **(options | {"device": "meta"} if func is torch.empty else options))


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, new parameters are on the meta device. Buffers are not, because constructors compute their values."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_meta_model(folder: Path, config: dict[str, Any], *, trust_remote_code: bool = False) -> nn.Module:
    """The model of a checkpoint folder: parameters on meta, float32, in eval mode.

    config: content of config.json in the form of `ModelFamily.engine_config`. Code in the folder runs only with
    `trust_remote_code`. Raises UserError for an unsupported or invalid config.
    """
    where = str(folder / "config.json")
    family = family_of(config, where)
    model_class = _model_class(folder, family, config, trust_remote_code)
    dtype = {DTYPE_KEYS[_version() >= DTYPE_RENAMED]: torch.float32}
    try:
        if trust_remote_code and "AutoConfig" in config.get("auto_map", {}):
            parsed = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
        else:
            # A copy: some versions of transformers change nested objects, and `config` is what the emitter writes.
            values = family.model_config(copy.deepcopy(config))
            parsed = model_class.config_class.from_dict(values)  # type: ignore[attr-defined]
        with parameters_on_meta():
            model: nn.Module = model_class._from_config(parsed, **dtype)  # type: ignore[attr-defined]
        family.prepare(model)
    except Exception as error:  # an invalid config can make a constructor raise anything
        why = f"{type(error).__name__}: {error}"
        raise UserError(Fault("cannot create the model", where, why)) from error
    return model.eval()


def _version() -> tuple[int, int]:
    """Major and minor version of transformers."""
    major, minor, *_ = transformers.__version__.split(".")
    return int(major), int(minor)


def _model_class(folder: Path, family: ModelFamily, config: dict[str, Any], trust_remote_code: bool) -> type[nn.Module]:
    """The class of the first architecture: from code in the folder if that is trusted, else from transformers."""
    architectures = config.get("architectures") or family.architectures
    name = str(architectures[0]) if isinstance(architectures, list | tuple) else "?"
    where = str(folder / "config.json")
    auto_map = config.get("auto_map")
    entries = auto_map.items() if isinstance(auto_map, dict) else ()
    custom = [value for key, value in entries if key.startswith("AutoModel") and isinstance(value, str)]
    if custom and trust_remote_code:
        try:
            custom_class: type[nn.Module] = get_class_from_dynamic_module(custom[0], str(folder), local_files_only=True)
            return custom_class
        except Exception as error:  # code in the folder can raise anything
            why = f"{type(error).__name__}: {error}"
            raise UserError(Fault("cannot load the code in the checkpoint", where, why)) from error
    if name in family.architectures and (model_class := family.model_class(name)) is not None:
        return model_class
    if custom:
        why = f"{name} is defined by code in the checkpoint folder ({custom[0]})"
        fix = "read that code; if you trust it, add --trust_remote_code True"
        raise UserError(Fault("the checkpoint needs its own code", where, why, fix))
    if name in family.architectures:
        check_available(family, where)
    why = f"supported: {', '.join(family.architectures)}"
    fix = f"check architectures in config.json, or add {name} to `architectures` of {import_path(type(family))}"
    raise UserError(Fault(f"unsupported architecture {name!r}", where, why, fix))


def check_available(family: ModelFamily, where: str) -> None:
    """UserError if the installed version of transformers has no model of a family. where: path of config.json."""
    if not any(map(family.model_class, family.architectures)):
        why = f"transformers {transformers.__version__} does not have {', '.join(family.architectures)}"
        fix = f"install transformers {family.transformers_version} or newer"
        raise UserError(Fault(f"{family.title} is not available", where, why, fix))


def check_roles(family: ModelFamily, layers: Iterable[str]) -> None:
    """UserError, with the pattern of every linear layer of the stages that has no role in the family.

    No engine's rule applies to such a layer. Patterns that match none of the layers are named in the same error only:
    a family may have layers that some of its models do not have.
    """
    layers = list(layers)
    if missing := dict.fromkeys(layer_pattern(layer) for layer in layers if family.role(layer) is None):
        unused = [pattern for pattern in family.layers() if not any(matches_any(layer, [pattern]) for layer in layers)]
        why = f"no linear layer of the model matches {', '.join(unused)}" if unused else ""
        fix = "add them to `roles`" + (", or correct these patterns" if unused else "")
        what = f"{family.title} has no role for {', '.join(missing)}"
        raise UserError(Fault(what, import_path(type(family)), why, fix))


def open_model(options: Options) -> "StreamedModel":
    """The model of `options.model_path` on the device of this rank, its parameters on the meta device. UserError."""
    process_group = current_process_group()
    device, trust = process_group.local_device(resolve_device(options.device_type)), options.trust_remote_code
    checkpoint = Checkpoint(options.model_path, options.lora)
    return process_group.rank0_first(
        lambda: StreamedModel.open(checkpoint, trust_remote_code=trust, device=device, dtype=options.dtype)
    )


class StreamedModel:
    """A model, its checkpoint, and its stages: the modules that are compiled one at a time.

    family: of the model. rotation_plan: the rotations of the model; tensors: of the checkpoint, rotated accordingly;
    read_stage_tensor: reads a parameter of a stage. stages: checkpoint name -> module, in the order in which they run.
    canonical: name in the module tree -> checkpoint name. embedding: the token embedding. tied: whether the output head
    shares its weight.
    """

    def __init__(
        self,
        module: nn.Module,
        checkpoint: Checkpoint,
        canonical: Callable[[str], str] | None = None,
        device: torch.device = CPU,
    ) -> None:
        """Raises UserError if the model has no stages, or a parameter is missing in the checkpoint or has another
        shape there."""
        self.module = module
        self.checkpoint = checkpoint
        self.family = checkpoint.family
        self.canonical = canonical or self.family.checkpoint_name
        self.device = device
        self.trust_remote_code = False
        self.requested_dtype: RequestedDtype = "auto"
        self.weights_folder: Path | None = None
        self.rotation_plan = RotationPlan()
        self.tensors: Checkpoint | RotatedTensors = checkpoint
        self.read_stage_tensor = checkpoint.tensor
        self._hooks: list[Any] = []
        for owner in module.modules():
            buffers = owner._buffers.items()
            owner._buffers.update({name: buffer.to(device) for name, buffer in buffers if buffer is not None})
        self._path: dict[nn.Module, str] = {child: path for path, child in module.named_modules()}
        found = {self.name(stage): stage for stage in find_stages(module) if stage is not module}
        self.stages = {name: found[name] for name in self.family.stage_order(list(found), checkpoint.config)}
        self.embedding: nn.Module = module.get_input_embeddings()  # type: ignore[operator]
        head = module.get_output_embeddings()  # type: ignore[operator]
        self.tied = self.family.is_tied(checkpoint.config)
        self._head: nn.Module | None = head
        language = self._path[self.embedding].rpartition(".")[0]
        self._language_modules = set(module.get_submodule(language).modules()) if language else set()
        if not self.stages:
            why = "it has no ModuleList of blocks with linear layers"
            fix = "vlqc compiles models whose blocks are modules of an nn.ModuleList"
            raise UserError(Fault("unsupported architecture", str(checkpoint.folder), why, fix))
        shapes = ((name, tuple(parameter.shape)) for name, parameter in self.parameters(module).items())
        checkpoint.check_tensors(shapes, [f"{name}.weight" for name in (self.name(self.embedding), *self.heads)])
        if self.tied and self._head is not None:
            checkpoint.check_shared_weight(f"{self.name(self.embedding)}.weight", f"{self.name(self._head)}.weight")

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        *,
        trust_remote_code: bool = False,
        device: torch.device = CPU,
        dtype: RequestedDtype = "auto",
    ) -> "StreamedModel":
        """The model of a checkpoint; dtype: value of --dtype.

        Raises UserError if it is quantized, unsupported or does not fit its config.
        """
        checkpoint.check_not_quantized()
        checkpoint.check_config()
        module = build_meta_model(checkpoint.folder, checkpoint.config, trust_remote_code=trust_remote_code)
        model = cls(module, checkpoint, device=device)
        model.trust_remote_code = trust_remote_code
        model.requested_dtype = dtype
        check_roles(model.family, model.linear_layers)
        model.check_unused_tensors()
        return model

    @property
    def emitted_dtype(self) -> torch.dtype:
        """dtype of the float tensors of the result."""
        return emitted_dtype(self.checkpoint.dtype, self.requested_dtype)

    @property
    def linear_layers(self) -> list[str]:
        """Checkpoint names of the Linears of all stages, in order."""
        return [
            self.canonical(f"{self._path[stage]}.{path}.").removesuffix(".")
            for stage in self.stages.values()
            for path, child in stage.named_modules()
            if isinstance(child, nn.Linear)
        ]

    @property
    def heads(self) -> list[str]:
        """Checkpoint names of the Linears outside the stages: the output head, which stays in float."""
        return [] if self._head is None else [self.name(self._head)]

    def name(self, module: nn.Module) -> str:
        """Checkpoint name of a module."""
        return self.canonical(self._path[module] + ".").removesuffix(".")

    def path(self, module: nn.Module) -> str:
        """Name of a module in the module tree."""
        return self._path[module]

    def is_language(self, stage: nn.Module) -> bool:
        """Whether a stage belongs to the language model: its rows are tokens, not image patches."""
        return stage in self._language_modules

    def rotate(self, plan: RotationPlan, *, stages: bool) -> None:
        """Rotates all tensors that are read from now on.

        stages: also those of stages, and without rounding to the stored dtype; otherwise passes rotate the stages.
        """
        self.rotation_plan = plan
        self.tensors = RotatedTensors(
            self.checkpoint, plan, self.name(self.embedding), dtype=None if stages else self.emitted_dtype
        )
        if stages:
            self.read_stage_tensor = self.tensors.tensor
        if plan.untied_head:
            self.tied = False

    def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Checkpoint name -> parameter, for a module and its children; without the weight of a tied head."""
        path = self._path[module]
        named = module.named_parameters(prefix=path, remove_duplicate=False)
        tied = f"{self._path[self._head]}.weight" if self.tied and self._head is not None else None
        return {self.canonical(name): parameter for name, parameter in named if name != tied}

    def unused_tensors(self) -> list[str]:
        """Names of checkpoint tensors without a parameter in the model, sorted; without a copy of a tied weight."""
        copies = {f"{self.name(self._head)}.weight"} if self.tied and self._head is not None else set()
        return sorted(set(self.checkpoint.names) - set(self.parameters(self.module)) - copies)

    def check_unused_tensors(self) -> None:
        """UserError if checkpoint tensors belong to blocks that the model does not have."""
        unused = self.unused_tensors()
        if extra := [name for name in unused if (block := self.family.block(name)) and block not in self.stages]:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            why = "config.json has fewer layers than the weight files; the outputs would differ"
            fix = "use the config.json of the same checkpoint"
            raise UserError(Fault(f"unexpected tensor {extra[0]}{more}", str(self.checkpoint.folder), why, fix))

    def non_stage_parameters(self) -> list[str]:
        """Checkpoint names of all parameters outside the stages, sorted."""
        in_stages = {name for stage in self.stages.values() for name in self.parameters(stage)}
        return sorted(set(self.parameters(self.module)) - in_stages)

    def materialize(self, module: nn.Module, read: Callable[[str], Tensor]) -> None:
        """Loads all parameters of a module and its children as float32 copies. read: checkpoint name -> tensor.

        With a `weights_folder`, the weights of experts are in files there, and in memory only while an expert runs.
        """
        for name, parameter in list(module.named_parameters()):
            full_name = self.canonical(f"{self._path[module]}.{name}")
            value = read(full_name).reshape(parameter.shape)
            if self._is_in_file(full_name) and self.weights_folder is not None:
                loaded = file_backed(value.shape, torch.float32, self.weights_folder).copy_(value)
                release_pages(loaded)
                owner = module.get_submodule(name.rpartition(".")[0])
                self._hooks.append(owner.register_forward_hook(_release_parameters))
            else:
                loaded = value.to(self.device, torch.float32, copy=True)
            _set_parameter(module, name, loaded)

    def _is_in_file(self, name: str) -> bool:
        is_expert = self.family.experts_of(name.rpartition(".")[0]) is not None
        return is_expert and self.weights_folder is not None and self.device.type == "cpu"

    def to_meta(self, module: nn.Module) -> None:
        """Moves all parameters of a module and its children to meta, which frees their memory."""
        for name, parameter in list(module.named_parameters()):
            _set_parameter(module, name, torch.empty_like(parameter, device="meta"))
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        release_unused_memory()

    def prefetch_after(self, name: str) -> None:
        """Starts to read the weights of the next stage into the page cache; after the last one, all others."""
        names = list(self.stages)
        following = names[names.index(name) + 1 :]
        wanted = self.parameters(self.stages[following[0]]) if following else self.non_stage_parameters()
        self.checkpoint.prefetch(wanted)

    @contextmanager
    def non_stage_weights(self, read: Callable[[str], Tensor], *, head: bool = False) -> Iterator[None]:
        """Inside, the modules outside the stages can run: their parameters are loaded.

        The embedding stays on meta and reads single rows from the file. The output head is loaded only with `head`.
        """
        forward = self.embedding.forward
        embedding_name = f"{self.name(self.embedding)}.weight"
        in_stage = {child for stage in self.stages.values() for child in stage.modules()}
        loaded = [
            child
            for child in self.module.modules()
            if child not in in_stage and child is not self.embedding and (head or child is not self._head)
            and any(True for _ in child.parameters(recurse=False))
        ]  # fmt: skip
        self.embedding.forward = lambda ids: self.tensors.rows(embedding_name, ids.cpu()).to(ids.device).float()
        try:
            for child in loaded:
                tied_head = child is self._head and self.tied
                self.materialize(child, (lambda _: read(embedding_name)) if tied_head else read)
            yield
        finally:
            self.embedding.forward = forward
            for child in loaded:
                self.to_meta(child)

    def inputs(self, sample: dict[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments of the model's forward for one sample, on the device of the model."""
        kwargs = model_inputs(self.module, self.family, sample)
        return {name: arg.to(self.device) if isinstance(arg, Tensor) else arg for name, arg in kwargs.items()}


def model_inputs(model: nn.Module, family: ModelFamily, sample: dict[str, Tensor]) -> dict[str, Any]:
    """The keyword arguments of the model's forward for one sample, for the installed transformers version."""
    accepted = inspect.signature(type(model).forward).parameters
    return family.inputs.forward_arguments(sample, model, accepted)


def find_stages(module: nn.Module) -> list[nn.Module]:
    """The modules that are compiled one at a time, in registration order.

    These are the elements of the outermost ModuleLists, and modules beside such lists that contain Linears. No names
    are involved. A bare Linear beside the lists, such as the output head, is not a stage.
    """
    if isinstance(module, nn.ModuleList):
        return [block for block in module if _has_linear(block)]
    if any(isinstance(child, nn.ModuleList) and any(map(_has_linear, child)) for child in module.modules()):
        return [stage for child in module.children() for stage in find_stages(child)]
    return [module] if _has_linear(module) and not isinstance(module, nn.Linear) else []


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


def _release_parameters(module: nn.Module, args: object, output: object) -> None:
    """Forward hook that drops the pages of file-backed parameters."""
    release_pages(*module.parameters(recurse=False))


def _set_parameter(root: nn.Module, path: str, value: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    setattr(root.get_submodule(owner), name, nn.Parameter(value, requires_grad=False))
