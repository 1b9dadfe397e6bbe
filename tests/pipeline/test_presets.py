"""pipeline_text: the pipeline that options select."""

from typing import Any

import pytest

from vlqc.options.options import Options
from vlqc.pipeline.ordering import check_order
from vlqc.pipeline.presets import build_pipeline, pipeline_text, resolve_target
from vlqc.pipeline.registry import parse_pipeline, print_pipeline

BEGIN, END = "insert-observers,assign-precision,", "quantize-activations,quantize-weights,lower-linears"
FOUR_BITS = {"w_bit": 4, "is_lowbit": True, "is_dynamic": True, "open_outlier": False}
PRESETS: list[tuple[dict[str, Any], str]] = [
    ({}, BEGIN + "smooth-m2," + END),
    ({"anti_method": "m4"}, BEGIN + "smooth-m4," + END),
    ({"anti_method": "m4", "anti_alpha": 0.5}, BEGIN + "smooth-m4{alpha=0.5}," + END),
    ({"anti_method": "none"}, BEGIN + END),
    (
        {"shift": True},  # the engines store a norm's bias under different names, so for one of them
        "insert-observers,assign-precision{target=vllm-ascend},shift-norms,smooth-m2," + END,
    ),
    (
        {"shift": True, "mindie_format": True, "anti_method": "m4"},
        "insert-observers,assign-precision{target=mindie},shift-norms,smooth-m4," + END,
    ),
    (
        {"act_method": 1},  # min-max clips nothing, and smoothing has to know
        BEGIN + "smooth-m2{clip=false}," + END.replace("activations", "activations{method=minmax}"),
    ),
    (
        {"act_method": 1, "anti_method": "m4"},
        BEGIN + "smooth-m4{clip=false}," + END.replace("activations", "activations{method=minmax}"),
    ),
    (
        {"modality_balance": False},
        BEGIN.replace("observers", "observers{balance=false}") + "smooth-m2," + END,
    ),
    (
        {"weight_method": "clip"},
        BEGIN + "smooth-m2{weights=clip}," + END.replace("weights", "weights{method=clip}"),
    ),
    (
        {"weight_method": "round", "anti_method": "m4", "anti_alpha": 0.25},
        BEGIN + "smooth-m4{alpha=0.25,weights=round}," + END.replace("weights", "weights{method=round}"),
    ),
    ({"propagate": "quantized"}, BEGIN + "smooth-m2," + END + ",propagate-quantized"),
    ({"fallback": "none"}, BEGIN.replace("precision", "precision{fallback=none}") + "smooth-m2," + END),
    (
        {"fallback": "auto", "min_sqnr": 30},  # the search comes last, among all groups
        BEGIN.replace("precision", "precision{fallback=none,substitutes=W8A16}")
        + "smooth-m2,"
        + END.replace("lower", "measure-sensitivity{schemes=W8A8;W8A8_DYNAMIC;W8A8_MIX;W8A16},lower"),
    ),
    (
        {"fallback": "auto", "max_bytes": "5GiB", "target": "vllm-ascend"},
        "insert-observers,assign-precision{target=vllm-ascend,fallback=none,"
        "substitutes=W8A16;W4A8_DYNAMIC},smooth-m2,"
        + END.replace("lower", "measure-sensitivity{target=vllm-ascend},lower"),
    ),
    (
        {"fallback": "auto", "min_sqnr": 30, "scheme": "w8a16", "anti_method": "none"},  # the cheapest first
        "insert-observers,assign-precision{scheme=W8A16,target=vllm-ascend,fallback=none,"
        "substitutes=W8A8;W8A8_DYNAMIC},"
        + END.replace(
            "lower", "measure-sensitivity{target=vllm-ascend,schemes=W8A8;W8A8_DYNAMIC;W8A8_MIX;W8A16},lower"
        ),
    ),
    (
        {"fallback": "auto", "max_float_groups": 3, "act_method": 1, "weight_method": "round", "group_size": 128},
        "insert-observers,assign-precision{group_size=128,fallback=none},smooth-m2{clip=false,weights=round},"
        "quantize-activations{method=minmax},quantize-weights{method=round},"
        "measure-sensitivity{method=round,inputs=minmax,group_size=128,schemes=W8A8},lower-linears",
    ),
    ({"act_method": 3}, BEGIN + "smooth-m2," + END.replace("activations", "activations{method=automatic}")),
    (
        {"is_dynamic": True},
        "insert-observers,assign-precision{scheme=W8A8_DYNAMIC,target=vllm-ascend},smooth-m2," + END,
    ),
    (
        {"is_dynamic": True, "target": "MindIE@2.2"},
        "insert-observers,assign-precision{scheme=W8A8_DYNAMIC,target=mindie@2.2},smooth-m2," + END,
    ),
    (
        {**FOUR_BITS, "group_size": 256, "anti_method": "m4"},
        "insert-observers,assign-precision{scheme=W4A8_DYNAMIC,group_size=256,target=vllm-ascend},smooth-m4," + END,
    ),
    (
        {**FOUR_BITS, "w4a8_scope": "all"},
        "insert-observers,assign-precision{scheme=W4A8_DYNAMIC,target=vllm-ascend,scope=all},smooth-m2," + END,
    ),
    (
        {"float_as": "w8a16"},
        "insert-observers,assign-precision{target=vllm-ascend,float_as=W8A16},smooth-m2," + END,
    ),
    ({"mindie_format": True}, "insert-observers,assign-precision{target=mindie},smooth-m2," + END),
    (
        {"exclude": ["*.o_proj", "visual.*"], "include": "*.down_proj"},
        "insert-observers,assign-precision{exclude=*.o_proj;visual.*,include=*.down_proj},smooth-m2," + END,
    ),
    ({"rotate": "none"}, BEGIN + "smooth-m2," + END),
    ({"rotate": "heads"}, BEGIN + "smooth-m2," + END),
    ({"rotate": "all"}, BEGIN + "smooth-m2," + END),
    ({"pipeline": " insert-observers ,\n smooth-m4{ alpha = 0.50 }"}, "insert-observers,smooth-m4{alpha=0.5}"),
]


WEIGHTS_ONLY = "assign-precision{scheme=%s,target=vllm-ascend%s},quantize-weights{method=round},lower-linears"
FROM_WEIGHTS: list[tuple[dict[str, Any], str]] = [
    ({"scheme": "w8a16"}, WEIGHTS_ONLY % ("W8A16", ",fallback=none")),
    ({"scheme": "w8a16", "fallback": "reference"}, WEIGHTS_ONLY % ("W8A16", "")),
    ({"scheme": "w8a8_dynamic", "anti_method": "none", "weight_method": "round"}, WEIGHTS_ONLY % ("W8A8_DYNAMIC", "")),
    ({"scheme": "w4a8", "anti_method": "none", "weight_method": "round"}, WEIGHTS_ONLY % ("W4A8_DYNAMIC", "")),
]


@pytest.mark.parametrize(("given", "text"), FROM_WEIGHTS, ids=[str(given) for given, _ in FROM_WEIGHTS])
def test_presets_without_samples(given: dict[str, Any], text: str) -> None:
    """Catches a pass that needs samples where none are given, and one that is left out although they are."""
    assert pipeline_text(Options.without_paths(**given)) == "rotate-residual,rotate-heads," + text
    for options, ready in (({**given, "calib_images": "images"}, False), (given, True)):
        with_samples = pipeline_text(Options.without_paths(**options), ready_samples=ready)
        assert "insert-observers" in with_samples
        check_order(parse_pipeline(with_samples))


ROTATIONS = {
    "auto": "rotate-residual,rotate-heads,",
    "none": "",
    "heads": "rotate-heads,",
    "all": "rotate-residual{untie=true},rotate-heads,",
}


@pytest.mark.parametrize(("given", "text"), PRESETS, ids=[str(given) for given, _ in PRESETS])
def test_presets(given: dict[str, Any], text: str) -> None:
    """Catches an option that is not passed on to its pass, and passes in an invalid order."""
    built = pipeline_text(Options.without_paths(**given))
    first = ROTATIONS[given.get("rotate", "auto")] + "split-window-attention,"
    assert built == ("" if "pipeline" in given else first) + text
    assert print_pipeline(parse_pipeline(built)) == built
    if "pipeline" not in given:
        check_order(parse_pipeline(built))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"kv_cache": "int8"},
        {"float_as": "w8a16"},
        {"scheme": "w8a8_dynamic", "target": "mindie@2.2"},
        {"scheme": "w4a8"},
        {"fallback": "auto", "min_sqnr": 30},
    ],
    ids=str,
)
def test_target_of_a_printed_pipeline(given: dict[str, Any]) -> None:
    """Catches passes that chose schemes for one engine, or quantize the cache, and a folder for another one."""
    options = Options.without_paths(**given)
    assert resolve_target(options, build_pipeline(options)) is options
    printed = Options.without_paths(pipeline=pipeline_text(options))
    assert resolve_target(printed, build_pipeline(printed)).engine_target == options.engine_target
    named = Options.without_paths(pipeline=pipeline_text(options), target="mindie")
    assert resolve_target(named, build_pipeline(named)) is named


def test_target_of_a_pipeline_with_a_quantized_cache() -> None:
    """Catches a folder for an engine that does not run the cache, of passes that name no engine."""
    text = "insert-observers{caches=true},assign-precision," + END.replace("lower", "quantize-cache,lower")
    options = Options.without_paths(pipeline=text + ",lower-cache")
    assert resolve_target(options, build_pipeline(options)).engine_target == "vllm-ascend"
