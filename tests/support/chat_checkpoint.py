"""The small files of a vision-language checkpoint whose chat template has roles, a default system prompt and images."""

import json
import shutil
from pathlib import Path

from tests.support.calibration_files import TINY
from tests.support.text_checkpoint import write_text_checkpoint

VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IMAGE_TOKEN = 261  # bytes, three special tokens of the text checkpoint, then VISION
# Content as text or as a list of parts, as in the template of Qwen2.5-VL.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_chat_checkpoint(folder: Path, template: str = TEMPLATE) -> Path:
    """A folder with config.json, tokenizer and image settings of the tiny checkpoint, without weights; ids of bytes are
    the bytes."""
    write_text_checkpoint(folder, "qwen2_5_vl", template)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = tokenizer["added_tokens"]
    tokenizer["added_tokens"] += [
        {**special[0], "id": len(special) + 256 + number, "content": token} for number, token in enumerate(VISION)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((TINY / "config.json").read_text())
    ids = {"vision_start_token_id": 259, "vision_end_token_id": 260, "image_token_id": 261, "video_token_id": 262}
    (folder / "config.json").write_text(json.dumps({**config, **ids, "vocab_size": 263}))
    shutil.copyfile(TINY / "preprocessor_config.json", folder / "preprocessor_config.json")
    return folder
