"""Recognises a request that a worker carried out and could not answer before it died.

The kernel sends such a request again (FUSE_NOTIFY_RESEND) and does not say that it did. Made a second time, a rename would find
nothing to rename and an exclusive create would find its own file. Between the commit of a change and its answer nothing is
awaited, so at most one change of a dead worker is unanswered: the last one. Its request is written down in the very
transaction that makes the change.

Only a worker that has just taken over looks there, once and not for long, and only for the same request of the same thread:
whoever has had the answer cannot be waiting for it. It does not know what the requests do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from nbmountd.disk.database import Database, Transaction

RESEND_WINDOW = 5.0
"""Seconds after the start in which requests come again; they are the first that a new worker reads."""
_KEY = "last_change"

_asked: ContextVar[str | None] = ContextVar("asked", default=None)


class Repeats:
    """The last change of one mount. `resumed`: requests of an earlier worker may come again."""

    def __init__(self, database: Database, *, resumed: bool) -> None:
        self._last = database.get_meta(_KEY) if resumed else None
        self._until = time.monotonic() + RESEND_WINDOW

    def carried_out(self, request: str) -> int | None:
        """The inode that the request was about, if it was carried out before; else None. Says so once."""
        if self._last is None:
            return None
        ino, _, last = self._last.partition(" ")
        if last != request:
            if time.monotonic() > self._until or _thread_of(last) == _thread_of(request):
                self._last = None  # that thread asks for something else, so it has had its answer
            return None
        self._last = None
        return int(ino)

    @contextmanager
    def asked(self, request: str) -> Iterator[None]:
        """Inside, `note` notes down this request. `request` names operation, arguments and thread, in ASCII."""
        token = _asked.set(request)
        try:
            yield
        finally:
            _asked.reset(token)

    def note(self, change: Transaction, ino: int) -> None:
        """Writes the request down beside the change that it asks for; `ino` is what it made, or 0."""
        request = _asked.get()
        if request is not None:
            change.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_KEY, f"{ino} {request}"))


def _thread_of(request: str) -> str:
    """The thread in a request as fuse/operations.py writes it: "('rename', 4711, ...)"."""
    return request.split(", ", 2)[1] if request.count(", ") >= 2 else ""
