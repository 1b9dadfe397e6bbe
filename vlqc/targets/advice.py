"""Notes for the user about engines: which versions do not load a result, their limits, and how to serve it."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from vlqc.families.family import EXPERT_ROLES, ModelFamily
from vlqc.families.linear import Linear
from vlqc.families.registry import GUIDE
from vlqc.import_paths import import_path
from vlqc.targets.cache_schemes import CacheScheme
from vlqc.targets.engine import Engine
from vlqc.targets.precision import choose_scheme
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import ENGINES, Target, TargetLike, as_target
from vlqc.targets.versions import VersionRange, supporting_versions


def incompatibilities(
    target: TargetLike,
    family: ModelFamily,
    scheme: Scheme,
    dtype: str = "bfloat16",
    scope: str = "engine",
    cache: CacheScheme | None = None,
    float_as: Scheme = Scheme.FLOAT,
) -> list[str]:
    """One sentence per engine of the target that does not load a compilation in `scheme`; [] when all do.

    scope: "engine" gives layers that the target does not run in `scheme` another one, "all" gives them `scheme`, too.
    cache: scheme of keys and values in all decoder layers; None: in float. float_as: as of `choose_scheme`.
    """
    target = as_target(target)
    dtype = _emitted(dtype)
    sentences = []
    for engine in target.engines:
        schemes = default_schemes(target, family, scheme, scope, float_as)
        versions = supporting_versions(engine, family, schemes, dtype)
        with_cache = _with_cache(engine, family, schemes, dtype, cache)
        if versions is None:
            where = engine.unsupported_where(family, scheme) if engine.rules_of(family) else f" of {family.title}"
            if supporting_versions(
                engine, family, default_schemes(target, family, scheme, scope, float_as), "bfloat16"
            ):
                where = f" of a {dtype} model (bfloat16 only)"
            elif supporting_versions(
                engine, family, default_schemes(target, family, scheme, "engine", float_as), dtype
            ):
                where = " on layers with a bias or in the vision tower"
            sentences.append(f"no version of {engine.title} loads {scheme}{where}")
        elif target.version and target.version not in versions:
            sentences.append(f"{target.title(engine)} does not load {scheme}; {versions} do")
        elif cache is not None and with_cache is None:
            where = " with these schemes" if engine.cache_rules_of(family) else f" of {family.title}"
            if _with_cache(engine, family, schemes, "bfloat16", cache):
                where = f" of a {dtype} model (bfloat16 only)"
            sentences.append(f"no version of {engine.title} loads an {cache.spec.option} KV cache{where}")
        elif cache is not None and target.version and with_cache is not None and target.version not in with_cache:
            sentences.append(f"{target.title(engine)} does not load an {cache.spec.option} KV cache; {with_cache} do")
    return sentences


def _with_cache(
    engine: Engine,
    family: ModelFamily,
    schemes: Mapping[str, Scheme],
    dtype: str,
    cache: CacheScheme | None,
    *,
    every_layer: bool = True,
) -> VersionRange | None:
    """The versions that load these schemes, with the cache of every decoder layer in `cache`, or of some."""
    caches = {"some": cache} if every_layer else {"some": cache, "others": None}
    return supporting_versions(engine, family, schemes, dtype, caches)


def engine_notes(
    target: TargetLike,
    family: ModelFamily,
    scheme: Scheme,
    dtype: str = "bfloat16",
    group_size: int | None = None,
    scope: str = "engine",
    cache: CacheScheme | None = None,
    float_as: Scheme = Scheme.FLOAT,
    *,
    every_layer: bool = True,
) -> list[str]:
    """Notes for the user before compiling: `incompatibilities`, limits to some versions, slow group sizes, and what an
    engine requires for the cache.

    every_layer: False if `cache` is the scheme of some layers only, and others have keys and values in float.
    """
    target = as_target(target)
    notes = incompatibilities(target, family, scheme, dtype, scope, cache, float_as)
    what = f"{scheme} and {float_as}" if float_as.is_quantized and float_as != scheme else str(scheme)
    what += "" if cache is None else f" with an {cache.spec.option} KV cache"
    what += "" if cache is None or every_layer else " in some layers"
    for engine in target.engines:
        schemes = default_schemes(target, family, scheme, scope, float_as)
        versions = _with_cache(engine, family, schemes, _emitted(dtype), cache, every_layer=every_layer)
        if not versions or target.version:
            continue
        if len(versions.ranges) > 1:
            continue  # "loads in" of the plan and the result says the same
        if not versions.is_open:
            notes.append(f"{versions} load {what}, other versions do not")
        elif versions.since != engine.first_version(family):
            notes.append(f"{versions} load {what}, earlier versions do not")
    notes += [note for engine in target.engines for note in engine.scheme_notes(family, scheme, group_size)]
    if cache is None:
        return notes
    running = [engine for engine in target.engines if engine.cache_rules_of(family)]
    return notes + [note for engine in running for note in engine.cache_notes(family, cache)]


def grouped_layers(family: ModelFamily, layers: Mapping[str, tuple[Scheme, Sequence[int]]]) -> list[Linear]:
    """Layer -> scheme and (outputs, inputs) -> those whose weights have groups, apart from experts."""
    return [
        Linear(shape[0], shape[1], family.is_row_parallel(name))
        for name, (scheme, shape) in layers.items()
        if scheme.spec.weight.per_group and family.role(name) not in EXPERT_ROLES
    ]


def parallel_notes(target: TargetLike, grouped: Sequence[Linear], group_size: int | None) -> list[str]:
    """How many devices may share linear layers whose weights have groups; [] without such layers."""
    if not grouped or not group_size:
        return []
    notes = []
    for engine in as_target(target).engines:
        sizes = engine.parallel_sizes(grouped, group_size)
        *first, last = map(str, sizes or ("no number of",))
        devices = f"{', '.join(first)} or {last}" if first else last
        plural = "device" if sizes == (1,) else "devices"
        notes.append(f"groups of {group_size} allow tensor parallelism on {devices} {plural} in {engine.title}")
    return notes


def missing_rows_fix(family: ModelFamily) -> str:
    """What to do about a family for which no engine has rules; empty for other families."""
    if any(engine.rules_of(family) for engine in ENGINES):
        return ""
    return f"set `engine_rows` of {import_path(type(family))}, or add rules for {family.name}, see {GUIDE}"


def serve_commands(target: TargetLike, folder: str | Path, loading: Collection[Engine] = ENGINES) -> list[str]:
    """One line per engine of the target: the command or setting with which it serves `folder`.

    loading: engines of which a version loads the folder.
    """
    return [engine.serve_command(str(folder)) for engine in as_target(target).engines if engine in loading]


def default_schemes(
    target: Target, family: ModelFamily, scheme: Scheme, scope: str, float_as: Scheme = Scheme.FLOAT
) -> dict[str, Scheme]:
    """Layer pattern -> the scheme that a compilation in `scheme` gives these layers by default."""
    schemes: dict[str, Scheme] = {}
    fallback = "reference" if scheme.spec.activation.is_quantized else "none"
    for group in family.scheme_groups(family.layers()):
        layers = dict.fromkeys(group)
        decision = choose_scheme(
            layers, family=family, scheme=scheme, target=target, scope=scope, fallback=fallback, float_as=float_as
        )
        schemes |= dict.fromkeys(group, decision.scheme)
    return schemes


def _emitted(dtype: str) -> str:
    """The dtype of the float tensors of the result: float32 is emitted as bfloat16."""
    return "float16" if dtype == "float16" else "bfloat16"
