"""The float model without its weights: the real transformers classes on the meta device, one piece filled at a time."""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from vlqc.errors import Fault, UserError
from vlqc.families.qwen2_5_vl import original_name
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.ir.memory import release_unused_memory

LAYER = re.compile(r"((?:model\.layers|visual\.blocks)\.\d+)\.")

CPU = torch.device("cpu")
COMPILED_TYPES = ("qwen2_5_vl",)
COMPILED_CLASSES = ("Qwen2_5_VLForConditionalGeneration",)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, new parameters land on the meta device; buffers stay real, because constructors compute them."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build(folder: Path, config: dict[str, Any], *, trust_remote_code: bool = False) -> nn.Module:
    """The model that config.json describes: parameters on meta, float32, in eval mode. UserError if there is none.

    config: in flat form. Code from the folder runs only with `trust_remote_code`.
    """
    where = str(folder / "config.json")
    if config.get("model_type") not in COMPILED_TYPES:
        why = f"model_type is {config.get('model_type')}; the engines' rules are known for {', '.join(COMPILED_TYPES)}"
        raise UserError(Fault("this model is not compiled", where, why))
    kind = _model_class(folder, config, trust_remote_code)
    dtype = {"dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype": torch.float32}
    try:
        if trust_remote_code and "AutoConfig" in config.get("auto_map", {}):
            described = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
        else:
            described = kind.config_class.from_dict(config)  # type: ignore[attr-defined]
        with parameters_on_meta():
            model: nn.Module = kind._from_config(described, **dtype)  # type: ignore[attr-defined]
    except Exception as error:  # a config can break a constructor in any way
        why = f"{type(error).__name__}: {error}"
        raise UserError(Fault("the model cannot be built", where, why)) from error
    return model.eval()


def _model_class(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> type[nn.Module]:
    """The class of the first architecture: of the folder's own code if that is trusted, else of transformers."""
    listed = config.get("architectures")
    name = str(listed[0]) if isinstance(listed, list) and listed else "?"
    where = str(folder / "config.json")
    auto_map = config.get("auto_map")
    mapped = auto_map.items() if isinstance(auto_map, dict) else ()
    own = [value for key, value in mapped if key.startswith("AutoModel") and isinstance(value, str)]
    if own and trust_remote_code:
        try:
            loaded: type[nn.Module] = get_class_from_dynamic_module(own[0], str(folder), local_files_only=True)
            return loaded
        except Exception as error:  # foreign code can fail in any way
            why = f"{type(error).__name__}: {error}"
            raise UserError(Fault("the checkpoint's own code cannot be loaded", where, why)) from error
    kind = getattr(transformers, name, None) if name in COMPILED_CLASSES else None
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return kind
    if own:
        why = f"{name} is defined by code in the checkpoint folder ({own[0]})"
        fix = "read that code; if you trust it, add --trust_remote_code True"
        raise UserError(Fault("the checkpoint needs its own code", where, why, fix))
    why = f"its class is {name}; vlqc compiles {', '.join(COMPILED_CLASSES)}"
    raise UserError(Fault("the architecture is not known", where, why))


class StreamedModel:
    """The model of a checkpoint, its stages in order, and how its modules are called there.

    stages: checkpoint name -> module, in the order in which they are registered, which is the order they run in;
    canonical: name in the module tree -> checkpoint name.
    """

    def __init__(
        self,
        module: nn.Module,
        checkpoint: Checkpoint,
        canonical: Callable[[str], str] = original_name,
        device: torch.device = CPU,
    ) -> None:
        self.module = module
        self.checkpoint = checkpoint
        self.canonical = canonical
        self.device = device
        for owner in module.modules():
            owner._buffers.update({name: it.to(device) for name, it in owner._buffers.items() if it is not None})
        self._path: dict[nn.Module, str] = {child: path for path, child in module.named_modules()}
        self.stages = {self.name(stage): stage for stage in find_stages(module) if stage is not module}
        self.embedding: nn.Module = module.get_input_embeddings()  # type: ignore[operator]
        head = module.get_output_embeddings()  # type: ignore[operator]
        self.tied = bool(module.config.tie_word_embeddings)  # type: ignore[union-attr]
        self._head: nn.Module | None = head
        language = self._path[self.embedding].rpartition(".")[0]
        self._language = {child for child in module.get_submodule(language).modules()} if language else set()
        if not self.stages:
            why = "it holds no list of blocks with linear layers"
            raise UserError(Fault("the architecture cannot be traced", str(checkpoint.folder), why))
        checkpoint.expect((name, tuple(parameter.shape)) for name, parameter in self.parameters(module).items())

    @classmethod
    def open(
        cls, checkpoint: Checkpoint, *, trust_remote_code: bool = False, device: torch.device = CPU
    ) -> "StreamedModel":
        """The model that a checkpoint's config.json describes. UserError if its tensors do not fit."""
        checkpoint.require_float()
        checkpoint.require_config()
        module = build(checkpoint.folder, checkpoint.config, trust_remote_code=trust_remote_code)
        return cls(module, checkpoint, device=device)

    @property
    def layers(self) -> list[str]:
        """Checkpoint names of all Linears of all stages, in order."""
        return [
            self.canonical(f"{self._path[stage]}.{path}.").removesuffix(".")
            for stage in self.stages.values()
            for path in self.linears(stage)
        ]

    def name(self, module: nn.Module) -> str:
        """Checkpoint name of a module."""
        return self.canonical(self._path[module] + ".").removesuffix(".")

    def path(self, module: nn.Module) -> str:
        """Name of a module in the module tree."""
        return self._path[module]

    def is_language(self, stage: nn.Module) -> bool:
        """Whether the rows of a stage are the tokens of the prompt (and not picture patches)."""
        return stage in self._language

    def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Checkpoint name -> parameter of everything below `module`; a tied head is left out."""
        path = self._path[module]
        named = module.named_parameters(prefix=path, remove_duplicate=False)
        tied = f"{self._path[self._head]}.weight" if self.tied and self._head is not None else None
        return {self.canonical(name): parameter for name, parameter in named if name != tied}

    @property
    def heads(self) -> list[str]:
        """Checkpoint names of Linears outside the stages: the output head, which always stays float."""
        return [] if self._head is None else [self.name(self._head)]

    def unknown_tensors(self) -> list[str]:
        """Names in the checkpoint that the model has no parameter for, sorted; a tied head's copy is none of them.
        UserError if they are of layers."""
        copies = {f"{self.name(self._head)}.weight"} if self.tied and self._head is not None else set()
        unknown = sorted(set(self.checkpoint.names) - set(self.parameters(self.module)) - copies)
        if layers := [name for name in unknown if (of := LAYER.match(name)) and of[1] not in self.stages]:
            what = f"{layers[0]} belongs to a layer that config.json does not count"
            fix = "take config.json from the same checkpoint"
            raise UserError(Fault(what, str(self.checkpoint.folder), "a model cut short has other outputs", fix))
        return unknown

    def non_stage_parameters(self) -> list[str]:
        """Checkpoint names of all parameters that belong to no stage, sorted."""
        inside = {name for stage in self.stages.values() for name in self.parameters(stage)}
        return sorted(set(self.parameters(self.module)) - inside)

    def linears(self, stage: nn.Module) -> dict[str, nn.Linear]:
        """Path in the stage -> Linear."""
        return {path: child for path, child in stage.named_modules() if isinstance(child, nn.Linear)}

    def materialize(self, module: nn.Module, read: Callable[[str], Tensor]) -> None:
        """Gives every parameter below `module` its real values, float32, in memory of its own."""
        for name, parameter in list(module.named_parameters()):
            value = read(self.canonical(f"{self._path[module]}.{name}"))
            _replace(module, name, value.to(self.device, torch.float32, copy=True).reshape(parameter.shape))

    def prefetch_after(self, name: str) -> None:
        """Brings the weights behind a stage from the disk, in the background: those of the next one, or the rest."""
        names = list(self.stages)
        behind = names[names.index(name) + 1 :]
        self.checkpoint.read_ahead(self.parameters(self.stages[behind[0]]) if behind else self.non_stage_parameters())

    def to_meta(self, module: nn.Module) -> None:
        """Forgets the values below `module`: its parameters and buffers that were put there go back to meta."""
        for name, parameter in list(module.named_parameters()):
            _replace(module, name, torch.empty_like(parameter, device="meta"))
        release_unused_memory()

    @contextmanager
    def non_stage_weights(self, read: Callable[[str], Tensor], *, head: bool = False) -> Iterator[None]:
        """Inside, what lies outside the stages can run: embedding rows come from the file, the rest is filled.

        The output head is left on meta unless `head`: without a loss to compute nothing reads it.
        """
        forward = self.embedding.forward
        embedding_name = f"{self.name(self.embedding)}.weight"
        in_stage = {child for stage in self.stages.values() for child in stage.modules()}
        filled = [
            child
            for child in self.module.modules()
            if child not in in_stage and child is not self.embedding and (head or child is not self._head)
            and any(True for _ in child.parameters(recurse=False))
        ]  # fmt: skip
        self.embedding.forward = lambda ids: self.checkpoint.rows(embedding_name, ids.cpu()).to(ids.device).float()
        try:
            for child in filled:
                tied_head = child is self._head and self.tied
                self.materialize(child, (lambda _: read(embedding_name)) if tied_head else read)
            yield
        finally:
            self.embedding.forward = forward
            for child in filled:
                self.to_meta(child)

    def inputs(self, sample: dict[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments of the model's forward for one sample, in any transformers version."""
        given = model_inputs(self.module, sample)
        return {name: it.to(self.device) if isinstance(it, Tensor) else it for name, it in given.items()}


def model_inputs(model: nn.Module, sample: dict[str, Tensor]) -> dict[str, Any]:
    """Adds what a transformers version wants beside the four tensors of a sample, and drops what it does not know.

    transformers 5 derives image positions from mm_token_type_ids (1 at image tokens) and is silently wrong without.
    """
    given: dict[str, Any] = {"use_cache": False, **sample}
    accepted = inspect.signature(type(model).forward).parameters
    if "mm_token_type_ids" in accepted and "mm_token_type_ids" not in given:
        given["mm_token_type_ids"] = (sample["input_ids"] == model.config.image_token_id).int()  # type: ignore[union-attr]
    if "mm_token_type_ids" not in accepted:
        given.pop("mm_token_type_ids", None)
    return given


def find_stages(module: nn.Module) -> list[nn.Module]:
    """The units of compilation: elements of the outermost block lists, and what stands beside those and holds Linears.

    Nothing is found by name. A bare Linear beside the lists (the output head) is no stage.
    """
    if isinstance(module, nn.ModuleList):
        return [block for block in module if _holds_linear(block)]
    if any(isinstance(child, nn.ModuleList) and any(map(_holds_linear, child)) for child in module.modules()):
        return [stage for child in module.children() for stage in find_stages(child)]
    return [module] if _holds_linear(module) and not isinstance(module, nn.Linear) else []


def _holds_linear(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


def _replace(root: nn.Module, path: str, value: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    setattr(root.get_submodule(owner), name, nn.Parameter(value, requires_grad=False))
