"""Ranks groups of layers by their share of the logits' error and suggests options for the first ones."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vlqc.families.family import ModelFamily
from vlqc.ir.observation import MODALITIES
from vlqc.targets.engine import join_and
from vlqc.targets.rules import group_faults, supported_schemes
from vlqc.targets.schemes import Scheme, linear_bytes, option_name
from vlqc.targets.target import ENGINES, Target, parse_target
from vlqc.verify.accuracy import Noise
from vlqc.verify.attribution.ablation import Attribution, LayerGroup, ModalityPower
from vlqc.verify.attribution.group_error import (
    EIGHT_BITS,
    PER_TOKEN,
    SMALL_GROUPS,
    SMOOTHED,
    TIGHTER,
    WIDER,
    GroupError,
)
from vlqc.verify.findings import LEGEND, RANKING, Finding, VerificationResult
from vlqc.verify.structure.structure import CompiledFolder

CHECK = "locate"
ADVISED = 3  # groups that get advice
INTERACTION = (0.8, 1.25)  # sum of the single groups' errors over the folder's error between which they are independent
MIB = 1 << 20

WORTH = 0.5  # dB by which a group's own error has to fall for an option to be suggested
WORTH_UNSURE = 3.0  # dB; where the measurement only approximates what the option does
ONE_SIDE = 0.6  # share of the error from which on inputs or weights count as its main cause
PLAIN = 0.999  # share of nearest integers from which on a weight counts as rounded to the nearest
CLIPPED = 1e-6  # share of an input's values outside its range from which on clipping is reported
OUTLIERS = 8.0  # times the median channel: what smoothing should have made smaller


def add_ranking(attribution: Attribution, compiled: CompiledFolder, result: VerificationResult) -> None:
    """Adds the ranking, its legend and the advice to the result. Groups are ordered by the error that each causes
    alone; equal ones stay in the order of the model."""
    signal, error, groups = attribution.signal, attribution.error, attribution.groups
    ranked = sorted(groups, key=lambda group: -groups[group].alone.total)
    by_gain = sorted(groups, key=lambda group: groups[group].without.total)
    alone = sum(effect.alone.total for effect in groups.values())
    result.add_examined(CHECK, len(groups))
    result.facts["SQNR of the logits"] = {
        "all quantized dB": _sqnr(signal.total, error.total),
        **_by_modality(signal, error),
        "without the groups' rounding dB": _sqnr(signal.total, attribution.float_groups_error.total),
        "sum of shares %": _percent(alone, error.total),
    }
    if error.total > 0 and not INTERACTION[0] <= alone / error.total <= INTERACTION[1]:
        effect = "add to" if alone < error.total else "cancel"
        result.facts["interaction"] = (
            f"quantized one at a time, the groups cause {_percent(alone, error.total)} % of the folder's error: their "
            f"errors {effect} each other, so rely on the gain more than on the share"
        )
    result.facts[LEGEND] = (
        f"{', '.join(['alone', *_modalities(signal)])}: SQNR of the logits of the float model with only this group "
        "quantized; share: the error of these logits relative to the folder's, where errors that add to or cancel each "
        "other make the sum differ from 100 %; gain: of the folder's logits with only this group float; inputs: part "
        "of the group's own error that comes from rounding its inputs, not its weights; MiB: what the folder grows by "
        "if the group is float"
    )
    if several := sorted({scheme for scheme in compiled.schemes.values() if not scheme.spec.has_one_arithmetic}):
        result.facts[LEGEND] += f". Inputs of {join_and(several)} are quantized per token in all of them"
    rows = {group: _row(group, attribution, compiled) for group in ranked}
    result.facts[RANKING] = [row | {"gain rank": by_gain.index(group) + 1} for group, row in rows.items()]
    for rank, group in enumerate(ranked[:ADVISED], 1):
        if group.cache and groups[group].alone.total > 0:
            _add_cache_advice(result, rank, rows[group])
        measured = groups[group].measured
        if measured is not None and groups[group].alone.total > 0:
            _add_advice(result, rank, rows[group], group.layers, compiled, measured)


def _row(group: LayerGroup, attribution: Attribution, compiled: CompiledFolder) -> dict[str, Any]:
    signal, error, effect = attribution.signal, attribution.error, attribution.groups[group]
    gain = _sqnr(signal.total, effect.without.total) - _sqnr(signal.total, error.total)
    return {
        "group": group.name,
        "scheme": str(compiled.caches[group.cache] if group.cache else compiled.schemes[group.layers[0]]),
        "alone dB": _sqnr(signal.total, effect.alone.total),
        "share %": _percent(effect.alone.total, error.total),
        "gain dB": round(gain, 2),
        **_by_modality(signal, effect.alone),
        "inputs %": round(100 * effect.measured.input_share) if effect.measured else "-",
        "float MiB": round(_float_cost(group.layers, compiled) / MIB, 3),
    }


def _by_modality(signal: ModalityPower, noise: ModalityPower) -> dict[str, Any]:
    """SQNR of the logits of text tokens and of image tokens, as far as the samples have them."""
    return {f"{name} dB": _sqnr(signal.power[name], noise.power[name]) for name in _modalities(signal)}


def _modalities(signal: ModalityPower) -> list[str]:
    """Those that the samples have."""
    return [name for name in MODALITIES if signal.power[name]]


def _float_cost(layers: Sequence[str], compiled: CompiledFolder) -> int:
    """Bytes by which the folder grows if these layers are float. A bias is float already."""
    if compiled.model is None:
        return 0
    linears = compiled.model.linears
    return sum(
        linear_bytes(Scheme.FLOAT, linears[layer], compiled.form)
        - linear_bytes(compiled.schemes[layer], linears[layer], compiled.form)
        for layer in layers
    )


def _sqnr(signal: float, noise: float) -> float:
    return round(Noise(signal, noise).sqnr, 2)


def _percent(part: float, whole: float) -> float:
    return round(100 * part / whole, 1) if whole > 0 else 0.0


# ---- advice ----------------------------------------------------------------------------------------------------------


def _add_advice(
    result: VerificationResult,
    rank: int,
    row: Mapping[str, Any],
    layers: Sequence[str],
    compiled: CompiledFolder,
    error: GroupError,
) -> None:
    """Adds one group's advice to the result: the causes of its error, and every option that the measurements support.

    row: of the ranking; layers: the group's members; compiled: the folder.
    """
    scheme, target = compiled.schemes[layers[0]], parse_target(result.engine)
    options = _measured_options(layers, scheme, compiled.family, target, error)
    effect = "does not raise the SQNR of the folder's logits"
    if row["gain dB"] > 0:
        effect = f"raises the SQNR of the folder's logits by {row['gain dB']} dB"
        options.append(_exclusion(row, layers, compiled, target))
    what = (
        f"{rank}. {row['group']} ({scheme}): with only this group quantized, the logits' error is {row['share %']} % "
        f"of the folder's; keeping it in float {effect}"
    )
    why, fix = "; ".join(_causes(error, scheme)), "; ".join(options)
    result.advice.append(Finding(CHECK, str(row["group"]), what, why, fix))


def _add_cache_advice(result: VerificationResult, rank: int, row: Mapping[str, Any]) -> None:
    gain = row["gain dB"]
    effect = f"raises the SQNR of the folder's logits by {gain} dB" if gain > 0 else "does not raise the logits' SQNR"
    what = (
        f"{rank}. {row['group']} ({row['scheme']}): with only these keys and values quantized, the logits' error is "
        f"{row['share %']} % of the folder's; keeping them in float {effect}"
    )
    why = "every key and value is rounded with one scale per channel for all tokens"
    fix = "--kv_cache none, or in --pipeline a larger min_sqnr of the pass for the cache: such layers stay float"
    result.advice.append(Finding(CHECK, str(row["group"]), what, why, fix if gain > 0 else ""))


def _causes(error: GroupError, scheme: Scheme) -> list[str]:
    share = error.input_share
    if share >= ONE_SIDE:
        causes = [f"{share:.0%} of its own error comes from rounding its inputs, {1 - share:.0%} from its weights"]
    elif share <= 1 - ONE_SIDE:
        causes = [f"{1 - share:.0%} of its own error comes from rounding its weights, {share:.0%} from its inputs"]
    else:
        causes = [f"its own error comes from rounding both its weights ({1 - share:.0%}) and its inputs ({share:.0%})"]
    for modality, (count, total) in error.clipped.items():
        if count > CLIPPED * total:
            causes.append(f"{100 * count / total:.2g} % of its {modality} inputs lie outside the stored range")
    if any(count for count, _ in error.clipped.values()) and error.overshoot > 1:
        causes.append(f"the largest input is {error.overshoot:.3g} times the end of the range")
    if error.nearest_share >= PLAIN and share <= 1 - ONE_SIDE:
        causes.append("every weight is rounded to the nearest integer")
    if error.outlier_ratio > OUTLIERS and scheme.is_quantized:
        causes.append(f"the largest channel of its input is {error.outlier_ratio:.3g} times the median channel")
    return causes


def _measured_options(
    layers: Sequence[str], scheme: Scheme, family: ModelFamily, target: Target, error: GroupError
) -> list[str]:
    """Options that lower the group's own error by at least WORTH dB, the best first."""
    own = error.from_inputs + error.from_weights
    gains = {name: _decibels(own, noise) for name, noise in error.alternatives.items()}
    if SMOOTHED in gains:  # measured with the range of these very samples, a gain that is not due to smoothing
        gains[SMOOTHED] = _decibels(min(own, error.alternatives.get(WIDER, own)), error.alternatives[SMOOTHED])
    clipped = any(count > CLIPPED * total for count, total in error.clipped.values())
    per_token = next(each for each in Scheme if each.spec.activation.is_dynamic and each.spec.weight.bits == 8)
    options = {
        PER_TOKEN: _for_target(f"--scheme {option_name(per_token)}", per_token, family, layers, target),
        WIDER: "--calib_images with more or other samples, like these" if clipped else "",
        TIGHTER: "" if any(count for count, _ in error.clipped.values()) else "--act_method 2 (a narrower range)",
        EIGHT_BITS: _for_target(f"--scheme {option_name(per_token)}", per_token, family, layers, target),
        SMALL_GROUPS: "--group_size 64",
        SMOOTHED: "--anti_method m4 --anti_alpha 0.5",
    }
    advice = [
        f"{options[name]}: its own error {-gain:+.1f} dB"
        for name, gain in sorted(gains.items(), key=lambda item: -item[1])
        if gain >= (WORTH_UNSURE if name in (SMOOTHED, TIGHTER) else WORTH) and options[name]
    ]
    if error.input_share <= 1 - ONE_SIDE and error.nearest_share >= PLAIN:
        advice.append("--weight_method gptq: its weights are rounded to the nearest integer")
    return advice


def _for_target(option: str, scheme: Scheme, family: ModelFamily, layers: Sequence[str], target: Target) -> str:
    """The option, with another target if the folder's own does not run these layers so; empty if none does."""
    if scheme in supported_schemes(target, family, layers[0]):
        return option
    return f"{option} --target {ENGINES[0]}" if scheme in supported_schemes(ENGINES[0], family, layers[0]) else ""


def _exclusion(row: Mapping[str, object], layers: Sequence[str], compiled: CompiledFolder, target: Target) -> str:
    """--exclude with its measured effect; the other members of the fused group follow the named one."""
    schemes, members = compiled.schemes, compiled.family.fused_group(layers[0])
    planned = {**schemes, **{member: Scheme.FLOAT for member in members if member in schemes}}
    other = f" --target {ENGINES[0]}" if group_faults(target, compiled.family, planned) else ""
    effect = f"SQNR of the logits {row['gain dB']:+} dB for {row['float MiB']} MiB more"
    return f"--exclude {layers[0]}{other}: {effect}"


def _decibels(before: float, after: float) -> float:
    """By how much an error falls, in dB; 0 if either is 0."""
    return 10 * math.log10(before / after) if before > 0 and after > 0 else 0.0
