"""The journal of a run: what of it is finished, on the disk, so that the same command can go on after an interruption.

It lies in the work folder, beside what becomes the result. Per finished stage a line says what was emitted and what is
known for the end; beside it lie, per sample, the outputs of the last finished stage it passed through. A run that goes
on starts the model's own code again and answers from there for the finished stages.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from vlqc.emit import FolderEmitter
from vlqc.emit.atomic_folder import DISK_FAULTS, JOURNAL, OUTPUTS, nearest_folder, restore_replaced, unwritable
from vlqc.emit.manifest import MANIFEST, write_manifest
from vlqc.emit.resume.fingerprint import run_fingerprint, sources_of
from vlqc.emit.resume.journal_file import JournalWriter, Record
from vlqc.emit.resume.open_run import Work, open_or_resume
from vlqc.emit.resume.stage_outputs import CannotBeKept, OutputsWriter, read_value
from vlqc.emit.shard_writer import Damaged, sync
from vlqc.emit.size_estimate import needed_room
from vlqc.errors import Fault, UserError, VlqcError
from vlqc.file_digest import file_digest
from vlqc.frontend.calibration.probe import PROBE
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.distributed import ProcessGroup
from vlqc.frontend.memory import GIB, needed_memory, ran_out, require_memory
from vlqc.frontend.sequential import Answers
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.stage import Stage
from vlqc.options.options import Options
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.registry import print_pipeline
from vlqc.reporting.summary import CompilationSummary


@contextmanager
def journaled(
    options: Options,
    pipeline: Sequence[Pass],
    model: StreamedModel,
    samples: Sequence[Mapping[str, Tensor]],
    summary: CompilationSummary,
    process_group: ProcessGroup,
) -> Iterator["Journal"]:
    """Inside, a run that keeps a journal: a new one, or with --resume one that was interrupted and had the same input.

    samples: all of them, on the first process. At the end the result appears at its place. After an error the work
    folder stays if a stage is finished; otherwise nothing does. UserError if the run cannot go on, or lacks room.
    """
    room = needed_memory(model, samples, options.memory_budget)
    require_memory(room, model.checkpoint.files, lambda told: summary.add_notes(told, of_run=True))
    if not process_group.first:
        yield Journal(model, process_group, None, summary)
        return
    restore_replaced(options.save_directory)
    facts = run_fingerprint(options, print_pipeline(pipeline), model, samples) | sources_of(map(type, pipeline))
    needed = needed_room(model, options, pipeline, samples)
    work = open_or_resume(options, facts, needed, lambda told: summary.add_notes([told], of_run=True))
    journal = Journal(model, process_group, work, summary)
    keep = True
    try:
        yield journal
        journal.publish(options.overwrite)
        keep = False
    except BaseException as error:
        told = error
        if isinstance(error, OSError) and (error.errno in DISK_FAULTS or journal.complete):
            told = unwritable(options.save_directory, error)
        elif ran_out(error):
            why = f"it was estimated to need {room / GIB:.1f} GiB beyond what programs take; {error}"
            fix = "give it more, bound what samples hold with --memory_budget, or calibrate on smaller pictures"
            told = UserError(Fault("memory ran out", journal.at, why, fix))
        journal.stop()
        # An error of vlqc's own choice behind the last stage is a verdict: going on would lead to it again.
        keep = journal.kept > 0 and not (journal.complete and isinstance(error, VlqcError))
        if keep and journal.restored:
            told.add_note(
                f"{journal.kept} of {len(journal.stages)} stages are finished and kept in {work.folder.folder}: "
                "the same command with --resume goes on from there"
            )
        if told is error:
            raise
        raise told from error
    finally:
        journal.stop()
        if not keep:
            work.folder.remove()
        work.folder.close()


class Journal:
    """Of a process that writes, with a work folder; the others take part in what all have to do.

    folder: where there is room to work; result: the folder to write into; stages: names of all; kept: how many of them
    are finished and on the disk; complete: whether all are finished; writes: whether there is anything left to write.
    """

    def __init__(
        self, model: StreamedModel, process_group: ProcessGroup, work: Work | None, summary: CompilationSummary
    ) -> None:
        self.stages, self._device, self.process_group, self._work, self._summary = (
            list(model.stages),
            model.device,
            process_group,
            work,
            summary,
        )
        self.folder = work.folder.folder if work else nearest_folder(summary.options.save_directory)
        self.result = work.result if work else self.folder
        self.writes = work is not None and not work.published
        self._records: list[Record] = work.stages if work else []
        self._names = [str(record["name"]) for record in self._records]
        self.kept = len(self._names)
        self._latest = {sample: number for number, it in enumerate(self._records) for sample in it["samples"]}
        self._gave_up = False
        self.restored = False  # whether what was left can be gone on with, as far as anybody looked
        self._emitter: FolderEmitter | None = None
        self._checkpoint: Checkpoint | None = None
        self._lines: JournalWriter | None = None
        if work is not None and self.writes:
            (self.folder / OUTPUTS).mkdir(exist_ok=True)
            self._lines = JournalWriter(self.folder / JOURNAL)

    @property
    def at(self) -> str:
        """The stage that is being worked on, for messages."""
        return "behind the last stage" if self.complete else self.stages[len(self._names)]

    @property
    def complete(self) -> bool:
        return len(self._names) == len(self.stages)

    def restore(
        self, emitter: FolderEmitter, checkpoint: Checkpoint, samples: range, settle: Callable[..., None]
    ) -> Answers:
        """Brings everybody to where the interrupted run was; nothing to do in a new one. UserError for damage.

        samples: numbers of those of this process; settle: is shown what was read for each of them.
        """
        self._emitter, self._checkpoint = emitter, checkpoint
        if self.process_group.first:
            checkpoint.digests = {}
            emitter.taken = self._taken
        names, descriptions, latest = self.process_group.broadcast_from_rank0(self._restored)
        self._names = list(names)
        values = {}
        for sample, number in sorted(latest.items()):
            read = partial(read_value, self._outputs(number), descriptions[names[number]][sample], self._device)
            value = self.process_group.broadcast_from_rank0(read)
            if sample in samples or sample == PROBE:
                values[sample] = names[number], value
                settle(value)
        self.restored = True
        return Answers(names, descriptions, values, self._device)

    def _restored(self) -> tuple[list[str], dict[str, dict[int, Any]], dict[int, int]]:
        """(finished stages, per stage and sample what it returned, per sample whose outputs are on the disk)."""
        assert self._work is not None and self._emitter is not None and self._checkpoint is not None
        if not self._records:
            return [], {}, {}
        try:
            marks = [record["emitter"] for record in self._work.emitted]
            self._emitter.restore(marks, {it["number"] for it in self._work.emitted if it["kind"] == "taken"})
            latest = {} if self.complete else {int(sample): number for sample, number in self._latest.items()}
            for number in set(latest.values()):
                path = self._outputs(number)
                if not path.is_file() or file_digest(path) != self._records[number]["outputs"]:
                    raise Damaged(f"{OUTPUTS}/{path.name} is not what was written")
        except Damaged as error:
            fix = "start anew with --start_over"
            raise UserError(
                Fault("what the interrupted run has left is damaged", str(self.folder), str(error), fix)
            ) from error
        self._checkpoint.require_same([it["read"] for it in self._records], self._work.file_times)
        self._summary.restore([record["tally"] for record in self._records])
        described = {
            str(record["name"]): {int(sample): it for sample, it in record["samples"].items()}
            for record in self._records
        }
        self._summary.add_notes(
            [f"went on after {self.kept} of {len(self.stages)} stages, which an interrupted run had finished"],
            of_run=True,
        )
        return self._names, described, latest

    def finished(self, stage: Stage) -> None:
        """A stage was emitted: it counts, and soon it is on the disk, too. OSError if that is full."""
        self._summary.add_stage(stage)
        if self._gave_up and self.process_group.size == 1:
            return
        number = len(self._names)
        self._names.append(stage.name)
        path = self._outputs(number)
        try:
            samples = {} if self.complete else self._write(path, stage)
        except CannotBeKept as error:
            self._give_up(stage, error)
            return
        if self._emitter is None or not self.writes or self._gave_up:
            return
        assert self._checkpoint is not None
        self._latest |= dict.fromkeys(samples, number)
        needed = set(self._latest.values())  # what the main thread writes meanwhile is not looked at
        stale = [self._outputs(each) for each in range(number) if each not in needed]
        record: Record = {"kind": "stage", "name": stage.name, "samples": samples, "tally": self._summary.state()}
        record["read"], self._checkpoint.digests = self._checkpoint.digests, {}

        def keep(emitted: dict[str, Any]) -> None:
            if samples:
                sync(path)
                sync(path.parent)
                record["outputs"] = file_digest(path)
            self._append(record | {"emitter": emitted})
            self.kept += 1
            for each in stale:
                each.unlink(missing_ok=True)

        self._emitter.mark(keep)

    def _write(self, path: Path, stage: Stage) -> dict[str, Any]:
        """Writes what the stage returned for all samples of all processes; per sample its description."""
        described: dict[str, Any] = {}
        trouble: CannotBeKept | None = None
        with contextlib.ExitStack() as stack:
            writer = OutputsWriter(path) if self.writes and not self._gave_up else None
            if writer is not None:
                stack.callback(writer.close)
            for owner in range(self.process_group.size):
                mine = owner == self.process_group.rank
                for number in range(self.process_group.broadcast(owner, len(stage.calls) if mine else None)):
                    given = (stage.calls[number].sample, stage.outputs[number]) if mine else None
                    sample, value = self.process_group.broadcast(owner, given)
                    try:
                        if writer is not None and trouble is None:
                            described[str(sample)] = writer.add(value)
                    except CannotBeKept as error:  # the other processes go on sending
                        trouble = error
            if writer is not None and trouble is None and stage.extra is not None:
                described[str(PROBE)] = writer.add(stage.probe_outputs[0])
        if trouble is not None:
            raise trouble
        return described

    def _give_up(self, stage: Stage, error: CannotBeKept) -> None:
        self._gave_up = True
        self._append({"kind": "gave up"})
        told = f"should this run be interrupted, it starts anew: {stage.name} returns a {error}"
        self._summary.add_notes([told], of_run=True)

    def _taken(self, number: int, drop: Callable[[], None]) -> None:
        """Of a stage that waited, everything is emitted."""

        def keep(emitted: dict[str, Any]) -> None:
            self._append({"kind": "taken", "number": number, "emitter": emitted})
            drop()

        if self._emitter is not None:
            self._emitter.mark(keep, stage=False)

    def publish(self, overwrite: bool) -> None:
        """The result is complete and sound: it gets its list of files, and then its place. OSError."""
        if self._work is None or not self.writes:
            return
        write_manifest(self.result)
        self._append({"kind": "complete", "manifest": file_digest(self.result / MANIFEST)})
        self._work.folder.publish(overwrite)

    def stop(self) -> None:
        """Nothing is being written when this returns. May be called twice."""
        if self._emitter is not None:
            self._emitter.stop()
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        if self._gave_up:
            self.kept = 0

    def _append(self, record: Record) -> None:
        if self._lines is not None:
            self._lines.append(record)

    def _outputs(self, number: int) -> Path:
        return self.folder / OUTPUTS / f"{number}"
