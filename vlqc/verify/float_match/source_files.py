"""Compares the files beside the weights with those of the float checkpoint: tokenizer, chat template, image settings.

They decide which tokens and pixels a model reads. The compiler copies them, or writes them in an older form, so they
are compared by what they mean: each form is read here, and the code that writes it is not used. A file may stand for
another one where transformers reads either; a version that reads both must find the same in them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vlqc.errors import UserError
from vlqc.families.family import ModelFamily
from vlqc.frontend.checkpoint.side_files import side_files
from vlqc.verify.findings import VerificationResult, format_list
from vlqc.verify.float_match.source_config import same_value, value_text
from vlqc.verify.folder.reader import read_json

CHECK = "float files"
TOKENIZER, TOKENIZER_SETTINGS = "tokenizer.json", "tokenizer_config.json"
PROCESSOR = "processor_config.json"  # of transformers 5: the settings of all parts, each under its own key
IMAGES, VIDEOS = ("preprocessor_config.json", "image_processor"), ("video_preprocessor_config.json", "video_processor")
TEMPLATES = ("chat_template.jinja", "chat_template.json", TOKENIZER_SETTINGS)  # in the order in which they count
TEMPLATE = "chat_template"
# Compared as they are, apart from keys that say who wrote them.
WHOLE_JSON = ("generation_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
WHOLE = ("merges.txt", "tokenizer.model", "vocab.txt", "spiece.model")
WRITER_KEYS = frozenset({"transformers_version", "_from_model_config", "name_or_path"})
# Paths of files elsewhere, which a compiled folder must not have: see the checks of the folder itself.
FILE_KEYS = frozenset({"tokenizer_file", "vocab_file", "merges_file", "added_tokens_file"})
# Classes, whose names differ between versions: compared on their own.
PART_CLASSES, PROCESSOR_CLASS = ("image_processor_type", "video_processor_type"), "processor_class"
CLASS_KEYS = frozenset({*PART_CLASSES, "feature_extractor_type", PROCESSOR_CLASS})
# Keys without an influence on what is read: how a file was loaded.
LOADING_KEYS = frozenset({"backend", "is_local", "local_files_only"})
SESSION_KEYS = LOADING_KEYS | WRITER_KEYS | FILE_KEYS | {"tokenizer_class", PROCESSOR_CLASS}
LIMITS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}  # key -> its name in `size`
NEW_CLASS = "TokenizersBackend"
TEMPLATE_FOLDER = "additional_chat_templates"
# Files that engines or processors read where they exist, in lower case.
READ = (
    "tokenizer*", "*.model", "*.tiktoken", "*.spm", "vocab.*", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "*chat_template*", "*processor_config.json", "generation_config.json",
    "*.py",
)  # fmt: skip
OTHER_WEIGHTS = ("pytorch_model*", "model*.bin", "consolidated*", "*.gguf", "*.pth", "params.json", "*.msgpack", "*.h5")
WHY = "engines read tokens, images or defaults of generation with it"


@dataclass(frozen=True)
class SideFiles:
    """The files beside the weights of a folder, each read when it is asked for.

    A damaged file is as if it were missing, because that is a fault of another check.
    """

    folder: Path

    def data(self, name: str) -> bytes | None:
        path = self.folder / name
        return path.read_bytes() if path.is_file() else None

    def json(self, name: str) -> Any:
        return read_json(self.folder / name)[0] if (self.folder / name).is_file() else None

    def object(self, name: str) -> dict[str, Any]:
        content = self.json(name)
        return content if isinstance(content, dict) else {}

    def part_settings(self, file: str, key: str) -> dict[str, dict[str, Any]]:
        """Settings of a part of the processor by the place where they stand, the one that counts first."""
        return {place: _settings(value) for place, value in self.parts(file, key).items()}

    def parts(self, file: str, key: str) -> dict[str, dict[str, Any]]:
        """As `part_settings`, with all keys as they are stored."""
        places = {f"{PROCESSOR}, {key}": self.object(PROCESSOR).get(key), file: self.json(file)}
        return {place: value for place, value in places.items() if isinstance(value, dict) and (value or place == file)}

    def classes(self, name: str) -> dict[str, Any]:
        """Values of a key that names a class, by the place where it stands."""
        places = {PROCESSOR: self.object(PROCESSOR), TOKENIZER_SETTINGS: self.object(TOKENIZER_SETTINGS)}
        for file, key in (IMAGES, VIDEOS):
            places |= self.parts(file, key)
        return {place: settings[name] for place, settings in places.items() if settings.get(name) is not None}

    def templates(self) -> dict[str, str]:
        """Chat templates by file, the one that counts first."""
        text = self.data(TEMPLATES[0])
        found = {TEMPLATES[0]: None if text is None else text.decode(errors="replace")}
        found |= {name: _template(self.object(name).get(TEMPLATE)) for name in TEMPLATES[1:]}
        return {name: template for name, template in found.items() if template}


def check_files_against_source(
    folder: Path, model_path: Path, result: VerificationResult, family: ModelFamily | None = None
) -> None:
    """Adds a fault for everything that the folder's files say differently from those of the float checkpoint.

    family: of the model; None if it is unknown.
    """
    images = family.image_format if family else None
    equal = frozenset((*images.processor_classes, *images.processor_aliases)) if images else frozenset()
    check = _Check(SideFiles(folder), SideFiles(model_path), result, equal)
    check.run()
    if family is not None:
        check.surplus(family)


@dataclass
class _Check:
    own: SideFiles
    source: SideFiles
    result: VerificationResult
    equal_classes: frozenset[str]

    def run(self) -> None:
        for name in (*PART_CLASSES, PROCESSOR_CLASS):
            self.classes(name)
        for file, key in (IMAGES, VIDEOS):
            self.places(file, self.own.part_settings(file, key), self.source.part_settings(file, key))
        self.differences(PROCESSOR, *(_other_parts(files.object(PROCESSOR)) for files in (self.own, self.source)))
        self.templates()
        self.named_templates()
        self.converted(TOKENIZER, _tokenizer)
        self.tokenizer_settings()
        for name in WHOLE_JSON:
            self.converted(name, lambda content: _without(content, WRITER_KEYS))
        for name in WHOLE:
            expected, stored = self.source.data(name), self.own.data(name)
            if expected is not None and self.exists(name) and stored != expected:
                self.fault(name, f"{name} is not the float checkpoint's")

    def fault(self, where: str, what: str) -> None:
        self.result.add_fault(CHECK, where, what, WHY, "copy the file from the float checkpoint, or compile again")

    def exists(self, name: str) -> bool:
        """Whether a file of the source is in the folder; a fault otherwise."""
        self.result.add_examined(CHECK)
        if not (self.own.folder / name).is_file():
            self.fault(name, f"{name} is missing; the float checkpoint has it")
            return False
        return True

    def places(self, name: str, own: dict[str, dict[str, Any]], source: dict[str, dict[str, Any]]) -> None:
        """Settings that may stand in several places: in each they must be those of the source."""
        if not source:
            return
        self.result.add_examined(CHECK, max(len(own), 1))
        if not own:
            self.fault(name, f"{name} is missing; the float checkpoint has these settings in {next(iter(source))}")
        for place, settings in own.items():
            expected = source.get(place, next(iter(source.values())))
            self.differences(place, settings, expected)

    def classes(self, name: str) -> None:
        """A class that stands in the folder must be one that the source names, or the same one under another name.
        Without a name transformers takes the class of the model."""
        expected = set(map(str, self.source.classes(name).values()))
        if name == PART_CLASSES[0] and (not expected or expected & self.equal_classes):
            expected |= self.equal_classes
        for place, value in self.own.classes(name).items():
            self.result.add_examined(CHECK)
            if expected and str(value) not in expected:
                of_source = self.source.classes(name) or {"": None}
                text = value_text(next(iter(of_source.values())))
                self.fault(place, f"{name} is {value_text(value)}; the float checkpoint has {text}")

    def differences(self, where: str, own: Mapping[str, Any], source: Mapping[str, Any]) -> None:
        for key in dict.fromkeys([*source, *own]):
            if not same_value(own.get(key), source.get(key)):
                what = f"{key} is {value_text(own.get(key))}; the float checkpoint has {value_text(source.get(key))}"
                self.fault(where, what)

    def templates(self) -> None:
        own, source = self.own.templates(), self.source.templates()
        if not source:
            return
        self.result.add_examined(CHECK, max(len(own), 1))
        expected = next(iter(source.values()))
        if not own:
            self.fault(next(iter(source)), "no chat template; the float checkpoint has one")
        elif next(iter(own.values())) != expected:
            self.fault(next(iter(own)), "the chat template that counts is not the float checkpoint's")
        for name, template in own.items():
            if template != source.get(name, expected) and name != next(iter(own)):
                self.fault(name, "the chat template is not the float checkpoint's")
        for name in source.keys() - own.keys():
            if own:
                self.fault(name, f"{name} has no chat template; the float checkpoint's has one")

    def named_templates(self) -> None:
        """Templates beside the default one: several in one file, and those in a folder of their own."""
        for file in TEMPLATES[1:]:
            own, source = self.own.object(file).get(TEMPLATE), self.source.object(file).get(TEMPLATE)
            if isinstance(own, list | dict) and not same_value(own, source):
                self.fault(file, "the named chat templates are not those of the float checkpoint")
        names = {path.name for files in (self.own, self.source) for path in (files.folder / TEMPLATE_FOLDER).glob("*")}
        for name in sorted(f"{TEMPLATE_FOLDER}/{name}" for name in names if name.endswith(".jinja")):
            if self.own.data(name) != self.source.data(name):
                self.fault(name, f"{name} is not the float checkpoint's")

    def surplus(self, family: ModelFamily) -> None:
        """Files that engines or processors read, and that the float checkpoint gives no reason for. Those that this
        check compares by what they mean are none of them."""
        if not self.source.folder.is_dir():
            return  # a fault of another check
        expected = {path.name for path in self.source.folder.iterdir() if not _matches(path.name, OTHER_WEIGHTS)}
        with suppress(UserError):  # a damaged file
            expected |= {file.name for file in side_files(self.source.folder, family, code=True).written}
        if self.source.templates():
            expected |= set(TEMPLATES[:2])
        expected |= {file for file, key in (IMAGES, VIDEOS) if self.source.part_settings(file, key)}
        for path in sorted(self.own.folder.iterdir()):
            name = path.name
            if path.is_file() and _matches(name, READ + OTHER_WEIGHTS) and name not in expected:
                why, fix = "engines or processors may read it", "remove it"
                self.result.add_fault(CHECK, name, f"{name} has no counterpart in the float checkpoint", why, fix)
            elif name.endswith(".py") and self.own.data(name) != self.source.data(name):
                self.fault(name, f"{name} is not the float checkpoint's")

    def converted(self, name: str, meaning: Callable[[Any], Any]) -> None:
        """A JSON file that must say the same."""
        expected = self.source.data(name)
        if expected is None or not self.exists(name) or self.own.data(name) == expected:
            return
        own, source = self.own.json(name), self.source.json(name)
        if isinstance(own, dict) and isinstance(source, dict):
            for what in _changes(meaning(own), meaning(source)):
                self.fault(name, what)
        elif own is not None and source is not None:
            self.fault(name, f"{name} is not the float checkpoint's")

    def tokenizer_settings(self) -> None:
        source, own = self.source.object(TOKENIZER_SETTINGS), self.own.object(TOKENIZER_SETTINGS)
        if self.source.data(TOKENIZER_SETTINGS) is None or not self.exists(TOKENIZER_SETTINGS) or own == source:
            return
        kinds = own.get("tokenizer_class"), source.get("tokenizer_class")
        if NEW_CLASS not in kinds and kinds[0] != kinds[1]:  # the older version has another name of the new class
            names = [value_text(kind) for kind in kinds]
            self.fault(TOKENIZER_SETTINGS, f"tokenizer_class is {names[0]}; the float checkpoint has {names[1]}")
        self.differences(TOKENIZER_SETTINGS, _tokenizer_settings(own), _tokenizer_settings(source))


# ---- what a file means -----------------------------------------------------------------------------------------------


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an image or video processor; limits in `size` count where those of older versions are missing."""
    size = settings.get("size")
    limits = {}
    if isinstance(size, Mapping):
        limits = {key: size[edge] for key, edge in LIMITS.items() if size.get(edge) is not None}
    kept = {key: value for key, value in settings.items() if value is not None and key not in CLASS_KEYS}
    if limits.keys() == LIMITS.keys() or kept.keys() >= LIMITS.keys():
        kept.pop("size", None)
    return limits | kept


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _other_parts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """processor_config.json without the parts and the class, which are compared on their own."""
    left_out = (IMAGES[1], VIDEOS[1], *CLASS_KEYS, *WRITER_KEYS)
    return {key: value for key, value in settings.items() if value is not None and key not in left_out}


def _template(value: Any) -> str | None:
    """A template, or the one named `default` of several."""
    if isinstance(value, list):
        value = {each.get("name"): each.get("template") for each in value if isinstance(each, dict)}
    if isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) else None


def _tokenizer(content: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json by dotted key; merges as pairs."""
    meaning = {key: value for key, value in content.items() if key not in ("version", "model") and value is not None}
    meaning["added_tokens"] = {str(token.get("id")): token for token in _objects(content.get("added_tokens"))}
    model = content.get("model")
    for key, value in (model if isinstance(model, Mapping) else {}).items():
        if key == "merges" and isinstance(value, list):
            value = [pair.split(" ") if isinstance(pair, str) else pair for pair in value]
        if value is not None:
            meaning[f"model.{key}"] = value
    return meaning


def _tokenizer_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: special tokens as text, the lists of both forms as one; without the chat template."""
    kept = {
        key: _token(value)
        for key, value in settings.items()
        if value is not None and key not in (TEMPLATE, *SESSION_KEYS)
    }
    extra, listed = kept.pop("extra_special_tokens", None), kept.pop("additional_special_tokens", None)
    named = kept.pop("model_specific_special_tokens", None)
    tokens = [*(listed if isinstance(listed, list) else []), *(extra if isinstance(extra, list) else [])]
    for names in (extra, named):
        kept |= {key: _token(value) for key, value in names.items()} if isinstance(names, Mapping) else {}
    return kept | ({"additional_special_tokens": sorted(map(_token, tokens), key=str)} if tokens else {})


def _token(value: Any) -> Any:
    """A token that is stored as an object with its content -> the content."""
    return value["content"] if isinstance(value, Mapping) and "content" in value else value


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    yield from (each for each in (value if isinstance(value, list) else []) if isinstance(each, Mapping))


def _without(content: Mapping[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    return {key: _token(value) for key, value in content.items() if value is not None and key not in keys}


def _changes(own: Mapping[str, Any], source: Mapping[str, Any]) -> Iterator[str]:
    """How two JSON objects differ, key by key; long values by the number of their entries that differ."""
    for key in dict.fromkeys([*source, *own]):
        stored, expected = own.get(key), source.get(key)
        if same_value(stored, expected):
            continue
        if isinstance(stored, Mapping) and isinstance(expected, Mapping):
            names = dict.fromkeys([*expected, *stored])
            different = [name for name in names if not same_value(stored.get(name), expected.get(name))]
            yield f"{key}: {len(different)} entries are not the float checkpoint's: {format_list(map(repr, different))}"
        elif isinstance(stored, list) and isinstance(expected, list) and max(len(stored), len(expected)) > 8:
            yield f"{key}: the list is not the float checkpoint's ({len(stored)} and {len(expected)} entries)"
        else:
            yield f"{key} is {value_text(stored)}; the float checkpoint has {value_text(expected)}"
