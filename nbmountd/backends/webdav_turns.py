"""Turns at the directories of a share: of all nbmountds that change names in one, only one does so at a time.

It knows nothing of what is changed. A server tests the condition of a request and carries it out in two steps, so that of
two requests of one moment both can pass (Apache 2.4.71: 262 of 300 rounds of six PUTs on one condition had more than one
winner, 59 of 300 with PUT beside and a conditional MOVE). WebDAV's own locks do not help there: under concurrent LOCKs and
UNLOCKs mod_dav_fs forgets locks that are held (444 of 1,500). What excludes is mkdir(2), so a turn is a collection of a
fixed hidden name: MKCOL succeeds for one. Uploads of one mount in one directory share a turn, so that many files cost few.

Who is killed leaves the collection behind: it is removed by whoever has watched it for STALE seconds. No turn lasts that
long. Other clients of the server know nothing of turns; for those only the conditions of requests stand.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import trio

from nbmountd.backends.http_errors import error_of
from nbmountd.backends.multistatus import DAV
from nbmountd.backends.webdav_client import BASIC_PROPERTIES, WebDAVClient
from nbmountd.backends.webdav_entries import Addresses
from nbmountd.errors import RemoteError, RemoteLocked, RemoteNotFound, RemoteTimeout
from nbmountd.model import Place

log = logging.getLogger(__name__)

SHARED = 2.0
"""Seconds from its beginning in which further changes join a turn."""

LONGEST = 5.0
"""Seconds for what one change does in its turn."""

ENDING = 3.0
"""Seconds in which ending a turn is tried again."""

STALE = 12.0
"""Seconds after which a turn seen unchanged is taken for one of a killed process. More than those three together."""

PATIENCE = 20.0
"""Seconds to wait for a turn; then the step is tried again later."""

PAUSE = 0.1
"""Seconds between two turns of one mount that has more to do, so that others, who ask at least as often, get theirs."""

LOOK = 1.0
"""Seconds between two looks at a turn that others have."""

NO_PLACE = frozenset({400, 404, 409})
"""Answers to MKCOL that mean that the directory is not there, or can hold no more names below (a path near the limit)."""

REFUSED = frozenset({403, 405})
"""Answers to MKCOL when the name is taken. 403 also when the directory is not ours to write to."""


class DirectoryMissing(RemoteNotFound):
    """There is no turn at a directory that is not there, and nothing to be changed in it."""

    def __init__(self, directory: Place) -> None:
        super().__init__(f"the directory {directory} is not there")
        self.directory = directory


@dataclass
class _Turn:
    """`users` changes run in it. `open`: others may join. `changed` is set when it has been got or is over."""

    directory: Place
    users: int = 0
    open: bool = False
    since: float = 0.0
    exists: bool = False
    changed: trio.Event = field(default_factory=trio.Event)


class Turns:
    """The turns of one share, shared by all its tasks. `name` is that of the collection."""

    def __init__(self, client: WebDAVClient, addresses: Addresses, name: str) -> None:
        self._client = client
        self._addresses = addresses
        self._name = name
        self._turns: dict[tuple[str, ...], _Turn] = {}
        self._rest_until: dict[tuple[str, ...], float] = {}

    @asynccontextmanager
    async def at(self, *directories: Place) -> AsyncIterator[None]:
        """Alone among nbmountds in the directories. Raises RemoteLocked when others do not come to an end, DirectoryMissing.

        What is done in it takes LONGEST at most; then it is cancelled, and RemoteTimeout is in doubt.
        """
        async with AsyncExitStack() as stack:
            for path in sorted({directory.path for directory in directories}):  # the same order everywhere: no deadlock
                await stack.enter_async_context(self._one(Place(path)))
            with trio.move_on_after(LONGEST) as scope:
                yield
            if scope.cancelled_caught:
                raise RemoteTimeout(f"{directories[0]}: no end of a change in {LONGEST:g} s", in_doubt=True)

    def moved(self, source: Place, target: Place) -> None:
        """The directory, in which this share has the turn, has another name now."""
        if (turn := self._turns.get(source.path)) is not None:
            turn.directory = target

    @asynccontextmanager
    async def _one(self, directory: Place) -> AsyncIterator[None]:
        turn = await self._join(directory)
        try:
            yield
        finally:
            turn.users -= 1
            if not turn.users:
                await self._end(directory, turn)

    async def _join(self, directory: Place) -> _Turn:
        path = directory.path
        while (turn := self._turns.get(path)) is not None:
            if turn.open and trio.current_time() - turn.since < SHARED:
                turn.users += 1
                return turn
            await turn.changed.wait()
        turn = self._turns[path] = _Turn(directory)
        try:
            await trio.sleep_until(self._rest_until.pop(path, 0.0))
            turn.exists = await self._begin(directory)
        except BaseException:
            self._over(path, turn)
            raise
        turn.open, turn.since, turn.users = True, trio.current_time(), 1
        turn.changed.set()
        turn.changed = trio.Event()
        return turn

    async def _end(self, directory: Place, turn: _Turn) -> None:
        turn.open = False
        if turn.exists:
            with trio.move_on_after(ENDING, shield=True):
                await self._remove(self._path(turn.directory))
        now = trio.current_time()
        if now - turn.since >= SHARED:
            self._rest_until[directory.path] = now + PAUSE
        self._over(directory.path, turn)

    def _over(self, path: tuple[str, ...], turn: _Turn) -> None:
        del self._turns[path]
        turn.changed.set()

    async def _begin(self, directory: Place) -> bool:
        """Whether the collection was made; False where there can be none, and so no other's turn either."""
        try:
            return await self._wait_and_begin(directory)
        except RemoteError as exc:
            exc.in_doubt = False  # of the change itself nothing was sent
            raise

    async def _wait_and_begin(self, directory: Place) -> bool:
        path = self._path(directory)
        began = seen_since = next_look = trio.current_time()
        seen: tuple[str, str] | None = None
        refused = False
        while True:
            answer = await self._client.mkcol(path)
            if answer.status < 300:
                return True
            now = trio.current_time()
            if answer.status in NO_PLACE:
                # Without a turn nothing may be changed: others may make the directory anew, and be at work in it.
                if not await self._is_there(directory):
                    raise DirectoryMissing(directory)
                if refused:
                    return False
                refused = True
            elif answer.status not in REFUSED:
                raise error_of(answer, f"MKCOL {path}")
            if now - began > PATIENCE:
                raise RemoteLocked(f"{directory}: other programs have been changing it for {PATIENCE:g} s")
            if answer.status == 403 or now >= next_look:
                there = await self._look(path)
                next_look = now + LOOK
                if there is None and answer.status == 403 and now - began > 3 * PAUSE:
                    return False  # we may not write here
                if there is not None and there == seen and now - seen_since > STALE:
                    await self._break(path, there)
                elif there != seen:
                    seen, seen_since = there, now
            await trio.sleep(random.uniform(0.2, 0.8) * PAUSE)

    async def _is_there(self, directory: Place) -> bool:
        path = self._addresses.path(directory, directory=True)
        resources, answer = await self._client.propfind(path, 0, BASIC_PROPERTIES)
        if answer.status in (400, 403, 404, 409, 410):  # 400 and 403 below a file
            return False
        if answer.status >= 300:
            raise error_of(answer, f"PROPFIND {path}")
        return any(resource.collection for resource in resources)

    async def _remove(self, path: str) -> None:
        """Never twice when the first may have been carried out: by then it could be the turn of somebody else."""
        while True:
            try:
                answer = await self._client.delete(path, {})
            except RemoteError as exc:
                if exc.in_doubt:
                    return  # if it is there still, it is ended as that of a killed process
            else:
                if answer.status not in (423, 429, 503):
                    return
            await trio.sleep(PAUSE)

    async def _look(self, path: str) -> tuple[str, str] | None:
        """What tells the collection from the next of that name; None if there is none."""
        resources, answer = await self._client.propfind(path, 0, BASIC_PROPERTIES)
        if answer.status in (404, 410):
            return None
        if answer.status >= 300 or not resources:
            raise error_of(answer, f"PROPFIND {path}")
        properties = resources[0].properties
        return properties.get(DAV + "getetag", ""), properties.get(DAV + "getlastmodified", "")

    async def _break(self, path: str, seen: tuple[str, str]) -> None:
        log.info("removing %s, left by a process that was killed", path)
        tag = seen[0].removeprefix("W/")
        await self._client.delete(path, {"If": f"<{self._client.http.origin}{path}> ([{tag}])"} if tag else {})

    def _path(self, directory: Place) -> str:
        return self._addresses.path(Place((*directory.path, self._name)), directory=True)
