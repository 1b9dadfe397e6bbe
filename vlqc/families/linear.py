"""The shape of a linear layer."""

from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    """A linear layer whose weight is [outputs, inputs]. row_parallel: engines shard it along its inputs."""

    outputs: int
    inputs: int
    row_parallel: bool = False
    bias: bool = False
