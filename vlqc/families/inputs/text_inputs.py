"""Model inputs of text-only language models, and the interface of the inputs of all families."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlqc.errors import Fault
from vlqc.families.inputs.image_processing import ImageProcessing
from vlqc.families.inputs.input_format import TextFormat
from vlqc.families.inputs.video_processing import VideoProcessing
from vlqc.formatting import did_you_mean

TEXT_INPUTS = ("input_ids", "attention_mask")  # [1, S] int64
PROBE_TOKENS = 128  # of the probe that is cut out of a text
SYNTHETIC_TOKENS = 8  # of text in a synthetic sample, on either side of an image
SYNTHETIC_VOCABULARY = 1000  # random token ids are below it
LARGEST_SAMPLE = 1 << 24  # values of a smallest sample; those of published models have some 20,000

Sample = Mapping[str, Tensor]


class TextInputs:
    """Inputs of the forward of one family. A sample is a dict of tensors, one batch of size 1.

    `config` is the config of the transformers model.

    title: of the family; form: tokenizer and chat form; processing: of images, None for text-only models; videos: of
    videos, None for models without. required:
    names of the tensors of every sample; optional: others that a sample may have; refused: name -> reason. integers:
    names of integer tensors. takes_parts: whether the family's chat templates take the content of a message as a list
    of parts, otherwise as text.
    """

    required: ClassVar[tuple[str, ...]] = TEXT_INPUTS
    optional: ClassVar[tuple[str, ...]] = ()
    refused: ClassVar[Mapping[str, str]] = {}
    integers: ClassVar[tuple[str, ...]] = TEXT_INPUTS
    description: ClassVar[str] = "a sample has input_ids and attention_mask"
    takes_parts: ClassVar[bool] = False
    processing: ImageProcessing | None = None
    videos: VideoProcessing | None = None

    def __init__(self, title: str, form: TextFormat) -> None:
        self.title, self.form = title, form

    # ---- checks ------------------------------------------------------------------------------------------------------

    def faults(self, where: str, sample: object, model: nn.Module) -> list[Fault]:
        """Everything that is wrong with a sample. where: names it; model: that it must match."""
        if not isinstance(sample, Mapping):
            return [Fault(f"a sample is a {type(sample).__name__}", where, "a dict of tensors is expected")]
        faults = [fault for key in sample if (fault := self._key_fault(where, key))]
        if missing := [key for key in self._required_of(sample) if not isinstance(sample.get(key), Tensor)]:
            return [*faults, *(Fault(f"the tensor {key} is missing", where, self.description) for key in missing)]
        ids = sample["input_ids"]
        if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or not is_integer(ids):
            return [*faults, Fault(f"input_ids is {describe(ids)}", where, "integers [1, S] with S > 0 are expected")]
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        faults += self._text_faults(where, sample, embeddings.num_embeddings)
        return faults + self._image_faults(where, sample, model.config)

    def _required_of(self, sample: Sample) -> tuple[str, ...]:
        return self.required

    def _key_fault(self, where: str, key: object) -> Fault | None:
        if key in self.refused:
            return Fault(self.refused[str(key)], where, fix="calibrate with images")
        if key in self.required or key in self.optional:
            return None
        known = self._shown_names()
        fix = did_you_mean(str(key), known) or f"a sample has {', '.join(known)}"
        return Fault(f"unknown model input {key!r}", where, fix=fix)

    def _shown_names(self) -> tuple[str, ...]:
        return self.required

    def _text_faults(self, where: str, sample: Sample, vocabulary: int) -> list[Fault]:
        faults = []
        ids, mask = sample["input_ids"], sample["attention_mask"]
        if (
            mask.shape != ids.shape
            or mask.is_complex()
            or not bool(mask.any())
            or not bool(((mask == 0) | (mask == 1)).all())
        ):
            why = f"zeros and ones {list(ids.shape)} are expected, not all of them zero"
            faults.append(Fault(f"attention_mask is {describe(mask)}", where, why))
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            why = f"token ids range from 0 to {vocabulary - 1}"
            faults.append(Fault("a token id is outside the vocabulary", where, why))
        return faults

    def _image_faults(self, where: str, sample: Sample, config: Any) -> list[Fault]:
        return []

    def normalized(self, sample: Sample) -> dict[str, Tensor]:
        """A sample without faults, with integers as int64."""
        return {key: tensor.long() if key in self.integers else tensor for key, tensor in sample.items()}

    # ---- images of a sample ------------------------------------------------------------------------------------------

    def has_images(self, sample: Sample) -> bool:
        """Whether a sample passes the vision tower."""
        return False

    def has_videos(self, sample: Sample) -> bool:
        """Whether a sample has a video."""
        return False

    def same_images(self, first: Sample, second: Sample) -> bool:
        """Whether both samples have images, and the same images."""
        return False

    def patches(self, sample: Sample) -> int:
        """Number of patches of all images: rows of the vision tower."""
        return 0

    def patches_per_token(self, config: Any) -> int:
        """Number of patches that a merger joins to one row."""
        return 1

    def attention_pairs(self, sample: Sample, config: Any, *, windowed: bool) -> int:
        """Pairs of patches that attend to each other in one block of the vision tower; windowed: only in windows."""
        return 0

    def image_bytes(self, sample: Sample) -> int:
        """Bytes of the image tensors."""
        return 0

    def is_image_token(self, input_ids: Tensor, config: Any) -> Tensor:
        """input_ids int64 [B, S] -> bool [B, S]: tokens that stand for one feature of an image or a video each."""
        return self.token_modality(input_ids, config) != 0

    def token_modality(self, input_ids: Tensor, config: Any) -> Tensor:
        """input_ids int64 [B, S] -> int8 [B, S]: 0 text, 1 image, 2 video."""
        return torch.zeros_like(input_ids, dtype=torch.int8)

    def row_modality(self, sample: Sample, config: Any) -> Tensor:
        """input_ids and attention_mask [B, S] of a sample -> int8 [B*S]: as `token_modality`, -1 for padding."""
        ids = sample["input_ids"]
        modality = self.token_modality(ids, config)
        mask = sample.get("attention_mask")
        if mask is not None and mask.shape == ids.shape:
            modality = torch.where(mask == 0, torch.full_like(modality, -1), modality)
        return modality.flatten()

    def patch_modality(self, sample: Sample, config: Any) -> Tensor | None:
        """int8 [P]: 1 for the patches of images, 2 for those of videos, in the order in which the vision tower gets
        them; None if all are of images."""
        return None

    # ---- the forward -------------------------------------------------------------------------------------------------

    def forward_arguments(self, sample: Sample, model: nn.Module, accepted: Collection[str]) -> dict[str, Any]:
        """Keyword arguments of the forward. accepted: names of those that the installed transformers version has."""
        return {"use_cache": False, **sample}

    # ---- other samples -----------------------------------------------------------------------------------------------

    def rows(self, sample: Sample) -> int:
        """The largest number of rows that any stage computes for the sample."""
        return max(sample["input_ids"].shape[1], self.patches(sample))

    def crop(self, sample: Sample, config: Any) -> dict[str, Tensor]:
        """A small sample cut out of a large one: its first tokens, without padding."""
        ids = sample["input_ids"][sample["attention_mask"] != 0][None, :PROBE_TOKENS]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def synthetic_sample(self, config: Any, seed: int = 0, *, smallest: bool = False) -> dict[str, Tensor]:
        """A sample of random numbers that passes all stages.

        Args:
            config: of the model.
            seed: of the numbers.
            smallest: for stages that run once and whose numbers do not matter.

        Raises:
            ValueError: if the config needs a smallest sample of more than LARGEST_SAMPLE values.
        """
        generator = torch.Generator().manual_seed(seed)
        ids = torch.tensor([self._words(config, set(), generator)[: 2 * SYNTHETIC_TOKENS]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _words(self, config: Any, special: set[int], generator: torch.Generator) -> list[int]:
        """Random token ids, all different, none of them special."""
        vocabulary = getattr(config, "text_config", config).vocab_size
        order = torch.randperm(min(vocabulary, SYNTHETIC_VOCABULARY), generator=generator)
        return [word for word in order.tolist() if word not in special]

    # ---- prompts -----------------------------------------------------------------------------------------------------

    def image_placeholder(self, token: str) -> str:
        """Text that stands for one image or video in a prompt. token: the tokenizer's image token or video token."""
        raise NotImplementedError(f"{self.title} takes no images")

    def chat_text(self, turns: Sequence[tuple[str, str]], *, marks_turns: bool = True) -> str:
        """The conversation as the family's chat template writes it, for checkpoints without a template.

        Args:
            turns: role (system, user, assistant) and text of every message. Unless the last one is the assistant's, the
                text ends where that would begin.
            marks_turns: whether the tokenizer has the tokens that mark turns.
        """
        if not marks_turns:
            return " ".join(content for _, content in turns)
        if self.form.system_prompt and turns[0][0] != "system":
            turns = [("system", self.form.system_prompt), *turns]
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        return text if turns[-1][0] == "assistant" else f"{text}<|im_start|>assistant\n"


def is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool


def describe(tensor: Tensor) -> str:
    """int64[1, 5]"""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
