"""The interface of an inference engine: versions, rules, folder layout and notes.

An engine is a subclass of `Engine` in a file of its own, listed in `target.ENGINES`. No other module of vlqc contains
an engine's rules, file names or config keys.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from packaging.version import Version

from vlqc.errors import Fault
from vlqc.families.family import ModelFamily, Role
from vlqc.families.linear import Linear
from vlqc.targets.cache_schemes import CacheScheme
from vlqc.targets.caches import CacheSchemes, TensorScheme
from vlqc.targets.schemes import Scheme
from vlqc.targets.side_files import unread_files

# Key of the description, in every layout: every quant_bias has a mean error subtracted, a multiple of so many steps.
QUANT_BIAS_CORRECTION = "quant_bias_correction"
# Keys of the description, and of MindIE's quantization_config, for a quantized cache or attention.
CACHE_KEY = "kv_cache_type"
CACHE_KEYS = ("kv_quant_type", "fa_quant_type", CACHE_KEY)
COMPILE_AGAIN = "compile again"
PARALLEL_SIZES = (1, 2, 4, 8, 16)  # devices of tensor parallelism, at most those of one server
IGNORED_BIAS = "the engine would ignore this bias"


@dataclass(frozen=True)
class Rule:
    """The engine runs linear layers with one of `roles` in `scheme` from version `since` on, in versions below `before`
    (None: no known end). Several rules of the same roles and scheme give several ranges of versions.

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
class CacheRule:
    """The engine caches keys and values of decoder layers in `scheme` from version `since` on, in versions below
    `before` (None: no known end).

    dtypes: of the float tensors with which it does so; every_layer: whether it does so in every decoder layer as soon
    as the folder names the scheme, also in those without scales; head_multiple: channels of a head of keys and values
    must be a multiple of it.
    """

    scheme: CacheScheme
    since: str
    before: str | None = None
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    every_layer: bool = False
    head_multiple: int = 1


@dataclass(frozen=True)
class FolderContent:
    """What the description and config.json of a compiled folder depend on.

    family: of the model; schemes: tensor name -> scheme; scheme: the one that the compilation asked for; quant_type:
    the one that names the folder; options: of the compilation, by name.
    """

    family: ModelFamily
    schemes: Mapping[str, TensorScheme]
    scheme: Scheme
    quant_type: Scheme
    options: Mapping[str, Any]

    @property
    def cache_schemes(self) -> list[CacheScheme]:
        """The schemes of quantized keys and values, in the order of `CacheScheme`."""
        return [scheme for scheme in CacheScheme if scheme in self.schemes.values()]


class StoredTensor(Protocol):
    """A tensor of a weight file. dtype: safetensors code."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> Any:
        """The values as a NumPy array."""


@dataclass(frozen=True)
class FinishedFolder:
    """A finished folder, as `vlqc verify` reads it.

    layout: the engine whose description it has; files: names of all files; description, config: content of the JSON
    files, empty if they cannot be read; quant_type: the scheme that names the folder; schemes: by linear layer,
    embedding and convolution; embedding: of the tokens; linears: all linear layers of the model; norm_readers: norm
    without a bias of its own in the float model -> linear layers that read it; caches: of keys and values, by attention
    module.
    """

    path: Path
    layout: "Engine"
    family: ModelFamily
    files: Sequence[str]
    description_name: str
    description: Mapping[str, Any]
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    quant_type: Scheme
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    embedding: str = ""
    linears: Mapping[str, Linear] = field(default_factory=dict)
    norm_readers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    caches: CacheSchemes = field(default_factory=dict)

    def shifted_norms(self) -> list[str]:
        """The norms that got a bias by a folded shift."""
        return [norm for norm in self.norm_readers if f"{norm}.bias" in self.tensors]


class Engine(ABC):
    """Versions, rules and folder layout of one engine.

    name: on the command line; title: as its users write it; example_versions: for messages; layout_option: name of the
    option that selects its layout besides `--target`, empty for none; quantization_keys: of config.json, dotted, that
    say how a model is quantized; rules: which layers it runs in which scheme, by family; cache_rules: how it caches
    keys and values, likewise; group_sizes: that it accepts, 0 for scales without groups, empty for any; packs_int4:
    whether two rows of 4-bit weights share their bytes, with a scale_bias per layer; norm_bias_parts: parts of the
    model in which it adds the bias of a norm that the float model does not have; norm_copies: name of the submodule
    under which it wants the tensors of such a norm a second time, empty for none.

    transformers: (version of the engine, the oldest version of transformers that it and later ones are installed with),
    the earliest first; template_by_processor: whether it asks the processor for the chat template of models with
    images, and not the tokenizer.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    example_versions: ClassVar[str]
    layout_option: ClassVar[str] = ""
    quantization_keys: ClassVar[tuple[str, ...]] = ()
    rules: ClassVar[Mapping[str, tuple[Rule, ...]]]
    cache_rules: ClassVar[Mapping[str, tuple[CacheRule, ...]]] = {}
    group_sizes: ClassVar[tuple[int, ...]] = ()
    packs_int4: ClassVar[bool]
    norm_bias_parts: ClassVar[tuple[str, ...]] = ()
    norm_copies: ClassVar[str] = ""
    transformers: ClassVar[tuple[tuple[str, str], ...]] = ()
    template_by_processor: ClassVar[bool] = False

    def __repr__(self) -> str:
        return self.name

    def rules_of(self, family: ModelFamily) -> tuple[Rule, ...]:
        """The rules for models of a family; empty if the engine does not load them quantized."""
        return self.rules.get(family.engine_rows or family.name, ())

    def cache_rules_of(self, family: ModelFamily, head_size: int = 0) -> tuple[CacheRule, ...]:
        """The rules for the caches of models of a family; empty if it always caches in float.

        head_size: channels of a head, whose rules alone are returned; 0 if it is not known.
        """
        rules = self.cache_rules.get(family.engine_rows or family.name, ()) if family.key_value else ()
        return tuple(rule for rule in rules if head_size % rule.head_multiple == 0)

    def first_version(self, family: ModelFamily) -> str | None:
        """The first version that loads a quantized model of the family; None if no version does."""
        return min((rule.since for rule in self.rules_of(family)), key=Version, default=None)

    def transformers_versions(self, family: ModelFamily) -> tuple[tuple[str, str], ...]:
        """`transformers`, for models of a family."""
        return self.transformers

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

    # ---- writing a folder ------------------------------------------------------------------------------------------

    def folder_type(self, family: ModelFamily, schemes: Mapping[str, Scheme]) -> Scheme | None:
        """Scheme per layer -> the type that a folder must have for this engine; None if it does not read the type."""
        return None

    @abstractmethod
    def description_name(self, quant_type: Scheme) -> str:
        """File name of the description of a folder of this type."""

    @abstractmethod
    def find_description(self, files: Iterable[str]) -> str | None:
        """Names of all files of a folder -> that of the description in this engine's layout; None without one."""

    def description_header(self, content: FolderContent) -> dict[str, Any]:
        """Keys of the description in front of those of the tensors."""
        header: dict[str, Any] = {"model_quant_type": str(content.quant_type)}
        if content.quant_type.spec.weight.per_group:
            header["group_size"] = content.options["group_size"]
        return header

    def describes(self, family: ModelFamily, tensor: str) -> bool:
        """Whether the description has an entry for this tensor of the folder."""
        return True

    def edit_config(  # noqa: B027
        self, config: dict[str, Any], content: FolderContent, *, own_layout: bool
    ) -> None:
        """Adds to config.json, in place, the keys by which the engine finds the quantization.

        own_layout: whether the folder has this engine's layout, or that of the target's first engine.
        """

    # ---- a finished folder -----------------------------------------------------------------------------------------

    @abstractmethod
    def reads_config(self, family: ModelFamily, schemes: Mapping[str, Scheme], config: Mapping[str, Any]) -> bool:
        """Whether the engine, with this config.json, builds the layers of a folder in these schemes (per layer)."""

    def completed_config(self, folder: FinishedFolder) -> Mapping[str, Any] | None:
        """config.json with what some versions take from the description instead; None if none does, or all is there.
        `version_faults` names the other versions."""
        return None

    def is_named_in(self, config: Mapping[str, Any]) -> bool:
        """Whether config.json of a folder in another engine's layout was written for this engine, too."""
        return False

    def model_faults(self, family: ModelFamily, config: Mapping[str, Any]) -> list[Fault]:
        """Why the engine does not run a model of the family at all, whatever the schemes; [] if it does."""
        return []

    def config_faults(self, folder: FinishedFolder) -> list[Fault]:
        """Keys of config.json with which the engine does not find the quantization."""
        return []

    def header_faults(self, folder: FinishedFolder) -> list[Fault]:
        """Name and header of a description in this engine's layout."""
        return wrong_keys(folder, {"model_quant_type": str(folder.quant_type)})

    def description_faults(self, folder: FinishedFolder) -> list[Fault]:
        """Entries that the engine looks up in the description and does not find, or does not find as it needs them."""
        return []

    def description_warnings(self, folder: FinishedFolder) -> list[Fault]:
        """Entries that slow the engine down but do not change what it computes."""
        return []

    def tensor_faults(self, folder: FinishedFolder) -> list[Fault]:
        """Tensors that the engine would ignore or reject although their layer's scheme is right."""
        return []

    def cache_faults(self, folder: FinishedFolder) -> list[Fault]:
        """Keys of a description in this engine's layout by which engines would not cache keys and values as the tensors
        are made for."""
        return cache_faults(folder.description, folder.description_name)

    def group_size_entry(self, folder: FinishedFolder) -> tuple[str, str, Any]:
        """Where the engine reads the group size of 4-bit weights: the file, the key in it, and its value or None."""
        return folder.description_name, "group_size", folder.description.get("group_size")

    def parallel_sizes(self, grouped: Iterable[Linear], group_size: int) -> tuple[int, ...]:
        """Numbers of devices over which it shards linear layers whose weights have groups; not that of experts."""
        return PARALLEL_SIZES

    def group_size_warning(self, group_size: int) -> str:
        """Why the engine runs this group size slowly; empty if it does not."""
        return ""

    def side_file_faults(self, folder: FinishedFolder) -> dict[tuple[str, str | None], list[Fault]]:
        """Range of versions (the first one, and the first one after it or None) -> what their transformers does not
        read of the files beside the weights."""
        versions = self.transformers_versions(folder.family)
        ends = [*(since for since, _ in versions[1:]), None][: len(versions)]  # none for a family of another package
        return {
            (since, before): unread_files(
                folder.path, folder.family, transformers, by_processor=self.template_by_processor
            )
            for (since, transformers), before in zip(versions, ends, strict=True)
        }

    def version_faults(self, folder: FinishedFolder) -> dict[tuple[str, str | None], list[Fault]]:
        """Range of versions, as in `side_file_faults` -> what these versions do not find in a folder that others load;
        empty if there is no difference."""
        return {}

    def placement_faults(self, folder: FinishedFolder) -> list[Fault]:
        """Paths and file modes that the engine rejects in a folder of its own layout."""
        return []

    def placement_warnings(self, folder: FinishedFolder) -> list[Fault]:
        """Paths and file modes that the engine rejects and that a copy of the folder changes anyway."""
        return []

    def path_faults(self, folder: Path) -> list[Fault]:
        """Why the engine does not load a folder at this path, whatever it contains."""
        return []

    # ---- notes for the user ----------------------------------------------------------------------------------------

    @abstractmethod
    def serve_command(self, folder: str) -> str:
        """The command or setting with which the engine serves a folder."""

    def unsupported_where(self, family: ModelFamily, scheme: Scheme) -> str:
        """Where no version runs the scheme, such as " for vision-language models"; empty if there is nothing to add."""
        return ""

    def scheme_notes(self, family: ModelFamily, scheme: Scheme, group_size: int | None) -> list[str]:
        """Limits of a scheme in this engine that the user should know of before compiling."""
        return []

    def cache_notes(self, family: ModelFamily, scheme: CacheScheme) -> list[str]:
        """What the user should know of before compiling about keys and values in a scheme in this engine."""
        return []


def wrong_keys(folder: FinishedFolder, wanted: Mapping[str, Any]) -> list[Fault]:
    """Keys of the description whose value differs from the wanted one."""
    return [
        Fault(
            f"{key} is {folder.description.get(key)!r} instead of {value!r}",
            folder.description_name,
            "engines choose how to load the folder by it",
            f"set {key}",
        )
        for key, value in wanted.items()
        if folder.description.get(key) != value
    ]


def cache_faults(
    keys: Mapping[str, Any], where: str, prefix: str = "", allowed: Mapping[str, CacheScheme] | None = None
) -> list[Fault]:
    """Keys by which engines quantize keys and values, or attention, with scales that the folder does not have.

    prefix: of the keys in messages; allowed: values for which it has the scales, by key.
    """
    why = "engines quantize the key-value cache or attention by it, and the folder has no scales for that"
    return [
        Fault(f"unexpected key {prefix}{key}", where, why, "remove the key")
        for key in CACHE_KEYS
        if keys.get(key) and keys[key] != (allowed or {}).get(key)
    ]


def refused_heads(engine: Engine, family: ModelFamily, config: Mapping[str, Any]) -> list[Fault]:
    """The fault of keys and values whose heads no version of the engine quantizes, though it does those of other
    models of the family. config: config.json."""
    size = family.head_size(config)
    multiples = sorted({rule.head_multiple for rule in engine.cache_rules_of(family)})
    if not multiples or engine.cache_rules_of(family, size):
        return []
    why = f"{engine.title} quantizes the cache of heads with a multiple of {join_or(multiples)} channels only"
    what = f"the heads of keys and values have {size} channels"
    return [Fault(what, "config.json", why, "compile without --kv_cache")]


def missing_entry(folder: FinishedFolder, layer: str, why: str) -> Fault:
    """A linear layer or embedding without an entry in the description."""
    return Fault(f"{layer}.weight has no entry", folder.description_name, why, COMPILE_AGAIN)


def tied_head(engine: Engine, family: ModelFamily, config: Mapping[str, Any]) -> list[Fault]:
    """The fault of a tied output head, for a family of which the engine always loads the weight of the head."""
    if not family.is_tied(config):
        return []
    head = f"{family.output_head}.weight"
    why = f"{engine.title} loads {head} of {family.title} in any case, and a tied checkpoint has none"
    fix = (
        f"store a copy of the embedding as {head} in the float checkpoint, and set both as not tied in its config.json"
    )
    return [Fault("the output head is tied to the embedding", "config.json", why, f"{fix}; then compile again")]


def join_or(items: Iterable[object]) -> str:
    """(64, 128) -> "64 or 128"."""
    return " or ".join(map(str, items))


def join_and(items: Iterable[object]) -> str:
    """("a", "b", "c") -> "a, b and c"."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last
