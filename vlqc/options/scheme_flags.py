"""Translates between `--scheme NAME` and the flags of the original script that select a scheme.

Every scheme fixes the values of w_bit, a_bit, is_dynamic and is_lowbit, one with groups that of open_outlier, too:
`flags_of_scheme`. The flags of a scheme may be omitted beside `--scheme`, or agree with it.
"""

from collections.abc import Iterable, Mapping, Set
from typing import Any

from vlqc.errors import Fault
from vlqc.targets.schemes import Scheme, option_name

FLAGS = ("w_bit", "a_bit", "is_dynamic", "is_lowbit", "open_outlier")


def flags_of_scheme(scheme: Scheme) -> dict[str, Any]:
    """Flag -> the value that it has with this scheme; without open_outlier if the scheme does not depend on it."""
    weight, activation = scheme.spec.weight, scheme.spec.activation
    flags = {
        "w_bit": weight.bits,
        "a_bit": activation.bits,
        "is_dynamic": activation.is_dynamic,
        "is_lowbit": weight.per_group,
    }
    return flags | ({"open_outlier": False} if weight.per_group else {})


def scheme_of_values(values: Any) -> Scheme | None:
    """The scheme that the flags select, which are attributes of `values`; None if no scheme has these values."""
    return next((scheme for scheme in _selectable() if not _mismatches(scheme, values, FLAGS)), None)


def nearest_schemes(values: Any, given: Set[str]) -> list[Scheme]:
    """For flags that select no scheme, those that contradict the fewest flags that the user set; see `contradiction`.
    Those with the same bits come first."""
    distance = {scheme: len(_mismatches(scheme, values, given & set(FLAGS))) for scheme in _selectable()}
    nearest = [scheme for scheme in distance if distance[scheme] == min(distance.values())]
    others = {scheme: _mismatches(scheme, values, FLAGS) for scheme in nearest}
    return sorted(nearest, key=lambda scheme: [name in others[scheme] for name in FLAGS])


def contradiction(scheme: Scheme, values: Any, given: Set[str], origin: Mapping[str, str]) -> list[Fault]:
    """The fault of flags that contradict --scheme; [] if they agree.

    values: has the flags as attributes; given: names of the options that the user set; origin: file and line of those
    that come from a recipe.
    """
    names = _mismatches(scheme, values, (name for name in FLAGS if name in given))
    if not names:
        return []
    name, flags = option_name(scheme), flags_of_scheme(scheme)
    other = scheme_of_values(values)
    fix = f"remove {flag_text(names, values)}" + (f", or use --scheme {option_name(other)}" if other else "")
    return [
        Fault(
            f"--scheme {name} with {flag_text(names, values)}",
            _where(("scheme", *names), origin),
            f"{name} has {flag_text(names, flags)}",
            fix,
        )
    ]


def no_such_scheme(values: Any, given: Set[str], origin: Mapping[str, str]) -> Fault:
    """The fault of flags with which there is no scheme. values, given, origin: as of `contradiction`."""
    fields = type(values).model_fields
    changed = [name for name in FLAGS if getattr(values, name) != fields[name].default]
    nearest = nearest_schemes(values, given)
    fixes = [f"use {scheme_fix(scheme, values, given)}" for scheme in nearest]
    if len(changed) == 1:
        fixes.append(f"remove {flag_text(changed, values)}")
    whys = [f"{scheme} has {_text(flags_of_scheme(scheme))}" for scheme in nearest]
    why = f"no scheme has these values together: {'; '.join(whys)}"
    return Fault(flag_text(changed, values), _where(changed, origin), why, ", or ".join(fixes))


def scheme_fix(scheme: Scheme, values: Any, given: Set[str]) -> str:
    """The option that selects a scheme, and the flags that the user set and must remove. As of `contradiction`."""
    names = _mismatches(scheme, values, (name for name in FLAGS if name in given))
    return f"--scheme {option_name(scheme)}" + (f" instead of {flag_text(names, values)}" if names else "")


def flag_text(names: Iterable[str], values: Any) -> str:
    """ "--w_bit 4 --is_dynamic True". values: has the flags as attributes or keys."""
    read = values.__getitem__ if isinstance(values, Mapping) else lambda name: getattr(values, name)
    return _text({name: read(name) for name in names})


def _where(names: Iterable[str], origin: Mapping[str, str]) -> str:
    return ", ".join(dict.fromkeys(origin[name] for name in names if name in origin))


def _text(flags: Mapping[str, Any]) -> str:
    return " ".join(f"--{name} {value}" for name, value in flags.items())


def _selectable() -> list[Scheme]:
    """The schemes that flags alone select. They cannot say that the engine decides how it quantizes inputs."""
    return [
        scheme
        for scheme in Scheme
        if scheme.is_quantized and not (scheme.spec.activation.is_static and scheme.spec.activation.is_dynamic)
    ]


def _mismatches(scheme: Scheme, values: Any, names: Iterable[str]) -> list[str]:
    flags = flags_of_scheme(scheme)
    return [name for name in names if name in flags and getattr(values, name) != flags[name]]
