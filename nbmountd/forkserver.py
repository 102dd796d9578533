"""The process that all workers are forked from: it has imported them once, so they share that memory and start in milliseconds.

It knows nothing of mounts, and what its children do. It has one thread and takes requests from its parent (launch.py) until
that one is gone. multiprocessing's own server would need a second process to watch it and cannot be frozen before it forks.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import pickle
import select
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from nbmountd.errors import ConfigError, NbmountdError

LONGEST_REQUEST = 2**17
"""Bytes; a packet's limit is the socket's buffer, 208 KiB."""
MOST_DESCRIPTORS = 16
STATUS = b"\0"
"""In the reason pipe, what stands before the exit status as the server saw it; before it, the worker's own words."""
_LONGEST_REASON = 4000
_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1
_PR_SET_NAME = 15


def run_forked(connection: socket.socket, target: str) -> NoReturn:
    """Makes this process, just forked from a program with one thread, a fork server. Nothing of that program's runs again."""
    status = 1
    try:
        keep_open_only([connection.fileno()])
        _serve(connection, target)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def run_executed(descriptor: int, target: str) -> NoReturn:
    """The same in a program that was started for it."""
    run_forked(socket.socket(fileno=descriptor), target)


def freeze() -> None:
    """What there is stays until the end: the collector of a child that looked at it would take a copy of every page."""
    gc.collect()
    gc.freeze()


def keep_open_only(descriptors: Sequence[int]) -> None:
    """Closes all descriptors but these and the first three."""
    for name in os.listdir("/proc/self/fd"):  # not a range: some limits are a thousand million
        if int(name) > 2 and int(name) not in descriptors:
            with suppress(OSError):  # the one that was listed with
                os.close(int(name))


def _serve(connection: socket.socket, target: str) -> None:
    os.setsid()  # Ctrl-C and `tini -g` signal the supervisor's group; this process ends when the supervisor is gone
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(nothing, 0)
    os.close(nothing)
    _title("nbmountd: fork server", "nbmountd-server")
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 2)  # workers have few threads that are busy at a time
        # Buffers of 128 KiB to 1 MiB come and go with every request: given back each time, they cost a page fault for 4 KiB.
        libc.mallopt(_M_MMAP_THRESHOLD, 4 * 2**20)
        libc.mallopt(_M_TRIM_THRESHOLD, 8 * 2**20)
    module, _, function = target.partition(":")
    run = getattr(importlib.import_module(module), function)
    freeze()
    children: dict[int, tuple[int, int]] = {}
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    while True:
        for fd, _event in poll.poll():
            if fd != connection.fileno():
                poll.unregister(fd)
                _report(fd, *children.pop(fd))
                continue
            message, descriptors, _flags, _address = socket.recv_fds(
                connection, LONGEST_REQUEST, MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
            if not message:
                return
            reason_fd = descriptors[-1]
            pid = os.fork()
            if pid == 0:
                _become_worker(run, message, descriptors)
            pidfd = os.pidfd_open(pid)
            children[pidfd] = pid, reason_fd
            poll.register(pidfd, select.POLLIN)
            for each in descriptors[:-1]:
                os.close(each)
            with suppress(BrokenPipeError):
                socket.send_fds(connection, [str(pid).encode()], [pidfd])


def _report(pidfd: int, pid: int, reason_fd: int) -> None:
    _, status = os.waitpid(pid, 0)
    with suppress(OSError):  # nobody reads any more, or the worker has filled the pipe
        os.write(reason_fd, STATUS + str(os.waitstatus_to_exitcode(status)).encode())
    os.close(reason_fd)
    os.close(pidfd)


# --- in the child ------------------------------------------------------------------------------------------------------


def _become_worker(run: Any, message: bytes, descriptors: list[int]) -> NoReturn:
    """The first thing a worker does. The last descriptor takes its reasons; those that are not in its fields stay open to the
    very end (the lock of the state directory).

    A session of its own, for the same reason as the server's.
    """
    status = 1
    try:
        os.setsid()
        keep_open_only(descriptors)
        start = pickle.loads(message)
        _title(f"nbmountd: worker {start['name']}", f"nbmountd-{start['name']}")
        status = _work(run, _placed(start["fields"], descriptors), descriptors[-1])
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _work(run: Any, fields: dict[str, Any], reason_fd: int) -> int:
    from nbmountd.worker import WorkerStart

    try:
        run(WorkerStart(**fields))
    except Exception as exc:
        from nbmountd.log import mask

        leaf: BaseException = exc
        while isinstance(inner := getattr(leaf, "exceptions", None), tuple) and inner:
            leaf = inner[0]
        expected = isinstance(leaf, NbmountdError)
        kind = "final" if isinstance(leaf, ConfigError) else "again"
        text = mask(str(leaf) if expected else f"{type(leaf).__name__}: {leaf}").replace("\0", "")
        os.write(reason_fd, f"{kind}\n{text[:_LONGEST_REASON]}".encode(errors="replace"))
        if not expected:
            raise
        return 1
    return 0


class Passed:
    """Stands for a descriptor in a request: the one at `index` of those that come with it."""

    def __init__(self, index: int) -> None:
        self.index = index


def _placed(fields: Mapping[str, Any], descriptors: Sequence[int]) -> dict[str, Any]:
    return {name: descriptors[value.index] if isinstance(value, Passed) else value for name, value in fields.items()}


def _title(text: str, name: str) -> None:
    """What `ps` and `systemctl status` show, in the place of the arguments and the name that this process was forked with.

    So `pkill -f "nbmountd run"` means the supervisor alone. Fields 48 and 49 of proc(5)'s stat are where the kernel looks.
    """
    with suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        begin, end = int(fields[45]), int(fields[46])
        if 0 < end - begin < 2**20:
            ctypes.memmove(begin, text.encode()[: end - begin - 1].ljust(end - begin, b"\0"), end - begin)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)
