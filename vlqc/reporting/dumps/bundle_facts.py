"""What a bundle says in bundle.json: all that its text, its config.json and its tensors do not.

A bundle is a folder that holds one state of one stage, so that a pass can be run on it again, elsewhere:

    graph.vlqc                 the text: graph, sites, scheme of each, summaries of everything else
    config.json                of the checkpoint; the stage's module is built of it, by the installed transformers
    bundle.json                this
    weights.safetensors        parameters and buffers by path in the stage, integers and scales of sites, edges
    observations.safetensors   ranges and kept rows
    inputs.safetensors         how the probe enters the stage and, before the samples ran through it, how they do

Nothing in it is executed or unpickled, and code of a checkpoint is never part of it.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

GRAPH, CONFIG, FACTS = "graph.vlqc", "config.json", "bundle.json"
WEIGHTS, OBSERVATIONS, INPUTS = "weights.safetensors", "observations.safetensors", "inputs.safetensors"
HALVED = "float32 tensors that are stored in bfloat16, which holds them"  # in the header of a weights file
RANGE_PARTS = ("minimum", "maximum", "sum", "sum_of_squares")
KEPT_PARTS = ("kept", "kept_modality", "kept_energy")


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Replaced(_Facts):
    """A module that a pass put in the place of the model's own. kind: name of its class; flags: of its attributes."""

    path: str
    kind: str
    flags: dict[str, bool] = {}


class Observed(_Facts):
    """An observation without its tensors. rows: per modality."""

    node: str
    channels: int
    rows: dict[str, int]
    balance: bool
    samples: int


class Entered(_Facts):
    """One call. args, kwargs: as `ir.serialization.serialize` returns them; modality: number of its tensor, or None."""

    sample: int
    args: Any
    kwargs: Any
    modality: int | None


class BundleFacts(_Facts):
    """bundle.json.

    stage: checkpoint name; versions: of the packages that wrote it; names: path in the stage -> checkpoint name, where
    that is not the stage's name and the path; replaced: outer modules first; constants: node -> path of the parameter
    that it reads, or None; edges: per producer its consumers, None where no edges were looked for; probe: number among
    the calls, or the call; before_run: whether the samples are still to run through the stage, and all are here.
    """

    format: Literal[1] = 1
    stage: str
    versions: dict[str, str]
    names: dict[str, str]
    replaced: tuple[Replaced, ...]
    constants: dict[str, str | None]
    edges: tuple[tuple[str, tuple[str, ...]], ...] | None
    observations: tuple[Observed, ...]
    calls: tuple[Entered, ...]
    probe: int | Entered | None
    before_run: bool
