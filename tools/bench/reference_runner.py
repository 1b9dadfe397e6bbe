"""Quantizes a checkpoint with msModelSlim or vlqc, in the environment whose Python runs this file.

    python -m tools.bench.reference_runner {msmodelslim,vlqc} MODEL SAMPLES SAVE OPTIONS

MODEL: folder of the float checkpoint. SAMPLES: list of dicts of model inputs, written by `torch.save`. SAVE: folder to
write. OPTIONS: JSON object of options of vlqc (w_bit, anti_method, ...), which has those of msModelSlim's example
script for Qwen2.5-VL; msModelSlim ignores the others, and all of them for Qwen3-VL.

vlqc and msModelSlim need different package versions, so only the standard library is imported at the top.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

FORWARD_ORDER = (  # positional parameters of forward of Qwen2-VL and Qwen2.5-VL in transformers 4.49
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "labels",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "pixel_values",
    "pixel_values_videos",
    "image_grid_thw",
    "video_grid_thw",
)
RECIPE = "lab_practice/qwen3_vl/qwen3_vl_w8a8.yaml"
DEFAULTS = {  # of the example script
    "w_bit": 8,
    "a_bit": 8,
    "anti_method": "m2",
    "act_method": 2,
    "open_outlier": True,
    "is_dynamic": False,
    "is_lowbit": False,
    "group_size": 64,
}


def excluded_layers(config: dict[str, Any]) -> list[str]:
    """Linear layers that the example script excludes; msModelSlim itself excludes lm_head. The script is for
    Qwen2.5-VL; of Qwen2-VL the layers that correspond."""
    names = ["visual.merger.mlp.0", "visual.merger.mlp.2"]
    down = "fc2" if config["model_type"] == "qwen2_vl" else "down_proj"
    names += [f"visual.blocks.{index}.mlp.{down}" for index in range(config["vision_config"]["depth"])]
    return names + [f"model.layers.{index}.mlp.down_proj" for index in range(config["num_hidden_layers"])]


def accept_position_embeddings() -> None:
    """Lets msModelSlim's vision block of Qwen2-VL run in transformers 4.49, which passes cosines and sines [patches,
    head] in place of the angles [patches, head / 2] that the block expects."""
    import torch
    from msmodelslim.pytorch.llm_ptq.anti_outlier.anti_block import QuantQwen2VLVisionBlock  # type: ignore[import-not-found]

    forward = QuantQwen2VLVisionBlock.forward

    def adapted(block: Any, hidden_states: Any, cu_seqlens: Any, position_embeddings: Any) -> Any:
        cosine, sine = position_embeddings
        angles = torch.atan2(sine, cosine)
        return forward(block, hidden_states, cu_seqlens, angles[:, : angles.shape[1] // 2])

    QuantQwen2VLVisionBlock.forward = adapted


def run_msmodelslim(model_path: Path, samples: list[dict[str, Any]], save: Path, options: dict[str, Any]) -> None:
    """The recipe of msModelSlim for Qwen3-VL, which ignores `options`, or the example script for other models."""
    if json.loads((model_path / "config.json").read_text(encoding="utf-8"))["model_type"] == "qwen3_vl":
        run_recipe(model_path, samples, save)
    else:
        run_script(model_path, samples, save, options)


def run_recipe(model_path: Path, samples: list[dict[str, Any]], save: Path) -> None:
    """The recipe of msModelSlim for Qwen3-VL: rotation in blocks of 32, smoothing, W8A8 static.

    In float32: its RMSNorm returns float32 for every dtype, which bfloat16 linear layers do not accept on the CPU.
    """
    import msmodelslim  # type: ignore[import-not-found]
    import torch
    import yaml  # type: ignore[import-untyped]
    from msmodelslim.core.const import DeviceType  # type: ignore[import-not-found]
    from msmodelslim.core.context.context_factory import ContextFactory  # type: ignore[import-not-found]
    from msmodelslim.core.quant_service.interface import BaseQuantConfig  # type: ignore[import-not-found]
    from msmodelslim.core.quant_service.multimodal_vlm_v1.quant_service import (  # type: ignore[import-not-found]
        MultimodalVLMModelslimV1QuantService,
    )
    from msmodelslim.model.qwen3_vl.model_adapter import Qwen3VLModelAdapter  # type: ignore[import-not-found]

    class Adapter(Qwen3VLModelAdapter):  # type: ignore[misc]
        def handle_dataset(self, dataset: Any, device: Any = None) -> Any:
            return dataset

        def get_global_model_torch_dtype(self) -> torch.dtype:
            return torch.float32

    class Samples:
        """In place of a loader of image files."""

        def get_dataset_by_name(self, name: str) -> list[dict[str, Any]]:
            return samples

    recipe = yaml.safe_load((Path(msmodelslim.__file__).parent / RECIPE).read_text(encoding="utf-8"))
    service = MultimodalVLMModelslimV1QuantService(None, Samples(), ContextFactory())
    config = BaseQuantConfig(apiversion=recipe["apiversion"], spec=recipe["spec"])
    service.quantize(config, Adapter("Qwen3-VL-32B-Instruct", model_path), save, DeviceType.CPU)
    add_weight_scales(save)


def add_weight_scales(save: Path) -> None:
    """Adds the scale and offset of the weight of each static layer, [N, 1], to a folder of the recipe, which has only
    their product with the input's scale, `deq_scale` int64 [N]: the bits of float32."""
    import torch
    from safetensors.torch import load_file, save_file

    (index_path,), (description_path,) = save.glob("*.index.json"), save.glob("quant_model_description*.json")
    index, description = (json.loads(path.read_text(encoding="utf-8")) for path in (index_path, description_path))
    for path in save.glob("*.safetensors"):
        tensors = load_file(path)
        for layer in [name.removesuffix(".deq_scale") for name in tensors if name.endswith(".deq_scale")]:
            product = tensors[f"{layer}.deq_scale"].to(torch.int32).view(torch.float32)
            scale = (product / tensors[f"{layer}.input_scale"])[:, None]
            added = {f"{layer}.weight_scale": scale, f"{layer}.weight_offset": torch.zeros_like(scale)}
            tensors |= added
            index["weight_map"] |= dict.fromkeys(added, path.name)
            description |= dict.fromkeys(added, description[f"{layer}.weight"])
        save_file(tensors, path)
    for path, content in ((index_path, index), (description_path, description)):
        path.write_text(json.dumps(content), encoding="utf-8")


def run_script(model_path: Path, samples: list[dict[str, Any]], save: Path, options: dict[str, Any]) -> None:
    """The steps of the example script from `from_pretrained`: smooth, calibrate, save.

    anti_method "none" omits smoothing. Inputs are passed by position, as in the script: msModelSlim's m4 finds the
    token ids by position.
    """
    import transformers
    from msmodelslim.pytorch.llm_ptq.anti_outlier import AntiOutlier, AntiOutlierConfig  # type: ignore[import-not-found]
    from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig  # type: ignore[import-not-found]

    config = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
    model = (
        getattr(transformers, config["architectures"][0])
        .from_pretrained(model_path, device_map="cpu", torch_dtype="auto", local_files_only=True)
        .eval()
    )
    calibration = [[sample.get(name) for name in FORWARD_ORDER] for sample in samples]
    settings = {name: options.get(name, default) for name, default in DEFAULTS.items()}
    method = settings.pop("anti_method")
    if method != "none":
        bits = {name: settings[name] for name in ("w_bit", "a_bit")}
        smoothing = AntiOutlierConfig(**bits, anti_method=method, dev_type="cpu", dev_id=None)
        accept_position_embeddings()
        AntiOutlier(model, calib_data=calibration, cfg=smoothing).process()
    quantizing = QuantConfig(
        **settings, disable_names=excluded_layers(config), dev_type="cpu", dev_id=None, mm_tensor=False
    )
    calibrator = Calibrator(model, quantizing, calib_data=calibration, disable_level="L0")
    calibrator.run()
    calibrator.save(str(save), save_type=["ascendV1"])
    for path in model_path.iterdir():
        if path.suffix == ".json" and not path.name.endswith(".index.json") and not (save / path.name).exists():
            shutil.copyfile(path, save / path.name)


def run_vlqc(model_path: Path, samples: list[dict[str, Any]], save: Path, options: dict[str, Any]) -> None:
    """`vlqc.compile` with the same inputs."""
    import vlqc

    vlqc.compile(model_path=model_path, save_directory=save, samples=samples, **options)


def main(arguments: list[str]) -> None:
    """Entry point."""
    tool, model_path, samples, save, options = arguments
    import torch

    torch.set_grad_enabled(False)
    run = {"msmodelslim": run_msmodelslim, "vlqc": run_vlqc}[tool]
    run(Path(model_path), torch.load(samples), Path(save), json.loads(options))


if __name__ == "__main__":
    main(sys.argv[1:])
