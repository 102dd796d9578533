"""Starts a worker as a process forked from a preloaded server, and says when and why it ended.

It does not know what a worker does. multiprocessing's fork server has imported the worker's modules once, so workers share
that memory and start in milliseconds. Life and death are judged by pidfd: multiprocessing's own sentinel also ends with the
fork server, and two workers on one connection must never be.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import reduction
from typing import Any

import trio

from nbmountd.errors import ConfigError, NbmountdError
from nbmountd.log import mask

_context = multiprocessing.get_context("forkserver")
_starting = threading.Lock()
_LONGEST_REASON = 4000


class Descriptor:
    """A file descriptor on its way into a new process, where it arrives as an integer. The sender keeps its own."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (reduction.DupFd(self._number),)


def _receive(passed: Any) -> int:
    number: int = passed.detach()
    os.set_inheritable(number, False)
    return number


class WorkerProcess:
    """One process. `close()` when it has ended."""

    def __init__(self, process: Any, pid: int, pidfd: int, reason_fd: int) -> None:
        """`process`: what multiprocessing knows of it; None if it was started by the program before us."""
        self._process = process
        self.pid = pid
        self.pidfd = pidfd
        self.reason_fd = reason_fd
        self.ended = trio.Event()
        """For others than the one who waits: set by that one afterwards."""

    async def wait(self) -> None:
        """Returns when the process is gone. For one task at a time."""
        await trio.lowlevel.wait_readable(self.pidfd)

    def kill(self) -> None:
        """SIGKILL. No matter if it is gone already."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def dump(self) -> None:
        """Has it log what it is doing (insight.py)."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGUSR1)

    def close(self) -> Ending:
        """How it ended. Only after `wait()`."""
        os.close(self.pidfd)
        with suppress(BlockingIOError):
            kind, _, text = os.read(self.reason_fd, _LONGEST_REASON * 4).decode(errors="replace").partition("\n")
            os.close(self.reason_fd)
            if self._process is None:
                return Ending(None, text, final=kind == "final")
            self._process.join(1.0)  # the fork server reports within milliseconds, or never if it is dead itself
            return Ending(self._process.exitcode, text, final=kind == "final")
        os.close(self.reason_fd)
        return Ending(None, "", final=False)


class Ending:
    """Why a worker ended. `final`: starting it again as it is cannot help (its configuration is wrong)."""

    def __init__(self, status: int | None, text: str, *, final: bool) -> None:
        self.ordered = status == 0
        self.killed = status == -signal.SIGKILL
        self.final = final
        if not text and status is not None and status < 0:
            text = f"killed by {signal.Signals(-status).name}"
        self.reason = text or f"ended with status {'unknown' if status is None else status}"


def preload(target: str) -> None:
    """Has the fork server import the module of `target` ("module:function") when it starts. Once, before the first `start`."""
    _context.set_forkserver_preload([__name__, target.partition(":")[0]])


def start(target: str, name: str, fields: Mapping[str, Any], lock_fd: int) -> WorkerProcess:
    """Runs `target(WorkerStart(**fields))` in a new process; `Descriptor` values arrive as integers.

    `lock_fd` is held by the process as long as it lives, so that a new daemon waits for it. Blocks for some milliseconds (the
    first time for what the import takes): call it in a thread. Raises OSError or EOFError.
    """
    reason_fd, reason_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        process = _context.Process(
            target=_run, name=f"nbmountd {name}", daemon=True,
            args=(target, dict(fields), Descriptor(lock_fd), Descriptor(reason_end)),
        )  # fmt: skip
        with _starting, _NoMainModule():
            process.start()
        assert process.pid is not None
        return WorkerProcess(process, process.pid, os.pidfd_open(process.pid), reason_fd)
    except BaseException:
        os.close(reason_fd)
        raise
    finally:
        os.close(reason_end)


def server_pids() -> tuple[int, ...]:
    """The processes of multiprocessing's own, which end when this program does."""
    from multiprocessing import forkserver, resource_tracker

    server: int | None = getattr(forkserver._forkserver, "_forkserver_pid", None)
    tracker: int | None = getattr(resource_tracker._resource_tracker, "_pid", None)
    return tuple(pid for pid in (server, tracker) if pid)


class _NoMainModule:
    """Keeps multiprocessing from importing our main script (the command line and all it draws in) into each worker."""

    def __enter__(self) -> None:
        self._main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")

    def __exit__(self, *_: object) -> None:
        sys.modules["__main__"] = self._main


def _run(target: str, fields: dict[str, Any], lock_fd: int, reason_fd: int) -> None:
    """The first thing a worker does; `lock_fd` stays open to the very end.

    A session of its own: `tini -g` and Ctrl-C signal the supervisor's whole group, and workers end when the supervisor says so.
    """
    os.setsid()
    try:
        from nbmountd.worker import WorkerStart

        module, _, function = target.partition(":")
        getattr(importlib.import_module(module), function)(WorkerStart(**fields))
    except Exception as exc:
        leaf: BaseException = exc
        while isinstance(inner := getattr(leaf, "exceptions", None), tuple) and inner:
            leaf = inner[0]
        expected = isinstance(leaf, NbmountdError)
        kind = "final" if isinstance(leaf, ConfigError) else "again"
        text = mask(str(leaf) if expected else f"{type(leaf).__name__}: {leaf}")
        os.write(reason_fd, f"{kind}\n{text[:_LONGEST_REASON]}".encode(errors="replace"))
        if expected:
            sys.exit(1)
        raise
