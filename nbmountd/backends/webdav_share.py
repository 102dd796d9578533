"""A WebDAV share that one kind of server serves: each verb as the fewest requests that keep its promises there.

It knows nothing of how requests travel (http.py), how a listing is written (multistatus.py) or which server it is: its
habits are given. Where a server does not check conditions itself, the check is one PROPFIND just before the change.
Where a cut PUT would damage the target, the bytes go to a hidden name beside it and are moved over. What WebDAV has no
place for is kept in a property of ours (webdav_overlay.py) where the server keeps such.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import replace

import trio

from nbmountd.backends.base import Body, Change, NoTicket, Piece, Sink, Ticket
from nbmountd.backends.http_errors import error_of
from nbmountd.backends.http_exchange import Answer
from nbmountd.backends.multistatus import DAV, Resource
from nbmountd.backends.webdav_client import BASIC_PROPERTIES, OVERLAY_PROPERTIES, QUOTA_PROPERTIES, WebDAVClient
from nbmountd.backends.webdav_conditions import UNSURE, Conditions, SendOn
from nbmountd.backends.webdav_entries import Addresses, Directory, entry_of, parse_date, parse_etag
from nbmountd.backends.webdav_habits import Habits
from nbmountd.backends.webdav_overlay import PROPERTY, Overlay, bounded, parse, seen, update_body, wanted
from nbmountd.backends.webdav_reads import Reads
from nbmountd.backends.webdav_turns import DirectoryMissing, Turns
from nbmountd.config import WebDAVOptions
from nbmountd.errors import (
    NameRefused,
    ParentMissing,
    RemoteDenied,
    RemoteError,
    RemoteExists,
    RemoteLocked,
    RemoteNotFound,
    RemoteProtocolError,
    RemoteUnsupported,
    VersionMismatch,
)
from nbmountd.model import Attributes, Capabilities, Entry, Kind, Place, Quota, Version

log = logging.getLogger(__name__)

TEMPORARY = ".nbmountd-upload-"
"""Names that begin so are uploads under way: never shown, removed when older than TEMPORARY_AGE."""

TEMPORARY_AGE = 24 * 3600
"""Seconds by the server's own clock."""

CUT_PAUSE = 0.3
"""Seconds within which a server has begun with a request that was cut."""

DIRECT_LIMIT = 1024 * 1024
"""Bytes of a body up to which it is put straight to its name.

Apache tests the condition of a PUT when it begins and not again when it ends (2.4.71: a change by another client during
the body is lost). So a body that takes its time goes to a name beside, and the condition is tested at the MOVE.
"""

TURN_LIMIT = 64 * 1024
"""The same where nbmountds take turns: a turn lasts as long as the body, and no longer than webdav_turns.LONGEST."""

TURN = TEMPORARY + "turn"
"""The collection that a turn is. It begins as the others do, so that no nbmountd shows it."""

TURN_AGE = 60
"""Seconds by the server's own clock after which a turn seen in a listing is one of a killed process, and removed."""

REFUSALS = frozenset({400, 403, 405, 409, 413, 415, 422, 501, 507})
"""Answers to PROPPATCH that mean "not this property", now and later."""


class WebDAVShare:
    """The verbs of a `Backend` that ask the server. `overlay`: the server keeps dead properties."""

    def __init__(
        self,
        client: WebDAVClient,
        addresses: Addresses,
        habits: Habits,
        options: WebDAVOptions,
        *,
        read_only: bool,
        overlay: bool = False,
    ) -> None:
        self.habits = habits
        self._client = client
        self._addresses = addresses
        self._options = options
        self._read_only = read_only
        self._overlay = overlay
        self._conditions = Conditions(habits, self.stat)
        self._reads = Reads(client, addresses, self._conditions)
        self._turns = Turns(client, addresses, TURN)

    @property
    def root_url(self) -> str:
        return self._addresses.url(Place())

    def capabilities(self) -> Capabilities:
        """What can be done with the share, as far as it is known now."""
        overlay = self._overlay
        return Capabilities(
            ranged_reads=not self._reads.ranges_ignored,
            conditional_writes=self.habits.conditions,
            strong_versions=self.habits.strong_versions,
            native_mode=overlay,
            native_mtime=overlay,
            mtime_granularity_ns=1 if overlay else 1_000_000_000,
            native_symlinks=overlay,
            native_xattrs=overlay,
            max_name_bytes=self.habits.max_name_bytes,
            names=self.habits.names,
            connections=self._options.connections,
        )

    # --- looking ---

    async def stat(self, place: Place) -> Entry:
        path = self._addresses.path(place)
        resources, answer = await self._client.propfind(path, 0, self._properties())
        if answer.status >= 300:
            raise await self._not_there(answer, place)
        if len(resources) != 1:
            raise RemoteProtocolError(f"PROPFIND {path}: {len(resources)} resources where one was asked for")
        resource = resources[0]
        if resource.status is not None and resource.status >= 300:
            raise error_of(Answer(resource.status, {}), f"PROPFIND {path}")
        Directory(path).name(resource.href)  # raises for an address elsewhere
        return self._entry(resource, place.name)

    async def list(self, place: Place) -> list[Entry]:
        resources, _, answer = await self._resources(place)
        path = self._addresses.path(place, directory=True)
        entries: dict[str, Entry] = {}
        for there, resource in resources:
            name = self._addresses.names.shown(there)
            if resource.status is not None and resource.status >= 300:
                log.warning("PROPFIND %s: left out %r: the server answers %d for it", path, name, resource.status)
            elif name in ("", ".", "..") or "/" in name or "\0" in name:
                log.warning("PROPFIND %s: left out %r: no name that a program could use", path, name)
            elif name.startswith(TEMPORARY):
                await self._remove_if_stale(Place((*place.path, name)), resource, answer)
            elif self._addresses.names.stored(name) != there:
                log.warning("PROPFIND %s: left out %r: a name that this server would not let us ask for", path, there)
            elif name in entries:
                log.warning("PROPFIND %s: left out a second %r", path, name)
            else:
                entries[name] = self._entry(resource, name)
        return [*entries.values()]

    async def quota(self) -> Quota:
        path = self._addresses.path(Place())
        resources, answer = await self._client.propfind(path, 0, QUOTA_PROPERTIES)
        if answer.status >= 300:
            raise error_of(answer, f"PROPFIND {path}")
        properties = resources[0].properties if resources else {}

        def number(name: str) -> int | None:
            text = properties.get(DAV + name, "")  # negative: not computed, unknown, no limit (Nextcloud)
            return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None

        return Quota(number("quota-used-bytes"), number("quota-available-bytes"))

    async def read(self, place: Place, version: Version | None, start: int, stop: int, sink: Sink) -> None:
        await self._reads.read(place, version, start, stop, sink)

    # --- changing ---

    async def upload(
        self, place: Place, body: Body, *, replaces: Version | None, attributes: Attributes, ticket: Ticket
    ) -> Entry:
        self._check_write(place)
        direct = self.habits.atomic_put and body.size <= (TURN_LIMIT if self.habits.turns else DIRECT_LIMIT)
        if self._options.atomic_replace is not None:
            direct = self._options.atomic_replace
        if direct or not self._may_be_destination(place):
            if replaces is not None:
                await self._conditions.grown(place, replaces)
            async with self._alone_above(place):
                entry = await self._put_straight(place, body, replaces)
                try:
                    return await self._with_attributes(place, entry, attributes)
                except RemoteError as exc:
                    exc.in_doubt = True  # the content is there
                    raise

        async def finish(beside: Place) -> Entry | None:
            if not self._overlay:
                return None
            entry = await self.stat(beside)
            kept = attributes
            if replaces is not None and None in (attributes.mode, attributes.xattrs):
                old = (await self._conditions.must_have(place, replaces)).attributes
                kept = replace(
                    attributes,
                    mode=old.mode if attributes.mode is None else attributes.mode,
                    xattrs=old.xattrs if attributes.xattrs is None else attributes.xattrs,
                )
            return await self._with_attributes(beside, entry, kept)

        return await self._put_beside(place, body, body.size, replaces, ticket, finish)

    async def _put_straight(self, place: Place, body: Body, replaces: Version | None) -> Entry:
        await self._put(place, body, replaces)
        return await self._look_after(place, size=body.size)  # an ETag alone does not say that all bytes arrived

    async def _put(self, place: Place, body: Body, replaces: Version | None) -> Answer:
        path = self._addresses.path(place)

        async def send(condition: dict[str, str]) -> Answer:
            return await self._client.put(path, condition, body)

        if replaces is None:
            answer = await self._conditions.if_free(place, send)
        else:
            answer = await self._conditions.if_version(place, replaces, send, again=body.rewind)
        if answer.status >= 300:
            raise await self._conditions.explained(answer, f"PUT {path}", place, replacing=replaces is not None)
        return answer

    async def _put_beside(
        self,
        place: Place,
        body: Body | bytes,
        size: int,
        replaces: Version | None,
        ticket: Ticket,
        finish: Callable[[Place], Awaitable[Entry | None]],
        headers: Mapping[str, str] | None = None,
    ) -> Entry:
        """Uploads to a hidden name in the same directory, then moves that over the target.

        `finish` gets the hidden place when the bytes are there, and gives the entry there if it is known. The ticket keeps
        the name, so that what a killed process left is removed when its upload is taken up again.
        """
        if ticket.token is not None and ticket.token.startswith(TEMPORARY):
            with suppress(RemoteError):
                await self._client.delete(self._addresses.path(Place((*place.path[:-1], ticket.token))), {})
        beside = Place((*place.path[:-1], TEMPORARY + secrets.token_hex(8)))
        await ticket.remember(beside.name)
        answered = False
        try:
            try:
                answer = await self._client.put(self._addresses.path(beside), headers or {}, body)
                answered = True
                if answer.status >= 300:
                    what = f"PUT {self._addresses.path(beside)}"
                    raise await self._conditions.explained(answer, what, place, replacing=replaces is not None)
                entry = await finish(beside)
            except RemoteError as exc:
                exc.in_doubt = False  # the target was not touched
                raise
            async with self._alone_above(place):
                await self._move(beside, place, kind=Kind.FILE, replaces=replaces)
                if entry is None or entry.version is None or not self.habits.move_keeps_version:
                    return await self._look_after(place, size=size)
        except BaseException:
            with trio.move_on_after(3, shield=True), suppress(RemoteError):
                await self._discard(beside, answered=answered)
            raise
        return replace(entry, name=place.name)

    async def _discard(self, beside: Place, *, answered: bool) -> None:
        """A cut PUT that the server has not yet begun with makes its file after the DELETE (wsgidav): that is asked twice."""
        path = self._addresses.path(beside)
        if (await self._client.delete(path, {})).status == 404 and not answered:
            await trio.sleep(CUT_PAUSE)
            await self._client.delete(path, {})

    async def write_ranges(
        self, place: Place, pieces: Sequence[Piece], size: int, *, replaces: Version, attributes: Attributes
    ) -> Entry:
        raise RemoteUnsupported("WebDAV writes whole files")

    async def make_directory(self, place: Place, attributes: Attributes) -> Entry:
        self._check_write(place)
        path = self._addresses.path(place, directory=True)
        if not self.habits.honest_mkcol:
            await self._conditions.must_be_free(place)
        answer = await self._client.mkcol(path)
        if answer.status >= 300:
            raise await self._conditions.explained(answer, f"MKCOL {path}", place)
        entry = Entry(place.name, Kind.DIRECTORY)
        try:
            return await self._with_attributes(place, seen(entry, Overlay()), attributes) if self._overlay else entry
        except RemoteError as exc:
            exc.in_doubt = True  # it is made
            raise

    async def make_symlink(self, place: Place, target: str, attributes: Attributes) -> Entry:
        """Makes a small file whose content is the target, for other clients, and whose property says what it is."""
        self._check_write(place)
        if not self._overlay:
            raise RemoteUnsupported("this WebDAV server has no place for symlinks")

        async def finish(beside: Place) -> Entry:
            entry = await self.stat(beside)
            overlay = Overlay(target=target, mtime_ns=attributes.mtime_ns, of=entry.version)
            if entry.version is None or await self._store(beside, overlay, Kind.FILE) is None:
                raise RemoteUnsupported("this WebDAV server has no place for a symlink with that target")
            return seen(entry, overlay)

        content = target.encode("utf-8", "surrogateescape")
        return await self._put_beside(place, content, len(content), None, NoTicket(), finish)

    async def move(
        self, source: Place, target: Place, *, kind: Kind, version: Version | None, replaces: Version | None
    ) -> Entry:
        self._check_write(target)
        self._check_path(source)
        if version is not None and kind is not Kind.DIRECTORY and self.habits.move_if_match:
            await self._conditions.grown(source, version)
        places = [_above(source)]
        if kind is Kind.DIRECTORY:
            places += [source] if replaces is None else [source, target]  # so that nobody's upload into it is under way
        async with self._alone_above(target, *places):
            await self._move(source, target, kind=kind, version=version, replaces=replaces)
            self._turns.moved(source, target)
            return await self._look_after(target)

    async def _move(
        self, source: Place, target: Place, *, kind: Kind, version: Version | None = None, replaces: Version | None
    ) -> None:
        directory = kind is Kind.DIRECTORY
        path = self._addresses.path(source, directory=directory)
        url = self._addresses.url(target, directory=directory)
        if not self._may_be_destination(target):
            raise NameRefused(f"{self.habits.name} would move to another name than {target.name!r}")
        headers = {"Destination": url, "Overwrite": "F" if replaces is None else "T"}
        if not self.habits.honest_move and source.path[:-1] != target.path[:-1]:
            await self._conditions.parent_must_be(target)

        async def send(condition: dict[str, str]) -> Answer:
            if replaces is not None:
                await self._conditions.must_have(target, replaces)
            elif not self.habits.conditions:
                await self._conditions.must_be_free(target)
            answer = await self._client.move(path, headers | condition)
            if answer.status == 412 and replaces is None:
                await self._conditions.must_be_free(target)
            return answer

        if replaces is not None and directory and await self._holds_anything(target):
            raise RemoteExists(f"{target} is not empty")
        if replaces is not None and self.habits.tagged_if and (tag := self._conditions.tag(replaces)) is not None:
            headers["If"] = f'<{url}> (["{tag}"])'
        if version is None or directory:
            answer = await send({})
        elif not self.habits.move_if_match:
            await self._conditions.must_have(source, version)
            answer = await send({})
        else:
            answer = await self._conditions.if_version(source, version, send)
        if answer.status == 412:
            raise VersionMismatch(f"MOVE {path}: the server says that a condition does not hold")
        if answer.status in UNSURE:
            await self.stat(source)  # raises RemoteNotFound
        if answer.status == 207 or answer.status >= 300:
            raise await self._conditions.explained(answer, f"MOVE {path}", target, replacing=replaces is not None)

    async def remove(self, place: Place, *, kind: Kind, version: Version | None) -> None:
        self._check_write(place)
        directory = kind is Kind.DIRECTORY
        path = self._addresses.path(place, directory=directory)

        async def send(condition: dict[str, str]) -> Answer:
            return await self._client.delete(path, condition)

        try:
            if directory:
                async with self._alone_at(place):
                    answer = await self._remove_empty(place, send)
            else:
                if version is not None:
                    await self._conditions.grown(place, version)
                async with self._alone_at(_above(place)):
                    answer = await (self._conditions.if_version(place, version, send) if version else send({}))
        except RemoteNotFound:
            return
        if answer.status in (404, 410):
            return
        if answer.status == 207:
            raise RemoteLocked(f"DELETE {path}: the server could not remove all of it")
        if answer.status >= 300:
            raise error_of(answer, f"DELETE {path}")

    async def _remove_empty(self, place: Place, send: SendOn) -> Answer:
        """DELETE takes everything below with it, so only what has been seen to be empty and has not changed since goes."""
        answer = await self._remove_seen(place, send)
        if answer.status == 207 and self.habits.turns:
            # Of a path near the server's limit Apache removes the turn in it and says that it could not.
            answer = await self._remove_seen(place, send)
        if answer.status == 412:
            raise RemoteExists(f"{place} has changed since it was seen to be empty")
        return answer

    async def _remove_seen(self, place: Place, send: SendOn) -> Answer:
        resources, itself, _ = await self._resources(place)
        if any(name != TURN or not self.habits.turns for name, _ in resources):
            raise RemoteExists(f"{place} is not empty")
        etag = parse_etag(itself.properties.get(DAV + "getetag"))
        headers: dict[str, str] = {}
        if etag is not None and self.habits.turns and self.habits.tagged_if:  # weak ETags will do: our turn has just made it so
            headers["If"] = f'<{self._addresses.url(place, directory=True)}> (["{etag[0]}"])'
        elif etag is not None and not etag[1] and self.habits.conditions:
            headers["If-Match"] = f'"{etag[0]}"'
        return await send(headers)

    async def set_attributes(self, place: Place, attributes: Attributes, *, kind: Kind) -> Entry:
        self._check_write(place)
        if not self._overlay:
            raise RemoteUnsupported("this WebDAV server has no place for attributes")
        entry = await self.stat(place)
        stored = await self._store(place, wanted(entry, attributes), entry.kind)
        if stored is None:
            raise RemoteUnsupported("this WebDAV server does not store our property")
        return seen(entry, stored)

    async def _with_attributes(self, place: Place, entry: Entry, attributes: Attributes) -> Entry:
        """`entry` with what is not None of `attributes`, stored if the server does not say so already."""
        if not self._overlay or (entry.version is None and entry.kind is not Kind.DIRECTORY):
            return entry
        if entry.kind is Kind.DIRECTORY:
            attributes = replace(attributes, mtime_ns=None)
        overlay = wanted(entry, attributes)
        if overlay == wanted(entry, Attributes()):
            return entry
        stored = await self._store(place, overlay, entry.kind)
        return entry if stored is None else seen(entry, stored)

    async def _store(self, place: Place, overlay: Overlay, kind: Kind) -> Overlay | None:
        """What the property at `place` says now; None if the server does not take it. Leaves out what has no room."""
        path = self._addresses.path(place, directory=kind is Kind.DIRECTORY)
        smaller = bounded(overlay)
        for attempt in (smaller, replace(smaller, xattrs=None)) if smaller.xattrs else (smaller,):
            stored, answer = await self._client.proppatch(path, update_body(attempt), PROPERTY)
            if answer.status >= 300 and answer.status not in REFUSALS:
                raise error_of(answer, f"PROPPATCH {path}")
            if stored:
                if attempt.xattrs != overlay.xattrs:
                    log.info("the extended attributes of %s are too large for the server: they stay here", place)
                return attempt
        log.info("PROPPATCH %s: the server does not store our property: what it would say stays here", path)
        return None

    def changes(self) -> AsyncIterator[Change]:
        raise RemoteUnsupported("WebDAV tells of no changes")

    # --- small parts ---

    def _alone_at(self, *directories: Place) -> AbstractAsyncContextManager[None]:
        """In it no other nbmountd changes names in the directories, where servers let us see to that."""
        return self._turns.at(*directories) if self.habits.turns else nullcontext()

    @asynccontextmanager
    async def _alone_above(self, target: Place, *others: Place) -> AsyncIterator[None]:
        """The same for something that is to come to `target`: without a directory to come to it raises ParentMissing."""
        above = _above(target)
        try:
            async with self._alone_at(above, *others):
                yield
        except DirectoryMissing as exc:
            if exc.directory == above and above not in others:
                raise ParentMissing(str(exc)) from None
            raise

    async def _not_there(self, answer: Answer, place: Place, *, directory: bool = False) -> RemoteError:
        """The error that `answer` to PROPFIND means. Below a file Apache answers 400 instead of 404, lighttpd 403."""
        path = self._addresses.path(place, directory=directory)
        if answer.status in (400, 403) and place.path:
            above = place if directory else Place(place.path[:-1])
            if (await self.stat(above)).kind is not Kind.DIRECTORY:
                return RemoteNotFound(f"{above} is no directory")
        return error_of(answer, f"PROPFIND {path}")

    async def _holds_anything(self, place: Place) -> bool:
        """Whether there is anything in the directory, shown to programs or not, but for our turn there."""
        resources, _, _ = await self._resources(place)
        return any(name != TURN or not self.habits.turns for name, _ in resources)

    def _check_write(self, place: Place) -> None:
        if self._read_only:
            raise RemoteDenied("the mount is read-only")
        name = place.name
        if self._addresses.names.stored_size(name) > self.habits.max_name_bytes:
            raise NameRefused(f"longer than {self.habits.max_name_bytes} bytes: {name!r}")
        if name.startswith(TEMPORARY):
            raise NameRefused(f"names that begin with {TEMPORARY} are for uploads under way")
        self._check_path(place)

    def _check_path(self, place: Place) -> None:
        """Raises NameRefused for what the server may take for something else, which a change would then hit."""
        if self.habits.control_names:
            return
        for name in place.path:
            if any(character < " " or character == "\x7f" for character in self._addresses.names.stored(name)):
                raise NameRefused(f"{self.habits.name} may take a name with control characters for another one: {name!r}")

    def _may_be_destination(self, place: Place) -> bool:
        return not any(character in part for part in place.path for character in self.habits.not_in_destination)

    def _properties(self) -> tuple[str, ...]:
        return BASIC_PROPERTIES + OVERLAY_PROPERTIES if self._overlay else BASIC_PROPERTIES

    def _entry(self, resource: Resource, name: str) -> Entry:
        entry = entry_of(resource, name)
        etag = parse_etag(resource.properties.get(DAV + "getetag"))
        if etag is not None and etag[1] and entry.version is not None and entry.version.startswith("e:"):
            self._conditions.saw_weak(entry.version)
        return seen(entry, parse(resource.properties.get(PROPERTY))) if self._overlay else entry

    async def _resources(self, place: Place) -> tuple[Sequence[tuple[str, Resource]], Resource, Answer]:
        """Everything in the directory at `place`, by name, unfiltered; and the directory itself."""
        path = self._addresses.path(place, directory=True)
        resources, answer = await self._listing(path)
        if answer.status >= 300:
            raise await self._not_there(answer, place, directory=True)
        directory = Directory(path)
        itself: Resource | None = None
        found = []
        for resource in resources:
            name = directory.name(resource.href)
            if name is None:
                itself = resource
            else:
                found.append((name, resource))
        if itself is None:
            raise RemoteProtocolError(f"PROPFIND {path}: the listing does not hold the directory itself")
        if itself.status is not None and itself.status >= 300:
            raise error_of(Answer(itself.status, {}), f"PROPFIND {path}")
        if itself.collection is False:
            raise RemoteNotFound(f"{place} is no directory")
        return found, itself, answer

    async def _listing(self, path: str) -> tuple[Sequence[Resource], Answer]:
        """The resources of the collection at `path` and itself, and the (last) answer, of any status."""
        return await self._client.propfind(path, 1, self._properties())

    async def _look_after(self, place: Place, *, size: int | None = None) -> Entry:
        """The entry at `place` after a change of ours. Failing leaves in doubt what the change came to.

        So does another size than what was uploaded: somebody between us and the server has shortened it, or somebody else
        has replaced it since. Who asked for the upload must compare before anything is taken for theirs.
        """
        try:
            entry = await self.stat(place)
        except RemoteError as exc:
            exc.in_doubt = True
            raise
        if size is not None and entry.size not in (size, None):
            raise RemoteProtocolError(f"{place} has {entry.size} bytes, where {size} were uploaded", in_doubt=True)
        return entry

    async def _remove_if_stale(self, place: Place, resource: Resource, answer: Answer) -> None:
        now = parse_date(answer.headers.get("date"))
        mtime = parse_date(resource.properties.get(DAV + "getlastmodified"))
        turn = self.habits.turns and place.name == TURN
        if self._read_only or now is None or mtime is None or (resource.collection and not turn):
            return
        if now - mtime < (TURN_AGE if turn else TEMPORARY_AGE):
            return
        log.info("removing %s, left over by an upload of %d s ago", place, now - mtime)
        headers: dict[str, str] = {}
        if turn and (etag := parse_etag(resource.properties.get(DAV + "getetag"))) is not None:
            headers["If"] = f'<{self._addresses.url(place, directory=True)}> (["{etag[0]}"])'  # not the next one of that name
        with suppress(RemoteError):
            await self._client.delete(self._addresses.path(place, directory=bool(resource.collection)), headers)


def _above(place: Place) -> Place:
    return Place(place.path[:-1])
