"""Throws damaged input at vlqc, for as long as one wants, and prints the first case that it does not take well.

    python tools/fuzz.py --seconds 600                  all targets in turn, another seed each time
    python tools/fuzz.py --target config --seed 7       one of them, and the same cases again

A case must be refused in the user's terms or be used; within seconds, in bounded memory. Needs what the tests need
(`pip install -e '.[test]'`). When the time is over, the round of the current target is brought to its end.
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
SECONDS_PER_CASE = 20.0  # a busy machine is slow; what hangs, hangs for ever
BYTES_PER_CASE = 2**30  # of address space beside what the process has already
BATCH = 500  # cases of one target in one go
NO_MEMORY = ("memory", "alloc", "Errno 12")  # in whatever words PyTorch, NumPy, Pillow or the system say it


class Hangs(BaseException):
    """A case that takes too long. No Exception: nothing that is tested may take it for its own."""


class Hungry(AssertionError):
    """A case that was refused only because the memory ended."""


@contextmanager
def bounded(seconds: float = SECONDS_PER_CASE, more_bytes: int = BYTES_PER_CASE) -> Iterator[None]:
    """Inside, code that runs too long or takes too much memory is ended; Linux only."""

    def ring(*_: object) -> None:
        raise Hangs(f"more than {seconds:g} seconds")

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (taken + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tried(check: Any, case: Any, folder: Path) -> bool:
    """Runs one case within bounds: whether it was accepted. Raises what is wrong with how it was taken."""
    from vlqc.errors import UserError

    try:
        with bounded():
            return bool(check(case, folder))
    except UserError as refused:
        text = str(refused)
        text.encode()  # what cannot be encoded cannot be printed
        if not text.strip() or any(ord(letter) < 32 and letter not in "\n\t" for letter in text):
            raise AssertionError(f"the message cannot be shown as it is: {text!r}") from refused
        cause: BaseException | None = refused
        while cause is not None:
            if isinstance(cause, MemoryError) or (
                isinstance(cause, RuntimeError | OSError) and any(word in str(cause) for word in NO_MEMORY)
            ):
                raise Hungry(f"{type(cause).__name__}: {cause}") from refused
            cause = cause.__cause__ or cause.__context__
        return False


def run(name: str, examples: int, seed: int | None, folder: Path) -> Counter[bool]:
    """Tries cases of one target: how many were accepted, and how many refused. seed None: the same ones every time."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded

    from tests.support.fuzz.targets import TARGETS

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
        counts[tried(target.check, case, folder)] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow and PyTorch, about each odd thing that they go on with
        (attempt if seed is None else seeded(seed)(attempt))()
    return counts


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tests.support.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="all if left out")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on")
    parser.add_argument("--seed", type=int, help="of the first round; random if left out")
    parser.add_argument("--cases", type=int, default=BATCH, help="of one target in one round")
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else time.time_ns() % 2**32
    until, total, faults = time.monotonic() + given.seconds, 0, 0
    while time.monotonic() < until:
        for name in given.target or TARGETS:
            started = time.monotonic()
            if started > until:
                break
            with tempfile.TemporaryDirectory() as folder:
                try:
                    counts = run(name, given.cases, seed, Path(folder))
                except (Exception, Hangs):
                    faults += 1
                    traceback.print_exc()
                    print(f"again: python tools/fuzz.py --target '{name}' --seed {seed} --cases {given.cases}")
                    continue
            total += counts.total()
            took = time.monotonic() - started
            print(f"{name}, seed {seed}: {counts[True]} accepted, {counts[False]} refused, {took:.1f} s", flush=True)
        seed += 1
    print(f"{total} cases, {faults} faults")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
