"""Which engine a result is for, and the order of engine versions: `vllm-ascend`, `mindie@2.2`, `both`."""

import math
import re
from dataclasses import dataclass
from functools import cached_property

from vlqc.errors import Fault, UserError
from vlqc.formatting import did_you_mean

VLLM_ASCEND = "vllm-ascend"
MINDIE = "mindie"
BOTH = "both"
ENGINES = (VLLM_ASCEND, MINDIE)
ENGINE_TITLES = {VLLM_ASCEND: "vLLM Ascend", MINDIE: "MindIE"}
VERSION = re.compile(r"v?(\d+(?:\.\d+)*)(?:[._-]?(dev|rc|post)[._-]?(\d*))?", re.IGNORECASE)
STAGES = {"dev": 0, "rc": 1, "": 2, "post": 3}
EXAMPLES = {VLLM_ASCEND: "0.18 or 0.17.0rc1", MINDIE: "2.2 or 2.2.RC1"}


@dataclass(frozen=True, order=True)
class Version:
    """A version's place in the order of versions: 0.17.0rc1 < 0.17 = 0.17.0 < 0.17.0.post1 < 0.17.1."""

    release: tuple[int, ...]  # without trailing zeros
    stage: int
    number: float  # of the release candidate; "0.26.0rc" without a number stands for the last of them

    @classmethod
    def parse(cls, text: str) -> "Version":
        """Text such as "0.18", "v0.10.2rc2", "2.2.RC1". ValueError if it is no version."""
        match = VERSION.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not a version")
        release = [int(part) for part in match[1].split(".")]
        while len(release) > 1 and release[-1] == 0:
            release.pop()
        return cls(tuple(release), STAGES[(match[2] or "").lower()], float(match[3] or math.inf))


@dataclass(frozen=True)
class Target:
    """The engines that must load the result. version: of the one engine; None stands for any known version."""

    engines: tuple[str, ...]
    version: str | None = None

    def __str__(self) -> str:
        return (BOTH if len(self.engines) > 1 else self.engines[0]) + (f"@{self.version}" if self.version else "")

    @cached_property
    def place(self) -> Version | None:
        """The version's place in the order."""
        return Version.parse(self.version) if self.version else None

    def title(self, engine: str) -> str:
        """An engine's name as its users write it, with the version if the target has one."""
        return f"{ENGINE_TITLES[engine]} {self.version}" if self.version else ENGINE_TITLES[engine]

    def alone(self, engine: str) -> "Target":
        """The part of the target that concerns one of its engines."""
        return Target((engine,), self.version)


def parse_target(text: str, where: str = "--target") -> Target:
    """ "vllm-ascend", "mindie@2.2", "both" -> the target. UserError, which names `where`, for anything else."""
    name, at, version = text.strip().partition("@")
    name, version = name.strip().lower(), version.strip()
    known = (*ENGINES, BOTH)
    if name not in known:
        begins = next((engine for engine in known if name.replace("_", "-").startswith(engine)), "")
        rest = name[len(begins) :].lstrip("-_=: v") if begins else ""
        if begins in EXAMPLES and VERSION.fullmatch(rest):
            fix = f"did you mean {begins}@{rest}?"
        else:
            fix = did_you_mean(begins or name, known) or f"known are {', '.join(known)}"
        raise UserError(Fault(f"unknown engine {name!r}", where, f"known are {', '.join(known)}", fix))
    if name == BOTH:
        if at:
            why = "each of the two engines has versions of its own"
            raise UserError(Fault(f"{where} {text}", where, why, "give both without a version, or one engine"))
        return Target(ENGINES)
    if at and not VERSION.fullmatch(version):
        why = f"{version!r} is no version of {ENGINE_TITLES[name]}"
        raise UserError(Fault(f"{where} {text}", where, why, f"give a version such as {EXAMPLES[name]} after the @"))
    return Target((name,), version or None)


def as_target(target: str | Target) -> Target:
    """A target or its text -> the target. UserError for a text that is none."""
    return target if isinstance(target, Target) else parse_target(target)
