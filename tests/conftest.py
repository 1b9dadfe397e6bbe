"""Settings and fixtures of all tests: examples of hypothesis, the comparison with golden files, and --update-golden."""

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, settings
from packaging.version import Version

from tests.support.same_examples import ignore_constants_of_modules

# The same examples in every run and every worker, so that a change is refused only for defects that can be repeated;
# tools/fuzz.py tries others. None fails for being slow on a busy machine.
settings.register_profile(
    "vlqc",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("vlqc")
ignore_constants_of_modules()

FIRST_WITH_QWEN3_VL = Version("4.57")
GOLDENS = Path(__file__).parent / "goldens"
# Modules that take long and whose tests share fixtures only if their first parameter is the same.
SPLIT_BY_PARAMETER = ("tests/end_to_end/test_families.py",)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what the tests produce into tests/goldens")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For --dist loadscope: one worker runs a module, or of a module to be split the tests with one first parameter."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope, _, name = nodeid.partition("::")
            if scope not in SPLIT_BY_PARAMETER:
                return str(super()._split_scope(nodeid))
            parameters = name.partition("[")[2]
            return scope + re.split(r"[-\]]", parameters)[0]

    return Scheduling(config, log) if config.option.dist == "loadscope" else None


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


def pytest_unconfigure(config: pytest.Config) -> None:
    """Names the failed tests once more, in the last lines of the output: of long outputs often only the end is kept."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    for kind in ("failed", "error"):
        for report in reporter.getreports(kind) if reporter else ():
            reporter.write_line(f"{kind}: {report.nodeid}")


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
