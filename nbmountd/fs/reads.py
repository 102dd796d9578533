"""Brings missing bytes of base versions here: one fetch a gap, shared by all who wait, and ahead of sequential readers.

State: for each content the fetches under way (`Fetch`), and the streams of readers seen (streams.py). A fetch writes to the
sparse file in its own thread and reports to the loop what has come; waiters look again after each report. Fetches that a
reader waits for and fetches ahead have runners of their own, so that one does not starve the other.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from nbmountd.backends.base import Backend
from nbmountd.disk.content import Content, ContentStore, Layer
from nbmountd.disk.extents import Extents
from nbmountd.errors import (
    LocalError,
    RemoteError,
    RemoteNotFound,
    RemoteProtocolError,
    RemoteTimeout,
    StaleFile,
    VersionMismatch,
)
from nbmountd.fs.nodes import Nodes
from nbmountd.fs.streams import Pace, Streams
from nbmountd.model import Version

URGENT_PIECE = 8 * 2**20
"""Longest single request that somebody waits for."""
SUMMED = 128 * 2**10
"""Requests end where blocks with a checksum do (disk/cache.py): who gets a part of one reads it again to sum it."""
LARGEST_READ = 2**20
"""Bytes that the kernel asks for at once (fuse/agreement.py); a larger read, of nobody but tests, makes the buffer larger."""
WHOLE_FILE = 256 * 2**10
"""Files up to this size are fetched whole at the first read: one request either way."""


@dataclass(eq=False)
class Fetch:
    content: Content
    start: int
    stop: int
    filled: int
    urgent: bool
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    error: Exception | None = None
    done: bool = False


@dataclass(eq=False)
class Activity:
    """What goes on for one content."""

    streams: Streams
    fetches: list[Fetch] = field(default_factory=list)
    progress: trio.Event = field(default_factory=trio.Event)
    held: trio.Event | None = None
    """While not None nothing is fetched; set when that is over."""

    def report(self) -> None:
        self.progress.set()
        self.progress = trio.Event()


class Reads:
    """Fetching for one mount. `remote_changed(content)` is called when the base version is gone from the remote."""

    def __init__(
        self,
        nodes: Nodes,
        store: ContentStore,
        backend: Backend,
        *,
        deadline: float,
        remote_changed: Callable[[Content], None],
    ) -> None:
        self._nodes = nodes
        self._store = store
        self._backend = backend
        self._deadline = deadline
        self._remote_changed = remote_changed
        self._active: dict[int, Activity] = {}
        self._pace = Pace()
        self._buffer = memoryview(bytearray(LARGEST_READ))
        self._urgent_send, self._urgent = trio.open_memory_channel[Fetch](float("inf"))
        self._ahead_send, self._ahead = trio.open_memory_channel[Fetch](float("inf"))

    # -- for readers --------------------------------------------------------------------------------------------------

    def read_now(self, content: Content, start: int, size: int) -> bytes | memoryview | None:
        """The bytes if they are here and the disk need not be waited for; else None. A view is valid until the next call."""
        self._follow(content, start, min(start + size, content.size))
        if content.missing(start, start + size):
            return None
        if len(self._buffer) < size:
            self._buffer = memoryview(bytearray(size))
        try:
            return content.read_now(self._buffer, start, size)
        except BlockingIOError:
            return None
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:  # this file system cannot say; then it is simply read
                raise
            return content.read(start, size)

    async def read(self, content: Content, start: int, size: int) -> bytes:
        """The bytes [start, start+size), short at the end of the file.

        Raises RemoteError, RemoteTimeout after the deadline, StaleFile when the version is gone and was not kept here.
        """
        await self.ensure(content, start, start + size)
        return await trio.to_thread.run_sync(self._store.read_later(content, start, size))

    async def ensure(
        self, content: Content, start: int, stop: int, layers: list[Layer] | None = None, *, patient: bool = False
    ) -> None:
        """Returns when nothing of [start, stop) is missing. Errors as `read`.

        `patient`: the deadline counts from the last byte that came, for somebody who does not keep a program waiting. From a
        remote that sends whole files only nobody else gets anything either: what comes first may be all but these bytes.
        """
        ranged = self._nodes.capabilities.ranged_reads
        watched = (start, stop) if ranged else (0, content.base_size)
        content.users += 1
        try:
            while True:
                left = _length(content.missing(*watched, layers))
                with trio.move_on_after(self._deadline):
                    await self._ensure(content, start, stop, layers)
                    return
                if (ranged and not patient) or _length(content.missing(*watched, layers)) >= left:
                    raise RemoteTimeout("the remote did not deliver the bytes in time")
        finally:
            self._store.release(content)

    async def _ensure(self, content: Content, start: int, stop: int, layers: list[Layer] | None) -> None:
        while gaps := content.missing(start, stop, layers):
            verify = self._store.verify_later(content, gaps)
            if verify is not None:
                verified = await trio.to_thread.run_sync(verify)
                verified()
                continue
            if content.stale or content.node.base_parent is None:
                raise StaleFile("the remote has another version, or none, and these bytes were never fetched")
            activity = self._activity(content)
            if activity.held is not None:
                await activity.held.wait()
                continue
            waited = [fetch for begin, end in gaps for fetch in self._request(content, begin, end, urgent=True)]
            await activity.progress.wait()
            for fetch in waited:
                if fetch.error is not None and content.missing(
                    max(start, fetch.filled), min(stop, fetch.stop), layers
                ):
                    raise fetch.error

    @asynccontextmanager
    async def held(self, content: Content) -> AsyncIterator[None]:
        """Inside, nothing of this content is being fetched: those who need something wait until it is over."""
        activity = self._activity(content)
        activity.held = released = trio.Event()
        try:
            for fetch in activity.fetches:
                fetch.scope.cancel()
            while activity.fetches:
                await activity.progress.wait()
            yield
        finally:
            activity.held = None
            released.set()
            activity.report()

    def closed(self, content: Content) -> None:
        """Nobody has the file open any longer: what is asked ahead of readers is not needed."""
        activity = self._active.get(content.node.ino)
        if activity is not None:
            activity.streams.clear()
            for fetch in activity.fetches:
                if not fetch.urgent:
                    fetch.scope.cancel()
            self._forget(content, activity)

    def _forget(self, content: Content, activity: Activity) -> None:
        if not activity.fetches and not activity.streams and activity.held is None:
            self._active.pop(content.node.ino, None)

    # -- asking -------------------------------------------------------------------------------------------------------

    def _activity(self, content: Content) -> Activity:
        activity = self._active.get(content.node.ino)
        if activity is None:
            activity = self._active[content.node.ino] = Activity(Streams(self._pace))
        return activity

    def _request(
        self, content: Content, start: int, stop: int, *, urgent: bool, piece: int = URGENT_PIECE
    ) -> list[Fetch]:
        """The fetches that will bring [start, stop): those under way, and new ones for the rest."""
        activity = self._activity(content)
        ranged = self._nodes.capabilities.ranged_reads
        if not ranged or content.base_size <= WHOLE_FILE:
            start, stop = 0, content.base_size
        unit = self._nodes.capabilities.read_unit
        start, stop = start - start % unit, -(-stop // unit) * unit
        under_way = [fetch for fetch in activity.fetches if fetch.start < stop and fetch.stop > start and not fetch.done]
        gaps = content.present.gaps(start, min(stop, content.base_size))
        wanted = Extents(gaps if ranged or not gaps else [(0, content.base_size)])
        for fetch in under_way:
            wanted.remove(fetch.start, fetch.stop)
        if wanted and not ranged:
            wanted.add(0, content.base_size)  # also when a part is here already: a whole file is all that can be asked for
        for begin, end in wanted:
            step = -(-(end - begin) // -(-(end - begin) // piece)) if ranged else end - begin  # none of them a small rest
            step += -step % SUMMED
            for at in range(begin, end, step):
                fetch = Fetch(content, at, min(at + step, end), at, urgent)
                activity.fetches.append(fetch)
                under_way.append(fetch)
                content.users += 1  # given back by _run
                (self._urgent_send if urgent else self._ahead_send).send_nowait(fetch)
        return under_way

    def _follow(self, content: Content, start: int, stop: int) -> None:
        """Notes a read, and asks ahead of a reader that goes forward (streams.py says how far)."""
        if content.present.covers(0, content.base_size) or content.base_stop == 0 or content.node.base_parent is None:
            return
        activity = self._activity(content)
        ahead = activity.streams.follow(start, stop, content.base_stop, held=activity.held is not None)
        if ahead is not None:
            self._request(content, ahead.start, ahead.stop, urgent=False, piece=ahead.piece)

    # -- fetching -----------------------------------------------------------------------------------------------------

    async def run(self, *, urgent: bool) -> None:
        """Fetches, one after the other, what was asked. Several of each kind are started by worker.py."""
        async for fetch in (self._urgent if urgent else self._ahead).clone():
            await self._run(fetch)

    async def _run(self, fetch: Fetch) -> None:
        content = fetch.content
        activity = self._activity(content)
        try:
            with fetch.scope:
                await self._fetch(fetch)
        except VersionMismatch as exc:
            content.stale = True
            fetch.error = StaleFile("the remote has another version, and these bytes were never fetched")
            fetch.error.__cause__ = exc
            self._remote_changed(content)
        except RemoteNotFound as exc:
            fetch.error = exc
            self._remote_changed(content)
        except (RemoteError, LocalError, OSError) as exc:
            fetch.error = exc
        finally:
            fetch.done = True
            activity.fetches.remove(fetch)
            activity.report()
            self._forget(content, activity)
            self._store.release(content)

    async def _fetch(self, fetch: Fetch) -> None:
        content = fetch.content
        version = content.node.base_version
        place = self._nodes.place(content.node)
        token = trio.lowlevel.current_trio_token()
        activity = self._activity(content)
        fill = self._store.fill(content, fetch.start)
        lock, open_ = threading.Lock(), True
        clock = trio.lowlevel.current_clock()  # the sink runs in a thread
        asked, first, last = clock.current_time(), 0.0, 0.0

        def note() -> None:
            fill.note()
            fetch.filled = fill.at
            activity.report()

        def sink(piece: memoryview) -> None:
            nonlocal first, last
            last = clock.current_time()
            first = first or last
            with lock:  # a thread that was left behind must not write to a descriptor that is another file's by now
                if not open_:
                    raise RemoteTimeout("nobody waits for these bytes any more")
                if fill.at + len(piece) > fetch.stop:
                    raise RemoteProtocolError("more bytes came than were asked for")
                fill.write(piece)
            token.run_sync_soon(note, idempotent=True)

        try:
            await self._backend.read(place, Version(version) if version else None, fetch.start, fetch.stop, sink)
        finally:
            with lock:
                open_ = False
            note()  # what came before an error or the end is there too
            fill.close()
        if fill.at != fetch.stop:
            raise RemoteProtocolError(f"{fill.at - fetch.start} bytes came of {fetch.stop - fetch.start}")
        self._pace.measured(first - asked, fetch.stop - fetch.start, last - first)


def _length(ranges: Iterable[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in ranges)
