"""Report data and timings of a model of any size, made without a compilation."""

import json
import math
import random
from pathlib import Path
from typing import Any

from vlqc.reporting.html.schema import (
    SHARES,
    InputData,
    PassTime,
    ReportData,
    SiteData,
    StageData,
    StageTime,
    Timings,
    rounded,
)

LANGUAGE = {
    "q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}
VISION = {
    "qkv": ("attn.qkv",),
    "proj": ("attn.proj",),
    "gate": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
MERGER: dict[str, tuple[str, ...]] = {"0": ("mlp.0",), "2": ("mlp.2",)}


def report_data(layers: int = 80, blocks: int = 32, **changes: Any) -> ReportData:
    """A model with that many decoder layers and vision blocks. changes: fields to replace."""
    generator = random.Random(layers * 1000 + blocks)
    stages = [_stage(f"visual.blocks.{n}", "vision", VISION, n, generator) for n in range(blocks)]
    stages.append(_stage("visual.merger", "merger", MERGER, 0, generator))
    stages += [_stage(f"model.layers.{n}", "language", LANGUAGE, n, generator) for n in range(layers)]
    fields: dict[str, Any] = {
        "version": "0.1.0",
        "command": ("vlqc", "compile", "--model_path", "MODEL_PATH", "--calib_images", "IMAGES", "--save_directory",
                    "SAVE_DIRECTORY", "--w_bit", "4", "--exclude", "visual.blocks.3.*"),
        "ready_samples": False,
        "pipeline": "insert-observers{tokens=4096},assign-precision{scheme=W4A8_DYNAMIC},lower-linears",
        "target": "vllm-ascend",
        "dtype": "bfloat16",
        "bytes_before": 145_000_000_000,
        "heads": ("lm_head",),
        "notes": ("skipped IMAGES/a.jpg: truncated", "no engine loads it\nwhy: a reason\nwhat to do: wait"),
        "predicted": None,
        "stages": tuple(stages),
    }  # fmt: skip
    return ReportData(**(fields | changes))


def write_folder(path: Path, data: ReportData) -> Path:
    """A folder with this report data and the other files that the report reads."""
    path.mkdir(parents=True)
    config: dict[str, Any] = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    config |= {"num_hidden_layers": 80, "hidden_size": 8192}
    (path / "config.json").write_text(json.dumps(config | {"vision_config": {"depth": 32, "hidden_size": 1280}}))
    description = {f"{site.name}.weight": site.scheme for stage in data.stages for site in stage.sites}
    (path / "quant_model_description.json").write_text(json.dumps({"model_quant_type": "W8A8", **description}))
    data.write(path)
    return path


def timings(data: ReportData) -> Timings:
    generator = random.Random(0)
    passes = [(name.partition("{")[0], generator.uniform(1, 900)) for name in data.pipeline.split(",")]
    return Timings(
        seconds=sum(seconds for _, seconds in passes) + 200,
        peak_bytes=12 << 30,
        passes=tuple(PassTime(name=name, seconds=sec, raised_bytes=int(sec) << 20) for name, sec in passes),
        stages=tuple(StageTime(name=stage.name, seconds=generator.uniform(10, 20)) for stage in data.stages),
        system="Linux aarch64",
        processors=192,
        versions={"python": "3.11", "vlqc": "0.1.0"},
    )


def _stage(
    name: str, part: str, groups: dict[str, tuple[str, ...]], number: int, generator: random.Random
) -> StageData:
    sites, inputs = [], []
    for role, members in groups.items():
        names = tuple(f"{name}.{member}" for member in members)
        scheme, reason, size = "W8A8", "", None
        if role in ("down", "down_proj") and generator.random() < 0.8:
            scheme, reason = "FLOAT", "excluded by --fallback reference"
        elif part == "language" and role != "q_proj":
            scheme, size = "W4A8_DYNAMIC", 64
        elif part == "language":
            scheme, reason = "W8A8_DYNAMIC", "vllm-ascend does not accept W4A8_DYNAMIC here"
        low, high = (-3.5, 3.25) if scheme == "W8A8" else (None, None)
        sites += [
            SiteData(name=each, shape=(8192, 8192), scheme=scheme, reason=reason, group_size=size, low=low, high=high)  # type: ignore[arg-type]
            for each in names
        ]
        modalities = ("text", "image") if part == "language" else ("image",)
        height = generator.uniform(5, 40) * (30 if number % 29 == 11 else 1)
        inputs.append(
            InputData(
                sites=names,
                channels=8192,
                before={each: _curve(height * generator.uniform(0.4, 1), 1 + math.log(height)) for each in modalities},  # type: ignore[misc]
                after={each: _curve(2.5 * generator.uniform(0.8, 1), 0.2 * math.log(height)) for each in modalities},  # type: ignore[misc]
                scales=_curve(height / 3, 3.0) if role not in ("down", "2") else None,
            )
        )
    sqnr = {each: rounded(generator.gauss(38, 3)) for each in (("text", "image") if part == "language" else ("image",))}
    rows = {"image": 40000} | ({"text": 9000} if part == "language" else {})
    return StageData(
        name=name, part=part, samples=30, rows=rows, sqnr=sqnr, sites=tuple(sites), inputs=tuple(inputs)  # type: ignore[arg-type]
    )  # fmt: skip


def _curve(largest: float, steepness: float) -> tuple[float, ...]:
    """Magnitudes that decrease quickly at first, as with outlier channels."""
    return tuple(rounded(largest * math.exp(-steepness * share**0.3)) for share in SHARES)
