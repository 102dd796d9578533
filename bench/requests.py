"""How many requests the kernel makes of nbmountd for what programs do: counted in the worker, so nothing is guessed.

It knows a mount's directory and how to ask for counts, and nothing of how a daemon is started.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

Counts = Mapping[str, int]
LISTED = 1000
_UNSOLICITED = frozenset(("statfs", "forget"))
"""The supervisor's health check, and what the kernel gives back when it likes."""


def count_requests(directory: Path, counts: Callable[[], Counts]) -> dict[str, Counts]:
    """Requests by operation for each of the things that programs do in `directory`, an empty one of a mount.

    `counts` tells all requests so far. What a row is about is in the caches already, unless it says cold.
    """
    (directory / "file").write_bytes(b"x" * 4096)
    (directory / "listed").mkdir()
    for number in range(LISTED):
        (directory / "listed" / f"{number:04}").touch()
    (directory / "file").read_bytes()

    def stat() -> None:
        os.stat(directory / "file")

    def read() -> None:
        fd = os.open(directory / "file", os.O_RDONLY)
        assert len(os.read(fd, 4096)) == 4096
        os.close(fd)

    def create() -> None:
        fd = os.open(directory / "created", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(fd, b"x" * 4096)
        os.close(fd)

    def write() -> None:
        fd = os.open(directory / "written", os.O_WRONLY | os.O_CREAT)
        os.write(fd, b"x" * 2**20)
        os.close(fd)

    def write_small() -> None:
        fd = os.open(directory / "pieces", os.O_WRONLY | os.O_CREAT)
        for _ in range(256):
            os.write(fd, b"x" * 4096)
        os.close(fd)

    def ls() -> None:
        listing = subprocess.run(["ls", "-l", str(directory / "listed")], capture_output=True, check=True).stdout
        assert listing.count(b"\n") == LISTED + 1

    def ls_cold() -> None:
        forget_names()
        ls()

    rows: dict[str, Callable[[], None]] = {
        "stat": stat,
        "open + read + close, cached": read,
        "create + write 4 KiB + close": create,
        "write 1 MiB in one call": write,
        "write 1 MiB in calls of 4 KiB": write_small,
        f"ls -l of {LISTED} files, cold": ls_cold,
        f"ls -l of {LISTED} files, warm": ls,
    }
    found: dict[str, Counts] = {}
    for title, work in rows.items():
        before = counts()
        work()
        found[title] = {
            operation: count - before.get(operation, 0)
            for operation, count in counts().items()
            if count > before.get(operation, 0) and operation not in _UNSOLICITED
        }
    return found


def forget_names() -> None:
    """Has the kernel drop names and attributes, as root; else nothing happens."""
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("2\n")


def show(found: Mapping[str, Counts], console: Console) -> None:
    table = Table(title="requests to the daemon", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("all", justify="right")
    table.add_column("by operation")
    for title, counts in found.items():
        parts = [f"{operation} {count}" for operation, count in sorted(counts.items(), key=lambda item: -item[1])]
        table.add_row(title, str(sum(counts.values())), ", ".join(parts))
    console.print(table)
