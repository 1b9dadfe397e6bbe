"""Fixtures of all tests: the comparison with golden files, and --update-golden, which rewrites them."""

import difflib
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from hypothesis import settings
from packaging.version import Version

# The same examples in every run, and none fails for being slow on a busy machine.
settings.register_profile("vlqc", deadline=None, derandomize=True, database=None)
settings.load_profile("vlqc")

FIRST_WITH_QWEN3_VL = Version("4.57")
GOLDENS = Path(__file__).parent / "goldens"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what the tests produce into tests/goldens")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests of models that the installed transformers does not have."""
    if Version(transformers.__version__) >= FIRST_WITH_QWEN3_VL:
        return
    needing_newer = [item for item in items if item.get_closest_marker("qwen3_vl")]
    config.hook.pytest_deselected(items=needing_newer)
    items[:] = [item for item in items if not item.get_closest_marker("qwen3_vl")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names the deselected tests: with several workers pytest does not count them."""
    if Version(transformers.__version__) < FIRST_WITH_QWEN3_VL:
        found = f"transformers {transformers.__version__} is older than {FIRST_WITH_QWEN3_VL}"
        terminalreporter.write_line(f"deselected: tests marked qwen3_vl, because {found}")


@pytest.fixture
def float32_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples run through stages in float32, as proofs do, also where a processor multiplies bfloat16 faster."""
    monkeypatch.setattr("vlqc.ir.bfloat16_linears.multiplies_bfloat16", lambda device: False)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """golden(name, text) fails with a diff unless the file tests/goldens/NAME equals the text."""

    def compare(name: str, text: str) -> None:
        file = GOLDENS / name
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        known = file.read_text(encoding="utf-8") if file.exists() else ""
        if text != known:
            shown = difflib.unified_diff(known.splitlines(), text.splitlines(), f"goldens/{name}", "now", lineterm="")
            pytest.fail("\n".join([*shown, "if this is meant: pytest --update-golden"]), pytrace=False)

    return compare
