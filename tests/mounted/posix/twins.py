"""The same call in two places, a local directory and a directory of a mount, and what of the answers must be equal.

It knows no call and no server; the modules beside it say what is called.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.mounted.modes import OWNER

T = TypeVar("T")

CLOCK_STEP = 0.012
"""Seconds after which ext4's coarse clock (a tick of at most 10 ms) has certainly moved."""


@dataclass(frozen=True)
class Answer:
    """What a call said: a value, or the name of an errno."""

    value: object = None
    error: str | None = None


def answer(call: Callable[[Path], object], place: Path) -> Answer:
    try:
        return Answer(call(place))
    except OSError as exc:
        return Answer(error=errno.errorcode.get(exc.errno or 0, repr(exc)))


@dataclass(frozen=True)
class Twins:
    """Two directories that get the same calls. Paths inside must be made from the place that a call is given."""

    local: Path
    mounted: Path

    def same(self, call: Callable[[Path], object]) -> Answer:
        """Runs `call` in both places, fails if the answers differ, and returns the answer."""
        expected = answer(call, self.local)
        found = answer(call, self.mounted)
        assert found == expected, f"the mount says {found}, the local directory {expected}"
        return expected

    def both(self, call: Callable[[Path], T]) -> tuple[T, T]:
        """Runs `call` in both places for its effect."""
        return call(self.local), call(self.mounted)

    def differences(self, calls: dict[str, Callable[[Path], object]]) -> list[str]:
        """Runs many calls; each one is given a fresh directory of its own in both places."""
        found = []
        for number, (name, call) in enumerate(calls.items()):
            for place in (self.local, self.mounted):
                (place / str(number)).mkdir()
            expected = answer(call, self.local / str(number))
            got = answer(call, self.mounted / str(number))
            if got != expected:
                found.append(f"{name}: the mount says {got}, the local directory {expected}")
        return found


def owner(path: Path) -> tuple[int, int]:
    """(uid, gid). A mount's files belong to whom its daemon works for, which need not be who tests it."""
    found = path.lstat()
    return found.st_uid, found.st_gid


def shape(path: Path) -> tuple[object, ...]:
    """What of a stat is the same everywhere: kind, mode, whether it is ours, size and link count (of what is no directory)."""
    found = path.lstat()
    ours = owner(path) in (OWNER, (os.geteuid(), os.getegid()))
    if stat.S_ISDIR(found.st_mode):
        return (oct(found.st_mode), ours)
    return (oct(found.st_mode), ours, found.st_size, found.st_nlink)


def tree(directory: Path) -> dict[str, object]:
    """Every name below with its shape, and its bytes or target."""
    found: dict[str, object] = {}
    for parent, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(parent, name)
            content: object = None
            if path.is_symlink():
                content = os.readlink(path)
            elif path.is_file():
                content = path.read_bytes()
            found[str(path.relative_to(directory))] = (shape(path), content)
    return found


def moved_times(path: Path, change: Callable[[], object]) -> tuple[bool, bool]:
    """Whether `change` moved (mtime, ctime) of what is at `path`."""
    before = path.lstat()
    time.sleep(CLOCK_STEP)
    change()
    after = path.lstat()
    return after.st_mtime_ns != before.st_mtime_ns, after.st_ctime_ns != before.st_ctime_ns
