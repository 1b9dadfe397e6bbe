"""vlqc: a quantization compiler for vision-language models on Ascend.

    vlqc.compile(model_path=..., save_directory=..., calib_images=... | samples=[...])  -> Result
    vlqc.load(folder)                                                                  -> nn.Module
    vlqc.verify_folder(folder)                                                         -> Report
    vlqc.write_report(folder, "page.html")                                             one page about a folder

and, to look inside or to build other pipelines: Pass, PassManager, parse_pipeline, print_pipeline, Stage, Site, Edge,
Observation, print_stage, parse. `progress=vlqc.TerminalProgress()` shows how far a compilation is. Everything
is imported when it is first asked for, so `import vlqc` costs nothing.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlqc.compiler import compile as compile
    from vlqc.errors import InternalError as InternalError
    from vlqc.errors import UserError as UserError
    from vlqc.ir import Edge as Edge
    from vlqc.ir import Observation as Observation
    from vlqc.ir import Site as Site
    from vlqc.ir import Stage as Stage
    from vlqc.parser import parse_stage

    parse = parse_stage
    from vlqc.pass_manager import PassManager as PassManager
    from vlqc.pipeline import Pass as Pass
    from vlqc.pipeline import parse_pipeline as parse_pipeline
    from vlqc.pipeline import print_pipeline as print_pipeline
    from vlqc.printer import print_stage as print_stage
    from vlqc.progress import TerminalProgress as TerminalProgress
    from vlqc.report import write_report as write_report
    from vlqc.result import Result as Result
    from vlqc.runtime import load as load
    from vlqc.verify import verify_folder as verify_folder

# Asks PyTorch for memory in pages of 2 MiB, where the system has them: it then spends a third of the time on arithmetic
# with large temporaries, whose first touch is what takes longest. Read once, when the first tensor is made.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_HOME = {
    "compile": "vlqc.compiler:compile",
    "InternalError": "vlqc.errors:InternalError",
    "UserError": "vlqc.errors:UserError",
    "Edge": "vlqc.ir:Edge",
    "Observation": "vlqc.ir:Observation",
    "Site": "vlqc.ir:Site",
    "Stage": "vlqc.ir:Stage",
    "parse": "vlqc.parser:parse_stage",
    "Pass": "vlqc.pipeline:Pass",
    "PassManager": "vlqc.pass_manager:PassManager",
    "parse_pipeline": "vlqc.pipeline:parse_pipeline",
    "print_pipeline": "vlqc.pipeline:print_pipeline",
    "print_stage": "vlqc.printer:print_stage",
    "TerminalProgress": "vlqc.progress:TerminalProgress",
    "write_report": "vlqc.report:write_report",
    "Result": "vlqc.result:Result",
    "load": "vlqc.runtime:load",
    "verify_folder": "vlqc.verify:verify_folder",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module vlqc has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
