"""The linear layers, norms and other tensors of a model, and which layers read the output of which."""

from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Linear:
    """A linear layer whose weight is [outputs, inputs]. row_parallel: engines shard it along its inputs."""

    outputs: int
    inputs: int
    row_parallel: bool = False
    bias: bool = False


@dataclass(frozen=True)
class ModelStructure:
    """A model as its config.json describes it, under checkpoint names.

    linears: all linear layers, the output head only if it has a weight of its own. norms: layer -> channels.
    other_tensors: embeddings and convolutions. norm_consumers: norm -> linear layers that read its output.
    linear_edges: producer -> consumer of the pairs of linear layers between which a scale per channel cancels; the
    producer's scaled rows are its last ones. heads, kv_heads: of the language model, where kv_heads * repeats = heads.
    """

    linears: dict[str, Linear]
    norms: dict[str, int]
    other_tensors: dict[str, Shape]
    norm_consumers: dict[str, tuple[str, ...]]
    linear_edges: dict[str, str]
    heads: int
    kv_heads: int

    def embeddings_and_linears(self) -> list[str]:
        """Layers whose `.weight` engines look up in the description."""
        return [name.removesuffix(".weight") for name in self.other_tensors] + list(self.linears)

    def norm_before(self, layer: str) -> str | None:
        """The norm whose output a linear layer reads."""
        return next((norm for norm, consumers in self.norm_consumers.items() if layer in consumers), None)

    def first_scaled_row(self, producer: str) -> int:
        """First row of a producer in `linear_edges` that its consumer reads: a fused QKV has the values last."""
        return max(self.linears[producer].outputs - self.linears[self.linear_edges[producer]].inputs, 0)

    def consumer_channels(self, producer: str) -> list[int]:
        """Per input channel of the consumer: the producer's row, counted from `first_scaled_row`.

        With grouped-query attention several query heads read the same value head.
        """
        outputs, inputs = self.linears[producer].outputs, self.linears[self.linear_edges[producer]].inputs
        if outputs >= inputs:
            return list(range(inputs))
        head, repeats = outputs // self.kv_heads, self.heads // self.kv_heads
        return [
            kv_head * head + channel
            for kv_head in range(self.kv_heads)
            for _ in range(repeats)
            for channel in range(head)
        ]
