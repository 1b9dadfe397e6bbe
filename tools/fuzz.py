"""Tests vlqc with random damaged input and prints failing cases.

    python tools/fuzz.py --seconds 600                  all targets in turn, with a new seed in each round
    python tools/fuzz.py --target config --seed 7       one target, the same cases again

Each case must be accepted, or refused with UserError, within limits of time and memory. Requires the packages of the
tests (`pip install -e '.[test]'`). The current round ends before the program does.
"""

import argparse
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS_PER_CASE = 20.0  # long enough for a machine under load
BYTES_PER_CASE = 2**30  # of additional address space
BATCH = 500  # cases of one target per round
NO_MEMORY = ("memory", "alloc", "Errno 12")  # in the messages of PyTorch, NumPy, Pillow and the system


class CaseTimeout(BaseException):
    """A case that takes too long. Not an Exception, so that the tested code cannot catch it."""


class CaseOutOfMemory(AssertionError):
    """A case that was refused only because memory ran out."""


@contextmanager
def bounded(seconds: float = SECONDS_PER_CASE, extra_bytes: int = BYTES_PER_CASE) -> Iterator[None]:
    """Limits time and memory of the block. Linux only."""

    def on_alarm(*_: object) -> None:
        raise CaseTimeout(f"more than {seconds:g} seconds")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + extra_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run_case(check: Any, case: Any, folder: Path) -> bool:
    """Runs one case within limits and returns whether it was accepted. Raises if it fails."""
    from vlqc.errors import UserError

    try:
        with bounded():
            return bool(check(case, folder))
    except UserError as error:
        text = str(error)
        text.encode()  # raises if it cannot be printed
        if not text.strip() or any(ord(letter) < 32 and letter not in "\n\t" for letter in text):
            raise AssertionError(f"the message cannot be printed: {text!r}") from error
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError) or (
                isinstance(cause, RuntimeError | OSError) and any(word in str(cause) for word in NO_MEMORY)
            ):
                raise CaseOutOfMemory(f"{type(cause).__name__}: {cause}") from error
            cause = cause.__cause__ or cause.__context__
        return False


def run(name: str, examples: int, seed: int | None, folder: Path) -> Counter[bool]:
    """Runs cases of one target; returns how many were accepted (True) and refused (False). seed None: fixed cases."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as with_seed

    from tests.support.fuzz.targets import TARGETS
    from tests.support.same_examples import ignore_constants_of_modules

    ignore_constants_of_modules()
    target = TARGETS[name]
    counts: Counter[bool] = Counter()

    @settings(
        max_examples=examples,
        derandomize=seed is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.cases)
    def attempt(case: Any) -> None:
        counts[run_case(target.check, case, folder)] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow and PyTorch warn about damaged files
        (attempt if seed is None else with_seed(seed)(attempt))()
    return counts


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tests.support.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="minimum run time")
    parser.add_argument("--seed", type=int, help="seed of the first round; default: random")
    parser.add_argument("--cases", type=int, default=BATCH, help="cases of one target per round")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else time.time_ns() % 2**32
    deadline, total, failures = time.monotonic() + arguments.seconds, 0, 0
    while time.monotonic() < deadline:
        for name in arguments.target or TARGETS:
            started = time.monotonic()
            if started > deadline:
                break
            with tempfile.TemporaryDirectory() as folder:
                try:
                    counts = run(name, arguments.cases, seed, Path(folder))
                except (Exception, CaseTimeout):
                    failures += 1
                    traceback.print_exc()
                    print(
                        f"repeat with: python tools/fuzz.py --target '{name}' --seed {seed} --cases {arguments.cases}"
                    )
                    continue
            total += counts.total()
            seconds = time.monotonic() - started
            print(f"{name}, seed {seed}: {counts[True]} accepted, {counts[False]} refused, {seconds:.1f} s", flush=True)
        seed += 1
    print(f"{total} cases, {failures} failures")
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
