"""Content of exactly one version, although answers for content tell no version.

It knows nothing of places. Each part is held until a look at the attributes, made after its last byte came, shows that
the version still stands; only then it is given away. Between tasks it shares how much is asked for at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from nbmountd.backends.onedata_client import OnedataClient, PastEnd
from nbmountd.backends.onedata_spaces import Space
from nbmountd.errors import RemoteError, RemoteUnavailable, VersionMismatch
from nbmountd.model import Version

FIRST_READ, LONGEST_READ = 1024 * 1024, 8 * 1024 * 1024
"""Bytes of one request. Providers fetch from one another in pieces of 1 MiB or more, and read in blocks of 10."""
READ_SECONDS = 2.0
"""So long a request for content should take at most; decides how much is asked for."""
GIVEN_PIECE = 256 * 1024
"""Bytes given to a sink at a time."""


class Reads:
    """The ranged reads of one mount."""

    def __init__(self) -> None:
        self._size = FIRST_READ

    async def give(
        self, space: Space, id: str, version: Version | None, start: int, stop: int, sink: Callable[[memoryview], None]
    ) -> None:
        """The bytes [start, stop) to `sink`, in a worker thread. Raises VersionMismatch, PastEnd, RemoteError."""
        while start < stop:
            upto = min(stop, start + self._size)
            content = await self._part(space, id, version, start, upto)
            await trio.to_thread.run_sync(_give, content, sink)
            start = upto

    async def exactly(self, client: OnedataClient, id: str, version: Version | None, start: int, stop: int) -> bytearray:
        """The bytes [start, stop) from one provider, at most LONGEST_READ."""
        began = trio.current_time()
        try:
            content = await client.read(id, start, stop)
        except PastEnd:
            await self._check(client, id, version)
            raise
        self._learn(stop - start, trio.current_time() - began)
        await self._check(client, id, version)
        return content

    async def _part(self, space: Space, id: str, version: Version | None, start: int, stop: int) -> bytearray:
        try:
            return await self.exactly(space.client, id, version, start, stop)
        except RemoteUnavailable:
            if version is None:
                raise
            for other in space.clients[1:]:
                # Bytes of exactly this version are the same everywhere. That another provider does not know them (yet),
                # or has another version, says nothing.
                try:
                    return await self.exactly(other, id, version, start, stop)
                except RemoteError:
                    continue
            raise

    async def _check(self, client: OnedataClient, id: str, version: Version | None) -> None:
        if version is not None and (await client.attributes(id)).version != version:
            raise VersionMismatch("the file has another version now")

    def _learn(self, count: int, seconds: float) -> None:
        if count >= self._size // 2:
            wanted = int(count / max(seconds, 1e-3) * READ_SECONDS)
            self._size = min(max(FIRST_READ, wanted, self._size // 2), self._size * 2, LONGEST_READ)


def _give(content: bytearray, sink: Callable[[memoryview], None]) -> None:
    with memoryview(content) as view:
        for start in range(0, len(view), GIVEN_PIECE):
            sink(view[start : start + GIVEN_PIECE])
