"""The pages beside the README: commands, options, passes and links that they name exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import vlqc
from vlqc.cli.commands import app
from vlqc.options.option_values import extra_of
from vlqc.options.options import Options
from vlqc.options.recipe import read_recipe
from vlqc.pipeline.registry import REGISTRY
from vlqc.reporting.plan import preflight

DOCS = Path(vlqc.__file__).parent / "docs"
ROOT = Path(__file__).parents[2]
TINY_VL = ROOT / "tools" / "demo" / "tiny_vl"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
ELSEWHERE = {"--quantization", "--strict", "--nproc-per-node", "--update-golden"}  # of vLLM, MindIE, torchrun, pytest


def options_of_tools() -> set[str]:
    """What the project's own tools take, from their source."""
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "tools").glob("*.py"))]
    return {option for source in sources for option in re.findall(r"add_argument\(\s*\"(--\w+)\"", source)}


def commands() -> dict[str, set[str]]:
    """Command -> its option names."""
    group: Any = get_command(app)
    of_all = {option for parameter in group.params for option in parameter.opts}
    found = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in group.commands.items()
    }
    return {**found, "": of_all | {"--help"}}


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page: Path) -> None:
    """Catches an option that a page recommends and the command line does not know (any more)."""
    known = {option.replace("-", "_") for options in commands().values() for option in options} | {
        option.replace("-", "_") for option in ELSEWHERE | options_of_tools()
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text(page)))
    assert {name for name in named if name.replace("-", "_") not in known} == set()
    assert len(named) > 5 or page.name in ("life_of_a_block.md", "cookbook.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_parse(page: Path) -> None:
    """Catches an indented command with an option of another command, or a command that does not exist."""
    lines = text(page).replace("\\\n", " ").splitlines()
    for line in (line for line in lines if re.match(r"    (torchrun .* -m )?vlqc ", line)):
        words = shlex.split(re.sub(r"^.*?\bvlqc ", "", line, count=1), comments=True)
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert words[0] in commands(), line
        assert options <= commands()[words[0]] | {"--help"}, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Catches a link to a page that was renamed, or does not travel with the package."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text(page)):
        assert (page.parent / target).resolve().is_file(), target


def test_the_chinese_readme_covers_what_matters() -> None:
    """Catches a pass, command or original option that the Chinese page leaves out, and a page that is not Chinese."""
    page = text(DOCS / "README.zh.md")
    assert all(f"`{name}`" in page for name in REGISTRY)
    assert all(f"vlqc {name}" in page for name in ("compile", "verify", "report", "inspect", "passes"))
    assert all(f"--{name}" in page for name in list(Options.model_fields)[:15])
    assert len(re.findall(r"[\u4e00-\u9fff]", page)) > 1500
    assert "vlqc/docs/README.zh.md" in text(ROOT / "README.md")


def test_every_choice_in_the_chinese_table_exists() -> None:
    """Catches a value in the table of options that its option refuses, and a default that is not the option's."""
    rows = re.findall(r"^\| `--(\w+)` \| (\S+) \| (.*) \|$", text(DOCS / "README.zh.md"), re.MULTILINE)
    checked = 0
    for name, default, meaning in rows:
        if name not in Options.model_fields:
            continue
        field = Options.model_fields[name]
        values = list(map(str, extra_of(field)["values"]))
        if values:
            assert set(re.findall(r"`([\w.]+)`", meaning)) <= {*values}, name
            assert default == str(field.default), name
            checked += 1
    assert checked >= 5


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "README.zh.md"], ids=lambda page: page.name)
def test_recipes_in_pages_are_recipes(page: Path, tmp_path: Path) -> None:
    """Catches an example recipe that vlqc refuses: its options, or what its layers are for the engines."""
    (recipe,) = re.findall(r"((?:    #.*\n)?    model_path: (?:.*\n    )+.*\n)", text(page))
    (tmp_path / "recipe.yaml").write_text(re.sub(r"^    ", "", recipe, flags=re.MULTILINE), encoding="utf-8")
    given = read_recipe(tmp_path / "recipe.yaml", Options.model_fields)
    places = {"model_path": TINY_VL, "calib_images": ROOT / "tests" / "photos", "save_directory": tmp_path / "int8"}
    planned = preflight(**{**given, **places})
    assert {f"excluded by {pattern}" for pattern in given["exclude"]} <= planned.reasons.keys()


def test_the_progress_that_the_readme_gives() -> None:
    """Catches an expression of the README that fails right after `import vlqc`, as a module does that nobody loaded."""
    (given,) = re.findall(r"`progress=(vlqc\.[^`]+)`", text(ROOT / "README.md"))
    code = f"import vlqc\nprint(type({given}).__name__)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "TerminalProgress\n", ran.stderr


def test_migration_names_every_original_option() -> None:
    """Catches an option of the original script without its counterpart."""
    page = text(DOCS / "migration.md")
    first = page.split("## From `msmodelslim quant`")[0]
    for name in list(Options.model_fields)[:15]:
        assert re.search(rf"\b{name}\b", first) and f"`--{name}`" in first, name
