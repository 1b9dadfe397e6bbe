"""Project rules: imports, file names, the wheel, the public API."""

import ast
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlqc
from vlqc.pipeline.registry import REGISTRY, load_pass

ROOT = Path(__file__).parents[1]
LINKED = ("passes", "kernels_ref")
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "core", "misc"}


def python_files(folder: str) -> list[Path]:
    """Python files below a folder of the project, except those reached through the two links."""
    links = {ROOT / "vlqc" / name for name in LINKED}
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if not links & set(path.parents)]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("vlqc", *parts) if parts[0] in LINKED else parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, also inside functions; `from a import b` yields a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path.name}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def is_standard(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


# ---- imports --------------------------------------------------------------------------------------------------------


NAME_PASSES = {f"vlqc/pipeline/{name}.py" for name in ("registry", "ordering", "presets", "pass_api")}


def test_only_the_pipeline_names_passes() -> None:
    """Catches a special case for one pass elsewhere in the compiler, which would break other pipelines."""
    words = set(REGISTRY) | {load_pass(name).__name__ for name in REGISTRY}
    spelt = re.compile(rf"(?<![\w-])({'|'.join(sorted(words))})(?![\w-])|vlqc\.passes\b")
    for path in python_files("vlqc"):
        if path.relative_to(ROOT).as_posix() not in NAME_PASSES:
            assert not spelt.search(path.read_text(encoding="utf-8")), path
            assert not any(within(name, ("vlqc.passes",)) for name in imports(path)), path


# Layer names, and in other files than those of the engines also config keys and input names, of any model.
LAYER_NAMES = re.compile(
    r"visual|language_model|model\.layers|\bmerger\b|deepstack|self_attn|\battn\b|\bmlp\b|qkv|[qkvo]_proj|gate_proj"
    r"|up_proj|down_proj|linear_fc|fc[12]\b|lm_head|embed_tokens|patch_embed|pos_embed|\bexperts\.|layernorm"
)
MODEL_KEYS = re.compile(
    r"vision_config|text_config|(image|video)_token_id|vision_(start|end|token)|spatial_merge|merge_size|patch_size"
    r"|pixel_values|(image|video)_grid|mm_token|hidden_size|num_hidden_layers|num_attention|num_key_value|num_experts"
    r"|intermediate_size|vocab_size|tie_word|rope_|mrope|head_dim|embed_dim|out_hidden|image_pad|torch_dtype"
)


def constants_and_attributes(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of string constants, attribute names and keyword names; docstrings are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    texts = {each.value for body in bodies for each in body if isinstance(each, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in texts:
            yield node.lineno, node.value
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.value.lineno, node.arg


def test_only_families_name_layers_and_keys_of_models() -> None:
    """Catches a layer name, config key or input name outside of vlqc/families/, which other models do not have."""
    engines = {ROOT / "vlqc" / "targets" / f"{name}.py" for name in ("mindie", "vllm_ascend")}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for folder in ("vlqc", *LINKED)
        for path in python_files(folder)
        if ROOT / "vlqc" / "families" not in path.parents
        for line, text in constants_and_attributes(path)
        if LAYER_NAMES.search(text) or (path not in engines and MODEL_KEYS.search(text))
    ]
    assert not found, "\n".join(found)


def test_importing_vlqc_is_lazy() -> None:
    """Catches `vlqc --help` that takes seconds because torch or transformers is loaded for it."""
    code = "import sys, vlqc; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# ---- names and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGISTRY)
def test_one_name_one_file_one_test_file(name: str) -> None:
    """Catches a pass that cannot be found by its name, or that has no tests of its own."""
    stem = name.replace("-", "_")
    assert REGISTRY[name].startswith(f"vlqc.passes.{stem}:")
    assert load_pass(name).name == name
    assert (ROOT / "passes" / f"{stem}.py").is_file()
    assert (ROOT / "tests" / "passes" / f"test_{stem}.py").is_file()


def test_no_generic_file_names() -> None:
    """Catches files such as utils.py, whose name does not describe their content."""
    for folder in ("vlqc", *LINKED, "tests", "tools"):
        for path in python_files(folder):
            parts = set(path.relative_to(ROOT).with_suffix("").parts)
            assert not parts & FORBIDDEN_NAMES, path


@pytest.mark.parametrize("name", LINKED)
def test_the_links_are_symbolic(name: str) -> None:
    """Catches a copy of a folder in place of a symbolic link: edits of one would not change the other."""
    link = ROOT / "vlqc" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"
    assert importlib.import_module(f"vlqc.{name}").__name__ == f"vlqc.{name}"


@pytest.mark.parametrize("name", LINKED)
def test_a_second_copy_under_another_name_is_refused(name: str) -> None:
    """Catches `import passes` beside `import vlqc.passes`: two classes of every pass, equal in name only."""
    spec = importlib.util.spec_from_file_location(name, ROOT / name / "__init__.py")
    assert spec and spec.loader
    with pytest.raises(ImportError, match=rf"vlqc\.{name}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_every_test_has_a_docstring() -> None:
    """Catches a test without a docstring, and one that is skipped."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"
        if path.name != Path(__file__).name:
            assert not re.search(r"pytest\.(mark\.)?(skip|xfail|importorskip)", text), path.name


def project_files() -> list[Path]:
    """Files of the project: those that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    hidden = re.compile(r"^(\.(?!ci$)|__pycache__$|build$|dist$)|\.egg-info$")
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not any(hidden.search(part) for part in path.relative_to(ROOT).parts[:-1])
    ]


def test_no_absolute_path_of_a_machine() -> None:
    """Catches a file that depends on the machine on which it was written."""
    machine = re.compile(rb"(?<![\w.>*/-])/(work|root|Users|home|tmp/w)/\w")
    files = project_files()
    assert ROOT / "vlqc" / "compiler.py" in files
    for path in files:
        match = machine.search(path.read_bytes())
        assert not match, f"{path}: {match.group() if match else ''}"


# ---- the API ---------------------------------------------------------------------------------------------------------


@pytest.mark.every_transformers
@pytest.mark.parametrize("name", vlqc.__all__)
def test_every_public_name_resolves(name: str) -> None:
    """Catches a public name that does not exist."""
    assert getattr(vlqc, name) is not None
    assert f"{name}" in (vlqc.__doc__ or "") or isinstance(getattr(vlqc, name), type)


def test_renamed_names_warn() -> None:
    """Catches an old public name that was removed without a deprecation period, or gives no warning."""
    for old, new in vlqc._RENAMED.items():
        with pytest.warns(DeprecationWarning, match=new):
            assert getattr(vlqc, old) is getattr(vlqc, new)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """Catches a KeyError, which would break `hasattr` and `from vlqc import ...`."""
    assert not hasattr(vlqc, "nonsense")


# ---- the package -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the project, built from a copy of it in which the two links are absent."""
    copy, out = tmp_path_factory.mktemp("project") / "vlqc", tmp_path_factory.mktemp("wheel")
    copy.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("vlqc", *LINKED):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in LINKED:
        (copy / "vlqc" / name).unlink()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    ran = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (built,) = out.glob("vlqc-*.whl")
    return built


def test_the_wheel_holds_the_tree(wheel: Path) -> None:
    """Catches a new folder that is not listed as a package, a file too many, a license or entry point that is lost."""
    expected = {module_of(path).replace(".", "/") for folder in ("vlqc", *LINKED) for path in python_files(folder)}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "vlqc = vlqc.__main__:main" in archive.read(entry).decode()
    packed = {re.sub(r"(/__init__)?\.py$", "", name) for name in names if name.endswith(".py")}
    assert packed == expected
    others = [name for name in names if not name.endswith(".py") and ".dist-info/" not in name]
    templates = [
        path.relative_to(ROOT).as_posix() for path in (ROOT / "vlqc" / "reporting" / "html" / "templates").iterdir()
    ]
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "vlqc" / "docs").iterdir()]
    assert sorted(others) == sorted(["vlqc/py.typed", "vlqc/__init__.pyi", *templates, *pages]) and len(templates) == 4
    assert "vlqc/docs/cookbook.md" in pages
    assert any(name.endswith("LICENSE") for name in names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"vlqc"}, "a generic name would collide"


def test_the_wheel_works_without_the_links(wheel: Path, tmp_path: Path) -> None:
    """Catches passes or kernels that import only in a checkout with the links: imports every module of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        modules = [re.sub(r"(/__init__)?\.py$", "", name) for name in archive.namelist() if name.endswith(".py")]
    expected = [module.replace("/", ".") for module in modules if not module.endswith("__main__")]
    code = (
        f"import importlib; modules = [importlib.import_module(name) for name in {expected!r}]\n"
        "from vlqc.pipeline.registry import REGISTRY, load_pass\n"
        "print(len([load_pass(name) for name in REGISTRY]))\n"
        "print(*{module.__file__ for module in modules}, sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    count, *files = ran.stdout.split()
    assert int(count) == len(REGISTRY)
    assert len(files) == len(expected) and all(file.startswith(str(tmp_path)) for file in files)


def test_the_readme_is_finished() -> None:
    """Catches placeholders, and Python examples that do not compile."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!--" not in text
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block.replace("samples=[...]", "samples=[]"), "README.md", "exec")
