"""Resolves --device_type to a torch.device."""

import importlib

import torch

from vlqc.errors import Fault, UserError


def resolve_device(device_type: str) -> torch.device:
    """`cpu`, `npu` or `cuda` -> an available device. Raises UserError if there is none.

    torch_npu is imported for `npu` only: with a torch version that it was not built for, the import fails or changes
    the behavior of torch. It reads ASCEND_RT_VISIBLE_DEVICES and PYTORCH_NPU_ALLOC_CONF itself.
    """
    where, fix = f"--device_type {device_type}", "use --device_type cpu"
    if device_type == "npu":
        try:
            importlib.import_module("torch_npu")
        except (ImportError, OSError, RuntimeError) as error:
            fix = f"install CANN and the torch_npu version for torch {torch.__version__}, or {fix}"
            raise UserError(Fault("cannot import torch_npu", where, str(error), fix)) from None
        if not torch.npu.is_available():  # type: ignore[attr-defined]
            raise UserError(Fault("no NPU available", where, "torch.npu.is_available() is False", fix))
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError(Fault("no GPU available", where, "torch.cuda.is_available() is False", fix))
    return torch.device(device_type)
