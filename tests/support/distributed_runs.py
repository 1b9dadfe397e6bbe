"""Program of each rank in tests of several processes: `torchrun ... distributed_runs.py CHECKPOINT FOLDER [...]`.

Compiles every case through the Python API, and at last images by command line. With the arguments RANK STAGE, only the
command line runs, and that rank is killed when it reaches the stage; with `resume`, the command line resumes.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.support import tiny
from vlqc.errors import UserError
from vlqc.ir.execution import StageRun

IMAGE, TEXT, TWO, LARGE = tiny.mixed_samples()
# The samples of each case, and its options.
CASES: dict[str, tuple[list[dict[str, Tensor]], dict[str, Any]]] = {
    "static": ([IMAGE, TEXT, TWO, LARGE], {}),
    "text first": (
        # No image for the first ranks; one image with two prompts for the last.
        [TEXT, tiny.synthetic_sample(words=4, seed=5), IMAGE, tiny.with_other_text(IMAGE, 9, 12, 31)],
        {"anti_method": "none", "act_method": 1, "weight_method": "round"},
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
        {"fallback": "auto", "max_float_groups": 2, "target": "vllm-ascend", "weight_method": "clip"},
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


if __name__ == "__main__":
    if len(sys.argv) == 5:
        with before(sys.argv[4], kill_rank(sys.argv[3])):
            command_line(Path(sys.argv[1]), Path(sys.argv[2]) / "photos")
    if len(sys.argv) == 4:
        command_line(Path(sys.argv[1]), Path(sys.argv[2]) / "photos", "--resume")
    compile_all(Path(sys.argv[1]), Path(sys.argv[2]))
    command_line(Path(sys.argv[1]), Path(sys.argv[2]) / "photos")
