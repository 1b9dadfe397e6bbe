"""What happens during a compilation, gathered for its result."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from vlqc.emit.stage_tensors import emitted_dtype
from vlqc.errors import Fault, UserError
from vlqc.file_digest import file_digest
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.distributed import current_process_group
from vlqc.frontend.process_memory import peak_memory
from vlqc.ir.stage import Stage
from vlqc.options.options import Options
from vlqc.pipeline.precision_search import Plan
from vlqc.pipeline.registry import Pass, pipeline_text, print_pipeline
from vlqc.reporting.html.collector import StageMetrics
from vlqc.reporting.html.command_line import command, without_places
from vlqc.reporting.html.schema import Facts, rounded
from vlqc.reporting.html.timings import Timings, installed, machine
from vlqc.reporting.summary import Result
from vlqc.targets.advice import cannot_load, engine_notes, serve_commands
from vlqc.targets.engines import Scheme, part_of
from vlqc.targets.versions import loads
from vlqc.verify import verify_unfinished
from vlqc.verify.folder.contents import MANIFEST
from vlqc.verify.loader import read_description


def target_warnings(options: Options, dtype: torch.dtype) -> list[str]:
    """What the user should know before anything is compiled: which engines refuse the result, and what they expect.

    dtype: of the float checkpoint.
    """
    name = str(dtype).removeprefix("torch.")
    asked = (options.engine_target, options.scheme, name)
    refusals = cannot_load(*asked, scope=options.w4a8_scope)
    why, fix = "the folder is written all the same", "see --target, --strict_target"
    notes = [str(Fault(sentence, why=why, fix=fix)) for sentence in refusals]
    told = engine_notes(*asked, group_size=options.group_size, scope=options.w4a8_scope)
    notes += [sentence for sentence in told if sentence not in refusals]
    if dtype != emitted_dtype(dtype):
        notes.append(f"the checkpoint is {name}; engines run bfloat16, so its float tensors are emitted as bfloat16")
    return notes


class CompilationSummary:
    """Counts sites, gathers notes (each shown once, at once) and makes the result."""

    def __init__(self, options: Options, checkpoint: Checkpoint, show_note: Callable[[str], None]) -> None:
        self.options, self.checkpoint, self._show_note = options, checkpoint, show_note
        self.counts: dict[tuple[str, str], int] = {}
        self.notes: list[str] = []
        self._of_run: set[str] = set()
        self.plan: Plan | None = None
        self.gathering = StageMetrics(active=current_process_group().first)
        self._started = time.perf_counter()
        self.note(target_warnings(options, checkpoint.dtype))

    def note(self, notes: Iterable[str], *, of_run: bool = False) -> None:
        """of_run: they say something of this run alone, so the report in the folder has to go without them."""
        for text in notes:
            if text not in self.notes:
                self.notes.append(text)
                self._show_note(text)
            if of_run:
                self._of_run.add(text)

    def count(self, stage: Stage) -> None:
        """A finished stage: its sites by scheme, its notes, and a warning where quantization spoils it."""
        for site in stage.sites.values():
            self._count(stage.part, site.scheme or Scheme.FLOAT)
        self.note(stage.notes)
        self.gathering.finished(stage)
        if self.options.fallback != "auto":  # which has the schemes yet to choose
            self.note(self.gathering.low_sqnr_warning())

    def state(self) -> dict[str, Any]:
        """What was counted and noted so far, and the facts of the last stage, in JSON."""
        notes = [note for note in self.notes if note not in self._of_run]
        counts = [[*key, count] for key, count in self.counts.items()]
        return {"counts": counts, "notes": notes, "stage": self.gathering.last()}

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """Goes on from another tally's `state` after each of its stages."""
        self.counts = {(part, scheme): count for part, scheme, count in states[-1]["counts"]}
        self.note(states[-1]["notes"])
        self.gathering.restore([state["stage"] for state in states])

    def settle(self, plan: Plan | None) -> None:
        """What the precision search chose, where there was one: its schemes are counted, its notes told.

        UserError if every site stayed float: the source would only be copied.
        """
        if plan is not None:
            self._settle(plan)
        self._require_quantized()

    def _settle(self, plan: Plan) -> None:
        self.plan = plan
        self.gathering.settled(plan)
        for group, scheme in zip(plan.groups, plan.schemes, strict=True):
            part, sites = part_of(group.name), len(group.sites)
            for of, change in ((group.assigned, -sites), (scheme, sites)):
                self.counts[part, str(of)] = self.counts.get((part, str(of)), 0) + change
        self.counts = {key: count for key, count in self.counts.items() if count}
        self.note(plan.notes())

    def _require_quantized(self) -> None:
        if all(scheme == Scheme.FLOAT for _, scheme in self.counts):
            why = "no pass gave any layer a scheme, or every layer was excluded"
            fix = "look at --pipeline and --exclude"
            if self.plan is not None:
                why = f"the search left every group in float, for a predicted SQNR of {self.plan.sqnr:.1f} dB"
                fix = "ask for a lower --min_sqnr or fewer float groups"
            raise UserError(Fault("nothing was quantized", why=why, fix=fix))

    def note_unknown(self, names: list[str]) -> None:
        """Tensors of the checkpoint that the model does not know."""
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self.note([f"not part of the model and left out: {', '.join(names[:3])}{more}"])

    def require_loaded(self, folder: Path) -> None:
        """With --strict_target, UserError unless the target's engines load the finished folder."""
        if not self.options.strict_target:
            return
        report = verify_unfinished(folder, self.options.engine_target)
        if not report.ok:
            why = "; ".join(dict.fromkeys(finding.what for finding in report.faults))
            fix = "name another --target, change the scheme, or leave --strict_target out"
            raise UserError(
                Fault(f"{self.options.engine_target} does not load the result", "--strict_target", why, fix)
            )

    def write_facts(self, folder: Path, passes: Sequence[Pass], *, ready_samples: bool) -> None:
        """What the report shows, into the folder; see `report.facts`."""
        text, options = print_pipeline(passes), self.options
        Facts(
            version=installed("vlqc"),
            command=command(options, None if text == pipeline_text(options) else text, ready_samples=ready_samples),
            ready_samples=ready_samples,
            pipeline=text,
            target=options.engine_target,
            dtype="float16" if emitted_dtype(self.checkpoint.dtype) == torch.float16 else "bfloat16",
            bytes_before=self.checkpoint.bytes,
            heads=("lm_head",) if "lm_head.weight" in self.checkpoint else (),
            notes=without_places([note for note in self.notes if note not in self._of_run], options),
            predicted=rounded(self.plan.sqnr) if self.plan else None,
            stages=tuple(self.gathering.stages),
        ).write(folder)

    def _count(self, part: str, scheme: Scheme) -> None:
        self.counts[part, str(scheme)] = self.counts.get((part, str(scheme)), 0) + 1

    def result(self, passes: dict[str, float]) -> Result:
        """Once the folder stands at its place."""
        folder = self.options.save_directory
        if "lm_head.weight" in self.checkpoint:
            self._count(part_of("lm_head"), Scheme.FLOAT)
        description = read_description(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        dtype = str(emitted_dtype(self.checkpoint.dtype)).removeprefix("torch.")
        if self.options.timings is not None:
            self._timings(passes).write(self.options.timings)
        return Result(
            folder=folder,
            counts=self.counts,
            bytes_before=self.checkpoint.bytes,
            bytes_after=weight_bytes(folder),
            seconds=time.perf_counter() - self._started,
            peak_memory_bytes=peak_memory(),
            notes=self.notes,
            engines=loads(description, dtype, config),
            serve=serve_commands(self.options.engine_target, folder.resolve()),
            passes=passes,
            precision=self.plan.table() if self.plan else [],
            predicted_sqnr=self.plan.sqnr if self.plan else None,
        )

    def _timings(self, passes: dict[str, float]) -> Timings:
        system, processors, versions = machine()
        return Timings(
            manifest=file_digest(self.options.save_directory / MANIFEST),
            kept=self.gathering.kept,
            seconds=time.perf_counter() - self._started,
            peak_bytes=peak_memory(),
            passes=self.gathering.pass_times(passes),
            stages=tuple(self.gathering.stage_times),
            system=system,
            processors=processors,
            versions=versions,
        )


def weight_bytes(folder: Path) -> int:
    """Of all weight files of a checkpoint."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
