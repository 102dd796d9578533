"""What the kernel tells of mounts, processes and files, and what a test asks of it.

It knows nothing of the daemon but the mark that its processes carry.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nbmountd.escapes import AS_THEY_ARE, Rules

T = TypeVar("T")

MARKER = "NBMOUNTD_TEST_HOME"
"""Set in the environment of every process of a daemon under test, so that what is left behind can be found."""


def eventually(look: Callable[[], T | None], within: float, what: str) -> T:
    """The first true value of `look`, asked for again and again; fails after `within` seconds."""
    deadline = time.monotonic() + within
    while True:
        if found := look():
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within} s: {what}")
        time.sleep(0.02)


def mounts_below(directory: Path) -> list[str]:
    """Mount points at or below `directory`, deepest first, dead ones too (mountinfo asks no file system)."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), line.split(" ")[4])
        if point == str(directory) or point.startswith(f"{directory}/"):
            found.append(point)
    return sorted(found, reverse=True)


@dataclass(frozen=True)
class Process:
    """A living process (not a defunct one) of a daemon under test. Memory in bytes."""

    pid: int
    parent: int
    command: str

    @property
    def peak_resident(self) -> int:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert match is not None
        return int(match[1]) * 1024


def processes_of(home: Path, session: int | None) -> list[Process]:
    """Living processes that carry the marker of `home`, or belong to `session`, or were started by such."""
    marker = f"{MARKER}={home}".encode()
    ours: set[int] = set()
    found: dict[int, Process] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            state, parent, _, sid = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if state not in "ZX":
                found[int(entry.name)] = Process(int(entry.name), int(parent), command)
            if int(sid) == session or marker in (entry / "environ").read_bytes().split(b"\0"):
                ours.add(int(entry.name))
    # A worker shows its environment to nobody but root.
    while more := {pid for pid, process in found.items() if process.parent in ours} - ours:
        ours |= more
    return [process for pid, process in found.items() if pid in ours]


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def drop_pages(path: Path) -> None:
    """Makes the kernel forget the clean pages of a file, so that the next read asks whoever serves it."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


OF_SERVERS = (".DAV", ".sabredav", ".nbmountd-upload-turn")
"""Where Apache and sabre/dav keep properties, which they show to nobody; and what a daemon that was killed in its turn leaves
until the next change there (backends/test_webdav_turns.py shows that it goes)."""


def listed(directory: Path) -> list[str]:
    """The names in a directory, sorted, but for OF_SERVERS."""
    return sorted(entries_of(directory))


def same_tree(left: Path, right: Path, names: Rules = AS_THEY_ARE) -> list[str]:
    """Differences in names, kinds and bytes between two directories; empty when there are none.

    Either may be anything that reads as a Path does. `names` is how names are written on the right.
    """
    differences: list[str] = []

    def walk(one: Path, other: Path, relative: Path) -> None:
        mine, others = entries_of(one), {names.shown(name): entry for name, entry in entries_of(other).items()}
        lonely = sorted(mine.keys() ^ others.keys())
        differences.extend(f"{relative / name} is only in {'left' if name in mine else 'right'}" for name in lonely)
        for name in sorted(mine.keys() & others.keys()):
            if kind_of(mine[name]) != kind_of(others[name]):
                differences.append(f"{relative / name} differs in kind")
            elif mine[name].is_symlink():
                if mine[name].readlink() != others[name].readlink():
                    differences.append(f"{relative / name} points elsewhere")
            elif mine[name].is_dir():
                walk(mine[name], others[name], relative / name)
            elif mine[name].read_bytes() != others[name].read_bytes():
                differences.append(f"{relative / name} differs in bytes")

    walk(left, right, Path())
    return differences


def entries_of(directory: Path) -> dict[str, Path]:
    return {entry.name: entry for entry in directory.iterdir() if entry.name not in OF_SERVERS}


def kind_of(path: Path) -> int:
    return stat.S_IFMT(path.lstat().st_mode)
