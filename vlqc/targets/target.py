"""The engines of vlqc, and those that a result is for, as text: `vllm-ascend`, `mindie@2.2`, or `both` for the pair."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from packaging.version import InvalidVersion, Version

from vlqc.errors import Fault, UserError
from vlqc.formatting import did_you_mean
from vlqc.targets.engine import Engine, join_and
from vlqc.targets.mindie import MINDIE
from vlqc.targets.vllm_ascend import VLLM_ASCEND

ENGINES: tuple[Engine, ...] = (VLLM_ASCEND, MINDIE)  # those that run more schemes first
BOTH = "both"  # stands for ENGINES
NAMES = {engine.name: (engine,) for engine in ENGINES} | {BOTH: ENGINES}


@dataclass(frozen=True)
class Target:
    """The engines that must load the result, in the layout of the first.

    version: of a single engine; None stands for any known version.
    """

    engines: tuple[Engine, ...]
    version: str | None = None

    def __str__(self) -> str:
        names = (name for name, engines in NAMES.items() if engines == self.engines)
        name = next(names, None) or " and ".join(engine.name for engine in self.engines)
        return f"{name}@{self.version}" if self.version else name

    @cached_property
    def parsed_version(self) -> Version | None:
        """The version in a form that can be compared."""
        return Version(self.version) if self.version else None

    @property
    def text(self) -> str:
        """Its engines in a sentence, such as "vLLM Ascend and MindIE" or "MindIE 2.2"."""
        return join_and(self.title(engine) for engine in self.engines)

    def title(self, engine: Engine) -> str:
        """An engine's name as its users write it, with the version if the target has one."""
        return f"{engine.title} {self.version}" if self.version else engine.title

    def only(self, engine: Engine) -> "Target":
        """The target with one of its engines only."""
        return Target((engine,), self.version)


def find_layout(files: Iterable[str]) -> tuple[Engine, str] | None:
    """Names of all files of a folder -> the engine in whose layout it is and the name of the description, or None."""
    files = tuple(files)
    found = ((engine, engine.find_description(files)) for engine in ENGINES)
    return next(((engine, name) for engine, name in found if name is not None), None)


def written_for(layout: Engine, config: Mapping[str, Any], stated: Collection[Engine] = ()) -> Target:
    """The engines for which a finished folder was written, by its layout and config.json, and those that it states."""
    named = (engine for engine in ENGINES if engine is layout or engine in stated or engine.is_named_in(config))
    return Target(tuple(named))


def engine_of_option(options: Any) -> Engine | None:
    """The engine whose layout an option besides `--target` selects."""
    return next((each for each in ENGINES if each.layout_option and getattr(options, each.layout_option)), None)


def parse_target(text: str, where: str = "--target") -> Target:
    """ "vllm-ascend", "mindie@2.2", "both" -> the target. UserError, which names `where`, for anything else."""
    name, at, version = text.strip().partition("@")
    name, version = name.strip().lower(), version.strip()
    if name not in NAMES:
        raise UserError(Fault(f"unknown engine {name!r}", where, fix=_suggestion(name)))
    engines = NAMES[name]
    if at and len(engines) > 1:
        why = "each engine has its own versions"
        raise UserError(Fault(f"{where} {text}", where, why, f"pass {name} without a version, or one engine"))
    if at and not is_version(version):
        why = f"{version!r} is not a version of {engines[0].title}"
        fix = f"pass a version such as {engines[0].example_versions} after the @"
        raise UserError(Fault(f"{where} {text}", where, why, fix))
    return Target(engines, version or None)


TargetLike = str | Target | Engine


def as_target(target: TargetLike) -> Target:
    """A target, its text, or one engine in any version -> the target. UserError for a text that is none."""
    if isinstance(target, Engine):
        return Target((target,))
    return target if isinstance(target, Target) else parse_target(target)


def is_version(text: str) -> bool:
    """Whether a text is a version, such as "0.18", "v0.10.2rc2" or "2.2.RC1"."""
    try:
        Version(text)
    except InvalidVersion:
        return False
    return True


def _suggestion(name: str) -> str:
    """What an unknown engine name may have meant: an engine followed by a version, or a similar name."""
    prefix = next((known for known in NAMES if name.replace("_", "-").startswith(known)), "")
    version = name[len(prefix) :].lstrip("-_=: v") if prefix else ""
    if prefix and prefix != BOTH and is_version(version):
        return f"did you mean {prefix}@{version}?"
    return did_you_mean(prefix or name, NAMES) or f"choose from {', '.join(NAMES)}"
