"""Runs single layers of a compiled folder inside the float model and the other way round.

Smoothing is an equivalent transformation of a stage: where the float layer computes y = W x + b, the stored layer reads
x / columns + shift and returns y * rows, so its weight is about diag(rows) W diag(columns). Columns behind a norm and
the shift follow exactly from the weights of both norms. Scales between two linear layers are fitted from both matrices;
nothing that the compiler recorded is used.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlqc.errors import UserError
from vlqc.frontend.checkpoint.checkpoint import Checkpoint
from vlqc.frontend.model_structure import ModelStructure
from vlqc.frontend.streamed_model import build_meta_model
from vlqc.ir.stage import Edge
from vlqc.kernels_ref.kv_cache import QuantizedCacheAttention, RoundCache
from vlqc.kernels_ref.norm import ShiftedNorm
from vlqc.kernels_ref.quant_linear import QuantLinear
from vlqc.targets.caches import projections
from vlqc.targets.schemes import Scheme
from vlqc.verify.loader import WeightLoader, float_caches, read_description

EXACT = 1e-14  # relative variance of a scale that fits perfectly, the limit of float32 arithmetic
SIGMAS = 5.0
DAMAGE = 0.01  # relative difference between producer and consumer, beyond SIGMAS, that smoothing cannot explain
UNSMOOTHED = 4.0  # mean of ((scale - 1) / sigma)^2 below which an edge counts as not smoothed; noise alone gives 1


@dataclass(frozen=True)
class EquivalentTransform:
    """From a float layer to its stored one: columns float32 [K], rows float32 [N], shift float32 [K] or None."""

    columns: Tensor
    rows: Tensor
    shift: Tensor | None = None

    @classmethod
    def identity(cls, linear: nn.Linear) -> "EquivalentTransform":
        return cls(torch.ones(linear.in_features), torch.ones(linear.out_features))

    def input_to_stored(self, x: Tensor) -> Tensor:
        """Input of the float layer -> input of the stored one, [..., K]."""
        scaled = x / self.columns
        return scaled if self.shift is None else scaled + self.shift

    def output_from_stored(self, y: Tensor) -> Tensor:
        """Output of the stored layer -> output of the float one, [..., N]."""
        return y / self.rows

    def input_from_stored(self, x: Tensor) -> Tensor:
        """Input of the stored layer -> input of the float one, [..., K]."""
        return (x if self.shift is None else x - self.shift) * self.columns

    def output_to_stored(self, y: Tensor) -> Tensor:
        """Output of the float layer -> output of the stored one, [..., N]."""
        return y * self.rows


class FolderStages:
    """The model of a compiled folder on the meta device, of which one stage at a time can be loaded."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        checkpoint = Checkpoint(folder)
        self._model = build_meta_model(folder, checkpoint.config, trust_remote_code=trust_remote_code)
        self._loader = WeightLoader(checkpoint, read_description(folder), torch.float32)

    @contextmanager
    def stage(self, path: str) -> Iterator[nn.Module]:
        """Context in which the stage at this module path holds the folder's tensors, float ones as float32.

        Raises UserError with every tensor that is missing or has a wrong shape. The tensors are released afterwards.
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
            for module, modules, parameters in before:  # puts linear layers back in place of quantized ones
                module._modules.update(modules)
                module._parameters.update(parameters)


class StagePair:
    """A float stage and the stored stage, both with their weights.

    checkpoint_name: path of a module in the stage -> checkpoint name.
    linears: checkpoint name -> float linear layer; stored: -> the stored layer; transforms: -> from float to stored;
    attentions: checkpoint name -> attention module of both stages where the stored one has a quantized cache.
    """

    def __init__(
        self,
        name: str,
        float_stage: nn.Module,
        stored_stage: nn.Module,
        model: ModelStructure,
        checkpoint_name: Callable[[str], str],
    ) -> None:
        self.name = name
        self.linears: dict[str, nn.Linear] = {}
        self.stored: dict[str, nn.Module] = {}
        self.attentions: dict[str, tuple[nn.Module, QuantizedCacheAttention]] = {}
        norms: dict[str, tuple[Tensor, Tensor | None]] = {}
        for path, module in float_stage.named_modules():
            layer = checkpoint_name(path)
            counterpart = stored_stage.get_submodule(path)
            if isinstance(module, nn.Linear):
                self.linears[layer], self.stored[layer] = module, counterpart
            elif isinstance(counterpart, QuantizedCacheAttention):
                self.attentions[layer] = module, counterpart
            elif layer in model.norms:
                norms[layer] = _norm_transform(module, counterpart)
        self.transforms = {layer: EquivalentTransform.identity(linear) for layer, linear in self.linears.items()}
        edges = [edge for producer, edge in model.edges.items() if producer in norms or producer in self.linears]
        for edge in edges:
            if edge.producer in norms:
                self._behind_norm(edge, *norms[edge.producer])
        for edge in edges:  # in the order of the graph
            if edge.producer in self.linears:
                self._between_linears(edge)
        self._scaled_inputs = {layer for edge in edges for layer in edge.consumers}
        self._projections = projections(model.family, self.linears)

    def smoothable(self, layer: str) -> bool:
        """Whether the producer of this layer's input can absorb a scale of it."""
        return layer in self._scaled_inputs

    @contextmanager
    def swapped(self, layers: Iterable[str], caches: Iterable[str] = (), *, in_stored: bool) -> Iterator[None]:
        """Context in which these layers of the float stage (in_stored: of the stored stage) compute as in the other,
        and these attention modules cache keys and values as there."""
        with ExitStack() as stack:
            for layer in layers:
                linear, stored, transform = self.linears[layer], self.stored[layer], self.transforms[layer]
                if in_stored:
                    stack.enter_context(replaced_forward(stored, float_in_stored(linear, transform)))
                else:
                    stack.enter_context(replaced_forward(linear, stored_in_float(stored, transform)))
            for attention in caches:
                module, quantized = self.attentions[attention]
                if in_stored:
                    stack.enter_context(float_caches(quantized))
                else:
                    scales = self._float_cache_scales(attention, quantized)
                    stack.enter_context(replaced_forward(module, rounding_cache(module, scales)))
            yield

    def _float_cache_scales(self, attention: str, quantized: QuantizedCacheAttention) -> list[Tensor]:
        """Scales [channels] of the keys and of the values of the float stage."""
        scales = quantized.key_scale, quantized.value_scale
        layers = self._projections[attention]
        return [scale / self.transforms[layer].rows for layer, scale in zip(layers, scales, strict=True)]

    def _behind_norm(self, edge: Edge, scale: Tensor, bias: Tensor | None) -> None:
        for layer, channel in edge.consumers.items():
            shift = None if bias is None else _per_column(bias, channel, 0.0)
            rows = self.transforms[layer].rows
            self.transforms[layer] = EquivalentTransform(_per_column(scale, channel, 1.0), rows, shift)

    def _between_linears(self, edge: Edge) -> None:
        above, transform = self.linears[edge.producer], self.transforms[edge.producer]
        usable = edge.usable.nonzero().flatten()  # int64 [C], the rows with a scale
        position = torch.full_like(edge.usable, -1, dtype=torch.int64)  # of each row in `usable`
        position[usable] = torch.arange(len(usable))
        rows = fit_scales(
            above.weight[usable] * transform.columns, _weight_in_steps(self.stored[edge.producer], usable), 1
        )
        fits, channels = [], []
        for layer, channel in edge.consumers.items():
            read = channel >= 0
            fit = fit_scales(self.linears[layer].weight, _weight_in_steps(self.stored[layer]), dim=0)
            fits.append(FittedScales(fit.scale[read], fit.variance[read]))
            channels.append(position[channel[read]])
        columns = FittedScales(torch.cat([fit.scale for fit in fits]), torch.cat([fit.variance for fit in fits]))
        scale = torch.ones(len(edge.usable))
        scale[usable] = combine_scales(rows, columns, torch.cat(channels))
        self.transforms[edge.producer] = EquivalentTransform(transform.columns, scale, transform.shift)
        for layer, channel in edge.consumers.items():
            before = self.transforms[layer]
            self.transforms[layer] = EquivalentTransform(
                before.columns * _per_column(1 / scale, channel, 1.0), before.rows, before.shift
            )


def stored_in_float(stored: nn.Module, transform: EquivalentTransform) -> Callable[[Tensor], Tensor]:
    """Forward for a float layer that computes the stored layer on the float stage's values."""
    run = stored.forward  # bound now, because the module's forward may be replaced later
    return lambda x: transform.output_from_stored(run(transform.input_to_stored(x)))


def float_in_stored(linear: nn.Linear, transform: EquivalentTransform) -> Callable[[Tensor], Tensor]:
    """Forward for a stored layer that computes the float layer on the stored stage's values."""
    run = linear.forward
    return lambda x: transform.output_to_stored(run(transform.input_from_stored(x)))


def rounding_cache(attention: nn.Module, scales: Sequence[Tensor]) -> Callable[..., Any]:
    """Forward for an attention module that reads keys and values rounded with these two scales."""
    run = attention.forward
    key_scale, value_scale = scales

    def forward(*args: Any, **kwargs: Any) -> Any:
        with RoundCache(key_scale, value_scale):
            return run(*args, **kwargs)

    return forward


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context in which the module's forward is `forward`."""
    module.forward = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


def stored_weight(module: nn.Module) -> Tensor:
    """The dequantized weight of a stored layer, float32 [N, K]."""
    if isinstance(module, QuantLinear):
        return module.weight.float() * module.weight_steps()
    return module.get_parameter("weight")


@dataclass(frozen=True)
class FittedScales:
    """Scales float64 and their relative variance, which is infinite where the weights determine no scale."""

    scale: Tensor
    variance: Tensor


def fit_scales(source: Tensor, stored: tuple[Tensor, Tensor, Tensor], dim: int) -> FittedScales:
    """Least squares in steps: the factor of every row (dim 1) or column (dim 0) from source to stored.

    source: float [N, K]; stored: values, steps, and a mask of those that are not clipped, all [N, K].
    """
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
    return FittedScales(scale.where(known, one), variance.clamp(min=EXACT).where(known, unknown))


def combine_scales(rows: FittedScales, columns: FittedScales, channel: Tensor) -> Tensor:
    """Weighted mean, float32 [C], of a producer's row scales [C] and the reciprocal column scales [K] of its consumer.

    channel: int64 [K], the producer's row that each column of the consumer reads.
    """
    weight = torch.zeros_like(rows.scale).index_add(0, channel, 1 / columns.variance)
    summed = torch.zeros_like(rows.scale).index_add(0, channel, 1 / columns.variance / columns.scale)
    below = summed / weight.clamp(min=torch.finfo(torch.float64).tiny)
    both = weight + 1 / rows.variance
    sigma = (1 / weight + rows.variance).sqrt()
    # The stored scale of a row may be damaged; columns have no stored scale. So where both disagree, columns count.
    disagree = (weight > 0) & ((rows.scale / below.where(weight > 0, rows.scale) - 1).abs() > DAMAGE + SIGMAS * sigma)
    mean = (summed + rows.scale / rows.variance) / both.clamp(min=torch.finfo(torch.float64).tiny)
    scale = torch.where(disagree, below, mean)
    known = both > 0
    scale = scale.where(known, torch.ones_like(scale))
    if float(((scale - 1).square() * both)[known].mean()) < UNSMOOTHED:
        return torch.ones(len(scale))
    return scale.float()


def _per_column(values: Tensor, channel: Tensor, default: float) -> Tensor:
    """Per channel of a producer [C] -> per input column [K], by an edge's map; `default` where no channel is read."""
    return torch.where(channel >= 0, values[channel.clamp(min=0)], default)


def _weight_in_steps(module: nn.Module, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a stored layer: values, steps, and a mask of those that are not clipped, all [n, K]. rows: int64 [n]."""
    chosen = slice(None) if rows is None else rows
    values = stored_weight(module)[chosen]
    if not isinstance(module, QuantLinear):
        steps = values.abs().amax(dim=1, keepdim=True).clamp(min=1e-30).expand_as(values)
        return values, steps, torch.ones_like(values, dtype=torch.bool)
    form, integers = Scheme(module.scheme).spec.weight, module.weight[chosen]
    inside = (integers > form.smallest) & (integers < form.largest)
    return values, module.weight_steps()[chosen].expand_as(values), inside


def _norm_transform(norm: nn.Module, stored: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A float norm and its stored one -> the column scales of its consumers [C], and the shift [C] of its outputs."""
    before, after = norm.get_parameter("weight"), stored.get_parameter("weight")
    scale = before / after
    scale = scale.where((before != 0) & torch.isfinite(scale) & (scale != 0), torch.ones(()))
    biases = dict(norm.named_parameters())
    if "bias" in biases:
        return scale, stored.get_parameter("bias").detach() - biases["bias"].detach() / scale
    return scale, stored.bias.detach() if isinstance(stored, ShiftedNorm) else None
