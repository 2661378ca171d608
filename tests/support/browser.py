"""Debian's chromium, headless, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

from tests.support.clocks import PATIENCE, until

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)
KEYS = {
    "Enter": ("\r", 13),
    "Escape": ("", 27),
    "ArrowLeft": ("", 37),
    "ArrowUp": ("", 38),
    "ArrowRight": ("", 39),
    "ArrowDown": ("", 40),
    "/": ("/", 191),
}


class Tab:
    """One page: where it is, what it asked for, what it complained of.

    Attributes:
        requested: every address it asked for, but `data:`.
        complaints: console errors, exceptions, violations of the content security policy, dialogs.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._sent = 0
        self._loaded = False
        self.requested: list[str] = []
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Load a page and wait until it and its images are there."""
        self._loaded = False
        self.requested.clear()
        self.complaints.clear()
        self._call("Page.navigate", url=url)
        while not self._loaded:
            self._receive()

    def run(self, script: str) -> Any:
        """The value of an expression on the page; promises are awaited."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, script: str) -> Any:
        """Wait until an expression on the page is true; its value is of that moment, whatever is drawn anew later."""
        return until(lambda: self.run(script), lambda: f"never true: {script}")

    def press(self, *keys: str) -> None:
        """Press keys, one after the other."""
        for key in keys:
            text, code = KEYS[key]
            for kind in ("keyDown", "keyUp"):
                typed = {"text": text} if text and kind == "keyDown" else {}
                self._call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **typed)

    def type(self, text: str) -> None:
        """Type a text into what has the focus."""
        self._call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Click in the middle of the first element that a CSS selector finds."""
        place = self.run(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
            "node.scrollIntoView({block: 'center'}); const box = node.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call(
                "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1
            )

    def screen(self, width: int, height: int, *, phone: bool = False, dark: bool = False) -> None:
        """Look at the page on another screen."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Keep what is to be seen as a PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._sent += 1
        number = self._sent
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = self._receive()
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                result: dict[str, Any] = message["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._socket.recv(timeout=PATIENCE))
        event, facts = message.get("method"), message.get("params", {})
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.requestWillBeSent":
            url = facts["request"]["url"]
            self.requested += [] if url.startswith("data:") else [url]
        elif event == "Runtime.exceptionThrown" or (
            event == "Log.entryAdded" and facts["entry"]["level"] == "error"
        ):
            self.complaints.append(json.dumps(facts))
        elif event == "Runtime.consoleAPICalled" and facts["type"] == "error":
            self.complaints.append(json.dumps(facts["args"]))
        elif event == "Page.javascriptDialogOpening":
            self.complaints.append(f"a dialog: {facts['message']}")
            self._socket.send(
                json.dumps({"id": 0, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}})
            )
        return message


@contextmanager
def browser() -> Iterator[Tab]:
    """A chromium with one tab; it is gone with its profile afterwards.

    Raises:
        FileNotFoundError: there is no chromium; `make integration` installs it.
    """
    program = shutil.which("chromium")
    if program is None:
        raise FileNotFoundError("chromium is not installed: `make integration` does it")
    with tempfile.TemporaryDirectory(prefix="ttapi-browser-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with connect(_tab_address(Path(profile), process), max_size=None, proxy=None) as socket:
                yield Tab(socket)
        finally:
            process.terminate()
            process.wait(PATIENCE)


def _tab_address(profile: Path, process: subprocess.Popen[bytes]) -> str:
    port_file = profile / "DevToolsActivePort"

    def listens() -> bool:
        assert process.poll() is None, f"chromium ended with {process.returncode}"
        return port_file.exists() and "\n" in port_file.read_text()

    until(listens, lambda: "chromium does not answer")
    port = port_file.read_text().split()[0]

    def addresses() -> list[str]:
        tabs = httpx.get(f"http://127.0.0.1:{port}/json/list", trust_env=False).json()
        return [tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"]

    return until(addresses, lambda: "chromium has no tab")[0]
