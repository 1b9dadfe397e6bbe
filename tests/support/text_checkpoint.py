"""The small files of a text-only checkpoint, with a tokenizer of one token per byte."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

FIRST_SPECIAL = 256  # id; the ids below are those of bytes
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# As in Qwen3's template, content that is not a text is an error.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content.startswith('x') %}{% endif %}{{ message.content + '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_text_checkpoint(folder: Path, model_type: str = "qwen2", template: str | None = TEMPLATE) -> Path:
    """A folder with config.json and tokenizer files, without weights; ids of bytes are the bytes."""
    folder.mkdir(parents=True)
    alphabet = byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={character: byte for byte, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 32768}
    settings |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def byte_alphabet() -> list[str]:
    """The characters by which byte-level tokenizers write the bytes 0 to 255: printable ones are themselves."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_ids(text: str) -> list[int]:
    """Token ids of a text with special tokens, independent of the tokenizer."""
    for number, token in enumerate(SPECIAL):
        if token in text:
            before, after = text.split(token, 1)
            return [*byte_ids(before), FIRST_SPECIAL + number, *byte_ids(after)]
    return list(text.encode())
