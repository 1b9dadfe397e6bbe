"""A stage as an ONNX model: to look at in Netron, and to run in onnxruntime beside the reference arithmetic.

The model is what the stage computes for inputs of the probe's shapes, in float32 between its integers. Its inputs are
the stage's float inputs; what depends on integers alone (windows of attention, positions) is computed once, from the
probe, and is constant. Quantized linears appear as `modules` says. Opset 21; onnx is imported here and nowhere else.
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
            "ONNX cannot be written", "--dump_formats onnx", "the package onnx is missing", "pip install 'onnx>=1.16'"
        )
    ) from missing

from vlqc.reporting.onnx.export import export

LARGEST_FILE = 2**30  # bytes: protobuf ends at twice that; beyond, the tensors lie in a file beside the model


def write_onnx(stage: Stage, path: Path, context: DumpContext) -> None:
    """Writes PATH.onnx, and of large stages PATH.onnx.data beside it. UserError naming a node that has no rule."""
    model, file = export(stage), add_suffix(path, ".onnx")
    large = sum(len(it.raw_data) for it in model.graph.initializer) > LARGEST_FILE
    data = add_suffix(file, ".data")
    data.unlink(missing_ok=True)  # onnx adds to a file that is there
    onnx.save_model(model, file, save_as_external_data=large, location=data.name if large else None)
    onnx.checker.check_model(str(file), full_check=not large)
