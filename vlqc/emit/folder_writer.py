"""Writes a compiled folder in the layout of an engine: weights, description, config.json, side files."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from vlqc.emit.background_writer import BackgroundWriter
from vlqc.emit.deferred_stages import FOLDER, DeferredStages
from vlqc.emit.shard_writer import ShardWriter, most_header_bytes
from vlqc.emit.stage_tensors import EmittedTensor, float_tensor, header_bytes, stage_tensors
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.emitted_dtype import dtype_name, emitted_dtype
from vlqc.frontend.rotated_tensors import RotatedTensors
from vlqc.ir.stage import Stage
from vlqc.kernels_ref.matmul import CORRECTION_STEP
from vlqc.options.options import Options
from vlqc.pipeline.precision_search import SearchResult, search_schemes
from vlqc.targets.caches import TensorScheme, tensor_scheme
from vlqc.targets.engine import QUANT_BIAS_CORRECTION, FolderContent
from vlqc.targets.rules import folder_type
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import parse_target

GIB = 1024**3


class FolderWriter:
    """Writes a compiled checkpoint into an existing empty folder.

    Order of calls: `add_stage` for each stage, `resolve_schemes`, `copy_rest`, `finish`; `copy` at any time before.
    With --fallback auto, stages are deferred until `resolve_schemes`; otherwise they are written at once.

    tensors: reads the tensors outside the stages, default: those of the checkpoint.

    dtype: of the float tensors; schemes: of the tensors written so far, by name; corrected: whether any quant_bias has
    a mean error subtracted; on_stage_written: called with the number of a deferred stage, and a function that deletes
    its file, once all its tensors have been passed on for writing.
    """

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, options: Options, tensors: Checkpoint | RotatedTensors | None = None
    ) -> None:
        self.folder, self.checkpoint, self.options = folder, checkpoint, options
        self._tensors = tensors or checkpoint
        self.layout = options.layout
        self.dtype = emitted_dtype(checkpoint.dtype, options.dtype)
        self.schemes: dict[str, TensorScheme] = {}
        self.corrected = False
        self.on_stage_written: Callable[[int, Callable[[], None]], None] = lambda number, discard: discard()
        self._shards = ShardWriter(
            folder, header_bytes=header_bytes(checkpoint), limit=file_limit(options), resumable=True
        )
        self._writer = BackgroundWriter(self._shards)
        self._deferred = DeferredStages(folder / FOLDER) if options.fallback == "auto" else None
        self._committed = 0  # how many of `schemes` the previous commits cover

    # ---- tensors ----------------------------------------------------------------------------------------------------

    def add_stage(self, stage: Stage) -> None:
        """Writes or defers all tensors of a finished stage."""
        self.corrected |= any(getattr(module, "corrected", False) for module in stage.module.modules())
        tensors = stage_tensors(stage, self.layout, self.options.scheme)
        if self._deferred is None:
            self.add(tensors)
        else:
            self._deferred.store(stage, tensors, packed=self.layout.packs_int4)

    def resolve_schemes(self, other_bytes: int = 0) -> SearchResult | None:
        """After the last stage: writes the deferred ones in the schemes that the precision search chooses.

        other_bytes: size of the tensors outside the stages, which counts for --max_bytes.

        Returns the search's result; None without a search, or without a group to decide about.
        """
        if self._deferred is None:
            return None
        deferred, plan = self._deferred, choose_schemes(self._deferred, self.options, self.checkpoint, other_bytes)
        for number, tensors in deferred.load(plan):
            self.add(tensors)
            self.on_stage_written(number, partial(deferred.discard, number))
        return plan if plan.groups else None

    def add(self, tensors: Iterable[EmittedTensor]) -> None:
        """Queues tensors for writing. InternalError for a name that was written before."""
        for emitted in tensors:
            self._writer.add(emitted.name, emitted.tensor)
            self.schemes[emitted.name] = emitted.scheme

    def copy(self, name: str) -> Tensor:
        """Reads a tensor of the source, writes it in float unless it was written before, and returns it as stored."""
        tensor = self._tensors.tensor(name)
        if name not in self.schemes:
            self.add([float_tensor(name, tensor, self.dtype)])
        return tensor

    def copy_rest(self, names: Iterable[str]) -> None:
        """Copies those tensors of the source that were not written yet."""
        for name in names:
            if name not in self.schemes:
                self.copy(name)

    def finish(self) -> None:
        """Completes the weight files and writes everything else."""
        family, target = self.checkpoint.family, parse_target(self.options.engine_target)
        layers = {
            name.removesuffix(".weight"): scheme for name, scheme in self.schemes.items() if isinstance(scheme, Scheme)
        }
        content = FolderContent(
            family, self.schemes, self.options.scheme, folder_type(target, family, layers), vars(self.options)
        )
        self._writer.close(f"quant_model_weight_{content.quant_type.lower()}")
        if self._deferred is not None:
            self._deferred.remove()
        _write_json(self.folder / self.layout.description_name(content.quant_type), self._description(content))
        _write_json(self.folder / "config.json", self._config(content))
        self.checkpoint.side_files(code=self.options.trust_remote_code).write(self.folder)

    def _description(self, content: FolderContent) -> dict[str, Any]:
        header = self.layout.description_header(content)
        if self.corrected:
            header[QUANT_BIAS_CORRECTION] = CORRECTION_STEP
        described = (name for name in sorted(self.schemes) if self.layout.describes(content.family, name))
        return header | {name: str(self.schemes[name]) for name in described}

    def _config(self, content: FolderContent) -> dict[str, Any]:
        """The source's config.json in the form that engines expect. Only keys that the written weights make untrue are
        changed."""
        config: dict[str, Any] = json.loads(json.dumps(self.checkpoint.config))
        self.checkpoint.family.set_dtype(config, dtype_name(self.dtype))
        if isinstance(self._tensors, RotatedTensors) and self._tensors.plan.untied_head:
            self.checkpoint.family.untie(config)
        config.pop("quantization_config", None)  # of the source; engines would read it as the result's
        for engine in parse_target(self.options.engine_target).engines:
            engine.edit_config(config, content, own_layout=engine is self.layout)
        return config

    # ---- commits, from which an interrupted run resumes -------------------------------------------------------------

    def commit(self, on_written: Callable[[dict[str, Any]], None], *, stage: bool = True) -> None:
        """Calls `on_written`, in the writing thread, with a JSON record of what was added since the last commit.

        All of it is on the disk by then. stage: whether a stage was added since.
        """
        schemes = dict(list(self.schemes.items())[self._committed :])
        self._committed = len(self.schemes)
        record: dict[str, Any] = {"schemes": schemes, "corrected": self.corrected}
        deferred = self._deferred if stage else None
        number = 0
        if deferred is not None:
            record["deferred"], number = deferred.last_record(), deferred.count - 1

        def complete() -> None:
            if deferred is not None:
                record["deferred_sha256"] = deferred.sync(number)
            on_written(record | {"shards": self._shards.commit()})

        self._writer.then(complete)

    def restore(self, records: Sequence[Mapping[str, Any]], discarded: set[int]) -> None:
        """Continues from the commits of another writer in this folder. Damaged if its files have changed since.

        discarded: numbers of the deferred stages that were written meanwhile.
        """
        if self._deferred is not None:
            self._deferred.restore(_deferred_records(records), discarded)
        for path in self.folder.iterdir():
            if path.is_file() and not path.name.endswith((".safetensors", ".partial")):
                path.unlink()  # `finish` writes it again
        self._shards.restore([record["shards"] for record in records])
        for record in records:
            self.schemes |= {name: tensor_scheme(value) for name, value in record["schemes"].items()}
            self.corrected |= record["corrected"]
        self._committed = len(self.schemes)
        self._writer.add_known(self.schemes)

    def stop(self) -> None:
        """After an error: nothing is being written when this returns."""
        self._writer.stop()


def choose_schemes(
    deferred: DeferredStages, options: Options, checkpoint: Checkpoint, other_bytes: int
) -> SearchResult:
    """The precision search over all groups of the deferred stages. other_bytes: as for `resolve_schemes`."""
    fixed_bytes = deferred.fixed_bytes + other_bytes
    if options.max_bytes is not None:
        fixed_bytes += most_header_bytes(options.max_bytes, header_bytes(checkpoint), file_limit(options))
    return search_schemes(
        deferred.groups(),
        target=options.engine_target,
        family=checkpoint.family,
        min_sqnr=options.min_sqnr,
        max_float_groups=options.max_float_groups,
        max_bytes=options.max_bytes,
        fixed_bytes=fixed_bytes,
    )


def file_limit(options: Options) -> int | None:
    """The maximum size of one weight file, in bytes; None for a single file."""
    return None if options.part_file_size is None else options.part_file_size * GIB


def committed_plan(
    folder: Path, options: Options, checkpoint: Checkpoint, records: Sequence[Mapping[str, Any]], other_bytes: int
) -> SearchResult | None:
    """The search's result for a folder that is complete, from the records of its commits; None without a search."""
    if options.fallback != "auto":
        return None
    deferred, states = DeferredStages(folder / FOLDER), _deferred_records(records)
    deferred.restore(states, set(range(len(states))))
    plan = choose_schemes(deferred, options, checkpoint, other_bytes)
    return plan if plan.groups else None


def _deferred_records(records: Sequence[Mapping[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    return [(record["deferred"], record["deferred_sha256"]) for record in records if "deferred" in record]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
