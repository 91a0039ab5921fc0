"""Headless Chromium, driven through its DevTools protocol: what a page shows, logs and asks the network for."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from bounds import HANG_S

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


class Tab:
    """One page in the browser. It counts what goes wrong from the first request on."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._number = 0
        #: Texts of errors and warnings in the console, and of exceptions.
        self.errors: list[str] = []
        #: Addresses of all requests.
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.bringToFront")  # a hidden page draws nothing

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"])[:2000])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(parameters["args"])[:2000])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            entry = parameters["entry"]
            # No answer at all: the server has ended. An answer that is an error has a status instead.
            self.errors += [] if "net::ERR_" in entry["text"] else [json.dumps(entry)[:2000]]

    def close(self) -> None:
        """Leave the page."""
        self.call("Page.navigate", url="about:blank")
        self._socket.close()

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        """Set the size of the window in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def dark(self, *, on: bool) -> None:
        """Make the user prefer dark or light pages."""
        value = "dark" if on else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def open(self, address: str) -> None:
        """Open the page and wait until it has drawn itself."""
        self.call("Page.navigate", url=address)
        self.wait("document.documentElement?.dataset.ready === 'true'")

    def evaluate(self, expression: str) -> Any:
        """Return the JSON value of an expression, awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Wait until an expression is true, and return its value."""
        deadline = time.monotonic() + HANG_S
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"never true: {expression}; errors: {self.errors}"
        return value

    def press(self, key: str) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                **({"text": key} if len(key) == 1 and kind == "keyDown" else {}),
            )

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        """Write a PNG of the window, or of the whole page."""
        more = {"captureBeyondViewport": True} if whole else {}
        if whole:
            width, height = self.evaluate(
                "[document.documentElement.clientWidth, document.documentElement.scrollHeight]"
            )
            more["clip"] = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **more)["data"]))


@contextmanager
def browser() -> Iterator[Callable[[], Tab]]:
    """Start a browser without a profile; yield a function that opens a new tab."""
    import websocket

    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            *(
                CHROMIUM,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
            ),
            *(
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--mute-audio",
            ),
            *(
                "--remote-debugging-port=0",
                "--remote-allow-origins=*",
                f"--user-data-dir={profile}",
                "about:blank",
            ),
        ]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "HOME": profile})
        try:
            port = _debugger(Path(profile), process)

            def new_tab() -> Tab:
                import urllib.request

                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT"
                )
                with urllib.request.urlopen(request, timeout=HANG_S) as answer:  # noqa: S310 - this host
                    address = json.load(answer)["webSocketDebuggerUrl"]
                return Tab(websocket.create_connection(address, timeout=HANG_S))

            yield new_tab
        finally:
            process.kill()
            process.wait()


def _debugger(profile: Path, process: "subprocess.Popen[bytes]") -> str:
    """Return the port of the debugger once the browser has written them."""
    file, deadline = profile / "DevToolsActivePort", time.monotonic() + HANG_S
    while not (file.is_file() and len(words := file.read_text().split()) == 2):
        assert process.poll() is None, "the browser has ended"
        assert time.monotonic() < deadline, "the browser never opened its debugger"
        time.sleep(0.05)
    return words[0]
