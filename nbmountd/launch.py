"""Starts a worker as a process forked from a preloaded server, and says when and why it ended.

It does not know what a worker does, nor how the server works (forkserver.py). Life and death are judged by pidfd: a pid may
be given to another process, and two workers on one connection must never be.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import trio

from nbmountd import forkserver

_REPORT_LIMIT = 1.0
"""Seconds for the server to say how its child ended: milliseconds, or never if it is dead itself."""
_FORK_LIMIT = 30.0
"""The same for the start of a child; the first one waits for the import."""
_ITS_DESCRIPTOR = 3


class Descriptor:
    """A file descriptor on its way into a new process, where it arrives as an integer. The sender keeps its own."""

    def __init__(self, number: int) -> None:
        self.number = number


class ForkServer:
    """Starts processes that run `target` ("module:function"). `close()` when the last one has been started.

    Its process is started when it is needed, and again if it has died. Where it can be, it is forked from this one (`fork`):
    what both have imported is in memory once, some 15 MiB.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._pid: int | None = None

    def fork(self) -> None:
        """Makes the server from this process, which must have one thread. Secrets that it knows are known to all workers."""
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        forkserver.freeze()
        pid = os.fork()
        if pid == 0:
            forkserver.run_forked(its, self._target)
        its.close()
        self._keep(ours, pid)

    def start(self, name: str, fields: Mapping[str, Any], lock_fd: int) -> WorkerProcess:
        """Runs `target(WorkerStart(**fields))` in a new process; `Descriptor` values arrive as integers.

        `lock_fd` is held by the process as long as it lives, so that a new daemon waits for it. Blocks for some milliseconds
        (the first time for what the import takes): call it in a thread. Raises OSError or EOFError.
        """
        reason_fd, reason_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            sent: list[int] = []
            plain: dict[str, Any] = {}
            for key, value in fields.items():
                if isinstance(value, Descriptor):
                    plain[key] = forkserver.Passed(len(sent))
                    sent.append(value.number)
                else:
                    plain[key] = value
            request = pickle.dumps({"name": name, "fields": plain})
            pid, pidfd = self._ask(request, [*sent, lock_fd, reason_end])
            return WorkerProcess(pid, pidfd, reason_fd)
        except BaseException:
            os.close(reason_fd)
            raise
        finally:
            os.close(reason_end)

    def _ask(self, request: bytes, descriptors: list[int]) -> tuple[int, int]:
        """(pid, pidfd) of the new process."""
        if len(request) > forkserver.LONGEST_REQUEST:
            raise OSError("the mount's settings are too long")
        with self._lock:
            if self._connection is not None:
                try:
                    return self._exchange(self._connection, request, descriptors)
                except (OSError, EOFError):
                    self._end()
            self._execute()
            assert self._connection is not None
            try:
                return self._exchange(self._connection, request, descriptors)
            except BaseException:
                self._end()
                raise

    def _exchange(self, connection: socket.socket, request: bytes, descriptors: list[int]) -> tuple[int, int]:
        socket.send_fds(connection, [request], descriptors)
        answer, fds, _flags, _address = socket.recv_fds(connection, 64, 1, socket.MSG_CMSG_CLOEXEC)
        if not answer or len(fds) != 1:
            raise EOFError("the fork server ended")
        return int(answer), fds[0]

    def _execute(self) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from nbmountd import forkserver; "
            f"forkserver.run_executed({_ITS_DESCRIPTOR}, {self._target!r})"
        )
        with its:
            pid = os.posix_spawn(
                sys.executable, [sys.executable, "-c", code], os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, its.fileno(), _ITS_DESCRIPTOR)],
            )  # fmt: skip
        self._keep(ours, pid)

    def _keep(self, connection: socket.socket, pid: int) -> None:
        connection.settimeout(_FORK_LIMIT)
        self._connection, self._pid = connection, pid

    def leave_behind(self) -> tuple[int, ...]:
        """The pids that end with this program and are to be waited for by the next one in this process."""
        return () if self._pid is None else (self._pid,)

    def close(self) -> None:
        """Its process ends; those that it started do not. May be called twice."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        connection, pid, self._connection, self._pid = self._connection, self._pid, None, None
        if connection is None or pid is None:
            return
        connection.close()
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)  # a child that nobody has waited for: the number is still its own
            os.waitpid(pid, 0)


class WorkerProcess:
    """One process. `close()` when it has ended."""

    def __init__(self, pid: int, pidfd: int, reason_fd: int) -> None:
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
        told = _read_to_end(self.reason_fd)
        os.close(self.reason_fd)
        words, _, status = told.partition(forkserver.STATUS)
        kind, _, text = words.decode(errors="replace").partition("\n")
        # Without a status the server is dead, or was left behind by the program before us.
        return Ending(int(status) if status else None, text, final=kind == "final")


def _read_to_end(fd: int) -> bytes:
    """What comes from a pipe until its last writer is gone, or nothing comes any more."""
    found = b""
    readable = select.poll()
    readable.register(fd, select.POLLIN)
    while readable.poll(_REPORT_LIMIT * 1000):
        piece = os.read(fd, 2**16)
        if not piece:
            break
        found += piece
    return found


class Ending:
    """Why a worker ended. `final`: starting it again as it is cannot help (its configuration is wrong)."""

    def __init__(self, status: int | None, text: str, *, final: bool) -> None:
        self.ordered = status == 0
        self.killed = status == -signal.SIGKILL
        self.final = final
        if not text and status is not None and status < 0:
            text = f"killed by {signal.Signals(-status).name}"
        self.reason = text or f"ended with status {'unknown' if status is None else status}"
