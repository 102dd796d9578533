"""Whose a state directory is: one daemon's at a time, and of no worker that an earlier one left.

It does not know what is in the directory.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from nbmountd.errors import StateError
from nbmountd.log import get_logger

log = get_logger(__name__)

WAIT = 10.0
"""Seconds: a worker of a daemon that was killed notices the end of its lifeline and is gone well before."""
_STOPPING = " stopping"


@asynccontextmanager
async def owned(directory: Path, handed: tuple[int, int] | None = None) -> AsyncIterator[tuple[int, int]]:
    """Holds the state directory: one daemon, and no worker of an earlier one. Raises StateError: at once if another daemon is
    at work, after `WAIT` seconds if one is stopping, or if workers of one do not end. `handed`: the locks as the program
    before us in this process held them.

    A lock belongs to the open file. The first is inherited by every worker and free when the last of them is gone; the second
    is the supervisor's alone.
    """
    lock_fd, own_fd = handed or (_open(directory / "lock"), _open(directory / "lock.daemon"))
    try:
        deadline = trio.current_time() + WAIT
        waiting = False
        while not (_try_lock(own_fd) and _try_lock(lock_fd)):
            holder = os.pread(lock_fd, 64, 0).decode(errors="replace").strip()
            at_work = not _try_lock(own_fd) and not holder.endswith(_STOPPING)
            if at_work or trio.current_time() > deadline:
                raise StateError(
                    f"{directory} is in use by another nbmountd (pid {holder or 'unknown'}); stop that one, or give this one "
                    "another state_dir"
                )
            if not waiting:
                waiting = True
                log.info("waiting for the nbmountd before to end", pid=holder or "unknown", at_most=WAIT)
            await trio.sleep(0.1)
        _say_who_holds(lock_fd)
        yield lock_fd, own_fd
    finally:
        os.close(lock_fd)
        os.close(own_fd)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise StateError(f"{path}: {exc.strerror}; nbmountd must be able to write to its state directory") from exc


def say_stopping(lock_fd: int) -> None:
    """Has the next daemon wait for us."""
    _say_who_holds(lock_fd, _STOPPING)


def _say_who_holds(lock_fd: int, addition: str = "") -> None:
    with suppress(OSError):  # a full disk
        os.ftruncate(lock_fd, 0)
        os.pwrite(lock_fd, f"{os.getpid()}{addition}\n".encode(), 0)


def _try_lock(lock_fd: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
