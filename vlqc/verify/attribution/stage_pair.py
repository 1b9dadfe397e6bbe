"""One stage of the float model beside the same stage of a compiled folder, and how to run a layer of one in the other.

Smoothing is an exact change of variables inside a stage: where the float layer computes y = W x + b, the stored layer
reads x / columns + shift and its output is that of the float layer times rows, so its weight is about
diag(rows) W diag(columns). Columns behind a norm and the shift follow from both norms' weights, exactly. Scales between
two Linears are fitted from both matrices: nothing that the compiler recorded is believed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vlqc.errors import UserError
from vlqc.frontend.checkpoint.checkpoint import Checkpoint, original_name
from vlqc.frontend.streamed_model import build
from vlqc.kernels_ref.deq_scale import decode_deq_scale
from vlqc.kernels_ref.norm import ShiftedNorm
from vlqc.kernels_ref.quant_linear import GroupQuantLinear, QuantLinear, StaticQuantLinear
from vlqc.verify.loader import _Loader, read_description
from vlqc.verify.structure.expected import ExpectedModel, consumers_of_norm

# Producer -> consumer of a scale between two Linears, by their names in a block.
LINEAR_EDGES = (
    ("attn.qkv", "attn.proj"),
    ("self_attn.v_proj", "self_attn.o_proj"),
    ("mlp.up_proj", "mlp.down_proj"),
)
EXACT = 1e-14  # relative variance of a scale that fits perfectly: float32 arithmetic knows no better
SIGMAS = 5.0
DAMAGE = 0.01  # producer and consumer that disagree by more than that, beyond their uncertainty, are no smoothing
UNSMOOTHED = 4.0  # mean of ((scale - 1) / sigma)^2 below which an edge was not smoothed at all; noise alone gives 1


@dataclass(frozen=True)
class Change:
    """Between a float layer and its stored one: columns float32 [K], rows float32 [N], shift float32 [K] or None."""

    columns: Tensor
    rows: Tensor
    shift: Tensor | None = None

    @classmethod
    def none(cls, linear: nn.Linear) -> "Change":
        return cls(torch.ones(linear.in_features), torch.ones(linear.out_features))

    def enter(self, x: Tensor) -> Tensor:
        """Input of the float layer -> input of the stored one, [..., K]."""
        entered = x / self.columns
        return entered if self.shift is None else entered + self.shift

    def leave(self, y: Tensor) -> Tensor:
        """Output of the stored layer -> output of the float one, [..., N]."""
        return y / self.rows

    def enter_float(self, x: Tensor) -> Tensor:
        """Input of the stored layer -> input of the float one, [..., K]."""
        return (x if self.shift is None else x - self.shift) * self.columns

    def leave_float(self, y: Tensor) -> Tensor:
        """Output of the float layer -> output of the stored one, [..., N]."""
        return y * self.rows


class FolderStages:
    """A compiled folder as a model without weights, of which one stage at a time can be filled."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        checkpoint = Checkpoint(folder)
        self._model = build(folder, checkpoint.config, trust_remote_code=trust_remote_code)
        self._loader = _Loader(checkpoint, read_description(folder), torch.float32)

    @contextmanager
    def stage(self, path: str) -> Iterator[nn.Module]:
        """Inside, the stage at this path of the module tree runs as stored, in float32 around the integers.

        UserError with every tensor that is missing or misshapen. Afterwards its tensors are gone.
        """
        stage = self._model.get_submodule(path)
        before = [(module, dict(module._modules), dict(module._parameters)) for module in stage.modules()]
        try:
            for inner, module in list(stage.named_modules()):
                self._loader.fill(self._model, f"{path}.{inner}".removesuffix("."), module)
            if self._loader.faults:
                raise UserError(*self._loader.faults)
            yield stage
        finally:
            for module, modules, parameters in before:  # quantized layers have taken the places of Linears
                module._modules.update(modules)
                module._parameters.update(parameters)


class StagePair:
    """A float stage with its weights and the stored stage, both filled.

    linears: checkpoint name -> float Linear; stored: the module in its place; changes: what lies between the two.
    """

    def __init__(self, name: str, float_stage: nn.Module, stored_stage: nn.Module, model: ExpectedModel) -> None:
        self.name = name
        self.linears: dict[str, nn.Linear] = {}
        self.stored: dict[str, nn.Module] = {}
        shifts: dict[str, Tensor] = {}
        columns: dict[str, Tensor] = {}
        for path, module in float_stage.named_modules():
            layer = _checkpoint_name(name, path)
            beside = stored_stage.get_submodule(path)
            if isinstance(module, nn.Linear):
                self.linears[layer], self.stored[layer] = module, beside
            elif [part for part, _ in module.named_parameters()] == ["weight"]:
                scale, bias = _between_norms(module, beside)
                for consumer in consumers_of_norm(layer):
                    columns[consumer] = scale
                    if bias is not None:
                        shifts[consumer] = bias
        self.changes = {layer: self._behind_norm(layer, columns, shifts) for layer in self.linears}
        for producer, consumer in LINEAR_EDGES:
            names = f"{name}.{producer}", f"{name}.{consumer}"
            if names[0] in self.linears and names[1] in self.linears:
                self._between_linears(*names, model)

    def smoothable(self, layer: str) -> bool:
        """Whether a scale can be moved between this layer's input and what is in front of it."""
        return layer != f"{self.name}.mlp.2"  # behind an activation function that no scale passes

    @contextmanager
    def swapped(self, layers: Iterable[str], *, in_stored: bool) -> Iterator[None]:
        """Inside, these layers of the float stage compute as stored; with in_stored: of the stored stage, as float."""
        with ExitStack() as stack:
            for layer in layers:
                linear, stored, change = self.linears[layer], self.stored[layer], self.changes[layer]
                if in_stored:
                    stack.enter_context(answering(stored, float_in_stored(linear, change)))
                else:
                    stack.enter_context(answering(linear, stored_in_float(stored, change)))
            yield

    def _behind_norm(self, layer: str, columns: Mapping[str, Tensor], shifts: Mapping[str, Tensor]) -> Change:
        linear = self.linears[layer]
        change = Change.none(linear)
        if layer not in columns:
            return change
        tiles = linear.in_features // len(columns[layer])  # the merger reads 2 x 2 patches at once
        shift = shifts[layer].repeat(tiles) if layer in shifts else None
        return Change(columns[layer].repeat(tiles), change.rows, shift)

    def _between_linears(self, producer: str, consumer: str, model: ExpectedModel) -> None:
        above, below = self.linears[producer], self.linears[consumer]
        channel = torch.arange(below.in_features)  # [K of the consumer], counted among the producer's last rows
        count = below.in_features
        if producer.endswith("v_proj"):  # grouped queries read each value head several times
            repeat, head = model.heads // model.kv_heads, above.out_features // model.kv_heads
            count = above.out_features
            channel = torch.arange(count).reshape(-1, head).repeat_interleave(repeat, dim=0).flatten()
        first = above.out_features - count
        change = self.changes[producer]
        kept = _weight(self.stored[producer], first)
        rows = fitted_scales(above.weight[first:] * change.columns, kept, dim=1)
        columns = fitted_scales(below.weight, _weight(self.stored[consumer]), dim=0)
        scale = agreed_scales(rows, columns, channel)
        self.changes[producer] = Change(change.columns, torch.cat([torch.ones(first), scale]), change.shift)
        self.changes[consumer] = Change(1 / scale[channel], self.changes[consumer].rows)


def stored_in_float(stored: nn.Module, change: Change) -> Callable[[Tensor], Tensor]:
    """What a float layer's forward is replaced by, so that it computes as stored on the float stage's values."""
    run = stored.forward  # bound now: the module may be swapped itself later
    return lambda x: change.leave(run(change.enter(x)))


def float_in_stored(linear: nn.Linear, change: Change) -> Callable[[Tensor], Tensor]:
    """What a stored layer's forward is replaced by, so that it computes in float on the stored stage's values."""
    run = linear.forward
    return lambda x: change.leave_float(run(change.enter_float(x)))


@contextmanager
def answering(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, calls of the module are answered by `forward`."""
    module.forward = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


def stored_weight(module: nn.Module) -> Tensor:
    """The matrix float32 [N, K] that a stored layer stands for."""
    if isinstance(module, QuantLinear):
        return module.weight.float() * weight_steps(module)
    return module.get_parameter("weight")


def weight_steps(module: QuantLinear) -> Tensor:
    """float32 [N, 1] or [N, K]: the size of a step of each weight."""
    steps = module.weight_scale.float()
    if isinstance(module, GroupQuantLinear):
        steps = steps * module.weight_scale_second.float().repeat_interleave(module.group_size, dim=1)
    return steps


def stored_bias(module: QuantLinear) -> Tensor:
    """What a stored layer adds to its matrix product in the end, float32 [N]."""
    if isinstance(module, StaticQuantLinear):
        sums = module.weight.sum(dim=1, dtype=torch.int64).double()
        added = module.quant_bias.double() + module.input_offset.double() * sums
        return (added * decode_deq_scale(module.deq_scale, truncate=False).double()).float()
    bias = module.bias
    if bias is None or (isinstance(module, GroupQuantLinear) and module.weight_only):
        return torch.zeros(module.out_features)
    return bias.float()


@dataclass(frozen=True)
class Fit:
    """Scales float64 and their relative variance; infinite where nothing can be known."""

    scale: Tensor
    variance: Tensor


def fitted_scales(source: Tensor, stored: tuple[Tensor, Tensor, Tensor], dim: int) -> Fit:
    """source float [N, K]; stored: its values, steps and which are not clipped (all [N, K]) -> the factor of every row
    (dim 1) or column (dim 0), by least squares in steps."""
    values, steps, inside = stored
    one, unknown = torch.ones((), dtype=torch.float64), torch.full((), torch.inf, dtype=torch.float64)
    x = torch.where(inside, source / steps, 0.0)
    y = torch.where(inside, values / steps, 0.0)
    square = (x * x).sum(dim, dtype=torch.float64)
    known = square > 0
    scale = torch.where(known, (x * y).sum(dim, dtype=torch.float64) / square.where(known, one), one)
    misfit = (y - x * scale.float().unsqueeze(dim)).square().sum(dim, dtype=torch.float64)
    count = inside.sum(dim).clamp(min=2)
    known &= scale > 0
    variance = misfit / (count - 1) / square / scale.square()
    return Fit(scale.where(known, one), variance.clamp(min=EXACT).where(known, unknown))


def agreed_scales(rows: Fit, columns: Fit, channel: Tensor) -> Tensor:
    """Row scales [C] of a producer, column scales [K] of its consumer, whose column k reads the producer's channel[k]
    -> the scale float32 [C] that both can mean: columns are scaled by its reciprocal."""
    weight = torch.zeros_like(rows.scale).index_add(0, channel, 1 / columns.variance)
    summed = torch.zeros_like(rows.scale).index_add(0, channel, 1 / columns.variance / columns.scale)
    below = summed / weight.clamp(min=torch.finfo(torch.float64).tiny)
    both = weight + 1 / rows.variance
    sigma = (1 / weight + rows.variance).sqrt()
    # A whole row's scale may be damaged, columns have none of their own: where the two disagree, columns are right.
    disagree = (weight > 0) & ((rows.scale / below.where(weight > 0, rows.scale) - 1).abs() > DAMAGE + SIGMAS * sigma)
    mean = (summed + rows.scale / rows.variance) / both.clamp(min=torch.finfo(torch.float64).tiny)
    scale = torch.where(disagree, below, mean)
    known = both > 0
    scale = scale.where(known, torch.ones_like(scale))
    if float(((scale - 1).square() * both)[known].mean()) < UNSMOOTHED:
        return torch.ones(len(scale))
    return scale.float()


def _weight(module: nn.Module, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Values, steps and which are inside their limits, all [n, K], of the rows from `first` on of a stored layer."""
    values = stored_weight(module)[first:]
    if not isinstance(module, QuantLinear):
        steps = values.abs().amax(dim=1, keepdim=True).clamp(min=1e-30).expand_as(values)
        return values, steps, torch.ones_like(values, dtype=torch.bool)
    low, high = (-8, 7) if isinstance(module, GroupQuantLinear) else (-127, 127)
    integers = module.weight[first:]
    return values, weight_steps(module)[first:].expand_as(values), (integers > low) & (integers < high)


def _between_norms(norm: nn.Module, stored: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A float norm and its stored one -> the scale that its consumers' columns took [C], and the bias it gained."""
    before, after = norm.get_parameter("weight"), stored.get_parameter("weight")
    scale = before / after
    scale = scale.where((before != 0) & torch.isfinite(scale) & (scale != 0), torch.ones(()))
    return scale, stored.bias.detach() if isinstance(stored, ShiftedNorm) else None


def _checkpoint_name(stage: str, path: str) -> str:
    return original_name(f"{stage}.{path}.").removesuffix(".")
