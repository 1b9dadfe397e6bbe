"""Compares a compiled folder with the float checkpoint it was made from, tensor by tensor, without running the model.

A tensor that no pass changes must equal the source in the folder's dtype, bit for bit. Every other tensor must equal
the source under channel scales that cancel between a norm and the linear layers that read it, or between two linear
layers. So one wrong byte in any tensor is detected, down to the rounding of the tensor's dtype.
"""

from pathlib import Path

import numpy as np

from vlqc.errors import Fault, UserError
from vlqc.families.family import ModelFamily
from vlqc.families.model_structure import ModelStructure
from vlqc.families.qwen2_5_vl import FINAL_NORM, OUTPUT_HEAD
from vlqc.verify.findings import COPY_AGAIN, VerificationResult, format_list
from vlqc.verify.float_match.scale_fit import NOISE, SIGMAS, ULP, Scales, WeightPair, fit_columns, fit_rows, misfits
from vlqc.verify.folder.reader import FLOATS, Array, StoredTensor, read_json_object, read_tensors, round_to
from vlqc.verify.numbers.arithmetic import input_shift
from vlqc.verify.numbers.integers import StoredIntegers, row_sums
from vlqc.verify.structure.structure import CompiledFolder

CHECK = "float weights"
# SQNR in dB by bits, below which a weight is not the source's: rounding to 8 bits gives about 40, to 4 bits about 20,
# less with large groups.
BROKEN_WEIGHTS = {8: 15.0, 4: 6.0}
INDEX = "model.safetensors.index.json"
STEP_AT_ZERO = {"BF16": 2.0**-133, "F16": 2.0**-24}  # distance between the smallest numbers
UNCANCELLED = "these scales must cancel, otherwise the model's outputs change"
NO_SCALES = (FINAL_NORM, OUTPUT_HEAD)  # no pass folds a scale into them
PAIR_TOLERANCE = 0.01  # relative difference between the scales of two linear layers, beyond their uncertainty


def check_against_source(folder: CompiledFolder, model_path: Path, result: VerificationResult) -> None:
    """Adds faults for every tensor that does not follow from the float checkpoint. UserError if that is unreadable."""
    if folder.model is None or not folder.sizes_are_stored:
        return
    with np.errstate(all="ignore"):  # damaged values are faults in the result, not NumPy warnings
        _Comparison(folder, folder.model, open_source(model_path, folder.family), result).run()


def open_source(model_path: Path, family: ModelFamily) -> dict[str, StoredTensor]:
    """Float checkpoint -> its tensors by checkpoint name. UserError with every file that cannot be read."""
    index, _ = read_json_object(model_path / INDEX)
    weight_map = index.get("weight_map") if index else None
    if isinstance(weight_map, dict):
        files = [model_path / Path(name).name for name in sorted(set(map(str, weight_map.values())))]
    else:
        files = sorted(model_path.glob("*.safetensors"))
    tensors: dict[str, StoredTensor] = {}
    faults = [] if files else [Fault("the float checkpoint has no *.safetensors", str(model_path))]
    for file in files:
        stored, _, errors = read_tensors(file)
        faults += [Fault(error, str(file), "the file is damaged", "download the file again") for error in errors]
        tensors |= {family.checkpoint_name(name): tensor for name, tensor in stored.items()}
    if faults:
        raise UserError(*faults)
    return tensors


class _Comparison:
    """Compares one folder with one source. Public methods add faults for one kind of tensor each."""

    def __init__(
        self,
        folder: CompiledFolder,
        model: ModelStructure,
        source: dict[str, StoredTensor],
        result: VerificationResult,
    ) -> None:
        self.folder, self.model, self.source, self.result = folder, model, source, result
        self.sqnr: dict[str, float] = {}
        self.compared: set[str] = set()
        self.done: set[str] = set()  # linear layers

    def run(self) -> None:
        for name in (*self.model.other_tensors, *(f"{layer}.weight" for layer in NO_SCALES)):
            if name.removesuffix(".weight") != OUTPUT_HEAD or OUTPUT_HEAD in self.model.linears:
                self.unchanged(name)
        self.done.update(NO_SCALES)
        for norm in self.model.norms:
            if norm not in NO_SCALES:
                self.norm_and_consumers(norm)
        for layer in self.model.linears:
            if layer not in self.done:
                self.unscaled(layer)
        worst = sorted(self.sqnr.items(), key=lambda item: item[1])[:5]
        self.result.facts["weights furthest from float"] = [
            {"layer": layer, "SQNR dB": round(value, 2)} for layer, value in worst
        ]

    # ---- layers by the edges between them ----------------------------------------------------------------------------

    def norm_and_consumers(self, norm: str) -> None:
        """A norm, the linear layers that read it, and those that read the scaled rows of one of these."""
        layers = self.model.norm_consumers[norm]
        edges = self.model.linear_edges
        # Rows that have no scale of their own determine the column scales.
        first_scaled = {layer: self.model.first_scaled_row(layer) if layer in edges else None for layer in layers}
        columns = self.columns_behind(norm, [(layer, end) for layer, end in first_scaled.items() if end != 0])
        for layer in sorted(layers, key=lambda layer: layer in edges):
            rows = self.rows_of(layer, first_scaled[layer] or 0, columns) if layer in edges else None
            self.weight(layer, rows, columns)
            if rows is not None:
                channels = self.model.first_scaled_row(layer) + np.array(self.model.consumer_channels(layer))
                self.consumer(edges[layer], rows.values[channels], rows.sigma[channels], layer)

    def unscaled(self, layer: str) -> None:
        """A linear layer to whose input no scale can be folded, because its producer is an activation function."""
        if self.folder.schemes[layer].is_quantized:
            self.weight(layer, None, Scales.ones(self.model.linears[layer].inputs))
            return
        self.unchanged(f"{layer}.weight")
        if self.model.linears[layer].bias:
            self.bias(layer, None)

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
        scale = np.ones((1, 1), np.float32)
        for suffix in ("weight_scale", "weight_scale_second")[: 2 if scheme.spec.weight.per_group else 1]:
            if f"{layer}.{suffix}" not in self.folder.valid_tensors:
                return None
            scale = scale * self.folder.files.tensors[f"{layer}.{suffix}"].read().astype(np.float32)
        if not (np.isfinite(scale) & (scale > 0)).all():
            return None  # a fault of the arithmetic
        return WeightPair(layer, pair[0], integers, scale)

    def unchanged(self, name: str) -> None:
        """A tensor that must equal the source in the folder's dtype, bit for bit."""
        pair = self.pair(name)
        if pair is None:
            return
        count, first = 0, None
        for (start, source), (_, stored) in zip(pair[0].rows(), pair[1].rows(), strict=True):
            wrong = np.argwhere(round_to(self.folder.float_dtype, source) != stored)
            if len(wrong) and first is None:
                first = [int(wrong[0][0]) + start, *map(int, wrong[0][1:])]
            count += len(wrong)
        if count:
            what = f"{count} values differ from the float checkpoint, first at {first}"
            self.result.add_fault(CHECK, name, what, "only the dtype of this tensor may change", COPY_AGAIN)

    def columns_behind(self, norm: str, parts: list[tuple[str, int | None]]) -> Scales:
        """Column scales of a norm's consumers, fitted; a fault where stored norm * columns is not the source's norm.

        parts: the consumers to fit, each with the number of its first rows to use (None: all).
        """
        pairs = [(pair, pair.rows if end is None else end) for layer, end in parts if (pair := self.weight_pair(layer))]
        inputs = self.model.linears[parts[0][0]].inputs
        columns = fit_columns(pairs) if pairs else Scales.ones(inputs)
        norm_pair = self.pair(f"{norm}.weight")
        if norm_pair is None or not pairs:
            return columns
        source, stored = norm_pair[0].read().astype(np.float32), norm_pair[1].read().astype(np.float32)
        tiles = inputs // len(source)  # a merger reads several tokens side by side: one norm channel, several columns
        expected, product = np.tile(source, tiles), np.tile(stored, tiles) * columns.values
        allowed = np.abs(expected) * (2 * ULP[self.folder.float_dtype] + SIGMAS * columns.sigma)
        allowed += STEP_AT_ZERO[self.folder.float_dtype] * columns.values  # absolute distance of the smallest numbers
        wrong = np.flatnonzero(np.isfinite(columns.sigma) & ~(np.abs(product - expected) <= allowed)) % len(source)
        if wrong.size:
            first = int(wrong[0])
            what = (
                f"channels {format_list(np.unique(wrong))}: stored {stored[first]:.6g}, but the columns of "
                f"{format_list(self.model.norm_consumers[norm])} imply {source[first] / columns.values[first]:.6g}"
            )
            self.result.add_fault(CHECK, f"{norm}.weight", what, UNCANCELLED, COPY_AGAIN)
        return columns

    def rows_of(self, layer: str, begin: int, columns: Scales) -> Scales:
        """Row scales of a layer whose column scales are known, fitted from row `begin` on."""
        pair = self.weight_pair(layer)
        return fit_rows(pair, begin, columns) if pair else Scales.ones(self.model.linears[layer].outputs)

    def consumer(self, layer: str, producer: Array, producer_sigma: Array, producer_layer: str) -> None:
        """A linear layer that reads scaled rows. producer: scale of each of its input channels [K], with sigma [K]."""
        pair = self.weight_pair(layer)
        self.done.add(layer)
        if pair is None:
            return
        columns = fit_columns([(pair, pair.rows)])
        sigma = columns.sigma + producer_sigma
        difference = np.abs(columns.values * producer - 1)
        wrong = np.flatnonzero(np.isfinite(sigma) & ~(difference <= PAIR_TOLERANCE + SIGMAS * sigma))
        if wrong.size:
            first = int(wrong[0])
            what = (
                f"channels {format_list(wrong)}: columns are scaled by {columns.values[first]:.6g}, "
                f"the rows of {producer_layer} by {producer[first]:.6g}"
            )
            self.result.add_fault(CHECK, f"{layer}.weight", what, UNCANCELLED, COPY_AGAIN)
        self.weight(layer, None, columns)

    def weight(self, layer: str, rows: Scales | None, columns: Scales) -> None:
        """Weight and bias of a linear layer under fitted scales. rows: None if they are not scaled."""
        self.done.add(layer)
        pair = self.weight_pair(layer)
        if pair is None:
            return
        self.rounded(pair, rows or Scales.ones(pair.rows), columns)
        shift = input_shift(self.folder, layer)
        if shift is not None:
            self.shifted_bias(pair, rows or Scales.ones(pair.rows), columns, shift)
        elif self.model.linears[layer].bias:
            self.bias(layer, rows)

    def rounded(self, pair: WeightPair, rows: Scales, columns: Scales) -> None:
        """The weight must be the rounding of the source's, scaled."""
        fit = misfits(pair, rows, columns)
        name = f"{pair.layer}.weight"
        self.sqnr[pair.layer] = fit.sqnr
        count, first = (fit.gross, fit.first_gross) if fit.other_rounding else (fit.count, fit.first)
        if fit.sqnr < BROKEN_WEIGHTS[pair.bits]:
            what, why = (
                f"SQNR against the float weight is {fit.sqnr:.1f} dB",
                "it is not the source's matrix",
            )
            self.result.add_fault(CHECK, name, what, why, "pass the right checkpoint as --model_path, or compile again")
        elif count:
            what = f"{count} of {fit.total} weights do not follow from the float weight, first at {list(first or ())}"
            why = "rounding and the layer's channel scales do not explain the difference"
            self.result.add_fault(CHECK, name, what, why, COPY_AGAIN)
        elif fit.scaled:
            row, group, factor = fit.scaled[0]
            where = f"row {row}" if pair.scale is None or pair.scale.shape[1] == 1 else f"group {group} of row {row}"
            what = f"{where} is {factor:.4g} times the float weight by its scale ({len(fit.scaled)} such in all)"
            self.result.add_fault(CHECK, name, what, "weight or weight_scale is damaged", COPY_AGAIN)

    def bias(self, layer: str, rows: Scales | None) -> None:
        """A bias must be the source's, scaled as its rows."""
        pair = self.pair(f"{layer}.bias")
        if pair is None:
            return
        source, stored = pair[0].read().astype(np.float32), pair[1].read()
        scales = rows or Scales.ones(len(source))
        scaled = scales.sigma > 0  # rows that smoothing may scale
        expected = np.where(scaled, source * scales.values, round_to(self.folder.float_dtype, source))
        allowed = np.where(scaled, np.abs(expected) * (ULP[self.folder.float_dtype] + SIGMAS * scales.sigma), 0)
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
