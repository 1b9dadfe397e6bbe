"""From a bundle back to a stage that passes can work on. A bundle is a file of strangers: nothing in it is trusted."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vlqc.errors import Fault, UserError
from vlqc.families.qwen2_5_vl import flatten_config, original_name
from vlqc.files import parse_json, read_json_object
from vlqc.frontend.checkpoint.config_schema import config_faults
from vlqc.frontend.checkpoint.files import link_faults
from vlqc.frontend.process_group import ProcessGroup
from vlqc.frontend.streamed_model import build_meta_model
from vlqc.ir.execution import Call, StageRun
from vlqc.ir.observation import ChannelRange, Observation
from vlqc.ir.printer import print_stage
from vlqc.ir.serialization import deserialize
from vlqc.ir.snapshot import WEIGHT_PARTS, StageSnapshot
from vlqc.ir.stage import Edge, Stage, WeightQuantization
from vlqc.ir.verifier import check
from vlqc.kernels_ref.norm import ShiftedNorm
from vlqc.kernels_ref.quant_linear import DynamicQuantLinear, GroupQuantLinear, QuantLinear, StaticQuantLinear
from vlqc.pipeline.registry import load_wrapper
from vlqc.reporting.dumps import bundle_facts as facts
from vlqc.reporting.dumps.comparison import read_stage

Tensors = dict[str, Tensor]
QUANTIZED: dict[str, type[QuantLinear]] = {
    kind.__name__: kind for kind in (StaticQuantLinear, DynamicQuantLinear, GroupQuantLinear)
}
LARGEST_SIZE = 2**20  # of any dimension in a config.json: vocabularies have some 150 000 words
MOST_TENSORS = 10_000  # of a model: bounds how many blocks are built
FIX = "write the bundle again: vlqc compile --dump_ir FOLDER --dump_formats bundle"


def read_bundle(folder: Path) -> Stage:
    """The stage of a bundle, on the CPU, exactly as it was written: its text is the same.

    UserError for a folder that is no bundle, whose parts do not fit each other, or that another transformers wrote
    whose classes are built differently.
    """
    if not folder.is_dir() or not (folder / facts.FACTS).is_file():
        why = f"there is no {facts.FACTS} in it" if folder.is_dir() else "there is no such folder"
        raise UserError(Fault(f"{folder} is no bundle", why=why, fix="name a folder NN-STATE.bundle of a dump"))
    with _damage(folder):
        if faults := link_faults(folder):
            raise UserError(*faults)
        said = facts.BundleFacts.model_validate(read_json_object(folder / facts.FACTS))
        parsed = read_stage(folder / facts.GRAPH)
        text = print_stage(parsed)
        weights, statistics = _tensors(folder / facts.WEIGHTS), _tensors(folder / facts.OBSERVATIONS)
        module = _module(folder, said, weights)
        execution = _execution(module, said, _tensors(folder / facts.INPUTS))
        stage = _stage(parsed, said, module, execution, weights, statistics)
        if invalid := check(stage):
            raise ValueError("; ".join(invalid))
        if print_stage(stage) != text:
            raise ValueError(f"its tensors are not those that {facts.GRAPH} tells of")
        if stage.execution.probe is not None:
            stage.execution.probe_output()  # whether it enters at all: arguments of strangers may be anything
    return stage


@contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """Inside, what a damaged or hostile bundle can raise becomes a fault of the user's."""
    try:
        yield
    except ValidationError as error:
        why = "; ".join(f"{'.'.join(map(str, it['loc']))}: {it['msg']}" for it in error.errors()[:3])
        raise UserError(Fault(f"{facts.FACTS} cannot be used", str(folder), why, FIX)) from error
    except (
        SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, StopIteration,
        ArithmeticError, AssertionError,
    ) as error:  # fmt: skip
        raise UserError(Fault("the bundle cannot be used", str(folder), _first_line(error), FIX)) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _tensors(path: Path) -> Tensors:
    """All tensors of a file, in memory of their own."""
    with safe_open(str(path), "pt") as opened:
        metadata = opened.metadata() or {}
        halved = set(parse_json(metadata.get(facts.HALVED, "[]")))
        read: Tensors = {}
        for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
            tensor = opened.get_tensor(name)
            read[name] = tensor.to(torch.float32 if name in halved else tensor.dtype, copy=True)
    return read


# ---- the module ------------------------------------------------------------------------------------------------------


def _module(folder: Path, said: facts.BundleFacts, weights: Mapping[str, Tensor]) -> nn.Module:
    """The stage's module as the installed transformers has it, with what passes replaced, and all its tensors."""
    config = flatten_config(read_json_object(folder / facts.CONFIG))
    if faults := config_faults(config, str(folder / facts.CONFIG), LARGEST_SIZE, MOST_TENSORS):
        raise UserError(*faults)
    whole = build_meta_model(folder, config)
    found = {original_name(f"{path}.").removesuffix("."): child for path, child in whole.named_modules()}
    if said.stage not in found:
        raise ValueError(f"the model of its {facts.CONFIG} has no module {said.stage}")
    module: nn.Module = found[said.stage]
    values = {name.removeprefix("module/"): it for name, it in weights.items() if name.startswith("module/")}
    for it in said.replaced:
        module.set_submodule(it.path, _replacement(it, module.get_submodule(it.path), values))
    known = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for path, value in values.items():
        owner, _, name = path.rpartition(".")
        holder = module.get_submodule(owner)
        if name == "bias" and isinstance(holder, nn.Linear):  # a pass may have given it one
            known[path] = value
        if path not in known or known[path].shape != value.shape:
            has = list(known[path].shape) if path in known else "no such tensor"
            raise ValueError(f"{path} has the shape {list(value.shape)}; the class in this transformers has {has}")
        if isinstance(holder, QuantLinear):
            continue
        setattr(holder, name, value if name in holder._buffers else nn.Parameter(value, requires_grad=False))
    if missing := sorted(known.keys() - values.keys()):
        raise ValueError(f"{missing[0]} is missing")
    return module


def _replacement(it: facts.Replaced, before: nn.Module, values: Tensors) -> nn.Module:
    own = {name.removeprefix(f"{it.path}."): value for name, value in values.items() if name.startswith(f"{it.path}.")}
    made: nn.Module
    if it.kind in QUANTIZED:
        made = QUANTIZED[it.kind](**own)  # type: ignore[arg-type]
        for flag, value in it.flags.items():
            if not isinstance(getattr(type(made), flag, None), bool):
                raise ValueError(f"{it.kind} has no flag {flag}")
            setattr(made, flag, value)
        return made
    if it.kind == ShiftedNorm.__name__:
        return ShiftedNorm(before, own["bias"])
    made = load_wrapper(it.kind)(before)
    return made


# ---- everything else -------------------------------------------------------------------------------------------------


def _stage(
    parsed: StageSnapshot,
    said: facts.BundleFacts,
    module: nn.Module,
    execution: StageRun,
    weights: Mapping[str, Tensor],
    statistics: Tensors,
) -> Stage:
    """Joins the parsed graph and sites with the module and all tensors."""
    names, prefix = said.names, f"{said.stage}."
    paths = {name: path for path, name in names.items()}

    def target_of(name: str) -> str:
        return paths.get(name, name.removeprefix(prefix))

    stage = Stage(
        name=parsed.name,
        part=parsed.part,
        dtype=parsed.dtype,
        module=module,
        graph=parsed.graph,
        sites=parsed.sites,
        execution=execution,
        checkpoint_name=lambda path: names.get(path, prefix + path),
    )
    for node in stage.graph.nodes:
        node.meta.pop("summary", None)
        if node.op == "call_module":
            node.target = target_of(str(node.target))
        elif node.op == "get_attr":
            path = said.constants[node.name]
            node.meta["path"] = path
            node.meta["constant"] = (
                module.get_parameter(path) if path is not None else weights.get(f"constant/{node.name}")
            )
            if node.meta["constant"] is None:
                node.meta["constant"] = torch.empty(node.meta["shape"], dtype=node.meta["dtype"], device="meta")
    for site in stage.sites.values():
        site.target = target_of(site.name)
        parts = [weights.get(f"site/{site.name}/{word}") for word in WEIGHT_PARTS]
        if parts[0] is not None and parts[1] is not None:
            site.weight = WeightQuantization(parts[0], parts[1], parts[2])
    if said.edges is not None:
        stage.edges = tuple(
            Edge(
                producer,
                weights[f"edge/{number}/usable"],
                {target: weights[f"edge/{number}/{target}"] for target in consumers},
            )
            for number, (producer, consumers) in enumerate(said.edges)
        )
    stage.observations = {it.node: _observation(it, statistics) for it in said.observations}
    return stage
    return stage


def _observation(it: facts.Observed, statistics: Tensors) -> Observation:
    def ranged(modality: str, rows: int) -> ChannelRange:
        return ChannelRange(rows, *(statistics[f"{it.node}/{modality}/{part}"] for part in facts.RANGE_PARTS))

    return Observation(
        it.channels,
        {modality: ranged(modality, rows) for modality, rows in it.rows.items()},
        **{part: statistics[f"{it.node}/{part}"] for part in facts.KEPT_PARTS},
        balance=it.balance,
        samples=it.samples,
    )


def _execution(module: nn.Module, said: facts.BundleFacts, tensors: Tensors) -> StageRun:
    def fill(room: Tensor, number: int) -> None:
        room.copy_(tensors[str(number)].view(torch.uint8))

    def entered(it: facts.Entered) -> Call:
        args, kwargs = (deserialize(value, fill, torch.device("cpu")) for value in (it.args, it.kwargs))
        if not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise ValueError("a call has arguments that are none")
        return Call(it.sample, args, kwargs, None if it.modality is None else tensors[str(it.modality)])

    calls = [entered(it) for it in said.calls]
    probe = None
    if isinstance(said.probe, int):
        probe = calls[said.probe]
    elif said.probe is not None:
        probe = entered(said.probe)
    return StageRun(module, ProcessGroup(), calls, probe, name=said.stage)
