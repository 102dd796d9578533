"""Content of exactly one version: how much is asked for at a time, and of which provider.

It knows nothing of places, nor how the version is made sure of (onedata_client.py). Between tasks it shares how much is
asked for at a time.
"""

from __future__ import annotations

import trio

from nbmountd.backends.base import Sink
from nbmountd.backends.onedata_client import OnedataClient
from nbmountd.backends.onedata_spaces import Space
from nbmountd.errors import RemoteError, RemoteUnavailable
from nbmountd.model import Version

FIRST_READ, LONGEST_READ = 1024 * 1024, 8 * 1024 * 1024
"""Bytes of one request, of the last one up to a quarter more. Providers fetch from one another in pieces of 1 MiB or more, and
read in blocks of 10."""
READ_SECONDS = 2.0
"""So long a request for content should take at most; decides how much is asked for."""
GROWTH = 4
"""So many times the last size at most: a guess that is wrong by as much costs 8 s, of the 60 that a server may be silent."""


class Reads:
    """The ranged reads of one mount."""

    def __init__(self) -> None:
        self._size = FIRST_READ

    async def give(self, space: Space, id: str, version: Version | None, start: int, stop: int, sink: Sink) -> None:
        """The bytes [start, stop) to `sink`, in worker threads. Raises VersionMismatch, PastEnd, RemoteError."""
        while start < stop:
            upto = start + self._size
            if stop - upto <= self._size // 4:
                upto = stop  # a small rest is no request of its own: that costs two times the latency
            await self._part(space, id, version, start, upto, sink)
            start = upto

    async def exactly(self, client: OnedataClient, id: str, version: Version, start: int, stop: int) -> bytearray:
        """The bytes [start, stop), at most LONGEST_READ."""
        content = bytearray()
        await client.read(id, version, start, stop, content.extend)
        return content

    async def _part(self, space: Space, id: str, version: Version | None, start: int, stop: int, sink: Sink) -> None:
        given = 0

        def count(view: memoryview) -> None:
            nonlocal given
            given += len(view)
            sink(view)

        began = trio.current_time()
        try:
            await space.client.read(id, version, start, stop, count)
        except RemoteUnavailable:
            if version is None or given:
                raise
            for other in space.clients[1:]:
                # Bytes of exactly this version are the same everywhere. That another provider does not know them (yet),
                # or has another version, says nothing.
                try:
                    await other.read(id, version, start, stop, count)
                except RemoteError:
                    if given:
                        raise
                else:
                    return
            raise
        self._learn(stop - start, trio.current_time() - began)

    def _learn(self, count: int, seconds: float) -> None:
        if count >= self._size // 2:
            wanted = int(count / max(seconds, 1e-3) * READ_SECONDS)
            self._size = min(max(FIRST_READ, wanted, self._size // 2), self._size * GROWTH, LONGEST_READ)
