"""A D4Science workspace (gCube StorageHub) as a backend: each verb as the fewest calls that keep its promises.

It knows nothing of how requests travel (d4science_api.py, http.py), how items are found (d4science_places.py) or how a change
is verified (d4science_changes.py). StorageHub has no conditions: each is a look just before the change. Two changes in one
folder at a time make it answer "locked" (409), so changes are made one by one per folder; uploads that take long only
exclude others at their beginning and end.

Shared between tasks: the locks of folders, and what was learned of the server (`_ranged`, `_has_size`, `_privileges`);
losing an update of those costs a request, nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import trio

from nbmountd.backends.base import Body, Change, Piece, Sink, Ticket
from nbmountd.backends.d4science_answers import Unclear, refuses_the_token
from nbmountd.backends.d4science_api import StorageHub
from nbmountd.backends.d4science_changes import Changes
from nbmountd.backends.d4science_items import VRE_FOLDERS, Item, entry_of, version_of
from nbmountd.backends.d4science_names import MAX_NAME_BYTES, encode
from nbmountd.backends.d4science_places import Places
from nbmountd.backends.d4science_read import Download
from nbmountd.backends.d4science_recent import Recent
from nbmountd.backends.d4science_token import credential_of, secret_for
from nbmountd.backends.d4science_told import Told
from nbmountd.backends.d4science_upload import BytesInMemory, Uploads
from nbmountd.backends.http import HTTPClient, HTTPStatistics
from nbmountd.config import D4ScienceOptions
from nbmountd.errors import (
    ConfigError,
    ParentMissing,
    RemoteDenied,
    RemoteExists,
    RemoteNotFound,
    RemoteProtocolError,
    RemoteUnsupported,
    VersionMismatch,
)
from nbmountd.model import Attributes, Capabilities, Entry, Kind, Place, Quota, Version

log = logging.getLogger(__name__)

LONG_UPLOAD = 1024 * 1024
"""Bytes from which on an upload does not keep others from changing its folder meanwhile."""

SMALL_RENAME_OVER = 4 * 1024 * 1024
"""Bytes up to which a file that is renamed over another one is uploaded as its new version, which keeps id, shares and
history; larger ones replace it, and the old one goes to the trash."""

PROBED_FOLDERS = 3
"""Folders below the root that are searched for a file to find out about ranges."""


class D4ScienceBackend:
    """A `Backend` over one user's workspace. Raises ConfigError for options that cannot work."""

    def __init__(self, options: D4ScienceOptions, *, read_only: bool = False) -> None:
        parts = urlsplit(options.url)
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ConfigError("d4science: `url` must be an address without user, password, query or fragment")
        self._options = options
        self._read_only = read_only
        self._secret = secret_for(options)
        self._credential = credential_of(options, self._secret)
        self._http = HTTPClient(
            options.url,
            credential=self._credential,
            connections=2 * options.connections,  # a read looks at its item while its answer is held
            timeout=options.request_timeout,
            ca_bundle=options.ca_bundle,
            refused=refuses_the_token,
            probe=lambda: self._hub.question,
        )
        self._hub = StorageHub(self._http, options.url)
        self._recent = Recent(self._hub)
        self._places = Places(self._hub, self._recent, options.vre_folders)
        self._changes = Changes(self._hub, self._recent)
        self._told = Told(self._hub, self._places)
        self._ranged = options.ranged_reads
        self._uploads = Uploads(
            self._hub, self._places, self._changes, takes_metadata=options.attributes == "metadata"
        )
        self._has_size = True
        self._locks: WeakValueDictionary[str, trio.Lock] = WeakValueDictionary()
        self._privileges: dict[str, str] = {}
        """Folder -> the user's access to the share it is in, as far as seen."""
        self._user: str | None = None

    def statistics(self) -> HTTPStatistics:
        """Requests and bytes so far."""
        return self._http.statistics()

    def credential_fingerprint(self) -> object:
        """Equal as long as there is no other token to try. Never the token."""
        return self._credential.fingerprint()

    @property
    def token_expires_at(self) -> float | None:
        """When the token in use ends, in seconds since 1970; None if it does not say."""
        return self._secret.expires_at

    @property
    def token_warning(self) -> str:
        """A sentence for a person when the token ends within 15 minutes or has ended; else ""."""
        return self._secret.warning

    async def connect(self) -> Capabilities:
        """The root, the VRE folders, and once a mount the search for a file to try a range on."""
        root = await self._places.find(Place())
        if root.kind is not Kind.DIRECTORY:
            raise RemoteProtocolError(f"{self._options.url}: the workspace is no folder")
        self._user = root.owner
        if root.metadata is None and root.property_map is None:
            self._uploads.takes_metadata = False
        if self._options.vre_folders:
            try:
                await self._hub.vre_folders()
            except (Unclear, RemoteNotFound, RemoteDenied, RemoteUnsupported) as exc:
                log.warning("VRE folders are not shown: %s", exc)
                self._places.vre_folders = ""
        if self._ranged is None:
            with suppress(RemoteNotFound, RemoteProtocolError, RemoteDenied):
                await self._probe_ranges(root)
        return Capabilities(
            ranged_reads=bool(self._ranged),
            conditional_writes=False,
            stable_ids=True,
            native_mode=self._uploads.takes_metadata,
            native_mtime=self._uploads.takes_metadata,
            mtime_granularity_ns=1,
            told_attributes=self._told.names,
            max_name_bytes=MAX_NAME_BYTES,
            connections=self._options.connections,
        )

    # --- looking ---

    async def stat(self, place: Place) -> Entry:
        item = await self._places.find(place)
        return self._entry(item, place.name)

    async def list(self, place: Place) -> list[Entry]:
        shown = await self._places.list(place)
        if place.id and place.id not in self._privileges and any(item.shared for item in shown.values()):
            await self._learn_privilege(place.id)
        privilege = self._privileges.get(place.id or "")
        for item in shown.values():
            if item.kind is Kind.DIRECTORY and (item.privilege or privilege):
                self._privileges[item.id] = item.privilege or privilege or ""
        return [self._entry(item, name) for name, item in shown.items()]

    async def quota(self) -> Quota:
        if not self._has_size:
            return Quota()
        try:
            return Quota(used=await self._hub.size())
        except (RemoteNotFound, RemoteUnsupported, RemoteDenied, Unclear):
            self._has_size = False  # 1.x has no such call
            return Quota()

    async def read(self, place: Place, version: Version | None, start: int, stop: int, sink: Sink) -> None:
        if start and self._ranged is False:
            raise RemoteUnsupported("this server sends whole files only")
        if start >= stop:
            return
        item_id = place.id or (await self._places.find(place)).id
        asking = Place(place.path, item_id, place.parent_id)

        def check() -> None:
            if version is not None:
                trio.from_thread.run(self._must_still_have, asking, version)

        download = Download(f"GET {place}", start, stop, sink, check)
        headers = {} if self._ranged is False else {"Range": f"bytes={start}-{stop - 1}"}
        try:
            await self._hub.download(item_id, headers, download)
        except (RemoteProtocolError, RemoteNotFound):
            if version is not None and download.ranged is None:
                await self._must_still_have(asking, version)
            elif download.ranged is None:
                await self._places.find(asking)  # raises RemoteNotFound if that is what was meant
            raise
        finally:
            if download.ranged is not None and self._options.ranged_reads is None:
                self._ranged = download.ranged

    async def tell(self, place: Place, name: str) -> bytes:
        return await self._told.tell(place, name)

    async def describe(self, place: Place) -> Mapping[str, str]:
        return await self._told.describe(place)

    # --- changing ---

    async def upload(
        self, place: Place, body: Body, *, replaces: Version | None, attributes: Attributes, ticket: Ticket
    ) -> Entry:
        wire = self._writable_name(place)
        parent = await self._places.parent(place)
        async with AsyncExitStack() as stack:
            if body.size < LONG_UPLOAD:
                await stack.enter_async_context(self._changing(parent))
            old = None
            if replaces is None:
                await self._must_be_free(place, parent)
            else:
                old = await self._must_have(place, replaces)
                wire = old.name or wire
            item = await self._uploads.send(place, parent, wire, body, old)
            return self._entry(await self._uploads.with_attributes(item, attributes), place.name)

    async def write_ranges(
        self, place: Place, pieces: Sequence[Piece], size: int, *, replaces: Version, attributes: Attributes
    ) -> Entry:
        raise RemoteUnsupported("StorageHub writes whole files")

    async def make_directory(self, place: Place, attributes: Attributes) -> Entry:
        wire = self._writable_name(place)
        parent = await self._places.parent(place)
        async with self._changing(parent):
            await self._must_be_free(place, parent)
            try:
                made = await self._hub.create_folder(parent, wire)
            except (RemoteNotFound, Unclear) as exc:
                raise await self._places.explained(exc, place, parent) from exc
            item = await self._changes.look(made)
            await self._uploads.must_be_as_meant(item, place, wire)
            return self._entry(await self._uploads.with_attributes(item, attributes), place.name)

    async def make_symlink(self, place: Place, target: str, attributes: Attributes) -> Entry:
        raise RemoteUnsupported("StorageHub has no symlinks")

    async def move(
        self, source: Place, target: Place, *, kind: Kind, version: Version | None, replaces: Version | None
    ) -> Entry:
        """RemoteUnsupported where the server refuses to move across the border of a shared folder (EXDEV)."""
        wire = self._writable_name(target)
        folder = await self._places.parent(target)
        await self._places.parent(source)
        item = await self._places.find(source)
        self._must_be(item, source, version)
        async with self._changing(folder, item.parent_id or folder):
            if replaces is None:
                await self._must_be_free(target, folder, but=item.id)
            else:
                old = await self._must_have(target, replaces)
                if kind is Kind.DIRECTORY:
                    await self._must_be_empty(old, target)
                elif item.size <= SMALL_RENAME_OVER:
                    return await self._upload_over(item, source, target, folder, old)
                await self._changes.delete(old, force=not self._options.trash)
            try:
                item = await self._changes.shift(item, folder, wire)
            except (RemoteNotFound, Unclear) as exc:
                raise await self._places.explained(exc, target, folder) from exc
            return self._entry(item, target.name)

    async def remove(self, place: Place, *, kind: Kind, version: Version | None) -> None:
        if self._read_only:
            raise RemoteDenied("the mount is read-only")
        try:
            parent = await self._places.parent(place)
            item = await self._places.find(place)
        except (RemoteNotFound, ParentMissing):
            return
        if item.is_share:
            raise RemoteDenied(f"{place} is a shared folder: it is removed on the D4Science portal")
        async with self._changing(parent):
            if kind is Kind.DIRECTORY:
                await self._must_be_empty(item, place)
            self._must_be(item, place, version)
            await self._changes.delete(item, force=not self._options.trash)

    async def set_attributes(self, place: Place, attributes: Attributes, *, kind: Kind) -> Entry:
        if self._read_only:
            raise RemoteDenied("the mount is read-only")
        if not self._uploads.takes_metadata or (attributes.mode is None and attributes.mtime_ns is None):
            raise RemoteUnsupported("this server has no place for these attributes")
        item = await self._places.find(place)
        if item.id == VRE_FOLDERS:
            raise RemoteDenied(f"{place} is not on the server")
        async with self._changing(item.parent_id or item.id):
            item = await self._uploads.with_attributes(item, attributes)
        if not self._uploads.takes_metadata:
            raise RemoteUnsupported("this server has no place for these attributes")
        return self._entry(item, place.name)

    def changes(self) -> AsyncIterator[Change]:
        raise RemoteUnsupported("StorageHub tells of no changes")

    async def aclose(self) -> None:
        await self._http.aclose()

    # --- parts of changes ---

    async def _upload_over(self, item: Item, source: Place, target: Place, folder: str, old: Item) -> Entry:
        """Makes the bytes of `item` a new version of `old`, then removes `item`."""
        content = bytearray()
        version = version_of(item)
        reading = Place(source.path, item.id, source.parent_id)
        await self.read(reading, version, 0, item.size, content.extend)
        new = await self._uploads.send(target, folder, old.name or "", BytesInMemory(bytes(content)), old)
        if values := {**new.values, **item.values}:
            new = await self._uploads.with_metadata(new, values)
        if version is not None:
            await self._must_still_have(reading, version)
        await self._changes.delete(item, force=True)  # its bytes are in the target now
        return self._entry(new, target.name)

    @asynccontextmanager
    async def _changing(self, *folders: str) -> AsyncIterator[None]:
        """One change at a time in each of these folders."""
        async with AsyncExitStack() as stack:
            for folder in sorted(set(folders)):
                lock = self._locks.get(folder)
                if lock is None:
                    lock = self._locks[folder] = trio.Lock()
                await stack.enter_async_context(lock)
            yield

    # --- conditions ---

    async def _must_be_free(self, place: Place, parent: str, *, but: str | None = None) -> None:
        try:
            found = await self._places.named(parent, place.name)
        except (RemoteNotFound, Unclear, RemoteDenied) as exc:
            raise await self._places.explained(exc, place, parent) from exc
        if found is not None and found.id != but:
            raise RemoteExists(f"{place} exists already")

    async def _must_have(self, place: Place, version: Version) -> Item:
        item = await self._places.find(place)
        self._must_be(item, place, version)
        return item

    async def _must_still_have(self, place: Place, version: Version) -> None:
        """In the middle of a read: only the id counts, for the file may have been renamed."""
        assert place.id is not None
        try:
            item = await self._hub.item(place.id)
        except (RemoteNotFound, Unclear):
            item = await self._places.find(place)
        if item.trashed:
            raise RemoteNotFound(f"{place} is in the trash")
        self._must_be(item, place, version)

    @staticmethod
    def _must_be(item: Item, place: Place, version: Version | None) -> None:
        now = version_of(item)
        if version is not None and now is not None and now != version:
            raise VersionMismatch(f"{place} is {now} now, not {version}")

    async def _must_be_empty(self, item: Item, place: Place) -> None:
        try:
            held = await self._recent.holds_anything(item.id)
        except (RemoteNotFound, Unclear):
            held = False
        if held:
            raise RemoteExists(f"{place} is not empty")

    # --- small parts ---

    def _writable_name(self, place: Place) -> str:
        """The name to send. Raises RemoteDenied, NameRefused."""
        if self._read_only:
            raise RemoteDenied("the mount is read-only")
        return encode(place.name)

    def _entry(self, item: Item, name: str) -> Entry:
        return entry_of(item, name, writable=self._may_write(item), removable=self._may_remove(item))

    def _may_write(self, item: Item) -> bool:
        """As far as known; the server has the last word."""
        if item.id == VRE_FOLDERS:
            return False
        if item.kind is Kind.FILE:
            return self._may_remove(item)
        return self._privilege(item) != "READ_ONLY"

    def _may_remove(self, item: Item) -> bool:
        """As far as known. With WRITE_OWNER people make new items in everybody's folders, and change their own only."""
        privilege = self._privilege(item)
        if privilege == "WRITE_OWNER":
            return item.owner in (None, self._user)
        return privilege != "READ_ONLY"

    async def _learn_privilege(self, folder: str) -> None:
        """Of a folder below a share that this process has not listed: the core knows folders from before a restart."""
        passed: list[str] = []
        at: str | None = folder
        privilege = ""
        with suppress(RemoteNotFound, RemoteDenied, Unclear):
            while at and at not in passed and not privilege:
                passed.append(at)
                item = await self._hub.item(at)
                privilege = item.privilege or self._privileges.get(at) or ""
                at = item.parent_id if item.shared else None
        self._privileges |= dict.fromkeys(passed, privilege)

    def _privilege(self, item: Item) -> str | None:
        return item.privilege or self._privileges.get(item.id) or self._privileges.get(item.parent_id or "")

    async def _probe_ranges(self, root: Item) -> None:
        """Asks for one byte of the smallest file that is quickly found. Where there is none, a later read will tell."""
        folders = [root.id]
        for searched in range(1 + PROBED_FOLDERS):
            if searched >= len(folders):
                return
            items = await self._hub.some_children(folders[searched], 100)
            folders += [item.id for item in items if item.kind is Kind.DIRECTORY and not item.is_share]
            files = [item for item in items if item.kind is Kind.FILE and item.size > 1]
            if files:
                smallest = min(files, key=lambda item: item.size)
                download = Download("GET a byte", 0, 1, lambda view: None, lambda: None)
                await self._hub.download(smallest.id, {"Range": "bytes=0-0"}, download)
                self._ranged = download.ranged
                return
