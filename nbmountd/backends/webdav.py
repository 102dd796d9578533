"""A WebDAV share as a backend: each verb as the fewest requests that keep its promises on the server at hand.

It knows nothing of how requests travel (http.py) or how a listing is written (multistatus.py). Where a server does not
check conditions itself, the check is one PROPFIND just before the change. Where a cut PUT would damage the target, the
bytes go to a hidden name beside it and are moved over.

Between tasks only what was learned of the server is shared: `_young`, `_ignores_ranges`, `_get_tells_no_version`.
Losing an update of them costs a request, nothing else.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from urllib.parse import urlsplit

import trio

from nbmountd.backends.base import Body, Change, Piece, Sink, Ticket
from nbmountd.backends.credentials import credential_for
from nbmountd.backends.http import Answer, HTTPClient, HTTPStatistics, Incoming, error_of
from nbmountd.backends.multistatus import DAV, Resource
from nbmountd.backends.webdav_client import BASIC_PROPERTIES, OWNCLOUD_PROPERTIES, QUOTA_PROPERTIES, WebDAVClient
from nbmountd.backends.webdav_entries import Addresses, Directory, entry_of, parse_date, parse_etag, strong_tag, tells
from nbmountd.backends.webdav_habits import UNKNOWN, Habits, recognise
from nbmountd.config import WebDAVOptions
from nbmountd.errors import (
    ConfigError,
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

WEAK_TIME = 1.1
"""Seconds after which Apache's ETag of a file just written is strong for certain: it is weak for the first second."""

CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")

UNSURE = frozenset({400, 403, 404, 405, 409, 500, 502})
"""Answers to a change that servers give for a missing parent or a taken name as well: worth a look."""

DIRECT_LIMIT = 1024 * 1024
"""Bytes of a body up to which it is put straight to its name.

Apache tests the condition of a PUT when it begins and not again when it ends (2.4.71: a change by another client during
the body is lost). So a body that takes its time goes to a name beside, and the condition is tested at the MOVE.
"""


class WebDAVBackend:
    """A `Backend` over one WebDAV collection. Raises ConfigError for options that cannot work."""

    def __init__(self, options: WebDAVOptions, *, read_only: bool = False) -> None:
        parts = urlsplit(options.url)
        if parts.username is not None or parts.password is not None:
            raise ConfigError("webdav: `url` must not hold a user or password; use `user` and `password_file`")
        if parts.query or parts.fragment:
            raise ConfigError("webdav: `url` must end with a path")
        self._options = options
        self._read_only = read_only
        self._http = HTTPClient(
            options.url,
            credential=credential_for(options),
            connections=options.connections,
            timeout=options.request_timeout,
            ca_bundle=options.ca_bundle,
        )
        self._client = WebDAVClient(self._http)
        self._addresses = Addresses(options.url)
        self._habits = UNKNOWN
        self._young: set[Version] = set()
        self._less_young: set[Version] = set()
        self._young_since = 0.0
        self._ignores_ranges = False
        self._get_tells_no_version = False

    @property
    def habits(self) -> Habits:
        """What the server was recognised as; UNKNOWN before `connect`."""
        return self._habits

    def statistics(self) -> HTTPStatistics:
        """Requests and bytes so far."""
        return self._http.statistics()

    async def connect(self) -> Capabilities:
        """Two requests: OPTIONS to recognise the server, PROPFIND to see that the root is a collection."""
        root = self._addresses.path(Place())
        answer = await self._client.options(root)
        if answer.status == 429 or (answer.status >= 500 and answer.status != 501):
            raise error_of(answer, f"OPTIONS {root}")  # from a proxy, perhaps: it tells nothing of the server
        self._habits = recognise(answer.headers, root)
        entry = await self.stat(Place())
        if entry.kind is not Kind.DIRECTORY:
            raise RemoteProtocolError(f"{self._options.url} is not a directory")
        habits = self._habits
        return Capabilities(
            ranged_reads=not self._ignores_ranges,
            conditional_writes=habits.conditions,
            strong_versions=habits.strong_versions,
            native_mtime=habits.owncloud,
            propagating_versions=habits.owncloud,
            max_name_bytes=habits.max_name_bytes,
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
        for name, resource in resources:
            if resource.status is not None and resource.status >= 300:
                log.warning("PROPFIND %s: left out %r: the server answers %d for it", path, name, resource.status)
            elif name in ("", ".", "..") or "/" in name or "\0" in name:
                log.warning("PROPFIND %s: left out %r: no name that a program could use", path, name)
            elif name.startswith(TEMPORARY):
                await self._remove_if_stale(Place((*place.path, name)), resource, answer)
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
        if start >= stop:
            return
        if version is not None and self._get_tells_no_version:
            await self._must_have(place, version)
        answer = await self._get(place, version, start, stop, sink, conditional=True)
        if answer.status == 412:
            # An ETag that the server calls weak matches nothing. The tag of the answer says whether it is the version.
            answer = await self._get(place, version, start, stop, sink, conditional=False)
        if answer.status == 416:
            if version is not None:
                await self._must_have(place, version)
            raise RemoteProtocolError(f"GET {self._addresses.path(place)}: {start}-{stop} is past the end of the file")
        if answer.status >= 300:
            raise error_of(answer, f"GET {self._addresses.path(place)}")

    async def _get(
        self, place: Place, version: Version | None, start: int, stop: int, sink: Sink, *, conditional: bool
    ) -> Answer:
        path = self._addresses.path(place)
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if version is not None and conditional and (tag := self._tag(version)) is not None:
            headers["If-Match"] = f'"{tag}"'
        believe = self._get_tells_no_version
        receiver = _RangeReceiver(f"GET {path}", version, start, stop, sink, believe=believe)
        try:
            return await self._client.get(path, headers, receiver)
        except _TellsNoVersion:
            assert version is not None
            self._get_tells_no_version = True
            await self._must_have(place, version)
            receiver = _RangeReceiver(f"GET {path}", version, start, stop, sink, believe=True)
            return await self._client.get(path, headers, receiver)
        finally:
            self._ignores_ranges |= receiver.range_ignored

    # --- changing ---

    async def upload(
        self, place: Place, body: Body, *, replaces: Version | None, attributes: Attributes, ticket: Ticket
    ) -> Entry:
        self._check_write(place)
        habits = self._habits
        headers: dict[str, str] = {}
        if habits.owncloud and attributes.mtime_ns is not None:
            # Below one day it is a server error after the content was stored (Nextcloud).
            headers["X-OC-Mtime"] = str(max(attributes.mtime_ns // 1_000_000_000, 86401))
        direct = habits.atomic_put and body.size <= DIRECT_LIMIT
        if self._options.atomic_replace is not None:
            direct = self._options.atomic_replace
        if direct or (replaces is None and habits.owncloud) or not self._may_be_destination(place):
            return await self._put_straight(place, body, replaces, headers)
        await self._put_beside(place, body, replaces, headers, ticket)
        return await self._look_after(place, size=body.size)

    async def _put_straight(self, place: Place, body: Body, replaces: Version | None, headers: dict[str, str]) -> Entry:
        answer = await self._put(place, body, replaces, headers)
        etag = parse_etag(answer.headers.get("etag"))
        if etag is not None and not etag[1] and not self._habits.owncloud:
            return Entry(place.name, Kind.FILE, body.size, Version(f"e:{etag[0]}"))
        return await self._look_after(place, size=body.size)

    async def _put(self, place: Place, body: Body, replaces: Version | None, headers: dict[str, str]) -> Answer:
        path = self._addresses.path(place)

        async def send(condition: dict[str, str]) -> Answer:
            return await self._client.put(path, headers | condition, body)

        if replaces is None:
            answer = await self._if_free(place, send)
        else:
            answer = await self._if_version(place, replaces, send, again=body.rewind)
        if answer.status >= 300:
            raise await self._explained(answer, f"PUT {path}", place)
        return answer

    async def _put_beside(
        self, place: Place, body: Body, replaces: Version | None, headers: dict[str, str], ticket: Ticket
    ) -> None:
        """Uploads to a hidden name in the same directory, then moves that over the target.

        The ticket keeps the name, so that what a killed process left is removed when its upload is taken up again.
        """
        if ticket.token is not None and ticket.token.startswith(TEMPORARY):
            with suppress(RemoteError):
                await self._client.delete(self._addresses.path(Place((*place.path[:-1], ticket.token))), {})
        beside = Place((*place.path[:-1], TEMPORARY + secrets.token_hex(8)))
        await ticket.remember(beside.name)
        try:
            try:
                answer = await self._client.put(self._addresses.path(beside), headers, body)
                if answer.status >= 300:
                    raise await self._explained(answer, f"PUT {self._addresses.path(beside)}", place)
            except RemoteError as exc:
                exc.in_doubt = False  # the target was not touched
                raise
            await self._move(beside, place, kind=Kind.FILE, replaces=replaces)
        except BaseException:
            with trio.move_on_after(3, shield=True), suppress(RemoteError):
                await self._client.delete(self._addresses.path(beside), {})
            raise

    async def write_ranges(
        self, place: Place, pieces: Sequence[Piece], size: int, *, replaces: Version, attributes: Attributes
    ) -> Entry:
        raise RemoteUnsupported("WebDAV writes whole files")

    async def make_directory(self, place: Place, attributes: Attributes) -> Entry:
        self._check_write(place)
        path = self._addresses.path(place, directory=True)
        if not self._habits.honest_mkcol:
            await self._must_be_free(place)
        answer = await self._client.mkcol(path)
        if answer.status >= 300:
            raise await self._explained(answer, f"MKCOL {path}", place)
        return Entry(place.name, Kind.DIRECTORY) if not self._habits.owncloud else await self._look_after(place)

    async def make_symlink(self, place: Place, target: str, attributes: Attributes) -> Entry:
        raise RemoteUnsupported("WebDAV has no symlinks")

    async def move(
        self, source: Place, target: Place, *, kind: Kind, version: Version | None, replaces: Version | None
    ) -> Entry:
        self._check_write(target)
        await self._move(source, target, kind=kind, version=version, replaces=replaces)
        return await self._look_after(target)

    async def _move(
        self, source: Place, target: Place, *, kind: Kind, version: Version | None = None, replaces: Version | None
    ) -> None:
        directory = kind is Kind.DIRECTORY
        path = self._addresses.path(source, directory=directory)
        url = self._addresses.url(target, directory=directory)
        if not self._may_be_destination(target):
            raise NameRefused(f"{self._habits.name} would move to another name than {target.name!r}")
        headers = {"Destination": url, "Overwrite": "F" if replaces is None else "T"}
        if not self._habits.honest_move and source.path[:-1] != target.path[:-1]:
            await self._parent_must_be(target)

        async def send(condition: dict[str, str]) -> Answer:
            if replaces is not None:
                await self._must_have(target, replaces)
            elif not self._habits.conditions:
                await self._must_be_free(target)
            answer = await self._client.move(path, headers | condition)
            if answer.status == 412 and replaces is None:
                await self._must_be_free(target)
            return answer

        if replaces is not None and directory and await self._holds_anything(target):
            raise RemoteExists(f"{target} is not empty")
        if replaces is not None and (tag := self._tag(replaces)) is not None:
            headers["If"] = f'<{url}> (["{tag}"])'
        if version is None or directory:
            answer = await send({})
        elif not self._habits.move_if_match:
            await self._must_have(source, version)
            answer = await send({})
        else:
            answer = await self._if_version(source, version, send)
        if answer.status == 412:
            raise VersionMismatch(f"MOVE {path}: the server says that a condition does not hold")
        if answer.status in UNSURE:
            await self.stat(source)  # raises RemoteNotFound
        if answer.status == 207 or answer.status >= 300:
            raise await self._explained(answer, f"MOVE {path}", target)

    async def remove(self, place: Place, *, kind: Kind, version: Version | None) -> None:
        self._check_write(place)
        directory = kind is Kind.DIRECTORY
        path = self._addresses.path(place, directory=directory)

        async def send(condition: dict[str, str]) -> Answer:
            return await self._client.delete(path, condition)

        try:
            if directory:
                # DELETE takes everything below with it.
                resources, itself, _ = await self._resources(place)
                if resources:
                    raise RemoteExists(f"{place} is not empty")
                etag = parse_etag(itself.properties.get(DAV + "getetag"))
                known = etag is not None and not etag[1] and self._habits.conditions
                answer = await send({"If-Match": f'"{etag[0]}"'} if known and etag else {})
                if answer.status == 412:
                    raise RemoteExists(f"{place} has changed since it was seen to be empty")
            elif version is None:
                answer = await send({})
            else:
                answer = await self._if_version(place, version, send)
        except RemoteNotFound:
            return
        if answer.status in (404, 410):
            return
        if answer.status == 207:
            raise RemoteLocked(f"DELETE {path}: the server could not remove all of it")
        if answer.status >= 300:
            raise error_of(answer, f"DELETE {path}")

    async def set_attributes(self, place: Place, attributes: Attributes, *, kind: Kind) -> Entry:
        self._check_write(place)
        if not self._habits.owncloud or attributes.mtime_ns is None:
            raise RemoteUnsupported("this WebDAV server has no place for attributes")
        path = self._addresses.path(place, directory=kind is Kind.DIRECTORY)
        second = max(attributes.mtime_ns // 1_000_000_000, 86401)
        # A number in `lastmodified` is Nextcloud's way; `getlastmodified` is refused and a date is a server error there.
        resources, answer = await self._client.proppatch(
            path,
            '<?xml version="1.0" encoding="utf-8"?><d:propertyupdate xmlns:d="DAV:"><d:set><d:prop>'
            f"<d:lastmodified>{second}</d:lastmodified></d:prop></d:set></d:propertyupdate>".encode(),
        )
        if answer.status >= 300:
            raise error_of(answer, f"PROPPATCH {path}")
        if not any(DAV + "lastmodified" in resource.properties for resource in resources):
            raise RemoteUnsupported(f"PROPPATCH {path}: the server does not let the time be set")
        return await self._look_after(place)

    def changes(self) -> AsyncIterator[Change]:
        raise RemoteUnsupported("WebDAV tells of no changes")

    async def aclose(self) -> None:
        await self._http.aclose()

    # --- conditions ---

    async def _if_free(self, place: Place, send: Callable[[dict[str, str]], Awaitable[Answer]]) -> Answer:
        """`send` on the condition that nothing is at `place`, checked by the server or else just before."""
        if not self._habits.conditions:
            await self._must_be_free(place)
        answer = await send({"If-None-Match": "*"})
        if answer.status == 412:
            raise RemoteExists(f"{place} exists already")
        return answer

    async def _if_version(
        self,
        place: Place,
        version: Version,
        send: Callable[[dict[str, str]], Awaitable[Answer]],
        *,
        again: Callable[[], None] = lambda: None,
    ) -> Answer:
        """`send` on the condition that `place` has `version`, checked by the server or else just before.

        Raises VersionMismatch, RemoteNotFound. `again` is called before `send` is called once more.
        """
        if (tag := self._tag(version)) is not None:
            answer = await send({"If-Match": f'"{tag}"'})
            if answer.status != 412:
                return answer
            again()
        await self._must_have(place, version)  # a 412 for the right version: the server calls its ETag weak still
        return await send({})

    def _tag(self, version: Version) -> str | None:
        """The tag of `version` if the server honours conditions and it is not known to be weak still."""
        self._forget_grown()
        if not self._habits.conditions or version in self._young or version in self._less_young:
            return None
        return strong_tag(version)

    async def _must_have(self, place: Place, version: Version) -> None:
        if (entry := await self.stat(place)).version != version:
            raise VersionMismatch(f"{place} is {entry.version} now, not {version}")

    async def _must_be_free(self, place: Place) -> None:
        try:
            await self.stat(place)
        except RemoteNotFound:
            return
        raise RemoteExists(f"{place} exists already")

    async def _not_there(self, answer: Answer, place: Place, *, directory: bool = False) -> RemoteError:
        """The error that `answer` to PROPFIND means. Below a file Apache answers 400 instead of 404."""
        path = self._addresses.path(place, directory=directory)
        if answer.status == 400 and place.path:
            above = place if directory else Place(place.path[:-1])
            if (await self.stat(above)).kind is not Kind.DIRECTORY:
                return RemoteNotFound(f"{above} is no directory")
        return error_of(answer, f"PROPFIND {path}")

    async def _parent_must_be(self, place: Place) -> None:
        try:
            parent = await self.stat(Place(place.path[:-1]))
        except RemoteNotFound:
            raise ParentMissing(f"the directory of {place} is not there") from None
        if parent.kind is not Kind.DIRECTORY:
            raise ParentMissing(f"the parent of {place} is no directory")

    async def _holds_anything(self, place: Place) -> bool:
        """Whether there is anything in the directory, shown to programs or not."""
        resources, _, _ = await self._resources(place)
        return bool(resources)

    async def _explained(self, answer: Answer, what: str, place: Place) -> RemoteError:
        """The error that `answer` to a change at `place` means, after a look where its status has several meanings."""
        if answer.status == 207:
            return RemoteLocked(f"{what}: the server did a part of it only")
        if answer.status in UNSURE:
            try:
                await self._parent_must_be(place)
                await self._must_be_free(place)
            except (ParentMissing, RemoteExists) as exc:
                return exc
            if answer.status == 400:
                return NameRefused(f"{what}: 400: the server does not accept the name")
            if answer.status in (404, 409):
                return RemoteDenied(f"{what}: {answer.status}, though the parent is there and the name is free")
        return error_of(answer, what)

    # --- small parts ---

    def _check_write(self, place: Place) -> None:
        if self._read_only:
            raise RemoteDenied("the mount is read-only")
        name = place.name
        if len(name.encode("utf-8", "surrogateescape")) > self._habits.max_name_bytes:
            raise NameRefused(f"longer than {self._habits.max_name_bytes} bytes: {name!r}")
        if self._habits.hides_dot_names and name.startswith("."):
            raise NameRefused(f"{self._habits.name} does not list names that begin with a dot: {name!r}")
        if name.startswith(TEMPORARY):
            raise NameRefused(f"names that begin with {TEMPORARY} are for uploads under way")

    def _may_be_destination(self, place: Place) -> bool:
        return not any(character in part for part in place.path for character in self._habits.not_in_destination)

    def _properties(self) -> tuple[str, ...]:
        return BASIC_PROPERTIES + OWNCLOUD_PROPERTIES if self._habits.owncloud else BASIC_PROPERTIES

    def _entry(self, resource: Resource, name: str) -> Entry:
        entry = entry_of(resource, name)
        etag = parse_etag(resource.properties.get(DAV + "getetag"))
        if etag is not None and etag[1] and entry.version is not None and entry.version.startswith("e:"):
            self._forget_grown()
            self._young.add(entry.version)
        return entry

    def _forget_grown(self) -> None:
        """Keeps the versions whose ETags were weak when last seen for WEAK_TIME at least and twice that at most."""
        now = trio.current_time()
        if now - self._young_since > WEAK_TIME:
            self._less_young = self._young if now - self._young_since < 2 * WEAK_TIME else set()
            self._young = set()
            self._young_since = now

    async def _resources(self, place: Place) -> tuple[Sequence[tuple[str, Resource]], Resource, Answer]:
        """Everything in the directory at `place`, by name, unfiltered; and the directory itself."""
        path = self._addresses.path(place, directory=True)
        resources, answer = await self._client.propfind(path, 1, self._properties())
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

    async def _look_after(self, place: Place, *, size: int | None = None) -> Entry:
        """The entry at `place` after a change of ours. Failing leaves in doubt what the change came to.

        If it has another size than what was uploaded, somebody else has replaced it since: a version that matches none
        is given, so that the next look shows theirs.
        """
        try:
            entry = await self.stat(place)
        except RemoteError as exc:
            exc.in_doubt = True
            raise
        if size is not None and entry.size not in (size, None):
            return Entry(place.name, Kind.FILE, size, Version(f"replaced:{secrets.token_hex(8)}"))
        return entry

    async def _remove_if_stale(self, place: Place, resource: Resource, answer: Answer) -> None:
        now = parse_date(answer.headers.get("date"))
        mtime = parse_date(resource.properties.get(DAV + "getlastmodified"))
        if self._read_only or resource.collection or now is None or mtime is None or now - mtime < TEMPORARY_AGE:
            return
        log.info("removing %s, left over by an upload of more than a day ago", place)
        with suppress(RemoteError):
            await self._client.delete(self._addresses.path(place), {})


class _TellsNoVersion(Exception):
    """The answer to GET has nothing that says of which version it is; no byte was given away."""


class _RangeReceiver:
    """Checks that an answer to a ranged GET is what was asked for, then gives its bytes to the sink."""

    def __init__(
        self, what: str, version: Version | None, start: int, stop: int, sink: Sink, *, believe: bool
    ) -> None:
        self.range_ignored = False
        self._what = what
        self._version = version
        self._start = start
        self._stop = stop
        self._sink = sink
        self._believe = believe

    def __call__(self, incoming: Incoming) -> None:
        headers = incoming.headers
        if incoming.status == 206:
            match = CONTENT_RANGE.fullmatch(headers.get("content-range", "").strip())
            if match is None or "content-encoding" in headers:
                raise RemoteProtocolError(f"{self._what}: a partial answer without the range it is of")
            size = None if match[3] == "*" else int(match[3])
            skip = 0
        elif incoming.status == 200:
            match = None
            length = headers.get("content-length", "")
            size = int(length) if length.isascii() and length.isdigit() and "content-encoding" not in headers else None
            self.range_ignored = True
            skip = self._start
        else:
            raise RemoteProtocolError(f"{self._what}: status {incoming.status} for a range")
        self._check_version(incoming, size)
        if match is not None and (int(match[1]), int(match[2])) != (self._start, self._stop - 1):
            raise RemoteProtocolError(f"{self._what}: bytes {match[1]}-{match[2]} instead of {self._start}-{self._stop - 1}")
        if size is not None and size < self._stop:
            raise RemoteProtocolError(f"{self._what}: the file ends at {size}, before {self._stop}")
        self._give(incoming, skip, self._stop - self._start)

    def _check_version(self, incoming: Incoming, size: int | None) -> None:
        if self._version is None:
            return
        verdict = tells(self._version, incoming.headers, size)
        if verdict is False:
            raise VersionMismatch(f"{self._what}: another version than {self._version}")
        if verdict is None and not self._believe:
            raise _TellsNoVersion

    def _give(self, incoming: Incoming, skip: int, count: int) -> None:
        for piece in incoming.pieces():
            if skip >= len(piece):
                skip -= len(piece)
                continue
            part = piece[skip : skip + count]
            skip = 0
            count -= len(part)
            self._sink(part)
            if not count:
                return
        raise RemoteProtocolError(f"{self._what}: the answer is {count} bytes short")
