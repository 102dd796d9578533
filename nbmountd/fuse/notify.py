"""Tells the kernel what changed that it did not ask for, from one thread of its own.

A notification can wait in the kernel for a lock that is held by a request which waits for us: on the loop that would be a
deadlock of the whole mount. So the loop only queues; the thread writes; only names and attributes are ever invalidated
(content never changes under an inode number), and before the session ends the notifier is disarmed.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable

import trio

from nbmountd.fuse import session
from nbmountd.log import get_logger

QUEUE_LIMIT = 20_000
"""Beyond this, the oldest news is dropped: the kernel's timeouts end it."""

TOLD_DEADLINE = 2.0
"""Seconds; a notification can wait for a request that waits for us, so nobody waits for one for ever."""

_log = get_logger(__name__)


class KernelNotifier:
    """A `fs.nodes.KernelView` that writes to the session. Started with `start`, ended with `disarm`."""

    def __init__(self, *, expire_only: bool) -> None:
        """`expire_only`: the kernel can be told to look a name up again without throwing its inode and pages away."""
        self._expire_only = expire_only
        self._queue: queue.SimpleQueue[tuple[int, bytes | None] | Callable[[], None] | None] = queue.SimpleQueue()
        self._armed = False
        self._thread = threading.Thread(target=self._run, name="notify", daemon=True)

    def start(self) -> None:
        """From now on news is passed on. The session must be serving."""
        self._armed = True
        self._thread.start()

    def disarm(self) -> None:
        """Nothing is written to the kernel any more; a write under way may still end. Does not wait."""
        self._armed = False
        self._queue.put(None)

    async def wait_told(self) -> None:
        """Returns when the kernel has been told everything that is queued now, or after `TOLD_DEADLINE`."""
        if not self._armed:
            return
        told, token = trio.Event(), trio.lowlevel.current_trio_token()
        self._queue.put(lambda: token.run_sync_soon(told.set))
        with trio.move_on_after(TOLD_DEADLINE):
            await told.wait()

    def entry_changed(self, parent: int, name: str) -> None:
        self._put((parent, os.fsencode(name)))

    def attributes_changed(self, ino: int) -> None:
        self._put((ino, None))

    def _put(self, item: tuple[int, bytes | None]) -> None:
        if self._armed and self._queue.qsize() < QUEUE_LIMIT:
            self._queue.put(item)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None and self._armed:
            if callable(item):
                item()
                continue
            ino, name = item
            try:
                if name is None:
                    session.invalidate_inode(ino)
                else:
                    session.invalidate_entry(ino, name, expire_only=self._expire_only)
            except FileNotFoundError:
                continue  # the kernel does not know it: nothing to forget
            except OSError as exc:
                _log.debug("the kernel was not told", inode=ino, cause=exc)
