"""Pictures and text -> the tensors that Qwen2.5-VL's forward takes, with the checkpoint's own tokenizer and settings.

The processor class of transformers is not used: in 5.x it wants torchvision. Image processor, chat template and
tokenizer are called directly instead, which gives the tensors of the 4.49 processor in every version.
"""

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlqc.errors import Fault, UserError
from vlqc.files import read_json_object
from vlqc.frontend.calibration.image_budget import grid_within
from vlqc.frontend.calibration.images import BadPicture, load_process_vision_info
from vlqc.frontend.checkpoint.config_schema import SWITCH, Kind, number, optional, several, whole

if TYPE_CHECKING:
    from PIL.Image import Image

FAST_TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (FAST_TOKENIZER, "vocab.json", "tokenizer.model", "tokenizer_config.json")
IMAGE_SETTINGS = "preprocessor_config.json"
ALL_SETTINGS = "processor_config.json"  # newer transformers keep the settings of every part in this one file
FEWEST_TOKENS = 4  # qwen_vl_utils enlarges every picture to as many
TOKENIZERS = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
IMAGE_PROCESSORS = (
    "Qwen2VLImageProcessor",
    "Qwen2VLImageProcessorFast",
    "Qwen2VLImageProcessorPil",
    "Qwen2_5_VLImageProcessor",
)
SIDES = {"patch_size": 128, "merge_size": 8, "temporal_patch_size": 16}  # at most; 14, 2 and 2 in every published model
LARGEST_LEAST = 16384 * 28 * 28  # pixels to which pictures may be enlarged: the most that qwen_vl_utils leaves of one
MOST_PIXELS = 2**40  # that a picture may keep; means no bound
READY_INPUTS = "or call vlqc.compile from Python with samples=[...], ready model inputs that need neither"

Patches = tuple[torch.Tensor, torch.Tensor]  # pixel_values [P, C*T*p*p] float32, image_grid_thw [1, 3] int64


class ModelInputs:
    """Makes model inputs with what lies in `model_path`. No network. UserError if tokenizer or settings are unusable.

    notes: what the user should know about how prompts were built.
    """

    def __init__(self, model_path: Path, *, trust_remote_code: bool = False) -> None:
        self._model_path = model_path
        self._trust_remote_code = trust_remote_code
        self._tokenizer = self._load_tokenizer()
        self._image_token: str = getattr(self._tokenizer, "image_token", None) or "<|image_pad|>"
        self._template = _read_chat_template(model_path) or _only_template(self._tokenizer.chat_template)
        self.notes = (
            [] if self._template else [f"{model_path} has no chat template: prompts follow Qwen2.5-VL's own form"]
        )

    def patches_of(self, picture: "Image", most_tokens: int | None = None) -> Patches:
        """An RGB picture -> its patches and its grid. Raises BadPicture with the processor's reason.

        most_tokens: how many image tokens it may become, at least `fewest_tokens`; None: whatever its size gives.
        """
        self._check_image_token()
        shown: dict[str, Any] = {"type": "image", "image": picture}
        if most_tokens is not None:
            rows, columns = grid_within(picture.height / picture.width, self.fewest_tokens, most_tokens)
            shown |= {"resized_height": rows * self._token_side, "resized_width": columns * self._token_side}
        asked = [{"role": "user", "content": [shown]}]
        try:
            resized, _ = self._process_vision_info(asked)
            made = self._image_processor(images=resized, return_tensors="pt")
            return made["pixel_values"].to(torch.float32), made["image_grid_thw"].to(torch.int64)
        except Exception as error:  # its checks of size and shape, and whatever its settings break
            raise BadPicture(f"the image processor refuses it: {str(error).strip() or type(error).__name__}") from error

    def tokens_of(self, patches: Patches) -> int:
        """How many image tokens a picture becomes."""
        return int(patches[1].prod()) // int(self._image_processor.merge_size**2)

    @property
    def fewest_tokens(self) -> int:
        """How few image tokens a picture can become: smaller pictures are enlarged by their preparation."""
        processor = self._image_processor
        pixels = int(getattr(processor, "min_pixels", None) or processor.size["shortest_edge"])
        return max(FEWEST_TOKENS, math.ceil(pixels / self._token_side**2))

    @property
    def _token_side(self) -> int:
        """Pixels along a side of one image token."""
        return int(self._image_processor.patch_size * self._image_processor.merge_size)

    def build(self, pictures: list[Patches], prompt: str, response: str | None = None) -> dict[str, torch.Tensor]:
        """The pictures, then the prompt, then the response if any -> input_ids, attention_mask [1, S] int64, and with
        pictures pixel_values [P, C*T*p*p] float32, image_grid_thw [n, 3] int64. ValueError if a text holds pictures."""
        if any(self._image_token in text for text in (prompt, response or "")):
            raise ValueError(f"the text contains {self._image_token}, which stands for a picture")
        text = self._in_chat_form(len(pictures), prompt, response)
        tokens_of = [self.tokens_of(patches) for patches in pictures]
        pieces = text.split(self._image_token)
        if len(pieces) != len(pictures) + 1:
            what = f"the chat template of {self._model_path} does not show every picture once"
            raise UserError(Fault(what, why=f"{len(pictures)} pictures, {len(pieces) - 1} times {self._image_token}"))
        text = pieces[0] + "".join(
            self._image_token * count + piece for count, piece in zip(tokens_of, pieces[1:], strict=True)
        )
        with _blamed(f"the tokenizer in {self._model_path} cannot be used", f"take its files anew, {READY_INPUTS}"):
            tokens = self._tokenizer([text], padding=False, return_attention_mask=True, return_tensors="pt")
            sample = {name: tokens[name].to(torch.int64) for name in ("input_ids", "attention_mask")}
        if pictures:
            sample["pixel_values"] = torch.cat([patches for patches, _ in pictures])
            sample["image_grid_thw"] = torch.cat([grid for _, grid in pictures])
        return sample

    def _in_chat_form(self, pictures: int, prompt: str, response: str | None) -> str:
        """The conversation as one text, with one image token per picture."""
        if self._template is None:
            return self._in_own_form(pictures, prompt, response)
        asked = [{"type": "image", "image": "picture"}] * pictures + [{"type": "text", "text": prompt}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": asked}]
        if response is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": response}]})
        # a template is a program of the checkpoint's author: it may raise anything
        with _blamed(f"the chat template of {self._model_path} cannot be used", f"repair it, {READY_INPUTS}"):
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=response is None
            )
        return str(text)

    def _in_own_form(self, pictures: int, prompt: str, response: str | None) -> str:
        """Qwen2.5-VL's conversation for checkpoints that were saved without a template; bare if turns are unmarked."""
        asked = f"<|vision_start|>{self._image_token}<|vision_end|>" * pictures + prompt
        if "<|im_start|>" not in self._tokenizer.get_vocab():
            return asked + ("" if response is None else f" {response}")
        turns = [("system", "You are a helpful assistant."), ("user", asked)]
        if response is not None:
            turns.append(("assistant", response))
        text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)
        return text if response is not None else f"{text}<|im_start|>assistant\n"

    def _check_image_token(self) -> None:
        """The tokenizer must know the image token by the number under which the model looks for it."""
        known = self._tokenizer.get_vocab().get(self._image_token)
        wanted = _read_json(self._model_path / "config.json").get("image_token_id", known)
        if known is None or known != wanted:
            what = f"the tokenizer of {self._model_path} does not fit the model"
            why = f"{self._image_token} has number {known} in the tokenizer and {wanted} in config.json"
            raise UserError(Fault(what, why=why, fix=f"use the tokenizer that belongs to the model, {READY_INPUTS}"))

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        if not any((self._model_path / name).is_file() for name in TOKENIZER_FILES):
            what, why = f"{self._model_path} has no tokenizer", f"there is none of {', '.join(TOKENIZER_FILES)}"
            raise UserError(Fault(what, why=why, fix=f"copy the tokenizer files of the model, {READY_INPUTS}"))
        self._require_class(self._model_path / "tokenizer_config.json", "tokenizer_class", TOKENIZERS)
        return self._load("tokenizer", AutoTokenizer)

    def _require_class(self, path: Path, key: str, known: tuple[str, ...]) -> None:
        """Of all the classes that transformers could be told to load, those that Qwen2.5-VL comes with.

        Others read other files, in ways that nobody looked at here: pickles, among them.
        """
        name = _read_json(path).get(key)
        if name is not None and name not in known and not self._trust_remote_code:
            why = f"{key} is {name!r}; Qwen2.5-VL comes with {' or '.join(known)}"
            fix = f"add --trust_remote_code True if you trust it, {READY_INPUTS}"
            raise UserError(Fault(f"{path.name} names an unknown class", str(path), why, fix))

    @cached_property
    def _image_processor(self) -> Any:
        """The slow (Pillow) image processor with the checkpoint's settings."""
        import transformers

        settings = _read_json(self._model_path / IMAGE_SETTINGS)
        nested = _read_json(self._model_path / ALL_SETTINGS).get("image_processor", {})
        if faults := settings_faults(settings or nested, str(self._model_path / IMAGE_SETTINGS)):
            raise UserError(*faults)
        self._require_class(self._model_path / IMAGE_SETTINGS, "image_processor_type", IMAGE_PROCESSORS)
        if not settings and not nested:
            what = f"{self._model_path} has no settings for pictures"
            why = f"there is no readable {IMAGE_SETTINGS} (nor a {ALL_SETTINGS} with the part image_processor)"
            raise UserError(Fault(what, why=why, fix=f"copy {IMAGE_SETTINGS} of the model, {READY_INPUTS}"))
        several_backends = importlib.util.find_spec("transformers.image_processing_backends") is not None
        if several_backends:
            processor = self._load("image processor", transformers.AutoImageProcessor, backend="pil")
        elif settings:
            processor = self._load("image processor", transformers.AutoImageProcessor, use_fast=False)
        else:  # this transformers does not look into processor_config.json
            with _blamed(f"the image processor in {self._model_path} cannot be loaded", f"repair {ALL_SETTINGS}"):
                processor = transformers.Qwen2VLImageProcessor.from_dict(nested)
        size = (settings or nested).get("size") or {}
        if hasattr(
            processor, "min_pixels"
        ):  # older transformers read these and ignore `size`, newer ones write `size` only
            processor.min_pixels = (settings or nested).get("min_pixels") or size.get(
                "shortest_edge", processor.min_pixels
            )
            processor.max_pixels = (settings or nested).get("max_pixels") or size.get(
                "longest_edge", processor.max_pixels
            )
        return processor

    @cached_property
    def _process_vision_info(self) -> Any:
        return load_process_vision_info()

    def _load(self, part: str, kind: Any, **more: Any) -> Any:
        try:
            return kind.from_pretrained(
                self._model_path, trust_remote_code=self._trust_remote_code, local_files_only=True, **more
            )
        except BaseException as error:  # OSError, ValueError, KeyError, or what the model's own code raises
            if not _is_ordinary(error):
                raise
            own_code = "trust_remote_code" in str(error) and not self._trust_remote_code
            repair = (
                "add --trust_remote_code True if you trust it" if own_code else "copy its files from the model anew"
            )
            what = f"the {part} in {self._model_path} cannot be loaded"
            why = str(error).strip() or type(error).__name__
            if part == "tokenizer" and not (self._model_path / FAST_TOKENIZER).is_file():
                why = f"there is no {FAST_TOKENIZER}, and of the other files: {why}"
            raise UserError(Fault(what, why=why, fix=f"{repair}, {READY_INPUTS}")) from error


@contextmanager
def _blamed(what: str, fix: str) -> Iterator[None]:
    """What goes wrong inside is a fault of the checkpoint's files."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not _is_ordinary(error):
            raise
        raise UserError(Fault(what, why=str(error).strip() or type(error).__name__, fix=fix)) from error


def _is_ordinary(error: BaseException) -> bool:
    """Whether it is an error of the code that was called: a panic of the tokenizer's Rust code is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def settings_faults(settings: Any, where: str) -> list[Fault]:
    """What of a picture's preparation cannot be meant: types, and sizes that take all memory; unknown keys are none."""
    if not isinstance(settings, dict):
        return [Fault("the settings for pictures are no JSON object", where)]
    least, most = optional(whole(1, LARGEST_LEAST)), optional(whole(1, MOST_PIXELS))
    triple = Kind("three numbers", lambda it: several(number(-1e6, 1e6)).holds(it) and len(it) == 3)
    spread = Kind("three numbers above 0", lambda it: several(number(1e-6, 1e6)).holds(it) and len(it) == 3)
    size = Kind(
        f"an object with shortest_edge up to {LARGEST_LEAST} and longest_edge",
        lambda it: isinstance(it, dict) and least.holds(it.get("shortest_edge")) and most.holds(it.get("longest_edge")),
    )
    kinds = {
        **{key: whole(1, side) for key, side in SIDES.items()},
        "min_pixels": least,
        "max_pixels": most,
        "image_mean": triple,
        "image_std": spread,
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), SWITCH),
        "rescale_factor": number(1e-6, 1e6),
        "resample": whole(0, 5),
        "size": optional(size),
    }
    return [
        Fault(f"{key} is {settings[key]!r:.60}", where, f"{kind.wanted} is wanted", f"copy {IMAGE_SETTINGS} anew")
        for key, kind in kinds.items()
        if key in settings and not kind.holds(settings[key])
    ]


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file. UserError for a file that is damaged."""
    return read_json_object(path) if path.is_file() else {}


def _read_chat_template(model_path: Path) -> str | None:
    """The processor's template, which goes before the tokenizer's: the .jinja file, then the older .json file."""
    as_text = model_path / "chat_template.jinja"
    if as_text.is_file():
        with _blamed(f"{as_text.name} cannot be read", "copy it anew"):
            return as_text.read_text(encoding="utf-8")
    return _only_template(_read_json(model_path / "chat_template.json").get("chat_template"))


def _only_template(template: Any) -> str | None:
    """The template to use of what a checkpoint may hold: one text, several by name, or nothing."""
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template else None
