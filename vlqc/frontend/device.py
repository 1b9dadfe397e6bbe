"""Where the arithmetic runs. Everything that is special about a device is in this file."""

import importlib

import torch

from vlqc.errors import Fault, UserError


def resolve_device(device_type: str) -> torch.device:
    """`cpu`, `npu` or `cuda` -> a device that is there. UserError says what is missing otherwise.

    torch_npu is imported only for `npu`: beside a torch that was not built for it, the import fails or hijacks torch.
    ASCEND_RT_VISIBLE_DEVICES and PYTORCH_NPU_ALLOC_CONF are read by torch_npu itself.
    """
    where, fix = f"--device_type {device_type}", "use --device_type cpu, which gives the same kind of result"
    if device_type == "npu":
        try:
            importlib.import_module("torch_npu")
        except (ImportError, OSError, RuntimeError) as error:
            fix = f"install CANN and the torch_npu that fits torch {torch.__version__}, or {fix}"
            raise UserError(Fault("torch_npu cannot be imported", where, str(error), fix)) from None
        if not torch.npu.is_available():  # type: ignore[attr-defined]
            raise UserError(Fault("no NPU is visible", where, "torch_npu finds none", fix))
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError(Fault("no GPU is visible", where, "torch.cuda.is_available() is False", fix))
    return torch.device(device_type)
