"""What a D4Science workspace is asked for when git clones into it and when a notebook is saved again and again.

Requests are counted in the log of the test double, so it is the wire that counts; the double's speed is its own.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.mounted.harness import Daemon, daemon_over
from tests.servers.d4science_double import D4ScienceServer, DoubleUser

CLONED, QUICK_CLONED = 2000, 200
SAVES = 50

KINDS = (
    ("POST", "/create/FILE", "uploads"),
    ("POST", "/create/FOLDER", "folders made"),
    ("PUT", "/metadata", "times and modes"),
    ("PUT", "", "renames and moves"),
    ("DELETE", "", "removals"),
    ("GET", "/children", "listings"),
    ("GET", "/download", "downloads"),
    ("GET", "", "looks"),
)


def measure(directory: Path, files: int) -> dict[str, Mapping[str, float]]:
    """Requests by kind, and seconds, for each job. Works in `directory`, an empty one."""
    origin = directory / "origin"
    make_repository(origin, files)
    with D4ScienceServer(directory / "storagehub") as server:
        user = server.new_user()
        token = directory / "token"
        token.write_text(user.token)
        with daemon_over({"w": {"backend": "d4science", "url": server.url, "token_file": str(token)}}) as daemon:
            mount = daemon.path("w")

            def clone() -> None:
                subprocess.run(["git", "clone", "-q", f"file://{origin}", str(mount / "clone")], check=True)

            def save() -> None:
                for number in range(SAVES):
                    saving = mount / ".~work.ipynb"
                    saving.write_text(json.dumps({"cells": [number] * 1000}))
                    saving.replace(mount / "work.ipynb")

            jobs: dict[str, Callable[[], None]] = {f"git clone, {files} files": clone, f"a notebook saved {SAVES} times": save}
            return {title: _counted(job, daemon, server, user) for title, job in jobs.items()}


def _counted(job: Callable[[], None], daemon: Daemon, server: D4ScienceServer, user: DoubleUser) -> Mapping[str, float]:
    before, began = len(server.lines(user.name)), time.monotonic()
    job()
    worked = time.monotonic() - began
    daemon.sync(timeout=600)
    counts: Counter[str] = Counter()
    for line in server.lines(user.name)[before:]:
        counts[next(title for method, part, title in KINDS if line.startswith(method + " ") and part in line)] += 1
    files = _files(user, "")
    return {**counts, "files on the server": files, "seconds of the program": worked, "until safe": time.monotonic() - began}


def _files(user: DoubleUser, path: str) -> int:
    names = [f"{path}/{name}".lstrip("/") for name in user.listdir(path)]
    return sum(1 if user.item(name)["kind"] == "file" else _files(user, name) for name in names)


def make_repository(origin: Path, files: int) -> None:
    for number in range(files):
        folder = origin / f"d{number % 50}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file{number}").write_text(f"{number}\n" * 50)
    git = ["git", "-C", str(origin), "-c", "user.name=Ann", "-c", "user.email=ann@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)


def show(found: Mapping[str, Mapping[str, float]], console: Console) -> None:
    table = Table(title="requests to a D4Science workspace", title_justify="left")
    table.add_column("", no_wrap=True)
    for title in found:
        table.add_column(title, justify="right")
    labels = list(dict.fromkeys(label for counts in found.values() for label in counts))
    for label in labels:
        row = [counts.get(label, 0) for counts in found.values()]
        table.add_row(label, *(f"{value:.1f} s" if isinstance(value, float) else str(value) for value in row))
    console.print(table)
