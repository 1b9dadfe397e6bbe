"""The independent proof of a compiled folder: structure, arithmetic, and with the float checkpoint weights and outputs.

Nothing here comes from the emitter or the passes, so a mistake made there is not repeated here.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlqc.errors import Fault, InternalError, UserError
from vlqc.frontend.checkpoint.links import link_faults
from vlqc.targets.target import Target, parse_target
from vlqc.verify.findings import VerificationResult
from vlqc.verify.float_match.compare import check_against_source
from vlqc.verify.folder.contents import check_side_files
from vlqc.verify.folder.manifest import check_manifest
from vlqc.verify.numbers.arithmetic import check_arithmetic
from vlqc.verify.structure.structure import check_structure

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["require_valid", "verify_folder", "verify_unfinished"]


def verify_folder(
    folder: str | Path,
    *,
    engine: str | Target | None = None,
    model_path: str | Path | None = None,
    calib_images: str | Path | None = None,
    samples: "Sequence[dict[str, Tensor]] | None" = None,
    min_sqnr: float | None = None,
    trust_remote_code: bool = False,
    locate: bool = False,
    locate_tokens: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> VerificationResult:
    """Compiled folder -> what is wrong with it, and figures. UserError only for input that is no such folder.

    engine: "vllm-ascend", "mindie@2.2", "both": a fault if it does not load the folder. None: the folder's own claim
    holds, and that no version of any engine loads the folder is a warning.
    model_path: the float checkpoint; every tensor is then held against it.
    calib_images or samples (ready model inputs) with model_path: stages and logits are run side by side.
    min_sqnr: dB of the logits against float below which the report fails; None: accuracy is a figure, not a verdict.
    locate: also rank the layers by their share of the logits' error, on as many of the samples as have about
    locate_tokens tokens together (256 if None), and advise; progress: is told from time to time how far that is.
    """
    folder = Path(folder)
    model_path = None if model_path is None else Path(model_path)
    calib_images = None if calib_images is None else Path(calib_images)
    target = parse_target(engine, "--engine") if isinstance(engine, str) else engine
    inputs = calib_images is not None or samples is not None
    _check_locate(locate, locate_tokens, model_path is not None, inputs)
    if model_path is None and (inputs or min_sqnr is not None):
        why = "outputs are compared with those of the float model"
        raise UserError(Fault("there is no float checkpoint to compare with", "--model_path", why, "add --model_path"))
    if min_sqnr is not None and not inputs:
        raise UserError(Fault("--min_sqnr needs pictures", "--calib_images", fix="add --calib_images"))
    result = VerificationResult(str(folder))
    if model_path is not None and model_path.is_dir() and (faults := link_faults(model_path)):
        raise UserError(*faults)
    content = check_structure(folder, target, result)
    check_side_files(content.files, result)  # not of an unfinished folder: they are the user's, not vlqc's work
    check_manifest(folder, result)
    check_arithmetic(content, result)
    if model_path is not None:
        check_against_source(content, model_path, result)
    if model_path is not None and inputs:
        if _can_run(content.sound, result):
            from vlqc.verify.accuracy import STAGES, check_accuracy  # torch and transformers: only for this part

            if locate and samples is None and calib_images is not None:  # pictures are read once
                from vlqc.frontend.calibration.dataset import load_samples

                samples = load_samples(model_path, calib_images, trust_remote_code=trust_remote_code).samples
            check_accuracy(folder, model_path, calib_images, samples, min_sqnr, result, trust_remote_code)
            if locate and samples is not None and result.examined.get(STAGES):
                from vlqc.verify.attribution.ablation import TOKENS, locate_drop

                locate_drop(content, model_path, samples, locate_tokens or TOKENS, result, progress, trust_remote_code)
        else:
            result.add_warning("stage outputs", str(folder), "not run", "the tensors above are missing or misshapen")
    return result


def _check_locate(locate: bool, tokens: int | None, has_model: bool, has_inputs: bool) -> None:
    """UserError for options that do not go together, all at once."""
    faults = []
    if locate and not has_model:
        why = "every layer is compared with its float weights"
        faults.append(Fault("--locate needs the float checkpoint", "--model_path", why, "add --model_path"))
    if locate and not has_inputs:
        why = "errors are measured on model inputs"
        faults.append(Fault("--locate needs pictures", "--calib_images", why, "add --calib_images"))
    if tokens is not None and not locate:
        faults.append(Fault("--locate_tokens means nothing without --locate", "--locate_tokens", fix="add --locate"))
    if tokens is not None and tokens < 1:
        faults.append(Fault(f"--locate_tokens is {tokens}", "--locate_tokens", "at least 1 is wanted"))
    if faults:
        raise UserError(*faults)


def _can_run(sound: object, result: VerificationResult) -> bool:
    """Whether the folder holds every tensor that a run needs; damaged numbers may run, missing ones cannot."""
    blocking = ("files", "config", "description", "tensors")
    return bool(sound) and not any(finding.check in blocking for finding in result.faults)


def verify_unfinished(folder: Path, engine: str | Target | None = None) -> VerificationResult:
    """As `verify_folder`, of a folder that has no list of its files yet: the list is written last."""
    result = VerificationResult(str(folder))
    content = check_structure(folder, parse_target(engine, "--engine") if isinstance(engine, str) else engine, result)
    check_manifest(folder, result, finished=False)
    check_arithmetic(content, result)
    return result


def require_valid(folder: Path, engine: str | Target | None = None) -> None:
    """InternalError with every fault of a folder that vlqc has just written, before it appears to the user.

    engine: as for `verify_folder`; None where the user was told that no version loads the result.
    """
    result = verify_unfinished(folder, engine)
    if not result.ok:
        faults = "\n".join(f"  {finding.where}: {finding.what}" for finding in result.faults)
        raise InternalError(f"the folder that was just written is not sound:\n{faults}")
