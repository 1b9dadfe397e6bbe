"""The interface of a model family: names, parts, groups, config.json and inputs of models of one architecture.

A family is a subclass of `ModelFamily` in a file of its own, listed in `registry.FAMILIES`. No other module of vlqc
contains a layer name, a config key or an input name of a model.
"""

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from vlqc.families.config_meaning import config_meaning
from vlqc.families.inputs.input_format import ImageFormat, TextFormat, VideoFormat
from vlqc.families.layer_names import matches_any

if TYPE_CHECKING:  # torch-free: the command line imports this module for its help
    from torch import nn

    from vlqc.families.inputs.text_inputs import TextInputs


class Role(StrEnum):
    """What a linear layer computes within its block. Engines' rules are stated in terms of roles."""

    VISION_QKV = "query, key and value projection of a vision block"
    VISION_PROJ = "output projection of the attention of a vision block"
    VISION_UP = "first linear layers of the MLP of a vision block"
    VISION_DOWN = "last linear layer of the MLP of a vision block"
    MERGER = "linear layers of a patch merger"
    QKV = "query, key and value projections of a decoder layer"
    OUT = "output projection of the attention of a decoder layer"
    UP = "gate and up projections of a decoder layer"
    DOWN = "down projection of a decoder layer"
    EXPERT_UP = "gate and up projections of an expert"
    EXPERT_DOWN = "down projection of an expert"
    ROUTER = "router of a mixture of experts"


VISION_ROLES = (Role.VISION_QKV, Role.VISION_PROJ, Role.VISION_UP, Role.VISION_DOWN)
DECODER_ROLES = (Role.QKV, Role.OUT, Role.UP, Role.DOWN)
EXPERT_ROLES = (Role.EXPERT_UP, Role.EXPERT_DOWN)

DTYPE_KEYS = ("torch_dtype", "dtype")  # of the dtype, in older and newer versions of transformers
LAYERS = 1 << 16  # names to remember: models with experts have some 20,000 linear layers, which rules go through often


class Part(StrEnum):
    """Part of a model, in the order of the forward. OTHER is the output head, and names that no prefix matches."""

    VISION = "vision"
    MERGER = "merger"
    LANGUAGE = "language"
    OTHER = "other"


def dtype_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of config.json, or of an object in it, under one of DTYPE_KEYS."""
    return {key: config[key] for key in DTYPE_KEYS if key in config}


def part_title(part: str) -> str:
    """The heading of a part in the report."""
    titles = {Part.VISION: "Vision tower", Part.MERGER: "Merger", Part.LANGUAGE: "Language model"}
    return next((title for known, title in titles.items() if known == part), part)


@dataclass(frozen=True)
class TensorSlice:
    """A matrix [outputs, inputs] inside a stored tensor of three dimensions.

    `stored[index, begin:end]`, or if `transposed`, `stored[index, :, begin:end]` transposed.
    """

    index: int
    begin: int
    end: int
    transposed: bool

    def shape(self, stored: Sequence[int]) -> tuple[int, int]:
        """(outputs, inputs) of the matrix in a stored tensor of this shape."""
        return self.end - self.begin, stored[1] if self.transposed else stored[2]


class ModelFamily(ABC):
    """Models of one architecture. All names are checkpoint names, as `checkpoint_name` returns them.

    name: of the rows in the engines' tables, and in messages; title: as its users write it; model_types: values of
    model_type in config.json; architectures: classes of transformers; transformers_version: the first one that has
    them; engine_rows: name of another family whose rows in the engines' tables apply, empty for its own.

    roles: glob patterns of linear layers by role; fused_groups: patterns of layers that engines multiply as one matrix:
    one input, one scheme, one input scale; key_value: patterns of the key and of the value projection of decoder
    layers, from which cached keys and values come, empty if the cache is not to be quantized; reference_float: patterns
    of layers that the reference quantization tool keeps in float; row_parallel: last name components of layers that
    tensor parallelism shards along their inputs.

    parts: by prefix of names, the first that matches decides; subparts: titles by prefix, likewise, in the order of
    `vlqc inspect`; block_lists: prefixes of the lists of blocks, each followed by the number of a block; output_head:
    the output projection, which all engines run in float; vocabulary_key: of config.json, for the number of rows of the
    embedding and of the output head.

    config_objects: keys of config.json, in the form of `engine_config`, whose values are objects -> whether the key is
    required; renamed_config_keys: key in newer versions of transformers -> in older ones.

    text_format, image_format, video_format: of the inputs; image_format is None for text-only models, video_format for
    models without videos.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    architectures: ClassVar[tuple[str, ...]]
    transformers_version: ClassVar[str]
    engine_rows: ClassVar[str] = ""

    roles: ClassVar[Mapping[Role, tuple[str, ...]]]
    fused_groups: ClassVar[tuple[tuple[str, ...], ...]]
    key_value: ClassVar[tuple[str, ...]] = ()
    reference_float: ClassVar[tuple[str, ...]]
    row_parallel: ClassVar[tuple[str, ...]]

    parts: ClassVar[tuple[tuple[str, Part], ...]]
    subparts: ClassVar[tuple[tuple[str, str], ...]]
    block_lists: ClassVar[tuple[str, ...]]
    output_head: ClassVar[str] = "lm_head"
    vocabulary_key: ClassVar[str] = "vocab_size"

    config_objects: ClassVar[Mapping[str, bool]] = {}
    renamed_config_keys: ClassVar[Mapping[str, str]] = {}

    text_format: ClassVar[TextFormat] = TextFormat()
    image_format: ClassVar[ImageFormat | None] = None
    video_format: ClassVar[VideoFormat | None] = None

    def __repr__(self) -> str:
        return self.name

    # ---- names -------------------------------------------------------------------------------------------------------

    def checkpoint_name(self, name: str) -> str:
        """Name of a tensor or module in any transformers version -> the name that engines expect."""
        return name

    def module_name(self, path: str) -> str:
        """Path of a module in the module tree of any transformers version -> its checkpoint name."""
        return self.checkpoint_name(f"{path}.").removesuffix(".")

    def name_pattern(self, pattern: str) -> str:
        """A glob pattern of names in any transformers version -> of checkpoint names.

        Patterns that match checkpoint names as they are, are returned unchanged.
        """
        return self.checkpoint_name(pattern)

    def matrices(
        self, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]
    ) -> dict[str, dict[str, TensorSlice]]:
        """Stored tensors that hold the weights of several linear layers -> name and place of each of these.

        shapes: of all tensors of a checkpoint, by checkpoint name; config: content of config.json, which may be
        invalid.
        """
        return {}

    def prepare(self, model: "nn.Module") -> None:  # noqa: B027
        """Replaces modules of a transformers model on meta, in place, that do not consist of linear layers."""

    @functools.lru_cache(maxsize=LAYERS)  # noqa: B019  (families live as long as the process)
    def role(self, layer: str) -> Role | None:
        """Role of a linear layer; None for layers that no engine quantizes, such as the output head."""
        return next((role for role, patterns in self.roles.items() if matches_any(layer, patterns)), None)

    def layers(self, *roles: Role) -> tuple[str, ...]:
        """Patterns of the linear layers with these roles; without roles, of all."""
        return tuple(pattern for role in roles or self.roles for pattern in self.roles.get(role, ()))

    @functools.lru_cache(maxsize=LAYERS)  # noqa: B019
    def fused_group(self, layer: str) -> tuple[str, ...]:
        """All members of the fused group of a layer, in the engines' order; a layer on its own: itself."""
        for group in self.fused_groups:
            if matches_any(layer, group):
                parent = layer.rpartition(".")[0]
                return tuple(f"{parent}.{member.rpartition('.')[2]}" for member in group)
        return (layer,)

    def experts_of(self, layer: str) -> str | None:
        """The block among whose experts a layer is, which all get one scheme; None for other layers."""
        return (self.block(layer) or self.name) if self.role(layer) in EXPERT_ROLES else None

    def scheme_groups(self, layers: Iterable[str]) -> list[list[str]]:
        """Layers -> groups that must have one scheme, in their order: fused groups, and all experts of a block."""
        groups: dict[object, list[str]] = {}
        for layer in layers:
            groups.setdefault(self.experts_of(layer) or self.fused_group(layer), []).append(layer)
        return list(groups.values())

    def stays_float_in_reference(self, layer: str) -> bool:
        """Whether the reference quantization tool leaves this layer in float."""
        return matches_any(layer, self.reference_float)

    def is_row_parallel(self, layer: str) -> bool:
        """Whether tensor parallelism shards this linear layer along its inputs."""
        return layer.rpartition(".")[2] in self.row_parallel

    def part(self, name: str) -> Part:
        """Part of a layer, tensor or stage."""
        return next((part for prefix, part in self.parts if f"{name}.".startswith(prefix)), Part.OTHER)

    def subpart(self, name: str) -> str:
        """Title of the part of a tensor in `vlqc inspect`, one of `subparts` or "other"."""
        return next((part for prefix, part in self.subparts if name.startswith(prefix)), Part.OTHER)

    def in_vision_tower(self, name: str) -> bool:
        """Whether a layer or tensor belongs to the vision tower, its mergers included."""
        return self.part(name) in (Part.VISION, Part.MERGER)

    @property
    def vision_prefixes(self) -> tuple[str, ...]:
        """Prefixes of the names in the vision tower, its mergers included, none of which begins with another one."""
        prefixes = [prefix for prefix, part in self.parts if part in (Part.VISION, Part.MERGER)]
        return tuple(
            each for each in prefixes if not any(each != other and each.startswith(other) for other in prefixes)
        )

    def block(self, name: str) -> str | None:
        """The block of a layer or tensor, such as "model.layers.3"; None outside of the blocks."""
        for prefix in self.block_lists:
            if match := re.match(rf"{re.escape(prefix)}\d+(?=\.)", name):
                return match[0]
        return None

    def attends_in_windows(self, block: str, config: Any) -> bool:
        """Whether attention in a block of the vision tower is limited to windows. config: of a transformers model."""
        return False

    # ---- order of execution ------------------------------------------------------------------------------------------

    def stage_order(self, stages: Sequence[str], config: Mapping[str, Any]) -> list[str]:
        """Names of the stages in registration order -> in the order in which they run."""
        return list(stages)

    def outputs_read_later(self, stages: Sequence[str]) -> frozenset[str]:
        """Of the stages, in the order in which they run, those whose outputs not only the next stage reads."""
        return frozenset()

    # ---- the model ---------------------------------------------------------------------------------------------------

    def model_class(self, architecture: str) -> "type[nn.Module] | None":
        """The class of one of `architectures`; None if the installed version of transformers does not have it.

        It is built as transformers builds its own: `config_class.from_dict(config)`, `_from_config(config)`.
        """
        import transformers

        cls = getattr(transformers, architecture, None)
        return cls if isinstance(cls, type) else None  # transformers has a placeholder where a dependency is missing

    # ---- config.json -------------------------------------------------------------------------------------------------

    def engine_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json of any transformers version -> the form that engines expect. May return its argument."""
        return config

    def model_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json in the form of `engine_config` -> from which `model_class` is built. May return its argument."""
        return config

    def text_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The keys of the language model."""
        return config

    def vision_config(self, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The keys of the vision tower, the object in `config` itself; None if the model has none."""
        return None

    def head_size(self, config: Mapping[str, Any]) -> int:
        """Channels of an attention head of the language model; 0 if config.json does not determine it."""
        from vlqc.families.config_values import head_size

        return head_size(self.text_config(config))

    def extra_vision_outputs(self, config: Mapping[str, Any]) -> int:
        """How many outputs of the vision tower the language model reads besides that of the last block."""
        return 0

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the output head shares the embedding's weight."""
        return bool(config.get("tie_word_embeddings", False))

    def untie(self, config: dict[str, Any]) -> None:
        """Writes into config.json, in place, that the output head has a weight of its own."""
        config["tie_word_embeddings"] = False
        for key in self.config_objects:
            if isinstance(nested := config.get(key), dict) and "tie_word_embeddings" in nested:
                nested["tie_word_embeddings"] = False

    def checkpoint_faults(self, config: Mapping[str, Any], names: Collection[str]) -> list[tuple[str, str]]:
        """What config.json, as it is stored, and the names of the stored tensors say differently, and what to change;
        [] if nothing."""
        return []

    def config_meaning(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What config.json of any transformers version says, by dotted key; equal for files that mean the same.

        It does not use `engine_config`, so that `verify` finds a mistake there.
        """
        return {"architectures": list(self.architectures[:1])} | config_meaning(config, self.renamed_config_keys)

    def image_tokens(self, config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
        """Tokens of images and videos: key of config.json -> the token in the tokenizer, and the id in config.json."""
        images, videos = self.image_format, self.video_format
        if images is None:
            return {}
        tokens = {
            "image_token_id": images.image_token,
            "vision_start_token_id": images.vision_start,
            "vision_end_token_id": images.vision_end,
        }
        if videos is not None:
            tokens["video_token_id"] = videos.video_token
        return {key: (token, config[key]) for key, token in tokens.items() if config.get(key) is not None}

    def patch_faults(self, settings: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
        """Sizes in the settings of the image processor that are not those of the vision tower; [] if there are none.

        Where config.json has no size, image tokens must have the side that the family has by default.
        """
        vision, images = self.vision_config(config) or {}, self.image_format
        keys = {
            "patch_size": "patch_size",
            "merge_size": "spatial_merge_size",
            "temporal_patch_size": "temporal_patch_size",
        }
        sizes = {setting: vision[key] for setting, key in keys.items() if vision.get(key) is not None}
        faults = [
            f"{setting} is {settings[setting]!r}; config.json has {size!r}"
            for setting, size in sizes.items()
            if settings.get(setting) is not None and settings[setting] != size
        ]
        patch, merge = (sizes.get(key, settings.get(key)) for key in ("patch_size", "merge_size"))
        if images is not None and not faults and isinstance(patch, int) and isinstance(merge, int):
            side, wanted = patch * merge, images.token_side
            if side != wanted:
                faults.append(f"patch_size {patch} and merge_size {merge}: a side of {side} pixels, not {wanted}")
        return faults

    @abstractmethod
    def config_values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Values of config.json that identify the model, by the label under which `vlqc inspect` shows them."""

    @abstractmethod
    def config_schema(self) -> Any:
        """pydantic TypeAdapter of the keys of config.json, validated with a `ConfigLimits` as context."""

    @abstractmethod
    def config_limits(self, config: Mapping[str, Any], largest: int, tensors: int) -> Any:
        """Limits for a config that may be invalid. largest: largest dimension of any tensor; tensors: their number."""

    def complete_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json with the values that the model's config class gives to missing keys, where these can be invalid
        for the checkpoint."""
        return dict(config)

    def dtypes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Keys of config.json that state the dtype of the float tensors -> their values, which must be equal.

        One key, with None, if there is none.
        """
        return dtype_keys(config) or {DTYPE_KEYS[0]: None}

    def set_dtype(self, config: dict[str, Any], dtype: str) -> None:
        """Writes the dtype of the float tensors, "bfloat16" or "float16", into config.json, in place."""
        config |= dict.fromkeys((DTYPE_KEYS[0], *dtype_keys(config)), dtype)

    # ---- inputs ------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def inputs(self) -> "TextInputs":
        """What the model's forward takes, and how samples are built, checked and compared. Imports torch."""
        if self.image_format is None:
            from vlqc.families.inputs.text_inputs import TextInputs

            return TextInputs(self.title, self.text_format)
        if self.video_format is None:
            from vlqc.families.inputs.image_inputs import ImageInputs

            return ImageInputs(self.title, self.text_format, self.image_format)
        from vlqc.families.inputs.video_inputs import VideoInputs

        return VideoInputs(self.title, self.text_format, self.image_format, self.video_format)
