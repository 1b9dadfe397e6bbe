"""Kills compilations at listed moments, resumes them, and prints the outcome: `resume_runs.py CHECKPOINT FOLDER`.

A separate single-threaded process, which imports everything once and forks a child for every run. Prints one JSON
object: per moment how the first run ended, which stages were finished, which stages the second run ran, and the digests
of its files.
"""

import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import tiny

SAMPLES = [tiny.synthetic_sample((4, 4), seed=1), tiny.synthetic_sample(words=3, seed=2)]
QUICK: dict[str, Any] = {"weight_method": "round", "anti_method": "none", "act_method": 1}
CASES: dict[str, dict[str, Any]] = {
    "plain": QUICK,
    "overwrite": QUICK | {"overwrite": True},  # an older result exists
    "shards": QUICK | {"part_file_size": 1, "propagate": "quantized", "memory_budget": 0.0, "kv_cache": "int8"},
    "search": QUICK | {"fallback": "auto", "max_bytes": "3.5MB", "target": "vllm-ascend"},
    "mindie": QUICK | {"mindie_format": True, "anti_method": "m4"},
}
GIB = 300_000  # part_file_size 1, in bytes
APPEND = "vlqc.emit.resume.journal_file:JournalWriter.append"
# (case, name of the moment, function, number of the call, when: before or after the call, or half-way through a write)
MOMENTS = [
    ("plain", "calibrating", "vlqc.compiler:calibration_data", 1, "before"),
    ("plain", "calibrated", "vlqc.emit.resume.journal:run_fingerprint", 1, "after"),
    ("plain", "first line of the journal", APPEND, 1, "half"),
    ("plain", "tensors outside stages", "vlqc.emit.shard_writer:ShardWriter._write", 2, "half"),
    ("plain", "tracing the first stage", "vlqc.frontend.stage_builder:trace", 1, "before"),
    ("plain", "tracing the merger", "vlqc.frontend.stage_builder:trace", 3, "after"),
    ("plain", "passes over the last stage", "vlqc.pipeline.manager:PassManager.run", 5, "before"),
    ("plain", "a tensor of the second stage", "vlqc.emit.shard_writer:ShardWriter._write", 40, "half"),
    ("plain", "outputs of the first stage", "vlqc.emit.resume.stage_outputs:OutputsWriter._write", 1, "half"),
    ("plain", "outputs of the fourth stage", "vlqc.emit.resume.stage_outputs:OutputsWriter._write", 5, "half"),
    ("plain", "sync of weights", "vlqc.emit.shard_writer:ShardWriter.sync", 3, "before"),
    ("plain", "sync of outputs", "vlqc.emit.resume.journal:sync", 5, "before"),
    ("plain", "line of the third stage", APPEND, 4, "half"),
    ("plain", "line of the fourth stage", APPEND, 5, "after"),
    ("plain", "line of the last stage", APPEND, 6, "after"),
    ("plain", "rest of the source", "vlqc.emit.folder_writer:FolderWriter.copy_rest", 1, "after"),
    ("plain", "header of the weight file", "vlqc.emit.shard_writer:ShardWriter._finish", 1, "before"),
    ("plain", "description", "vlqc.emit.folder_writer:_write_json", 1, "before"),
    ("plain", "config", "vlqc.emit.folder_writer:_write_json", 2, "after"),
    ("plain", "copies of the source's files", "vlqc.frontend.checkpoint.side_files:shutil.copyfile", 3, "before"),
    ("plain", "verification", "vlqc.run:require_valid", 1, "before"),
    ("plain", "manifest", "vlqc.emit.resume.journal:write_manifest", 1, "before"),
    ("plain", "last line of the journal", APPEND, 7, "half"),
    ("plain", "just before the rename", "vlqc.emit.atomic_folder:WorkFolder.publish", 1, "before"),
    ("plain", "just after the rename", "vlqc.emit.atomic_folder:WorkFolder.publish", 1, "after"),
    ("plain", "clearing up", "vlqc.emit.atomic_folder:WorkFolder.remove", 1, "before"),
    ("overwrite", "just before the exchange", "vlqc.emit.atomic_folder:exchange", 1, "before"),
    ("overwrite", "just after the exchange", "vlqc.emit.atomic_folder:exchange", 1, "after"),
    ("shards", "a full weight file", "vlqc.emit.shard_writer:ShardWriter._finish", 2, "after"),
    ("shards", "names of the weight files", "vlqc.emit.shard_writer:Path.rename", 2, "before"),
    ("shards", "index", "vlqc.emit.shard_writer:ShardWriter.close", 1, "after"),
    ("search", "a deferred stage", "vlqc.emit.deferred_stages:DeferredStages.store", 3, "after"),
    ("search", "line of a stage that waits", APPEND, 4, "after"),
    ("search", "the decision", "vlqc.emit.folder_writer:search_schemes", 1, "after"),
    ("search", "line of a stage that waited", APPEND, 9, "half"),
    ("search", "end of a deferred stage", "vlqc.emit.deferred_stages:DeferredStages.discard", 2, "before"),
    ("search", "weights of deferred stages", "vlqc.emit.shard_writer:ShardWriter._write", 150, "half"),
    ("mindie", "a tensor of a late stage", "vlqc.emit.shard_writer:ShardWriter._write", 90, "half"),
    ("mindie", "line of the second stage", APPEND, 3, "after"),
]  # fmt: skip


@dataclass
class Killer:
    """Replaces a function; kills this process at the `call`th call."""

    real: Callable[..., Any]
    call: int
    when: str
    calls: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls != self.call:
            return self.real(*args, **kwargs)
        if self.when == "after":
            self.real(*args, **kwargs)
        elif self.when == "half":
            self._half(args)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("not killed")

    def _half(self, args: tuple[Any, ...]) -> None:
        """Makes the call, then truncates half of what it wrote."""
        file = args[0]._file
        file.flush()
        before = file.tell()
        self.real(*args)
        file.flush()
        file.truncate(before + (file.tell() - before) // 2)


def kill_at(place: str, call: int, when: str) -> None:
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for each in outer:
        owner = getattr(owner, each)
    killer = Killer(getattr(owner, name), call, when)
    if isinstance(owner, type):  # a function, so that it is bound as a method
        setattr(owner, name, lambda *args, **kwargs: killer(*args, **kwargs))
    else:
        setattr(owner, name, killer)


def child(work: Callable[[], None]) -> int:
    """Runs `work` in a child process; returns its exit code, or the negative number of the signal that ended it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def compile_case(case: str, checkpoint: Path, target: Path, traced: Path, **more: Any) -> None:
    """Compiles a case, and writes the names of the stages that run into `traced`."""
    import vlqc
    import vlqc.emit.folder_writer
    import vlqc.frontend.stage_builder

    vlqc.emit.folder_writer.GIB = GIB
    trace = vlqc.frontend.stage_builder.trace

    def noted(module: Any, call: Any, name: str) -> Any:
        with traced.open("a") as file:
            file.write(f"{name}\n")
        return trace(module, call, name)

    vlqc.frontend.stage_builder.trace = noted  # type: ignore[assignment]
    vlqc.compile(model_path=checkpoint, save_directory=target, samples=SAMPLES, **(CASES[case] | more))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def finished_stages(target: Path) -> list[str]:
    """Names of the finished stages in the journal."""
    from vlqc.emit.resume.journal_file import read_lines

    journals = [path for path in target.parent.glob(".*.partial-*/journal.jsonl")]
    return [record["name"] for path in journals for record in read_lines(path)[0] if record["kind"] == "stage"]


def old_result(target: Path) -> None:
    target.mkdir()
    (target / "old").write_text("old")


def try_moment(moment: tuple[str, str, str, int, str], checkpoint: Path, folder: Path) -> dict[str, Any]:
    case, _, place, call, when = moment
    target, traced = folder / "out", folder / "traced"
    folder.mkdir()
    if case == "overwrite":
        old_result(target)
    before = digests(target) if target.exists() else None

    def first() -> None:
        kill_at(place, call, when)
        compile_case(case, checkpoint, target, folder / "first")

    ended = child(first)
    there = digests(target) if target.exists() else None
    kept = finished_stages(target)
    resumed = child(lambda: compile_case(case, checkpoint, target, traced, resume=True))
    result = {
        "ended": ended,
        "unchanged": there == before,
        "there": there,
        "kept": kept,
        "resumed": resumed,
        "ran": traced.read_text().split() if traced.exists() else [],
        "bytes": digests(target) if target.exists() else {},
        "left": sorted(path.name for path in folder.iterdir() if path.name.startswith(".")),
    }
    shutil.rmtree(folder)
    return result


def main(checkpoint: Path, folder: Path) -> None:
    import torch
    import transformers  # noqa: F401 - imported once, for all children

    import vlqc.compiler

    torch.set_num_threads(1)
    vlqc.compiler.compile(  # imports and caches what every child needs
        model_path=checkpoint, save_directory=folder / "warm", samples=SAMPLES, **QUICK
    )
    whole: dict[str, Any] = {}
    for case in CASES:
        target = folder / case
        if case == "overwrite":
            old_result(target)
        code = child(lambda case=case, target=target: compile_case(case, checkpoint, target, folder / "stages"))
        whole[case] = {"code": code, "bytes": digests(target), "stages": (folder / "stages").read_text().split()}
        (folder / "stages").unlink()
    moments = {f"{it[0]}: {it[1]}": try_moment(it, checkpoint, folder / "moment") for it in MOMENTS}
    print(json.dumps({"whole": whole, "moments": moments}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
