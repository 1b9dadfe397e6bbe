"""device: a device that is there, or a sentence about what is missing and what to do."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from vlqc.errors import UserError
from vlqc.frontend.device import resolve_device


def refusal(device_type: str) -> tuple[str, str, str]:
    """(what, why, fix) of the one fault."""
    with pytest.raises(UserError) as caught:
        resolve_device(device_type)
    (fault,) = caught.value.faults
    assert fault.where == f"--device_type {device_type}" and caught.value.exit_code == 2
    assert "--device_type cpu" in fault.fix
    return fault.what, fault.why, fault.fix


def test_cpu_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch_npu imported where no NPU was asked for: beside a torch of another version it breaks torch."""
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    assert resolve_device("cpu") == torch.device("cpu")


def test_npu_without_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack trace of ModuleNotFoundError: the user must read what to install, for which torch."""
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    what, why, fix = refusal("npu")
    assert what == "torch_npu cannot be imported" and "torch_npu" in why
    assert f"the torch_npu that fits torch {torch.__version__}" in fix and "CANN" in fix


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_npu_with_a_broken_torch_npu(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries of CANN that are missing, or another torch version: torch_npu fails in several ways while it loads."""

    def fail(name: str) -> ModuleType:
        raise error("libhccl.so: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert refusal("npu")[1] == "libhccl.so: cannot open shared object file"


def test_npu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch_npu installed on a machine without an NPU: the first tensor would fail, long after the start."""
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setattr(torch, "npu", SimpleNamespace(is_available=lambda: False), raising=False)
    assert refusal("npu")[0] == "no NPU is visible"


def test_npu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """An NPU refused, or another device taken for it."""
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setattr(torch, "npu", SimpleNamespace(is_available=lambda: True), raising=False)
    monkeypatch.setattr(torch, "device", lambda name: f"device {name}")  # only torch_npu teaches torch this name
    assert str(resolve_device("npu")) == "device npu"


@pytest.mark.parametrize("available", [False, True])
def test_cuda(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU asked for where there is none, or refused where there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    if available:
        assert resolve_device("cuda") == torch.device("cuda")
    else:
        assert refusal("cuda")[0] == "no GPU is visible"
