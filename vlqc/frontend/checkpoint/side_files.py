"""The files beside the weights: which of them a compiled folder has, and in which form.

Engines read them with the version of transformers that they are installed with: 4.43 to 5. transformers 5 stores them
in a form that 4 cannot read. A compiled folder has them in the form of transformers 4, which 5 reads as well, with the
same meaning; files that already have this form are copied.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from packaging.version import Version

from vlqc.errors import Fault, UserError
from vlqc.families.family import ModelFamily
from vlqc.families.inputs.input_format import TextFormat
from vlqc.files import REPAIR, read_json_object, read_regular_file

IMAGE_SETTINGS = "preprocessor_config.json"
VIDEO_SETTINGS = "video_preprocessor_config.json"
PROCESSOR_SETTINGS = "processor_config.json"  # transformers 5 stores the settings of all parts in this file
IMAGE_KEY, VIDEO_KEY = "image_processor", "video_processor"  # their keys there
TOKENIZER_SETTINGS = "tokenizer_config.json"
TOKENIZER = "tokenizer.json"
TEMPLATE_TEXT, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
TEMPLATE_FOLDER = "additional_chat_templates"
MODEL_CARD = "README.md"

# What engines and processors read, in lower case.
SETTINGS = (
    "tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt",
    "*.tiktoken", "*.spm", "spiece.model", "sentencepiece*.model", "*chat_template*.jinja", "*chat_template*.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "generation_config.json",
    "configuration.json",
)  # fmt: skip
# What people need: licenses and the description of the model. configuration.json above is that of ModelScope.
TEXTS = ("license*", "licence*", "copying*", "notice*", "readme*", "model_card*", "use_policy*")
PYTHON = ".py"
# Keys of tokenizer_config.json that describe how transformers 5 loaded the tokenizer.
SESSION_KEYS = ("backend", "is_local", "local_files_only")
# Keys of tokenizer_config.json under which transformers takes other files than those beside it.
FILE_KEYS = ("tokenizer_file", "vocab_file", "merges_file", "added_tokens_file")
NAME_KEY = "name_or_path"  # from where the tokenizer was loaded
GENERIC_CLASS = "TokenizersBackend"  # of transformers 5, for any tokenizer.json
GENERIC_CLASS_4 = "PreTrainedTokenizerFast"  # the name of that class in transformers 4; 5 knows it as well
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
READS_SIZE = "4.57"  # the version of transformers that certainly reads `size` in the settings of images and videos
READS_PAIRS = "4.45"  # the first version of transformers, with tokenizers 0.20, that reads merges as pairs
PIXELS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}  # keys before, and in `size`
MODEL_CARD_LINE = "> A quantized version of the model, made with vlqc; the text below is about the float model."
SHOWN = 5  # names in a note


@dataclass(frozen=True)
class WrittenFile:
    """A file of a compiled folder that is not a weight file.

    name: in the folder, below it with `/`; source: file of the checkpoint that it is made of; content: None for a copy.
    """

    name: str
    source: str
    content: bytes | None = None


@dataclass(frozen=True)
class SideFiles:
    """The files of a checkpoint beside its weights and config.json.

    names: those that the compiled folder is made of, sorted; left_out: others, folders with a `/` behind the name;
    written: the files of the compiled folder, by name, sorted.
    """

    folder: Path
    names: tuple[str, ...]
    left_out: tuple[str, ...]
    written: tuple[WrittenFile, ...]

    @property
    def converted(self) -> tuple[str, ...]:
        """Names of the written files that are not copies."""
        return tuple(file.name for file in self.written if file.content is not None and file.name != MODEL_CARD)

    def write(self, target: Path) -> None:
        """Writes all files into an existing folder."""
        for file in self.written:
            path = target / file.name
            path.parent.mkdir(exist_ok=True)
            if file.content is None:
                shutil.copyfile(self.folder / file.source, path)
            else:
                path.write_bytes(file.content)

    def notes(self) -> list[str]:
        """What the user should know: files that are not copied, and files in another form."""
        notes = []
        if self.left_out:
            more = len(self.left_out) - SHOWN
            shown = ", ".join(self.left_out[:SHOWN]) + (f" and {more} more" if more > 0 else "")
            notes.append(f"not copied, because engines do not need them: {shown}")
        if self.converted:
            notes.append(f"written in the form that transformers 4 reads as well: {', '.join(self.converted)}")
        return notes


def side_files(folder: Path, family: ModelFamily, *, weights: Iterable[str] = (), code: bool = False) -> SideFiles:
    """The side files of a checkpoint.

    Args:
        folder: of the checkpoint.
        family: of the model.
        weights: names of the weight files and of their index.
        code: copy the checkpoint's code (*.py), and the files that it names.

    Raises:
        UserError: a JSON file of settings cannot be read.
    """
    names, left_out = _select(folder, set(weights), code)
    written = {name: WrittenFile(name, name) for name in names}
    for name, source, content in _in_older_form(folder, family, names):
        if content is None:
            written.pop(name)
        elif name not in written or content != read_json_object(folder / name):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            written[name] = WrittenFile(name, source, text.encode())
    if MODEL_CARD in written:
        with suppress(OSError, ValueError):  # too large, for example: then it is copied
            card = _model_card(read_regular_file(folder / MODEL_CARD))
            written[MODEL_CARD] = WrittenFile(MODEL_CARD, MODEL_CARD, card)
    return SideFiles(folder, tuple(names), tuple(left_out), tuple(written[name] for name in sorted(written)))


def _select(folder: Path, weights: set[str], code: bool) -> tuple[list[str], list[str]]:
    """Files to use and others to mention. Links count as files, because a snapshot in the Hugging Face cache consists
    of links; see `link_faults` for where they may lead."""
    names, left_out = [], []
    sources = _code(folder) if code else ""
    for path in sorted(folder.iterdir()):
        name = path.name
        if name.startswith(".") or name == "config.json" or name in weights:
            continue
        if path.is_dir():
            templates = _templates(path) if name == TEMPLATE_FOLDER else []
            names += templates
            left_out += [] if templates else [f"{name}/"]
        elif path.is_file() and (_is_needed(name.lower()) or (code and (path.suffix == PYTHON or name in sources))):
            names.append(name)
        else:
            left_out.append(name)
    return names, left_out


def _is_needed(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in (*SETTINGS, *TEXTS))


def _code(folder: Path) -> str:
    """The checkpoint's code as one text."""
    paths = (path for path in sorted(folder.glob(f"*{PYTHON}")) if path.is_file())
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def _templates(folder: Path) -> list[str]:
    """Names of the chat templates in the folder of additional ones, unless links lead out of it."""
    real = folder.resolve()
    paths = sorted(folder.glob("*.jinja")) if not folder.is_symlink() else []
    return [f"{folder.name}/{path.name}" for path in paths if path.is_file() and real in path.resolve().parents]


# ---- settings, read ------------------------------------------------------------------------------------------------


def image_settings(folder: Path) -> tuple[Any, str]:
    """The settings of the image processor, and the name of their file; an empty object if there are none.

    Those in processor_config.json take precedence over those in preprocessor_config.json, as in transformers 5. They
    are as stored: not always an object. UserError for a damaged file.
    """
    nested = read_optional_json(folder / PROCESSOR_SETTINGS).get(IMAGE_KEY)
    return (nested, PROCESSOR_SETTINGS) if nested else (read_optional_json(folder / IMAGE_SETTINGS), IMAGE_SETTINGS)


def default_template(template: Any) -> str | None:
    """The template itself, or the one named `default` of several; None if there is none."""
    if isinstance(template, list):
        named = (each for each in template if isinstance(each, dict) and each.get("name") == "default")
        template = next((each.get("template") for each in named), None)
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template else None


def read_optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file. UserError for a damaged file."""
    return read_json_object(path) if path.is_file() else {}


# ---- settings, written ---------------------------------------------------------------------------------------------

_Converted = tuple[str, str, dict[str, Any] | None]  # file name, source, content; None: all of it is in other files


def _in_older_form(folder: Path, family: ModelFamily, names: Sequence[str]) -> Iterator[_Converted]:
    """The files of settings in the form that transformers 4 reads, equal to the stored ones where they have it."""
    tokenizer = read_optional_json(folder / TOKENIZER_SETTINGS)
    own_template = default_template(tokenizer.get("chat_template"))
    if TOKENIZER_SETTINGS in names:
        converted = tokenizer_settings(tokenizer, folder, family.text_format)
        if family.image_format is None and own_template is None:  # no processor, which would read the other files
            template = read_chat_template(folder)
            converted |= {} if template is None else {"chat_template": template}
        yield TOKENIZER_SETTINGS, TOKENIZER_SETTINGS, converted
    if TOKENIZER in names and Version(family.transformers_version) < Version(READS_PAIRS):
        yield TOKENIZER, TOKENIZER, _with_merges_as_text(read_optional_json(folder / TOKENIZER))
    if family.image_format is None:
        return
    templates = (TEMPLATE_TEXT, TEMPLATE_JSON, *(name for name in names if name.startswith(f"{TEMPLATE_FOLDER}/")))
    if own_template is not None and not any(name in names for name in templates):
        yield TEMPLATE_JSON, TOKENIZER_SETTINGS, {"chat_template": own_template}
    yield from _processor_settings(folder, family, names)


def _processor_settings(folder: Path, family: ModelFamily, names: Sequence[str]) -> Iterator[_Converted]:
    """Files of settings of the processor and its parts; each part has its own, as before transformers 5."""
    shared = read_optional_json(folder / PROCESSOR_SETTINGS)
    parts = {key: shared[key] for key in (IMAGE_KEY, VIDEO_KEY) if isinstance(shared.get(key), dict) and shared[key]}
    kind = {"processor_class": shared["processor_class"]} if "processor_class" in shared else {}
    images, source = image_settings(folder)
    if isinstance(images, dict) and images:
        yield IMAGE_SETTINGS, source, image_form(images if source == IMAGE_SETTINGS else images | kind, family)
    videos = parts.get(VIDEO_KEY) or read_optional_json(folder / VIDEO_SETTINGS)
    if videos:
        source = PROCESSOR_SETTINGS if VIDEO_KEY in parts else VIDEO_SETTINGS
        yield VIDEO_SETTINGS, source, _with_pixels(videos, family)
    if parts:
        rest = {key: value for key, value in shared.items() if key not in parts}
        yield PROCESSOR_SETTINGS, PROCESSOR_SETTINGS, None if rest == kind else rest


def tokenizer_settings(settings: Mapping[str, Any], folder: Path, form: TextFormat) -> dict[str, Any]:
    """tokenizer_config.json of any version of transformers -> in the form of 4.

    transformers 5 lists special tokens in `extra_special_tokens`, where 4 expects an object of named tokens, and has a
    class for any tokenizer.json, whose name 4 does not know. Paths of files elsewhere are left out. UserError if that
    tokenizer.json cannot be read.
    """
    settings = {key: value for key, value in settings.items() if not _is_elsewhere(key, value)}
    kind, extra = settings.get("tokenizer_class"), settings.get("extra_special_tokens")
    is_new = kind == GENERIC_CLASS or isinstance(extra, list) or not settings.keys().isdisjoint(SESSION_KEYS)
    if not is_new:
        return dict(settings)
    converted = {key: value for key, value in settings.items() if key not in (*SESSION_KEYS, "extra_special_tokens")}
    if kind == GENERIC_CLASS:
        is_of_family = _includes(read_optional_json(folder / TOKENIZER), form.tokenizer_pipeline)
        converted["tokenizer_class"] = form.tokenizer_classes[0] if is_of_family else GENERIC_CLASS_4
    if isinstance(extra, list) and extra:
        converted["additional_special_tokens"] = extra
    named = {key: value for key, value in settings.items() if _is_named_token(key, value)}
    for tokens in (converted.pop("model_specific_special_tokens", None), extra):
        named |= tokens if isinstance(tokens, dict) else {}
    return converted | ({"extra_special_tokens": named} if named else {})


def _is_elsewhere(key: str, value: Any) -> bool:
    """Whether an entry of tokenizer_config.json is the path of a file or folder elsewhere."""
    is_path = isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute())
    return (key in FILE_KEYS and value is not None) or (key == NAME_KEY and is_path)


def _with_merges_as_text(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json -> with merges as "a b", which every version reads, where they are pairs ["a", "b"]."""
    model = tokenizer.get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(merges, list) or not all(map(_is_pair_of_words, merges)):
        return tokenizer
    return tokenizer | {"model": model | {"merges": [" ".join(pair) for pair in merges]}}


def _is_pair_of_words(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) and " " not in part for part in pair)


def _is_named_token(key: str, value: Any) -> bool:
    """Whether a key names a token that not every model has, such as image_token."""
    return key.endswith("_token") and key not in NAMED_TOKENS and isinstance(value, str)


def _includes(value: Any, part: Any) -> bool:
    """Whether a JSON value has all that `part` has; objects may have more keys."""
    if isinstance(part, Mapping):
        return isinstance(value, Mapping) and all(key in value and _includes(value[key], part[key]) for key in part)
    if isinstance(part, list):
        return isinstance(value, list) and len(value) == len(part) and all(map(_includes, value, part))
    return bool(value == part)


def image_form(settings: Mapping[str, Any], family: ModelFamily) -> dict[str, Any]:
    """Settings of an image processor -> with a class and keys that every version of transformers reads."""
    form, key = family.image_format, "image_processor_type"
    converted = _with_pixels(settings, family)
    if form is not None and converted.get(key) in form.processor_aliases:
        converted[key] = form.processor_classes[0]
    return converted


def _with_pixels(settings: Mapping[str, Any], family: ModelFamily) -> dict[str, Any]:
    """Settings of images or videos -> with the limits of `size` under the keys that older versions read."""
    size = settings.get("size")
    if not isinstance(size, Mapping) or Version(family.transformers_version) >= Version(READS_SIZE):
        return dict(settings)
    missing = {key: size[edge] for key, edge in PIXELS.items() if not settings.get(key) and size.get(edge)}
    return dict(settings) | missing


def read_chat_template(folder: Path) -> str | None:
    """The processor's chat template, which takes precedence over the tokenizer's: a .jinja or, older, a .json file.

    UserError for a damaged file.
    """
    path = folder / TEMPLATE_TEXT
    if not path.is_file():
        return default_template(read_optional_json(folder / TEMPLATE_JSON).get("chat_template"))
    try:
        return read_regular_file(path).decode()
    except (OSError, ValueError) as error:
        raise UserError(Fault(f"{path.name} cannot be read", str(path), str(error), REPAIR)) from None


def chat_template_file(folder: Path) -> Path:
    """The file with the chat template that is used: of the processor, or else of the tokenizer."""
    if (folder / TEMPLATE_TEXT).is_file():
        return folder / TEMPLATE_TEXT
    return folder / (TOKENIZER_SETTINGS if read_chat_template(folder) is None else TEMPLATE_JSON)


def _model_card(text: bytes) -> bytes:
    """A README.md with a line on the quantized model, behind its metadata."""
    match = re.match(rb"\s*---\r?\n.*?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    end = match.end() if match else 0
    return text[:end] + b"\n" + MODEL_CARD_LINE.encode() + b"\n\n" + text[end:]
