"""The ranking of groups as tables and sentences of a report."""

from collections.abc import Sequence
from typing import Any

from vlqc.ir.stage import MODALITIES
from vlqc.verify.accuracy import Noise
from vlqc.verify.attribution.advice import LOCATE, advise
from vlqc.verify.attribution.variants import Group, Located, ModalityNoise
from vlqc.verify.findings import RANKING, VerificationResult
from vlqc.verify.structure.structure import CompiledFolder

ADVISED = 3  # groups that something is said about
INTERACTION = (0.8, 1.25)  # sum of the single groups' noise over the whole noise between which they just add up
MIB = 1 << 20


def report_ranking(located: Located, content: CompiledFolder, result: VerificationResult) -> None:
    """Facts and advice into the report. Groups are ranked by the error that each makes alone."""
    signal, whole, groups = located.signal, located.whole, located.groups
    ranked = sorted(groups, key=lambda group: -groups[group].alone.total)  # stable: equal ones in the model's order
    by_gain = sorted(groups, key=lambda group: groups[group].without.total)
    alone = sum(noise.alone.total for noise in groups.values())
    result.add_examined(LOCATE, len(groups))
    result.facts["located"] = {
        "all quantized dB": _sqnr(signal.total, whole.total),
        **_by_modality(signal, whole),
        "without the groups' rounding dB": _sqnr(signal.total, located.folded.total),
        "sum of shares %": _share(alone, whole.total),
    }
    if whole.total > 0 and not INTERACTION[0] <= alone / whole.total <= INTERACTION[1]:
        result.facts["interaction"] = (
            f"one by one the groups make {_share(alone, whole.total)} % of the error that they make together: errors "
            f"{'add to' if alone < whole.total else 'cancel'} each other, so trust gains in float more than shares"
        )
    result.facts["in the table"] = (
        "alone, text, image: logits of the float model with only this group quantized; share: of the folder's error; "
        "gain: of the folder's logits with only this group float; inputs: share of its own error that is not its "
        "weights'; MiB: what float would add"
    )
    rows = {group: _row(group, located, content) for group in ranked}
    result.facts[RANKING] = [row | {"gain rank": by_gain.index(group) + 1} for group, row in rows.items()]
    for rank, group in enumerate(ranked[:ADVISED], 1):
        measured = groups[group].measured
        if measured is not None and groups[group].alone.total > 0:
            advise(result, rank, rows[group], group.layers, content.schemes, measured)


def _row(group: Group, located: Located, content: CompiledFolder) -> dict[str, Any]:
    signal, whole, noise = located.signal, located.whole, located.groups[group]
    gain = _sqnr(signal.total, noise.without.total) - _sqnr(signal.total, whole.total)
    return {
        "group": group.name,
        "scheme": str(content.schemes[group.layers[0]]),
        "alone dB": _sqnr(signal.total, noise.alone.total),
        "share %": _share(noise.alone.total, whole.total),
        "gain dB": round(gain, 2),
        **_by_modality(signal, noise.alone),
        "inputs %": round(100 * noise.measured.input_share) if noise.measured else "-",
        "float MiB": round(_float_cost(group.layers, content) / MIB, 3),
    }


def _by_modality(signal: ModalityNoise, noise: ModalityNoise) -> dict[str, Any]:
    """SQNR of the logits of text tokens and of image tokens; "-" where the samples have none."""
    return {
        f"{name} dB": _sqnr(signal.power[name], noise.power[name]) if signal.power[name] else "-" for name in MODALITIES
    }


def _float_cost(layers: Sequence[str], content: CompiledFolder) -> int:
    """Bytes by which the folder grows when these layers are float; a bias, where there is one, stays as it is."""
    if content.model is None:
        return 0
    cost = 0
    for layer in layers:
        linear = content.model.linears[layer]
        cost += 2 * linear.outputs * linear.inputs
        mine = (tensor for name, tensor in content.files.tensors.items() if name.rpartition(".")[0] == layer)
        cost -= sum(tensor.nbytes for tensor in mine if not tensor.name.endswith(".bias"))
    return cost


def _sqnr(signal: float, noise: float) -> float:
    return round(Noise(signal, noise).sqnr, 2)


def _share(part: float, whole: float) -> float:
    return round(100 * part / whole, 1) if whole > 0 else 0.0
