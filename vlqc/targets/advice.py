"""What a user is told of engines: which versions will not load the result, what they prefer, how to serve it."""

import json
import shlex
from pathlib import Path

from vlqc.targets.engines import engines_of, legal_schemes, listed, rules_for, stays_float_in_reference
from vlqc.targets.rules import (
    FAST_GROUP_SIZES,
    FLOAT_SINCE,
    LANGUAGE,
    MINDIE_GROUP_SIZES,
    VISION_GATE_UP,
    VISION_PROJ,
    VISION_QKV,
    Scheme,
)
from vlqc.targets.target import ENGINE_TITLES, MINDIE, VLLM_ASCEND, Target, as_target
from vlqc.targets.versions import span


def cannot_load(target: str | Target, scheme: Scheme, dtype: str = "bfloat16", scope: str = "engine") -> list[str]:
    """One sentence per engine of the target that will not load a compilation in `scheme`; [] when all will.

    scope: "engine" gives layers that the target does not run in `scheme` another one, "all" gives them `scheme`, too.
    """
    target = as_target(target)
    dtype = _run_dtype(dtype)
    sentences = []
    for engine in target.engines:
        found = span(engine, _typical(target, scheme, scope), dtype)
        if found is None:
            why = ""
            if span(engine, _typical(target, scheme, scope), "bfloat16"):
                why = f" of a {dtype} model (bfloat16 only)"
            elif span(engine, _typical(target, scheme, "engine"), dtype):
                why = " on layers with a bias or in the vision tower"
            elif scheme == Scheme.W4A8_DYNAMIC and engine == MINDIE:
                why = " for vision-language models"
            sentences.append(f"no version of {ENGINE_TITLES[engine]} loads {scheme}{why}")
        elif target.version and not found.covers(target.version):
            sentences.append(f"{target.title(engine)} does not load {scheme}; {found} do")
    return sentences


def engine_notes(
    target: str | Target, scheme: Scheme, dtype: str = "bfloat16", group_size: int | None = None, scope: str = "engine"
) -> list[str]:
    """What the user should be told before compiling: `cannot_load`, limits to some versions, costly group sizes."""
    target = as_target(target)
    notes = cannot_load(target, scheme, dtype, scope)
    for engine in target.engines:
        found = span(engine, _typical(target, scheme, scope), _run_dtype(dtype))
        if found and found.until and not target.version:
            notes.append(f"{found} load {scheme}, later versions do not")
        elif found and found.since != FLOAT_SINCE[engine] and not target.version:
            notes.append(f"{found} load {scheme}, earlier versions do not")
    if scheme == Scheme.W8A8_DYNAMIC and MINDIE in target.engines:
        notes.append("MindIE runs W8A8_DYNAMIC in the language model only: the vision tower stays float")
    if scheme == Scheme.W4A8_DYNAMIC and group_size is not None:
        if VLLM_ASCEND in target.engines and group_size > max(FAST_GROUP_SIZES) * 2:
            sizes = listed(FAST_GROUP_SIZES)
            notes.append(
                f"group_size {group_size}: vLLM Ascend's int4 kernels are written for {sizes}, and may refuse it"
            )
        elif VLLM_ASCEND in target.engines and group_size not in FAST_GROUP_SIZES:
            sizes = listed(FAST_GROUP_SIZES)
            notes.append(f"group_size {group_size}: vLLM Ascend's int4 kernels prefer {sizes}")
        if MINDIE in target.engines and group_size not in MINDIE_GROUP_SIZES:
            notes.append(f"group_size {group_size}: MindIE accepts {listed(MINDIE_GROUP_SIZES[1:])} only")
    return notes


def serve_commands(target: str | Target, folder: str | Path) -> list[str]:
    """One line per engine of the target: what to run or set so that the engine serves `folder`."""
    lines = {
        # Versions from 0.17.0rc1 on detect the quantization by themselves; the flag does no harm there.
        VLLM_ASCEND: f"vllm serve {shlex.quote(str(folder))} --quantization ascend",
        MINDIE: f'"modelWeightPath": {json.dumps(str(folder), ensure_ascii=False)} in the config.json of the MindIE '
        "service",
    }
    return [lines[engine] for engine in engines_of(target)]


def _typical(target: Target, scheme: Scheme, scope: str) -> dict[str, Scheme]:
    """What a compilation in `scheme` gives one layer of each kind outside the seed's exclusions."""
    kinds = [k for k in (*VISION_QKV, *VISION_PROJ, *VISION_GATE_UP, *LANGUAGE) if not stays_float_in_reference(k)]
    rules = rules_for(target, scheme)
    if scope == "all" or rules is None:
        return dict.fromkeys(kinds, scheme)
    choices = (scheme, Scheme.W8A8_DYNAMIC) if scheme == Scheme.W4A8_DYNAMIC else (scheme,)
    return {
        kind: next((each for each in choices if each in legal_schemes(rules, kind)), Scheme.FLOAT) for kind in kinds
    }


def _run_dtype(dtype: str) -> str:
    """The dtype that engines run a model of this dtype in: float32 is emitted as bfloat16."""
    return "float16" if dtype == "float16" else "bfloat16"
