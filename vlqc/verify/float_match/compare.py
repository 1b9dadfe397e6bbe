"""A compiled folder against the float checkpoint it came from, tensor by tensor, without running anything.

What no smoothing touches must be the source's value in the folder's dtype, bit for bit. Everything else must be the
source under scales that cancel: norm times consumer columns, v rows times o columns, up rows times down columns.
This names a wrong byte in any tensor, down to the rounding of its own dtype.
"""

from pathlib import Path

import numpy as np

from vlqc.errors import Fault, UserError
from vlqc.targets.schemes import Scheme
from vlqc.verify.findings import VerificationResult, format_list
from vlqc.verify.float_match.scale_fit import NOISE, fit_columns, fit_rows, misfits
from vlqc.verify.float_match.weight_pair import SIGMAS, ULP, Scales, WeightPair
from vlqc.verify.folder.reader import FLOATS, Array, StoredTensor, read_json_object, read_tensors, round_to
from vlqc.verify.numbers.arithmetic import shift_in_front_of
from vlqc.verify.numbers.integers import StoredIntegers, row_sums
from vlqc.verify.structure.expected import ExpectedModel, consumers_of_norm
from vlqc.verify.structure.structure import CompiledFolder

CHECK = "float weights"
# dB by bits; 8-bit rounding gives about 40, 4-bit about 20, less with large groups: below, it is another matrix
BROKEN_WEIGHTS = {8: 15.0, 4: 6.0}
INDEX = "model.safetensors.index.json"
STEP_AT_ZERO = {"BF16": 2.0**-133, "F16": 2.0**-24}  # how far the smallest numbers are from each other


def check_against_source(folder: CompiledFolder, model_path: Path, result: VerificationResult) -> None:
    """Findings for every tensor that does not follow from the float checkpoint. UserError: that is no checkpoint."""
    if folder.model is None or not folder.sizes_are_stored:
        return
    with np.errstate(all="ignore"):  # damaged values are reported, not warned about
        _Comparison(folder, folder.model, open_source(model_path), result).run()


def open_source(model_path: Path) -> dict[str, StoredTensor]:
    """Float checkpoint folder -> its tensors under original names. UserError with everything that cannot be read."""
    index, _ = read_json_object(model_path / INDEX)
    listing = index.get("weight_map") if index else None
    if isinstance(listing, dict):
        files = [model_path / Path(str(name)).name for name in sorted(set(map(str, listing.values())))]
    else:
        files = sorted(model_path.glob("*.safetensors"))
    tensors: dict[str, StoredTensor] = {}
    faults = [] if files else [Fault("the float checkpoint has no *.safetensors", str(model_path))]
    for file in files:
        found, _, troubles = read_tensors(file)
        faults += [Fault(trouble, str(file), fix="download the file again") for trouble in troubles]
        tensors |= {_original_name(name): tensor for name, tensor in found.items()}
    if faults:
        raise UserError(*faults)
    return tensors


def _original_name(name: str) -> str:
    for new, old in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


class _Comparison:
    """One folder, one source; each method compares one kind of thing and reports."""

    def __init__(
        self, folder: CompiledFolder, model: ExpectedModel, source: dict[str, StoredTensor], result: VerificationResult
    ) -> None:
        self.folder, self.model, self.source, self.result = folder, model, source, result
        self.sqnr: dict[str, float] = {}
        self.compared: set[str] = set()

    def run(self) -> None:
        for name in (*self.model.others, "model.norm.weight"):
            self.same(name)
        for index in range(self.model.depth):
            self.vision_block(f"visual.blocks.{index}")
        self.merger()
        for index in range(self.model.layers):
            self.language_layer(f"model.layers.{index}")
        if "lm_head" in self.model.linears:
            self.same("lm_head.weight")
        worst = sorted(self.sqnr.items(), key=lambda item: item[1])[:5]
        self.result.facts["weights furthest from float"] = [
            {"layer": layer, "SQNR dB": round(value, 2)} for layer, value in worst
        ]

    # ---- parts of the model ------------------------------------------------------------------------------------------

    def vision_block(self, block: str) -> None:
        hidden = self.model.vision_hidden
        attention = [f"{block}.attn.qkv"]
        columns = self.columns_behind(f"{block}.norm1", [(attention[0], 2 * hidden)])
        values = self.rows_of(attention[0], 2 * hidden, columns)
        self.weight(attention[0], values, columns)
        self.consumer(f"{block}.attn.proj", values.values[2 * hidden :], values.sigma[2 * hidden :], attention[0])
        self.gated_mlp(block, f"{block}.norm2")

    def language_layer(self, layer: str) -> None:
        q, k, v, o = (f"{layer}.self_attn.{member}_proj" for member in "qkvo")
        columns = self.columns_behind(f"{layer}.input_layernorm", [(q, None), (k, None)])
        for linear in (q, k):
            self.weight(linear, None, columns)
        rows = self.rows_of(v, 0, columns)
        self.weight(v, rows, columns)
        head = self.model.linears[v].outputs // self.model.kv_heads
        repeat = self.model.heads // self.model.kv_heads

        def repeated(values: Array) -> Array:
            """[kv_heads * head] -> [heads * head]: grouped queries read each value head `repeat` times."""
            return np.repeat(values.reshape(self.model.kv_heads, head), repeat, axis=0).reshape(-1)

        self.consumer(o, repeated(rows.values), repeated(rows.sigma), v)
        self.gated_mlp(layer, f"{layer}.post_attention_layernorm")

    def gated_mlp(self, block: str, norm: str) -> None:
        gate, up, down = (f"{block}.mlp.{member}_proj" for member in ("gate", "up", "down"))
        columns = self.columns_behind(norm, [(gate, None)])
        self.weight(gate, None, columns)
        rows = self.rows_of(up, 0, columns)
        self.weight(up, rows, columns)
        self.consumer(down, rows.values, rows.sigma, up)

    def merger(self) -> None:
        first, second = "visual.merger.mlp.0", "visual.merger.mlp.2"
        self.weight(first, None, self.columns_behind("visual.merger.ln_q", [(first, None)]))
        self.weight(second, None, Scales.ones(self.model.linears[second].inputs), exact=True)

    # ---- kinds of comparison -----------------------------------------------------------------------------------------

    def pair(self, name: str, shape: tuple[int, ...] | None = None) -> tuple[StoredTensor, StoredTensor] | None:
        """(source, stored) when both are there in one shape; a source that lacks the tensor is reported.

        shape: the one that the stored tensor stands for, where it is not its own.
        """
        source, stored = self.source.get(name), self.folder.files.tensors.get(name)
        if name not in self.folder.valid_tensors or stored is None:
            return None  # reported as missing or misshapen already
        if source is None or source.shape != (shape or stored.shape) or source.dtype not in FLOATS:
            has = f"{source.dtype} {list(source.shape)}" if source else "no such tensor"
            self.result.add_fault(
                CHECK, name, f"the float checkpoint has {has} here", "", "is it the right checkpoint?"
            )
            return None
        self.result.add_examined(CHECK, int(name not in self.compared))
        self.compared.add(name)
        return source, stored

    def weight_pair(self, layer: str) -> WeightPair | None:
        stored, scheme = self.folder.files.tensors.get(f"{layer}.weight"), self.folder.schemes[layer]
        if stored is None or f"{layer}.weight" not in self.folder.valid_tensors:
            return None  # reported as missing or misshapen already
        integers = None if scheme == Scheme.FLOAT else StoredIntegers.of(stored, scheme, self.folder.form)
        pair = self.pair(f"{layer}.weight", integers.shape if integers else None)
        if pair is None or integers is None:
            return WeightPair(layer, *pair, None) if pair else None
        scale = np.ones((1, 1), np.float32)
        for suffix in ("weight_scale", "weight_scale_second")[: 2 if scheme == Scheme.W4A8_DYNAMIC else 1]:
            if f"{layer}.{suffix}" not in self.folder.valid_tensors:
                return None
            scale = scale * self.folder.files.tensors[f"{layer}.{suffix}"].read().astype(np.float32)
        if not (np.isfinite(scale) & (scale > 0)).all():
            return None  # reported by the arithmetic
        return WeightPair(layer, pair[0], integers, scale)

    def same(self, name: str) -> None:
        """A tensor that nothing touches: the source's value in the folder's dtype, bit for bit."""
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
            why = "nothing may change this tensor but its dtype"
            self.result.add_fault(
                CHECK, name, f"{count} values differ from the float checkpoint, first at {first}", why
            )

    def columns_behind(self, norm: str, parts: list[tuple[str, int | None]]) -> Scales:
        """Fit the input scales of a norm's consumers and hold the stored norm to them: norm * columns = source."""
        pairs = [(pair, pair.rows if end is None else end) for layer, end in parts if (pair := self.weight_pair(layer))]
        inputs = self.model.linears[parts[0][0]].inputs
        columns = fit_columns(pairs) if pairs else Scales.ones(inputs)
        found = self.pair(f"{norm}.weight")
        if found is None or not pairs:
            return columns
        source, stored = found[0].read().astype(np.float32), found[1].read().astype(np.float32)
        tiles = inputs // len(source)  # the merger lays 2 x 2 patches side by side: one norm channel, four columns
        expected, product = np.tile(source, tiles), np.tile(stored, tiles) * columns.values
        allowed = np.abs(expected) * (2 * ULP[self.folder.float_dtype] + SIGMAS * columns.sigma)
        allowed += (
            STEP_AT_ZERO[self.folder.float_dtype] * columns.values
        )  # the smallest numbers are as far apart as zero
        wrong = np.flatnonzero(np.isfinite(columns.sigma) & ~(np.abs(product - expected) <= allowed)) % len(source)
        if wrong.size:
            first = int(wrong[0])
            what = (
                f"channels {format_list(np.unique(wrong))}: stored {stored[first]:.6g}, but the columns of "
                f"{format_list(consumers_of_norm(norm))} took {source[first] / columns.values[first]:.6g} for granted"
            )
            why = "norm and consumers must cancel, or the model computes something else"
            self.result.add_fault(CHECK, f"{norm}.weight", what, why)
        return columns

    def rows_of(self, layer: str, begin: int, columns: Scales) -> Scales:
        pair = self.weight_pair(layer)
        return fit_rows(pair, begin, columns) if pair else Scales.ones(self.model.linears[layer].outputs)

    def consumer(self, layer: str, producer: Array, producer_sigma: Array, producer_layer: str) -> None:
        """A Linear behind scaled rows: its columns must undo them. producer: [K] as its input channels see it."""
        pair = self.weight_pair(layer)
        if pair is None:
            return
        columns = fit_columns([(pair, pair.rows)])
        sigma = columns.sigma + producer_sigma
        wrong = np.flatnonzero(np.isfinite(sigma) & ~(np.abs(columns.values * producer - 1) <= 0.01 + SIGMAS * sigma))
        if wrong.size:
            first = int(wrong[0])
            what = (
                f"channels {format_list(wrong)}: columns are scaled by {columns.values[first]:.6g}, "
                f"the rows of {producer_layer} by {producer[first]:.6g}"
            )
            why = "the two must cancel, or the model computes something else"
            self.result.add_fault(CHECK, f"{layer}.weight", what, why)
        self.weight(layer, None, columns)

    def weight(self, layer: str, rows: Scales | None, columns: Scales, *, exact: bool = False) -> None:
        """Every weight of one Linear, and its bias, under fitted scales."""
        pair = self.weight_pair(layer)
        if pair is None:
            return
        if exact and pair.scale is None:
            self.same(f"{layer}.weight")
        else:
            self.rounded(pair, rows or Scales.ones(pair.rows), columns)
        shift = shift_in_front_of(self.folder, layer)
        if shift is not None:
            self.shifted_bias(pair, rows or Scales.ones(pair.rows), columns, shift)
        elif self.model.linears[layer].bias:
            self.bias(layer, rows)

    def rounded(self, pair: WeightPair, rows: Scales, columns: Scales) -> None:
        found = misfits(pair, rows, columns)
        name = f"{pair.layer}.weight"
        self.sqnr[pair.layer] = found.sqnr
        count, first = (found.gross, found.first_gross) if found.other_rounding else (found.count, found.first)
        if found.sqnr < BROKEN_WEIGHTS[pair.bits]:
            what = f"SQNR against the float weight is {found.sqnr:.1f} dB"
            self.result.add_fault(
                CHECK, name, what, "this is not the float checkpoint's matrix", "is it the right one?"
            )
        elif count:
            what = f"{count} of {found.total} weights do not follow from the float weight, first at {list(first or ())}"
            why = "they are further from it than rounding and the layer's channel scales explain"
            self.result.add_fault(CHECK, name, what, why, "copy the folder again, or compile again")
        elif found.scaled:
            row, group, factor = found.scaled[0]
            where = f"row {row}" if pair.scale is None or pair.scale.shape[1] == 1 else f"group {group} of row {row}"
            what = f"{where} is {factor:.4g} times what its scale says ({len(found.scaled)} in all)"
            self.result.add_fault(CHECK, name, what, "weight or weight_scale is damaged", "compile again")

    def bias(self, layer: str, rows: Scales | None) -> None:
        """A bias takes its rows' scales."""
        pair = self.pair(f"{layer}.bias")
        if pair is None:
            return
        source, stored = pair[0].read().astype(np.float32), pair[1].read()
        scales = rows or Scales.ones(len(source))
        free = scales.sigma > 0  # rows that smoothing may scale
        expected = np.where(free, source * scales.values, round_to(self.folder.float_dtype, source))
        allowed = np.where(free, np.abs(expected) * (ULP[self.folder.float_dtype] + SIGMAS * scales.sigma), 0)
        why = "a bias changes with its rows' scales only"
        self.hold(f"{layer}.bias", stored, expected, allowed, why)

    def shifted_bias(self, pair: WeightPair, rows: Scales, columns: Scales, shift: Array) -> None:
        """Behind a norm with a bias z the bias is the float one less W z, with W under its scales. Held to it are the
        stored bias, if any, and what a static layer adds, which is its quant_bias."""
        layer, tensors = pair.layer, self.folder.files.tensors
        has_bias = self.model.linears[layer].bias
        float_pair = self.pair(f"{layer}.bias") if has_bias else None
        if has_bias and float_pair is None:
            return
        column = columns.values * shift  # [K]
        taken, uncertain, step = np.zeros(pair.rows), np.zeros(pair.rows), np.zeros(pair.rows)
        unsure = np.where(np.isfinite(columns.sigma), columns.sigma, 0) + ULP[self.folder.float_dtype]
        for start, source in pair.source.rows():
            mine = slice(start, start + len(source))
            taken[mine] = source.astype(np.float64) @ column
            uncertain[mine] = np.sqrt((source.astype(np.float64) ** 2) @ (column * unsure) ** 2)
            if pair.scale is not None:
                step[mine] = pair.scale[mine].max(axis=1)
        source_bias = float_pair[0].read().astype(np.float64) if float_pair else np.zeros(pair.rows)
        expected = rows.values * (source_bias - taken)
        sigma = np.where(np.isfinite(rows.sigma), rows.sigma, 0)
        # W may be the float weight or its integers, which differ by their rounding.
        allowed = np.abs(rows.values) * uncertain + np.abs(expected) * sigma + NOISE * step * np.linalg.norm(shift)
        allowed = SIGMAS * allowed + np.abs(expected) * ULP[self.folder.float_dtype]
        why = "what a folded shift adds in front of the layer, the layer's bias takes back"
        if float_pair:
            self.hold(f"{layer}.bias", float_pair[1].read().astype(np.float64), expected, allowed, why)
        names = [f"{layer}.{suffix}" for suffix in ("quant_bias", "input_offset", "input_scale")]
        if has_bias or pair.scale is None or not all(name in self.folder.valid_tensors for name in names):
            return  # the arithmetic holds quant_bias to a stored bias
        quant_bias, offset, input_scale = (tensors[name].read().astype(np.float64) for name in names)
        assert isinstance(pair.stored, StoredIntegers)
        unit = input_scale * pair.scale.reshape(-1).astype(np.float64)  # [N]
        added = (quant_bias + offset * row_sums(pair.stored).total) * unit
        self.hold(names[0], added, expected, allowed + 0.5 * unit, why)

    def hold(self, name: str, stored: Array, expected: Array, allowed: Array, why: str) -> None:
        """A value per channel against what it should be."""
        distance = np.abs(stored - expected)
        wrong = np.flatnonzero((distance != 0) & ~(distance <= allowed))
        if wrong.size:
            first = int(wrong[0])
            what = (
                f"channels {format_list(wrong)}: stored {stored[first]:.6g}, the float layer has {expected[first]:.6g}"
            )
            self.result.add_fault(CHECK, name, what, why)
