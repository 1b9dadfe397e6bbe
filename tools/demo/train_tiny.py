"""Trains the checkpoint `tools/demo/tiny_vl` from random weights, or a wider one.

Requires transformers 4.49; takes 10 minutes on two CPU cores. Tokenizer and processor are copied from
`tools/demo/tiny_vl`.

    python -m tools.demo.train_tiny TARGET [--steps 3000] [--minutes 10] [--batch 64] [--hidden 192] [--seed 0]
"""

import argparse
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl as modeling
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tools.demo import tiny_task as task

SIDE_FILES = (
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
WARM_UP_STEPS, FINAL_LEARNING_RATE = 100, 0.02  # the latter relative to the maximum
NAMING_PART = 0.4  # share of the training with `naming_loss`
WEIGHT_DECAY = 0.05


def configuration(hidden: int) -> Qwen2_5_VLConfig:
    """Configuration of the checkpoint; `hidden`: width of the language model, six heads of a multiple of 16."""
    head = hidden // 6
    vision = dict(
        depth=4,
        hidden_size=128,
        intermediate_size=344,
        num_heads=4,
        out_hidden_size=hidden,
        window_size=56,
        fullatt_block_indexes=[1, 3],
        patch_size=task.PATCH,
        spatial_merge_size=task.MERGE,
        temporal_patch_size=task.FRAMES,
        in_chans=3,
    )
    return Qwen2_5_VLConfig(
        vision_config=vision,
        hidden_size=hidden,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=hidden * 8 // 3,
        vocab_size=task.VOCABULARY,
        max_position_embeddings=1024,
        rope_theta=1e4,
        rope_scaling={"type": "mrope", "mrope_section": [head // 8, head // 16 * 3, head // 16 * 3]},
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
        image_token_id=task.IMAGE,
        video_token_id=task.VIDEO,
        vision_start_token_id=task.VISION_START,
        vision_end_token_id=task.VISION_END,
        vision_token_id=task.VISION_PAD,
        bos_token_id=task.BEGIN,
        eos_token_id=task.END,
        pad_token_id=task.PAD,
    )


def attend_in_equal_windows(
    attention: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    rotary_pos_emb: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Vision attention [patches, hidden] for windows of equal length, as in this task.

    The model's own attention builds one mask over all images of the batch, and is several times slower.
    """
    assert position_embeddings is not None
    patches, window = len(hidden_states), int(cu_seqlens[1] - cu_seqlens[0])
    qkv = attention.qkv(hidden_states).reshape(patches, 3, attention.num_heads, -1)
    query, key, value = qkv.permute(1, 0, 2, 3).unbind(0)
    query, key = modeling.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    per_window = [
        part.reshape(patches // window, window, attention.num_heads, -1).transpose(1, 2) for part in (query, key, value)
    ]
    mixed = F.scaled_dot_product_attention(*per_window).transpose(1, 2).reshape(patches, -1)
    out: Tensor = attention.proj(mixed)
    return out


def naming_loss(logits: Tensor, drawing: task.Drawing) -> Tensor:
    """Cross-entropy of predicting each cell's digit and color at its image token; logits [batch, length, 64]."""
    cells = logits[:, 2 : 2 + task.CELLS].float()  # after <bos> and <|vision_start|>
    digits = cells[..., task.FIRST_DIGIT : task.FIRST_DIGIT + 10].flatten(0, 1)
    colors = cells[..., task.FIRST_COLOR : task.FIRST_COLOR + len(task.COLORS)].flatten(0, 1)
    return F.cross_entropy(digits, torch.from_numpy(drawing.digits).flatten()) + F.cross_entropy(
        colors, torch.from_numpy(drawing.colors).flatten()
    )


def train(
    steps: int = 3000,
    minutes: float = 10.0,
    batch: int = 64,
    learning_rate: float = 1e-3,
    hidden: int = 192,
    seed: int = 0,
) -> Qwen2_5_VLForConditionalGeneration:
    """A model in evaluation mode, trained for `steps` steps or `minutes` of processor time, whichever ends first."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    modeling.Qwen2_5_VLVisionSdpaAttention.forward = attend_in_equal_windows
    model = Qwen2_5_VLForConditionalGeneration(configuration(hidden)).train()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    started = time.process_time()
    for step in range(steps):
        progress = min(1.0, max(step / steps, (time.process_time() - started) / (60 * minutes)))
        decay = (1 + math.cos(math.pi * progress)) / 2 * (1 - FINAL_LEARNING_RATE) + FINAL_LEARNING_RATE
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / WARM_UP_STEPS) * decay
        drawing = task.draw(batch, random, "train")
        input_ids, is_answer = task.write_sentences(drawing, random)
        inputs = task.model_inputs(drawing.images, input_ids)
        logits = model(**inputs, use_cache=False).logits
        mask = torch.from_numpy(is_answer)[:, 1:]
        predicted, target = logits[:, :-1][mask].float(), inputs["input_ids"][:, 1:][mask]
        loss = F.cross_entropy(predicted, target)
        correct = (predicted.argmax(-1) == target).float().mean().item()
        if step % 25 == 0:
            print(f"{100 * progress:.0f} % done: loss {loss.item():.3f}, {100 * correct:.1f} % correct", flush=True)
        if progress < NAMING_PART:
            loss = loss + (1 - progress / NAMING_PART) * naming_loss(logits, drawing)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress >= 1:
            break
    return model.eval()


def main() -> None:
    """Entry point: trains, saves the checkpoint folder and prints its accuracy."""
    parser = argparse.ArgumentParser(description="Train a tiny Qwen2.5-VL on images of colored digits.")
    parser.add_argument("target", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=10.0, help="processor time after which training ends")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--hidden", type=int, default=192, help="width of the language model, a multiple of 96")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = train(options.steps, options.minutes, options.batch, options.learning_rate, options.hidden, options.seed)
    model.save_pretrained(options.target)
    for name in SIDE_FILES:
        shutil.copyfile(Path(__file__).parent / "tiny_vl" / name, options.target / name)
    print(f"{options.target}: {task.accuracy(model):.2f} % correct on unseen renderings")


if __name__ == "__main__":
    main()
