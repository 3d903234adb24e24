"""A real browser for tests of pages; they are skipped, with the reason, where none is installed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE_S = 60.0
CONTRAST = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (text) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((v) => v / 255).map(
      (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const poor = [];
  for (const element of document.querySelectorAll('body *')) {
    const words = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!words || !element.checkVisibility() || element.tagName === 'title') continue;
    const drawn = element.tagName === 'text';
    const front = rgba(getComputedStyle(element)[drawn ? 'fill' : 'color']);
    let behind = element, back = [0, 0, 0, 0];
    while (behind && back[3] < 255) {
      back = rgba(getComputedStyle(behind).backgroundColor);
      behind = behind.parentElement;
    }
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push([element.tagName, element.textContent.slice(0, 40), front, back]);
  }
  return poor;
})()
"""  # noqa: E501


class Browser:
    """Chromium without a window, spoken to through a pipe (the DevTools protocol)."""

    def __init__(self, program: str, folder: Path) -> None:
        our_read, its_write = os.pipe()
        its_read, our_write = os.pipe()

        def take_pipes() -> None:
            # it expects them under these numbers; copies first, since these may be in the way
            copies = os.dup(its_read), os.dup(its_write)
            os.dup2(copies[0], 3)
            os.dup2(copies[1], 4)

        self._process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--no-first-run", f"--user-data-dir={folder}", "--remote-debugging-pipe",
             "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=take_pipes,
            pass_fds=(its_read, its_write, 3, 4),
        )  # fmt: skip
        os.close(its_read)
        os.close(its_write)
        os.set_blocking(our_read, False)
        self._read, self._write = our_read, our_write
        self._data = b""
        self._count = 0
        self._session = ""
        self.events: list[dict[str, Any]] = []
        targets = self.ask("Target.getTargets")["targetInfos"]
        (page,) = [target["targetId"] for target in targets if target["type"] == "page"]
        attached = self.ask("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def ask(self, method: str, **parameters: Any) -> Any:
        """Sends a command and waits for its answer; events that come before are kept."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = self._wait(lambda message: message.get("id") == self._count)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path | str, size: tuple[int, int], scheme: str) -> None:
        """Shows a file or an address with a window's size and a colour scheme.

        Earlier events are forgotten.
        """
        width, height = size
        mobile = width < 600
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height,
                 deviceScaleFactor=1, mobile=mobile)  # fmt: skip
        self.ask("Emulation.setEmulatedMedia",
                 features=[{"name": "prefers-color-scheme", "value": scheme}])  # fmt: skip
        self.events = []
        url = page if isinstance(page, str) else page.resolve().as_uri()
        self.ask("Page.navigate", url=url)
        if not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._wait(lambda message: message.get("method") == "Page.loadEventFired")

    def value(self, script: str) -> Any:
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Presses a key and lets it go."""
        text = {"Space": " ", "Enter": "\r"}.get(key, key)
        named = {"key": text if len(text) == 1 else key, "code": key}
        typed = {"text": text} if len(text) == 1 else {}
        if key in ("Space", "Enter"):
            named["key"] = " " if key == "Space" else key
            typed |= {"windowsVirtualKeyCode": 32 if key == "Space" else 13}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **named, **typed)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **named)

    def until(self, script: str) -> Any:
        """Waits until a script gives something true, and returns it."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := self.value(script)):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.02)
        return found

    def poor_contrast(self) -> Any:
        """Texts that are hard to read: contrast below 4.5 (WCAG 2, level AA)."""
        return self.value(CONTRAST)

    def screenshot(self, path: Path) -> None:
        """Of the whole page."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "scale": 1} | {name: size[name] for name in ("width", "height")}
        shot = self.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """What the console shows, and errors of scripts."""
        names = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event) for event in self.events if event["method"] in names]

    def addresses(self) -> list[str]:
        """All that was asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def _wait(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            while b"\0" in self._data:
                text, self._data = self._data.split(b"\0", 1)
                message = json.loads(text)
                if "id" not in message:
                    self.events.append(message)
                if wanted(message):
                    return message
            assert time.monotonic() < deadline, "the browser does not answer"
            assert self._process.poll() is None, "the browser has ended"
            try:
                self._data += os.read(self._read, 1 << 20)
            except BlockingIOError:
                time.sleep(0.01)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    found = Browser(program, tmp_path_factory.mktemp("browser"))
    yield found
    found.close()
