"""A small vision-language model whose modules and config keys have other names than those of any known family.

The model code of `made_up_family.py`, which vlqc/docs/contributing.md contains, as another package would have it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from tests.support.tiny import TINY

OUTLIER = 24.0  # factor of a few channels of every norm; their consumers' columns are divided by it


class SightConfig(PretrainedConfig):  # type: ignore[misc]
    model_type = "made_up_sight"

    def __init__(self, stages: int = 2, channels: int = 64, **more: Any) -> None:
        super().__init__(**more)
        self.stages, self.channels = stages, channels
        self.in_channels, self.temporal_patch_size, self.patch_size, self.spatial_merge_size = 3, 2, 14, 2


class MadeUpConfig(PretrainedConfig):  # type: ignore[misc]
    model_type = "made_up_vl"
    sub_configs = {"vision_config": SightConfig}  # noqa: RUF012

    def __init__(self, rungs: int = 2, channels: int = 96, vision_config: Any = None, **more: Any) -> None:
        self.vision_config = SightConfig(**(vision_config or {}))
        self.rungs, self.channels, self.vocab_size = rungs, channels, 64
        self.image_token_id, self.vision_start_token_id, self.vision_end_token_id = 5, 3, 4
        super().__init__(**more)


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.result = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, rows: Tensor, allowed: Tensor) -> Tensor:
        """rows [..., S, channels]; allowed: bool [S, S]."""
        heads = (layer(rows).unflatten(-1, (4, -1)).transpose(-3, -2) for layer in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(*heads, attn_mask=allowed)
        return self.result(mixed.transpose(-3, -2).flatten(-2))


class Rung(nn.Module):
    """A block: attention and a feed-forward part."""

    def __init__(self, channels: int, norm: type[nn.Module], inner: int) -> None:
        super().__init__()
        self.before, self.middle = norm(channels), norm(channels)
        self.mix = Attention(channels)
        self.wide, self.narrow = nn.Linear(channels, inner), nn.Linear(inner, channels)

    def forward(self, rows: Tensor, allowed: Tensor) -> Tensor:
        rows = rows + self.mix(self.before(rows), allowed)
        return rows + self.narrow(functional.gelu(self.wide(self.middle(rows))))


class Funnel(nn.Module):
    """Four patches -> one image feature."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(channels)
        self.first, self.second = nn.Linear(4 * channels, 4 * channels), nn.Linear(4 * channels, out)

    def forward(self, rows: Tensor) -> Tensor:
        return self.second(functional.gelu(self.first(self.before(rows).flatten().view(-1, self.first.in_features))))


class Sight(nn.Module):
    def __init__(self, config: SightConfig, out: int) -> None:
        super().__init__()
        self.cut = nn.Conv3d(3, config.channels, (2, 14, 14), (2, 14, 14), bias=False)
        self.rungs = nn.ModuleList(Rung(config.channels, nn.LayerNorm, 128) for _ in range(config.stages))
        self.funnel = Funnel(config.channels, out)

    def forward(self, patches: Tensor, grid: Tensor) -> Tensor:
        image = torch.repeat_interleave(torch.arange(len(grid)), grid.prod(1))
        rows = self.cut(patches.view(-1, 3, 2, 14, 14)).flatten(1)
        for rung in self.rungs:
            rows = rung(rows, image[:, None] == image)
        return self.funnel(rows)


class Story(nn.Module):
    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.channels)
        self.rungs = nn.ModuleList(Rung(config.channels, Qwen2RMSNorm, 192) for _ in range(config.rungs))
        self.last = Qwen2RMSNorm(config.channels)

    def forward(self, rows: Tensor) -> Tensor:
        length = rows.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
        for rung in self.rungs:
            rows = rung(rows, allowed)
        return self.last(rows)


class MadeUpForImageText(PreTrainedModel):  # type: ignore[misc]
    config_class = MadeUpConfig

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        self.sight = Sight(config.vision_config, config.channels)
        self.story = Story(config)
        self.speak = nn.Linear(config.channels, config.vocab_size, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.story.words

    def get_output_embeddings(self) -> nn.Module:
        return self.speak

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        use_cache: bool = False,
    ) -> CausalLMOutput:
        rows = self.story.words(input_ids)
        if pixel_values is not None and image_grid_thw is not None:
            features = self.sight(pixel_values, image_grid_thw)
            rows = rows.masked_scatter((input_ids == self.config.image_token_id)[..., None], features)
        return CausalLMOutput(logits=self.speak(self.story(rows)))


def made_up_checkpoint(folder: Path) -> Path:
    """A checkpoint with random weights and outliers; tokenizer and image processor are those of the tiny checkpoint."""
    folder.mkdir()
    for path in TINY.iterdir():
        if path.suffix == ".json" and path.name != "config.json":
            shutil.copy(path, folder)
    config = {
        "model_type": "made_up_vl",
        "architectures": ["MadeUpForImageText"],
        "image_token_id": 5,
        "vocab_size": 64,
    }
    config |= {"channels": 96, "rungs": 2, "torch_dtype": "float32", "tie_word_embeddings": False}
    sizes = {"stages": 2, "channels": 64, "spatial_merge_size": 2, "patch_size": 14}
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": sizes}))
    torch.manual_seed(0)
    model = MadeUpForImageText(MadeUpConfig())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for rung in [*model.sight.rungs, *model.story.rungs]:
            for norm, readers in (
                (rung.before, (rung.mix.query, rung.mix.key, rung.mix.value)),
                (rung.middle, (rung.wide,)),
            ):
                channels = torch.randperm(norm.weight.numel(), generator=generator)[:3]
                for parameter in norm.parameters():
                    parameter[channels] *= OUTLIER
                for reader in readers:
                    reader.weight[:, channels] /= OUTLIER
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, str(folder / "model.safetensors")
    )
    return folder
