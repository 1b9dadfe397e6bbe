"""Records which stages are finished on disk, so that an interrupted run can be resumed.

The journal is a file in the work folder, beside the unfinished result. It has one record per finished stage: what was
emitted, and what the end of the run needs to know. The outputs of a sample are kept for the last finished stage that it
passed through; a resumed run starts the model's forwards again and returns them there in place of running the stages.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from vlqc.emit.atomic_folder import DISK_FAULTS, JOURNAL, OUTPUTS, nearest_folder, restore_replaced, unwritable
from vlqc.emit.folder_writer import FolderWriter
from vlqc.emit.manifest import MANIFEST, write_manifest
from vlqc.emit.resume.fingerprint import run_fingerprint, source_digests
from vlqc.emit.resume.journal_file import JournalWriter, Record
from vlqc.emit.resume.open_run import InterruptedRun, open_or_resume
from vlqc.emit.resume.stage_outputs import OutputsWriter, read_output
from vlqc.emit.shard_writer import Damaged, sync
from vlqc.emit.size_estimate import required_disk_space
from vlqc.errors import Fault, UserError, VlqcError
from vlqc.files import sha256_of
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.memory import GIB, check_memory, estimate_memory, is_out_of_memory
from vlqc.frontend.process_group import ProcessGroup
from vlqc.frontend.sequential import CachedOutputs
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.serialization import NotSerializable
from vlqc.ir.stage import Stage
from vlqc.options.options import Options
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.registry import print_pipeline


@contextmanager
def open_journal(
    options: Options,
    pipeline: Sequence[Pass],
    model: StreamedModel,
    samples: Sequence[Mapping[str, Tensor]],
    process_group: ProcessGroup,
    note: Callable[[str], None],
) -> Iterator["Journal"]:
    """Opens the journal of a new run or, with --resume, of an interrupted run with the same inputs.

    On exit the result is renamed to save_directory. After an error the work folder is kept if a stage is finished, else
    removed. Raises UserError if the run cannot be resumed, or lacks memory or disk space.

    samples: all samples, on rank 0. note: callback for messages to the user.
    """
    memory = estimate_memory(model, samples, options.memory_budget)
    check_memory(memory, model.checkpoint.files, note)
    stages = list(model.stages)
    if not process_group.is_rank0:
        yield Journal(model, process_group, None, options.save_directory, note)
        return
    restore_replaced(options.save_directory)
    fingerprint = run_fingerprint(options, print_pipeline(pipeline), model, samples)
    fingerprint |= source_digests([*map(type, pipeline), type(model.family)])
    run = open_or_resume(options, fingerprint, required_disk_space(model, options, pipeline, samples), note)
    journal = Journal(model, process_group, run, options.save_directory, note)
    keep = True
    try:
        yield journal
        journal.publish(options.overwrite)
        keep = False
    except BaseException as error:
        reported = error
        if isinstance(error, OSError) and (error.errno in DISK_FAULTS or journal.all_stages_finished):
            reported = unwritable(options.save_directory, error)
        elif is_out_of_memory(error):
            why = f"the estimate was {memory / GIB:.1f} GiB on top of the loaded libraries; {error}"
            fix = "provide more memory, lower --memory_budget, or calibrate on smaller images"
            reported = UserError(Fault("out of memory", journal.current_stage, why, fix))
        journal.close()
        # An error that vlqc raises on purpose after the last stage is deterministic: resuming would only repeat it.
        keep = journal.saved_stages > 0 and not (journal.all_stages_finished and isinstance(error, VlqcError))
        if keep and journal.restored:
            first = "first correct the fault above, then " if isinstance(reported, UserError) else ""
            reported.add_note(
                f"{journal.saved_stages} of {len(stages)} stages are finished and saved in {run.folder.folder}: "
                f"{first}run the same command with --resume to continue"
            )
        if reported is error:
            raise
        raise reported from error
    finally:
        journal.close()
        if not keep:
            run.folder.remove()
        run.folder.close()


class Journal:
    """Journal of a run. Every process has one; only that of rank 0 writes.

    folder: a folder on the disk of the result, for temporary files; result: the folder to emit into; writes: whether
    this process has anything to emit; saved_stages: number of stages whose record is on disk; restored: whether
    `restore` has succeeded; summary_states: per restored stage the value of `summary_state` (see `record_stage`).
    """

    def __init__(
        self,
        model: StreamedModel,
        process_group: ProcessGroup,
        run: InterruptedRun | None,
        save_directory: Path,
        note: Callable[[str], None],
    ) -> None:
        self._stages, self._device = list(model.stages), model.device
        self._process_group, self._run, self._note = process_group, run, note
        self._read_later = model.family.outputs_read_later(self._stages)
        self.folder = run.folder.folder if run else nearest_folder(save_directory)
        self.result = run.result if run else self.folder
        self.writes = run is not None and not run.published
        self._records: list[Record] = run.stages if run else []
        self._finished = [str(record["name"]) for record in self._records]  # names of stages
        self.saved_stages = len(self._records)
        self.summary_states: list[Any] = [record["summary"] for record in self._records]
        # Per sample, the numbers of the stages whose outputs are kept for it.
        self._outputs_of: dict[str, list[int]] = {}
        for number, record in enumerate(self._records):
            self._keep_outputs(number, record["samples"])
        self._disabled = False  # whether a stage returned something that cannot be saved
        self.restored = False
        self._folder_writer: FolderWriter | None = None
        self._checkpoint: Checkpoint | None = None
        self._writer: JournalWriter | None = None
        if run is not None and self.writes:
            (self.folder / OUTPUTS).mkdir(exist_ok=True)
            self._writer = JournalWriter(self.folder / JOURNAL)

    def _keep_outputs(self, stage: int, samples: Iterable[str]) -> None:
        """Keeps the outputs of a stage in place of those of earlier stages that no unfinished stage reads."""
        for sample in samples:
            earlier = self._outputs_of.get(sample, [])
            read_later = [number for number in earlier if self._stages[number] in self._read_later]
            self._outputs_of[sample] = [*read_later, stage]

    @property
    def commits(self) -> list[dict[str, Any]]:
        """The records of `FolderWriter.commit` of the interrupted run, in order."""
        return [record["emitter"] for record in self._run.emitted] if self._run else []

    @property
    def current_stage(self) -> str:
        """Name of the first stage that is not finished, for error messages."""
        return "after the last stage" if self.all_stages_finished else self._stages[len(self._finished)]

    @property
    def all_stages_finished(self) -> bool:
        return len(self._finished) == len(self._stages)

    def restore(
        self, writer: FolderWriter | None, checkpoint: Checkpoint, samples: range, offload: Callable[..., None]
    ) -> CachedOutputs:
        """Restores the state of the interrupted run on all processes; the result is empty in a new run.

        writer: of the process that `writes`; samples: numbers of the samples of this process; offload: called with the
        outputs restored for each of them.
        Raises UserError if files of the interrupted run are damaged, or weights of the checkpoint have changed.
        """
        self._folder_writer, self._checkpoint = writer, checkpoint
        if self._process_group.is_rank0:
            checkpoint.digests = {}
        if writer is not None:
            writer.on_stage_written = self._record_deferred
        names, specs, outputs_of = self._process_group.broadcast_from_rank0(self._restore_rank0)
        self._finished = list(names)
        values: dict[int, dict[str, Any]] = {}
        for sample, numbers in sorted(outputs_of.items()):
            for number in numbers:
                read = partial(read_output, self._outputs_path(number), specs[names[number]][sample], self._device)
                value = self._process_group.broadcast_from_rank0(read)
                if sample in samples or sample < 0:  # a probe
                    values.setdefault(sample, {})[names[number]] = value
                    offload(value)
        self.restored = True
        return CachedOutputs(names, specs, values, self._device)

    def _restore_rank0(self) -> tuple[list[str], dict[str, dict[int, Any]], dict[int, list[int]]]:
        """(finished stages, stage -> sample -> spec of its outputs, sample -> numbers of the stages whose outputs are
        kept)."""
        assert self._run is not None and self._checkpoint is not None
        if not self._records:
            return [], {}, {}
        try:
            if self._folder_writer is not None:
                written = {record["number"] for record in self._run.emitted if record["kind"] == "taken"}
                self._folder_writer.restore(self.commits, written)
            outputs_of = {
                int(sample): numbers for sample, numbers in self._outputs_of.items() if not self.all_stages_finished
            }
            for number in {number for numbers in outputs_of.values() for number in numbers}:
                path = self._outputs_path(number)
                if not path.is_file() or sha256_of(path) != self._records[number]["outputs"]:
                    raise Damaged(f"checksum mismatch in {OUTPUTS}/{path.name}")
        except Damaged as error:
            fix = "start again with --start_over"
            raise UserError(
                Fault("files of the interrupted run are damaged", str(self.folder), str(error), fix)
            ) from error
        self._checkpoint.check_unchanged([record["read"] for record in self._records], self._run.file_times)
        specs = {
            str(record["name"]): {int(sample): spec for sample, spec in record["samples"].items()}
            for record in self._records
        }
        self._note(f"resuming an interrupted run: {self.saved_stages} of {len(self._stages)} stages are finished")
        return self._finished, specs, outputs_of

    def record_stage(self, stage: Stage, summary_state: Callable[[], Any]) -> None:
        """Records an emitted stage; the record is written in the background, once the emitted tensors are on disk.

        summary_state: called on the process that writes, returns JSON; `summary_states` has it after a restart.
        Raises OSError if the disk is full.
        """
        if self._disabled and self._process_group.size == 1:
            return
        number = len(self._finished)
        self._finished.append(stage.name)
        path = self._outputs_path(number)
        try:
            samples = {} if self.all_stages_finished else self._write_outputs(path, stage)
        except NotSerializable as error:
            self._disable(stage, error)
            return
        if self._folder_writer is None or self._disabled:
            return
        assert self._checkpoint is not None
        self._keep_outputs(number, samples)
        in_use = {kept for numbers in self._outputs_of.values() for kept in numbers}
        # Listed now: the background thread must not see files that the main thread writes meanwhile.
        stale = [self._outputs_path(earlier) for earlier in range(number) if earlier not in in_use]
        record: Record = {"kind": "stage", "name": stage.name, "samples": samples, "summary": summary_state()}
        record["read"], self._checkpoint.digests = self._checkpoint.digests, {}

        def write(emitted: dict[str, Any]) -> None:
            if samples:
                sync(path)
                sync(path.parent)
                record["outputs"] = sha256_of(path)
            self._append(record | {"emitter": emitted})
            self.saved_stages += 1
            for unused in stale:
                unused.unlink(missing_ok=True)

        self._folder_writer.commit(write)

    def _write_outputs(self, path: Path, stage: Stage) -> dict[str, Any]:
        """Writes the outputs of a stage for the samples of all processes; returns sample -> spec.

        One sample is sent to rank 0 at a time. Raises NotSerializable.
        """
        specs: dict[str, Any] = {}
        failure: NotSerializable | None = None
        with contextlib.ExitStack() as stack:
            writer = OutputsWriter(path) if self.writes and not self._disabled else None
            if writer is not None:
                stack.callback(writer.close)
            for rank in range(self._process_group.size):
                is_owner = rank == self._process_group.rank
                for number in range(
                    self._process_group.broadcast(rank, len(stage.execution.calls) if is_owner else None)
                ):
                    output = (
                        (stage.execution.calls[number].sample, stage.execution.outputs[number]) if is_owner else None
                    )
                    sample, value = self._process_group.broadcast(rank, output)
                    try:
                        if writer is not None and failure is None:
                            specs[str(sample)] = writer.add(value)
                    except NotSerializable as error:  # raised below: the other processes still send their outputs
                        failure = error
            probe = stage.execution.probe if stage.execution.probe_is_separate else None
            if writer is not None and failure is None and probe is not None:
                specs[str(probe.sample)] = writer.add(stage.execution.probe_outputs[0])
        if failure is not None:
            raise failure
        return specs

    def _disable(self, stage: Stage, error: NotSerializable) -> None:
        self._disabled = True
        self._append({"kind": "disabled"})
        self._note(f"this run cannot be resumed if interrupted: outputs of type {error} of {stage.name} are not saved")

    def _record_deferred(self, number: int, discard: Callable[[], None]) -> None:
        """Records that all tensors of a deferred stage are emitted, then calls `discard`."""

        def write(emitted: dict[str, Any]) -> None:
            self._append({"kind": "taken", "number": number, "emitter": emitted})
            discard()

        if self._folder_writer is not None:
            self._folder_writer.commit(write, stage=False)

    def publish(self, overwrite: bool) -> None:
        """Writes the manifest of the verified result and renames the result to save_directory. Raises OSError."""
        if self._run is None or not self.writes:
            return
        write_manifest(self.result)
        self._append({"kind": "complete", "manifest": sha256_of(self.result / MANIFEST)})
        self._run.folder.publish(overwrite)

    def close(self) -> None:
        """Waits for background writes. May be called more than once."""
        if self._folder_writer is not None:
            self._folder_writer.stop()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._disabled:
            self.saved_stages = 0

    def _append(self, record: Record) -> None:
        if self._writer is not None:
            self._writer.append(record)

    def _outputs_path(self, stage: int) -> Path:
        return self.folder / OUTPUTS / f"{stage}"
