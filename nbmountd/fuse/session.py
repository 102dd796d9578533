"""Serves a connection that somebody else mounted and initialised, through pyfuse3, and hands it back alive.

It does not know what the operations do, how the descriptor came to be, or who serves it next.

pyfuse3 keeps its session in module globals, so this module does too: one session a process. libfuse believes that it speaks
minor 13 of the protocol (see `LIBFUSE_MINOR`); what the kernel and we agreed on is in `InitAgreement`.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import pyfuse3
import trio

from nbmountd.fuse.agreement import OUT_HEADER, InitAgreement, init_request_for_libfuse

LIBFUSE_MINOR = 13
"""What we tell libfuse that the kernel speaks (libfuse 3.14 lib/fuse_lowlevel.c, read for each use of `proto_minor`).

From 9 on the sizes of entry, attr, open, read and write messages are today's, from 12 on create, mkdir and mknod carry the
umask; nothing that pyfuse3 serves changes later. Below 14 the splice path is off, which costs root a factor of 2.6. The price:
below 15 and 18 libfuse itself refuses notify_store and notify_delete with ENOSYS, so those are written here.
"""

NOTIFY_INVAL_INODE, NOTIFY_INVAL_ENTRY, NOTIFY_STORE, NOTIFY_DELETE, NOTIFY_RESEND = 2, 3, 4, 6, 7
"""Codes of `enum fuse_notify_code`."""

_STORE = struct.Struct("=QQII")
"""nodeid, offset, size, padding."""
_DELETE = struct.Struct("=QQII")
"""parent, child, length of the name, padding; the name with its NUL follows."""
_INVAL_INODE = struct.Struct("=Qqq")
"""nodeid, offset, length."""
_INVAL_ENTRY = struct.Struct("=QII")
"""parent, length of the name, flags; the name with its NUL follows."""
_EXPIRE_ONLY = 1

HANDSHAKE_TIMEOUT = 10.0
UNBLOCK_INTERVAL = 1.0
"""Seconds between the signals of `_reads_unblocked`."""

Ending = Literal["stopped", "unmounted"]


@dataclass
class _Session:
    number: int
    """The descriptor that libfuse reads and writes."""
    stop: trio.Event = field(default_factory=trio.Event)


_session: _Session | None = None


async def serve(
    operations: pyfuse3.Operations,
    fuse_fd: int,
    agreement: InitAgreement,
    *,
    resume: bool,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> Ending:
    """Answers the kernel's requests until `stop()` ("stopped") or until the mount is gone ("unmounted").

    `fuse_fd` stays the caller's and stays open, the mount stays as it is: what comes after the end waits in the kernel for
    the next `serve`. `resume`: an earlier process served this connection and may have died with requests in its hands; they
    are asked for again where the kernel can (`agreement.has_resend`). `task_status.started()` is called when the next thing
    is to answer requests. `operations.init()` has been called by then.

    Any exception of a handler but `FUSEError` comes out of here and takes the requests in flight with it (the next `serve`
    with `resume` gets them); so does cancellation. Raises RuntimeError if libfuse does not take the hand-shake, or if a
    session is running already.
    """
    global _session
    if _session is not None:
        raise RuntimeError("this process serves a mount already; pyfuse3 can do one")
    placeholder, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel:
        number = placeholder.detach()
        try:
            pyfuse3.init(operations, f"/dev/fd/{number}", set())
        except BaseException:
            os.close(number)
            raise
        session = _session = _Session(number)
        try:
            await _shake_hands(kernel, number)
            os.dup2(fuse_fd, number, inheritable=False)
            if resume and agreement.has_resend:
                send_notification(NOTIFY_RESEND)
            with _reads_unblocked():
                task_status.started()
                await _main_until(session.stop, number)
            return "stopped" if session.stop.is_set() else "unmounted"
        finally:
            _session = None
            pyfuse3.close(unmount=False)  # closes `number`


def stop() -> None:
    """Ends `serve` in order: requests that were taken are answered, no further one is taken. May be called at any time."""
    if _session is not None:
        _session.stop.set()


def send_notification(code: int, *parts: bytes | memoryview) -> None:
    """Writes one notification to the kernel, without the GIL.

    May wait for a request that this process has yet to answer (reference: page and inode locks), so call it in a thread, and
    never while a handler waits for that thread. Raises OSError: ENOENT when the kernel does not know the inode or entry,
    ENOTCONN when nothing is being served.
    """
    if _session is None:
        raise OSError(errno.ENOTCONN, "no session")
    header = OUT_HEADER.pack(OUT_HEADER.size + sum(len(part) for part in parts), code, 0)
    os.writev(_session.number, [header, *parts])


def notify_store(inode: int, offset: int, content: bytes | memoryview) -> None:
    """Puts `content` into the page cache; the file grows in the kernel's eyes if it ends behind its size."""
    send_notification(NOTIFY_STORE, _STORE.pack(inode, offset, len(content), 0), content)


def notify_delete(parent: int, child: int, name: bytes) -> None:
    """Forgets the entry and tells inotify watchers of `child` that it is gone."""
    send_notification(NOTIFY_DELETE, _DELETE.pack(parent, child, len(name), 0), name + b"\0")


def invalidate_inode(inode: int, *, offset: int = -1, length: int = 0) -> None:
    """Forgets attributes; with `offset` >= 0 also the cached pages of that range (`length` 0: to the end)."""
    send_notification(NOTIFY_INVAL_INODE, _INVAL_INODE.pack(inode, offset, length))


def invalidate_entry(parent: int, name: bytes, *, expire_only: bool = False) -> None:
    """Forgets what `name` leads to; with `expire_only` it is looked up again at its next use and not thrown away."""
    flags = _EXPIRE_ONLY if expire_only else 0
    send_notification(NOTIFY_INVAL_ENTRY, _INVAL_ENTRY.pack(parent, len(name), flags), name + b"\0")


async def _shake_hands(kernel: socket.socket, number: int) -> None:
    """Has libfuse answer an INIT of ours. A connection that is initialised already would only get EIO from it."""
    kernel.setblocking(False)
    kernel.send(init_request_for_libfuse(LIBFUSE_MINOR))
    answered = trio.Event()
    with trio.move_on_after(HANDSHAKE_TIMEOUT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_main_until, answered, number, 1)
            await trio.lowlevel.wait_readable(kernel)
            answered.set()
    if not answered.is_set():
        raise RuntimeError(f"libfuse did not answer FUSE_INIT within {HANDSHAKE_TIMEOUT:g} s")
    error = OUT_HEADER.unpack_from(kernel.recv(4096))[1]
    if error:
        raise RuntimeError(f"libfuse refused FUSE_INIT: {os.strerror(-error)}")


async def _main_until(event: trio.Event, number: int, most_tasks: int = 99) -> None:
    """Runs pyfuse3's loop until `event` or until it ends by itself.

    Its tasks are sent home by `notify_closing`, one after the other as they come to wait, until none is left. pyfuse3's
    `terminate` is not used: a task that is between poll and read when it comes reads a request and drops it unanswered.
    """

    async def end_main() -> None:
        await event.wait()
        pause = 0.0
        while True:
            trio.lowlevel.notify_closing(number)
            await trio.sleep(pause)
            pause = min(pause + 0.0001, 0.02)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_main)
        await pyfuse3.main(max_tasks=most_tasks)
        nursery.cancel_scope.cancel()


@contextmanager
def _reads_unblocked() -> Iterator[None]:
    """While inside, a signal each second ends a read(2) of the device that would wait for ever.

    A client that is killed between our poll and our read takes its request with it; pyfuse3 then sits in a blocking read
    that holds the GIL, and no thread of ours runs until some other request comes. The signal's EINTR (Python installs
    handlers without SA_RESTART) sends pyfuse3 back to its loop. Only the main thread can do this; elsewhere it is left out.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, UNBLOCK_INTERVAL, UNBLOCK_INTERVAL)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
