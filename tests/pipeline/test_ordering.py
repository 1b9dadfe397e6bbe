"""check_order: which orders of passes are accepted."""

import pytest

from vlqc.errors import UserError
from vlqc.pipeline.ordering import check_order
from vlqc.pipeline.registry import parse_pipeline

BEGIN, END = "insert-observers,assign-precision,", "quantize-activations,quantize-weights,lower-linears"


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (BEGIN + END, []),
        ("insert-observers,smooth-m2,assign-precision,smooth-m4," + END, []),  # searched as static, then as assigned
        (BEGIN + "shift-norms,smooth-m4,smooth-m4," + END, []),
        ("insert-observers", []),
        (END, ["quantize-activations needs insert-observers", "quantize-activations needs assign-precision"]),
        ("insert-observers,shift-norms,assign-precision," + END, ["shift-norms needs assign-precision before it"]),
        (BEGIN + END + ",smooth-m4", ["smooth-m4 comes after quantize-activations"]),
        (BEGIN + "lower-linears", ["lower-linears needs quantize-weights before it"]),
        (BEGIN + "quantize-weights,quantize-activations", ["quantize-activations comes after quantize-weights"]),
        ("assign-precision,quantize-weights{method=round},lower-linears", []),  # from the weights alone
        ("assign-precision,quantize-weights{method=clip}", ["the pipeline lacks insert-observers"]),
        ("insert-observers,split-window-attention", ["split-window-attention comes after insert-observers"]),
    ],
)
def test_order(text: str, faults: list[str]) -> None:
    """Catches an order that fails on the first stage, after the model is loaded."""
    passes = parse_pipeline(text)
    if not faults:
        check_order(passes)
        return
    with pytest.raises(UserError) as caught:
        check_order(passes)
    found = [fault.what for fault in caught.value.faults]
    assert all(any(what.startswith(wanted) for what in found) for wanted in faults), found
    assert all(fault.fix and fault.where == "--pipeline" for fault in caught.value.faults)
