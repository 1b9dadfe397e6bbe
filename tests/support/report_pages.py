"""Pages of made-up reports, and a page taken apart."""

import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tests.support import synthetic_report as made_up_report
from vlqc.reporting.html import report_text
from vlqc.reporting.html.schema import Facts
from vlqc.verify.findings import RANKING

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
        "in the table": "share: of it",
    },
    "advice": [
        {"check": "locate", "where": "x", "what": "down_proj is loud", "why": "outliers", "fix": "--exclude 'it'"}
    ],
}


class Page(HTMLParser):
    """A page taken apart: every element with its attributes, every text, and what is not well formed."""

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


def page_of(folder: Path, facts: Facts, **given: Any) -> str:
    """Of a made-up folder, with timings and a verification unless they are named otherwise."""
    made_up_report.folder(folder, facts)
    timings, verification = folder.parent / "timings.json", folder.parent / "verify.json"
    made_up_report.timings(facts).write(timings)
    verification.write_text(json.dumps(VERIFIED), encoding="utf-8")
    return report_text(folder, **({"timings": timings, "verification": verification} | given))
