"""resolve_device: an available device, or an error that names what is missing."""

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
    """Catches an import of torch_npu for --device_type cpu: it can break a torch of another version."""
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    assert resolve_device("cpu") == torch.device("cpu")


def test_npu_without_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback in place of an error that names what to install, and for which torch version."""
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    what, why, fix = refusal("npu")
    assert "torch_npu" in what and "torch_npu" in why
    assert torch.__version__ in fix and "CANN" in fix


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_npu_with_a_broken_torch_npu(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback for missing CANN libraries, or another torch version."""

    def fail(name: str) -> ModuleType:
        raise error("libhccl.so: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert refusal("npu")[1] == "libhccl.so: cannot open shared object file"


def test_npu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a machine without an NPU that fails at the first tensor, long after the start."""
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setattr(torch, "npu", SimpleNamespace(is_available=lambda: False), raising=False)
    assert "NPU" in refusal("npu")[0]


def test_npu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an available NPU that is rejected, and another device in its place."""
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setattr(torch, "npu", SimpleNamespace(is_available=lambda: True), raising=False)
    monkeypatch.setattr(torch, "device", lambda name: f"device {name}")  # only torch_npu teaches torch this name
    assert str(resolve_device("npu")) == "device npu"


@pytest.mark.parametrize("available", [False, True])
def test_cuda(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an available GPU that is rejected, and a missing one that is accepted."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    if available:
        assert resolve_device("cuda") == torch.device("cuda")
    else:
        assert "GPU" in refusal("cuda")[0]
