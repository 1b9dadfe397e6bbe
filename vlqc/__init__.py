"""vlqc: a quantization compiler for vision-language models on Ascend.

    vlqc.compile(model_path=..., save_directory=..., calib_images=... | samples=[...])  -> Result
    vlqc.load(folder)                                                                  -> nn.Module
    vlqc.verify_folder(folder)                                                         -> VerificationResult
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
    from vlqc.ir.observation import Observation as Observation
    from vlqc.ir.parser import parse_stage
    from vlqc.ir.stage import Edge as Edge
    from vlqc.ir.stage import Site as Site
    from vlqc.ir.stage import Stage as Stage

    parse = parse_stage
    from vlqc.ir.printer import print_stage as print_stage
    from vlqc.pipeline.manager import PassManager as PassManager
    from vlqc.pipeline.pass_api import Pass as Pass
    from vlqc.pipeline.registry import parse_pipeline as parse_pipeline
    from vlqc.pipeline.registry import print_pipeline as print_pipeline
    from vlqc.reporting.html import write_report as write_report
    from vlqc.reporting.progress import TerminalProgress as TerminalProgress
    from vlqc.reporting.summary import Result as Result
    from vlqc.verify import verify_folder as verify_folder
    from vlqc.verify.loader import load as load

# Asks PyTorch for memory in pages of 2 MiB, where the system has them: it then spends a third of the time on arithmetic
# with large temporaries, whose first touch is what takes longest. Read once, when the first tensor is made.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_HOME = {
    "compile": "vlqc.compiler:compile",
    "InternalError": "vlqc.errors:InternalError",
    "UserError": "vlqc.errors:UserError",
    "Edge": "vlqc.ir.stage:Edge",
    "Observation": "vlqc.ir.stage:Observation",
    "Site": "vlqc.ir.stage:Site",
    "Stage": "vlqc.ir.stage:Stage",
    "parse": "vlqc.ir.parser:parse_stage",
    "Pass": "vlqc.pipeline.pass_api:Pass",
    "PassManager": "vlqc.pipeline.manager:PassManager",
    "parse_pipeline": "vlqc.pipeline.registry:parse_pipeline",
    "print_pipeline": "vlqc.pipeline.registry:print_pipeline",
    "print_stage": "vlqc.ir.printer:print_stage",
    "TerminalProgress": "vlqc.reporting.progress:TerminalProgress",
    "write_report": "vlqc.reporting.html:write_report",
    "Result": "vlqc.reporting.summary:Result",
    "load": "vlqc.verify.loader:load",
    "verify_folder": "vlqc.verify:verify_folder",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module vlqc has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
