"""Options from a YAML file: same names and meanings as on the command line, which takes precedence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from vlqc.cli.commands import app
from vlqc.errors import UserError
from vlqc.options.options import Options
from vlqc.options.recipe import read_recipe

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def read(file: Path) -> dict[str, Any]:
    """The values in a recipe, as the options hold them."""
    options = Options.without_paths(recipe=file)
    return {name: getattr(options, name) for name in read_recipe(file)}


def test_every_option_can_stand_in_it(write: Write) -> None:
    """Catches an option that a recipe cannot set, or whose default is read as another value there."""
    options = Options.without_paths()
    lines = []
    for name in Options.model_fields:
        value = getattr(options, name)
        lines.append(f"{name}: {list(value) if isinstance(value, tuple) else value}")
    assert Options.without_paths(recipe=write("\n".join(lines))) == options


def test_values(write: Write) -> None:
    """Catches a value that means something else than on the command line."""
    text = (
        "w-bit: 8  # dashed\n--act_method: '3'\nis_dynamic: yes\nexclude:\n  - visual.*\n  - '*.o_proj'\n"
        "include: lm_head\npart_file_size: ~\nanti_alpha: None\nmemory_budget: 1.5\ncalib_images: a b/c d\n"
    )
    assert read(write(text)) == {
        "w_bit": 8, "act_method": 3, "is_dynamic": True, "exclude": ("visual.*", "*.o_proj"), "include": ("lm_head",),
        "part_file_size": None, "anti_alpha": None, "memory_budget": 1.5, "calib_images": Path("a b/c d"),
    }  # fmt: skip
    text = "pipeline: >-\n  insert-observers{tokens=8},\n  lower-linears\n"
    assert read(write(text)) == {"pipeline": "insert-observers{tokens=8}, lower-linears"}


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("max_samples: 010", "max_samples", 10),  # 8 in YAML 1.1
        ("calib_images: no", "calib_images", Path("no")),  # False
        ("calib_images: 1:30", "calib_images", Path("1:30")),  # 90
        ("save_directory: 0x10", "save_directory", Path("0x10")),  # 16
        ("save_directory: 1_000", "save_directory", Path("1_000")),  # 1000
        ("target: both", "target", "both"),
        ("trust_remote_code: off_", None, None),
        ("max_samples: 1_0", None, None),  # 10
        ("max_samples: 1:30", None, None),
        ("w_bit: 8.0", None, None),
        ("min_sqnr: .inf", None, None),
        ("overwrite: 1.0", None, None),
    ],
)
def test_surprises_of_yaml(write: Write, line: str, name: str | None, value: Any) -> None:
    """Catches values that YAML's own types change."""
    if name is None:
        with pytest.raises(UserError, match=r"recipe\.yaml, line 1"):
            read(write(line))
    else:
        assert read(write(line)) == {name: value}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("w_bits: 8\n\nsave_dir: x", ["no option --w_bits", "line 1", "did you mean --w_bit", "save_dir", "line 3"]),
        ("w_bit: 5\na_bit: 4", ["--w_bit 5", "line 1", "--a_bit 4", "line 2"]),
        ("w_bit: 8\nw-bit: 4", ["w_bit is given twice", "line 2"]),
        ("w_bit:", ["w_bit has no value", "w_bit: None"]),
        ("w_bit: [8]", ["--w_bit ['8']", "line 1", "4 or 8"]),
        ("exclude: {a: b}", ["--exclude", "line 1", "glob"]),
        ("exclude: [[a]]", ["nested too deeply", "line 1"]),
        ("recipe: other.yaml", ["no option --recipe"]),
        ("? [a]\n: b", ["line 1", "option name"]),
        ("- w_bit", ["not a YAML mapping"]),
        ("just words", ["not a YAML mapping"]),
        ("", ["the recipe is empty"]),
        ("# nothing", ["the recipe is empty"]),
        ("w_bit: 8\n---\nw_bit: 4", ["document", "line 2"]),
        ("w_bit: 'x", ["cannot be read", "line"]),
        ("w_bit: \t@", ["cannot be read", "line 1"]),
        ("w_bit: \x00", ["cannot be read"]),
        ("a: &x [1]\nexclude: *x", ["anchors and aliases"]),
        ("w_bit: !!python/object/apply:os.system [true]", ["python/object/apply:os.system"]),
        ("w_bit: !!int 8", ["tag", "line 1"]),
        ("[" * 50_000, ["nested too deeply"]),
        ("trust_remote_code: true", ["--trust_remote_code True", "command line"]),
        ("pipeline: insert-observers,my_module:Class", ["--pipeline", "command line"]),
        ("family: my_module:Class", ["--family", "command line"]),
    ],
)
def test_faults(write: Write, text: str, words: list[str]) -> None:
    """Catches a traceback, a fault without its line, and a recipe that makes code run."""
    with pytest.raises(UserError) as caught:
        read(write(text))
    for word in words:
        assert word in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    """Catches a device that is read forever, a file of any size, and an exception for a missing file."""
    (tmp_path / "big.yaml").write_text("#" * (2**16 + 1))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    for name, words in (
        ("absent.yaml", "No such"),
        (".", "regular"),
        ("big.yaml", "larger"),
        ("bytes.yaml", "decode"),
    ):
        with pytest.raises(UserError, match=words):
            read(tmp_path / name)
    with pytest.raises(UserError, match="regular"):
        read(Path("/dev/zero"))


def run(*words: str) -> Any:
    return CliRunner(env={"NO_COLOR": "1", "COLUMNS": "200"}).invoke(app, ["passes", "--explain", *words])


def test_the_command_line_takes_precedence(write: Write) -> None:
    """Catches a recipe that replaces arguments, is replaced by defaults, or whose combinations are not checked."""
    file = str(write("act_method: 1\nanti_method: m4\ntarget: mindie\nmodality_balance: False\n"))
    assert "smooth-m4" in run("--recipe", file).stdout and "method=minmax" in run("--recipe", file).stdout
    assert "balance=false" in run("--recipe", file).stdout
    ended = run("--recipe", file, "--anti_method", "none", "--act_method", "2")
    assert "smooth" not in ended.stdout and "minmax" not in ended.stdout and "target=mindie" in ended.stdout
    ended = run("--recipe", file, "--strict_target", "--w_bit", "4")
    assert ended.exit_code == 2 and "--is_dynamic True" in ended.stderr
    ended = run("--recipe", file, "--anti_method", "m5", "--seed", "x")
    assert ended.exit_code == 2 and "--anti_method m5" in ended.stderr and "--seed x" in ended.stderr
    options = Options.without_paths(recipe=file, act_method=3)
    assert (options.act_method, options.anti_method, options.target) == (3, "m4", "mindie")
