"""The tiny checkpoint and its model, shared by the fuzz targets, which must not change them."""

from functools import cache
from pathlib import Path

from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.streamed_model import StreamedModel

TINY = Path(__file__).parents[3] / "tools" / "demo" / "tiny_vl"


@cache
def tiny_model() -> StreamedModel:
    return StreamedModel.open(Checkpoint(TINY))
