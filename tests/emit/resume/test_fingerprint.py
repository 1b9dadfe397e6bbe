"""What is part of the fingerprint: adapters, and sources of passes, their bases, and modules that they may import."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.adapters import low_rank, write_adapter
from vlqc.emit.resume import fingerprint
from vlqc.emit.resume.fingerprint import differences, run_fingerprint, source_digests
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.options.options import Options
from vlqc.pipeline.registry import load_pass

HELPED = """
from dataclasses import dataclass
from typing import ClassVar

import bought
import helping
import mine.deep
from elsewhere.parts import Mixin
from vlqc import Pass


@dataclass(frozen=True)
class Helped(Mixin, Pass):
    name: ClassVar[str] = "helped"
    kind: ClassVar[str] = "analysis"
    summary: ClassVar[str] = "has helpers"
"""
FILES = {
    "work/helped.py": HELPED,
    "work/helping.py": "",
    "work/unasked.py": "",
    "work/mine/__init__.py": "",
    "work/mine/deep.py": "",
    "work/package/__init__.py": "",
    "work/package/inner/__init__.py": "from .. import beside",
    "work/package/inner/helped.py": HELPED,
    "work/package/beside.py": "",
    "work/.venv/site-packages/bought.py": "",
    "work/.venv/site-packages/sold/__init__.py": "from sold import part",
    "work/.venv/site-packages/sold/part.py": "",
    "work/.venv/site-packages/sold/helped.py": HELPED,
    "other/elsewhere/__init__.py": "",
    "other/elsewhere/parts.py": "class Mixin: pass",
}
HELPERS = {"elsewhere.parts", "helping", "mine", "mine.deep"}


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the files; modules loaded from it are removed from sys.modules afterwards."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    for folder in ("work", "other", "work/.venv/site-packages"):
        monkeypatch.syspath_prepend(str(tmp_path / folder))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("module", "included"),
    [
        ("helped", HELPERS | {"helped"}),
        ("package.inner.helped", HELPERS | {"package", "package.inner", "package.inner.helped", "package.beside"}),
        ("sold.helped", {"elsewhere.parts", "sold", "sold.part", "sold.helped"}),
    ],
)
def test_source_digests(code: Path, module: str, included: set[str]) -> None:
    """Catches a helper module that is left out, and a library that is included."""
    kind = load_pass(f"{module}:Helped")
    before = source_digests([kind])
    assert set(before) == {f"source of {name}" for name in included}
    changed = set()
    for name in FILES:
        path = code / name
        path.write_text(path.read_text() + "\n")
        changes = differences(before, source_digests([kind]))
        changed |= {each.partition(":")[0] for each in changes}
        path.write_text(path.read_text()[:-1])
        assert len(changes) <= 1 and source_digests([kind]) == before
    assert changed == set(before)


def test_the_calling_script_may_change(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a script that cannot resume because `resume=True` was added to it."""
    script = importlib.import_module("unasked")
    kind = load_pass("helped:Helped")
    monkeypatch.delitem(sys.modules, "unasked")
    monkeypatch.setitem(sys.modules, "__main__", script)
    before = source_digests([kind])
    (code / "work" / "unasked.py").write_text("resume = True\n")
    assert source_digests([kind]) == before


def test_own_sources_are_all_in_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that is resumed with other code of vlqc, because the digest leaves out some of its folders."""
    files: list[Path] = []
    monkeypatch.setattr(fingerprint, "sha256_of", lambda path: files.append(path) or "")
    fingerprint._vlqc_sources.__wrapped__()
    root = Path(fingerprint.__file__).parents[2]
    names = {path.relative_to(root).as_posix() for path in files}
    expected = {"compiler.py", "emit/resume/journal.py", "passes/smooth_m2.py", "kernels_ref/matmul.py"}
    assert expected | {"passes/algorithms/gptq.py"} <= names and len(names) == len(files)


def test_adapters_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that is resumed with another adapter, or not with the same one at another place."""
    monkeypatch.setattr(fingerprint, "_numerics", str)  # which takes a second
    path = "model.layers.0.self_attn.q_proj"
    folders = [write_adapter(tmp_path / name, low_rank(path, 192, 192, seed=len(name))) for name in ("a", "b", "cc")]

    def of(*lora: Path) -> dict[str, str]:
        options = Options.without_paths(model_path=tiny.TINY, lora=lora)
        return run_fingerprint(options, "", StreamedModel.open(Checkpoint(tiny.TINY, lora)), [])

    assert not differences(of(folders[0]), of(folders[1]))
    assert len(differences(of(folders[0]), of(folders[2]))) == len(differences(of(folders[0]), of())) == 1
    assert len(differences(of(folders[0], folders[2]), of(folders[2], folders[0]))) == 2
