#!/usr/bin/env python3
"""Tests a report page in headless Chromium: two widths, light and dark, by keyboard and by touch.

    python tools/browse_report.py PAGE.html FOLDER [--chromium chromium]

Writes a screenshot of each combination to FOLDER. Exit status 1 if a check fails: an error in the console, a network
request, a page wider than the window, a blocked script, a key without effect. Requires Chromium, which pip cannot
install, so it is not part of the test suite.
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
    """Chromium over its debugging pipe: JSON messages, each terminated by a zero byte."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._write, self._read = os.fdopen(to_browser, "wb"), os.fdopen(from_browser, "rb")
        self._numbers, self._session = itertools.count(1), ""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and waits for its response; stores events received in the meantime."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            response = self._next()
            if response.get("id") == number:
                if "error" in response:
                    raise RuntimeError(f"{method}: {response['error']}")
                result: dict[str, Any] = response["result"]
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
        """Value of a JavaScript expression in the page."""
        parameters = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        return self.call("Runtime.evaluate", **parameters)["result"].get("value")

    def press(self, key: str) -> None:
        code = {"Tab": 9, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def _next(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._read.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser exited")
            text += byte
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message


@contextmanager
def browser(program: str) -> Iterator[Browser]:
    """Starts Chromium for the block. It reads from file descriptor 3 and writes to 4."""
    (child_in, parent_out), (parent_in, child_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        redirect = f'exec 3<&{child_in} 4>&{child_out}; exec "$@"'
        command = ["bash", "-c", redirect, "bash", program, *flags, f"--user-data-dir={profile}"]
        process = subprocess.Popen(command, pass_fds=(child_in, child_out), stderr=subprocess.DEVNULL)
        os.close(child_in)
        os.close(child_out)
        try:
            yield Browser(parent_out, parent_in)
        finally:
            process.terminate()
            process.wait()


def check_page(page: Path, folder: Path, program: str) -> list[str]:
    """Writes screenshots to the folder and returns the failed checks."""
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
            case = f"{name}, {scheme}"
            faults += [f"{case}: {fault}" for fault in (*layout(chrome, width), *by_keyboard(chrome), *by_tap(chrome))]
            chrome.value(
                "document.querySelectorAll('details').forEach((element, index) => (element.open = index % 12 == 5))"
            )
            chrome.value("scrollTo(0, 0)")
            shot = chrome.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
            (folder / f"{name}-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))
            faults += [f"{case}: {fault}" for fault in (*layout(chrome, width), *loaded(chrome))]
    with browser(program) as chrome:
        chrome.open(page, "#stage-0-0", scripts=False)
        if not chrome.value("document.getElementById('stage-0-0').closest('details').open"):
            faults.append("without scripts: a link into closed details does not open them")
        if not chrome.value("document.getElementById('selected').hidden"):
            faults.append("without scripts: the line for the selected cell is visible")
    return faults


def layout(chrome: Browser, width: int) -> Iterator[str]:
    page_width = chrome.value("document.documentElement.scrollWidth")
    if page_width > width:
        yield f"the page is {page_width} pixels wide, the window {width}"
    small = chrome.value(
        "[...document.querySelectorAll('main *')].filter(e => e.children.length == 0 && e.textContent.trim() && "
        "parseFloat(getComputedStyle(e).fontSize) < 8.7).length"
    )
    if small:
        yield f"{small} texts are smaller than 8.7 pixels"


def by_keyboard(chrome: Browser) -> Iterator[str]:
    """Tab reaches links, maps and details; arrow keys move in a map."""
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
    first = chrome.value("document.getElementById('selected').textContent")
    for key in ("ArrowRight", "ArrowDown", "ArrowRight"):
        chrome.press(key)
        now = chrome.value("document.getElementById('selected').textContent")
        if now == first or not chrome.value(CELL):
            yield f"{key} does not move to another cell"
        first = now


def by_tap(chrome: Browser) -> Iterator[str]:
    titles = chrome.value(
        "(() => { const cell = [...document.querySelectorAll('.map td[title]')].at(-1); cell.click(); "
        "return [cell.title, document.getElementById('selected').textContent]; })()"
    )
    if titles[0] != titles[1]:
        yield f"touching {titles[0]!r} shows {titles[1]!r}"
    chrome.value("document.querySelector('.map tbody th a').click()")
    if not chrome.value("new Promise(done => setTimeout(() => done(!!document.querySelector('.stage[open]')), 200))"):
        yield "the number of a layer does not open its details"


def loaded(chrome: Browser) -> Iterator[str]:
    """Network requests, and errors or warnings in the console."""
    for event in chrome.events:
        method, parameters = event["method"], event["params"]
        if method == "Network.requestWillBeSent" and not parameters["request"]["url"].startswith("file:"):
            yield f"network request: {parameters['request']['url']}"
        if method == "Runtime.exceptionThrown":
            yield f"script: {parameters['exceptionDetails'].get('text')}"
        if method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            yield f"console: {parameters['entry']['text']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chromium", default="chromium", help="path of Chromium")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    faults = check_page(arguments.page, arguments.folder, arguments.chromium)
    print("\n".join(faults) or f"all checks passed; screenshots are in {arguments.folder}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
