"""Compares a compiled folder with the float checkpoint it was made from, tensor by tensor, without running the model.

A tensor that no pass changes must equal the source in the folder's dtype, bit for bit; if it is rotated, up to one
rounding. Every other tensor must equal the source under channel scales that cancel between a norm and the linear layers
that read it, or between two linear layers. So one wrong byte in any tensor is detected, down to the rounding of the
tensor's dtype. Rotations are those that the folder states (`check.py` finds out whether it states others than it
has).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from vlqc.errors import Fault, UserError
from vlqc.families.registry import find_family
from vlqc.frontend.checkpoint.adapters import WEIGHTS as ADAPTER
from vlqc.frontend.checkpoint.adapters import adapter_as_model, is_adapter
from vlqc.frontend.model_structure import ModelStructure
from vlqc.verify.findings import COPY_AGAIN, VerificationResult, format_list
from vlqc.verify.float_match.cancellation import ProducerSide, find_uncancelled
from vlqc.verify.float_match.read_source import read_source
from vlqc.verify.float_match.rotated_source import float32_margin, is_rotated, nearest
from vlqc.verify.float_match.scale_fit import (
    NOISE,
    SIGMAS,
    ULP,
    Scales,
    WeightPair,
    fit_columns,
    fit_rows,
    misfits,
)
from vlqc.verify.folder.reader import (
    FLOATS,
    Array,
    StoredTensor,
    read_json_object,
    round_to,
)
from vlqc.verify.numbers.arithmetic import input_shift, per_column
from vlqc.verify.numbers.integers import StoredIntegers, row_sums
from vlqc.verify.structure.structure import CompiledFolder

CHECK = "float weights"
# SQNR in dB by bits, below which a weight is not the source's: rounding to 8 bits gives about 40, to 4 bits about 20,
# less with large groups.
BROKEN_WEIGHTS = {8: 15.0, 4: 6.0}
INDEX = "model.safetensors.index.json"
STEP_AT_ZERO = {"BF16": 2.0**-133, "F16": 2.0**-24}  # distance between the smallest numbers
UNCANCELLED = "these scales must cancel, otherwise the model's outputs change"
FITTED = 8  # linear layers behind one norm from which its scales are fitted; all others are compared under these


def is_of_family(folder: CompiledFolder, model_path: Path, result: VerificationResult) -> bool:
    """Whether the float checkpoint may be the folder's: False, and a fault, for one of another model type."""
    config, _ = read_json_object(model_path / "config.json")
    other = find_family(config) if config else None
    if config is None or folder.model is None or other is None or other is folder.family:
        return True
    own = folder.files.config
    what = f"--model_path is {config.get('model_type')}, the folder is {own.get('model_type')}"
    why, fix = "the folder was not made from this checkpoint", "pass the right checkpoint as --model_path"
    result.add_fault(CHECK, str(model_path), what, why, fix)
    return False


def open_source(model_path: Path, model: ModelStructure, lora: Sequence[Path] = ()) -> dict[str, StoredTensor]:
    """Float checkpoint -> its tensors by checkpoint name. UserError with every file that cannot be read.

    model: of the folder; lora: folders of adapters to merge, in order. If only the checkpoint's output head shares the
    embedding's weight, that is the head's weight.
    """
    index, _ = read_json_object(model_path / INDEX)
    weight_map = index.get("weight_map") if index else None
    if isinstance(weight_map, dict):
        files = [model_path / Path(name).name for name in sorted(set(map(str, weight_map.values())))]
    else:
        files = [path for path in sorted(model_path.glob("*.safetensors")) if path.name != ADAPTER]
    if not files and is_adapter(model_path):
        raise UserError(adapter_as_model(model_path))
    if not files:
        raise UserError(Fault("the float checkpoint has no *.safetensors", str(model_path)))
    config, _ = read_json_object(model_path / "config.json")
    tensors = read_source(files, model_path, config or {}, model, lora)
    tied_head, table = f"{model.output_head}.weight", tensors.get(f"{model.embedding}.weight")
    if not model.tied and table is not None and model.family.is_tied(config or {}):
        tensors[tied_head] = table  # the folder's head has a weight of its own
    return tensors


class Comparison:
    """Compares one folder with one source. Public methods add faults for one kind of tensor each.

    sqnr: of every compared matrix, in dB; not_source: layers whose matrix is not the source's.
    """

    def __init__(
        self,
        folder: CompiledFolder,
        model: ModelStructure,
        source: Mapping[str, StoredTensor],
        result: VerificationResult,
    ) -> None:
        self.folder, self.model, self.source, self.result = folder, model, source, result
        self.sqnr: dict[str, float] = {}
        self.not_source: set[str] = set()
        self.compared: set[str] = set()
        self.rows: dict[str, Scales] = {}  # of the outputs of every linear layer that is done
        self.columns: dict[str, Scales] = {}  # of the inputs of linear layers behind a norm
        self.own_shifts: dict[str, Array] = {}  # of norms that have a bias of their own, [C]

    def run(self, includes: Callable[[str], bool] = lambda layer: True) -> None:
        """Compares all layers, or those for which `includes(layer)`: whole stages, or all layers outside them."""
        for name in self.model.other_parameters:
            if includes(name.rpartition(".")[0]):
                self.unchanged(name)
        for norm in filter(includes, self.model.norms):
            self.norm(norm)
            for layer in self.model.edges[norm].consumers:
                self.linear(layer)
        for layer in filter(includes, self.model.linears):
            self.linear(layer)

    # ---- layers by the edges between them ----------------------------------------------------------------------------

    def norm(self, norm: str) -> None:
        """Weight and bias of a norm; fits the column scales of the linear layers that read it."""
        by_map: dict[bytes, list[str]] = {}
        for layer, channel in self.model.edges[norm].consumers.items():
            by_map.setdefault(channel.numpy().tobytes(), []).append(layer)
        for layers in by_map.values():
            columns = self.columns_behind(norm, layers, self.model.edges[norm].consumers[layers[0]])
            self.columns |= dict.fromkeys(layers, columns)
        if self.model.has_bias(norm):
            self.norm_bias(norm)

    def linear(self, layer: str) -> None:
        """A linear layer, after those whose scaled rows it reads."""
        if layer in self.rows:
            return
        edge, producers, linear = self.model.edges.get(layer), self.model.producers[layer], self.model.linears[layer]
        self.rows[layer] = Scales.ones(linear.outputs)
        for producer, _ in producers:
            if producer in self.model.linears:
                self.linear(producer)
        if not producers and edge is None and not self.folder.schemes[layer].is_quantized:
            self.unchanged(f"{layer}.weight")
            if linear.bias:
                self.bias(layer, None)
            return
        if len(producers) == 1 and layer in self.columns:
            columns = self.columns[layer]
        else:
            columns = self.columns_by_producers(layer) if producers else Scales.ones(linear.inputs)
        pair = self.weight_pair(layer)
        if edge is not None and pair is not None:
            self.rows[layer] = fit_rows(pair, edge.usable.numpy(), columns)
        self.weight(layer, None if edge is None else self.rows[layer].or_else(Scales.ones(linear.outputs)), columns)

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def pair(self, name: str, shape: tuple[int, ...] | None = None) -> tuple[StoredTensor, StoredTensor] | None:
        """(source, stored) if both exist with equal shapes; a fault if the source does not have the tensor.

        shape: of the unpacked tensor, where it differs from the stored shape.
        """
        source, stored = self.source.get(name), self.folder.files.tensors.get(name)
        if name not in self.folder.valid_tensors or stored is None:
            return None  # a fault already
        if source is None or source.shape != (shape or stored.shape) or source.dtype not in FLOATS:
            actual = f"{source.dtype} {list(source.shape)}" if source else "no such tensor"
            what, why = f"the float checkpoint has {actual}", "the folder was not made from this checkpoint"
            self.result.add_fault(CHECK, name, what, why, "pass the right checkpoint as --model_path")
            return None
        self.result.add_examined(CHECK, int(name not in self.compared))
        self.compared.add(name)
        return source, stored

    def weight_pair(self, layer: str) -> WeightPair | None:
        stored, scheme = self.folder.files.tensors.get(f"{layer}.weight"), self.folder.schemes[layer]
        if stored is None or f"{layer}.weight" not in self.folder.valid_tensors:
            return None  # a fault already
        integers = StoredIntegers.of(stored, scheme, self.folder.form) if scheme.is_quantized else None
        pair = self.pair(f"{layer}.weight", integers.shape if integers else None)
        if pair is None or integers is None:
            return WeightPair(layer, *pair, None) if pair else None
        scale, error = np.ones((1, 1), np.float32), 0.0
        for suffix in ("weight_scale", "weight_scale_second")[: 2 if scheme.spec.weight.per_group else 1]:
            if f"{layer}.{suffix}" not in self.folder.valid_tensors:
                return None
            factor = self.folder.files.tensors[f"{layer}.{suffix}"].read().astype(np.float32)
            if (round_to(self.folder.float_dtype, factor) == factor).all():
                error += ULP[self.folder.float_dtype]
            scale = scale * factor
        if not (np.isfinite(scale) & (scale > 0)).all():
            return None  # a fault of the arithmetic
        return WeightPair(layer, pair[0], integers, scale, error)

    def unchanged(self, name: str) -> None:
        """A tensor that must equal the source in the folder's dtype."""
        pair = self.pair(name)
        if pair is None:
            return
        count, first = 0, None
        for (start, source), (_, stored) in zip(pair[0].rows(), pair[1].rows(), strict=True):
            expected, allowed = nearest(self.folder.float_dtype, pair[0], source)
            wrong = np.argwhere((expected != stored) & ~(np.abs(stored - expected) <= allowed))
            if len(wrong) and first is None:
                first = [int(wrong[0][0]) + start, *map(int, wrong[0][1:])]
            count += len(wrong)
        if count:
            rotated = " after its rotation" if is_rotated(pair[0]) else ""
            if 2 * count > pair[0].count:
                self.not_source.add(name.rpartition(".")[0])
            what = f"{count} values differ from the float checkpoint{rotated}, first at {first}"
            self.result.add_fault(CHECK, name, what, "only the dtype of this tensor may change", COPY_AGAIN)

    def unscaled_rows(self, layer: str) -> Array:
        """Mask bool [N] of the rows that no consumer's columns can cancel: they determine the column scales."""
        edge = self.model.edges.get(layer)
        return np.ones(self.model.linears[layer].outputs, bool) if edge is None else ~edge.usable.numpy()

    def columns_behind(self, norm: str, layers: list[str], channel: Tensor) -> Scales:
        """Column scales of a norm's consumers, fitted; a fault where stored norm * columns is not the source's norm.

        layers: consumers with the same map, int64 [K].
        """
        norm_pair, read = self.pair(f"{norm}.weight"), channel.numpy() >= 0
        source, stored = (
            (per_column(tensor.read().astype(np.float32), channel, 1.0) for tensor in norm_pair)
            if norm_pair
            else (np.ones(len(read), np.float32), np.ones(len(read), np.float32))
        )
        parts = self.parts_to_fit(layers)
        if not parts:  # all their rows are scaled, too: only the norm tells the scales of their columns
            known = (source != 0) & (stored != 0)
            values = np.where(known, source / np.where(known, stored, 1), 1).astype(np.float32)
            return Scales.known(values, np.where(known & read, ULP[self.folder.float_dtype], 0).astype(np.float32))
        columns = fit_columns(parts).unread(~read)
        both = (source != 0) & (stored != 0)
        factor = np.where(source != 0, stored / np.where(source != 0, source, 1), np.where(stored != 0, np.inf, 1))
        # An error of half a step also where steps are absolute, among the smallest numbers.
        dtype = self.folder.float_dtype
        rounding = ULP[dtype] + STEP_AT_ZERO[dtype] / np.where(source != 0, np.abs(source), 1)
        side = ProducerSide(channel.numpy(), factor.astype(np.float64), np.zeros(len(read)), rounding)
        found = find_uncancelled(columns, [side])
        channels = np.unique(channel.numpy()[found.channels])
        if channels.size:
            first = int(found.channels[0])
            implied = source[first] / columns.values[first]
            what = (
                f"channels {format_list(channels)}: stored {stored[first]:.6g}, but the columns of "
                f"{format_list(layers)} imply {implied:.6g}"
            )
            self.result.add_fault(CHECK, f"{norm}.weight", what, UNCANCELLED, COPY_AGAIN)
        if found.common is not None:
            what = f"the norm times the columns of {format_list(layers)} is {found.common:.6g} times the float model's"
            self.result.add_fault(CHECK, f"{norm}.weight", what, UNCANCELLED, COPY_AGAIN)
        implied = np.where(both, source / np.where(both, stored, 1), 1).astype(np.float32)
        return columns.or_else(Scales.known(implied, np.full(len(read), ULP[dtype], np.float32)))

    def parts_to_fit(self, layers: list[str]) -> list[tuple[WeightPair, Array]]:
        """At most FITTED layers that are stored alike, with their unscaled rows: the kind with most of these."""
        kinds: dict[tuple[int, bool], list[tuple[WeightPair, Array]]] = {}
        for layer in layers:
            mask, pair = self.unscaled_rows(layer), self.weight_pair(layer)
            if pair is not None and mask.any():
                kinds.setdefault((pair.bits, pair.scale is None), []).append((pair, mask))
        return max(kinds.values(), key=lambda parts: sum(int(mask.sum()) for _, mask in parts), default=[])[:FITTED]

    def columns_by_producers(self, layer: str) -> Scales:
        """Column scales of a linear layer that reads scaled rows; a fault where they do not cancel."""
        sides = [self.producer_side(name, channel) for name, channel in self.model.producers[layer]]
        producer = np.prod([side.values for side in sides], axis=0)
        implied = (1 / np.where(producer > 0, producer, 1)).astype(np.float32)
        sigma = np.sum([side.deviation * implied + side.rounding for side in sides], axis=0)
        by_producers = Scales.known(implied, sigma.astype(np.float32))
        pair, mask = self.weight_pair(layer), self.unscaled_rows(layer)
        if pair is None or not mask.any():
            return by_producers
        columns = fit_columns([(pair, mask)]).unread(np.all([side.channel < 0 for side in sides], axis=0))
        found = find_uncancelled(columns, sides)
        names = format_list([name for name, _ in self.model.producers[layer]])
        if found.channels.size:
            first = int(found.channels[0])
            what = (
                f"channels {format_list(found.channels)}: columns are scaled by {columns.values[first]:.6g}, "
                f"the rows of {names} by {producer[first]:.6g}"
            )
            self.result.add_fault(CHECK, f"{layer}.weight", what, UNCANCELLED, COPY_AGAIN)
        if found.common is not None:
            what = f"its columns times the rows of {names} are {found.common:.6g} times the float model's"
            self.result.add_fault(CHECK, f"{layer}.weight", what, UNCANCELLED, COPY_AGAIN)
        return columns.or_else(by_producers)

    def producer_side(self, name: str, channel: Tensor) -> ProducerSide:
        """What a linear layer, whose rows are fitted, or a norm leaves of the scale. channel: int64 [K]."""
        scales = self.rows[name] if name in self.rows else self.norm_scales(name)
        is_norm = name not in self.rows
        values, deviation = (
            per_column(each.astype(np.float64), channel, default)
            for each, default in ((scales.values, 1.0), (scales.deviation, 0.0))
        )
        nothing = np.zeros(len(values))
        return ProducerSide(
            channel.numpy(), values, nothing if is_norm else deviation, deviation if is_norm else nothing
        )

    def norm_scales(self, norm: str) -> Scales:
        """What a norm's channels are multiplied by, by its weights, [C]; 1 where they do not tell it."""
        pair, channels = self.pair(f"{norm}.weight"), self.model.norms[norm]
        if pair is None:
            return Scales.ones(channels)
        source, stored = (tensor.read().astype(np.float32) for tensor in pair)
        known = (source != 0) & (stored != 0)
        values = np.where(known, stored / np.where(known, source, 1), 1).astype(np.float32)
        return Scales.known(values, np.full(channels, ULP[self.folder.float_dtype], np.float32))

    def norm_bias(self, norm: str) -> None:
        """The bias that a norm has in the source: it must be scaled as the weight, unless the norm is shifted.

        A shift is what is left of the bias; then the consumers' biases must compensate it.
        """
        weights, biases = self.pair(f"{norm}.weight"), self.pair(f"{norm}.bias")
        if weights is None or biases is None:
            return
        dtype = self.folder.float_dtype
        source, stored = (tensor.read().astype(np.float32) for tensor in biases)
        expected, allowed = round_to(dtype, source), np.zeros_like(source)
        if (round_to(dtype, weights[0].read()) != weights[1].read()).any():
            expected = source * self.norm_scales(norm).values
            allowed += 2 * ULP[dtype] * np.abs(expected) + STEP_AT_ZERO[dtype]
        shift = stored - expected
        if not (np.abs(shift) <= allowed).all() and self.is_compensated(norm, shift):
            self.own_shifts[norm] = shift
            return
        why = "it must be scaled as the norm's weight"
        self.require_close(f"{norm}.bias", stored, expected, allowed, why)

    def is_compensated(self, norm: str, shift: Array) -> bool:
        """Whether the biases of a norm's consumers are nearer to those that undo a shift [C] than to the source's."""
        unchanged = shifted = 0.0
        for layer, channel in self.model.edges[norm].consumers.items():
            pair = self.weight_pair(layer) if self.model.linears[layer].bias else None
            biases = self.pair(f"{layer}.bias") if pair else None
            if pair is None or biases is None:
                continue
            column = self.columns[layer].values * per_column(shift.astype(np.float64), channel, 0.0)
            products = [source.astype(np.float64) @ column for _, source in pair.source.rows()]
            rows = self.unscaled_rows(layer)
            difference = (biases[1].read().astype(np.float64) - biases[0].read())[rows]
            unchanged += float(np.abs(difference).sum())
            shifted += float(np.abs(difference + np.concatenate(products)[rows]).sum())
        return shifted < unchanged

    def shift(self, layer: str) -> Array | None:
        """Shift of the norm before a linear layer, per input channel, float64 [K]; None without one."""
        before = self.model.norm_before(layer)
        if before and before[0] in self.own_shifts:
            return per_column(self.own_shifts[before[0]].astype(np.float64), before[1], 0.0)
        return input_shift(self.folder, layer)

    def weight(self, layer: str, rows: Scales | None, columns: Scales) -> None:
        """Weight and bias of a linear layer under fitted scales. rows: None if they are not scaled."""
        pair = self.weight_pair(layer)
        if pair is None:
            return
        self.rounded(pair, rows or Scales.ones(pair.rows), columns)
        shift = self.shift(layer)
        if shift is not None:
            self.shifted_bias(pair, rows or Scales.ones(pair.rows), columns, shift)
        elif self.model.linears[layer].bias:
            self.bias(layer, rows)

    def rounded(self, pair: WeightPair, rows: Scales, columns: Scales) -> None:
        """The weight must be the rounding of the source's, scaled."""
        fit = misfits(pair, rows, columns)
        name = f"{pair.layer}.weight"
        self.sqnr[pair.layer] = fit.sqnr
        compensated = fit.other_rounding and not self.folder.rounds_to_nearest
        count, first = (fit.gross, fit.first_gross) if compensated else (fit.count, fit.first)
        what, why, fix = "", "rounding and the layer's channel scales do not explain the difference", COPY_AGAIN
        if fit.sqnr < BROKEN_WEIGHTS[pair.bits]:
            self.not_source.add(pair.layer)
            what, why = f"SQNR against the float weight is {fit.sqnr:.1f} dB", "it is not the source's matrix"
            fix = "pass the right checkpoint as --model_path, or compile again"
        elif fit.noise:
            self.not_source.add(pair.layer)
            share, noise = fit.noise
            what = f"{1 - share:.0%} of the columns have errors of {noise:.2g} steps or more, rounding has {NOISE:.2g}"
        elif fit.noisy_rows:
            what = f"rows {format_list(fit.noisy_rows)} have errors many times larger than other rows"
        elif fit.offset is not None:
            what, why = f"the mean error of all weights is {fit.offset:.2g} steps", "rounding errors have a mean of 0"
        elif fit.scaled_columns:
            numbers, factors = zip(*fit.scaled_columns, strict=True)
            what = f"columns {format_list(numbers)}: {factors[0]:.4g} times the float weight by their scales"
        elif count:
            what = f"{count} of {fit.total} weights do not follow from the float weight, first at {list(first or ())}"
            if compensated != fit.other_rounding:
                why = "the folder's pipeline rounds to nearest: its weights have no other errors than rounding"
        elif fit.common is not None:
            what = f"all weights are {fit.common:.6g} times the float weight by their scales"
            why = "weight or weight_scale is damaged, or the norm before the layer"
        elif fit.scaled:
            row, group, factor = fit.scaled[0]
            where = f"row {row}" if pair.scale is None or pair.scale.shape[1] == 1 else f"group {group} of row {row}"
            what = f"{where} is {factor:.4g} times the float weight by its scale ({len(fit.scaled)} such in all)"
            why = "weight or weight_scale is damaged"
        if what:
            self.result.add_fault(CHECK, name, what, why, fix)

    def bias(self, layer: str, rows: Scales | None) -> None:
        """A bias must be the source's, scaled as its rows. Rows of zeros do not tell their scale."""
        pair = self.pair(f"{layer}.bias")
        if pair is None:
            return
        source, stored = pair[0].read().astype(np.float32), pair[1].read()
        scales = rows or Scales.ones(len(source))
        scaled = scales.sigma > 0  # rows that smoothing may scale
        unscaled, margin = nearest(self.folder.float_dtype, pair[0], source)
        expected = np.where(scaled, source * scales.values, unscaled)
        rounding = np.abs(expected) * (ULP[self.folder.float_dtype] + SIGMAS * scales.sigma)
        rounding += STEP_AT_ZERO[self.folder.float_dtype]
        if is_rotated(pair[0]):
            rounding += np.abs(scales.values) * float32_margin(source)
        allowed = np.where(scaled, rounding, margin)
        allowed[~np.isfinite(scales.deviation) & (source != 0)] = np.inf
        self.require_close(f"{layer}.bias", stored, expected, allowed, "a bias may change only by its rows' scales")

    def shifted_bias(self, pair: WeightPair, rows: Scales, columns: Scales, shift: Array) -> None:
        """Behind a norm with a bias z, the bias must be the source's minus W z, with W under its scales.

        That applies to a stored bias and, where a W8A8 layer has none, to what its quant_bias adds.
        """
        layer, tensors = pair.layer, self.folder.files.tensors
        has_bias = self.model.linears[layer].bias
        bias_pair = self.pair(f"{layer}.bias") if has_bias else None
        if has_bias and bias_pair is None:
            return
        column = columns.values * shift  # [K]
        shifted, uncertain, step = np.zeros(pair.rows), np.zeros(pair.rows), np.zeros(pair.rows)
        relative = np.where(np.isfinite(columns.sigma), columns.sigma, 0) + ULP[self.folder.float_dtype]
        for start, source in pair.source.rows():
            here = slice(start, start + len(source))
            shifted[here] = source.astype(np.float64) @ column
            uncertain[here] = np.sqrt((source.astype(np.float64) ** 2) @ (column * relative) ** 2)
            if pair.scale is not None:
                step[here] = pair.scale[here].max(axis=1)
        source_bias = bias_pair[0].read().astype(np.float64) if bias_pair else np.zeros(pair.rows)
        expected = rows.values * (source_bias - shifted)
        sigma = np.where(np.isfinite(rows.sigma), rows.sigma, 0)
        # W may be the float weight or its integers, which differ by their rounding.
        allowed = np.abs(rows.values) * uncertain + np.abs(expected) * sigma + NOISE * step * np.linalg.norm(shift)
        allowed = SIGMAS * allowed + np.abs(expected) * ULP[self.folder.float_dtype]
        why = "it must compensate the bias of the norm before the layer"
        if bias_pair:
            self.require_close(f"{layer}.bias", bias_pair[1].read().astype(np.float64), expected, allowed, why)
        names = [f"{layer}.{suffix}" for suffix in ("quant_bias", "input_offset", "input_scale")]
        if has_bias or pair.scale is None or not all(name in self.folder.valid_tensors for name in names):
            return  # the arithmetic compares quant_bias with a stored bias
        quant_bias, offset, input_scale = (tensors[name].read().astype(np.float64) for name in names)
        assert isinstance(pair.stored, StoredIntegers)
        unit = input_scale * pair.scale.reshape(-1).astype(np.float64)  # [N]
        added = (quant_bias + offset * row_sums(pair.stored).total) * unit
        self.require_close(names[0], added, expected, allowed + 0.5 * unit, why)

    def require_close(self, name: str, stored: Array, expected: Array, allowed: Array, why: str) -> None:
        """A fault where |stored - expected| exceeds `allowed`; all [N]."""
        distance = np.abs(stored - expected)
        wrong = np.flatnonzero((distance != 0) & ~(distance <= allowed))
        if wrong.size:
            first = int(wrong[0])
            values = f"stored {stored[first]:.6g}, the float layer has {expected[first]:.6g}"
            self.result.add_fault(CHECK, name, f"channels {format_list(wrong)}: {values}", why, COPY_AGAIN)
