"""Images and text -> the tensors of a model's forward, with the tokenizer and image processor of the checkpoint.

The processor class of transformers is not used, because in 5.x it needs torchvision. Calling the image processor (its
Pillow variant), the chat template and the tokenizer directly gives the tensors of the 4.x processor in every version.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlqc.errors import Fault, InternalError, UserError
from vlqc.families.inputs.image_processing import ImageProcessing, Patches
from vlqc.families.inputs.text_inputs import TextInputs
from vlqc.formatting import excerpt, pluralize
from vlqc.frontend.calibration.conversation import Conversation, ImageRef, PixelSettings, Turn
from vlqc.frontend.calibration.image_budget import fit_grid
from vlqc.frontend.calibration.images import ImageError
from vlqc.frontend.checkpoint.config_schema import invalid_values
from vlqc.frontend.checkpoint.side_files import (
    IMAGE_KEY,
    IMAGE_SETTINGS,
    PROCESSOR_SETTINGS,
    image_settings,
    read_optional_json,
)

if TYPE_CHECKING:
    from PIL.Image import Image

FAST_TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (FAST_TOKENIZER, "vocab.json", "tokenizer.model", "tokenizer_config.json")
CLASS_KEY = "image_processor_type"
TEMPLATE_TEXT = "text"  # of the message that a chat template is tried with
READY_SAMPLES = "or call vlqc.compile from Python with samples=[...], ready model inputs that need neither"


class SampleProcessor:
    """Builds model inputs with the files in `model_path`. No network.

    inputs: of the model's family. notes: for the user, on how prompts are built. Raises UserError if the tokenizer or
    the settings are unusable. Text-only models need no image processor; they have only `build_sample`.
    """

    def __init__(self, model_path: Path, inputs: TextInputs, *, trust_remote_code: bool = False) -> None:
        self._model_path = model_path
        self._inputs = inputs
        self._trust_remote_code = trust_remote_code
        self._tokenizer = self._load_tokenizer()
        self._image_token = self._find_image_token()
        self._template = _read_chat_template(model_path) or _default_template(self._tokenizer.chat_template)
        self._checked_templates: set[bool] = set()  # with and without an image
        self.notes = self._template_notes()

    def _template_notes(self) -> list[str]:
        if self._template is None:
            return [f"{self._model_path} has no chat template: prompts have {self._inputs.title}'s default form"]
        if self._inputs.takes_parts and not self._takes_parts:
            return [f"the chat template of {self._model_path} takes text only: image tokens are part of that text"]
        return []

    def process_image(
        self, image: "Image", max_tokens: int | None = None, pixels: PixelSettings | None = None
    ) -> Patches:
        """An RGB image -> its patches and their grid.

        Args:
            image: any size; it is resized to a multiple of the size of an image token.
            pixels: size and limits that the data give; they apply before the processor's.
            max_tokens: maximum number of image tokens, at least `min_image_tokens`. None: no limit but the processor's.

        Raises:
            ImageError: with the reason of the image processor.
        """
        self._check_image_token()
        pixels = pixels or PixelSettings()
        height, width = pixels.resized_height or image.height, pixels.resized_width or image.width
        limits = {"min_pixels": pixels.min_pixels, "max_pixels": pixels.max_pixels} if not pixels.resized_height else {}
        if max_tokens is not None:
            ratio = self._processing.form.max_aspect_ratio
            rows, columns = fit_grid(height / width, self.min_image_tokens, max_tokens, ratio)
            side = self._processing.token_side(self._image_processor)
            height, width, limits = rows * side, columns * side, {}
        processor = self._image_processor
        try:
            return self._processing.process(processor, image, height, width, **limits)
        except Exception as error:  # its checks of sizes and shapes, and whatever unusual settings cause
            raise ImageError(f"image processing failed: {str(error).strip() or type(error).__name__}") from error

    def image_tokens(self, patches: Patches) -> int:
        """Number of image tokens of an image."""
        return self._processing.image_tokens(self._image_processor, patches)

    @property
    def min_image_tokens(self) -> int:
        """The smallest number of image tokens of an image: smaller images are enlarged."""
        return self._processing.min_tokens(self._image_processor)

    @property
    def _processing(self) -> ImageProcessing:
        if self._inputs.processing is None:
            raise InternalError(f"{self._inputs.title} has no images to process")
        return self._inputs.processing

    def build_sample(self, images: list[Patches], conversation: Conversation) -> dict[str, torch.Tensor]:
        """A conversation, and the patches of its images in order -> model inputs.

        Returns:
            input_ids and attention_mask [1, S] int64, with images also the tensors of
            `ImageProcessing.model_inputs`.

        Raises:
            ValueError: if a text contains image tokens, or the chat template does not take the conversation.
        """
        if self._image_token and any(self._image_token in turn.text for turn in conversation.turns):
            raise ValueError(
                f"the text contains {self._image_token}, which stands for an image; write <image> in its place"
            )
        text = self._chat_text(conversation)
        if self._image_token:
            text = self._repeat_image_tokens(text, images)
        with _checkpoint_errors(
            f"the tokenizer in {self._model_path} cannot be used", f"copy its files again, {READY_SAMPLES}"
        ):
            tokens = self._tokenizer([text], padding=False, return_attention_mask=True, return_tensors="pt")
            sample = {name: tokens[name].to(torch.int64) for name in ("input_ids", "attention_mask")}
        return sample | (self._processing.model_inputs(images) if images else {})

    def _repeat_image_tokens(self, text: str, images: list[Patches]) -> str:
        """A text with one image token per image -> one image token per image feature."""
        first, *pieces = text.split(self._image_token)
        if len(pieces) != len(images):
            counts = f"{pluralize(len(pieces), f'{self._image_token} token')} for {pluralize(len(images), 'image')}"
            raise ValueError(f"the chat template does not insert every image once: {counts}")
        return first + "".join(
            self._image_token * self.image_tokens(patches) + piece
            for patches, piece in zip(images, pieces, strict=True)
        )

    def _chat_text(self, conversation: Conversation) -> str:
        """The conversation as one text, with one image token per image."""
        if self._template is None:
            marks_turns = "<|im_start|>" in self._tokenizer.get_vocab()
            turns = [(turn.role, self._content_text(turn)) for turn in conversation.turns]
            return self._inputs.chat_text(turns, marks_turns=marks_turns)
        self._check_template(bool(conversation.images))
        try:
            return self._render(conversation, self._takes_parts)
        except BaseException as error:  # a template may raise anything, for example if the roles do not alternate
            if not _is_error_of_callee(error):
                raise
            raise ValueError(f"the chat template does not take it: {excerpt(str(error).strip(), 200)}") from error

    def _check_template(self, with_image: bool) -> None:
        """UserError if the chat template does not take a simple prompt: then it is at fault, not the samples."""
        if with_image in self._checked_templates:
            return
        question = Conversation.from_prompt((ImageRef(b""),) if with_image else (), TEMPLATE_TEXT)
        # A template is a program from the checkpoint: it may raise anything.
        with _checkpoint_errors(
            f"the chat template of {self._model_path} cannot be used", f"repair it, {READY_SAMPLES}"
        ):
            text = self._render(question, self._takes_parts)
        if with_image and text.count(self._image_token) != 1:
            what = f"the chat template of {self._model_path} does not insert every image once"
            tokens = pluralize(text.count(self._image_token), f"{self._image_token} token")
            raise UserError(Fault(what, why=f"{tokens} for 1 image", fix=f"repair it, {READY_SAMPLES}"))
        self._checked_templates.add(with_image)

    def _render(self, conversation: Conversation, as_parts: bool) -> str:
        """The chat template's text. as_parts: give the content of every message as a list of parts, otherwise as text
        with image tokens."""
        content = self._content_parts if as_parts else self._content_text
        messages = [{"role": turn.role, "content": content(turn)} for turn in conversation.turns]
        text = self._tokenizer.apply_chat_template(
            messages,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=not conversation.is_complete,
        )
        return str(text)

    def _content_parts(self, turn: Turn) -> list[dict[str, str]]:
        return [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": "image"}
            for part in turn.parts
        ]

    def _content_text(self, turn: Turn) -> str:
        return "".join(
            part if isinstance(part, str) else self._inputs.image_placeholder(self._image_token) for part in turn.parts
        )

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the chat template takes the content of a message as a list of parts, and not as text.

        Some templates for images put {{ content }} into the text as it is, those that LLaMA-Factory exports among them.
        """
        preferred = self._inputs.takes_parts
        return preferred if self._shows_text(preferred) or not self._shows_text(not preferred) else not preferred

    def _shows_text(self, as_parts: bool) -> bool:
        """Whether the template writes the text of a message that is given in this form, and only the text."""
        try:
            text = self._render(Conversation((Turn("user", (TEMPLATE_TEXT,)),)), as_parts)
        except BaseException as error:  # a template may raise anything
            if not _is_error_of_callee(error):
                raise
            return False
        return TEMPLATE_TEXT in text and "'type'" not in text and '"type"' not in text

    def _find_image_token(self) -> str:
        """The tokenizer's image token, or the family's; empty for text-only models."""
        if self._inputs.processing is None:
            return ""
        return getattr(self._tokenizer, "image_token", None) or self._inputs.processing.form.image_token

    def _check_image_token(self) -> None:
        """UserError unless the tokenizer and the model have the same id for the image token."""
        token_id = self._tokenizer.get_vocab().get(self._image_token)
        expected = self._processing.expected_image_token(read_optional_json(self._model_path / "config.json"), token_id)
        if token_id is None or token_id != expected:
            what = f"the tokenizer of {self._model_path} does not match the model"
            why = f"{self._image_token} has id {token_id} in the tokenizer and {expected} in config.json"
            raise UserError(Fault(what, why=why, fix=f"use the tokenizer of the model, {READY_SAMPLES}"))

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        if not any((self._model_path / name).is_file() for name in TOKENIZER_FILES):
            what, why = f"{self._model_path} has no tokenizer", f"there is none of {', '.join(TOKENIZER_FILES)}"
            raise UserError(Fault(what, why=why, fix=f"copy the tokenizer files of the model, {READY_SAMPLES}"))
        path = self._model_path / "tokenizer_config.json"
        self._check_class(path, read_optional_json(path), "tokenizer_class", self._inputs.form.tokenizer_classes)
        return self._load("tokenizer", AutoTokenizer)

    def _check_class(self, path: Path, settings: dict[str, Any], key: str, known: tuple[str, ...]) -> None:
        """UserError if the settings select a class that the family does not use.

        Other classes of transformers read other files, pickles among them.
        """
        name = settings.get(key)
        if name is not None and name not in known and not self._trust_remote_code:
            why = f"{key} is {name!r}; {self._inputs.title} uses {' or '.join(known)}"
            fix = f"add --trust_remote_code True if you trust it, {READY_SAMPLES}"
            raise UserError(Fault(f"{path.name} names an unsupported class", str(path), why, fix))

    def check_images(self) -> None:
        """UserError if no image could be processed, for a reason in the checkpoint's files."""
        from PIL import Image

        self._check_image_token()
        processor, side = self._image_processor, self._processing.form.token_side
        image = Image.new("RGB", (2 * side, 2 * side))
        name = image_settings(self._model_path)[1]
        what, fix = f"the settings in {name} cannot be used", f"copy {name} of the model again, {READY_SAMPLES}"
        with _checkpoint_errors(what, fix, str(self._model_path / name)):
            self._processing.process(processor, image, image.height, image.width)

    @cached_property
    def _image_processor(self) -> Any:
        """The image processor that needs Pillow only, with the checkpoint's settings; or that of its own code."""
        settings, name = image_settings(self._model_path)
        path = self._model_path / name
        if faults := settings_faults(settings, str(path), self._processing):
            raise UserError(*faults)
        known = self._processing.form.processor_classes
        self._check_class(path, settings, CLASS_KEY, known)
        if not settings:
            what = f"{self._model_path} has no image processor settings"
            why = f"there is no {IMAGE_SETTINGS}, and no {PROCESSOR_SETTINGS} with the key {IMAGE_KEY}"
            raise UserError(Fault(what, why=why, fix=f"copy {IMAGE_SETTINGS} of the model, {READY_SAMPLES}"))
        own_code = "AutoImageProcessor" in (settings.get("auto_map") or {})
        of_family = settings.get(CLASS_KEY, None if own_code else known[0]) in known
        if of_family and not (own_code and self._trust_remote_code):
            what, fix = f"the image processor in {self._model_path} cannot be loaded", f"copy {name} again"
            with _checkpoint_errors(what, f"{fix}, {READY_SAMPLES}", str(path)):
                processor = self._processing.processor_from(settings)
        else:
            processor = self._load_own_image_processor()
        self._processing.configure(processor, settings)
        return processor

    def _load_own_image_processor(self) -> Any:
        """A class that is not the family's: of the checkpoint's code, or another one of transformers."""
        import transformers

        has_backends = importlib.util.find_spec("transformers.image_processing_backends") is not None
        options: dict[str, Any] = {"backend": "pil"} if has_backends else {"use_fast": False}
        return self._load("image processor", transformers.AutoImageProcessor, **options)

    def _load(self, part: str, auto_class: Any, **options: Any) -> Any:
        try:
            return auto_class.from_pretrained(
                self._model_path, trust_remote_code=self._trust_remote_code, local_files_only=True, **options
            )
        except BaseException as error:  # OSError, ValueError, KeyError, or what the checkpoint's code raises
            if not _is_error_of_callee(error):
                raise
            needs_trust = "trust_remote_code" in str(error) and not self._trust_remote_code
            repair = "add --trust_remote_code True if you trust it" if needs_trust else "copy its files again"
            what = f"the {part} in {self._model_path} cannot be loaded"
            why = str(error).strip() or type(error).__name__
            if part == "tokenizer" and not (self._model_path / FAST_TOKENIZER).is_file():
                why = f"there is no {FAST_TOKENIZER}, and of the other files: {why}"
            raise UserError(Fault(what, why=why, fix=f"{repair}, {READY_SAMPLES}")) from error


@contextmanager
def _checkpoint_errors(what: str, fix: str, where: str = "") -> Iterator[None]:
    """Turns any error inside into a UserError about the checkpoint's files."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not _is_error_of_callee(error):
            raise
        raise UserError(Fault(what, where, str(error).strip() or type(error).__name__, fix)) from error


def _is_error_of_callee(error: BaseException) -> bool:
    """False for KeyboardInterrupt and the like. A panic in the tokenizer's Rust code is not an Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def settings_faults(settings: Any, where: str, processing: ImageProcessing) -> list[Fault]:
    """Image processor settings of the wrong type, or with sizes that exhaust the memory. Unknown keys are no faults."""
    if not isinstance(settings, dict):
        return [Fault("the image processor settings are not a JSON object", where)]
    return [
        Fault(f"{key} is {value}", where, why, f"copy {Path(where).name} again")
        for key, value, why in invalid_values(processing.settings_schema, settings, processing.form)
    ]


def _read_chat_template(model_path: Path) -> str | None:
    """The processor's chat template, which takes precedence over the tokenizer's: a .jinja or, older, a .json file."""
    as_text = model_path / "chat_template.jinja"
    if as_text.is_file():
        with _checkpoint_errors(f"{as_text.name} cannot be read", "copy it again"):
            return as_text.read_text(encoding="utf-8")
    return _default_template(read_optional_json(model_path / "chat_template.json").get("chat_template"))


def _default_template(template: Any) -> str | None:
    """The template itself, or the one named `default` of several; None if there is none."""
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template else None
