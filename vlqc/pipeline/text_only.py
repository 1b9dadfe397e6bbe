"""Calibration of a vision-language model with text alone: possible if nothing in its vision tower is quantized."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vlqc.errors import Fault, UserError
from vlqc.families.family import ModelFamily
from vlqc.families.registry import family_of
from vlqc.formatting import pluralize
from vlqc.frontend.calibration.dataset import selected_conversations
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.checkpoint.files import read_config
from vlqc.frontend.distributed import current_process_group
from vlqc.ir.stage import Site
from vlqc.options.options import Options
from vlqc.pipeline.layer_selection import check_globs
from vlqc.pipeline.pass_api import Pass


def require_images(options: Options, passes: Sequence[Pass], samples: Sequence[Mapping[str, Tensor]] | None) -> None:
    """UserError if the vision tower is to be quantized and no calibration sample has an image.

    Builds no model and opens no image. The stages of a vision tower that stays float run on a made-up image, for the
    proofs of rotations, and nothing is observed there.

    samples: ready model inputs, not checked yet; None: those of options.calib_images.
    """
    config_file = options.model_path / "config.json"
    if not current_process_group().is_rank0 or not options.model_path.is_dir():
        return
    family = family_of(read_config(options.model_path), str(config_file))
    if family.inputs.processing is None or _reach_vision_tower(options, family, samples):
        return
    layers = quantized_vision_layers(Checkpoint(options.model_path, options.lora), passes)
    if not layers:
        return
    where = str(options.calib_images) if samples is None else "samples"
    why = f"{pluralize(len(layers), 'linear layer')} of the vision tower, such as {layers[0]}, would be quantized"
    globs = " ".join(f"--exclude '{prefix}*'" for prefix in family.vision_prefixes)
    fix = f"add samples with images, or leave the vision tower in float with {globs}"
    unmatched = _unmatched_globs(options, family)
    raise UserError(*unmatched, Fault("no calibration sample has an image", where, f"{why} without activations", fix))


def _unmatched_globs(options: Options, family: ModelFamily) -> tuple[Fault, ...]:
    """Patterns of --exclude that match no layer: an excluded vision tower may be meant by them."""
    names = [name.rpartition(".")[0] for name in Checkpoint(options.model_path, options.lora).names]
    try:
        check_globs([*names, *family.layers()], exclude=options.exclude)
    except UserError as error:
        return error.faults
    return ()


def _reach_vision_tower(options: Options, family: ModelFamily, samples: Sequence[Mapping[str, Tensor]] | None) -> bool:
    if samples is None:
        if not options.calib_images.is_file():  # a folder of images, or an error later
            return True
        return any(each.images or each.videos for each in selected_conversations(options, family.inputs))
    if not isinstance(samples, Sequence) or not samples:
        return True  # an error later
    return any(not isinstance(sample, Mapping) or family.inputs.has_images(sample) for sample in samples)


def quantized_vision_layers(checkpoint: Checkpoint, passes: Sequence[Pass]) -> list[str]:
    """Names of the linear layers of the vision tower that the first pass with a `choose` method quantizes."""
    assign: Any = next((step for step in passes if hasattr(step, "choose")), None)
    family, sites = checkpoint.family, {}
    for name in checkpoint.names:
        layer = name.removesuffix(".weight")
        if layer != name and family.in_vision_tower(layer) and family.role(layer) is not None:
            shape = checkpoint.shape(name)
            if len(shape) == 2:
                sites[layer] = Site(layer, layer, family.fused_group(layer)[0], (shape[0], shape[1]))
    quantized = []
    for group in family.scheme_groups(sites) if assign is not None else ():
        members = [sites[layer] for layer in group if layer in sites]
        if assign.choose(members, family).scheme.is_quantized:
            quantized += [member.name for member in members]
    return quantized
