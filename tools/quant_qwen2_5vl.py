#!/usr/bin/env python3
"""Drop-in replacement for msModelSlim's script of this name: its fifteen arguments and those of `vlqc compile`.

    python quant_qwen2_5vl.py --model_path FLOAT --calib_images IMAGES --save_directory QUANTIZED --anti_method m4

Runs in a checkout, or as a copy anywhere if vlqc is installed.
"""

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    if (CHECKOUT / "vlqc" / "cli" / "commands.py").is_file():
        sys.path.insert(0, str(CHECKOUT))
    from vlqc.cli.commands import compile_main

    compile_main(Path(__file__).name)
