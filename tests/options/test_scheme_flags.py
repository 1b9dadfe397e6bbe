"""--scheme, beside the flags of the original script that select a scheme."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.support.option_cases import W4A8, faults_of, two_folders
from vlqc.cli.commands import app
from vlqc.emit.resume.fingerprint import IGNORED_OPTIONS
from vlqc.options.fields import option_info
from vlqc.options.options import Options
from vlqc.reporting.html.command_line import command
from vlqc.targets.schemes import Scheme

W4A8_FLAGS = {name: value for name, value in W4A8.items() if name != "act_method"}
SAME: list[tuple[str, dict[str, Any]]] = [
    ("w8a8", {"w_bit": 8, "is_dynamic": False}),
    ("W8A8", {}),
    ("w8a8-dynamic", {"is_dynamic": True}),
    ("w8a8_dynamic", {"w_bit": 8, "a_bit": 8, "is_dynamic": True, "is_lowbit": False}),
    ("W4A8_DYNAMIC", W4A8_FLAGS),
    ("W4A8", W4A8_FLAGS),
    ("w4a8", {**W4A8_FLAGS, "group_size": 64}),
    ("w8a16", {"a_bit": 16}),
]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Any]:
    return two_folders(tmp_path)


def without_effect_of_spelling(options: Options) -> dict[str, str]:
    """What the fingerprint of a run holds of the options."""
    return {name: str(getattr(options, name)) for name in Options.model_fields.keys() - IGNORED_OPTIONS}


@pytest.mark.parametrize(("name", "flags"), SAME)
def test_a_name_and_its_flags_are_the_same_options(folders: dict[str, Any], name: str, flags: dict[str, Any]) -> None:
    """Catches two spellings of a compilation with other bytes, another report, or no --resume between them."""
    named, flagged = Options.from_user(**folders, scheme=name), Options.from_user(**folders, **flags)
    both = Options.from_user(**folders, scheme=name, **flags)
    assert named == flagged == both and isinstance(named.scheme, Scheme)
    assert without_effect_of_spelling(named) == without_effect_of_spelling(flagged)
    assert command(named, None, names_samples=False) == command(flagged, None, names_samples=False)


@pytest.mark.parametrize("name", option_info("scheme").choices)
def test_every_scheme_needs_no_other_flag(folders: dict[str, Any], name: str) -> None:
    """Catches a scheme that --scheme alone does not select, or whose command in the report selects another one."""
    options = Options.from_user(**folders, scheme=name)
    assert options.scheme == Scheme(name.upper()) and options.scheme.is_quantized
    words = command(options, None, names_samples=False)
    again = dict(zip(words[2::2], words[3::2], strict=True))
    assert again.get("--scheme", "w8a8") == name and not {"--w_bit", "--is_dynamic", "--open_outlier"} & again.keys()
    assert Options.from_user(**folders, **{each: getattr(options, each) for each in SELECTING}) == options


SELECTING = ("scheme", "w_bit", "a_bit", "is_dynamic", "is_lowbit", "open_outlier")


@pytest.mark.parametrize(
    ("chosen", "what", "fix"),
    [
        ({"scheme": "w8a8", "is_dynamic": True}, "--scheme w8a8 with --is_dynamic True", "--scheme w8a8_dynamic"),
        ({"scheme": "W4A8", "w_bit": 8}, "--scheme w4a8_dynamic with --w_bit 8", "--scheme w8a8"),
        ({"scheme": "w4a8", "open_outlier": True}, "--scheme w4a8_dynamic with --open_outlier True", "--open_outlier"),
        ({"scheme": "w8a8_dynamic", **W4A8}, "--scheme w8a8_dynamic with --w_bit 4 --is_lowbit True", "w4a8_dynamic"),
        ({"scheme": "W8A8-PDMIX", "is_dynamic": False}, "--scheme w8a8_mix with --is_dynamic False", "--scheme w8a8"),
        ({"a_bit": 16, "is_dynamic": True}, "--a_bit 16 --is_dynamic True", "--scheme w8a16 instead of --is_dynamic"),
        ({"scheme": "w8a8_dynamic", "is_dynamic": False}, "--is_dynamic False", "remove --is_dynamic False"),
    ],
)
def test_a_contradiction_is_one_error(folders: dict[str, Any], chosen: dict[str, Any], what: str, fix: str) -> None:
    """Catches a flag that is silently ignored beside --scheme, and an error that does not name both and a way out."""
    (fault,) = faults_of(**folders, **chosen)
    assert what in fault.split("\n")[0] and fix in fault.split("what to do: ")[1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("w8a8_dynamik", "did you mean w8a8_dynamic"),
        ("w4a8-dynamc", "did you mean w4a8_dynamic"),
        ("float", "no such scheme"),
        ("W4A8C8", "--scheme w4a8 --kv_cache int8"),
        ("fp4", "w8a8, "),
        (8, "no such scheme"),
    ],
)
def test_other_names(folders: dict[str, Any], name: Any, words: str) -> None:
    """Catches a name that is taken for another scheme, and an error without the names."""
    (fault,) = faults_of(**folders, scheme=name, is_dynamic=True)
    assert fault.startswith(f"--scheme {name}") and words in fault


def test_recipe_and_command_line(folders: dict[str, Any], tmp_path: Path) -> None:
    """Catches a flag of a recipe that does not count as given beside --scheme, an error without its line, and a scheme
    on the command line that does not replace that of the recipe."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("anti_method: m4\nscheme: W4A8-Dynamic\n")
    assert Options.from_user(**folders, recipe=recipe).scheme is Scheme.W4A8_DYNAMIC
    assert Options.from_user(**folders, recipe=recipe, scheme="w8a8").scheme is Scheme.W8A8
    (fault,) = faults_of(**folders, recipe=recipe, w_bit=8)
    assert "recipe.yaml, line 2" in fault and "--w_bit 8" in fault
    recipe.write_text("is_dynamic: True\n")
    assert Options.from_user(**folders, recipe=recipe, scheme="w4a8").scheme is Scheme.W4A8_DYNAMIC
    (fault,) = faults_of(**folders, recipe=recipe, scheme="w8a8")
    assert "recipe.yaml, line 1" in fault and "--scheme w8a8 with --is_dynamic True" in fault
    assert Options.from_user(**folders, recipe=recipe, scheme="w8a8", is_dynamic=False).scheme is Scheme.W8A8


def test_command_line(folders: dict[str, Any]) -> None:
    """Catches a flag that the command line passes on although the user did not set it, and another exit code."""
    paths = [word for name, value in folders.items() for word in (f"--{name}", str(value))]
    ended = CliRunner().invoke(app, ["passes", "--explain", *paths, "--scheme", "w4a8-dynamic"])
    assert ended.exit_code == 0 and "W4A8_DYNAMIC" in ended.stdout
    ended = CliRunner().invoke(app, ["compile", *paths, "--scheme", "w8a8", "--w_bit", "4"])
    assert ended.exit_code == 2 and "--scheme w8a8 with --w_bit 4" in ended.stderr
