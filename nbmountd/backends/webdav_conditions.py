"""What a change depends on, put so that the server at hand checks it, or asked for just before where it does not.

It knows nothing of the changes themselves. Between tasks only the versions whose ETags were weak when last seen are
shared; losing one costs a request, nothing else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from nbmountd.backends.http_errors import error_of
from nbmountd.backends.http_exchange import Answer
from nbmountd.backends.webdav_entries import strong_tag
from nbmountd.backends.webdav_habits import Habits
from nbmountd.errors import (
    NameRefused,
    ParentMissing,
    RemoteDenied,
    RemoteError,
    RemoteExists,
    RemoteLocked,
    RemoteNotFound,
    VersionMismatch,
)
from nbmountd.model import Entry, Kind, Place, Version

WEAK_TIME = 1.1
"""Seconds after which Apache's ETag of a file just written is strong for certain: it is weak for the first second."""

UNSURE = frozenset({400, 403, 404, 405, 409, 500, 502})
"""Answers to a change that servers give for a missing parent or a taken name as well: worth a look."""

SendOn = Callable[[dict[str, str]], Awaitable[Answer]]
"""Sends one request with these headers more."""


class Conditions:
    """The conditions of one share. `stat` asks the server for an entry."""

    def __init__(self, habits: Habits, stat: Callable[[Place], Awaitable[Entry]]) -> None:
        self._habits = habits
        self._stat = stat
        self._young: set[Version] = set()
        self._less_young: set[Version] = set()
        self._young_since = 0.0
        self._weak_for_ever = False
        """The server never takes its own ETags for strong ones."""

    def saw_weak(self, version: Version) -> None:
        """The ETag of `version` was called weak just now."""
        self._forget_grown()
        self._young.add(version)

    def tag(self, version: Version) -> str | None:
        """The tag of `version` if the server honours conditions and it is not known to be weak still."""
        self._forget_grown()
        if not self._habits.conditions or version in self._young or version in self._less_young:
            return None
        return strong_tag(version)

    def _forget_grown(self) -> None:
        """Keeps the versions whose ETags were weak when last seen for WEAK_TIME at least and twice that at most."""
        now = trio.current_time()
        if now - self._young_since > WEAK_TIME:
            self._less_young = self._young if now - self._young_since < 2 * WEAK_TIME else set()
            self._young = set()
            self._young_since = now

    async def if_free(self, place: Place, send: SendOn) -> Answer:
        """`send` on the condition that nothing is at `place`, checked by the server or else just before."""
        if not self._habits.conditions:
            await self.must_be_free(place)
        answer = await send({"If-None-Match": "*"})
        if answer.status == 412:
            raise RemoteExists(f"{place} exists already")
        return answer

    async def if_version(
        self, place: Place, version: Version, send: SendOn, *, again: Callable[[], None] = lambda: None
    ) -> Answer:
        """`send` on the condition that `place` has `version`, checked by the server or else just before.

        A file that was written less than a second ago has to grow older first, where its ETag is weak for so long: what is
        only asked before may have changed when the request arrives, and somebody else's bytes would be overwritten. Raises
        VersionMismatch, RemoteNotFound. `again` is called before `send` is called once more.
        """
        await self.grown(place, version)
        tag = strong_tag(version) if self._habits.conditions and not self._weak_for_ever else None
        for last in (False, True) if tag is not None else ():
            answer = await send({"If-Match": f'"{tag}"'})
            if answer.status != 412:
                return answer
            again()
            await self.must_have(place, version)  # a 412 for the right version: the server calls its ETag weak still
            if not last:
                await trio.sleep(WEAK_TIME)
        self._weak_for_ever = tag is not None or self._weak_for_ever
        await self.must_have(place, version)
        return await send({})

    async def grown(self, place: Place, version: Version) -> None:
        """Returns when the ETag of `version` at `place` should be strong. Raises VersionMismatch, RemoteNotFound."""
        if not self._habits.conditions or self._weak_for_ever or strong_tag(version) is None or self.tag(version) is not None:
            return
        await self.must_have(place, version)  # else there is nothing to wait for
        await trio.sleep(WEAK_TIME)
        self._young.discard(version)
        self._less_young.discard(version)

    async def must_have(self, place: Place, version: Version) -> Entry:
        """The entry at `place`. Raises VersionMismatch if it has another version."""
        entry = await self._stat(place)
        if entry.version != version:
            raise VersionMismatch(f"{place} is {entry.version} now, not {version}")
        return entry

    async def must_be_free(self, place: Place) -> None:
        try:
            await self._stat(place)
        except RemoteNotFound:
            return
        raise RemoteExists(f"{place} exists already")

    async def parent_must_be(self, place: Place) -> None:
        try:
            parent = await self._stat(Place(place.path[:-1]))
        except RemoteNotFound:
            raise ParentMissing(f"the directory of {place} is not there") from None
        if parent.kind is not Kind.DIRECTORY:
            raise ParentMissing(f"the parent of {place} is no directory")

    async def explained(self, answer: Answer, what: str, place: Place, *, replacing: bool = False) -> RemoteError:
        """The error that `answer` to a change at `place` means, after a look where its status has several meanings.

        `replacing`: something is there, and was to be replaced.
        """
        if answer.status == 207:
            return RemoteLocked(f"{what}: the server did a part of it only")
        if answer.status in UNSURE:
            try:
                await self.parent_must_be(place)
                if not replacing:
                    await self.must_be_free(place)
            except (ParentMissing, RemoteExists) as exc:
                return exc
            if answer.status == 400:
                return NameRefused(f"{what}: 400: the server does not accept the name")
            if answer.status in (404, 409):
                return RemoteDenied(f"{what}: {answer.status}, though the parent is there and the name is free")
        return error_of(answer, what)
