"""Every option of `vlqc compile` in one place: name, default, allowed values and meaning.

The command line is generated from this table, and the Python API goes through the same door (`Options.from_user`).
Nothing heavy is imported here: `vlqc --help` has to answer at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from vlqc.errors import Fault, UserError
from vlqc.formatting import did_you_mean
from vlqc.options.constraints import combination_faults
from vlqc.options.option_values import FEWEST, Refused, extra_of, flag_of, read_value
from vlqc.options.paths import path_faults

if TYPE_CHECKING:
    from vlqc.targets.schemes import Scheme

__all__ = ["PANELS", "Options", "extra_of", "flag_of"]


def _option(default: Any, meaning: str, panel: str, values: tuple[Any, ...] = (), **extra: Any) -> Any:
    """A field with its help text and help panel; values: all that are allowed (empty: any).

    extra: flag=True for a bare flag; least, most: bounds of a number; kind: "target" for an engine with or without its
    version, "globs" for patterns over layer names.
    """
    return Field(default, description=meaning, json_schema_extra={"panel": panel, "values": list(values), **extra})


DATA, SCHEME, LAYERS, OUTPUT, RUNNING, DEBUGGING = PANELS = (
    "Model and calibration data",
    "Quantization",
    "Which layers",
    "Output and engine",
    "Running",
    "Debugging",
)


class Options(BaseModel):
    """The options of one compilation, checked. Build it with `Options.from_user`, which raises UserError."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # The fifteen options that existing command lines use: names, defaults and values stay as they are.
    model_path: Path = _option(..., "Folder of the float checkpoint (safetensors). Required.", DATA)
    calib_images: Path = _option(
        Path("../calibImages"),
        "Calibration pictures: a folder, one picture, or a .jsonl file of pictures and prompts. "
        "30 COCO-like pictures are advised.",
        DATA,
    )
    save_directory: Path = _option(..., "Folder in which the quantized checkpoint appears. Required.", OUTPUT)
    part_file_size: int | None = _option(
        None, "Upper bound of one weight file, in units of 1024^3 bytes. None: one file.", OUTPUT
    )
    w_bit: int = _option(8, "Bits of a weight.", SCHEME, (4, 8))
    a_bit: int = _option(8, "Bits of an activation.", SCHEME, (8,))
    device_type: str = _option("cpu", "Where the arithmetic runs.", RUNNING, ("cpu", "npu", "cuda"))
    trust_remote_code: bool = _option(False, "Allow model code from the checkpoint folder to run.", DATA)
    anti_method: str = _option(
        "m2",
        "Outlier suppression: m2 searches scales, m4 computes them, none leaves outliers as they are.",
        SCHEME,
        ("m2", "m4", "none"),
    )
    act_method: int = _option(2, "Static activation range: 1 min-max, 2 histogram, 3 automatic mix.", SCHEME, (1, 2, 3))
    open_outlier: bool = _option(True, "Weight outlier split; means something with --is_lowbit True only.", SCHEME)
    is_dynamic: bool = _option(False, "Quantize activations per token at run time instead of statically.", SCHEME)
    is_lowbit: bool = _option(False, "Low-bit algorithm; 4-bit weights per group need it.", SCHEME)
    group_size: int = _option(64, "How many 4-bit weights share a scale.", SCHEME, (64, 128, 256, 512))
    mindie_format: bool = _option(False, "Write MindIE's layout instead of vLLM Ascend's.", OUTPUT, flag=True)

    # vlqc's own.
    target: str | None = _option(
        None,
        "Engine that is to load the result, if need be with its version: vllm-ascend, vllm-ascend@0.18, mindie@2.2, "
        "both. Left out: both for static W8A8, vllm-ascend otherwise.",
        OUTPUT,
        kind="target",
    )
    strict_target: bool = _option(
        False, "Refuse what no version of the target loads, instead of warning.", OUTPUT, flag=True
    )
    anti_alpha: float | None = _option(
        None,
        "Exponent of m4's scales, 0 to 1: how much of an outlier moves into the weights. None: chosen per edge.",
        SCHEME,
        least=0,
        most=1,
    )
    shift: bool = _option(
        False,
        "Also move the middle of every channel's range to zero, where the engine runs a norm with a bias.",
        SCHEME,
        flag=True,
    )
    modality_balance: bool = _option(
        True,
        "Errors in text and image tokens count the same, however many there are of each. False: every token counts "
        "the same.",
        SCHEME,
    )
    weight_method: str = _option(
        "auto",
        "How weights are rounded: round, to the nearest; clip, after a search for the range of every row or group; "
        "gptq, with the error of each column made up for by those behind it. auto: gptq.",
        SCHEME,
        ("auto", "round", "clip", "gptq"),
    )
    propagate: str = _option(
        "float",
        "What later stages are calibrated on: float, the outputs of the float stages before them; quantized, what "
        "those return once they are quantized (a second run of every stage).",
        SCHEME,
        ("float", "quantized"),
    )
    fallback: str = _option(
        "seed",
        "Which layers stay in float: seed, those that the original script left out; none, only what the engine "
        "refuses; auto, the cheapest set of groups with which --min_sqnr or --max_float_groups is met.",
        LAYERS,
        ("seed", "none", "auto"),
    )
    min_sqnr: float | None = _option(
        None,
        "With --fallback auto: how far, in dB, the signal is to stand above the error of all quantized groups.",
        LAYERS,
        least=0,
        most=100,
    )
    max_float_groups: int | None = _option(
        None,
        "With --fallback auto: leave at most this many groups in float, those that cost most, "
        "beside those that the engine or --exclude keeps there.",
        LAYERS,
        least=0,
    )
    exclude: tuple[str, ...] = _option(
        (), "Leave these layers in float: a pattern over checkpoint names, as often as needed.", LAYERS, kind="globs"
    )
    include: tuple[str, ...] = _option(
        (),
        "Quantize these layers although they stay in float by default: a pattern over checkpoint names, as often as "
        "needed.",
        LAYERS,
        kind="globs",
    )
    w4a8_scope: str = _option(
        "engine",
        "Which layers get 4-bit weights: engine, those that an engine runs so; all, every quantized layer, as the "
        "original script did.",
        LAYERS,
        ("engine", "all"),
    )
    max_samples: int | None = _option(
        None, "Calibrate on this many samples, chosen by --seed, where there are more.", DATA, least=FEWEST
    )
    memory_budget: float | None = _option(
        None,
        "Most memory, in units of 1024^3 bytes, for what the samples become between two stages; what is beyond lies on "
        "the disk of the save folder meanwhile. None: no bound.",
        RUNNING,
        least=0,
        most=100_000,
    )
    seed: int = _option(0, "Start of every random choice.", DATA, least=0)
    max_tokens: int | None = _option(
        None, "Most tokens of one sample; pictures are made smaller until they fit, nothing is cut.", DATA, least=FEWEST
    )
    overwrite: bool = _option(False, "Replace a save folder that is not empty, and older dumps.", OUTPUT, flag=True)
    resume: bool = _option(
        False,
        "Go on with an interrupted run of the same command, from the work folder that it has left beside the save "
        "folder. Starts anew if there is none.",
        RUNNING,
        flag=True,
    )
    start_over: bool = _option(
        False, "Throw away what an interrupted run has left, and start anew.", RUNNING, flag=True
    )
    skip_bad_images: bool = _option(False, "Go on without the pictures that cannot be read.", DATA, flag=True)
    dump_ir: Path | None = _option(
        None, "Write every stage, as traced and after every pass, into this folder.", DEBUGGING
    )
    dump_stages: tuple[str, ...] = _option(
        (),
        "Dump and print these stages only: a pattern such as 'model.layers.1*', as often as needed.",
        DEBUGGING,
        kind="globs",
    )
    dump_formats: str = _option(
        "text",
        "What --dump_ir writes, separated by commas: text; json; onnx, which Netron opens; bundle, on which "
        "`vlqc run-pass` runs a pass again.",
        DEBUGGING,
        ("text", "json", "onnx", "bundle"),
        kind="formats",
    )
    print_after: str | None = _option(
        None, "Print the text of every stage after this pass, on stderr.", DEBUGGING, kind="pass"
    )
    timings: Path | None = _option(
        None, "Write time and memory per pass into this file, for `vlqc report FOLDER --timings FILE`.", DEBUGGING
    )
    pipeline: str | None = _option(
        None, "Run these passes instead of those that the options build (see: vlqc passes).", DEBUGGING
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        """Text from a command line or a value from Python -> the field's type, or a fault that names the flag."""
        name = str(info.field_name)
        return read_value(name, cls.model_fields[name], value)

    @property
    def scheme(self) -> "Scheme":
        """The quantization scheme that the flags select (a legal combination, `from_user` has seen to it)."""
        from vlqc.targets.schemes import Scheme

        if self.w_bit == 4:
            return Scheme.W4A8_DYNAMIC
        return Scheme.W8A8_DYNAMIC if self.is_dynamic else Scheme.W8A8

    @property
    def mindie_layout(self) -> bool:
        """Whether the folder is for MindIE alone: by --mindie_format, or by a target that says so."""
        return self.engine_target.partition("@")[0] == "mindie"

    @property
    def engine_target(self) -> str:
        """`target` with its default filled in: "vllm-ascend", "mindie" or "both", with "@version" where one was
        given."""
        if self.target is not None:
            return self.target
        if self.mindie_format:
            return "mindie"
        return "both" if self.w_bit == 8 and not self.is_dynamic and not self.shift else "vllm-ascend"

    @classmethod
    def from_user(cls, **given: Any) -> Self:
        """Options by name (dashes or underscores) -> Options. UserError with every fault found, not only the first.

        recipe: a YAML file with more of them; what is given beside it counts.
        """
        options, faults = cls._checked(given)
        faults += path_faults(options)
        if faults:
            raise UserError(*faults)
        return options

    @classmethod
    def without_paths(cls, **given: Any) -> Self:
        """As `from_user`, but the two folders may be left out and no path is looked at: to explain a pipeline."""
        options, faults = cls._checked({"model_path": ".", "save_directory": ".", **given})
        if faults:
            raise UserError(*faults)
        return options

    @classmethod
    def without_saving(cls, *, occupied: bool = False, **given: Any) -> Self:
        """As `from_user`, for what writes no save folder: it may be left out, and lies in the current one then.

        occupied: whether one that is given may hold anything.
        """
        named = cls._merged(given)
        options, faults = cls._checked({"save_directory": "unnamed", **named})
        ignored = {} if "save_directory" in named else {"save_directory": None}
        faults += path_faults(options.model_copy(update=ignored | ({"overwrite": True} if occupied else {})))
        if faults:
            raise UserError(*faults)
        return options

    @classmethod
    def _merged(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """With underscores, and with what the recipe adds, if one is given."""
        named = {name.replace("-", "_"): value for name, value in given.items()}
        if (recipe := named.pop("recipe", None)) is not None:
            from vlqc.options.recipe import read_recipe

            named = read_recipe(recipe, cls.model_fields) | named
        return named

    @classmethod
    def _checked(cls, given: Mapping[str, Any]) -> tuple[Self, list[Fault]]:
        """The options and every fault but those of paths. In place of a bad value stands its default, None for a
        required one, so that what does not depend on it can still be checked."""
        named = cls._merged(given)
        faults = [_unknown(name, cls.model_fields) for name in named if name not in cls.model_fields]
        values = {name: value for name, value in named.items() if name in cls.model_fields}
        bad: set[str] = set()
        try:
            options = cls(**values)
        except ValidationError as error:
            for detail in error.errors():
                name = str(detail["loc"][0])
                bad.add(name)
                faults.append(_fault_of(name, detail["type"], detail.get("ctx", {}).get("error"), detail["msg"]))
            good = {name: read_value(name, cls.model_fields[name], values[name]) for name in values.keys() - bad}
            options = cls.model_construct(**{"model_path": None, "save_directory": None, **good})
        return options, faults + combination_faults(options, bad)


def _unknown(name: str, known: Mapping[str, FieldInfo]) -> Fault:
    fix = did_you_mean(flag_of(name), map(flag_of, known)) or "vlqc compile --help lists the options"
    return Fault(f"there is no option {flag_of(name)}", fix=fix)


def _fault_of(name: str, kind: str, raised: object, message: str) -> Fault:
    """One entry of pydantic's error list -> a fault in our words."""
    if isinstance(raised, Refused):
        return raised.fault
    if kind == "missing":
        return Fault(f"{flag_of(name)} is missing", why="it has no default", fix=f"give {flag_of(name)} FOLDER")
    return Fault(flag_of(name), why=message)
