"""The tensors of a checkpoint in the basis of a rotation plan, rotated as they are read."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.emitted_dtype import ENGINE_DTYPES
from vlqc.ir.rotations import ROWS_PER_PIECE, AppliedRotation, RotationPlan


class RotatedTensors:
    """Reads tensors of a checkpoint under their names, and an untied output head in place of the embedding.

    embedding: name of the token embedding. dtype: of the result, to which what is stored in 16 bits is rounded (other
    tensors keep their dtype); None returns float32. Rotations are computed in float32.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: RotationPlan, embedding: str, *, dtype: torch.dtype | None
    ) -> None:
        self.checkpoint, self.plan, self.embedding, self.dtype = checkpoint, plan, embedding, dtype
        self._norms: dict[str, Tensor] = {}  # parameters of norms, as stored

    def tensor(self, name: str) -> Tensor:
        """As `Checkpoint.tensor`. Every call returns a tensor of its own."""
        layer, _, parameter = name.rpartition(".")
        rotations = self.plan.changing(layer)
        if not rotations:
            return self._stored(name)
        if parameter == "weight":
            stored = self._stored(name)
            if all(layer in (*rotation.readers, *rotation.tables) for rotation in rotations) and stored.ndim == 2:
                return self._with_rotated_columns(stored, layer, rotations)
            weight, bias = _copy(stored), None
        else:
            weight, bias = self._weight_for_bias(layer, rotations), _copy(stored := self._stored(name))
        for rotation in rotations:
            rotation.apply_(layer, weight, bias, partial(self._norm, rotation, layer))
        result = weight if bias is None else bias
        return result.to(self._rounded(stored.dtype))

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """As `Checkpoint.rows`, of the token embedding or the output head."""
        layer = name.rpartition(".")[0]
        stored = self.checkpoint.rows(self._stored_name(name), indices)
        rows = stored.float()
        for rotation in self.plan.changing(layer):
            rotation.apply_(layer, rows, None, partial(self._norm, rotation, layer))
        return rows.to(self._rounded(stored.dtype))

    def _rounded(self, stored: torch.dtype) -> torch.dtype:
        """The dtype of what is returned for a tensor of this stored dtype."""
        if self.dtype is None:
            return torch.float32
        return self.dtype if stored in ENGINE_DTYPES else stored

    def _stored(self, name: str) -> Tensor:
        layer = name.rpartition(".")[0]
        if any(layer in rotation.norms for rotation in self.plan.rotations):
            self._norm_parameter(name)
            return self._norms[name]
        return self.checkpoint.tensor(self._stored_name(name))

    def _stored_name(self, name: str) -> str:
        """Name in the checkpoint, which has no output head of its own if that is untied."""
        layer, _, parameter = name.rpartition(".")
        return f"{self.embedding}.{parameter}" if layer == self.plan.untied_head else name

    def _norm(self, rotation: AppliedRotation, layer: str, parameter: str) -> Tensor:
        return self._norm_parameter(f"{rotation.readers[layer]}.{parameter}")

    def _norm_parameter(self, name: str) -> Tensor:
        """float32 [C]. Read once. KeyError for a name that the checkpoint does not have."""
        if name not in self._norms:
            if name not in self.checkpoint:
                raise KeyError(name)
            self._norms[name] = self.checkpoint.tensor(name)
        return self._norms[name].float()

    def _weight_for_bias(self, layer: str, rotations: Sequence[AppliedRotation]) -> Tensor:
        """The weight float32 [N, K] if the bias depends on it, else an empty one [N, 0] or [0] of a norm."""
        name = f"{layer}.weight"
        norms = [rotation.readers[layer] for rotation in rotations if layer in rotation.readers]
        if any(norm is not None and f"{norm}.bias" in self.checkpoint for norm in norms):
            return _copy(self._stored(name))
        return torch.empty(self.checkpoint.shape(name)[0], 0)

    def _with_rotated_columns(self, stored: Tensor, layer: str, rotations: Sequence[AppliedRotation]) -> Tensor:
        """A matrix whose rows are rotated one by one, in pieces; `stored` is overwritten where dtypes are equal."""
        dtype = self._rounded(stored.dtype)
        result = stored if dtype == stored.dtype else torch.empty(stored.shape, dtype=dtype)
        for source, target in zip(
            torch.split(stored, ROWS_PER_PIECE), torch.split(result, ROWS_PER_PIECE), strict=True
        ):
            piece = source.float()
            for rotation in rotations:
                rotation.apply_(layer, piece, None, partial(self._norm, rotation, layer))
            target.copy_(piece)
        return result


def _copy(tensor: Tensor) -> Tensor:
    """A copy in float32."""
    return tensor.to(torch.float32, copy=True)
