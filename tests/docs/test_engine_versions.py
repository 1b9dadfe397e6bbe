"""The versions in vlqc/docs/formats.md against the engines' tables."""

import re
from pathlib import Path

import vlqc
from vlqc.families.registry import FAMILIES
from vlqc.targets.advice import default_schemes
from vlqc.targets.cache_schemes import CacheScheme
from vlqc.targets.rules import group_faults
from vlqc.targets.schemes import Scheme
from vlqc.targets.target import ENGINES, as_target
from vlqc.targets.versions import supporting_versions
from vlqc.targets.vllm_ascend import VLLM_ASCEND

PAGE = (Path(vlqc.__file__).parent / "docs" / "formats.md").read_text(encoding="utf-8")


def test_versions_of_every_family_and_scheme() -> None:
    """Catches a row of the page that promises versions which an engine's table does not have, and a missing family."""
    table = re.findall(r"^\| (.+?) \| ([A-Z0-9_]+) \| (.+?) \| (.+?) \|$", PAGE.partition("What engines load")[2], re.M)
    expected = []
    for family in FAMILIES:
        for scheme in (each for each in Scheme if each.is_quantized):
            cells = []
            for engine in ENGINES:
                schemes = default_schemes(as_target(engine), family, scheme, "engine")
                versions = supporting_versions(engine, family, schemes, "bfloat16")
                loads = versions is not None and not group_faults(engine, family, schemes)
                cells.append(str(versions).removeprefix(f"{engine.title} ") if loads else "-")
            expected.append((family.title, str(scheme), *cells))
    assert table == expected


def test_versions_of_quantized_caches() -> None:
    """Catches a row of the page that promises versions which the engine's table does not have, and a missing family."""
    page = PAGE.partition("A quantized KV cache")[2]
    table = re.findall(r"^  \| (.+?) \| (\d.+?) \| (\d.+?) \|$", page, re.MULTILINE)
    expected = []
    for family in FAMILIES:
        cells = []
        for caches in ({"a": CacheScheme.C8}, {"a": CacheScheme.C8, "b": None}):
            versions = supporting_versions(VLLM_ASCEND, family, {}, "bfloat16", caches)
            cells.append(str(versions).removeprefix(f"{VLLM_ASCEND.title} "))
        expected.append((family.title, *cells))
    assert table == expected
