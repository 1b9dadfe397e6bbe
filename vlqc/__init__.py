"""vlqc: a quantization compiler for vision-language and language models on Ascend.

    vlqc.compile(model_path=..., save_directory=..., calib_images=... | samples=[...])  -> Result
    vlqc.load(folder)                                                                  -> nn.Module
    vlqc.verify_folder(folder)                                                         -> VerificationResult
    vlqc.write_report(folder, "page.html")                                             HTML page about a folder

To write passes and build pipelines: Pass, PassManager, parse_pipeline, print_pipeline, Stage, Site, Edge, Observation,
print_stage, parse_stage. To add models: ModelFamily, register_family. TerminalProgress shows the progress of `compile`.
Names are imported on first use, so that `import vlqc` takes milliseconds.
"""

import ast
import importlib
import os
import warnings
from pathlib import Path
from typing import Any

# PyTorch then allocates memory in pages of 2 MiB where the system has them, which saves a third of the time of
# arithmetic with large temporaries. PyTorch reads the variable when it creates the first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_RENAMED = {"parse": "parse_stage"}  # removed in the next version
_MODULES: dict[str, str] = {  # public name -> module, as in the stub
    alias.name: str(statement.module)
    for statement in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(statement, ast.ImportFrom)
    for alias in statement.names
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"vlqc.{name} is renamed to vlqc.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if name not in _MODULES:
        raise AttributeError(f"module 'vlqc' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
