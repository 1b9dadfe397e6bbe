"""What to do about a group that costs accuracy: options of `vlqc compile`, and measured facts for them."""

import math
from collections.abc import Mapping, Sequence

from vlqc.families.qwen2_5_vl import fused_group
from vlqc.targets.rules import group_faults, supported_schemes
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import Target, parse_target
from vlqc.targets.vllm_ascend import VLLM_ASCEND as WIDEST
from vlqc.verify.attribution.group_error import EIGHT_BITS, PER_TOKEN, SMALL_GROUPS, SMOOTHED, TIGHTER, WIDER, Measured
from vlqc.verify.findings import Finding, VerificationResult

LOCATE = "locate"
WORTH = 0.5  # dB by which a group's own error has to fall for an option to be named
WORTH_UNSURE = 3.0  # dB; where the trial only resembles what the option does, small gains may not come
ONE_SIDE = 0.6  # share of the error from which on one side is said to make it
PLAIN = 0.999  # share of integers that are the nearest from which on a weight counts as plainly rounded
CLIPPED = 1e-6  # share of an input's values outside its range from which on it is mentioned
OUTLIERS = 8.0  # times the median channel: what smoothing should have made smaller


def advise(
    result: VerificationResult,
    rank: int,
    row: Mapping[str, object],
    layers: Sequence[str],
    schemes: Mapping[str, Scheme],
    found: Measured,
) -> None:
    """One group of the ranking -> an entry in the report's advice: its facts, and every option that they support.

    row: of the ranking; layers: the group's members; schemes: of every Linear of the folder.
    """
    scheme = schemes[layers[0]]
    what = (
        f"{rank}. {row['group']} ({scheme}): {row['share %']} % of the logits' error; in float the logits gain "
        f"{row['gain dB']} dB"
    )
    options = _measured_options(layers, scheme, parse_target(result.engine), found)
    options.append(_exclusion(row, layers, schemes, parse_target(result.engine)))
    result.advice.append(Finding(LOCATE, str(row["group"]), what, "; ".join(_facts(found, scheme)), "; ".join(options)))


def _facts(found: Measured, scheme: Scheme) -> list[str]:
    share = found.input_share
    if share >= ONE_SIDE:
        facts = [f"{share:.0%} of its own error is its inputs' rounding, {1 - share:.0%} its weights'"]
    elif share <= 1 - ONE_SIDE:
        facts = [f"{1 - share:.0%} of its own error is its weights' rounding, {share:.0%} its inputs'"]
    else:
        facts = [f"its own error comes from weights ({1 - share:.0%}) and inputs ({share:.0%}) alike"]
    for modality, (count, total) in found.clipped.items():
        if count > CLIPPED * total:
            facts.append(f"{_percent(count / total)} of its {modality} inputs lie outside the stored range")
    if any(count for count, _ in found.clipped.values()) and found.reach > 1:
        facts.append(f"the largest is {found.reach:.3g} times the range's end")
    if found.plain >= PLAIN and share <= 1 - ONE_SIDE:
        facts.append("every weight is rounded to the nearest")
    if found.largest > OUTLIERS and scheme != Scheme.FLOAT:
        facts.append(f"the largest channel of its stored input is {found.largest:.3g} times the median one")
    return facts


def _measured_options(layers: Sequence[str], scheme: Scheme, target: Target, found: Measured) -> list[str]:
    """Options that make the group's own error smaller by at least WORTH dB, the best first."""
    own = found.inputs + found.weights
    gains = {name: _decibels(own, noise) for name, noise in found.others.items()}
    if SMOOTHED in gains:  # tried with a range that knows these samples, which says nothing for smoothing
        gains[SMOOTHED] = _decibels(min(own, found.others.get(WIDER, own)), found.others[SMOOTHED])
    clipped = any(count > CLIPPED * total for count, total in found.clipped.values())
    words = {
        PER_TOKEN: _for_target("--is_dynamic True", Scheme.W8A8_DYNAMIC, layers, target),
        WIDER: "--calib_images with more or other pictures, like these" if clipped else "",
        TIGHTER: "" if any(count for count, _ in found.clipped.values()) else "--act_method 2 (a narrower range)",
        EIGHT_BITS: _for_target("--w_bit 8 --is_lowbit False --is_dynamic True", Scheme.W8A8_DYNAMIC, layers, target),
        SMALL_GROUPS: "--group_size 64",
        SMOOTHED: "--anti_method m4 --anti_alpha 0.5",
    }
    options = [
        f"{words[name]}: its own error {-gain:+.1f} dB"
        for name, gain in sorted(gains.items(), key=lambda item: -item[1])
        if gain >= (WORTH_UNSURE if name in (SMOOTHED, TIGHTER) else WORTH) and words[name]
    ]
    if found.input_share <= 1 - ONE_SIDE and found.plain >= PLAIN:
        options.append("--weight_method gptq: its weights are rounded to the nearest")
    return options


def _for_target(option: str, scheme: Scheme, layers: Sequence[str], target: Target) -> str:
    """The option, with another target where the folder's own does not run these layers so; empty where none does."""
    if scheme in supported_schemes(target, layers[0]):
        return option
    return f"{option} --target {WIDEST}" if scheme in supported_schemes(WIDEST, layers[0]) else ""


def _exclusion(row: Mapping[str, object], layers: Sequence[str], schemes: Mapping[str, Scheme], target: Target) -> str:
    """--exclude with its measured effect; the fused group follows its member."""
    planned = {**schemes, **{member: Scheme.FLOAT for member in fused_group(layers[0]) if member in schemes}}
    other = f" --target {WIDEST}" if group_faults(target, planned) else ""
    effect = f"the logits {row['gain dB']:+} dB for {row['float MiB']} MiB more"
    return f"--exclude {layers[0]}{other}: {effect}"


def _decibels(before: float, after: float) -> float:
    """By how much an error falls, in dB; 0 where nothing was or is there to compare."""
    return 10 * math.log10(before / after) if before > 0 and after > 0 else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
