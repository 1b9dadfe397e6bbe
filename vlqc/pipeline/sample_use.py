"""Whether a compilation uses calibration samples: those that it is given, or that a pass of its pipeline needs."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from vlqc.errors import Fault, UserError
from vlqc.frontend.calibration.dataset import CalibrationDataset, load_calibration, without_samples
from vlqc.frontend.streamed_model import StreamedModel
from vlqc.options.fields import flag_of
from vlqc.options.options import Options
from vlqc.pipeline.ordering import LOWERING, passes_needing_samples
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.text_only import require_images
from vlqc.targets.schemes import floats, option_name

Samples = Sequence[dict[str, Tensor]] | None
# Options that select or prepare samples, and have no effect without any.
SAMPLE_OPTIONS = ("max_samples", "max_tokens", "max_frames", "skip_bad_images")


def uses_samples(options: Options, passes: Sequence[Pass], samples: object = None) -> bool:
    """Whether samples are given, by --calib_images or through Python, or a pass needs some."""
    return samples is not None or options.names_samples or bool(passes_needing_samples(passes))


def require_samples(options: Options, passes: Sequence[Pass], samples: Sequence[Mapping[str, Tensor]] | None) -> None:
    """UserError if a pass needs samples and there are none, or the vision tower needs samples with images.

    Also for options that have an effect on samples only, in a compilation without any. Builds no model and opens no
    image.

    samples: ready model inputs, not checked yet; None: those of options.calib_images.
    """
    if uses_samples(options, passes, samples):
        if samples is None and not options.names_samples and not options.calib_images.exists():
            raise UserError(_missing(options, passes))
        require_images(options, passes, samples)
        return
    fields = type(options).model_fields
    unused = [name for name in SAMPLE_OPTIONS if getattr(options, name) != fields[name].default]
    if unused:
        why, fix = "no pass needs calibration samples, so none are read", "add --calib_images to use some, or remove it"
        raise UserError(*(Fault(f"{flag_of(name)} without --calib_images", why=why, fix=fix) for name in unused))


def calibration_data(
    options: Options, passes: Sequence[Pass], model: StreamedModel, samples: Samples
) -> CalibrationDataset:
    """The samples of a compilation; without any, a made-up sample on which the model runs once.

    samples: ready model inputs; None: those of options.calib_images. UserError: see `load_calibration`.
    """
    if uses_samples(options, passes, samples):
        return load_calibration(options, model, samples)
    proven = any(step.kind == "rewrite" and step.name != LOWERING for step in passes)
    return without_samples(model, smallest=not proven)


def _missing(options: Options, passes: Sequence[Pass]) -> Fault:
    """The default of --calib_images, which does not exist, is needed."""
    names = ", ".join(step.name for step in passes_needing_samples(passes))
    fix = "pass a folder of images or videos, or a .jsonl file, with --calib_images"
    if options.pipeline is None and options.scheme.spec.activation.is_quantized:
        if options.scheme.spec.activation.is_dynamic and not options.scheme.spec.activation.is_static:
            fix += f"; without data, {options.scheme} needs --anti_method none --weight_method round"
        needing_none = next(each for each in floats() if each.is_quantized)
        fix += f"; --scheme {option_name(needing_none)} needs none"
    what = f"--calib_images {options.calib_images} (the default)"
    return Fault(what, why=f"there is no such folder or file, and {names} of the pipeline need samples", fix=fix)
