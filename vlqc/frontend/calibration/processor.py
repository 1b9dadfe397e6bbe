"""Images and text -> the tensors of a model's forward, with the tokenizer and image processor of the checkpoint.

The processor class of transformers is not used, because in 5.x it needs torchvision. Calling the image processor (its
Pillow variant), the chat template and the tokenizer directly gives the tensors of the 4.x processor in every version.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlqc.errors import Fault, InternalError, UserError
from vlqc.families.inputs.image_processing import ImageProcessing, Patches
from vlqc.families.inputs.text_inputs import TextInputs
from vlqc.families.inputs.video_processing import SampledFrames, VideoPatches, VideoProcessing, VideoTokens
from vlqc.formatting import excerpt, pluralize
from vlqc.frontend.calibration.conversation import Conversation, ImageRef, Part, PixelSettings, Turn, VideoRef
from vlqc.frontend.calibration.image_budget import fit_grid
from vlqc.frontend.calibration.images import ImageError
from vlqc.frontend.checkpoint.config_schema import invalid_values
from vlqc.frontend.checkpoint.side_files import (
    FILE_KEYS,
    IMAGE_KEY,
    IMAGE_SETTINGS,
    NAMED_TOKENS,
    PROCESSOR_SETTINGS,
    chat_template_file,
    default_template,
    image_settings,
    read_chat_template,
    read_optional_json,
    tokenizer_settings,
)

if TYPE_CHECKING:
    from PIL.Image import Image

FAST_TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (FAST_TOKENIZER, "vocab.json", "tokenizer.model", "tokenizer_config.json")
# Keys of tokenizer_config.json that matter for a tokenizer.json.
TOKEN_KEYS = (*NAMED_TOKENS, "additional_special_tokens", "extra_special_tokens", "chat_template")
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
        self._image_token, self._video_token = self._find_media_tokens()
        self._template = read_chat_template(model_path) or default_template(self._tokenizer.chat_template)
        self._frame_tokens: dict[tuple[int, int], int] = {}  # by height and width in pixels
        self._checked_templates: set[tuple[bool, bool]] = set()  # with an image, with a video
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
            (height, width), limits = self.fit_frame(height / width, max_tokens), {}
        processor = self._image_processor
        with _image_errors():
            return self._processing.process(processor, image, height, width, **limits)

    def process_video(self, frames: torch.Tensor, sampled: SampledFrames) -> VideoPatches:
        """Frames uint8 [N, 3, height, width], which are not resized any more -> their patches. Raises ImageError."""
        processor, processing = self._image_processor, self.video_processing
        with _image_errors():
            return processing.process(processor, frames, sampled)

    def image_tokens(self, patches: Patches) -> int:
        """Number of image tokens of an image."""
        return self._processing.image_tokens(self._image_processor, patches)

    def video_tokens(self, sampled: SampledFrames, height: int, width: int) -> VideoTokens:
        """Tokens of a video with frames of this size in pixels. Raises ImageError as `process_video`."""
        processor, processing = self._image_processor, self.video_processing
        if (height, width) not in self._frame_tokens:
            with _image_errors():
                self._frame_tokens[height, width] = processing.frame_tokens(processor, height, width)
        times = processing.times_with(processor, sampled)
        return VideoTokens(times, self._frame_tokens[height, width])

    def fit_frame(self, height_to_width: float, max_tokens: int) -> tuple[int, int]:
        """Pixels in height and width of an image or frame with at most so many tokens, at least `min_image_tokens`."""
        ratio = self._processing.form.max_aspect_ratio
        rows, columns = fit_grid(height_to_width, self.min_image_tokens, max_tokens, ratio)
        side = self._processing.token_side(self._image_processor)
        return rows * side, columns * side

    @property
    def min_image_tokens(self) -> int:
        """The smallest number of image tokens of an image: smaller images are enlarged."""
        return self._processing.min_tokens(self._image_processor)

    @property
    def _processing(self) -> ImageProcessing:
        if self._inputs.processing is None:
            raise InternalError(f"{self._inputs.title} has no images to process")
        return self._inputs.processing

    @property
    def video_processing(self) -> VideoProcessing:
        """That of the family."""
        if self._inputs.videos is None:
            raise InternalError(f"{self._inputs.title} has no videos to process")
        return self._inputs.videos

    def build_sample(
        self, images: Sequence[Patches], conversation: Conversation, videos: Sequence[VideoPatches] = ()
    ) -> dict[str, torch.Tensor]:
        """A conversation, and the patches of its images and of its videos in order -> model inputs.

        Returns:
            input_ids and attention_mask [1, S] int64, with images also the tensors of
            `ImageProcessing.model_inputs`, with videos those of `VideoProcessing.model_inputs`.

        Raises:
            ValueError: if a text contains image tokens, or the chat template does not take the conversation.
        """
        tokens = [
            VideoTokens(video.times, self.video_processing.step_tokens(self._image_processor, video))
            for video in videos
        ]
        sample = self.tokenize(conversation, [self.image_tokens(patches) for patches in images], tokens)
        sample |= self._processing.model_inputs(images) if images else {}
        return sample | (self.video_processing.model_inputs(videos) if videos else {})

    def tokenize(
        self, conversation: Conversation, image_tokens: Sequence[int], videos: Sequence[VideoTokens]
    ) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask [1, S] int64 of a conversation with images and videos of so many tokens.

        Raises ValueError as `build_sample`.
        """
        for token, kind, tag in ((self._image_token, "an image", "<image>"), (self._video_token, "a video", "<video>")):
            if token and any(token in turn.text for turn in conversation.turns):
                raise ValueError(f"the text contains {token}, which stands for {kind}; write {tag} in its place")
        text = self._chat_text(conversation)
        if self._image_token:
            repeated = [self._image_token * count for count in image_tokens]
            text = self._replace_tokens(text, self._image_token, repeated, "image")
        if videos:
            text = self._expand_videos(text, videos)
        with _checkpoint_errors(
            f"the tokenizer in {self._model_path} cannot be used", f"copy its files again, {READY_SAMPLES}"
        ):
            tokens = self._tokenizer([text], padding=False, return_attention_mask=True, return_tensors="pt")
            return {name: tokens[name].to(torch.int64) for name in ("input_ids", "attention_mask")}

    @staticmethod
    def _replace_tokens(text: str, token: str, replacements: Sequence[str], kind: str) -> str:
        """A text with one token per image or video -> with a replacement each. ValueError for another number."""
        first, *pieces = text.split(token)
        if len(pieces) != len(replacements):
            counts = f"{pluralize(len(pieces), f'{token} token')} for {pluralize(len(replacements), kind)}"
            raise ValueError(f"the chat template does not insert every {kind} once: {counts}")
        return first + "".join(part + piece for part, piece in zip(replacements, pieces, strict=True))

    def _expand_videos(self, text: str, videos: Sequence[VideoTokens]) -> str:
        """A text with one video token per video -> with the tokens of all of its temporal steps."""
        processing, token = self.video_processing, self._video_token
        whole = self._inputs.image_placeholder(token)
        if processing.form.timestamps and text.count(token) == text.count(whole):
            token = whole  # every step has vision_start and vision_end of its own
        steps = [processing.placeholder(self._video_token, video) for video in videos]
        return self._replace_tokens(text, token, steps, "video")

    def _chat_text(self, conversation: Conversation) -> str:
        """The conversation as one text, with one image token per image."""
        if self._template is None:
            marks_turns = "<|im_start|>" in self._tokenizer.get_vocab()
            turns = [(turn.role, self._content_text(turn)) for turn in conversation.turns]
            return self._inputs.chat_text(turns, marks_turns=marks_turns)
        self._check_template(bool(conversation.images), bool(conversation.videos))
        try:
            return self._render(conversation, self._takes_parts)
        except BaseException as error:  # a template may raise anything, for example if the roles do not alternate
            if not _is_error_of_callee(error):
                raise
            raise ValueError(f"the chat template does not take it: {excerpt(str(error).strip(), 200)}") from error

    def _check_template(self, with_image: bool, with_video: bool) -> None:
        """UserError if the chat template does not take a simple prompt: then it is at fault, not the samples."""
        if (with_image, with_video) in self._checked_templates:
            return
        media: list[Part] = [ImageRef(b"")] * with_image
        media += [VideoRef(())] * with_video
        # A template is a program from the checkpoint: it may raise anything.
        with _checkpoint_errors(
            f"the chat template of {self._model_path} cannot be used",
            f"repair it, {READY_SAMPLES}",
            where := str(chat_template_file(self._model_path)),
        ):
            text = self._render(Conversation((Turn("user", (*media, TEMPLATE_TEXT)),)), self._takes_parts)
        for given, token, kind in ((with_image, self._image_token, "image"), (with_video, self._video_token, "video")):
            if given and text.count(token) != 1:
                what = f"the chat template of {self._model_path} does not insert every {kind} once"
                tokens = pluralize(text.count(token), f"{token} token")
                raise UserError(Fault(what, where, f"{tokens} for 1 {kind}", f"repair it, {READY_SAMPLES}"))
        self._checked_templates.add((with_image, with_video))

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
        kinds = ["image" if isinstance(part, ImageRef) else "video" for part in turn.parts]
        return [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": kind, kind: kind}
            for part, kind in zip(turn.parts, kinds, strict=True)
        ]

    def _content_text(self, turn: Turn) -> str:
        tokens = [self._image_token if isinstance(part, ImageRef) else self._video_token for part in turn.parts]
        return "".join(
            part if isinstance(part, str) else self._inputs.image_placeholder(token)
            for part, token in zip(turn.parts, tokens, strict=True)
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

    def _find_media_tokens(self) -> tuple[str, str]:
        """The tokenizer's image token and video token, or the family's; empty for models without."""
        images, videos = self._inputs.processing, self._inputs.videos
        image = "" if images is None else getattr(self._tokenizer, "image_token", None) or images.form.image_token
        video = "" if videos is None else getattr(self._tokenizer, "video_token", None) or videos.form.video_token
        return image, video

    def _check_image_token(self) -> None:
        """UserError unless the tokenizer and the model have the same id for the image token."""
        self._check_token(self._image_token, self._processing.expected_image_token)

    def _check_token(self, token: str, expected_of: Callable[[Mapping[str, Any], int | None], Any]) -> None:
        token_id = self._tokenizer.get_vocab().get(token)
        expected = expected_of(read_optional_json(self._model_path / "config.json"), token_id)
        if token_id is None or token_id != expected:
            what = f"the tokenizer of {self._model_path} does not match the model"
            why = f"{token} has id {token_id} in the tokenizer and {expected} in config.json"
            raise UserError(Fault(what, why=why, fix=f"use the tokenizer of the model, {READY_SAMPLES}"))

    def _load_tokenizer(self) -> Any:
        import transformers

        if not any((self._model_path / name).is_file() for name in TOKENIZER_FILES):
            what, why = f"{self._model_path} has no tokenizer", f"there is none of {', '.join(TOKENIZER_FILES)}"
            raise UserError(Fault(what, why=why, fix=f"copy the tokenizer files of the model, {READY_SAMPLES}"))
        path = self._model_path / "tokenizer_config.json"
        settings = read_optional_json(path)
        self._check_class(path, settings, "tokenizer_class", self._inputs.form.tokenizer_classes)
        if named := [key for key in FILE_KEYS if settings.get(key) is not None]:
            what = f"{path.name} names files elsewhere: {named[0]} is {excerpt(settings[named[0]])}"
            raise UserError(Fault(what, str(path), "the tokenizer must be that of this folder", f"remove {named[0]}"))
        older_form = tokenizer_settings(settings, self._model_path, self._inputs.form)
        needs_older_form = older_form != settings and int(transformers.__version__.partition(".")[0]) < 5
        tokenizer_file = self._model_path / FAST_TOKENIZER
        if not needs_older_form or "auto_map" in settings or not tokenizer_file.is_file():
            return self._load("tokenizer", transformers.AutoTokenizer)
        what, fix = f"the tokenizer in {self._model_path} cannot be loaded", f"copy its files again, {READY_SAMPLES}"
        with _checkpoint_errors(what, fix):
            tokens = {key: value for key, value in older_form.items() if key in TOKEN_KEYS}
            return transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), **tokens)

    def _check_class(self, path: Path, settings: dict[str, Any], key: str, known: tuple[str, ...]) -> None:
        """UserError if the settings select a class that the family does not use.

        Other classes of transformers read other files, pickles among them.
        """
        name = settings.get(key)
        if name is not None and name not in known and not self._trust_remote_code:
            why = f"{key} is {name!r}; {self._inputs.title} uses {' or '.join(known)}"
            fix = f"add --trust_remote_code True if you trust it, {READY_SAMPLES}"
            raise UserError(Fault(f"{path.name} names an unsupported class", str(path), why, fix))

    def check_images(self, *, with_videos: bool = False) -> None:
        """UserError if no image, or no video, could be processed, for a reason in the checkpoint's files."""
        from PIL import Image

        self._check_image_token()
        if with_videos:
            self._check_token(self._video_token, self.video_processing.expected_token)
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
        auto_map = settings.get("auto_map")
        own_code = isinstance(auto_map, dict) and "AutoImageProcessor" in auto_map
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
def _image_errors() -> Iterator[None]:
    """Turns any error of the image processor into an ImageError with its reason."""
    try:
        yield
    except Exception as error:  # its checks of sizes and shapes, and whatever unusual settings cause
        raise ImageError(f"image processing failed: {str(error).strip() or type(error).__name__}") from error


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
