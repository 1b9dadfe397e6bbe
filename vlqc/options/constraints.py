"""Checks combinations of option values, before anything is loaded.

Those of --scheme with the flags of the original script are in `scheme_flags`.
"""

from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

from vlqc.errors import Fault, UserError
from vlqc.files import read_json_object
from vlqc.options.fields import OptionFields, option_text
from vlqc.options.scheme_flags import FLAGS, scheme_fix
from vlqc.targets.engine import join_and, join_or, refused_heads
from vlqc.targets.schemes import DEFAULT_SCHEME, Scheme, option_name
from vlqc.targets.target import BOTH, ENGINES, engine_of_option, parse_target

GOALS = "--min_sqnr DB, --max_float_groups NUMBER and --max_bytes BYTES"


def combination_faults(options: OptionFields, illegal: Set[str] = frozenset()) -> list[Fault]:
    """Every invalid combination, each with the flags to change.

    illegal: options with an illegal value. Rules that depend on them are skipped, because they would report the same
    mistake again.
    """
    return [fault for names, rule in RULES if not names & illegal for fault in rule(options)]


def _ranges(options: OptionFields) -> Iterator[Fault]:
    if options.scheme.spec.weight.per_group and options.act_method == 3:
        what = f"--act_method 3 with {options.scheme}"
        yield Fault(what, why="it has no static ranges to choose between", fix="use --act_method 1 or --act_method 2")


def _group(options: OptionFields) -> Iterator[Fault]:
    engine = engine_of_option(options)
    flag = f"--{engine.layout_option}" if engine else f"--target {options.target}"
    sizes = options.layout.group_sizes
    if options.scheme.spec.weight.per_group and sizes and options.group_size not in sizes:
        why = f"{options.layout.title} supports the group sizes {', '.join(str(size) for size in sizes if size)}"
        yield Fault(f"--group_size {options.group_size} with {flag}", why=why, fix=f"use --group_size {max(sizes)}")


def _one_layout(options: OptionFields) -> Iterator[Fault]:
    engine = engine_of_option(options)
    if engine is not None and options.target is not None and options.layout is not engine:
        flag = f"--{engine.layout_option}"
        why = f"only {engine.title} loads the layout of {flag}"
        yield Fault(f"{flag} with --target {options.target}", why=why, fix=f"remove {flag} or --target")


def _both(options: OptionFields) -> Iterator[Fault]:
    if options.target == BOTH and not _static(options):
        why = "a folder that both engines load is possible for static W8A8 only"
        fix = f"use --target {ENGINES[0].name}, or {_static_scheme(options)}"
        yield Fault("--target both", why=why, fix=fix)


def _alpha(options: OptionFields) -> Iterator[Fault]:
    if options.anti_alpha is not None and options.anti_method != "m4":
        what = f"--anti_alpha {options.anti_alpha:g} with --anti_method {options.anti_method}"
        yield Fault(what, why="only m4 uses it", fix="remove --anti_alpha, or use --anti_method m4")


def _shift(options: OptionFields) -> Iterator[Fault]:
    if not options.shift:
        return
    if options.target == BOTH:
        why = "the engines expect the bias of a norm under different names"
        yield Fault(
            "--shift with --target both", why=why, fix=f"use --target {' or '.join(each.name for each in ENGINES)}"
        )
    if not _static(options):
        why = "engines apply the bias of a norm before static W8A8 layers only"
        fix = f"remove --shift, or use {_static_scheme(options)}"
        yield Fault("--shift", why=why, fix=fix)
    if options.anti_method == "none":
        why = "ranges are shifted as a part of outlier suppression"
        yield Fault("--shift with --anti_method none", why=why, fix="remove --shift, or use --anti_method m2")
    if options.max_bytes is not None:
        why = "a layer that reads a shifted norm keeps its scheme, and which norms are shifted depends on the samples"
        yield Fault(
            f"--shift with --max_bytes {options.max_bytes}", why=why, fix="remove --shift, or use --min_sqnr DB"
        )


def _scope(options: OptionFields) -> Iterator[Fault]:
    if options.w4a8_scope != "engine" and not options.scheme.spec.weight.per_group:
        grouped = next(scheme for scheme in Scheme if scheme.spec.weight.per_group)
        what = f"--w4a8_scope {options.w4a8_scope} with {options.scheme}"
        fix = f"remove --w4a8_scope, or use {scheme_fix(grouped, options, options.model_fields_set)}"
        yield Fault(what, why="it selects the layers with 4-bit weights", fix=fix)


def _fallback(options: OptionFields) -> Iterator[Fault]:
    """--fallback auto needs exactly one goal, and other values of --fallback have none."""
    goals = {
        f"--min_sqnr {options.min_sqnr or 0:g}": options.min_sqnr is not None,
        f"--max_float_groups {options.max_float_groups}": options.max_float_groups is not None,
        f"--max_bytes {options.max_bytes}": options.max_bytes is not None,
    }
    flags = [flag for flag, is_set in goals.items() if is_set]
    if options.fallback == "auto" and len(flags) != 1:
        what = " with ".join(["--fallback auto", *flags])
        why = "it needs a goal" if not flags else "it has only one goal"
        yield Fault(what, why=why, fix=f"use one of {GOALS}")
    elif options.fallback != "auto" and flags:
        what = f"{' with '.join(flags)} with --fallback {options.fallback}"
        yield Fault(what, why="only --fallback auto has a goal", fix="add --fallback auto")


def _cache(options: OptionFields) -> Iterator[Fault]:
    """A quantized cache in a model without one, or in an engine that has none of any version."""
    if options.cache_scheme is None:
        return
    from vlqc.families.registry import find_family

    family = find_family(config_of(options.model_path))
    if family is None:  # an error when the checkpoint is opened
        return
    flag = f"--kv_cache {options.kv_cache}"
    if not family.key_value:
        why = f"vlqc does not know the key and value projections of {family.title} (`key_value` of its family)"
        yield Fault(flag, why=why, fix=f"remove {flag}")
        return
    target, by_option = parse_target(options.engine_target), engine_of_option(options)
    refusing = [engine for engine in target.engines if not engine.cache_rules_of(family)]
    others = [engine.name for engine in ENGINES if engine.cache_rules_of(family)]
    if refusing:
        used = f"--{by_option.layout_option}" if by_option else f"--target {target}"
        why = f"no version of {join_and(engine.title for engine in refusing)} quantizes the cache of {family.title}"
        instead = f", or use --target {join_or(others)}" if others else ""
        yield Fault(f"{flag} with {used}", why=why, fix=f"remove {flag}{instead}")
    config = config_of(options.model_path)
    for fault in (fault for engine in target.engines for fault in refused_heads(engine, family, config)):
        yield Fault(flag, "config.json", f"{fault.what}, and {fault.why}", f"remove {flag}")


def _float_as(options: OptionFields) -> Iterator[Fault]:
    """A scheme in place of float that an engine of the target runs on no layer: the option would have no effect."""
    if not options.float_as.is_quantized:
        return
    from vlqc.families.registry import find_family
    from vlqc.targets.advice import missing_rows_fix
    from vlqc.targets.rules import supports_scheme

    family = find_family(config_of(options.model_path))
    if family is None:  # an error when the checkpoint is opened
        return
    target, by_option = parse_target(options.engine_target), engine_of_option(options)
    refusing = [
        target.title(engine)
        for engine in target.engines
        if not supports_scheme(target.only(engine), family, options.float_as)
    ]
    if not refusing:
        return
    others = [engine.name for engine in ENGINES if supports_scheme(engine, family, options.float_as)]
    used = f"--{by_option.layout_option}" if by_option else f"--target {target}"
    flag = f"--float_as {option_name(options.float_as)}"
    do_not = "does not" if len(refusing) == 1 else "do not"
    why = f"{join_and(refusing)} {do_not} run {options.float_as} of {family.title}"
    other = missing_rows_fix(family) or f"use --target {join_or(others)}" + (f" instead of {used}" if by_option else "")
    yield Fault(f"{flag} with {used}", why=why, fix=f"remove {flag}, or {other}")


def _float_as_in_search(options: OptionFields) -> Iterator[Fault]:
    """A search that may choose every scheme has those in place of float among them."""
    goals = [name for name in ("min_sqnr", "max_bytes") if getattr(options, name) is not None]
    if options.fallback == "auto" and options.float_as.is_quantized and goals:
        flag = f"--float_as {option_name(options.float_as)}"
        why = f"with --{goals[0]}, {options.float_as} is one of the schemes among which the search chooses"
        other = "" if options.target else f" and add --target {options.engine_target}"
        yield Fault(f"{flag} with --fallback auto", why=why, fix=f"remove {flag}{other}")


def _strict(options: OptionFields) -> Iterator[Fault]:
    """Incompatibilities of the scheme itself. --exclude may avoid them, so with it the plan of the layers decides."""
    if not options.strict_target or options.exclude:
        return
    from vlqc.families.registry import find_family
    from vlqc.targets.advice import incompatibilities, missing_rows_fix

    family = find_family(config_of(options.model_path))
    if family is None:  # an error when the checkpoint is opened
        return
    for sentence in incompatibilities(
        options.engine_target,
        family,
        options.scheme,
        scope=options.w4a8_scope,
        cache=options.cache_scheme,
        float_as=options.float_as,
    ):
        other = missing_rows_fix(family) or "use another --target, --scheme or --w4a8_scope"
        fix = f"remove --strict_target, or {other}"
        target = parse_target(options.engine_target).text
        yield Fault(f"--strict_target with {options.scheme} for {target}", why=sentence, fix=fix)


def config_of(model_path: Path) -> dict[str, Any]:
    """The object in config.json; empty if it cannot be read, which is an error when the checkpoint is opened."""
    try:
        config: dict[str, Any] = read_json_object(model_path / "config.json")
        return config
    except UserError:
        return {}


def _pipeline(options: OptionFields) -> Iterator[Fault]:
    """Options that select passes, or their options, beside --pipeline, whose text says both."""
    for name in PASS_OPTIONS if options.pipeline is not None else ():
        value = getattr(options, name)
        if value != type(options).model_fields[name].default:
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else option_text(value)
            why = "--pipeline names the passes and their options, which this option would select"
            fix = f"remove --{name}, and write its passes and their options in --pipeline (`vlqc passes --explain`)"
            yield Fault(f"--{name} {shown} with --pipeline", why=why, fix=fix)


def _resume(options: OptionFields) -> Iterator[Fault]:
    if options.resume and options.start_over:
        why = "one resumes the interrupted run, the other deletes it"
        yield Fault("--resume with --start_over", why=why, fix="remove one of them")


def _layers(options: OptionFields) -> Iterator[Fault]:
    for pattern in sorted(set(options.exclude) & set(options.include)):
        what = f"--exclude {pattern} with --include {pattern}"
        yield Fault(what, why="they contradict each other", fix="remove --exclude or --include")


def _dumps(options: OptionFields) -> Iterator[Fault]:
    """Options of dumps without a dump."""
    if options.dump_ir is None and options.dump_formats != "text":
        yield Fault(f"--dump_formats {options.dump_formats}", why="nothing is dumped", fix="add --dump_ir FOLDER")
    if options.dump_ir is None and options.print_after is None and options.dump_stages:
        why = "nothing is dumped or printed"
        fix = "add --dump_ir FOLDER or --print_after PASS"
        yield Fault(f"--dump_stages {' '.join(options.dump_stages)}", why=why, fix=fix)


# The options that have no other effect than to select passes and their options.
PASS_OPTIONS = (
    "rotate", "anti_method", "anti_alpha", "act_method", "weight_method", "propagate", "modality_balance", "exclude",
    "include", "kv_cache", "float_as",
)  # fmt: skip

# The options that a rule depends on, and the rule.
SCHEME = frozenset({"scheme", *FLAGS})
LAYOUTS = frozenset(engine.layout_option for engine in ENGINES if engine.layout_option)
RULES: tuple[tuple[frozenset[str], Callable[[OptionFields], Iterator[Fault]]], ...] = (
    (SCHEME | {"act_method"}, _ranges),
    (SCHEME | LAYOUTS | {"group_size", "target"}, _group),
    (frozenset({"target", *LAYOUTS}), _one_layout),
    (SCHEME | {"target"}, _both),
    (frozenset({"anti_method", "anti_alpha"}), _alpha),
    (SCHEME | {"anti_method", "shift", "target", "max_bytes"}, _shift),
    (SCHEME | {"w4a8_scope"}, _scope),
    (frozenset({"fallback", "min_sqnr", "max_float_groups", "max_bytes"}), _fallback),
    (SCHEME | LAYOUTS | {"model_path", "target", "kv_cache"}, _cache),
    (SCHEME | LAYOUTS | {"model_path", "target", "float_as"}, _float_as),
    (SCHEME | LAYOUTS | {"target", "float_as", "fallback", "min_sqnr", "max_bytes"}, _float_as_in_search),
    (
        SCHEME | LAYOUTS | {"model_path", "target", "strict_target", "w4a8_scope", "exclude", "kv_cache", "float_as"},
        _strict,
    ),
    (frozenset({"exclude", "include"}), _layers),
    (frozenset({"pipeline", *PASS_OPTIONS}), _pipeline),
    (frozenset({"resume", "start_over"}), _resume),
    (frozenset({"dump_ir", "dump_stages", "dump_formats", "print_after"}), _dumps),
)


def _static(options: OptionFields) -> bool:
    return options.scheme.spec.takes_added_bias


def _static_scheme(options: OptionFields) -> str:
    """The option for static W8A8, and the flags to remove."""
    return scheme_fix(DEFAULT_SCHEME, options, options.model_fields_set)
