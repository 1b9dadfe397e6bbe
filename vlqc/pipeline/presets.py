"""The pipeline that a compilation's options select."""

from collections.abc import Iterator, Sequence
from typing import Any

from vlqc.options.options import Options
from vlqc.pipeline.ordering import CALIBRATION, check_order, passes_needing_samples
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.registry import load_pass, parse_pipeline, print_pipeline
from vlqc.targets.cache_schemes import CacheScheme
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import BOTH, ENGINES, engine_of_option, parse_target

ACTIVATION_METHODS = {1: "minmax", 2: "histogram", 3: "automatic"}  # of --act_method
DATA_FREE = {"anti_method": "none", "weight_method": "round"}  # in place of the defaults
ONLY_WITH_SAMPLES = ("split-window-attention", "quantize-activations")  # without samples, they have nothing to do


def build_pipeline(
    options: Options, passes: Sequence[Pass] | None = None, *, ready_samples: bool = False
) -> list[Pass]:
    """The passes of a compilation: `passes` if provided, else those that the options select.

    ready_samples: whether samples are passed through Python.

    Raises:
        UserError: see `check_order` and `parse_pipeline`.
    """
    text = pipeline_text(options, ready_samples=ready_samples)
    pipeline = list(passes) if passes is not None else parse_pipeline(text)
    check_order(pipeline, precision_search=options.fallback == "auto")
    return pipeline


def pipeline_text(options: Options, *, ready_samples: bool = False) -> str:
    """The text of the pipeline that the options select, in normal form. ready_samples: see `build_pipeline`."""
    if options.pipeline is not None:
        return print_pipeline(parse_pipeline(options.pipeline))
    selected = _loaded(options)
    if not (ready_samples or options.names_samples):
        without = [step for step in _loaded(_without_samples(options)) if step.name != CALIBRATION]
        if not passes_needing_samples(without):
            selected = [step for step in without if step.name not in ONLY_WITH_SAMPLES]
    return print_pipeline(selected)


def predict_cache(passes: Sequence[Pass]) -> CacheScheme | None:
    """The scheme in which a pass quantizes keys and values; None if they stay float. Layers may be left out."""
    schemes = (getattr(step, "scheme", None) for step in passes)
    return next((CacheScheme(scheme) for scheme in schemes if scheme in tuple(CacheScheme)), None)


def resolve_target(options: Options, passes: Sequence[Pass]) -> Options:
    """The options, with the target of the passes if they set none: a single engine that the pass which chooses schemes
    names, and the same as with --kv_cache if a pass quantizes keys and values."""
    if options.target is not None or engine_of_option(options) is not None:
        return options
    default = parse_target(options.engine_target)
    named = (parse_target(getattr(step, "target", BOTH)) for step in passes if hasattr(step, "choose"))
    target = next((each for each in named if len(each.engines) == 1), default)
    if len(target.engines) > 1 and predict_cache(passes) is not None:
        target = parse_target(ENGINES[0].name)
    return options if target == default else options.model_copy(update={"target": str(target)})


def _loaded(options: Options) -> list[Pass]:
    return [load_pass(name)(**values) for name, values in _selected(options)]


def _without_samples(options: Options) -> Options:
    """The options for a compilation from the weights alone, if that is possible.

    With float activations the default methods are those that need no samples. Of other schemes, and of methods that
    were set, samples are a part: then some of the passes need them.
    """
    if options.scheme.spec.activation.is_quantized:
        defaults = {"weight_method": "gptq"} if options.weight_method == "auto" else {}
    else:
        defaults = {name: value for name, value in DATA_FREE.items() if name not in options.model_fields_set}
    return options.model_copy(update=defaults)


def search_substitutes(options: Options) -> list[Scheme]:
    """The schemes with which a search begins where the engine does not run the asked one, in this order.

    It measures quantized groups only; FLOAT is among their candidates. Weights are smoothed for the scheme at the
    beginning, so fewer bits than asked for come last. [] without a search, and for one that chooses FLOAT only.
    """
    if options.fallback != "auto" or options.max_float_groups is not None:
        return []
    asked, allowed = options.scheme, _searched(options)
    others = [
        scheme
        for scheme in Scheme
        if scheme.is_quantized and scheme.spec.has_one_arithmetic and (not allowed or scheme in allowed)
    ]
    bits = asked.spec.weight.bits
    return sorted(
        (scheme for scheme in others if scheme not in (asked, asked.substitute)),
        key=lambda scheme: (scheme.spec.weight.bits < bits, scheme.spec.cost),
    )


def _searched(options: Options) -> tuple[str, ...]:
    """The schemes that the search may choose besides FLOAT; empty for all. Others would be measured in vain."""
    asked = options.scheme
    if options.max_float_groups is not None:
        return (str(asked),)
    if options.max_bytes is not None:
        return ()
    # Fewer bits than those of the asked scheme do not reduce the error.
    enough = [scheme for scheme in Scheme if scheme.is_quantized and scheme.spec.weight.bits >= asked.spec.weight.bits]
    every = {scheme for scheme in Scheme if scheme.is_quantized}
    return () if set(enough) == every else tuple(map(str, enough))


def _selected(options: Options) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of a pass, its options)."""
    if options.rotate in ("auto", "all"):
        yield "rotate-residual", {"untie": options.rotate == "all"}
    if options.rotate != "none":
        yield "rotate-heads", {}
    yield "split-window-attention", {}
    yield "insert-observers", {"balance": options.modality_balance, "caches": options.cache_scheme is not None}
    yield (
        "assign-precision",
        {
            "scheme": str(options.scheme),
            "group_size": options.group_size,
            "target": options.engine_target,
            "scope": options.w4a8_scope,
            "fallback": "none" if options.fallback in ("none", "auto") else "reference",
            "exclude": options.exclude,
            "include": options.include,
            "float_as": str(options.float_as),
            "substitutes": tuple(map(str, search_substitutes(options))),
        },
    )
    if options.shift:
        yield "shift-norms", {}
    smoothing = {"clip": options.act_method != 1, "weights": options.weight_method}  # what smoothing optimizes for
    if options.anti_method == "m2":
        yield "smooth-m2", smoothing
    if options.anti_method == "m4":
        yield "smooth-m4", {"alpha": options.anti_alpha, **smoothing}
    yield "quantize-activations", {"method": ACTIVATION_METHODS[options.act_method]}
    yield "quantize-weights", {"method": options.weight_method}
    if options.fallback == "auto":
        yield (
            "measure-sensitivity",
            {
                "target": options.engine_target,
                "method": options.weight_method,
                "inputs": ACTIVATION_METHODS[options.act_method],
                "group_size": options.group_size,
                "schemes": _searched(options),
            },
        )
    if options.cache_scheme is not None:
        yield "quantize-cache", {"scheme": str(options.cache_scheme)}
    yield "lower-linears", {}
    if options.cache_scheme is not None:
        yield "lower-cache", {}
    if options.propagate == "quantized":
        yield "propagate-quantized", {}
