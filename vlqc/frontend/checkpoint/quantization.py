"""Tells quantized weights from float ones, and from buffers that are no weights."""

import re
from collections.abc import Mapping
from typing import Any

from vlqc.formatting import pluralize

FLOATS = ("F64", "F32", "F16", "BF16")
CONFIG_KEYS = ("quantization_config", "quantize")  # of config.json
# Names under which quantization tools store integers of a weight. A buffer, such as position_ids, has another name.
WEIGHT = re.compile(
    r"[._](weight|bias|qweight|qzeros|g_idx|weight_\w+|scales|absmax|quant_map|proj|proj_blocks|proj_scales|packed)"
    r"(\.|$)"
)


def quantized_tensors(dtypes: Mapping[str, str]) -> dict[str, str]:
    """dtype codes by tensor name -> those of tensors that hold quantized weights: neither floats nor buffers."""
    return {name: code for name, code in dtypes.items() if code not in FLOATS and WEIGHT.search(name)}


def describe_quantization(config: Mapping[str, Any], quantized: Mapping[str, str]) -> str:
    """Such as "awq, 224 tensors of dtype I32": what config.json and the tensors say."""
    settings = config.get(CONFIG_KEYS[0])
    method = settings.get("quant_method", settings.get("quant_algo")) if isinstance(settings, Mapping) else None
    codes: dict[str, int] = {}
    for code in quantized.values():
        codes[code] = codes.get(code, 0) + 1
    counts = [f"{pluralize(count, 'tensor')} of dtype {code}" for code, count in sorted(codes.items())]
    first = [f"such as {next(iter(quantized))}"] if quantized else []
    return ", ".join([*([str(method)] if method else []), *counts, *first])
