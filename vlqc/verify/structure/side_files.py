"""Checks what the files beside the weights say, against each other and against config.json, without the float model.

The tokenizer must have the tokens whose ids config.json names, and no more than the embedding has rows; patches must
have the size that the vision tower reads; a chat template must be one that can be parsed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import Environment, TemplateSyntaxError

from vlqc.formatting import enumerate_first, excerpt, pluralize
from vlqc.verify.findings import VerificationResult, format_list
from vlqc.verify.folder.reader import read_json, read_json_object
from vlqc.verify.structure.structure import CompiledFolder

CHECK = "side files"
TOKENIZER, TOKENIZER_SETTINGS, CONFIG = "tokenizer.json", "tokenizer_config.json", "config.json"
GENERATION = "generation_config.json"
IMAGES = (("preprocessor_config.json", None), ("processor_config.json", "image_processor"))  # file, key in it
TEMPLATE, TEMPLATE_FILES = "chat_template", ("chat_template.json", TOKENIZER_SETTINGS)
TEMPLATE_TEXT = "chat_template.jinja"
# Keys of tokenizer_config.json under which transformers reads other files than those of the folder.
FILE_KEYS = ("tokenizer_file", "vocab_file", "merges_file", "added_tokens_file")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
UNKNOWN_TAG = "unknown tag"  # transformers adds tags of its own, such as `generation`
RESTORE = "copy it from the float checkpoint"


def check_side_file_contents(folder: CompiledFolder, result: VerificationResult) -> None:
    """Adds faults for files that contradict each other, and a warning for a missing chat template."""
    if folder.model is None:
        return  # a fault already
    tokens = _check_tokenizer(folder, result)
    settings, _ = read_json_object(folder.files.path / TOKENIZER_SETTINGS)
    for key in FILE_KEYS:
        if settings and settings.get(key) is not None:
            what = f"{key} is {excerpt(settings[key])}"
            why = "transformers reads the tokenizer from there instead of the folder"
            result.add_fault(CHECK, TOKENIZER_SETTINGS, what, why, "remove the key")
    if tokens:
        _check_ids(folder, tokens, result)
    if folder.family.image_format is not None:
        _check_image_settings(folder, result)
    _check_template(folder, result)


def _check_tokenizer(folder: CompiledFolder, result: VerificationResult) -> dict[str, int]:
    """Checks tokenizer.json -> id by token; empty without a tokenizer that can be read."""
    content, _ = read_json_object(folder.files.path / TOKENIZER)
    if content is None:
        return {}  # missing, or a fault already
    result.add_examined(CHECK)
    tokens = dict(_tokens(content))
    if not tokens:
        why = "it has no vocabulary"
        result.add_fault(CHECK, TOKENIZER, f"{TOKENIZER} is not that of a tokenizer", why, RESTORE)
        return {}
    assert folder.model is not None
    rows = folder.model.parameters[f"{folder.model.embedding}.weight"][0]
    outside = {token: number for token, number in tokens.items() if not 0 <= number < rows}
    if outside:
        what = f"{pluralize(len(outside), 'token')} without a row in the embedding, which has {rows}"
        shown = format_list(f"{token!r} is {number}" for token, number in outside.items())
        result.add_fault(CHECK, TOKENIZER, what, shown, "restore tokenizer and config.json of the float checkpoint")
    return tokens


def _tokens(content: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(token, id) of the vocabulary of tokenizer.json, added tokens last."""
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    for token, number in (vocabulary if isinstance(vocabulary, Mapping) else {}).items():
        if type(number) is int:
            yield token, number
    if isinstance(vocabulary, list):  # a unigram model: [token, score] by id
        yield from ((str(entry[0]), number) for number, entry in enumerate(vocabulary) if isinstance(entry, list))
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, Mapping) and type(token.get("id")) is int:
            yield str(token.get("content")), token["id"]


def _check_ids(folder: CompiledFolder, tokens: Mapping[str, int], result: VerificationResult) -> None:
    """The ids in config.json and generation_config.json against those of the tokenizer."""
    family, config = folder.family, folder.files.config
    named = family.image_tokens(config)
    result.add_examined(CHECK, len(named))
    for key, (token, number) in named.items():
        if token in tokens and tokens[token] != number:
            what = f"{key} is {number}, but the tokenizer has {token} as {tokens[token]}"
            why = "images would not be placed at their tokens"
            result.add_fault(CHECK, CONFIG, what, why, "restore the float checkpoint's value")
    known = set(tokens.values())
    generation, _ = read_json_object(folder.files.path / GENERATION)
    for file, content in ((CONFIG, family.config_meaning(config)), (GENERATION, generation or {})):
        for key in TOKEN_IDS:
            unknown = [number for number in _ids(content.get(key)) if type(number) is not int or number not in known]
            if unknown:
                what = f"{key} is {excerpt(unknown[0])}, which the tokenizer does not have"
                why = "generation would not start, stop or pad as the model does"
                result.add_fault(CHECK, file, what, why, "restore the float checkpoint's value")


def _ids(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _check_image_settings(folder: CompiledFolder, result: VerificationResult) -> None:
    """Sizes of patches in the settings of the image processor against those of the vision tower."""
    for file, key in IMAGES:
        content, _ = read_json_object(folder.files.path / file)
        settings = content if key is None or content is None else content.get(key)
        if not isinstance(settings, Mapping) or not settings:
            continue
        result.add_examined(CHECK)
        for what in folder.family.patch_faults(settings, folder.files.config):
            result.add_fault(CHECK, file, what, "the vision tower reads patches of another size", RESTORE)


def _check_template(folder: CompiledFolder, result: VerificationResult) -> None:
    templates = dict(_templates(folder))
    result.add_examined(CHECK, len(templates))
    for name, template in templates.items():
        try:
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)  # nothing of it runs
        except TemplateSyntaxError as error:
            if UNKNOWN_TAG in str(error.message):
                continue
            why = str(error.message)
        except (RecursionError, ValueError, OverflowError) as error:  # nested too deeply, or a number of many digits
            why = str(error)
        else:
            continue
        what = f"the chat template cannot be parsed: {enumerate_first([why])}"
        result.add_fault(CHECK, name, what, "engines build prompts with it", RESTORE)
    if not templates and folder.family.image_format is not None:
        what = "the folder has no chat template"
        result.add_warning(CHECK, TEMPLATE_TEXT, what, "engines need one for messages with images", RESTORE)


def _templates(folder: CompiledFolder) -> Iterator[tuple[str, str]]:
    """(file, template) of every file that has one, or several by name."""
    path = folder.files.path / TEMPLATE_TEXT
    if path.is_file():
        yield TEMPLATE_TEXT, path.read_text(encoding="utf-8", errors="replace")
    for name in TEMPLATE_FILES:
        content = read_json(folder.files.path / name)[0] if (folder.files.path / name).is_file() else None
        value = content.get(TEMPLATE) if isinstance(content, Mapping) else None
        several = value if isinstance(value, list) else []
        texts = [value, *(entry.get("template") for entry in several if isinstance(entry, Mapping))]
        texts += list(value.values()) if isinstance(value, Mapping) else []
        yield from ((name, text) for text in texts if isinstance(text, str))
