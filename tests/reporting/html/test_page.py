"""vlqc.reporting.html: one page that holds everything, loads nothing, and lets nobody write HTML into it.

How it looks is for eyes: tools/browse_report.py opens it in a real browser, which pip cannot install.
"""

import base64
import hashlib
import html
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support import synthetic_report as made_up_report
from tests.support.report_pages import VERIFIED, Page, page_of
from vlqc.reporting.html import report_text
from vlqc.reporting.html.schema import Facts
from vlqc.verify.findings import RANKING

ROOT = Path(__file__).parents[3]
NASTY = "</script><script>alert(1)</script><img src=x onerror=\"alert('2')\">&{{ 7*7 }}\u2028"


@pytest.fixture(scope="module")
def facts() -> Facts:
    return made_up_report.facts(layers=12, blocks=4)


@pytest.fixture(scope="module")
def text(facts: Facts, tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(tmp_path_factory.mktemp("page") / "Some-Model-W8A8", facts)


def test_it_is_well_formed(text: str) -> None:
    """Catches elements that are not closed or nested wrongly, and an id that exists twice."""
    page = Page(text)
    assert page.faults == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"] for attributes in page.all("a")}
    assert {f"#{one}" for one in ids} >= links and len(links) > 16


def test_it_loads_nothing(text: str) -> None:
    """Catches a font, a script, a picture or a style from elsewhere, and a policy that does not fit the script."""
    page = Page(text)
    assert not [one for one in page.elements if one[0] in ("link", "img", "iframe", "object", "embed", "base", "form")]
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "action", "xlink:href", "poster"), tag
            assert name != "href" or value.startswith("#")
            assert not re.search(r"https?:|//|url\(|javascript:", value) or name == "title", (tag, name, value)
    (script,), (style,) = page.scripts, page.styles
    assert not re.search(r"url\(|@import|https?:", style)
    assert not re.search(r"fetch|XMLHttpRequest|import\(|https?:|innerHTML|eval", script)
    (policy,) = (one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}'" in policy


def test_names_and_notes_cannot_become_html(tmp_path: Path) -> None:
    """Catches a string that is put into the page as it is: names and notes come from checkpoints and file names."""
    plain = made_up_report.facts(layers=2, blocks=1)
    content = json.loads(plain.model_dump_json())
    content |= {"notes": [NASTY, f"{NASTY}\n{NASTY}"], "command": ["vlqc", NASTY], "pipeline": NASTY, "heads": [NASTY]}
    content |= {"version": NASTY, "target": "both"}
    for stage in content["stages"]:
        renamed = stage["name"] + NASTY
        for site in stage["sites"]:
            site |= {"name": site["name"].replace(stage["name"], renamed), "reason": NASTY}
        for read in stage["inputs"]:
            read["sites"] = [name.replace(stage["name"], renamed) for name in read["sites"]]
        stage |= {"name": renamed, "part": NASTY}
    verified = json.loads(json.dumps(VERIFIED).replace("down_proj is loud", "NASTY").replace("share: of it", "NASTY"))
    verified |= {"engine": NASTY}
    verified["facts"][RANKING][0]["group"] = NASTY
    verified["facts"]["logits against float"][NASTY] = NASTY
    verified["advice"][0] |= {"what": NASTY, "why": NASTY, "fix": NASTY}
    nasty = Facts.model_validate_json(json.dumps(content))
    folder = made_up_report.folder(tmp_path / '"><b onclick=alert(1)>', nasty)
    (folder / "config.json").write_text(json.dumps({"architectures": [NASTY], "num_hidden_layers": 2}))
    (tmp_path / "verify.json").write_text(json.dumps(verified))
    timings = made_up_report.timings(nasty)
    timings.model_copy(update={"system": NASTY, "versions": {NASTY: NASTY}}).write(tmp_path / "timings.json")
    made = report_text(folder, timings=tmp_path / "timings.json", verification=tmp_path / "verify.json")
    page = Page(made)
    assert page.faults == []
    tags = Counter(tag for tag, _ in page.elements)
    assert (tags["script"], tags["img"], tags["b"]) == (1, 0, 0)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "alert" not in page.scripts[0] and page.text.count("<script>alert(1)</script>") > 20
    assert "{{ 7*7 }}" in page.text and "&49" not in page.text


def test_the_same_page_again(facts: Facts, text: str, tmp_path: Path) -> None:
    """Catches dates, paths and hash order in the page: made by another process, in another place."""
    page_of(tmp_path / "Some-Model-W8A8", facts)
    code = (
        "from pathlib import Path; import sys; from vlqc.reporting.html import write_report; at = Path(sys.argv[1]); "
        "given = "
        "{'timings': at / 'timings.json', 'verification': at / 'verify.json'}; "
        "write_report(at / 'Some-Model-W8A8', at / 'x.html', **given)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
    assert (tmp_path / "x.html").read_text(encoding="utf-8") == text
    assert str(tmp_path) not in text


def test_it_tells_the_facts(facts: Facts, text: str) -> None:
    """Catches a site, a scheme, a count, a note or an option that the page keeps to itself."""
    page = Page(text)
    cells = {one["title"]: one["class"] for one in page.all("td") if "scheme" in one.get("class", "")}
    kinds = {"W8A8": "static", "W8A8_DYNAMIC": "dynamic", "W4A8_DYNAMIC": "four", "FLOAT": "float"}
    sites = [site for stage in facts.stages for site in stage.sites]
    told = {title.partition(":")[0]: (title, css) for title, css in cells.items()}
    assert set(told) == {site.name for site in sites}
    for site in sites:
        title, css = told[site.name]
        assert css == f"scheme {kinds[site.scheme]}" and site.reason in title
    quantized = sum(site.scheme != "FLOAT" for site in sites)
    for expected in (
        f"{quantized} of {len(sites) + 1} quantized",
        "Warning: no target loads it why: a reason what to do: wait",
        "skipped PICTURES/a.jpg: truncated",
        "Some-Model-W8A8",
        "Qwen2.5-VL · language: 80 layers of 8192 · vision: 32 layers of 1280",
        "--exclude 'visual.blocks.3.*'",
        "insert-observers{tokens=4096}, assign-precision{scheme=W4A8_DYNAMIC}, lower-linears",
        "9,000 text tokens",
        "down_proj is loud",
        "model.layers.13.mlp.down_proj",
        "33.25",
        "Linux aarch64, 192 processors",
    ):
        assert expected in page.text, expected
    worst = min((value, stage.name) for stage in facts.stages for value in stage.sqnr.values())
    assert f"{worst[0]:.1f} dB" in page.text and worst[1] in page.text


def test_it_can_be_used_without_eyes_or_a_mouse(text: str) -> None:
    """Catches a table without a caption or headers, a drawing without words, a scrolling box no key reaches."""
    page = Page(text)
    tags = Counter(tag for tag, _ in page.elements)
    assert tags["table"] == tags["caption"] == tags["thead"] == tags["tbody"]
    assert all(one.get("scope") in ("row", "col") for one in page.all("th"))
    drawings = page.all("svg")
    assert len(drawings) > 60
    assert all("aria-hidden" in one or (one.get("role") == "img" and one["aria-label"]) for one in drawings)
    assert (tags["h1"], tags["main"], tags["nav"]) == (1, 1, 1)
    assert all(one["aria-labelledby"].startswith(one["id"]) for one in page.all("section"))
    assert page.all("html")[0]["lang"] == "en" and page.all("meta")[1]["content"].startswith("width=device-width")


def test_the_ranking_fits_a_phone(text: str) -> None:
    """Catches the share, by which groups are ranked, far to the right, where a narrow screen does not show it."""
    head = text[text.index('<table class="located">') :]
    assert re.findall(r"<th[^>]*>([^<]*)</th>", head)[:3] == ["group", "share %", "scheme"]
    assert re.findall(r"<td[^>]*>([^<]*)</td>", head)[:2] == ["50", "W8A8"]


def test_without_timings_or_verification(facts: Facts, tmp_path: Path) -> None:
    """Catches a page that needs what is optional, or does not say how to have it."""
    page = Page(page_of(tmp_path / "out", facts, timings=None, verification=None))
    assert page.faults == []
    assert "--timings FILE" in page.text and "--locate --json_file verify.json" in page.text


def test_a_search_is_told(facts: Facts, tmp_path: Path) -> None:
    """Catches measured figures that are taken for those of what the search chose, and its prediction left out."""
    page = Page(page_of(tmp_path / "out", facts.model_copy(update={"predicted": 31.25})))
    assert "as the precision search predicts them: 31.2 dB" in page.text
    assert "before the precision search moved groups" in page.text


def test_a_stage_that_is_bare(tmp_path: Path) -> None:
    """Catches charts that need a value: nothing observed, nothing quantized, a single layer, all channels dead."""
    facts = made_up_report.facts(layers=1, blocks=0)
    dead = {"text": (0.0,) * 20}
    bare = facts.stages[0].model_copy(update={"inputs": (), "sqnr": {}})
    read = facts.stages[1].inputs[0].model_copy(update={"before": dead, "after": dead})
    silent = facts.stages[1].model_copy(update={"inputs": (read,)})
    for number, stages in enumerate(((bare,), (silent,), (bare, silent), ())):
        told = facts.model_copy(update={"stages": stages, "notes": ()})
        page = Page(page_of(tmp_path / str(number) / "out", told))
        assert page.faults == [] and not re.search(r"\bnan\b|\binf\b|None", page.text)


def test_a_large_model_stays_light(tmp_path: Path) -> None:
    """Catches a page that no phone opens: 80 layers and 32 blocks in less than 3 MB."""
    made = page_of(tmp_path / "72B", made_up_report.facts())
    assert len(made.encode()) < 3_000_000
    assert made.count('<details class="stage">') == 113


def test_the_page_says_it_in_the_clear(text: str) -> None:
    """Catches entities that are escaped twice."""
    assert "&amp;amp;" not in text and "&amp;lt;" not in text
    assert html.unescape("&#39;") in Page(text).text
