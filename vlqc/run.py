"""One compilation run: its folder and journal, its share of the samples, progress, callbacks and summary."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from vlqc.emit.folder_writer import FolderWriter, committed_plan
from vlqc.emit.resume.journal import Journal, open_journal
from vlqc.emit.size_estimate import other_bytes, predict_schemes
from vlqc.frontend.activation_offload import ActivationOffload
from vlqc.frontend.calibration.dataset import CalibrationDataset
from vlqc.frontend.calibration.samples import group_by_images
from vlqc.frontend.distributed import current_process_group
from vlqc.frontend.stage_builder import traced_stages
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.ir.memory import release_unused_memory
from vlqc.ir.stage import Stage
from vlqc.options.options import Options
from vlqc.pipeline.manager import PassManager
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.presets import predict_cache
from vlqc.reporting.dumps.writer import Dumper
from vlqc.reporting.progress import Progress, resolve_progress
from vlqc.reporting.summary import CompilationSummary, Result, main_scheme, unused_notes
from vlqc.verify import require_valid


@contextmanager
def open_run(
    options: Options,
    pipeline: Sequence[Pass],
    model: StreamedModel,
    dataset: CalibrationDataset,
    progress: Progress | None,
) -> Iterator["CompilationRun"]:
    """Opens a new run or, with --resume, an interrupted one. On exit the result is renamed to the save folder.

    After an error the save folder is unchanged; finished stages are kept for --resume. UserError if the run cannot be
    resumed, or lacks memory or disk space.
    """
    process_group = current_process_group()
    shown = resolve_progress(progress, is_rank0=process_group.is_rank0)
    scheme = main_scheme(options, predict_schemes(model, pipeline))
    summary = CompilationSummary(options, model.checkpoint, scheme, shown.note, predict_cache(pipeline))
    summary.add_notes(model.checkpoint.notes)
    summary.note_rotations(model.rotation_plan, pipeline)
    summary.add_notes(unused_notes(model.unused_tensors()))
    summary.add_notes(model.checkpoint.side_files(code=options.trust_remote_code).notes())
    summary.add_notes(dataset.notes)
    dumper = Dumper.from_options(options, pipeline, active=process_group.is_rank0)

    def note(text: str) -> None:
        summary.add_notes([text], of_run=True)

    with open_journal(options, pipeline, model, dataset.samples, process_group, note) as journal:
        model.weights_folder = journal.folder
        run = CompilationRun(options, pipeline, model, dataset, journal, summary, dumper, shown)
        try:
            yield run
        finally:
            run.close()


class CompilationRun:
    """The state of one run on this rank. Rank 0 reads the samples, reports and writes."""

    def __init__(
        self,
        options: Options,
        pipeline: Sequence[Pass],
        model: StreamedModel,
        dataset: CalibrationDataset,
        journal: Journal,
        summary: CompilationSummary,
        dumper: Dumper,
        progress: Progress,
    ) -> None:
        self.options, self.pipeline, self.model, self.dataset = options, pipeline, model, dataset
        self._journal, self._summary, self._progress = journal, summary, progress
        self._callbacks = (dumper, summary.metrics)
        self._process_group = current_process_group()
        self._manager = PassManager(pipeline, before=self._before_pass, after=self._after_pass)
        self._writer = (
            FolderWriter(journal.result, model.checkpoint, options, model.tensors) if journal.writes else None
        )
        self._offload = ActivationOffload(journal.folder, options.memory_budget)
        self._stages: Iterator[Stage] = iter(())

    def stages(self) -> Iterator[Stage]:
        """The stages that are not finished, traced, with their weights; one at a time, in order."""
        self._stages = self._run_stages()
        return self._stages

    def _run_stages(self) -> Iterator[Stage]:
        model, checkpoint = self.model, self.model.checkpoint
        first, samples = self._process_group.scatter(group_by_images(self.dataset.samples, self.model.family.inputs))
        probe, vision_probe = self._process_group.broadcast(0, (self.dataset.probe, self.dataset.vision_probe))
        indices = range(first, first + len(samples))
        cached = self._journal.restore(self._writer, checkpoint, indices, self._offload.offload)
        self._summary.restore(self._journal.summary_states)
        self._progress.begin(len(model.stages), len(samples), done=len(cached.stages))
        stages = traced_stages(
            model,
            samples,
            model.emitted_dtype,
            read=self._writer.copy if self._writer else model.tensors.tensor,
            process_group=self._process_group,
            first=first,
            probe=probe,
            vision_probe=vision_probe,
            cached=cached,
        )
        with closing(stages):
            for index, stage in enumerate(stages, len(cached.stages)):
                self._progress.stage(index, stage.name)
                stage.execution.after_sample = self._after_sample
                for callback in self._callbacks:
                    callback.traced(stage)
                yield stage
                self._progress.stage_done(index)

    def apply_passes(self, stage: Stage) -> None:
        """Runs the pipeline over a stage. InternalError if a pass violates its contract."""
        self._manager.run(stage)

    def emit(self, stage: Stage) -> None:
        """Writes the tensors of a finished stage and records it for --resume."""
        if self._writer:
            self._writer.add_stage(stage)
        self._summary.add_stage(stage)
        self._journal.record_stage(stage, self._summary.state)

    def complete(self, *, ready_samples: bool) -> None:
        """After the last stage: writes everything else and verifies the result. InternalError if it is not valid.

        ready_samples: whether the samples were passed as tensors through Python.
        """
        if not self._process_group.is_rank0:
            return
        if self._writer:
            self._summary.apply_search(self._writer.resolve_schemes(other_bytes(self.model)))
            self._writer.copy_rest(self.model.non_stage_parameters())
            self._writer.finish()
        else:  # resumed when the result was already in place
            self._summary.apply_search(
                committed_plan(
                    self._journal.result,
                    self.options,
                    self.model.checkpoint,
                    self._journal.commits,
                    other_bytes(self.model),
                )
            )
        self._summary.note_unreached_experts()
        self._summary.note_float_caches()
        self._summary.note_overflow()
        self._summary.note_parallel_sizes(self._journal.result)
        self._summary.note_target(self._journal.result)
        self._summary.note_caches(self._journal.result)
        self._summary.write_report_data(self._journal.result, self.pipeline, ready_samples=ready_samples)
        require_valid(self._journal.result, trust_remote_code=self.options.trust_remote_code)
        self._summary.require_loadable(self._journal.result)

    def result(self) -> Result:
        """The result, the same on all ranks. To be called when the save folder is in place."""
        self._progress.finish()
        return self._process_group.broadcast_from_rank0(lambda: self._summary.result(self._manager.seconds))

    def close(self) -> None:
        """Ends an unfinished iteration over the stages: suspended forwards, weights and hooks are released."""
        close = getattr(self._stages, "close", None)
        if close is not None:
            close()

    def _before_pass(self, stage: Stage, step: Pass) -> None:
        self._progress.step(step.name)

    def _after_pass(self, stage: Stage, index: int, step: Pass) -> None:
        for callback in self._callbacks:
            callback.after(stage, index, step)

    def _after_sample(self, done: int, *values: Any) -> None:
        self._offload.offload(*values)
        release_unused_memory()
        self._progress.sample(done)
