#!/usr/bin/env python3
"""Looks at a report page as readers do: in headless Chromium, narrow and wide, light and dark, by keyboard and by tap.

    python tools/browse_report.py PAGE.html FOLDER [--chromium chromium]

Writes a screenshot of every combination into FOLDER and ends with 1 if anything is wrong: an error in the console, a
request to anywhere, a page wider than the window, a script that is refused, a key that does nothing. It needs a
Chromium, which pip cannot install, so it is no part of the test suite.
"""

import argparse
import base64
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTHS = {"phone": 360, "desk": 1280}
SCHEMES = ("light", "dark")
CELL = "document.activeElement.matches('.map td')"


class Browser:
    """Chromium over its debugging pipe: messages are JSON, each ended by a zero byte."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._write, self._read = os.fdopen(to_browser, "wb"), os.fdopen(from_browser, "rb")
        self._numbers, self._session = itertools.count(1), ""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        """Sends one command and waits for its answer; events that come meanwhile are kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": given}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, page: Path, fragment: str = "", *, scripts: bool = True) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call("Page.navigate", url=page.resolve().as_uri() + fragment)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self._next()

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression in the page."""
        given = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        return self.call("Runtime.evaluate", **given)["result"].get("value")

    def press(self, key: str) -> None:
        code = {"Tab": 9, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def _next(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._read.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser ended")
            text += byte
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message


@contextmanager
def browser(program: str) -> Iterator[Browser]:
    """A Chromium of its own, which ends with the block. It reads from handle 3 and writes to handle 4."""
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        wire = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$@"'
        command = ["bash", "-c", wire, "bash", program, *flags, f"--user-data-dir={profile}"]
        process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Browser(ours_out, ours_in)
        finally:
            process.terminate()
            process.wait()


def look(page: Path, folder: Path, program: str) -> list[str]:
    """Screenshots into the folder -> what is wrong."""
    faults = []
    for (name, width), scheme in itertools.product(WIDTHS.items(), SCHEMES):
        with browser(program) as chrome:
            height = 800
            chrome.open(page)
            chrome.call(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=2 if name == "phone" else 1,
                mobile=name == "phone",
            )
            chrome.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            where = f"{name}, {scheme}"
            faults += [f"{where}: {fault}" for fault in (*layout(chrome, width), *by_keyboard(chrome), *by_tap(chrome))]
            chrome.value("document.querySelectorAll('details').forEach((it, at) => (it.open = at % 12 == 5))")
            chrome.value("scrollTo(0, 0)")
            shot = chrome.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
            (folder / f"{name}-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))
            faults += [f"{where}: {fault}" for fault in (*layout(chrome, width), *loaded(chrome))]
    with browser(program) as chrome:
        chrome.open(page, "#stage-0-0", scripts=False)
        if not chrome.value("document.getElementById('stage-0-0').closest('details').open"):
            faults.append("without scripts: a link into folded details does not open them")
        if not chrome.value("document.getElementById('told').hidden"):
            faults.append("without scripts: a line waits for what never comes")
    return faults


def layout(chrome: Browser, width: int) -> Iterator[str]:
    wide = chrome.value("document.documentElement.scrollWidth")
    if wide > width:
        yield f"the page is {wide} wide, the window {width}"
    small = chrome.value(
        "[...document.querySelectorAll('main *')].filter(it => it.children.length == 0 && it.textContent.trim() && "
        "parseFloat(getComputedStyle(it).fontSize) < 8.7).length"
    )
    if small:
        yield f"{small} texts are smaller than 8.7 pixels"


def by_keyboard(chrome: Browser) -> Iterator[str]:
    """Tab reaches links, maps and details one after the other, and arrows walk in a map."""
    chrome.press("Tab")
    if chrome.value("document.activeElement.className") != "skip":
        yield "the first Tab does not reach the skip link"
    for _ in range(400):
        chrome.press("Tab")
        if chrome.value(CELL):
            break
    else:
        yield "Tab reaches no precision map"
        return
    first = chrome.value("document.getElementById('told').textContent")
    for key in ("ArrowRight", "ArrowDown", "ArrowRight"):
        chrome.press(key)
        now = chrome.value("document.getElementById('told').textContent")
        if now == first or not chrome.value(CELL):
            yield f"{key} does not move to another cell"
        first = now


def by_tap(chrome: Browser) -> Iterator[str]:
    told = chrome.value(
        "(() => { const cell = [...document.querySelectorAll('.map td[title]')].at(-1); cell.click(); "
        "return [cell.title, document.getElementById('told').textContent]; })()"
    )
    if told[0] != told[1]:
        yield f"a tap on {told[0]!r} shows {told[1]!r}"
    chrome.value("document.querySelector('.map tbody th a').click()")
    if not chrome.value("new Promise(done => setTimeout(() => done(!!document.querySelector('.stage[open]')), 200))"):
        yield "a layer's number does not open its details"


def loaded(chrome: Browser) -> Iterator[str]:
    """Requests to anywhere but the page itself, and complaints in the console."""
    for event in chrome.events:
        method, given = event["method"], event["params"]
        if method == "Network.requestWillBeSent" and not given["request"]["url"].startswith("file:"):
            yield f"it asks for {given['request']['url']}"
        if method == "Runtime.exceptionThrown":
            yield f"script: {given['exceptionDetails'].get('text')}"
        if method == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            yield f"console: {given['entry']['text']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chromium", default="chromium", help="program to run")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    faults = look(given.page, given.folder, given.chromium)
    print("\n".join(faults) or f"nothing is wrong; screenshots are in {given.folder}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
