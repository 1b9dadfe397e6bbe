"""The options of `vlqc compile`: names, types, defaults, legal values and help texts.

The command line, the documentation and recipes are generated from this table. The module imports neither torch nor
transformers, so that `vlqc --help` is fast.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema

from vlqc.errors import UserError
from vlqc.formatting import did_you_mean
from vlqc.targets.cache_schemes import CacheScheme, cache_scheme_of_option
from vlqc.targets.engine import Engine
from vlqc.targets.schemes import DEFAULT_SCHEME, Scheme, find_scheme, floats, option_name
from vlqc.targets.target import BOTH, ENGINES, engine_of_option, parse_target

DATA, SCHEME, LAYERS, OUTPUT, RUNNING, DEBUGGING = PANELS = (
    "Model and calibration data",
    "Quantization",
    "Layer selection",
    "Output and engine",
    "Execution",
    "Debugging",
)
DUMP_FORMATS = ("text", "json", "onnx", "bundle")
CACHES = ("none", *(scheme.spec.option for scheme in CacheScheme))
SCHEME_NAMES = tuple(option_name(scheme) for scheme in Scheme if scheme.is_quantized)
FLOAT_NAMES = tuple(map(option_name, floats()))
LARGEST_INTEGER = 10**18 - 1
BYTE_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
# Layer names contain none of these characters, and the pipeline syntax uses them as separators.
NOT_IN_A_GLOB = re.compile(r"[\s,;{}]")


class InvalidValue(ValueError):
    """An illegal option value, with a reason and a suggestion."""

    def __init__(self, why: str, fix: str = "") -> None:
        self.why, self.fix = why, fix
        super().__init__(why)


def _integer(value: Any) -> Any:
    """Decimal text -> int. Python's own conversion would also accept "1_0", 8.5 and True."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,18}\s*", value):
        return int(value)
    if type(value) is not int:
        raise ValueError("not an integer")
    return value


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


def _byte_count(value: Any) -> Any:
    """A size in bytes: 5500000000, "5.5GB" (powers of 1000) or "5.5 GiB" (powers of 1024). Fractions of a byte are
    dropped."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", value)):
        number, unit = Fraction(match[1]), match[2].lower()
        if unit in BYTE_UNITS and (unit or number.denominator == 1):
            return int(number * BYTE_UNITS[unit])
    if type(value) is not int:
        raise InvalidValue("not a number of bytes", "pass a number of bytes, or a number with a unit: 5.5GiB, 5.5GB")
    return value


def _path(value: Any) -> Path:
    if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
        raise InvalidValue("not a path")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise InvalidValue(f"the home folder in this path is unknown: {error}") from error


def _none_word(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() == "none" else value


def _target(value: str) -> str:
    """The normal form of a target: `MindIE@2.2` -> mindie@2.2."""
    try:
        return str(parse_target(value))
    except UserError as error:
        raise InvalidValue(error.faults[0].why, error.faults[0].fix) from error


def _scheme(value: Any) -> Scheme:
    """A name or alias of a scheme that quantizes -> the scheme."""
    scheme = find_scheme(value) if isinstance(value, str) else None
    if scheme is None or not scheme.is_quantized:
        for cache in CacheScheme:
            stem = _as_name(value).removesuffix(cache.lower())
            if stem != _as_name(value) and find_scheme(stem):
                fix = f"use --scheme {stem} --kv_cache {cache.spec.option}"
                raise InvalidValue("the cache of keys and values has an option of its own", fix)
        names = [*SCHEME_NAMES, *(alias for each in Scheme for alias in each.spec.aliases)]
        raise InvalidValue("there is no such scheme", did_you_mean(_as_name(value), names))
    return scheme


def _in_place_of_float(value: Any) -> Scheme:
    scheme = find_scheme(value) if isinstance(value, str) else None
    if scheme not in floats():
        why = "it quantizes inputs" if scheme else "there is no such scheme"
        raise InvalidValue(why, did_you_mean(_as_name(value), FLOAT_NAMES))
    return scheme


def _as_name(value: Any) -> str:
    return str(value).lower().replace("-", "_")


def _glob(pattern: str) -> str:
    if not pattern or NOT_IN_A_GLOB.search(pattern):
        fix = "pass one pattern per option, for example '*.layers.3.*'"
        raise InvalidValue(f"{pattern!r} is not a glob pattern of names", fix)
    return pattern


def _as_tuple(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, str | Path) else value


def _without_duplicates(patterns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(patterns))


def _formats(value: str) -> str:
    """Formats separated by commas, without duplicates, in the order of the text."""
    formats = list(dict.fromkeys(word.strip().lower() for word in value.split(",") if word.strip()))
    for word in formats or [""]:
        if word not in DUMP_FORMATS:
            raise InvalidValue(f"unknown format {word!r}", did_you_mean(word, DUMP_FORMATS))
    return ",".join(formats)


def _cache(value: str) -> str:
    if value.lower() not in CACHES:
        raise InvalidValue("there is no such cache", did_you_mean(value, CACHES))
    return value.lower()


def _fallback(value: Any) -> Any:
    return "reference" if value == "seed" else value  # the name in earlier versions


Integer = BeforeValidator(_integer)
Number = BeforeValidator(_number)
Bits = Annotated[Literal[4, 8], Integer]
Count = Annotated[int, Field(ge=0, le=LARGEST_INTEGER), Integer]
PositiveCount = Annotated[int, Field(ge=1, le=LARGEST_INTEGER), Integer]
FrameCount = Annotated[int, Field(ge=2, le=LARGEST_INTEGER), Integer]  # a temporal step has two frames
ByteCount = Annotated[int, Field(ge=1, le=LARGEST_INTEGER), BeforeValidator(_byte_count)]
Share = Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False), Number]
Decibels = Annotated[float, Field(ge=0, le=100, strict=True, allow_inf_nan=False), Number]
Gibibytes = Annotated[float, Field(ge=0, le=100_000, strict=True, allow_inf_nan=False), Number]
OptionPath = Annotated[Path, BeforeValidator(_path)]
Glob = Annotated[str, AfterValidator(_glob)]
Globs = Annotated[tuple[Glob, ...], BeforeValidator(_as_tuple), AfterValidator(_without_duplicates)]
Paths = Annotated[tuple[OptionPath, ...], BeforeValidator(_as_tuple)]
SchemeName = Annotated[Scheme, PlainValidator(_scheme), WithJsonSchema({"type": "string"})]
FloatName = Annotated[Scheme, PlainValidator(_in_place_of_float), WithJsonSchema({"type": "string"})]
NoneWord = BeforeValidator(_none_word)  # "None" on a command line and in a recipe


def _option(default: Any, panel: str, description: str, **cli: Any) -> Any:
    """A field of `Options`. cli: what its `OptionInfo` cannot derive from its type."""
    return Field(default, description=description, json_schema_extra={"panel": panel, **cli})


class OptionFields(BaseModel):
    """Every option with its type, default, panel and help text. `options.Options` adds how they are checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # The fifteen options of the original script: names, defaults and values must not change.
    model_path: OptionPath = _option(
        ..., DATA, "Folder of the float checkpoint: config.json, safetensors weights, tokenizer files."
    )
    calib_images: OptionPath = _option(
        Path("../calibImages"),
        DATA,
        "Calibration data: a folder of images and videos, one of them, or a .jsonl or .json file of conversations with "
        "images and videos. At least 30 varied images are recommended. For a text-only model a file of conversations "
        "without images. Read if it is given, or if a pass needs samples; --scheme w8a16 needs none.",
    )
    save_directory: OptionPath = _option(
        ..., OUTPUT, "Output folder of the quantized checkpoint. Written only if the compilation succeeds."
    )
    part_file_size: Annotated[PositiveCount | None, NoneWord] = _option(
        None, OUTPUT, "Maximum size of one weight file, in GiB. Default: a single file."
    )
    w_bit: Bits = _option(8, SCHEME, "Number of bits per weight.")
    a_bit: Annotated[Literal[8, 16], Integer] = _option(8, SCHEME, "Number of bits per activation; 16: float.")
    device_type: Literal["cpu", "npu", "cuda"] = _option(
        "cpu", RUNNING, "Device of the forward passes and the quantization arithmetic."
    )
    trust_remote_code: bool = _option(False, DATA, "Allow model code from the checkpoint folder to run.")
    anti_method: Literal["m2", "m4", "none"] = _option(
        "m2",
        SCHEME,
        "Outlier suppression by smoothing scales: m2 searches the scales, m4 computes them in closed form "
        "(SmoothQuant), none disables smoothing, as --scheme w8a16 does without --calib_images. LoRA adapters of the "
        "float model do not fit smoothed weights; merge them with --lora.",
    )
    act_method: Annotated[Literal[1, 2, 3], Integer] = _option(
        2,
        SCHEME,
        "Range of static activations: 1 uses the minimum and maximum, 2 a histogram search, 3 whichever of the two has "
        "the smaller error in each group of layers.",
    )
    open_outlier: bool = _option(
        True, SCHEME, "Split weight outliers. Must be False with --is_lowbit True and has no effect otherwise."
    )
    is_dynamic: bool = _option(
        False, SCHEME, "Quantize activations per token at run time instead of with static scales."
    )
    is_lowbit: bool = _option(False, SCHEME, "Use the low-bit algorithm, which 4-bit weights require.")
    group_size: Annotated[Literal[64, 128, 256, 512], Integer] = _option(
        64, SCHEME, "Number of consecutive 4-bit weights in a row that share one scale."
    )
    mindie_format: bool = _option(
        False, OUTPUT, "Write the folder layout of MindIE instead of that of vLLM Ascend.", is_flag=True
    )

    # Options that the original script does not have.
    scheme: SchemeName = _option(
        DEFAULT_SCHEME,
        SCHEME,
        "Quantization scheme, in place of --w_bit, --a_bit, --is_dynamic, --is_lowbit and --open_outlier, which select "
        "one together. A value of these that contradicts it is an error. Upper case, dashes and w4a8 are accepted.",
        choices=SCHEME_NAMES,
    )
    dtype: Literal["auto", "bfloat16", "float16"] = _option(
        "auto",
        OUTPUT,
        "dtype of the float tensors of the result: auto keeps that of the float checkpoint, and makes bfloat16 of "
        "float32. Atlas 300I and 310P run float16 only.",
    )
    family: Annotated[str | None, NoneWord] = _option(
        None,
        DATA,
        "Model family as module:Class, for a model type that vlqc does not have. Its module is imported, and runs with "
        "your rights.",
        metavar="MODULE:CLASS",
    )
    target: Annotated[Annotated[str, AfterValidator(_target)] | None, NoneWord] = _option(
        None,
        OUTPUT,
        "Engine that loads the checkpoint: vllm-ascend, mindie or both; a version may follow, as in vllm-ascend@0.18 "
        "or mindie@2.2. Default: both for static W8A8, vllm-ascend for other schemes and with --kv_cache or "
        "--float_as; with --pipeline, the engine that its passes name.",
        metavar="ENGINE",
        legal="vllm-ascend, mindie or both, or one engine with @version",
    )
    strict_target: bool = _option(
        False, OUTPUT, "Raise an error instead of a warning if no version of the target loads a layer.", is_flag=True
    )
    anti_alpha: Annotated[Share | None, NoneWord] = _option(
        None,
        SCHEME,
        "Migration strength (SmoothQuant's alpha) of --anti_method m4: 0 leaves outliers in the activations, 1 moves "
        "them into the weights. Default: selected per edge.",
    )
    shift: bool = _option(
        False,
        SCHEME,
        "Also shift the range of each channel so that it is centered at zero, where the engine runs a norm with a "
        "bias.",
        is_flag=True,
    )
    modality_balance: bool = _option(
        True,
        SCHEME,
        "Weight the errors of text, image and video tokens equally, those that the samples have, regardless of their "
        "numbers. False weights every token equally.",
    )
    weight_method: Literal["auto", "round", "clip", "gptq"] = _option(
        "auto",
        SCHEME,
        "Rounding of weights: round rounds to nearest; clip also searches the clipping range of each row or group; "
        "gptq compensates the error of each column in the columns after it. auto selects gptq, or round for "
        "--scheme w8a16 without --calib_images.",
    )
    propagate: Literal["float", "quantized"] = _option(
        "float",
        SCHEME,
        "Inputs on which later stages are calibrated: the outputs of the float stages, or those of the "
        "quantized stages at the cost of a second forward pass per stage.",
    )
    kv_cache: Annotated[str, AfterValidator(_cache)] = _option(
        "none",
        SCHEME,
        "Cache of keys and values in the language model: none keeps it in float, int8 quantizes it, with a scale per "
        "channel of every head, which halves its memory. Layers in which it costs too much stay float.",
        choices=CACHES,
    )
    fallback: Annotated[Literal["reference", "none", "auto"], BeforeValidator(_fallback)] = _option(
        "reference",
        LAYERS,
        "Layers that stay in float: reference keeps those that the original script excludes (seed is another name for "
        "it); none keeps only those that the engine cannot load quantized, the default with float inputs (w8a16); auto "
        "chooses a scheme for every group of layers, among all that the engine runs there, by --min_sqnr, "
        "--max_float_groups or --max_bytes.",
    )
    min_sqnr: Annotated[Decibels | None, NoneWord] = _option(
        None,
        LAYERS,
        "Minimum signal-to-quantization-noise ratio of the logits, in dB, predicted for all groups together, that "
        "--fallback auto must reach. A group gets another scheme than the one asked for only where that is necessary.",
    )
    max_float_groups: Annotated[Count | None, NoneWord] = _option(
        None,
        LAYERS,
        "Maximum number of groups that --fallback auto keeps in float, those with the largest error first. Groups that "
        "the engine or --exclude keeps in float do not count.",
    )
    max_bytes: Annotated[ByteCount | None, NoneWord] = _option(
        None,
        LAYERS,
        "Maximum size of all weight files of the result, in bytes or with a unit, as in 5.5GiB or 5.5GB. --fallback "
        "auto chooses the schemes with the least error within it, however long they run.",
        metavar="BYTES",
        legal="a number of bytes, or a number with a unit such as 5.5GiB or 5.5GB",
    )
    float_as: FloatName = _option(
        Scheme.FLOAT,
        LAYERS,
        "What layers become that stay float by --fallback reference, or because the engine does not run the scheme "
        "there: float, or w8a16 (8-bit weights, float inputs) where the engine runs that. Layers of --exclude and "
        "routers stay float.",
        choices=FLOAT_NAMES,
    )
    exclude: Globs = _option(
        (),
        LAYERS,
        "Keep these layers in float: a glob pattern of layer names. May be repeated. Layers that must have one scheme "
        "with them stay float, too: the other members of a fused group, and all experts of a layer.",
        metavar="GLOB",
    )
    include: Globs = _option(
        (),
        LAYERS,
        "Quantize these layers although --fallback reference keeps them in float: a glob pattern of layer names. May "
        "be repeated.",
        metavar="GLOB",
    )
    w4a8_scope: Literal["engine", "all"] = _option(
        "engine",
        LAYERS,
        "Layers with 4-bit weights: engine selects those that the engine supports; all selects every quantized layer, "
        "like the original script.",
    )
    rotate: Literal["auto", "none", "heads", "all"] = _option(
        "auto",
        SCHEME,
        "Rotations that spread outliers over all channels and cancel in the weights around them: auto rotates residual "
        "streams and attention heads, except a stream whose output head shares the embedding's weight; all rotates it, "
        "too, and stores the head separately; heads rotates attention heads only. What was made for the weights or "
        "hidden states of the float model (LoRA adapters, draft models, prompt embeddings) does not fit rotated ones.",
    )
    lora: Paths = _option(
        (),
        DATA,
        "Folder of a LoRA adapter in the format of PEFT, which is merged into the weights as they are read. May be "
        "repeated; adapters are merged in the order given.",
        metavar="FOLDER",
        legal="folders",
    )
    follow_links: bool = _option(
        False,
        DATA,
        "Read the files to which links in the model folder lead, anywhere on this machine. The result holds copies of "
        "them.",
        is_flag=True,
    )
    max_samples: Annotated[PositiveCount | None, NoneWord] = _option(
        None, DATA, "Maximum number of calibration samples, selected at random with --seed. Default: all."
    )
    memory_budget: Annotated[Gibibytes | None, NoneWord] = _option(
        None,
        RUNNING,
        "Maximum size, in GiB, of the activations that are kept in memory between stages. The rest is offloaded to the "
        "disk of the save folder. Default: all are kept in memory.",
    )
    seed: Count = _option(0, DATA, "Seed of the random numbers that select the samples of --max_samples.")
    max_tokens: Annotated[PositiveCount | None, NoneWord] = _option(
        None,
        DATA,
        "Maximum number of tokens per sample. Videos get fewer frames, down to 4, then images and frames are resized "
        "until it fits; nothing is truncated.",
    )
    max_frames: Annotated[FrameCount | None, NoneWord] = _option(
        None, DATA, "Maximum number of frames per video, evenly spread. Default: the limits of qwen_vl_utils, 768."
    )
    overwrite: bool = _option(
        False, OUTPUT, "Replace a save folder that is not empty, and earlier dumps.", is_flag=True
    )
    resume: bool = _option(
        False,
        RUNNING,
        "Resume an interrupted run of the same command from the work folder that it left beside the save folder. "
        "Starts from the beginning if there is none.",
        is_flag=True,
    )
    start_over: bool = _option(
        False, RUNNING, "Delete the work folder of an interrupted run and start from the beginning.", is_flag=True
    )
    skip_bad_images: bool = _option(
        False, DATA, "Skip images and videos that cannot be read instead of raising an error.", is_flag=True
    )
    dump_ir: Annotated[OptionPath | None, NoneWord] = _option(
        None, DEBUGGING, "Folder to which every stage is dumped, as traced and after each pass."
    )
    dump_stages: Globs = _option(
        (),
        DEBUGGING,
        "Dump and print only these stages: a glob pattern such as '*.layers.1*'. May be repeated.",
        metavar="GLOB",
    )
    dump_formats: Annotated[str, AfterValidator(_formats)] = _option(
        "text",
        DEBUGGING,
        "Formats of --dump_ir, separated by commas: text, json, onnx (for Netron), bundle (the input of "
        "`vlqc run-pass`).",
        metavar="|".join(DUMP_FORMATS),
        choices=list(DUMP_FORMATS),
        comma_separated=True,
    )
    print_after: Annotated[str | None, NoneWord] = _option(
        None, DEBUGGING, "Print the text of every stage to stderr after this pass.", metavar="PASS"
    )
    timings: Annotated[OptionPath | None, NoneWord] = _option(
        None, DEBUGGING, "File for the time and memory of each pass, which `vlqc report --timings` displays."
    )
    pipeline: Annotated[str | None, NoneWord] = _option(
        None, DEBUGGING, "Passes to run instead of those that the other options select. `vlqc passes` lists them."
    )

    @property
    def cache_scheme(self) -> CacheScheme | None:
        """The scheme of keys and values that kv_cache selects; None if they stay float."""
        return cache_scheme_of_option(self.kv_cache)

    @property
    def names_samples(self) -> bool:
        """Whether calib_images was set. Its default is read only if a pass needs samples."""
        return "calib_images" in self.model_fields_set

    @property
    def layout(self) -> Engine:
        """The engine in whose layout the folder is written: the first of the target."""
        return parse_target(self.engine_target).engines[0]

    @property
    def engine_target(self) -> str:
        """`target`, or its default: "vllm-ascend", "mindie" or "both", followed by "@version" if one is set."""
        if self.target is not None:
            return self.target
        if (engine := engine_of_option(self)) is not None:
            return engine.name
        for_both = self.scheme.spec.takes_added_bias and not self.shift and self.cache_scheme is None
        return BOTH if for_both and not self.float_as.is_quantized else ENGINES[0].name


@dataclass(frozen=True)
class OptionInfo:
    """How an option appears on the command line and in the documentation.

    legal: its legal values in words; choices: its legal values, if it is a choice between words or numbers;
    is_flag: whether it takes no value; multiple: whether it may be repeated.
    """

    flag: str
    panel: str
    help: str
    metavar: str
    legal: str
    choices: tuple[str, ...]
    is_flag: bool
    multiple: bool
    comma_separated: bool


def default_value(name: str, scheme: Scheme) -> Any:
    """The value of an option that is not set.

    The reference exclusions keep layers in float whose inputs are hard to quantize, so float inputs need none.
    """
    if name == "fallback" and not scheme.spec.activation.is_quantized:
        return "none"
    return OptionFields.model_fields[name].default


def flag_of(name: str) -> str:
    return f"--{name}"


def option_text(value: Any) -> str:
    """A value as it is written on the command line."""
    return option_name(value) if isinstance(value, Scheme) else str(value)


@functools.cache
def option_info(name: str) -> OptionInfo:
    """Describes the option of this name."""
    schema = _schemas()[name]
    kind = next((each for each in schema.get("anyOf", ()) if each["type"] != "null"), schema)
    values = [kind["const"]] if "const" in kind else kind.get("enum", schema.get("choices", []))
    choices = tuple(map(str, values))
    return OptionInfo(
        flag=flag_of(name),
        panel=schema["panel"],
        help=schema["description"],
        metavar=schema.get("metavar") or "|".join(choices) or _metavar(kind),
        legal=schema.get("legal") or _legal_values(kind, choices),
        choices=choices,
        is_flag=schema.get("is_flag", False),
        multiple=kind["type"] == "array",
        comma_separated=schema.get("comma_separated", False),
    )


@functools.cache
def _schemas() -> dict[str, Any]:
    """JSON schema of every option."""
    return cast(dict[str, Any], OptionFields.model_json_schema()["properties"])


def _metavar(schema: Mapping[str, Any]) -> str:
    if schema.get("format") == "path":
        return "PATH"
    return {"boolean": "True|False", "integer": "NUMBER", "number": "NUMBER"}.get(schema["type"], "TEXT")


def _legal_values(schema: Mapping[str, Any], choices: tuple[str, ...]) -> str:
    if choices:
        return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"
    if schema["type"] == "integer":
        return f"an integer >= {schema['minimum']}"
    if schema["type"] == "number":
        return f"a number from {schema['minimum']:g} to {schema['maximum']:g}"
    if schema["type"] == "array":
        return "glob patterns"
    if schema.get("format") == "path":
        return "a path"
    return {"boolean": "True or False"}.get(schema["type"], "text")
