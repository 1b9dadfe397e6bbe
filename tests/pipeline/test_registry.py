"""The table of passes: its names, and that it imports nothing until a pass is used."""

import dataclasses
import typing
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Literal

import pytest

from vlqc.ir.stage import Stage
from vlqc.pipeline.pass_api import Pass
from vlqc.pipeline.registry import REGISTRY, load_pass


@dataclass(frozen=True)
class Nothing(Pass):
    """Does nothing."""

    name: ClassVar[str] = "thing"
    kind: ClassVar[Literal["analysis", "rewrite"]] = "analysis"
    summary: ClassVar[str] = "only for tests"

    def run(self, stage: Stage) -> bool:
        return False


def test_names_in_the_table_are_those_of_the_classes() -> None:
    """Catches a key that differs from the class's name: its printed pipeline would not parse."""
    for name in REGISTRY:
        kind = load_pass(name)
        assert kind.name == name and kind.kind in ("analysis", "rewrite") and kind.summary
        assert dataclasses.is_dataclass(kind)
        assert typing.cast(Any, kind).__dataclass_params__.frozen


def test_the_table_imports_nothing_until_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a table that imports every registered package when vlqc starts."""
    imported: list[str] = []

    def record(name: str) -> ModuleType:
        imported.append(name)
        module = ModuleType(name)
        module.__dict__["Thing"] = Nothing
        return module

    monkeypatch.setitem(REGISTRY, "thing", "not_installed.anywhere:Thing")
    monkeypatch.setattr("vlqc.import_paths.importlib.import_module", record)
    assert imported == [] and load_pass("thing") is Nothing and imported == ["not_installed.anywhere"]
