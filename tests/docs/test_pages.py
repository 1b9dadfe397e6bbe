"""README.md and vlqc/docs/*.md: the commands, options, paths, names and links in them exist."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vlqc
from tools.docs import options as options_page
from vlqc.families.registry import FAMILIES
from vlqc.options.fields import option_info, option_text
from vlqc.options.options import Options
from vlqc.options.recipe import read_recipe
from vlqc.pipeline.registry import REGISTRY
from vlqc.reporting.plan import plan_compilation

DOCS = Path(vlqc.__file__).parent / "docs"
ROOT = Path(__file__).parents[2]
TINY_VL = ROOT / "tools" / "demo" / "tiny_vl"
README, CHINESE = ROOT / "README.md", DOCS / "README.zh.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
OTHER_PROGRAMS = {
    "--quantization",
    "--block-size",
    "--strict",
    "--nproc-per-node",
    "--update-golden",
    "--no-deps",
}  # vLLM, pytest, pip
TOP_FOLDERS = "vlqc", "passes", "kernels_ref", "tools", "tests"
GENERATED = {"vlqc_report"}  # a file of a compiled folder, not a module
HEADING = re.compile(r"^(#+) ", re.MULTILINE)
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)


def options_of_tools() -> set[str]:
    """Options of the scripts in tools/, from their source."""
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "tools").rglob("*.py"))]
    return {option for source in sources for option in re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", source)}


def options_of_commands() -> dict[str, set[str]]:
    """Command name -> its option names."""
    return {
        name: {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for name, command in options_page.commands().items()
    }


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def current(page: Path) -> str:
    """A page without the list of old names."""
    return text(page).partition("\n## Renamed")[0]


every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
both_readmes = pytest.mark.parametrize("page", [README, CHINESE], ids=lambda page: page.name)


@every_page
def test_options_exist(page: Path) -> None:
    """Catches an option that a page recommends and no command line accepts."""
    known = {*OTHER_PROGRAMS, *options_of_tools(), *(each for of in options_of_commands().values() for each in of)}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", current(page)))
    assert {name.replace("-", "_") for name in named} <= {name.replace("-", "_") for name in known}


@every_page
def test_command_lines_parse(page: Path) -> None:
    """Catches an indented command with an option of another command, or a command that does not exist."""
    lines = text(page).replace("\\\n", " ").splitlines()
    for line in (line for line in lines if re.match(r"    (torchrun .* -m )?vlqc ", line)):
        words = shlex.split(re.sub(r"^.*?\bvlqc ", "", line, count=1), comments=True)
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert words[0] in options_of_commands(), line
        assert options <= options_of_commands()[words[0]], line


@every_page
def test_links_resolve(page: Path) -> None:
    """Catches a link to a page or heading that was renamed, or that is not in the package."""
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text(page)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), target
        headings = re.findall(r"^#+ (.*)$", text(file), re.MULTILINE)
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


@every_page
def test_paths_exist(page: Path) -> None:
    """Catches a path of the repository that was moved or renamed."""
    for path in re.findall(rf"(?<![\w/.-])(?:{'|'.join(TOP_FOLDERS)})/[\w./*-]*", current(page)):
        named = path.rstrip(".")
        assert list(ROOT.glob(named)) if "*" in named else (ROOT / named).exists(), path


@every_page
def test_modules_exist(page: Path) -> None:
    """Catches a module, class or function that was moved or renamed."""
    for name in re.findall(r"(?<![\w/.-])(?:vlqc|tools)\.[\w.]*\w", current(page)):
        if name.partition(".")[2].partition(".")[0] not in GENERATED and not name.endswith(".md"):
            resolve(name)


def resolve(name: str) -> Any:
    """The object of a dotted name; an error if a part of it does not exist."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            value = getattr(value, part)
        return value
    raise ModuleNotFoundError(name)


def test_options_page_is_generated() -> None:
    """Catches an option that was added, removed or reworded after the page was printed (see its first line)."""
    assert text(DOCS / "options.md") == options_page.page()


def test_readme_size_and_links() -> None:
    """Catches a README that grows beyond what is read in ten minutes, or that does not link every page."""
    assert len(text(README).encode()) < 12_000
    linked = {Path(target).name for target in re.findall(r"\]\((vlqc/docs/[^)#]+)", text(README))}
    assert linked == {path.name for path in DOCS.glob("*.md")}


def test_both_readmes_have_the_same_parts() -> None:
    """Catches a section, table or number in a table that only one language has."""
    pages = [text(README), text(CHINESE)]
    assert len({tuple(HEADING.findall(page)) for page in pages}) == 1
    english, chinese = (TABLE.findall(page) for page in pages)
    assert [table.count("\n") for table in english] == [table.count("\n") for table in chinese]
    for row, other in zip("".join(english).splitlines(), "".join(chinese).splitlines(), strict=True):
        assert row.count("|") == other.count("|"), other
        assert sorted(re.findall(r"`[^`]+`|\d[\d.]*", row)) == sorted(re.findall(r"`[^`]+`|\d[\d.]*", other)), other
    assert len(re.findall(r"[\u4e00-\u9fff]", pages[1])) > 1000


@both_readmes
def test_every_pass_is_in_the_readme(page: Path) -> None:
    """Catches a pass that is missing in the table of passes."""
    assert all(f"`{name}`" in text(page) for name in REGISTRY)


@both_readmes
def test_table_of_models(page: Path) -> None:
    """Catches a family that is missing in the table of models, or that needs another version of transformers."""
    rows = re.findall(r"^\| (Q[^ |（]*)[^|]*\| `(\w+)` \| ([\d.]+)", text(page), re.MULTILINE)
    assert rows == [(each.title, *each.model_types, each.transformers_version) for each in FAMILIES]


@both_readmes
def test_values_in_the_table_of_options(page: Path) -> None:
    """Catches a value that its option refuses, and a default that is not the option's."""
    rows = re.findall(r"^\| `--(\w+)` \| (\S+) \| (.*) \|$", text(page), re.MULTILINE)
    checked = 0
    for name, default, meaning in rows:
        if name in Options.model_fields and (values := option_info(name).choices):
            assert set(re.findall(r"`([\w.]+)`", meaning)) <= {*values}, name
            assert default == option_text(Options.model_fields[name].default), name
            checked += 1
    assert checked >= 4


def test_recipe_in_the_options_page(tmp_path: Path) -> None:
    """Catches an example recipe that vlqc refuses."""
    (recipe,) = re.findall(r"((?:    \w+: .*\n)+)", text(DOCS / "options.md"))
    (tmp_path / "recipe.yaml").write_text(re.sub(r"^    ", "", recipe, flags=re.MULTILINE), encoding="utf-8")
    options = {name: entry.value for name, entry in read_recipe(tmp_path / "recipe.yaml").items()}
    paths = {"model_path": TINY_VL, "calib_images": ROOT / "tests" / "photos", "save_directory": tmp_path / "int8"}
    plan = plan_compilation(**{**options, **paths})
    assert {f"excluded by {pattern}" for pattern in options["exclude"]} <= plan.reasons.keys()


def test_progress_expression_in_python_page() -> None:
    """Catches an expression that fails directly after `import vlqc`, as an attribute of an unimported module does."""
    (expression,) = re.findall(r"`progress=(vlqc\.[^`]+)`", text(DOCS / "python.md"))
    code = f"import vlqc\nprint(type({expression}).__name__)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "TerminalProgress\n", ran.stderr


def test_migration_names_every_original_option() -> None:
    """Catches an option of the original script without its counterpart."""
    first = text(DOCS / "migration.md").split("## From `msmodelslim quant`")[0]
    for name in list(Options.model_fields)[:15]:
        assert re.search(rf"\b{name}\b", first) and f"`--{name}`" in first, name
