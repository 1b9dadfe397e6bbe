"""Only the families contain names of model inputs and of classes that build them."""

import re
from pathlib import Path

import vlqc

PACKAGE = Path(vlqc.__file__).parent
INPUTS = re.compile(
    r"pixel_values|image_grid_thw|video_grid_thw|mm_token_type_ids|<\|\w+_pad\|>|<\|vision_\w+\|>"
    r"|image_token_id|spatial_merge_size|patch_size|window_size|[\"']vision_config[\"']|Qwen\w*(Processor|Tokenizer)"
)


def test_inputs_are_named_in_families_only() -> None:
    """Catches a name of an input, an image token, a key of the vision tower or a processor class elsewhere."""
    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".html")]
    found = {
        f"{path.relative_to(PACKAGE)}: {match.group()}"
        for path in files
        if PACKAGE / "families" not in path.parents
        for match in INPUTS.finditer(path.read_text(encoding="utf-8"))
    }
    assert len(files) > 100 and not found
