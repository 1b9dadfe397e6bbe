"""Builds the options of one compilation from user input, and reports every fault of it at once."""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vlqc.errors import Fault, UserError
from vlqc.families.registry import check_model_type, errors_of, find_family, load_family, register_family
from vlqc.files import trust_links
from vlqc.formatting import did_you_mean
from vlqc.options.constraints import combination_faults, config_of
from vlqc.options.fields import InvalidValue, OptionFields, default_value, flag_of, option_info
from vlqc.options.paths import path_faults
from vlqc.options.recipe import read_recipe
from vlqc.options.scheme_flags import (
    FLAGS,
    contradiction,
    flags_of_scheme,
    nearest_schemes,
    no_such_scheme,
    scheme_of_values,
)

NAME_PATTERNS = ("exclude", "include", "dump_stages")
UNNAMED = Path("unnamed")  # save folder of a command that writes none


class Options(OptionFields):
    """The checked options of one compilation. Build it with `Options.from_user`, which raises UserError."""

    @classmethod
    def from_user(cls, *, options: Self | None = None, **values: Any) -> Self:
        """Checks option values and builds the options.

        Args:
            options: options that were checked before. Returned unchanged; no values may accompany them.
            values: values by option name, with dashes or underscores, as text or as Python values. `recipe`: path of a
                YAML file with further values; those passed as arguments take precedence.

        Raises:
            UserError: with every fault, not only the first.
        """
        if options is not None:
            if values:
                names = ", ".join(values)
                raise UserError(Fault(f"options is passed together with {names}", fix="pass one of them"))
            return options
        checked, faults = cls._checked(*_merged(values))
        faults += path_faults(checked)
        if faults:
            raise UserError(*faults)
        return checked

    @classmethod
    def without_paths(cls, **values: Any) -> Self:
        """Like `from_user`, but model_path and save_directory may be missing and no path is checked."""
        named, origin = _merged(values)
        options, faults = cls._checked({"model_path": ".", "save_directory": ".", **named}, origin)
        if faults:
            raise UserError(*faults)
        return options

    @classmethod
    def without_saving(cls, *, occupied: bool = False, **values: Any) -> Self:
        """Like `from_user`, for commands that write no save folder: save_directory may be missing.

        occupied: whether a save folder that is named may contain files.
        """
        named, origin = _merged(values)
        options, faults = cls._checked({"save_directory": UNNAMED, **named}, origin)
        changes: dict[str, Any] = {} if "save_directory" in named else {"save_directory": None}
        faults += path_faults(options.model_copy(update=changes | ({"overwrite": True} if occupied else {})))
        if faults:
            raise UserError(*faults)
        return options

    @classmethod
    def _checked(cls, values: Mapping[str, Any], origin: Mapping[str, str] | None = None) -> tuple[Self, list[Fault]]:
        """Options and all faults except those of paths.

        Options with an illegal value get their default (None if they have none), so that all others can be checked.
        origin: file and line of the values that come from a recipe.
        """
        origin = origin or {}
        known = {name: value for name, value in values.items() if name in cls.model_fields}
        faults = [_unknown_option(name, origin.get(name, "")) for name in values if name not in known]
        try:
            options, illegal = cls(**known), set[str]()
        except ValidationError as error:
            details = [(str(detail["loc"][0]), detail) for detail in error.errors()]
            faults += [_fault_of(name, detail, origin.get(name, "")) for name, detail in details]
            illegal = {name for name, _ in details}
            legal = {name: value for name, value in known.items() if name not in illegal}
            required = {name: "." for name in illegal if cls.model_fields[name].is_required()}
            options = cls.model_validate(legal | required).model_copy(update=dict.fromkeys(required))
        options, scheme_faults = options._with_scheme(known.keys() - illegal, illegal, origin)
        faults += scheme_faults
        faults += _family_faults(options)  # registers it, for checks that depend on the model
        if options.follow_links and options.model_path is not None:
            trust_links(options.model_path)
        options = options.model_copy(update=_checkpoint_names(options))
        return options, faults + combination_faults(options, illegal)

    def _with_scheme(self, given: Set[str], illegal: Set[str], origin: Mapping[str, str]) -> tuple[Self, list[Fault]]:
        """Options whose scheme and flags agree: --scheme sets the flags; without it they select the scheme.

        And the fault of flags that contradict --scheme or select no scheme. Even then the options get one, so that all
        else can be checked. model_fields_set stays what the user set.

        given, illegal: names of the options that the user set to legal and to illegal values; origin: as of `_checked`.
        """
        faults: list[Fault] = []
        if "scheme" in given:
            scheme = self.scheme
            faults = contradiction(scheme, self, given, origin)
        else:
            selected = scheme_of_values(self)
            if selected is None and not illegal & {"scheme", *FLAGS}:
                faults = [no_such_scheme(self, given, origin)]
            scheme = selected or nearest_schemes(self, given)[0]
        values = vars(self) | {"scheme": scheme} | flags_of_scheme(scheme)
        if "fallback" not in given:
            values["fallback"] = default_value("fallback", scheme)
        if values == vars(self):
            return self, faults
        return type(self).model_construct(_fields_set=set(given), **values), faults


def _merged(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values by name with underscores, together with those of the recipe, and where the latter were read."""
    named = {name.replace("-", "_"): value for name, value in values.items()}
    if (recipe := named.pop("recipe", None)) is None:
        return named, {}
    entries = {name: entry for name, entry in read_recipe(recipe).items() if name not in named}
    return (
        {name: entry.value for name, entry in entries.items()} | named,
        {name: entry.where for name, entry in entries.items()},
    )


def _family_faults(options: OptionFields) -> list[Fault]:
    """Registers the family of --family. Faults if there is none, or it is incomplete or for another model type."""
    if options.family is not None:
        try:
            family = load_family(options.family)
            if options.model_path is not None:  # None: it is missing or invalid
                check_model_type(family, options.model_path)
            register_family(family)
        except UserError as error:
            return list(error.faults)
    return []


def _checkpoint_names(options: OptionFields) -> dict[str, tuple[str, ...]]:
    """The patterns of names; those of another transformers version become those of engines."""
    if options.model_path is None or not any(getattr(options, name) for name in NAME_PATTERNS):
        return {}
    family = find_family(config_of(options.model_path))
    if family is None:  # an error when the checkpoint is opened
        return {}
    with errors_of(type(family), "name_pattern"):
        return {name: tuple(dict.fromkeys(map(family.name_pattern, getattr(options, name)))) for name in NAME_PATTERNS}


def _unknown_option(name: str, where: str) -> Fault:
    fix = did_you_mean(flag_of(name), map(flag_of, Options.model_fields)) or "see vlqc compile --help"
    return Fault(f"there is no option {flag_of(name)}", where, fix=fix)


def _fault_of(name: str, detail: ErrorDetails, where: str) -> Fault:
    """An entry of pydantic's error list -> a fault that names the flag, the value and the legal values."""
    info = option_info(name)
    if detail["type"] == "missing":
        return Fault(f"{info.flag} is missing", where, "it has no default", f"add {info.flag} FOLDER")
    what = f"{info.flag} {detail['input']}"
    raised = detail.get("ctx", {}).get("error")
    if isinstance(raised, InvalidValue):
        return Fault(what, where, raised.why, raised.fix or f"legal values: {info.legal}")
    near = did_you_mean(str(detail["input"]), info.choices)
    return Fault(what, where, f"legal values of {info.flag}: {info.legal}", near or f"choose {info.legal}")
