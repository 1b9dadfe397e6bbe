"""vlqc.reporting.html: one page that loads nothing and escapes every string.

Its layout is checked in a browser: tools/browse_report.py.
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

from tests.support import synthetic_report
from tests.support.report_pages import VERIFIED, Page, page_of
from vlqc.reporting.html import report_text
from vlqc.reporting.html.schema import CandidateData, GroupData, ReportData, RotationData
from vlqc.verify.findings import LEGEND, RANKING

ROOT = Path(__file__).parents[3]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=\"alert('2')\">&{{ 7*7 }}\u2028"


@pytest.fixture(scope="module")
def data() -> ReportData:
    return synthetic_report.report_data(layers=12, blocks=4)


@pytest.fixture(scope="module")
def text(data: ReportData, tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(tmp_path_factory.mktemp("page") / "Some-Model-W8A8", data)


def test_the_page_is_well_formed(text: str) -> None:
    """Catches elements that are not closed or nested wrongly, and an id that exists twice."""
    page = Page(text)
    assert page.faults == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"] for attributes in page.all("a")}
    assert {f"#{one}" for one in ids} >= links and len(links) > 16


def test_the_page_names_rotations(tmp_path: Path) -> None:
    """Catches a page that shows a rotated folder like one that is not rotated."""
    names = tuple(f"model.layers.{layer}.self_attn.v_proj" for layer in range(12))
    rotation = RotationData(kind="attention heads", seed=0, size=16, names=names)
    rotated = page_of(tmp_path / "rotated", synthetic_report.report_data(layers=12, blocks=4, rotations=(rotation,)))
    assert "attention heads of 12 layers" in rotated


@pytest.mark.parametrize("measured", [True, False])
def test_the_page_shows_videos(measured: bool, data: ReportData, text: str, tmp_path: Path) -> None:
    """Catches tokens of videos without a row of their own, a legend without the lines of videos that are drawn, and a
    column for videos where there are none."""
    stages = []
    for stage in data.stages:
        inputs = tuple(
            each.model_copy(
                update={
                    side: getattr(each, side) | {"video": getattr(each, side)["image"]} for side in ("before", "after")
                }
            )
            for each in stage.inputs
        )
        sqnr = stage.sqnr | {"video": 12.5} if measured else stage.sqnr
        more = {"rows": stage.rows | {"video": 777}, "sqnr": sqnr, "inputs": inputs}
        stages.append(stage.model_copy(update=more))
    page_text = page_of(tmp_path / "videos", data.model_copy(update={"stages": tuple(stages)}))
    page = Page(page_text)
    assert page.faults == [] and "777 video tokens" in page.text and ("SQNR, video tokens" in page.text) == measured
    assert ("12.5 dB, video tokens" in page.text) == measured
    assert "</svg> video tokens" in page_text
    assert any("line before video" in one.get("class", "") for one in page.all("path"))
    assert "video" not in Page(text).text


def test_the_page_loads_nothing(text: str) -> None:
    """Catches a font, script, image or style from a URL, and a content security policy without the script's digest."""
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
    """Catches a string that is not escaped: names and notes come from checkpoints and file names."""
    plain = synthetic_report.report_data(layers=2, blocks=1)
    content = json.loads(plain.model_dump_json())
    content |= {"notes": [HOSTILE, f"{HOSTILE}\n{HOSTILE}"], "command": ["vlqc", HOSTILE], "pipeline": HOSTILE}
    content |= {"heads": [HOSTILE], "version": HOSTILE, "target": "both"}
    for stage in content["stages"]:
        renamed = stage["name"] + HOSTILE
        for site in stage["sites"]:
            site |= {"name": site["name"].replace(stage["name"], renamed), "reason": HOSTILE}
        for read in stage["inputs"]:
            read["sites"] = [name.replace(stage["name"], renamed) for name in read["sites"]]
        stage |= {"name": renamed, "part": HOSTILE}
    verified = json.loads(json.dumps(VERIFIED)) | {"engine": HOSTILE}
    verified["facts"][LEGEND] = HOSTILE
    verified["facts"][RANKING][0]["group"] = HOSTILE
    verified["facts"]["logits against float"][HOSTILE] = HOSTILE
    verified["advice"][0] |= {"what": HOSTILE, "why": HOSTILE, "fix": HOSTILE}
    hostile = ReportData.model_validate_json(json.dumps(content))
    folder = synthetic_report.write_folder(tmp_path / '"><b onclick=alert(1)>', hostile)
    (folder / "config.json").write_text(json.dumps({"architectures": [HOSTILE], "num_hidden_layers": 2}))
    (tmp_path / "verify.json").write_text(json.dumps(verified))
    timings = synthetic_report.timings(hostile)
    timings.model_copy(update={"system": HOSTILE, "versions": {HOSTILE: HOSTILE}}).write(tmp_path / "timings.json")
    text = report_text(folder, timings=tmp_path / "timings.json", verification=tmp_path / "verify.json")
    page = Page(text)
    assert page.faults == []
    tags = Counter(tag for tag, _ in page.elements)
    assert (tags["script"], tags["img"], tags["b"]) == (1, 0, 0)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "alert" not in page.scripts[0] and page.text.count("<script>alert(1)</script>") > 20
    assert "{{ 7*7 }}" in page.text and "&49" not in page.text


@pytest.mark.slow
def test_the_page_is_deterministic(data: ReportData, text: str, tmp_path: Path) -> None:
    """Catches dates, paths and hash order in the page, which another process writes in another folder."""
    page_of(tmp_path / "Some-Model-W8A8", data)
    code = (
        "from pathlib import Path; import sys; from vlqc.reporting.html import write_report; "
        "at = Path(sys.argv[1]); "
        "given = "
        "{'timings': at / 'timings.json', 'verification': at / 'verify.json'}; "
        "write_report(at / 'Some-Model-W8A8', at / 'x.html', **given)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
    assert (tmp_path / "x.html").read_text(encoding="utf-8") == text
    assert str(tmp_path) not in text


def test_the_page_contains_all_data(data: ReportData, text: str) -> None:
    """Catches a site, scheme, count, note or option that is not on the page."""
    page = Page(text)
    cells = {one["title"]: one["class"] for one in page.all("td") if "scheme" in one.get("class", "")}
    sites = [site for stage in data.stages for site in stage.sites]
    cells_by_site = {title.partition(":")[0]: (title, css) for title, css in cells.items()}
    assert set(cells_by_site) == {site.name for site in sites}
    for site in sites:
        title, css = cells_by_site[site.name]
        assert css == f"scheme {site.scheme.lower()}" and site.reason in title
    quantized = sum(site.scheme != "FLOAT" for site in sites)
    for expected in (
        f"{quantized} of {len(sites) + 1} quantized",
        "Warning: no engine loads it why: a reason what to do: wait",
        "skipped IMAGES/a.jpg: truncated",
        "Some-Model-W8A8",
        "Qwen2.5-VL · language: 80 layers of 8192 · vision: 32 layers of 1280",
        "--exclude 'visual.blocks.3.*'",
        "insert-observers{tokens=4096}, assign-precision{scheme=W4A8_DYNAMIC}, lower-linears",
        "9,000 text tokens",
        "down_proj has outliers",
        "model.layers.13.mlp.down_proj",
        "33.25",
        "Linux aarch64, 192 processors",
    ):
        assert expected in page.text, expected
    worst = min((value, stage.name) for stage in data.stages for value in stage.sqnr.values())
    assert f"{worst[0]:.1f} dB" in page.text and worst[1] in page.text


def test_the_page_is_accessible(text: str) -> None:
    """Catches a table without caption or headers, and a drawing without a description."""
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


def test_the_ranking_on_a_narrow_screen(text: str) -> None:
    """Catches a share of the error that is not in the second column, so that narrow screens do not show it."""
    head = text[text.index('<table class="ranking">') :]
    assert re.findall(r"<th[^>]*>([^<]*)</th>", head)[:3] == ["group", "share %", "scheme"]
    assert re.findall(r"<td[^>]*>([^<]*)</td>", head)[:2] == ["50", "W8A8"]


def test_without_timings_or_verification(data: ReportData, tmp_path: Path) -> None:
    """Catches a page that requires optional files, or does not name the options that add them."""
    page = Page(page_of(tmp_path / "out", data, timings=None, verification=None))
    assert page.faults == []
    assert "--timings FILE" in page.text and "--locate --json_file verify.json" in page.text


def test_a_precision_search_is_shown(data: ReportData, tmp_path: Path) -> None:
    """Catches a page without the prediction of the search or the candidates of a group, or with the wrong one marked as
    chosen."""
    offered = (("W8A8", 30.0, 4096), ("W8A16", 42.5, 2048), ("FLOAT", 3.4e38, 8192))
    group = GroupData(
        sites=("model.layers.0.self_attn.o_proj",),
        part="language",
        assigned="W8A8",
        scheme="W8A16",
        noise_share=0.25,
        candidates=tuple(CandidateData(scheme=name, sqnr=sqnr, bytes=size) for name, sqnr, size in offered),
    )
    page = Page(page_of(tmp_path / "out", data.model_copy(update={"predicted": 31.25, "groups": (group,)})))
    assert page.faults == [] and "31.2 dB" in page.text
    for text in ("30.0 dB, 4.0 KiB", "✓ 42.5 dB, 2.0 KiB", "no noise, 8.0 KiB", "25.0%"):
        assert text in page.text
    assert "✓ 30.0 dB" not in page.text and "✓ no noise" not in page.text


def test_stages_without_data(tmp_path: Path) -> None:
    """Catches charts that fail without observations, quantized layers or stages, or with constant channels."""
    data = synthetic_report.report_data(layers=1, blocks=0)
    dead = {"text": (0.0,) * 20}
    bare = data.stages[0].model_copy(update={"inputs": (), "sqnr": {}})
    read = data.stages[1].inputs[0].model_copy(update={"before": dead, "after": dead})
    silent = data.stages[1].model_copy(update={"inputs": (read,)})
    for number, stages in enumerate(((bare,), (silent,), (bare, silent), ())):
        changed = data.model_copy(update={"stages": stages, "notes": ()})
        page = Page(page_of(tmp_path / str(number) / "out", changed))
        assert page.faults == [] and not re.search(r"\bnan\b|\binf\b|None", page.text)


def test_a_large_model_stays_light(tmp_path: Path) -> None:
    """Catches a page of more than 3 MB for 80 decoder layers and 32 vision blocks."""
    text = page_of(tmp_path / "72B", synthetic_report.report_data())
    assert len(text.encode()) < 3_000_000
    assert text.count('<details class="stage">') == 113


def test_nothing_is_escaped_twice(text: str) -> None:
    """Catches entities that are escaped twice."""
    assert "&amp;amp;" not in text and "&amp;lt;" not in text
    assert html.unescape("&#39;") in Page(text).text
