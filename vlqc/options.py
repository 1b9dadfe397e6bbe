"""Every option of `vlqc compile` in one place: name, default, allowed values and meaning.

The command line is generated from this table, and the Python API goes through the same door (`Options.from_user`).
Nothing heavy is imported here: `vlqc --help` has to answer at once.
"""

import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from vlqc.errors import Fault, UserError, near_miss
from vlqc.folders import path_faults

if TYPE_CHECKING:
    from vlqc.engines import Scheme

TRUE_WORDS, FALSE_WORDS = ("true", "1", "yes"), ("false", "0", "no")


def _option(default: Any, meaning: str, panel: str, values: tuple[Any, ...] = (), flag: bool = False) -> Any:
    """A field with its help text, its help panel, its allowed values (empty: any) and whether it is a bare flag."""
    return Field(default, description=meaning, json_schema_extra={"panel": panel, "values": list(values), "flag": flag})


DATA, SCHEME, OUTPUT, RUNNING, DEBUGGING = "Model and data", "Quantization", "Output", "Running", "Debugging"


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
        "Engine that is to load the result. Left out: both for static W8A8, vllm-ascend otherwise.",
        OUTPUT,
        ("vllm-ascend", "mindie", "both"),
    )
    overwrite: bool = _option(False, "Replace a save folder that is not empty.", OUTPUT, flag=True)
    skip_bad_images: bool = _option(False, "Go on without the pictures that cannot be read.", DATA, flag=True)
    dump_ir: Path | None = _option(None, "Write the text of every stage after every pass into this folder.", DEBUGGING)
    pipeline: str | None = _option(
        None, "Run these passes instead of those that the options build (see: vlqc passes).", DEBUGGING
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        """Text from a command line or a value from Python -> the field's type, or a fault that names the flag."""
        name = str(info.field_name)
        return _read_value(name, cls.model_fields[name], value)

    @property
    def scheme(self) -> "Scheme":
        """The quantization scheme that the flags select (a legal combination, `from_user` has seen to it)."""
        from vlqc.engines import Scheme

        if self.w_bit == 4:
            return Scheme.W4A8_DYNAMIC
        return Scheme.W8A8_DYNAMIC if self.is_dynamic else Scheme.W8A8

    @property
    def engine_target(self) -> str:
        """`target` with its default filled in: "vllm-ascend", "mindie" or "both"."""
        if self.target is not None:
            return self.target
        if self.mindie_format:
            return "mindie"
        return "both" if self.w_bit == 8 and not self.is_dynamic else "vllm-ascend"

    @classmethod
    def from_user(cls, **given: Any) -> Self:
        """Options by name (dashes or underscores) -> Options. UserError with every fault found, not only the first."""
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
    def _checked(cls, given: Mapping[str, Any]) -> tuple[Self, list[Fault]]:
        """The options and every fault but those of paths. In place of a bad value stands its default, None for a
        required one, so that what does not depend on it can still be checked."""
        named = {name.replace("-", "_"): value for name, value in given.items()}
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
            good = {name: _read_value(name, cls.model_fields[name], values[name]) for name in values.keys() - bad}
            options = cls.model_construct(**{"model_path": None, "save_directory": None, **good})
        if not bad & _COMBINED:
            faults += _combination_faults(options) or _not_yet_faults(options)
        return options, faults


def flag_of(name: str) -> str:
    return f"--{name}"


def extra_of(field: FieldInfo) -> dict[str, Any]:
    """What `_option` stored with a field: panel, values (empty: any), flag."""
    extra = field.json_schema_extra
    return dict(extra) if isinstance(extra, dict) else {}


# ---- one value -------------------------------------------------------------------------------------------------------


class _Refused(ValueError):
    """A fault on its way through pydantic, which lets nothing but a ValueError pass."""

    def __init__(self, name: str, value: object, why: str, fix: str = "") -> None:
        self.fault = Fault(f"{flag_of(name)} {value}", why=why, fix=fix)
        super().__init__(str(self.fault))


def _read_value(name: str, field: FieldInfo, value: Any) -> Any:
    """One given value -> bool, int, str, Path or None, whichever the field holds. Raises _Refused."""
    kinds = typing.get_args(field.annotation) or (field.annotation,)
    if type(None) in kinds and (value is None or str(value).lower() == "none"):
        return None
    if bool in kinds:
        return _read_bool(name, value)
    if Path in kinds:
        return _read_path(name, value)
    allowed = extra_of(field)["values"]
    read = _read_int(name, value, allowed) if int in kinds else _read_text(name, value)
    if allowed and read not in allowed:
        raise _not_allowed(name, value, allowed)
    return read


def _read_bool(name: str, value: Any) -> bool:
    word = str(value).lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise _Refused(name, value, "it is neither True nor False", f"give {flag_of(name)} True or {flag_of(name)} False")


def _read_path(name: str, value: Any) -> Path:
    if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
        raise _Refused(name, repr(value), "it is not the name of a file or folder")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise _Refused(name, value, "there is no such user, whose home folder ~ would name") from error


def _read_int(name: str, value: Any, allowed: list[int]) -> int:
    # bool is an int in Python, but `w_bit=True` is a slip; 18 digits are enough for anybody
    number = None if isinstance(value, bool) or not re.fullmatch(r"[+-]?\d{1,18}", str(value).strip()) else int(value)
    if number is None or (not allowed and number <= 0):
        raise _not_allowed(name, value, allowed)
    return number


def _read_text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _Refused(name, repr(value), f"it is not text but {type(value).__name__}")
    return value


def _not_allowed(name: str, value: Any, allowed: list[Any]) -> _Refused:
    if not allowed:
        return _Refused(name, value, "it is not a whole number above 0", f"for example {flag_of(name)} 4")
    words = [str(each) for each in allowed]
    choices = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    return _Refused(name, value, f"{flag_of(name)} is {choices}", near_miss(str(value), words) or f"choose {choices}")


def _unknown(name: str, known: Mapping[str, FieldInfo]) -> Fault:
    fix = near_miss(flag_of(name), map(flag_of, known)) or "vlqc compile --help lists the options"
    return Fault(f"there is no option {flag_of(name)}", fix=fix)


def _fault_of(name: str, kind: str, raised: object, message: str) -> Fault:
    """One entry of pydantic's error list -> a fault in our words."""
    if isinstance(raised, _Refused):
        return raised.fault
    if kind == "missing":
        return Fault(f"{flag_of(name)} is missing", why="it has no default", fix=f"give {flag_of(name)} FOLDER")
    return Fault(flag_of(name), why=message)


# ---- values together -------------------------------------------------------------------------------------------------

# Fields that take part in the rules below: with one of them unreadable, the rules would only produce echoes.
_COMBINED = {"w_bit", "is_dynamic", "is_lowbit", "open_outlier", "act_method", "group_size", "mindie_format", "target"}


def _combination_faults(options: Options) -> list[Fault]:
    """Legal are W8A8 static, W8A8_DYNAMIC and W4A8_DYNAMIC per group; all else is refused, with the flags to change."""
    faults = []
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
            faults.append(Fault("--w_bit 4", why=why, fix=f"give {' '.join(missing)} too, or --w_bit 8"))
        if options.mindie_format and options.group_size == 512:
            why = "MindIE knows the group sizes 64, 128 and 256"
            faults.append(Fault("--group_size 512 with --mindie_format", why=why, fix="give --group_size 256"))
    elif options.is_lowbit:
        fix = "give --is_lowbit False, or for 4-bit weights --w_bit 4 --is_dynamic True --open_outlier False"
        why = "the low-bit algorithm makes 4-bit weights, and --w_bit is 8"
        faults.append(Fault("--is_lowbit True", why=why, fix=fix))
    if options.mindie_format and options.target not in (None, "mindie"):
        what = f"--mindie_format with --target {options.target}"
        why = "--mindie_format writes a folder that only MindIE loads"
        faults.append(Fault(what, why=why, fix="leave out --mindie_format or --target"))
    if options.target == "both" and (options.w_bit == 4 or options.is_dynamic):
        why = "one folder for both engines exists for static W8A8 only"
        faults.append(Fault("--target both", why=why, fix="give --target vllm-ascend, or --w_bit 8 --is_dynamic False"))
    return faults


# What is legal but has no work behind it yet. Delete the line when the work arrives.
_NOT_YET: tuple[tuple[str, Callable[[Options], bool]], ...] = (
    ("--anti_method m4", lambda options: options.anti_method == "m4"),
    ("--act_method 3", lambda options: options.act_method == 3),
    ("--is_dynamic True (W8A8_DYNAMIC)", lambda options: options.w_bit == 8 and options.is_dynamic),
    ("--w_bit 4 (W4A8_DYNAMIC)", lambda options: options.w_bit == 4),
    ("--mindie_format", lambda options: options.mindie_format),
    ("--target mindie", lambda options: options.target == "mindie"),
    ("--device_type npu", lambda options: options.device_type == "npu"),
    ("--device_type cuda", lambda options: options.device_type == "cuda"),
)


def _not_yet_faults(options: Options) -> list[Fault]:
    """One fault that names everything of `_NOT_YET` that these options ask for, or none."""
    asked = [what for what, asked_for in _NOT_YET if asked_for(options)]
    if not asked:
        return []
    why = "this version compiles static W8A8 on the CPU: --anti_method m2 or none, --act_method 1 or 2"
    return [Fault(f"not yet: {', '.join(asked)}", why=why, fix="leave these flags out, or wait for a later version")]
