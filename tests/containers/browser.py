"""A page in headless Chromium, driven over the DevTools protocol: opened, asked, drawn as PNG."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import websocket


class Browser:
    """Chromium with one page; ends with the `with` block."""

    def __enter__(self) -> Browser:
        self._profile = Path(tempfile.mkdtemp(prefix="nbmc-chromium-"))
        self._process = subprocess.Popen(
            ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0",
             "--remote-allow-origins=*", "--window-size=1200,800", f"--user-data-dir={self._profile}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        port = self._eventually(self._port, "chromium listens")
        pages = self._eventually(lambda: self._pages(port), "chromium has a page")
        self._page = websocket.create_connection(pages[0]["webSocketDebuggerUrl"], timeout=60)
        self._number = 0
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._page.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for _ in range(50):  # its children may still be writing there
            shutil.rmtree(self._profile, ignore_errors=True)
            if not self._profile.exists():
                break
            time.sleep(0.1)

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def wait_for(self, expression: str, within: float = 120.0) -> Any:
        """The first true value of a JavaScript expression."""
        return self._eventually(lambda: self._evaluate(expression), expression, within)

    def draw(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    # --- the protocol --------------------------------------------------------------------------------------------------

    def _evaluate(self, expression: str) -> Any:
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        return answer.get("result", {}).get("value")

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        self._number += 1
        self._page.send(json.dumps({"id": self._number, "method": method, "params": arguments}))
        while True:
            message = json.loads(self._page.recv())
            if message.get("id") == self._number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def _port(self) -> str | None:
        assert self._process.poll() is None, f"chromium ended with {self._process.returncode}"
        file = self._profile / "DevToolsActivePort"
        return file.read_text().splitlines()[0] if file.exists() and file.read_text() else None

    @staticmethod
    def _pages(port: str) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as answer:
            return [page for page in json.load(answer) if page["type"] == "page"]

    @staticmethod
    def _eventually(look: Any, what: str, within: float = 60.0) -> Any:
        deadline = time.monotonic() + within
        while True:
            if found := look():
                return found
            assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
            time.sleep(0.1)
