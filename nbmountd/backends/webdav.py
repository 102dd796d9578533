"""A WebDAV share as a backend: connects, recognises the server, and hands every verb to the driver for its kind.

It knows nothing of how a verb is carried out: webdav_share.py does for plain WebDAV, nextcloud.py for Nextcloud. What is
learned of the server is kept over reconnects as long as it is the same kind.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from urllib.parse import urlsplit

from nbmountd.backends.base import Body, Change, Piece, Sink, Ticket
from nbmountd.backends.credentials import credential_for
from nbmountd.backends.http import HTTPClient, HTTPStatistics
from nbmountd.backends.http_errors import error_of
from nbmountd.backends.nextcloud import NextcloudShare, locate, split_address
from nbmountd.backends.webdav_client import WebDAVClient
from nbmountd.backends.webdav_entries import Addresses
from nbmountd.backends.webdav_habits import NEXTCLOUD, UNKNOWN, Habits, recognise
from nbmountd.backends.webdav_overlay import NAMESPACE, PROBE_BODY
from nbmountd.backends.webdav_share import WebDAVShare
from nbmountd.config import NextcloudOptions, WebDAVOptions
from nbmountd.errors import ConfigError, RemoteProtocolError
from nbmountd.model import Attributes, Capabilities, Entry, Kind, Place, Quota, Version


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
        self._credential = credential_for(options)
        self._http = HTTPClient(
            options.url,
            credential=self._credential,
            connections=options.connections,
            timeout=options.request_timeout,
            ca_bundle=options.ca_bundle,
            probe=lambda: ("PROPFIND", self._share.root_url, {"Depth": "0"}),
        )
        self._client = WebDAVClient(self._http)
        self._addresses = Addresses(options.url)
        self._share = self._plain(UNKNOWN, overlay=False)

    @property
    def habits(self) -> Habits:
        """What the server was recognised as; UNKNOWN before `connect`."""
        return self._share.habits

    def statistics(self) -> HTTPStatistics:
        """Requests and bytes so far."""
        return self._http.statistics()

    def credential_fingerprint(self) -> object:
        """Equal as long as there is no other password or token to try; never the secret itself. Asks no server."""
        return self._credential.fingerprint()

    async def connect(self) -> Capabilities:
        """OPTIONS to recognise the server, PROPFIND to see that the root is a collection; once, what more there is to ask."""
        root = self._addresses.path(Place())
        if isinstance(self._options, NextcloudOptions):
            root = f"{split_address(urlsplit(self._options.url).path)[0]}/remote.php/dav/"
        answer = await self._client.options(root)
        if answer.status == 429 or (answer.status >= 500 and answer.status != 501):
            raise error_of(answer, f"OPTIONS {root}")  # from a proxy, perhaps: it tells nothing of the server
        habits = recognise(answer.headers, root)
        if "dav" not in answer.headers and not habits.owncloud and await self._has_nextcloud_pages():
            habits = NEXTCLOUD
        if habits != self._share.habits:
            self._share = await self._chosen(habits)
        entry = await self._share.stat(Place())
        if entry.kind is not Kind.DIRECTORY:
            raise RemoteProtocolError(f"{self._options.url} is not a directory")
        return self._share.capabilities()

    async def _chosen(self, habits: Habits) -> WebDAVShare:
        if not habits.owncloud:
            return self._plain(habits, overlay=await self._keeps_properties(habits))
        where = await locate(self._client, urlsplit(self._options.url).path)
        return NextcloudShare(self._client, where, habits, self._options, read_only=self._read_only)

    def _plain(self, habits: Habits, *, overlay: bool) -> WebDAVShare:
        addresses = Addresses(self._options.url, habits.names)
        return WebDAVShare(
            self._client, addresses, habits, self._options, read_only=self._read_only, overlay=overlay
        )

    async def _has_nextcloud_pages(self) -> bool:
        """Whether the URL is that of a Nextcloud's web pages, which know no WebDAV."""
        path = f"{split_address(urlsplit(self._options.url).path)[0]}/status.php"
        answer = await self._http.request("GET", self._http.origin + path)
        return answer.status == 200 and b'"productname"' in answer.body and b'"maintenance"' in answer.body

    async def _keeps_properties(self, habits: Habits) -> bool:
        """Whether dead properties are kept. What is not there is removed to find out: that leaves no trace."""
        if habits.dead_properties is not None or self._read_only:
            return habits.dead_properties is not False
        path = self._addresses.path(Place())
        kept, answer = await self._client.proppatch(path, PROBE_BODY, f"{NAMESPACE} probe")
        if answer.status in (401, 423, 429) or (answer.status >= 500 and answer.status not in (501, 507)):
            raise error_of(answer, f"PROPPATCH {path}")
        return kept

    # --- the verbs ---

    async def stat(self, place: Place) -> Entry:
        return await self._share.stat(place)

    async def list(self, place: Place) -> list[Entry]:
        return await self._share.list(place)

    async def quota(self) -> Quota:
        return await self._share.quota()

    async def read(self, place: Place, version: Version | None, start: int, stop: int, sink: Sink) -> None:
        await self._share.read(place, version, start, stop, sink)

    async def upload(
        self, place: Place, body: Body, *, replaces: Version | None, attributes: Attributes, ticket: Ticket
    ) -> Entry:
        return await self._share.upload(place, body, replaces=replaces, attributes=attributes, ticket=ticket)

    async def write_ranges(
        self, place: Place, pieces: Sequence[Piece], size: int, *, replaces: Version, attributes: Attributes
    ) -> Entry:
        return await self._share.write_ranges(place, pieces, size, replaces=replaces, attributes=attributes)

    async def make_directory(self, place: Place, attributes: Attributes) -> Entry:
        return await self._share.make_directory(place, attributes)

    async def make_symlink(self, place: Place, target: str, attributes: Attributes) -> Entry:
        return await self._share.make_symlink(place, target, attributes)

    async def move(
        self, source: Place, target: Place, *, kind: Kind, version: Version | None, replaces: Version | None
    ) -> Entry:
        return await self._share.move(source, target, kind=kind, version=version, replaces=replaces)

    async def remove(self, place: Place, *, kind: Kind, version: Version | None) -> None:
        await self._share.remove(place, kind=kind, version=version)

    async def set_attributes(self, place: Place, attributes: Attributes, *, kind: Kind) -> Entry:
        return await self._share.set_attributes(place, attributes, kind=kind)

    def changes(self) -> AsyncIterator[Change]:
        return self._share.changes()

    async def aclose(self) -> None:
        await self._http.aclose()
