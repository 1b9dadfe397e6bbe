"""Program of tests of several processes: `distributed_runs.py CHECKPOINT FOLDER [...]`.

Forks one process, then three, which compile every case through the Python API, and at last images by command line,
into FOLDER/1 and FOLDER/3. With `resume`, one process, then two resume the command line in FOLDER/1 and FOLDER/2. With
RANK STAGE, it is what each rank under torchrun runs: the command line; that rank is killed when it reaches the stage.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.support import tiny
from tests.support.forked_ranks import run_forked
from vlqc.errors import UserError
from vlqc.ir.execution import StageRun

IMAGE, TEXT, TWO, LARGE = tiny.mixed_samples()
# The samples of each case, and its options.
CASES: dict[str, tuple[list[dict[str, Tensor]], dict[str, Any]]] = {
    "static": ([IMAGE, TEXT, TWO, LARGE], {}),
    "text first": (
        # No image for the first ranks; one image with two prompts for the last.
        [TEXT, tiny.synthetic_sample(words=4, seed=5), IMAGE, tiny.with_other_text(IMAGE, 9, 12, 31)],
        {"anti_method": "none", "act_method": 1, "weight_method": "round", "kv_cache": "int8"},
    ),
    "refused": ([IMAGE, TEXT, TWO], {}),  # see `refuse`
    "four bits": (
        [TWO, TEXT],  # fewer than three processes
        {
            "w_bit": 4, "is_dynamic": True, "is_lowbit": True, "open_outlier": False, "anti_method": "m4",
            "propagate": "quantized",
        },
    ),
    "searched": (
        [TEXT, IMAGE, TWO],
        {"fallback": "auto", "max_bytes": "2MB", "target": "vllm-ascend", "weight_method": "clip"},
    ),
}  # fmt: skip


def compile_all(checkpoint: Path, folder: Path) -> None:
    """Compiles every case with --dump_ir; writes the error of a case that fails, per rank."""
    import vlqc

    for name, (samples, options) in CASES.items():
        dump = folder / f"{name} ir"
        try:
            with before("visual.merger", refuse if name == "refused" else lambda run: None):
                vlqc.compile(
                    model_path=checkpoint, save_directory=folder / name, samples=samples, dump_ir=dump, **options
                )
        except UserError as error:
            (folder / f"{name} error {os.environ.get('RANK', '')}").write_text(str(error), encoding="utf-8")


def command_line(checkpoint: Path, result: Path, *more: str) -> None:
    """Runs `vlqc compile`, which ends the process."""
    from vlqc.cli.commands import main

    images = str(Path(__file__).parents[1] / "photos")
    paths = ["--model_path", str(checkpoint), "--save_directory", str(result), "--calib_images", images]
    sys.argv = ["vlqc", "compile", *paths, "--max_tokens", "60", "--max_samples", "3", *more]
    main()


@contextmanager
def before(name: str, action: Callable[[StageRun], None]) -> Iterator[None]:
    """Calls `action` each time a stage of this name is about to run its samples."""
    forward = StageRun.forward

    def changed(run: StageRun, *args: Any) -> None:
        if run.name == name:
            action(run)
        forward(run, *args)

    StageRun.forward = changed  # type: ignore[method-assign]
    try:
        yield
    finally:
        StageRun.forward = forward  # type: ignore[method-assign]


def refuse(run: StageRun) -> None:
    """Raises an error on the rank that has sample 2."""
    if any(call.sample == 2 for call in run.calls):
        raise UserError("sample 2 cannot be used")


def kill_rank(rank: str) -> Callable[[StageRun], None]:
    def kill(run: StageRun) -> None:
        if os.environ["RANK"] == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def compile_and_command_line(checkpoint: Path, folder: Path) -> None:
    compile_all(checkpoint, folder)
    command_line(checkpoint, folder / "photos")


def main(checkpoint: Path, folder: Path, *more: str) -> None:
    """Prints the exit codes of the processes as JSON: by their number, a list."""
    import torch

    import vlqc

    if len(more) == 2:
        with before(more[1], kill_rank(more[0])):
            command_line(checkpoint, folder / "photos")
    torch.set_num_threads(1)
    warm = Path(tempfile.mkdtemp(dir=folder))
    vlqc.compile(model_path=checkpoint, save_directory=warm / "out", samples=[IMAGE])  # imports what the children need
    shutil.rmtree(warm)
    codes = {}
    for processes in (1, 2) if more else (1, 3):
        result = folder / str(processes)
        work = partial(command_line, checkpoint, result / "photos", "--resume")
        work = work if more else partial(compile_and_command_line, checkpoint, result)
        result.mkdir(exist_ok=True)
        codes[processes] = run_forked(work, processes, folder / f"output of {processes}")
    print(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
