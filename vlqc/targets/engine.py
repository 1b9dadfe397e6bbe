"""The interface of an inference engine: versions, rules, folder layout; `vllm_ascend` and `mindie` implement it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from packaging.version import Version

from vlqc.errors import Fault
from vlqc.families.family import ModelFamily, Role
from vlqc.targets.schemes import Scheme, quant_type

# Key of the description, in every layout: every quant_bias has a mean error subtracted, a multiple of so many steps.
QUANT_BIAS_CORRECTION = "quant_bias_correction"


@dataclass(frozen=True)
class Rule:
    """The engine runs linear layers with one of `roles` in `scheme` from version `since` on, in versions below `before`
    (None: no known end).

    dtypes: of the float tensors with which it does so.
    """

    scheme: Scheme
    roles: tuple[Role, ...]
    since: str
    before: str | None = None
    dtypes: tuple[str, ...] = ("bfloat16", "float16")

    def applies(self, version: Version | None, dtype: str | None) -> bool:
        """Whether the rule holds for a version (None: any) and a dtype (None: any)."""
        if dtype is not None and dtype not in self.dtypes:
            return False
        if version is None:
            return True
        return Version(self.since) <= version and (self.before is None or version < Version(self.before))


@dataclass(frozen=True)
class FolderContent:
    """What the description and config.json of a compiled folder depend on.

    family: of the model; schemes: tensor name -> scheme; scheme: the one that the compilation asked for; options: of
    the compilation, by name.
    """

    family: ModelFamily
    schemes: Mapping[str, Scheme]
    scheme: Scheme
    options: Mapping[str, Any]

    @property
    def quant_type(self) -> Scheme:
        """The scheme that names the folder."""
        return quant_type(self.schemes.values())


class Engine(ABC):
    """Versions, rules and folder layout of one engine.

    name: on the command line; title: as its users write it; example_versions: for messages; since: the first version
    that loads a quantized folder; rules: which layers it runs in which scheme, by family; group_sizes: that it accepts,
    0 for scales without groups, empty for any; packs_int4: whether two rows of 4-bit weights share their bytes, with a
    scale_bias per layer; norm_bias_parts: parts of the model in which it adds the bias of a norm; norm_copies: name of
    the submodule under which it wants the tensors of a norm with a bias a second time, empty for none.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    example_versions: ClassVar[str]
    since: ClassVar[str]
    rules: ClassVar[Mapping[str, tuple[Rule, ...]]]
    group_sizes: ClassVar[tuple[int, ...]] = ()
    packs_int4: ClassVar[bool]
    norm_bias_parts: ClassVar[tuple[str, ...]] = ()
    norm_copies: ClassVar[str] = ""

    def __repr__(self) -> str:
        return self.name

    def rules_of(self, family: ModelFamily) -> tuple[Rule, ...]:
        """The rules for models of a family; empty if the engine does not load them quantized."""
        return self.rules.get(family.engine_rows or family.name, ())

    def supported_schemes(
        self, family: ModelFamily, layer: str, version: Version | None, dtype: str | None
    ) -> set[Scheme]:
        """Checkpoint layer name -> the schemes in which the engine runs it, FLOAT always among them."""
        applicable = (rule for rule in self.rules_of(family) if rule.applies(version, dtype))
        return {Scheme.FLOAT} | {rule.scheme for rule in applicable if family.role(layer) in rule.roles}

    # ---- rules about several layers --------------------------------------------------------------------------------

    def group_faults(self, family: ModelFamily, schemes: Mapping[str, Scheme]) -> list[Fault]:
        """Scheme per checkpoint layer name -> combinations of schemes that the engine does not run together."""
        return []

    def runs_unfused(self, family: ModelFamily, schemes: Mapping[str, Scheme]) -> bool:
        """Whether it runs the members of one fused group, which have these schemes, each on its own."""
        return False

    # ---- the folder ------------------------------------------------------------------------------------------------

    @abstractmethod
    def description_name(self, quant_type: Scheme) -> str:
        """File name of the description of a folder of this type."""

    @abstractmethod
    def description_header(self, quant_type: Scheme) -> dict[str, Any]:
        """Keys of the description in front of those of the tensors."""

    def edit_config(  # noqa: B027
        self, config: dict[str, Any], content: FolderContent, *, own_layout: bool
    ) -> None:
        """Adds to config.json, in place, the keys by which the engine finds the quantization.

        own_layout: whether the folder has this engine's layout, or that of the target's first engine.
        """

    @abstractmethod
    def reads_config(self, family: ModelFamily, schemes: Mapping[str, Scheme], config: Mapping[str, Any]) -> bool:
        """Whether the engine, with this config.json, builds the layers of a folder in these schemes (per layer)."""

    # ---- notes for the user ----------------------------------------------------------------------------------------

    @abstractmethod
    def serve_command(self, folder: str) -> str:
        """The command or setting with which the engine serves a folder."""

    def unsupported_where(self, family: ModelFamily, scheme: Scheme) -> str:
        """Where no version runs the scheme, such as " for vision-language models"; empty if there is nothing to add."""
        return ""

    def scheme_notes(self, scheme: Scheme, group_size: int | None) -> list[str]:
        """Limits of a scheme in this engine that the user should know of before compiling."""
        return []


def join_or(items: Iterable[object]) -> str:
    """(64, 128) -> "64 or 128"."""
    return " or ".join(map(str, items))
