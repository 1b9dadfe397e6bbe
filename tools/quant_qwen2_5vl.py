#!/usr/bin/env python3
"""The original script's command line, run by vlqc: its fifteen arguments, and those that `vlqc compile` adds.

    python quant_qwen2_5vl.py --model_path FLOAT --calib_images PICTURES --save_directory QUANTIZED --anti_method m4

Runs from a checkout, and as a copy anywhere else where vlqc is installed.
"""

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    if (CHECKOUT / "vlqc" / "cli" / "commands.py").is_file():
        sys.path.insert(0, str(CHECKOUT))
    from vlqc.cli.commands import compile_main

    compile_main(Path(__file__).name)
