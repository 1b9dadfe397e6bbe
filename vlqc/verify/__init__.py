"""Verifies a compiled folder: structure, arithmetic, and against the float checkpoint weights and outputs.

Nothing here is imported from `vlqc.emit` or the passes, so that a mistake made there is not repeated here.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlqc.errors import Fault, InternalError, UserError
from vlqc.files import trust_links
from vlqc.frontend.checkpoint.files import link_faults
from vlqc.targets.target import Target, parse_target
from vlqc.verify.findings import VerificationResult
from vlqc.verify.float_match.check import check_against_source
from vlqc.verify.float_match.compare import is_of_family
from vlqc.verify.float_match.source_config import check_config_against_source
from vlqc.verify.float_match.source_files import check_files_against_source
from vlqc.verify.folder.adapters import check_adapters
from vlqc.verify.folder.contents import check_side_files
from vlqc.verify.folder.manifest import check_manifest
from vlqc.verify.numbers.arithmetic import check_arithmetic
from vlqc.verify.numbers.caches import check_caches
from vlqc.verify.numbers.input_ranges import check_input_ranges
from vlqc.verify.structure.side_files import check_side_file_contents
from vlqc.verify.structure.structure import CompiledFolder, check_structure

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["require_valid", "verify_folder", "verify_unfinished"]

NOT_RUNNABLE = ("files", "config", "description", "tensors")  # checks whose faults mean that tensors are missing


def verify_folder(
    folder: str | Path,
    *,
    engine: str | Target | None = None,
    model_path: str | Path | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    calib_images: str | Path | None = None,
    samples: "Sequence[dict[str, Tensor]] | None" = None,
    min_sqnr: float | None = None,
    trust_remote_code: bool = False,
    follow_links: bool = False,
    locate: bool = False,
    locate_tokens: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> VerificationResult:
    """Verifies a compiled folder and returns faults, warnings and measured values.

    engine: "vllm-ascend", "mindie@2.2" or "both"; a target that cannot load the folder is a fault. None: the target
    that the folder is written for; if no version of any engine loads the folder, that is a warning.
    model_path: the float checkpoint; every tensor is compared with it. lora: folders of adapters to merge into it
    first, in order.
    calib_images or samples (model inputs), with model_path: outputs of stages and logits are compared as well.
    min_sqnr: least SQNR of the logits against the float model, in dB; below it the result has a fault.
    trust_remote_code: run model code from the folder and the float checkpoint. follow_links: links in the folder of the
    float checkpoint may lead anywhere.
    locate: also rank the layers by their share of the logits' error and give advice. locate_tokens: number of tokens to
    measure on (256 if None), see `choose_samples`. progress: receives text about the progress of `locate`.

    Raises UserError for unusable arguments and for a folder that is not a compiled one; any damage of a compiled folder
    is a fault in the result.
    """
    folder = Path(folder)
    model_path = None if model_path is None else Path(model_path)
    adapters = [Path(lora)] if isinstance(lora, str | Path) else [Path(each) for each in lora]
    if follow_links and model_path is not None:
        trust_links(model_path)
    calib_images = None if calib_images is None else Path(calib_images)
    target = parse_target(engine, "--engine") if isinstance(engine, str) else engine
    has_inputs = calib_images is not None or samples is not None
    _check_arguments(locate, locate_tokens, min_sqnr, model_path is not None, has_inputs)
    result = VerificationResult(str(folder))
    if model_path is not None and model_path.is_dir() and (faults := link_faults(model_path)):
        raise UserError(*faults)
    if adapters and model_path is None:
        why = "adapters are merged into the float checkpoint"
        raise UserError(Fault("--lora needs --model_path", "--lora", why, "add --model_path"))
    compiled = check_structure(folder, target, result, trust_remote_code=trust_remote_code)
    check_side_files(compiled.files, result)  # not in verify_unfinished: these files are copies of the user's
    check_side_file_contents(compiled, result)
    check_manifest(folder, result)
    check_arithmetic(compiled, result)
    check_input_ranges(compiled, result)
    check_caches(compiled, result)
    if model_path is not None and not is_of_family(compiled, model_path, result):
        return result
    rotations = compiled.rotations
    if model_path is not None:
        has_same_adapters = check_adapters(folder, adapters, result)
        check_config_against_source(compiled, model_path, result)
        family = None if compiled.model is None else compiled.family
        check_files_against_source(folder, model_path, result, family)
        if not has_same_adapters:
            return result
        rotations = check_against_source(compiled, model_path, result, adapters)
    if model_path is not None and has_inputs:
        if not _can_run(compiled, result):
            why = "tensors are missing or have a wrong shape, see the faults"
            result.add_warning("stage outputs", str(folder), "not run", why)
            return result
        from vlqc.verify.accuracy import STAGES, check_accuracy  # torch and transformers, needed only here

        if locate and samples is None and calib_images is not None:  # so that images are read once
            from vlqc.frontend.calibration.dataset import load_samples

            samples = load_samples(model_path, calib_images, trust_remote_code=trust_remote_code).samples
        check_accuracy(
            compiled, model_path, calib_images, samples, min_sqnr, result, rotations, trust_remote_code, adapters
        )
        if locate and samples is not None and result.examined.get(STAGES):
            from vlqc.verify.attribution.ablation import TOKENS, attribute_error
            from vlqc.verify.attribution.ranking import add_ranking

            tokens = locate_tokens or TOKENS
            attribution = attribute_error(
                compiled, model_path, samples, tokens, result, rotations, progress, trust_remote_code, adapters
            )
            if attribution is not None:
                add_ranking(attribution, compiled, result)
    return result


def _check_arguments(
    locate: bool, tokens: int | None, min_sqnr: float | None, has_model: bool, has_inputs: bool
) -> None:
    """UserError with every option that lacks another one."""
    faults = []
    if locate and not has_model:
        why = "every layer is compared with its float weights"
        faults.append(Fault("--locate needs --model_path", "--locate", why, "add --model_path"))
    if locate and not has_inputs:
        why = "errors are measured on model inputs"
        faults.append(Fault("--locate needs --calib_images", "--locate", why, "add --calib_images"))
    if tokens is not None and not locate:
        faults.append(Fault("--locate_tokens needs --locate", "--locate_tokens", fix="add --locate"))
    if tokens is not None and tokens < 1:
        faults.append(Fault(f"--locate_tokens is {tokens}", "--locate_tokens", "it must be at least 1"))
    if min_sqnr is not None and not has_inputs:
        why = "the SQNR is measured on model inputs"
        faults.append(Fault("--min_sqnr needs --calib_images", "--min_sqnr", why, "add --calib_images"))
    if not locate and not has_model and (has_inputs or min_sqnr is not None):
        option, why = "--calib_images" if has_inputs else "--min_sqnr", "outputs are compared with the float model's"
        faults.append(Fault(f"{option} needs --model_path", option, why, "add --model_path"))
    if faults:
        raise UserError(*faults)


def _can_run(compiled: CompiledFolder, result: VerificationResult) -> bool:
    """Whether the folder has all tensors with the right shapes; their values may be damaged."""
    return bool(compiled.valid_tensors) and not any(fault.check in NOT_RUNNABLE for fault in result.faults)


def verify_unfinished(
    folder: Path, engine: str | Target | None = None, *, trust_remote_code: bool = False
) -> VerificationResult:
    """`verify_folder` for a folder that is still being written and has no MANIFEST.json yet."""
    result = VerificationResult(str(folder))
    target = parse_target(engine, "--engine") if isinstance(engine, str) else engine
    compiled = check_structure(folder, target, result, trust_remote_code=trust_remote_code)
    check_manifest(folder, result, finished=False)
    check_arithmetic(compiled, result)
    check_caches(compiled, result)
    return result


def require_valid(folder: Path, engine: str | Target | None = None, *, trust_remote_code: bool = False) -> None:
    """InternalError with every fault of an unfinished folder that vlqc has written.

    engine: as for `verify_folder`; None if the user was warned that no version loads the folder.
    """
    result = verify_unfinished(folder, engine, trust_remote_code=trust_remote_code)
    if not result.ok:
        faults = "\n".join(f"  {fault.where}: {fault.what}" for fault in result.faults)
        raise InternalError(f"the compiled folder does not pass verification:\n{faults}")
