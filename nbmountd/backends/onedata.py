"""Onedata spaces as a backend: each verb as the fewest requests to a Oneprovider that keep its promises.

It knows nothing of how requests travel (onedata_client.py), of tokens, or of which provider has a space
(onedata_spaces.py); places become file ids in onedata_paths.py.

Onedata has no conditional requests and tells times in seconds. So conditions are checked just before a change, and two
changes by others within one second that leave the size alone look like one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress

import msgspec
import trio

from nbmountd.backends.base import Body, Change, Piece, Sink, Ticket
from nbmountd.backends.http import HTTPStatistics
from nbmountd.backends.http_exchange import Incoming
from nbmountd.backends.onedata_answers import Told, entry_of
from nbmountd.backends.onedata_events import OBSERVED, Heard, Watch
from nbmountd.backends.onedata_paths import TEMPORARY, Names, Paths, is_stale_upload
from nbmountd.backends.onedata_reads import FIRST_READ, Reads
from nbmountd.backends.onedata_spaces import Space, Spaces
from nbmountd.backends.onedata_writes import Target, Writes
from nbmountd.backends.onedata_xattrs import Xattrs
from nbmountd.config import OnedataOptions
from nbmountd.errors import (
    RemoteDenied,
    RemoteError,
    RemoteExists,
    RemoteNotFound,
    RemoteProtocolError,
    RemoteUnavailable,
    RemoteUnsupported,
    VersionMismatch,
)
from nbmountd.model import Attributes, Capabilities, Entry, Kind, Place, Quota, Version

log = logging.getLogger(__name__)

ANNOTATED_LIMIT = 100
"""Entries of a listing whose extended attributes are fetched, one request each. Those of others are unknown."""


class OnedataBackend:
    """A `Backend` over all spaces of a user, one space, or a folder in one. Raises ConfigError for impossible options."""

    def __init__(self, options: OnedataOptions, *, read_only: bool = False) -> None:
        self._options = options
        self._read_only = read_only
        self._spaces = Spaces(options)
        self._paths = Paths(options, self._spaces, read_only=read_only)
        self._reads = Reads()
        self._xattrs = Xattrs()
        self._watch = Watch()
        self._has_events = False
        self._writes = Writes(self._paths, self._reads, self._xattrs)

    def statistics(self) -> HTTPStatistics:
        """Requests and bytes so far."""
        return self._spaces.statistics()

    def credential_fingerprint(self) -> object:
        """Equal as long as there is no other token to try."""
        return self._spaces.fingerprint()

    async def connect(self) -> Capabilities:
        """Two or three requests: what the token reaches, and one with it to a provider."""
        await self._spaces.refresh()
        if self._options.space is None:
            await self._try_a_provider()
        elif (await self.stat(Place())).kind is not Kind.DIRECTORY:
            raise RemoteProtocolError(f"{'/'.join(self._paths.folder)} is not a directory")
        else:
            self._has_events = await self._try_events()
        return Capabilities(
            read_unit=FIRST_READ,
            ranged_writes=True,
            conditional_writes=False,
            strong_versions=False,
            stable_ids=True,
            partitions=self._options.space is None,
            native_mode=True,
            native_symlinks=True,
            native_xattrs=all(client.new_names for client in self._spaces.clients),
            change_feed=self._has_events,
            connections=self._options.connections,
        )

    async def _try_events(self) -> bool:
        """Whether the provider tells of changes: one request, of versions that may. Only one space can be followed."""
        space = await self._spaces.only()
        if not space.client.may_have_events:
            return False
        root = await self._paths.file_id(space, await self._paths.root(space))
        try:
            await space.client.events(space.id, [root], OBSERVED, None, _hang_up)
        except Heard:
            return True
        except RemoteError as exc:
            log.info("the provider does not tell of changes: %s", exc)
        return False

    async def _try_a_provider(self) -> None:
        """Whether the token is good for files: one request to the first provider that answers."""
        error: RemoteError | None = None
        asked = []
        for space in self._spaces.all():
            if space.clients and space.client not in asked:
                asked.append(space.client)
                try:
                    await space.client.attributes(space.id)
                    return
                except (RemoteUnavailable, RemoteDenied) as exc:
                    error = exc
        if error is not None:
            raise error

    # --- looking ---

    async def stat(self, place: Place) -> Entry:
        if self._paths.is_top(place):
            await trio.lowlevel.checkpoint()
            return Entry("", Kind.DIRECTORY, writable=False, removable=False)
        space, names = await self._paths.where(place)
        with self._spaces.one_of_several(space):
            told = await self._paths.find(space, names, place)
            return await self._entry(space, told, place, names, await self._xattrs.of(space.client, told))

    async def list(self, place: Place) -> list[Entry]:
        if self._paths.is_top(place):
            await self._spaces.refresh()
            return [self._space_entry(space) for space in self._spaces.all()]
        space, names = await self._paths.where(place)
        with self._spaces.one_of_several(space):
            directory = place.id or await self._paths.at(space, names)
            if self._has_events:  # before the look: what changes meanwhile is told
                id = await self._paths.file_id(space, directory)
                self._watch.add(id, Place(place.path, place.id, place.parent_id))
            children = await self._paths.children(space, directory)
            return await self._entries(space, names, place, children)

    async def _entries(self, space: Space, names: Names, place: Place, children: Sequence[Told]) -> Entries:
        found = []
        annotated = 0
        plain: dict[str, bytes] | None = {} if space.client.new_names else None
        depth, writable = self._depth(names) + 1, self._is_writable(space)
        for told in children:
            name = told.name or ""
            if name in ("", ".", "..") or "/" in name or "\0" in name:
                log.warning("%s: left out %r: no name that a program could use", place, name)
                continue
            if name.startswith(TEMPORARY):
                await self._remove_if_stale(space, told)
                continue
            xattrs = plain
            if told.has_metadata:
                xattrs = None
                annotated += 1
                if annotated <= ANNOTATED_LIMIT:
                    with suppress(RemoteNotFound, RemoteDenied):
                        xattrs = await self._xattrs.of(space.client, told)
            if told.kind is Kind.SYMLINK:
                told = await self._with_target(space, told)
            found.append(entry_of(told, name, depth=depth, space=space.id, writable=writable, xattrs=xattrs))
        return found

    async def _remove_if_stale(self, space: Space, told: Told) -> None:
        if not self._read_only and space.writable and is_stale_upload(told, time.time()):
            log.info("removing %s, left over by an upload of more than a day ago", told.name)
            with suppress(RemoteError):
                await space.client.remove(told.id)

    async def quota(self) -> Quota:
        """Unknown: a space's quota is not told to its members."""
        await trio.lowlevel.checkpoint()
        return Quota()

    async def read(self, place: Place, version: Version | None, start: int, stop: int, sink: Sink) -> None:
        space, names = await self._paths.where(place)
        with self._spaces.one_of_several(space):
            id = place.id or (await self._paths.find(space, names, place)).id
            await self._reads.give(space, id, version, start, stop, sink)

    # --- changing ---

    async def upload(
        self, place: Place, body: Body, *, replaces: Version | None, attributes: Attributes, ticket: Ticket
    ) -> Entry:
        space, names = await self._paths.for_change(place)
        target = Target(space, names, place)
        with self._spaces.one_of_several(space):
            if replaces is None:
                id = await self._writes.create(target, body, attributes)
            else:
                id = await self._writes.replace(target, body, replaces, attributes, ticket)
            return await self._look_after(space, id, place, names, size=body.size)

    async def write_ranges(
        self, place: Place, pieces: Sequence[Piece], size: int, *, replaces: Version, attributes: Attributes
    ) -> Entry:
        space, names = await self._paths.for_change(place)
        with self._spaces.one_of_several(space):
            id = await self._writes.write_ranges(Target(space, names, place), pieces, size, replaces, attributes)
            return await self._look_after(space, id, place, names, size=size)

    async def make_directory(self, place: Place, attributes: Attributes) -> Entry:
        return await self._make(place, Kind.DIRECTORY, attributes, attributes.mode, None)

    async def make_symlink(self, place: Place, target: str, attributes: Attributes) -> Entry:
        return await self._make(place, Kind.SYMLINK, attributes, None, target)

    async def _make(
        self, place: Place, kind: Kind, attributes: Attributes, mode: int | None, target: str | None
    ) -> Entry:
        space, names = await self._paths.for_change(place)
        with self._spaces.one_of_several(space):
            parent = await self._paths.parent(space, names, place)
            id = await space.client.make(parent, place.name, kind, mode=mode, target=target)
            await self._xattrs.add(space.client, id, attributes.xattrs)
            return await self._look_after(space, id, place, names)

    async def move(
        self, source: Place, target: Place, *, kind: Kind, version: Version | None, replaces: Version | None
    ) -> Entry:
        there, from_names = await self._paths.for_change(source)
        space, names = await self._paths.for_change(target)
        if there is not space:
            raise RemoteUnsupported("Onedata cannot move from one space into another")
        with self._spaces.one_of_several(space):
            if version is None or kind is Kind.DIRECTORY:
                moved = await self._paths.find(space, from_names, source)
            else:
                moved = await self._writes.must_have(Target(space, from_names, source), version)
            parent = await self._paths.parent(space, names, target)
            await self._make_way(space, parent, target, replaces)
            parent = await self._paths.file_id(space, parent)
            await space.client.move(moved.id, parent, target.name, directory=kind is Kind.DIRECTORY)
            return await self._look_after(space, moved.id, target, names)

    async def _make_way(self, space: Space, parent: str, target: Place, replaces: Version | None) -> None:
        """Returns when a move to `target` replaces what it should and nothing else."""
        existing = await space.client.child(parent, target.name)
        if replaces is None:
            if existing is not None:
                raise RemoteExists(f"{target} exists already")
        elif existing is None:
            raise RemoteNotFound(f"{target} is gone")
        elif existing.kind is Kind.DIRECTORY:  # a move over a directory is an error of the server
            await self._remove_directory(space, existing.id, target)
        elif existing.version != replaces:
            raise VersionMismatch(f"{target} has another version now")

    async def remove(self, place: Place, *, kind: Kind, version: Version | None) -> None:
        space, names = await self._paths.for_change(place)
        with self._spaces.one_of_several(space), suppress(RemoteNotFound):
            told = await self._paths.find(space, names, place)
            if (told.kind is Kind.DIRECTORY) != (kind is Kind.DIRECTORY):
                raise VersionMismatch(f"{place} is something else now")
            if kind is Kind.DIRECTORY:
                await self._remove_directory(space, told.id, place)
            elif version is not None and told.version != version:
                raise VersionMismatch(f"{place} has another version now")
            else:
                await space.client.remove(told.id)

    async def _remove_directory(self, space: Space, id: str, place: Place) -> None:
        """The request takes everything below with it: so a look just before. Left-overs of old uploads may go."""
        page = await space.client.first_children(id, 16)
        now = time.time()
        if not page.last or not all(is_stale_upload(told, now) for told in page.children):
            raise RemoteExists(f"{place} is not empty")
        await space.client.remove(id)

    async def set_attributes(self, place: Place, attributes: Attributes, *, kind: Kind) -> Entry:
        space, names = await self._paths.for_change(place)
        xattrs = attributes.xattrs if space.client.new_names else None
        if attributes.mode is None and xattrs is None:
            raise RemoteUnsupported("this provider lets nobody set times, nor an older one other attributes")
        with self._spaces.one_of_several(space):
            told = await self._paths.find(space, names, place)
            if xattrs is not None:
                await self._xattrs.store(space.client, told.id, xattrs)
            if attributes.mode is not None and attributes.mode != told.mode and told.kind is not Kind.SYMLINK:
                await space.client.set_mode(told.id, attributes.mode)
            return await self._look_after(space, told.id, place, names, with_xattrs=xattrs is not None)

    async def changes(self) -> AsyncIterator[Change]:
        """A change of the directory in which something is different. Only directories that were listed are watched."""
        if not self._has_events:
            raise RemoteUnsupported("there is no feed of changes for this mount")
        space = await self._spaces.only()
        async with aclosing(self._watch.changes(space.client, space.id)) as changes:
            async for change in changes:
                yield change

    async def aclose(self) -> None:
        await self._spaces.aclose()

    # --- answers ---

    def _space_entry(self, space: Space) -> Entry:
        details = {"space": space.id, "providers": ", ".join(client.authority for client in space.clients)}
        return Entry(
            space.shown, Kind.DIRECTORY, id=space.id, writable=space.writable, removable=False, border=True, details=details
        )

    async def _entry(
        self, space: Space, told: Told, place: Place, names: Names, xattrs: dict[str, bytes] | None
    ) -> Entry:
        if not names and self._options.space is None:
            return self._space_entry(space)
        told = await self._with_target(space, told)
        writable = self._is_writable(space)
        return entry_of(told, place.name, depth=self._depth(names), space=space.id, writable=writable, xattrs=xattrs)

    def _depth(self, names: Names) -> int:
        return len(self._paths.folder) + len(names) - 1

    def _is_writable(self, space: Space) -> bool:
        return space.writable and not self._read_only

    async def _with_target(self, space: Space, told: Told) -> Told:
        """Providers before 21.02.5 tell where a symlink leads only when asked for that."""
        if told.kind is not Kind.SYMLINK or told.target is not None:
            return told
        return msgspec.structs.replace(told, target=await space.client.symlink_value(told.id))

    async def _look_after(
        self, space: Space, id: str, place: Place, names: Names, *, size: int | None = None, with_xattrs: bool = False
    ) -> Entry:
        """The entry of an object after a change of ours. Failing leaves in doubt what the change came to.

        `size` is what a file of ours has now. If it is gone, or has another size, it was spoiled on its way or somebody else
        has changed it since: who asked for the upload must compare before anything is taken for theirs.
        """
        try:
            told = await space.client.attributes(id)
            if size is not None and told.size != size:
                raise RemoteProtocolError(f"{place} has {told.size} bytes, where {size} were written", in_doubt=True)
            xattrs = await self._xattrs.read(space.client, id) if with_xattrs else None
            return await self._entry(space, told, place, names, xattrs)
        except RemoteError as exc:
            exc.in_doubt = size is not None or not isinstance(exc, RemoteNotFound)
            raise


Entries = list[Entry]
"""`list` is a method above."""


def _hang_up(incoming: Incoming) -> None:
    raise Heard
