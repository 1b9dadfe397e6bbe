"""The code of vlqc/docs/life_of_a_block.md runs and prints what the page shows."""

import doctest
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vlqc
from tests.support import tiny
from tools.demo import tiny_task

PAGE = Path(vlqc.__file__).parent / "docs" / "life_of_a_block.md"
FENCE = re.compile(r"^```\w*$", re.MULTILINE)
NUMBER = re.compile(r"-?\d+\.\d+")
ROUNDING = 0.03  # relative, of decimal numbers: processors add in different orders


class Checker(doctest.OutputChecker):
    """Compares text exactly and decimal numbers up to rounding."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        pairs = list(zip(NUMBER.findall(want), NUMBER.findall(got), strict=False))
        close = all(math.isclose(float(one), float(other), rel_tol=ROUNDING) for one, other in pairs)
        return close and NUMBER.sub("#", want) == NUMBER.sub("#", got)


class Runner(doctest.DocTestRunner):
    """Stores the output of every example."""

    def __init__(self) -> None:
        super().__init__(Checker(), verbose=False)
        self.printed: list[tuple[doctest.Example, str]] = []

    def report_success(self, out: Callable[[str], object], test: doctest.DocTest, example: Any, got: str) -> None:
        self.printed.append((example, got))

    def report_failure(self, out: Callable[[str], object], test: doctest.DocTest, example: Any, got: str) -> None:
        self.printed.append((example, got))
        super().report_failure(out, test, example, got)  # type: ignore[arg-type]


@pytest.fixture
def gradients() -> Iterator[None]:
    """Enables gradients again, which the page disables."""
    yield
    torch.set_grad_enabled(True)


def test_page(
    tmp_path: Path,
    gradients: None,
    float32_runs: None,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches outdated code or output in the page; `--update-golden` writes the current output."""
    text = PAGE.read_text(encoding="utf-8")
    known = {"TINY": tiny.TINY, "vlqc": vlqc, "samples": tiny_task.samples(4, seed=1), "folder": tmp_path}
    plain = FENCE.sub("", text)  # lines stay where they are
    test = doctest.DocTestParser().get_doctest(plain, known, PAGE.name, str(PAGE), 0)
    runner = Runner()
    outcome = runner.run(test)
    assert outcome.attempted == len(runner.printed) > 50, capsys.readouterr().out
    if request.config.getoption("--update-golden"):
        lines = text.splitlines(keepends=True)
        for example, got in reversed(runner.printed):
            start = example.lineno + example.source.count("\n")
            lines[start : start + example.want.count("\n")] = [got]
        PAGE.write_text("".join(lines), encoding="utf-8")
    else:
        assert outcome.failed == 0, capsys.readouterr().out
