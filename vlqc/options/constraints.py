"""Which values of the options go together. Every other combination is refused before anything is loaded.

| scheme | flags |
|---|---|
| W8A8 static | w_bit 8, is_dynamic False, is_lowbit False |
| W8A8_DYNAMIC | w_bit 8, is_dynamic True, is_lowbit False |
| W4A8_DYNAMIC per group | w_bit 4, is_dynamic True, is_lowbit True, open_outlier False, act_method 1 or 2 |
"""

from collections.abc import Callable, Iterator, Set
from typing import TYPE_CHECKING

from vlqc.errors import Fault
from vlqc.targets.mindie import MINDIE
from vlqc.targets.target import BOTH

if TYPE_CHECKING:
    from vlqc.options.options import Options


def combination_faults(options: "Options", unreadable: Set[str] = frozenset()) -> list[Fault]:
    """Everything that does not go together, each fault with the flags to change.

    unreadable: options whose value could not be read; rules that look at them would only produce echoes, and are left
    out.
    """
    return [fault for names, rule in RULES if not names & unreadable for fault in rule(options)]


def _scheme(options: "Options") -> Iterator[Fault]:
    if options.w_bit == 4:
        needed = {
            "--is_dynamic True": options.is_dynamic,
            "--is_lowbit True": options.is_lowbit,
            "--open_outlier False": not options.open_outlier,
            "--act_method 1": options.act_method in (1, 2),
        }
        missing = [flag for flag, there in needed.items() if not there]
        if missing:
            why = "4-bit weights exist per group, with activations quantized per token (W4A8_DYNAMIC)"
            other = "--w_bit 8 --is_lowbit False" if options.is_lowbit else "--w_bit 8"
            yield Fault("--w_bit 4", why=why, fix=f"give {' '.join(missing)} too, or {other}")
    elif options.is_lowbit:
        why = "the low-bit algorithm makes 4-bit weights, and --w_bit is 8"
        fix = "give --is_lowbit False, or for 4-bit weights --w_bit 4 --is_dynamic True --open_outlier False"
        yield Fault("--is_lowbit True", why=why, fix=fix)


def _group(options: "Options") -> Iterator[Fault]:
    option = "--mindie_format" if options.mindie_format else f"--target {options.target}"
    sizes = options.layout.group_sizes
    if options.w_bit == 4 and sizes and options.group_size not in sizes:
        why = f"{options.layout.title} accepts the group sizes {', '.join(str(size) for size in sizes if size)}"
        yield Fault(f"--group_size {options.group_size} with {option}", why=why, fix=f"give --group_size {max(sizes)}")


def _one_layout(options: "Options") -> Iterator[Fault]:
    if options.mindie_format and options.target is not None and options.layout is not MINDIE:
        what = f"--mindie_format with --target {options.target}"
        why = "--mindie_format writes a folder that only MindIE loads"
        yield Fault(what, why=why, fix="leave out --mindie_format or --target")


def _both(options: "Options") -> Iterator[Fault]:
    if options.target == BOTH and not _static(options):
        why = "one folder for both engines exists for static W8A8 only"
        fix = "give --target vllm-ascend, or --w_bit 8 --is_dynamic False"
        yield Fault("--target both", why=why, fix=fix)


def _alpha(options: "Options") -> Iterator[Fault]:
    if options.anti_alpha is not None and options.anti_method != "m4":
        what = f"--anti_alpha {options.anti_alpha:g} with --anti_method {options.anti_method}"
        why = "only m4 computes scales with an exponent"
        yield Fault(what, why=why, fix="leave out --anti_alpha, or give --anti_method m4")


def _shift(options: "Options") -> Iterator[Fault]:
    if not options.shift:
        return
    if options.target == BOTH:
        why = "the engines look for the bias of a norm under different names"
        yield Fault("--shift with --target both", why=why, fix="give --target vllm-ascend, or --mindie_format")
    if not _static(options):
        why = "engines apply the bias of a norm in front of static W8A8 layers only"
        fix = "leave out --shift, or give --w_bit 8 --is_dynamic False --is_lowbit False"
        yield Fault("--shift", why=why, fix=fix)
    if options.anti_method == "none":
        why = "ranges are shifted while outliers are suppressed"
        yield Fault("--shift with --anti_method none", why=why, fix="leave out --shift, or give --anti_method m2")


def _scope(options: "Options") -> Iterator[Fault]:
    if options.w4a8_scope != "engine" and options.w_bit != 4:
        what = f"--w4a8_scope {options.w4a8_scope} with --w_bit {options.w_bit}"
        fix = "leave out --w4a8_scope, or give --w_bit 4 --is_dynamic True --is_lowbit True --open_outlier False"
        yield Fault(what, why="it chooses which layers get 4-bit weights", fix=fix)


def _fallback(options: "Options") -> Iterator[Fault]:
    """A search needs exactly one target, and a target means something to a search only."""
    targets = {
        f"--min_sqnr {options.min_sqnr or 0:g}": options.min_sqnr is not None,
        f"--max_float_groups {options.max_float_groups}": options.max_float_groups is not None,
    }
    given = [flag for flag, there in targets.items() if there]
    if options.fallback == "auto" and len(given) != 1:
        what = " with ".join(["--fallback auto", *given])
        why = "the search needs one target" if not given else "the search takes one target"
        yield Fault(what, why=why, fix="give --min_sqnr DB or --max_float_groups NUMBER")
    elif options.fallback != "auto" and given:
        what = f"{' with '.join(given)} with --fallback {options.fallback}"
        yield Fault(what, why="only a search has a target", fix="add --fallback auto")


def _strict(options: "Options") -> Iterator[Fault]:
    """What can be known of a target before the checkpoint is read, and without --exclude, which may make up for it."""
    if not options.strict_target or options.exclude:
        return
    from vlqc.targets.advice import incompatibilities

    for sentence in incompatibilities(options.engine_target, options.scheme, scope=options.w4a8_scope):
        fix = "leave out --strict_target, or choose another --target or scheme (--w_bit, --is_dynamic, --w4a8_scope)"
        yield Fault(f"--strict_target with {options.scheme} for {options.engine_target}", why=sentence, fix=fix)


def _resume(options: "Options") -> Iterator[Fault]:
    if options.resume and options.start_over:
        why = "one goes on with what an interrupted run has left, the other throws it away"
        yield Fault("--resume with --start_over", why=why, fix="leave out one of them")


def _layers(options: "Options") -> Iterator[Fault]:
    for pattern in sorted(set(options.exclude) & set(options.include)):
        what = f"--exclude {pattern} with --include {pattern}"
        yield Fault(what, why="a layer is quantized or it is not", fix="leave out --exclude or --include")


def _dumps(options: "Options") -> Iterator[Fault]:
    """Choices about what is not asked for."""
    if options.dump_ir is None and options.dump_formats != "text":
        why = "there is no folder to dump into"
        yield Fault(f"--dump_formats {options.dump_formats}", why=why, fix="add --dump_ir FOLDER")
    if options.dump_ir is None and options.print_after is None and options.dump_stages:
        why = "nothing is dumped or printed"
        fix = "add --dump_ir FOLDER or --print_after PASS"
        yield Fault(f"--dump_stages {' '.join(options.dump_stages)}", why=why, fix=fix)


# The options a rule looks at, and the rule.
SCHEME = frozenset({"w_bit", "is_dynamic", "is_lowbit", "open_outlier", "act_method"})
RULES: tuple[tuple[frozenset[str], Callable[["Options"], Iterator[Fault]]], ...] = (
    (SCHEME, _scheme),
    (frozenset({"w_bit", "group_size", "mindie_format", "target"}), _group),
    (frozenset({"mindie_format", "target"}), _one_layout),
    (frozenset({"w_bit", "is_dynamic", "target"}), _both),
    (frozenset({"anti_method", "anti_alpha"}), _alpha),
    (frozenset({"w_bit", "is_dynamic", "anti_method", "shift", "target"}), _shift),
    (frozenset({"w_bit", "w4a8_scope"}), _scope),
    (frozenset({"fallback", "min_sqnr", "max_float_groups"}), _fallback),
    (SCHEME | {"mindie_format", "target", "strict_target", "w4a8_scope", "exclude"}, _strict),
    (frozenset({"exclude", "include"}), _layers),
    (frozenset({"resume", "start_over"}), _resume),
    (frozenset({"dump_ir", "dump_stages", "dump_formats", "print_after"}), _dumps),
)


def _static(options: "Options") -> bool:
    return options.w_bit == 8 and not options.is_dynamic
