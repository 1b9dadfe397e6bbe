"""Fuzz targets for texts: option values, pipelines, recipes, printed stages."""

import dataclasses
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.support.fuzz.damage import damaged_text, values
from tests.support.fuzz.files import put
from tests.support.fuzz.verdict import demand
from vlqc.ir.parser import parse_stage
from vlqc.ir.printer import print_stage
from vlqc.options.fields import option_info, option_text
from vlqc.options.options import Options
from vlqc.options.recipe import read_recipe
from vlqc.pipeline.presets import pipeline_text
from vlqc.pipeline.registry import REGISTRY, load_pass, parse_pipeline, print_pipeline

GOLDENS = Path(__file__).parents[2] / "goldens"


def option_cases() -> st.SearchStrategy[dict[str, Any]]:
    """Up to four options with values of any type, mostly text, as from a command line."""
    allowed = [(name, value) for name in Options.model_fields for value in option_info(name).choices]
    words = st.sampled_from(
        (
            "True",
            "false",
            "none",
            "1e400",
            "-0",
            "0.5",
            "64",
            "256",
            "mindie@2.2",
            "both@1",
            "vllm-ascend@9.9.9.9rc",
            "*",
        )
    )
    given = st.one_of(
        st.tuples(st.sampled_from(list(Options.model_fields)), st.one_of(words, st.text(max_size=8), values())),
        st.sampled_from(allowed),
        st.tuples(st.text(max_size=12), st.text(max_size=3)),
    )
    return st.lists(given, min_size=1, max_size=4).map(dict)


def check_options(case: dict[str, Any], folder: Path) -> bool:
    """Accepted values have the type and range of the option, and are accepted again unchanged."""
    options = Options.without_paths(**case)
    for name in Options.model_fields:
        value, info = getattr(options, name), option_info(name)
        if info.choices and value is not None:
            words = str(value).split(",") if info.comma_separated else [option_text(value).partition("@")[0]]
            demand(set(words) <= set(info.choices), f"{name} is {value!r}")
        if isinstance(value, float):
            least, most = map(float, re.findall(r"\d+", info.legal))
            demand(math.isfinite(value) and least <= value <= most, f"{name} is {value!r}")
        if type(value) is int and not info.choices:
            demand(int(info.legal.rpartition(" ")[2]) <= value < 10**18, f"{name} is {value!r}")
    again = Options.without_paths(**{name: getattr(options, name) for name in Options.model_fields})
    demand(again == options, "changes when parsed again")
    print_pipeline(parse_pipeline(pipeline_text(options)))
    return True


PIPELINE = (
    "insert-observers{tokens=4096,balance=false},assign-precision{scheme=W8A8,fallback=reference,exclude=a.*;b},"
    "smooth-m4{alpha=0.5},quantize-activations{method=histogram},quantize-weights{method=gptq},lower-linears"
)


@cache
def pass_words() -> tuple[str, ...]:
    fields = {option.name for name in REGISTRY for option in dataclasses.fields(load_pass(name))}
    return (*REGISTRY, *sorted(fields), "{", "}", ",", "=", "=None", "{}", "=1e400", "=nan", "=-1", "=0", "true", "{{")


def check_pipeline(case: str, folder: Path) -> bool:
    """Accepted pipelines print as an equivalent text. Without module:Class, which would import modules."""
    passes = parse_pipeline(case.replace(":", ""))
    text = print_pipeline(passes)
    text.encode()
    demand(parse_pipeline(text) == passes, f"{text!r} reads otherwise")
    return True


RECIPE = """# a recipe
w_bit: 8
act_method: '1'
anti-method: m4
exclude: ["visual.*", '*.o_proj']
include:
  - lm_head
max_samples: 010
memory_budget: 1.5
overwrite: yes
target: ~
"""
RECIPE_WITH_PIPELINE = """max-samples: 0x10
pipeline: >-
  insert-observers,
  lower-linears
overwrite: 'no'
"""
RECIPE_WORDS = tuple("!!python/name:os.system !!int &a *a <<: --- ?  - { [ | > yes 0o7 :".split(" "))


def recipe_cases() -> st.SearchStrategy[str]:
    return st.one_of(*(damaged_text(text, words=RECIPE_WORDS) for text in (RECIPE, RECIPE, RECIPE_WITH_PIPELINE)))


def check_recipe(case: str, folder: Path) -> bool:
    """Accepted recipes give options that are accepted again unchanged, and name no code."""
    file = folder / "recipe.yaml"
    put(file, case.encode(errors="surrogatepass"))
    texts = {name: entry.value for name, entry in read_recipe(file).items()}
    options = Options.without_paths(recipe=file)
    demand(options == Options.without_paths(**texts), "options read otherwise than as arguments")
    demand(":" not in (options.pipeline or ""), "a pipeline names code")
    demand(not options.trust_remote_code, "it trusts code")
    return True


@cache
def stage_texts() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(GOLDENS.glob("*.vlqc"))]


def stage_cases() -> st.SearchStrategy[str]:
    """Golden files with some lines removed and the rest damaged; short ones more often, because they are faster."""
    words = (" absmax=", " digest=", "float32", "%", " : ", "torch.", 'module("', "edges {", "}", "kept=", "channels=")

    def shortened(text: str) -> st.SearchStrategy[str]:
        lines = text.split("\n")

        def cut(place: tuple[int, int]) -> str:
            return "\n".join(lines[: place[0]] + lines[place[0] + place[1] :])

        return st.tuples(st.integers(1, len(lines)), st.integers(0, 3)).map(cut)

    small = sorted(stage_texts(), key=len)[:3]
    return st.sampled_from(small).flatmap(
        lambda text: st.one_of(damaged_text(text, most=2, words=words), shortened(text))
    )


def check_stage(case: str, folder: Path) -> bool:
    """Accepted stages print as a text that parses to the same stage."""
    printed = print_stage(parse_stage(case))
    demand(print_stage(parse_stage(printed)) == printed, "does not read back")
    return True
