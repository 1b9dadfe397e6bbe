"""A state of a stage as a bundle: a folder from which `vlqc run-pass` goes on. `bundle_facts` says what is in it."""

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlqc.errors import Fault, UserError
from vlqc.ir.execution import Call, exact_bfloat16
from vlqc.ir.printer import print_stage
from vlqc.ir.serialization import NotSerializable, serialize, span
from vlqc.ir.snapshot import WEIGHT_PARTS
from vlqc.ir.stage import Stage
from vlqc.ir.tensor_cache import TensorCache
from vlqc.ir.tensor_digest import digest, fingerprint
from vlqc.kernels_ref.norm import ShiftedNorm
from vlqc.kernels_ref.quant_linear import GroupQuantLinear, QuantLinear, StaticQuantLinear
from vlqc.pipeline.registry import WRAPPERS
from vlqc.reporting.dumps import bundle_facts as facts
from vlqc.reporting.dumps.files import State, with_suffix, write_or_link

PACKAGES = ("vlqc", "torch", "transformers", "numpy")
_FINGERPRINT = TensorCache(fingerprint)


def write_bundle(stage: Stage, path: Path, state: State) -> None:
    """Writes PATH.bundle. UserError for a stage that was not compiled from a folder, or enters in an unknown way."""
    if state.model_path is None or stage.module is None:
        raise UserError(Fault("a bundle cannot be written", stage.name, "its stage is none of a checkpoint's"))
    folder = with_suffix(path, ".bundle")
    folder.mkdir()
    entered = _Entered(stage)
    said = facts.BundleFacts(
        stage=stage.name,
        versions={package: importlib.metadata.version(package) for package in PACKAGES if _installed(package)},
        names=dict(_names(stage)),
        replaced=tuple(_replaced(stage.module)),
        constants={it.name: it.meta.get("path") for it in stage.graph.nodes if it.op == "get_attr"},
        edges=None if stage.edges is None else tuple((edge.producer, tuple(edge.consumers)) for edge in stage.edges),
        observations=tuple(_observed(stage)),
        calls=tuple(entered.calls),
        probe=entered.probe,
        before_run=entered.before_run,
    )
    (folder / facts.GRAPH).write_text(print_stage(stage), encoding="utf-8")
    (folder / facts.FACTS).write_text(said.model_dump_json(indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(state.model_path / "config.json", folder / facts.CONFIG)
    for name, tensors in (
        (facts.WEIGHTS, dict(_weights(stage))),
        (facts.OBSERVATIONS, dict(_statistics(stage))),
        (facts.INPUTS, entered.tensors),
    ):
        mark = " ".join(f"{key} {digest(it, known=_FINGERPRINT)}" for key, it in tensors.items())
        write_or_link(name, mark, folder / name, state, _saver(tensors))


def _installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return False


def _saver(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        stored, halved = {}, []
        for name, tensor in tensors.items():
            half = exact_bfloat16(tensor) if tensor.dtype == torch.float32 and tensor.ndim else None
            if half is not None:
                halved.append(name)
            stored[name] = (tensor.detach().clone() if half is None else half).contiguous().cpu()
        save_file(stored, path, {facts.HALVED: json.dumps(halved)})

    return save


def _names(stage: Stage) -> Iterator[tuple[str, str]]:
    paths = [path for path, _ in stage.module.named_modules() if path]
    paths += [path for path, _ in (*stage.module.named_parameters(), *stage.module.named_buffers())]
    for path in paths:
        if (name := stage.checkpoint_name(path)) != f"{stage.name}.{path}":
            yield path, name


def _replaced(module: nn.Module) -> Iterator[facts.Replaced]:
    for path, child in module.named_modules():
        kind = type(child).__name__
        if isinstance(child, StaticQuantLinear):
            yield facts.Replaced(path=path, kind=kind, flags={"corrected": child.corrected})
        elif isinstance(child, GroupQuantLinear):
            yield facts.Replaced(path=path, kind=kind, flags={"weight_only": child.weight_only})
        elif isinstance(child, QuantLinear | ShiftedNorm) or kind in WRAPPERS:
            yield facts.Replaced(path=path, kind=kind)


def _observed(stage: Stage) -> Iterator[facts.Observed]:
    for node, seen in stage.observations.items():
        rows = {name: it.rows for name, it in seen.ranges.items()}
        yield facts.Observed(node=node, channels=seen.channels, rows=rows, balance=seen.balance, samples=seen.samples)


def _weights(stage: Stage) -> Iterator[tuple[str, Tensor]]:
    for path, tensor in (*stage.module.named_parameters(), *stage.module.named_buffers()):
        yield f"module/{path}", tensor
    for site in stage.sites.values():
        if site.weight is not None:
            parts = zip(WEIGHT_PARTS, site.weight.tensors(), strict=False)
            yield from ((f"site/{site.name}/{word}", tensor) for word, tensor in parts)
    for node in stage.graph.nodes:
        constant = node.meta.get("constant")
        made_on_the_way = node.op == "get_attr" and node.meta.get("path") is None
        if made_on_the_way and isinstance(constant, Tensor) and not constant.is_meta:
            yield f"constant/{node.name}", constant
    for number, edge in enumerate(stage.edges or ()):
        yield f"edge/{number}/usable", edge.usable
        yield from ((f"edge/{number}/{target}", columns) for target, columns in edge.consumers.items())


def _statistics(stage: Stage) -> Iterator[tuple[str, Tensor]]:
    for node, seen in stage.observations.items():
        for modality, it in seen.ranges.items():
            yield from ((f"{node}/{modality}/{part}", getattr(it, part)) for part in facts.RANGE_PARTS)
        yield from ((f"{node}/{part}", getattr(seen, part)) for part in facts.KEPT_PARTS)


class _Entered:
    """How the probe and, before they have run, the samples enter a stage; tensors that they share are kept once."""

    def __init__(self, stage: Stage) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._number: dict[int, int] = {}
        self.before_run = not stage.execution.outputs and stage.execution.process_group.size == 1
        self.calls = [self._call(stage.name, call) for call in stage.execution.calls] if self.before_run else []
        among = [number for number, call in enumerate(stage.execution.calls) if call is stage.execution.probe]
        self.probe: int | facts.Entered | None = None
        if stage.execution.probe is not None:
            self.probe = among[0] if among and self.before_run else self._call(stage.name, stage.execution.probe)

    def _call(self, stage: str, call: Call) -> facts.Entered:
        try:
            args, kwargs = serialize(call.args, self._keep), serialize(call.kwargs, self._keep)
        except NotSerializable as error:
            why = f"it is called with a {error}, which has no plain form"
            raise UserError(
                Fault("a bundle cannot be written", stage, why, "leave bundle out of the formats")
            ) from error
        modality = None if call.modality is None else self._keep(call.modality.contiguous())
        return facts.Entered(sample=call.sample, args=args, kwargs=kwargs, modality=modality)

    def _keep(self, tensor: Tensor) -> int:
        """The number of a tensor, of which the elements from its first to its last one are kept, flat."""
        if id(tensor) not in self._number:
            self._number[id(tensor)] = len(self.tensors)
            length: Any = span(tensor.shape, tensor.stride())
            self.tensors[str(len(self.tensors))] = tensor.detach().as_strided((length,), (1,)).cpu()
        return self._number[id(tensor)]
