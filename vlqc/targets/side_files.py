"""What a version of transformers reads of the files beside the weights.

Engines read these files with the version of transformers that they are installed with, see `Engine.transformers`. Tried
with 4.49.0, 4.57.6, 5.5.3, 5.14.1 and 5.23.0.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.version import Version

from vlqc.errors import Fault, UserError
from vlqc.families.family import ModelFamily
from vlqc.files import read_json_object

NEW_TOKENIZERS = Version("5")  # the first version with the class for any tokenizer.json, and lists of extra tokens
NESTED_SETTINGS = Version("4.57")  # that reads settings of images and videos in processor_config.json
TEMPLATE_FILES = Version("4.49")  # whose tokenizers and processors read chat_template.jinja
MERGE_PAIRS = Version("4.45")  # with tokenizers 0.20, which reads merges as pairs
ANY_TOKENIZER = "TokenizersBackend"
PARTS = ("image_processor", "video_processor")
TOKENIZER_SETTINGS, PROCESSOR_SETTINGS, IMAGE_SETTINGS = (
    "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
FIX = "compile again: vlqc writes the form that every version reads"


def unread_files(path: Path, family: ModelFamily, version: str, *, by_processor: bool = False) -> list[Fault]:
    """Files of a folder that this version of transformers cannot read, or reads as if parts were missing.

    by_processor: the engine asks the processor for the chat template, and not the tokenizer. Missing and damaged files
    are no faults here.
    """
    parsed = Version(version)
    faults = list(_tokenizer_faults(path, parsed))
    faults += _template_faults(path, parsed, by_processor=by_processor, has_images=family.image_format is not None)
    if family.image_format is not None:
        faults += _settings_faults(path, parsed, family.image_format.processor_aliases)
    return [Fault(what, where, f"transformers {version} {why}", FIX) for what, where, why in faults]


_What = tuple[str, str, str]  # what is wrong, where, why


def _tokenizer_faults(path: Path, version: Version) -> Iterator[_What]:
    settings = _read(path / TOKENIZER_SETTINGS)
    if version < NEW_TOKENIZERS and settings.get("tokenizer_class") == ANY_TOKENIZER:
        yield f"tokenizer_class is {ANY_TOKENIZER!r}", TOKENIZER_SETTINGS, "has no such class"
    if version < NEW_TOKENIZERS and isinstance(settings.get("extra_special_tokens"), list):
        yield "extra_special_tokens is a list", TOKENIZER_SETTINGS, "reads an object there, and stops"
    if version < MERGE_PAIRS:
        model = _read(path / "tokenizer.json").get("model")
        merges = model.get("merges") if isinstance(model, Mapping) else None
        if isinstance(merges, list) and any(isinstance(pair, list) for pair in merges[:1]):
            yield "the merges are pairs", "tokenizer.json", "reads merges as text only"


def _template_faults(path: Path, version: Version, *, by_processor: bool, has_images: bool) -> Iterator[_What]:
    has_text, has_json = ((path / f"chat_template.{suffix}").is_file() for suffix in ("jinja", "json"))
    in_settings = bool(_read(path / TOKENIZER_SETTINGS).get("chat_template"))
    reads_text = has_text and version >= TEMPLATE_FILES
    if has_images and by_processor:
        if in_settings and not (reads_text or has_json):
            why = "has processors that read it from a file of its own only"
            yield "the chat template is only among the tokenizer's settings", TOKENIZER_SETTINGS, why
    elif not has_images and (has_text or has_json) and not (reads_text or in_settings):
        name = "chat_template.jinja" if has_text else "chat_template.json"
        yield f"the chat template is only in {name}", name, "has tokenizers that do not read it"


def _settings_faults(path: Path, version: Version, aliases: tuple[str, ...]) -> Iterator[_What]:
    shared = _read(path / PROCESSOR_SETTINGS)
    if version < NESTED_SETTINGS:
        for part in PARTS:
            if isinstance(shared.get(part), dict):
                yield f"it has the settings of {part}", PROCESSOR_SETTINGS, "reads them from a file of their own only"
    kind = _read(path / IMAGE_SETTINGS).get("image_processor_type")
    if kind in aliases and version < NEW_TOKENIZERS:
        yield f"image_processor_type is {kind!r}", IMAGE_SETTINGS, "has no such class"


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return read_json_object(path) if path.is_file() else {}
    except UserError:  # reported where all files are read
        return {}
