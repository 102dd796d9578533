"""A Nextcloud that takes 50 ms for every request: what each system makes of that, its requests counted by the server.

A row is done once by each system, from empty caches and up to a deadline; it knows how to tell when the server has it all.
The double of tests/servers/fake_nextcloud.py is the server: only ratios mean anything.
"""

from __future__ import annotations

import math
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.report import quantity
from bench.rows import MIB, all_there, create, drop_page_cache, prepare_large, timed
from bench.rows import Scale as RowScale
from bench.systems import System
from tests.servers import FakeNextcloud

DELAY = 0.05
"""Seconds before each answer: what the requests of a Nextcloud cost, whatever their size."""

Times = dict[str, float | None]


@dataclass(frozen=True)
class Scale:
    folders: int = 1000
    """Directories of the tree, each with ten files."""
    large: int = 1024 * MIB
    created: int = 1000
    cloned: int = 300
    """Files of the repository."""
    deadline: float = 90.0
    """Seconds; what takes longer is not waited for."""


QUICK = Scale(folders=200, large=256 * MIB, created=200, cloned=60, deadline=60.0)


@dataclass(frozen=True)
class Row:
    title: str
    prepare: Callable[[Path, Path, Scale], None]
    """Gets the server's directory, a directory beside it, and the scale."""
    run: Callable[[System, Path, Scale], Times]
    """Gives seconds by label, None for what took longer than the deadline."""


def prepare_tree(root: Path, beside: Path, scale: Scale) -> None:
    tops = max(1, scale.folders // 100)
    for number in range(scale.folders):
        top, below = number % tops, number // tops
        folder = root / "tree" / f"top {top:02}" / (f"folder {below:03}" if below else "")
        folder.mkdir(parents=True, exist_ok=True)
        for name in range(10):
            (folder / f"file {name}.txt").write_bytes(b"x" * name)


def run_tree(system: System, beside: Path, scale: Scale) -> Times:
    def list_all() -> None:
        listing = subprocess.run(
            ["ls", "-lR", str(system.mount / "tree")], capture_output=True, check=True, timeout=scale.deadline
        ).stdout
        assert listing.count(b".txt") == scale.folders * 10

    label = f"ls -lR of {scale.folders} folders with {scale.folders * 10} files"
    return {f"{label}": within(list_all), f"{label}, again": within(list_all)}


def prepare_read(root: Path, beside: Path, scale: Scale) -> None:
    prepare_large(root, RowScale(large=scale.large))


def run_read(system: System, beside: Path, scale: Scale) -> Times:
    command = ["dd", f"if={system.mount}/large.bin", "of=/dev/null", "bs=1M", "status=none"]
    drop_page_cache(system.mount / "large.bin")
    return {
        f"{scale.large // MIB} MiB read": within(lambda: subprocess.run(command, check=True, timeout=scale.deadline) and None)
    }


def prepare_nothing(root: Path, beside: Path, scale: Scale) -> None:
    pass


def run_created(system: System, beside: Path, scale: Scale) -> Times:
    (system.mount / "created").mkdir()
    started = time.perf_counter()
    create(system.mount / "created", scale.created)
    closed = time.perf_counter() - started
    label = f"{scale.created} new files of 4 KiB"
    remote = system.remote / "created"
    safe = until(started, lambda: all_there(remote, scale.created, 4096), scale.deadline)
    return {f"{label}, until close": closed, f"{label}, until safe": safe}


def prepare_repository(root: Path, beside: Path, scale: Scale) -> None:
    repository = beside / "repository"
    shutil.rmtree(repository, ignore_errors=True)
    git = ["git", "-C", str(repository), "-c", "user.name=b", "-c", "user.email=b@example.org"]
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    chance = random.Random(5)
    for number in range(scale.cloned):
        file = repository / f"package{number % 10}" / f"module{number}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(f"value_{chance.random()} = {chance.random()}\n" for _ in range(40)))
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)


def run_clone(system: System, beside: Path, scale: Scale) -> Times:
    target = system.mount / "clone"
    started = time.perf_counter()
    command = ["git", "clone", "-q", "--no-hardlinks", str(beside / "repository"), str(target)]
    cloned = within(lambda: subprocess.run(command, check=True, timeout=scale.deadline) and None)
    label = f"git clone of {scale.cloned} files"
    if cloned is None or math.isnan(cloned):
        return {label: cloned, f"{label}, until safe": cloned}
    try:
        expected = sum(1 for path in target.rglob("*") if path.is_file())
    except OSError:  # davfs2 1.6 cannot list directories on Linux 6.18
        return {label: cloned, f"{label}, until safe": math.nan}
    remote = system.remote / "clone"
    safe = until(started, lambda: sum(1 for path in remote.rglob("*") if path.is_file()) == expected, scale.deadline)
    return {label: cloned, f"{label}, until safe": safe}


ROWS = {
    "slow-list": Row("listing a tree", prepare_tree, run_tree),
    "slow-read": Row("reading", prepare_read, run_read),
    "slow-create": Row("many new files", prepare_nothing, run_created),
    "slow-clone": Row("git clone", prepare_repository, run_clone),
}


def measure(
    names: list[str], systems: list[System], server: FakeNextcloud, beside: Path, scale: Scale, console: Console
) -> dict[str, dict[str, float | None]]:
    """Seconds, and requests, by label and system; printed as well."""
    found: dict[str, dict[str, float | None]] = {}
    for name in names:
        row = ROWS[name]
        row.prepare(server.root, beside, scale)
        for system in systems:
            console.print(f"[dim]{row.title}, {DELAY * 1000:.0f} ms a request: {system.name}[/]")
            server.hook(delay=DELAY, alone=True)
            system.start()
            server.clear_requests()
            try:
                for label, seconds in row.run(system, beside, scale).items():
                    found.setdefault(label, {})[system.name] = seconds
                    console.print(f"[dim]  {label}: {cell(seconds, scale.deadline, counts=False)}[/]")
                requests = float(len(server.every_request()))
            finally:
                server.hook()
                system.stop()
            found.setdefault(f"  {row.title}: requests", {})[system.name] = requests
            for scratch in ("created", "clone"):
                shutil.rmtree(server.root / scratch, ignore_errors=True)
        for path in server.root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    show(found, [system.name for system in systems], scale, console)
    return found


def show(found: dict[str, dict[str, float | None]], systems: list[str], scale: Scale, console: Console) -> None:
    table = Table(title=f"a Nextcloud that takes {DELAY * 1000:.0f} ms a request; less is better", title_justify="left")
    table.add_column("", no_wrap=True)
    for system in systems:
        table.add_column(system, justify="right")
    table.add_column("rclone / nbmountd", justify="right")
    for label, values in found.items():
        counts = label.endswith("requests")
        cells = [cell(values.get(system), scale.deadline, counts=counts) for system in systems]
        ours, theirs = values.get("nbmountd"), values.get("rclone")
        ratio = "" if not ours or counts else f"{theirs / ours:.2f}" if theirs else f"> {scale.deadline / ours:.2f}"
        table.add_row(label, *cells, ratio, style="dim" if counts else "")
    console.print(table)


def cell(value: float | None, deadline: float, *, counts: bool) -> str:
    if value is None:
        return f"> {deadline:.0f} s"
    if math.isnan(value):
        return "failed"
    return f"{value:.0f}" if counts else quantity("", value)


def within(work: Callable[[], None]) -> float | None:
    """Seconds; None if the deadline came first, NaN if the system cannot do it."""
    try:
        return timed(work)
    except subprocess.TimeoutExpired:
        return None
    except subprocess.CalledProcessError:
        return math.nan


def until(started: float, look: Callable[[], bool], deadline: float) -> float | None:
    """Seconds from `started` until `look`; None if the deadline came first."""
    while not look():
        if time.perf_counter() - started > deadline:
            return None
        time.sleep(0.05)
    return time.perf_counter() - started
