"""A scientist's session in a container: JupyterLab started through the hook, looked at with a browser, a notebook saved into
~/b2drop, the container stopped and started anew. In each start mode.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.containers.browser import Browser
from tests.containers.conftest import MODES, PASSWORD, PLACE, Home
from tests.containers.engine import Container
from tests.servers.process import free_port

PICTURES = PLACE / "pictures"
TOKEN = "a-token-for-the-test"
LISTED = "[...document.querySelectorAll('.jp-DirListing-itemText')].map(each => each.textContent).join('|')"


class Jupyter:
    """JupyterLab in a container, by its API."""

    def __init__(self, container: Container, port: int) -> None:
        self.container, self.port = container, port

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Authorization": f"token {TOKEN}", "Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            assert answer.status in (200, 201), f"{method} {path}: {answer.status} {text[:500]!r}\n{self.container.log[-3000:]}"
            return json.loads(text)
        finally:
            connection.close()

    def start(self) -> None:
        self.container.start()
        deadline = time.monotonic() + 120
        while True:
            try:
                self.ask("GET", "/api/status")
                return
            except OSError:
                assert time.monotonic() < deadline, f"JupyterLab does not come up:\n{self.container.log[-3000:]}"
                time.sleep(0.2)

    def save(self, path: str, *lines: str) -> None:
        self.ask("PUT", f"/api/contents/{path}", {"type": "notebook", "content": notebook(*lines)})


def notebook(*lines: str) -> dict[str, Any]:
    cells = [
        {"cell_type": "code", "execution_count": None, "id": f"cell{number}", "metadata": {}, "outputs": [], "source": line}
        for number, line in enumerate(lines)
    ]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def lines_of(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def jupyter(home: Home, mode: str) -> Iterator[Jupyter]:
    port = free_port()
    environ = {"JUPYTER_PORT": str(port), "JUPYTER_IP": "127.0.0.1", "JUPYTER_TOKEN": TOKEN}
    with home.notebook(MODES[mode](home), environ=environ) as container:
        yield Jupyter(container, port)


def test_a_session_is_on_the_server_after_a_stop_and_a_new_start(home: Home, jupyter: Jupyter, mode: str) -> None:
    (home.remote / "from-a-colleague.csv").write_text("a,b\n1,2\n")
    (home.remote / "data").mkdir()
    jupyter.start()

    listed = {entry["name"] for entry in jupyter.ask("GET", "/api/contents/b2drop")["content"]}
    assert {"from-a-colleague.csv", "data"} <= listed
    jupyter.save("b2drop/analysis.ipynb", "print('first')")
    jupyter.save("b2drop/analysis.ipynb", "print('first')", "print('edited')")
    look(jupyter, PICTURES / f"mode-{mode}.png")
    who = "0:0" if mode == "F" else "1000:100"
    said = jupyter.container.inside("nbmountctl", "sync", "--timeout", "60s", user=who)  # as a preStop hook does
    assert lines_of(home.remote / "analysis.ipynb") == ["print('first')", "print('edited')"], said
    jupyter.save("b2drop/data/last.ipynb", "print('saved just before the stop')")
    begin = time.monotonic()
    jupyter.container.stop(10)
    took = time.monotonic() - begin
    jupyter.start()
    again = jupyter.ask("GET", "/api/contents/b2drop/data/last.ipynb")
    on_the_server = wait_for(home.remote / "data" / "last.ipynb")

    print(f"mode {mode}: the stop took {took:.1f} s")
    assert lines_of(home.remote / "analysis.ipynb") == ["print('first')", "print('edited')"]
    assert on_the_server == ["print('saved just before the stop')"]
    assert again["content"]["cells"][0]["source"] == "print('saved just before the stop')"
    assert sorted(name for name in os.listdir(home.remote) if "conflict" in name) == []
    assert PASSWORD not in jupyter.container.log


def look(jupyter: Jupyter, picture: Path) -> None:
    if shutil.which("chromium") is None:
        print("no chromium here: not looked at")
        return
    with Browser() as browser:
        browser.open(f"http://127.0.0.1:{jupyter.port}/lab/tree/b2drop?token={TOKEN}")
        listed = browser.wait_for(f"(text => text.includes('analysis.ipynb') && text)({LISTED})")
        browser.draw(picture)
    assert {"analysis.ipynb", "from-a-colleague.csv", "data"} <= set(listed.split("|"))
    assert picture.stat().st_size > 10_000


def wait_for(path: Path) -> list[str]:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.2)
    return lines_of(path)


@pytest.mark.parametrize("mode", ["A", "D"], indirect=True)
def test_what_was_saved_while_the_server_was_away_is_sent_by_the_next_container(home: Home, jupyter: Jupyter) -> None:
    """The container is killed outright: no SIGTERM, no grace."""
    jupyter.start()
    jupyter.ask("GET", "/api/contents/b2drop")
    home.server.hook(maintenance=True)
    jupyter.save("b2drop/kept.ipynb", "print('not lost')")
    jupyter.container.kill()
    assert not (home.remote / "kept.ipynb").exists()
    home.server.hook()

    jupyter.start()

    assert wait_for(home.remote / "kept.ipynb") == ["print('not lost')"]
