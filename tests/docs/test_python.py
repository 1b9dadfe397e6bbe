"""The Python code of README.md and vlqc/docs/python.md runs as it is printed."""

import re
import shutil
from pathlib import Path

import pytest

import vlqc

DOCS = Path(vlqc.__file__).parent / "docs"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory has the folders that the code names."""
    shutil.copytree(ROOT / "tools" / "demo" / "tiny_vl", tmp_path / "float")
    (tmp_path / "images").mkdir()
    shutil.copyfile(ROOT / "tests" / "photos" / "text.jpg", tmp_path / "images" / "text.jpg")
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "python.md"], ids=lambda page: page.name)
def test_code_runs(page: Path, folders: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an example with a function, argument or attribute that does not exist."""
    code = "".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    exec(compile(code, str(page), "exec"), {"__name__": "example"})
    assert Path("report.html").stat().st_size > 10_000
    if page.name == "python.md":
        printed = capsys.readouterr().out
        assert "True []" in printed and "model.layers.3 7" in printed


def test_both_readmes_have_the_same_code() -> None:
    """Catches an example that was changed in one language only."""
    blocks = [
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for page in (ROOT / "README.md", DOCS / "README.zh.md")
    ]
    english, chinese = ([re.sub(r" *#.*", "", block) for block in page] for page in blocks)
    assert english == chinese
