"""Takes the body of a download: checks that it is the range and the version that were asked for, then gives its bytes on.

It runs in the worker thread of the request and knows nothing of items: `check` asks the server.

A download says nothing of its version. So when its first bytes are here the item is asked: its version was known before the
request, and the server never goes back to an older content, so if the version is still the same now, the content that the
server had opened in between is of that version. Not a byte is given away before that.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from nbmountd.backends.base import Sink
from nbmountd.backends.http_exchange import Incoming
from nbmountd.errors import RemoteProtocolError

CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")


class Download:
    """Receives [start, stop) of a file. `ranged` tells afterwards whether the server honoured the range; None: no answer."""

    def __init__(self, what: str, start: int, stop: int, sink: Sink, check: Callable[[], None]) -> None:
        self.ranged: bool | None = None
        self._what = what
        self._start = start
        self._stop = stop
        self._sink = sink
        self._check = check

    def __call__(self, incoming: Incoming) -> None:
        skip = self._skip(incoming)
        left = self._stop - self._start
        checked = False
        for piece in incoming.pieces():
            if not checked:
                self._check()
                checked = True
            part = piece[skip : skip + left]
            skip = max(0, skip - len(piece))
            if part:
                left -= len(part)
                self._sink(part)
            if not left:
                return
        self._check()
        raise RemoteProtocolError(f"{self._what}: the answer is {left} bytes short")

    def _skip(self, incoming: Incoming) -> int:
        """Bytes of the body before those that were asked for."""
        if incoming.status == 206:
            match = CONTENT_RANGE.fullmatch(incoming.headers.get("content-range", "").strip())
            if match is None or (int(match[1]), int(match[2])) != (self._start, self._stop - 1):
                self._check()
                raise RemoteProtocolError(f"{self._what}: a partial answer of another range than asked for")
            self.ranged = True
            return 0
        length = incoming.headers.get("content-length", "")
        if re.fullmatch(r"[0-9]{1,19}", length) and int(length) < self._stop:
            self._check()
            raise RemoteProtocolError(f"{self._what}: the file ends at {length}, before {self._stop}")
        self.ranged = False
        return self._start
