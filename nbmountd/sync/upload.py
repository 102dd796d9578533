"""The bytes of an upload: a snapshot of a content, read in order from the disk while writing to the file goes on.

What is not here (the unchanged rest of a large file) is fetched from the base version on the way, a window at a time; a
snapshot is never held in memory. It knows no backend.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Awaitable, Callable

import trio

from nbmountd.backends.base import Piece
from nbmountd.disk.content import Content, ContentStore, Layer
from nbmountd.disk.layers import LOST, Segment, pread

WINDOW = 8 * 2**20
"""Missing bytes are fetched in pieces of this size while the upload runs."""

COMPARED = 128 * 2**10
"""By so many bytes a file is known again of which nothing else is here. A guess."""

Ensure = Callable[[Content, int, int, list[Layer]], Awaitable[None]]


class Snapshot:
    """The content as it was when the upload began; a `Body` for backends. `layers` are frozen by the caller.

    `read` is called in worker threads of the loop that made the snapshot; it may raise RemoteError or StaleFile when
    missing bytes cannot be fetched, OSError when the local disk has lost some. With `algorithm` (a hashlib name), `digest`
    is that of the bytes read from the start.
    """

    def __init__(
        self, store: ContentStore, content: Content, layers: list[Layer], ensure: Ensure, algorithm: str | None = None
    ) -> None:
        self._store = store
        self._content = content
        self.layers = layers
        self._ensure = ensure
        self._algorithm = algorithm
        self.size = layers[-1].size if layers else content.base_size
        self.sent = 0
        ours = {layer.fd for layer in layers}
        self.whole = all(
            not segment.missing and (segment.fd is None or segment.fd in ours)
            for segment in content.segments(0, self.size, layers)
        )
        """Nothing of the base is in it: the frozen layers can be read without asking the loop."""
        self._hash = hashlib.new(algorithm) if algorithm else None

    @property
    def top(self) -> int:
        """The number of its newest layer, by which it is known again after a restart; 0 if it has none."""
        return self.layers[-1].id if self.layers else 0

    def read(self, count: int = -1, /) -> bytes:
        left = self.size - self.sent
        count = min(left, WINDOW if count is None or count < 0 else count)
        if count <= 0:
            return b""
        data = self.read_at(self.sent, count)
        self.sent += len(data)
        if self._hash is not None:
            self._hash.update(data)
        return data

    def read_at(self, start: int, count: int) -> bytes:
        """Bytes from anywhere in the snapshot; in a worker thread."""
        if self.whole:
            return self._content.read(start, count, layers=self.layers)
        call: Callable[[], bytes] = trio.from_thread.run(self._gather, start, count)
        return call()

    async def _gather(self, start: int, count: int) -> Callable[[], bytes]:
        if self._content.missing(start, start + count, self.layers):
            await self._ensure(self._content, start, min(self.size, start + max(count, WINDOW)), self.layers)
        return self._store.read_later(self._content, start, count, self.layers)

    async def fetch_all(self) -> None:
        """Brings everything that is missing here, where the next process finds it. Raises as `read`."""
        await self._ensure(self._content, 0, self.size, self.layers)
        self._store.save_present(self._content)

    async def fetch_some(self) -> None:
        """The same with its last bytes if nothing of it is here, so that it can be compared with what the remote has."""
        if self.size and not self.has_some:
            await self._ensure(self._content, max(0, self.size - COMPARED), self.size, self.layers)
            self._store.save_present(self._content)

    def agrees(self, start: int, piece: memoryview) -> bool:
        """Whether these bytes from `start` on are those of the snapshot, as far as it has them here; in a worker thread."""
        stop = start + len(piece)
        if self.whole:
            segments = self._content.segments(start, stop, self.layers)
        else:
            segments = trio.from_thread.run_sync(self._content.segments, start, stop, self.layers)
        return stop <= self.size and all(
            segment.missing or _bytes_of(segment) == piece[segment.start - start : segment.stop - start]
            for segment in segments
        )

    @property
    def here(self) -> bool:
        """Whether all of it can be read without asking the remote."""
        return not self._content.missing(0, self.size, self.layers)

    @property
    def has_some(self) -> bool:
        """Whether any of it can be."""
        return any(not segment.missing for segment in self._content.segments(0, self.size, self.layers))

    def rewind(self) -> None:
        self.sent = 0
        if self._algorithm is not None:
            self._hash = hashlib.new(self._algorithm)

    @property
    def digest(self) -> str | None:
        """Hex digest of what was read since the start; None without an algorithm or when not all was read."""
        return self._hash.hexdigest() if self._hash is not None and self.sent == self.size else None

    def pieces(self) -> list[Piece]:
        """The ranges that differ from the base version, for a remote with ranged writes."""
        ours = {layer.fd for layer in self.layers}
        ranges: list[tuple[int, int]] = []
        for segment in self._content.segments(0, self.size, self.layers):
            if segment.fd == LOST:
                raise OSError(errno.EIO, "the local disk has lost some of these bytes")
            if segment.missing or (segment.fd is not None and segment.fd not in ours):
                continue  # as the base has it
            if ranges and ranges[-1][1] == segment.start:
                ranges[-1] = (ranges[-1][0], segment.stop)
            else:
                ranges.append((segment.start, segment.stop))
        return [Piece(start, stop, self.read_at) for start, stop in ranges]


def _bytes_of(segment: Segment) -> bytes:
    length = segment.stop - segment.start
    return bytes(length) if segment.fd is None else pread(segment.fd, length, segment.start)
