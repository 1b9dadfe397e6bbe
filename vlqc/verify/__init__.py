"""The independent proof of a compiled folder: structure, arithmetic, and with the float checkpoint weights and outputs.

Nothing here comes from the emitter or the passes, so a mistake made there is not repeated here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlqc.engines import Target, parse_target
from vlqc.errors import Fault, InternalError, UserError
from vlqc.verify.arithmetic import check_arithmetic
from vlqc.verify.report import Finding, Report
from vlqc.verify.source import check_against_source
from vlqc.verify.structure import check_structure

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Finding", "Report", "require_sound", "verify_folder"]


def verify_folder(
    folder: str | Path,
    *,
    engine: str | Target | None = None,
    model_path: str | Path | None = None,
    calib_images: str | Path | None = None,
    samples: "Sequence[dict[str, Tensor]] | None" = None,
    min_sqnr: float | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """Compiled folder -> what is wrong with it, and figures. UserError only for input that is no such folder.

    engine: "vllm-ascend", "mindie@2.2", "both": a fault if it does not load the folder. None: the folder's own claim
    holds, and that no version of any engine loads the folder is a warning.
    model_path: the float checkpoint; every tensor is then held against it.
    calib_images or samples (ready model inputs) with model_path: stages and logits are run side by side.
    min_sqnr: dB of the logits against float below which the report fails; None: accuracy is a figure, not a verdict.
    """
    folder = Path(folder)
    model_path = None if model_path is None else Path(model_path)
    calib_images = None if calib_images is None else Path(calib_images)
    target = parse_target(engine, "--engine") if isinstance(engine, str) else engine
    inputs = calib_images is not None or samples is not None
    if model_path is None and (inputs or min_sqnr is not None):
        why = "outputs are compared with those of the float model"
        raise UserError(Fault("there is no float checkpoint to compare with", "--model_path", why, "add --model_path"))
    if min_sqnr is not None and not inputs:
        raise UserError(Fault("--min_sqnr needs pictures", "--calib_images", fix="add --calib_images"))
    report = Report(str(folder))
    content = check_structure(folder, target, report)
    check_arithmetic(content, report)
    if model_path is not None:
        check_against_source(content, model_path, report)
    if model_path is not None and inputs:
        if _can_run(content.sound, report):
            from vlqc.verify.accuracy import check_accuracy  # torch and transformers: only for this part

            check_accuracy(folder, model_path, calib_images, samples, min_sqnr, report, trust_remote_code)
        else:
            report.warn("stage outputs", str(folder), "not run", "the tensors above are missing or misshapen")
    return report


def _can_run(sound: object, report: Report) -> bool:
    """Whether the folder holds every tensor that a run needs; damaged numbers may run, missing ones cannot."""
    blocking = ("files", "config", "description", "tensors")
    return bool(sound) and not any(finding.check in blocking for finding in report.findings)


def require_sound(folder: Path, engine: str | Target | None = None) -> None:
    """InternalError with every fault of a folder that vlqc has just written, before it appears to the user.

    engine: as for `verify_folder`; None where the user was told that no version loads the result.
    """
    report = verify_folder(folder, engine=engine)
    if not report.ok:
        faults = "\n".join(f"  {finding.where}: {finding.what}" for finding in report.findings)
        raise InternalError(f"the folder that was just written is not sound:\n{faults}")
