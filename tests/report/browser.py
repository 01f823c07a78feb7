"""A headless Chromium that a test speaks to over a pipe (DevTools protocol): no driver, no port, no package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT_S = 60.0


def find() -> str | None:
    """The browser's path: ``TRIBUNAL_BROWSER``, or what is on PATH."""
    return os.environ.get("TRIBUNAL_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


def _pipe() -> tuple[int, int]:
    """A pipe whose numbers lie above those that the browser wants its own ends to have."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]


class Browser:
    """One browser process; every page gets a tab of its own."""

    def __init__(self, program: str, profile: Path) -> None:
        to_child, self._write = _pipe()
        self._read, from_child = _pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions"]
        options += ["--disable-background-networking", "--disable-component-update", "--proxy-server=127.0.0.1:9", "--mute-audio"]
        options += ["--force-color-profile=srgb", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        # the browser reads from descriptor 3 and writes to 4
        start = f'exec "$0" "$@" 3<&{to_child} 4>&{from_child} {to_child}<&- {from_child}>&-'
        self._process = subprocess.Popen(
            ["bash", "-c", start, program, *options],
            pass_fds=(to_child, from_child),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events on the way go to ``events``."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, event: str, session: str) -> None:
        while not any(one.get("method") == event and one.get("sessionId") == session for one in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser has not answered for {TIMEOUT_S:.0f} s"
            data = os.read(self._read, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        os.write(self._write, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)


class Page:
    """An open page.

    Args:
        file: the HTML file.
        width: of the window, in CSS pixels.
        dark: what the reader's system prefers.
    """

    def __init__(self, browser: Browser, file: Path, *, width: int = 1100, height: int = 900, dark: bool = False) -> None:
        self.browser = browser
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.address = file.resolve().as_uri()
        self.call("Page.navigate", url=self.address)
        browser.wait_for("Page.loadEventFired", self.session)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def resize(self, width: int, height: int = 900) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression says on the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    @property
    def requests(self) -> list[str]:
        """Addresses that it asked for beside its own."""
        sent = [one["params"]["request"]["url"] for one in self._events("Network.requestWillBeSent")]
        return [address for address in sent if address != self.address and not address.startswith("data:")]

    @property
    def complaints(self) -> list[str]:
        """What the console says, and exceptions."""
        found = [str(one["params"]["entry"]["text"]) for one in self._events("Log.entryAdded")]
        found += [str(one["params"]["args"]) for one in self._events("Runtime.consoleAPICalled")]
        return found + [str(one["params"]["exceptionDetails"]) for one in self._events("Runtime.exceptionThrown")]

    def screenshot(self, file: Path) -> None:
        """The whole page as a PNG, for a person."""
        height = self.value("document.documentElement.scrollHeight")
        self.resize(self.value("innerWidth"), min(int(height), 16_000))
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)

    def _events(self, name: str) -> list[dict[str, Any]]:
        return [one for one in self.browser.events if one.get("method") == name and one.get("sessionId") == self.session]
