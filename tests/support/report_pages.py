"""Pages of synthetic report data, and an HTML parser that checks a page."""

import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tests.support import synthetic_report
from vlqc.reporting.html import report_text
from vlqc.reporting.html.schema import ReportData
from vlqc.verify.findings import LEGEND, RANKING

VOID = {"meta", "br", "link", "img", "input", "hr"}
ROWS = [
    {
        "group": f"model.layers.{n}.mlp.down_proj",
        "scheme": "W8A8",
        "alone dB": 40.5 + n,
        "share %": 50.0 - n,
        "text dB": "-",
    }
    for n in range(14)
]
VERIFIED: dict[str, Any] = {
    "ok": True,
    "engine": "vllm-ascend",
    "facts": {
        RANKING: ROWS,
        "logits against float": {"SQNR dB": 33.25, "top-1 %": 98.0},
        LEGEND: "share: of it",
    },
    "advice": [
        {"check": "locate", "where": "x", "what": "down_proj has outliers", "why": "outliers", "fix": "--exclude 'it'"}
    ],
}


class Page(HTMLParser):
    """A parsed page: all elements with their attributes, all texts, and faults of its structure."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.open: list[str] = []
        self.faults: list[str] = []
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        self.faults += [f"<{tag}> has {name} twice" for name, count in Counter(names).items() if count > 1]
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.faults.append(f"</{tag}> closes {self.open[-1:]}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        where = {"script": self.scripts, "style": self.styles}.get(self.open[-1] if self.open else "", self.texts)
        where.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page_of(folder: Path, data: ReportData, **overrides: Any) -> str:
    """The page of a synthetic folder. overrides: of the timings and the verification; None omits them."""
    synthetic_report.write_folder(folder, data)
    timings, verification = folder.parent / "timings.json", folder.parent / "verify.json"
    synthetic_report.timings(data).write(timings)
    verification.write_text(json.dumps(VERIFIED), encoding="utf-8")
    return report_text(folder, **({"timings": timings, "verification": verification} | overrides))
