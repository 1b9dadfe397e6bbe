"""A stage as an ONNX model, for Netron, and for onnxruntime to compare with the reference arithmetic.

The model has the shapes of the probe and computes in float32 between quantized layers, which `modules` describes. Its
inputs are the float inputs of the stage. Values that depend on integer inputs only (windows of attention, positions)
are constants of the probe. Opset 21. Only this package imports onnx.
"""

from pathlib import Path

from vlqc.errors import Fault, UserError
from vlqc.ir.stage import Stage
from vlqc.reporting.dumps.writer import DumpContext, add_suffix

try:
    import onnx
except ImportError as missing:
    raise UserError(
        Fault(
            "cannot write ONNX", "--dump_formats onnx", "the package onnx is not installed", "pip install 'onnx>=1.16'"
        )
    ) from missing

from vlqc.reporting.onnx.export import export

LARGEST_FILE = 2**30  # bytes; larger tensors go to a separate file, because protobuf is limited to 2 GiB


def write_onnx(stage: Stage, path: Path, context: DumpContext) -> None:
    """Writes PATH.onnx, and PATH.onnx.data for large stages. UserError if an operation is not supported."""
    model, file = export(stage), add_suffix(path, ".onnx")
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LARGEST_FILE
    data = add_suffix(file, ".data")
    data.unlink(missing_ok=True)  # onnx appends to an existing file
    onnx.save_model(model, file, save_as_external_data=large, location=data.name if large else None)
    onnx.checker.check_model(str(file), full_check=not large)
