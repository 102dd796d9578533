"""A Nextcloud (B2DROP is one) as a share: never a PUT over a file, versions that mean bytes, times that are kept.

It knows nothing of how chunks travel (nextcloud_uploads.py). What differs from plain WebDAV, measured on Nextcloud 32:

- A cut PUT over a file leaves it truncated. So: new files by PUT with If-None-Match, everything else by uploads/ + MOVE.
- A file's ETag stays when size and second stay. So a version holds size, second and checksum as well, the version is
  looked at just before the MOVE, and our own uploads never repeat the size and second of what they replace.
- Dead properties belong to one user and one path (nextcloud_overlay.py), and no version tells that one was set. So mode, links
  and extended attributes are stored together with an mtime, which is seen by whoever looks at the folders' versions.
- Bulk upload (`remote.php/dav/bulk`) takes no condition: a file that came meanwhile would be overwritten. So it is not used.
- 404 and 423 for the MOVE may mean that it was done, or is being done: in doubt, so that the caller asks.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import quote, unquote_to_bytes

from nbmountd.backends import nextcloud_overlay
from nbmountd.backends.base import Body, NoTicket, Ticket
from nbmountd.backends.http_errors import error_of
from nbmountd.backends.http_exchange import SEND_PIECE, Answer
from nbmountd.backends.multistatus import DAV, Resource
from nbmountd.backends.nextcloud_names import refused_names
from nbmountd.backends.nextcloud_uploads import CHUNK, ChunkedUploads, Staged
from nbmountd.backends.webdav_client import BASIC_PROPERTIES, OVERLAY_PROPERTIES, OWNCLOUD_PROPERTIES, WebDAVClient
from nbmountd.backends.webdav_entries import Addresses, entry_of, nextcloud_version, parse_etag
from nbmountd.backends.webdav_habits import Habits
from nbmountd.backends.webdav_overlay import PROPERTY, Overlay
from nbmountd.backends.webdav_share import REFUSALS, WebDAVShare
from nbmountd.config import WebDAVOptions
from nbmountd.errors import (
    RemoteError,
    RemoteExists,
    RemoteLocked,
    RemoteProtocolError,
    RemoteUnavailable,
    RemoteUnsupported,
    VersionMismatch,
)
from nbmountd.escapes import Rules
from nbmountd.model import Attributes, Capabilities, Entry, Kind, Place, Version

FIRST_SECOND = 86401
"""The earliest mtime that can be stored; an earlier one is a server error after the content was stored."""

PAGE = 2000
"""Entries of one answer to a listing: about 0.2 s and 1 MB."""

FILE_ID = re.compile(r"0*(\d+)oc[0-9a-z]+")
"""OC-FileId: the number of oc:fileid with zeros before it and the name of the server after it."""


class NextcloudShare(WebDAVShare):
    """The verbs of a `Backend` that a Nextcloud does in its own way."""

    def __init__(
        self, client: WebDAVClient, where: Location, habits: Habits, options: WebDAVOptions, *, read_only: bool
    ) -> None:
        super().__init__(client, where.files(client.http.origin, habits.names), habits, options, read_only=read_only)
        self._uploads = ChunkedUploads(client, where.uploads)
        self._pages = where.pages
        self._refused_names = where.refused_names

    def capabilities(self) -> Capabilities:
        return replace(
            super().capabilities(),
            native_mode=True,
            native_mtime=True,
            mtime_granularity_ns=1_000_000_000,
            native_symlinks=True,
            native_xattrs=True,
            attributes_move=False,
            stable_ids=True,
            propagating_versions=True,
            checksum_algorithm="sha1",
            refused_names=self._refused_names,
        )

    # --- looking ---

    def _properties(self) -> tuple[str, ...]:
        return BASIC_PROPERTIES + OWNCLOUD_PROPERTIES + OVERLAY_PROPERTIES

    def _entry(self, resource: Resource, name: str) -> Entry:
        return nextcloud_overlay.seen(_entry_itself(resource, name), resource.properties.get(PROPERTY))

    async def _listing(self, path: str) -> tuple[Sequence[Resource], Answer]:
        """A listing in pages, or at once where the server has no pages or the list changed between two of them."""
        if not self._pages:
            return await super()._listing(path)
        asked = ["X-NC-Paginate: true", f"X-NC-Paginate-Count: {PAGE}"]
        resources, answer = await self._client.propfind(path, 1, self._properties(), asked)
        token, total = answer.headers.get("x-nc-paginate-token"), answer.headers.get("x-nc-paginate-total", "")
        if answer.status >= 300 or token is None:
            return resources, answer
        if not re.fullmatch(r"[0-9A-Za-z+/=_-]{1,256}", token) or not re.fullmatch(r"[0-9]{1,9}", total):
            raise RemoteProtocolError(f"PROPFIND {path}: pages without a token or a total")
        while len(resources) < int(total):
            next_page = [*asked, f"X-NC-Paginate-Token: {token}", f"X-NC-Paginate-Offset: {len(resources)}"]
            page, more = await self._client.propfind(path, 1, self._properties(), next_page)
            if more.status >= 300 or not page or "x-nc-paginate-token" in more.headers:
                return await super()._listing(path)  # a new token: the pages were forgotten, this is another listing
            resources += page
        if len(resources) != int(total):
            raise RemoteProtocolError(f"PROPFIND {path}: {len(resources)} entries instead of {total}")
        return resources, answer

    # --- changing ---

    async def upload(
        self, place: Place, body: Body, *, replaces: Version | None, attributes: Attributes, ticket: Ticket
    ) -> Entry:
        self._check_write(place)
        second = _second(attributes.mtime_ns, body.size, replaces)
        if replaces is None and body.size <= CHUNK:
            return await self._with_attributes(place, await self._put_new(place, body, second), attributes)
        if replaces is not None and body.size > CHUNK:
            await self._conditions.must_have(place, replaces)  # before gigabytes travel in vain
        try:
            staged = await self._uploads.send(body, self._addresses.url(place), ticket)
        except RemoteError as exc:
            if exc.transient:
                raise
            await self._conditions.parent_must_be(place)
            raise
        return await self._with_attributes(place, await self._assemble(place, staged, second, replaces), attributes)

    async def _put_new(self, place: Place, body: Body, second: int) -> Entry:
        """A small new file, with its checksum: so it is read twice. X-Hash has the server say what has reached it."""
        path = self._addresses.path(place)
        sha1 = ""

        def headers() -> dict[str, str]:
            nonlocal sha1
            sha1 = _sha1_of(body)
            return {"X-OC-Mtime": str(second), "OC-Checksum": f"SHA1:{sha1}", "X-Hash": "sha1", "If-None-Match": "*"}

        answer = await self._client.put_with(path, headers, body)
        if answer.status == 412:
            raise RemoteExists(f"{place} exists already")
        if answer.status >= 300:
            raise await self._conditions.explained(answer, f"PUT {path}", place)
        if answer.headers.get("x-hash-sha1", sha1).lower() != sha1:
            raise RemoteProtocolError(f"PUT {path}: other bytes have reached the server than were sent", in_doubt=True)
        return await self._stored(place, answer, body.size, second, sha1)

    async def _assemble(self, place: Place, staged: Staged, second: int, replaces: Version | None) -> Entry:
        url = self._addresses.url(place)
        headers = {"Destination": url, "X-OC-Mtime": str(second), "OC-Checksum": f"SHA1:{staged.sha1}"}
        old: Entry | None = None
        try:
            if replaces is None:
                headers["Overwrite"] = "F"
            else:
                old = await self._conditions.must_have(place, replaces)
                headers["Overwrite"] = "T"
                if (tag := self._conditions.tag(replaces)) is not None:
                    headers["If"] = f'<{url}> (["{tag}"])'
        except RemoteError as exc:
            if not exc.transient:
                await self._uploads.discard(staged)
            raise
        answer = await self._uploads.assemble(staged, headers)
        if answer.status in (201, 204):
            entry = await self._stored(place, answer, staged.size, second, staged.sha1)
            if old is None or old.id != entry.id:
                return entry
            kept = replace(entry.attributes, mode=old.attributes.mode, xattrs=old.attributes.xattrs)
            return replace(entry, attributes=kept)
        what = f"MOVE {staged.folder}.file"
        if answer.status == 423:
            raise RemoteLocked(f"{what}: 423: an earlier upload may still be put together", in_doubt=True)
        if answer.status == 404:
            raise RemoteUnavailable(f"{what}: 404: it may have been put together already", in_doubt=True)
        if answer.status >= 500 and answer.status not in (501, 507):
            raise error_of(answer, what)
        await self._uploads.discard(staged)
        if answer.status == 412:
            raise RemoteExists(f"{place} exists already") if replaces is None else VersionMismatch(f"{place} has changed")
        if answer.status == 400:
            raise RemoteUnavailable(f"{what}: 400: the server cannot put the parts together")
        await self._conditions.parent_must_be(place)
        raise error_of(answer, what)

    async def _stored(self, place: Place, answer: Answer, size: int, second: int, sha1: str) -> Entry:
        """The entry of what was uploaded just now: from the answer, or by asking where that does not say it all."""
        headers = answer.headers
        etag = parse_etag(headers.get("oc-etag") or headers.get("etag"))
        id = place.id or _file_id(answer)
        if etag is not None and id is not None and headers.get("x-oc-mtime", "").lower() == "accepted":
            return Entry(
                place.name,
                Kind.FILE,
                size,
                nextcloud_version(etag[0], size, second, f"SHA1:{sha1}"),
                id,
                attributes=Attributes(mtime_ns=second * 10**9),
                checksums={"SHA1": sha1},
            )
        entry = await self._look_after(place, size=size)
        if entry.checksums.get("SHA1", sha1) != sha1:  # spoiled on its way, or somebody else's since: compare, then judge
            raise RemoteProtocolError(f"{place} has another checksum than what was uploaded", in_doubt=True)
        return entry

    async def make_directory(self, place: Place, attributes: Attributes) -> Entry:
        await super().make_directory(place, attributes)
        return await self._with_attributes(place, await self._look_after(place), attributes)

    async def make_symlink(self, place: Place, target: str, attributes: Attributes) -> Entry:
        """Makes a small file whose content is the target, for other clients, and whose property says what it is."""
        self._check_write(place)

        async def finish(beside: Place) -> None:
            entry = await self.stat(beside)
            overlay = nextcloud_overlay.wanted(entry, Attributes(target=target))
            if overlay is None or not await self._store_there(beside, entry, overlay, None):
                raise RemoteUnsupported("this Nextcloud has no place for a symlink with that target")

        content = target.encode("utf-8", "surrogateescape")
        sha1 = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        headers = {"OC-Checksum": f"SHA1:{sha1}"}
        return await self._put_beside(place, content, len(content), None, NoTicket(), finish, headers)

    async def set_attributes(self, place: Place, attributes: Attributes, *, kind: Kind) -> Entry:
        self._check_write(place)
        before = await self.stat(place)
        second = None
        if attributes.mtime_ns is not None and before.kind is Kind.FILE and attributes.target is None:
            second = max(attributes.mtime_ns // 10**9, FIRST_SECOND)
            second = None if before.attributes.mtime_ns == second * 10**9 else second
        overlay = nextcloud_overlay.wanted(before, attributes)
        return before if overlay is None and second is None else await self._tell(place, before, overlay, second)

    async def _with_attributes(self, place: Place, entry: Entry, attributes: Attributes) -> Entry:
        """`entry`, which has just been made or written, with mode and xattrs as wanted; no request if that is as it is."""
        overlay = nextcloud_overlay.wanted(entry, attributes)
        if overlay is None:
            return entry
        try:
            return await self._tell(place, entry, overlay, None)
        except RemoteUnsupported:
            return entry
        except RemoteError as exc:
            exc.in_doubt = True  # the content is there
            raise

    async def _tell(self, place: Place, before: Entry, overlay: Overlay | None, second: int | None) -> Entry:
        """Stores attributes and an mtime; the one that it has, if none is given, so that the folders' versions change."""
        if second is None:
            second = max((before.attributes.mtime_ns or time.time_ns()) // 10**9, FIRST_SECOND)
        if not await self._store_there(place, before, overlay, second):
            raise RemoteUnsupported("the server does not store attributes")
        after = await self._look_after(place)
        was_directory, is_directory = (entry.kind is Kind.DIRECTORY for entry in (before, after))
        same = (was_directory, before.size, before.checksums) == (is_directory, after.size, after.checksums)
        return after if same else _replaced(after, before.size)

    async def _store_there(self, place: Place, entry: Entry, overlay: Overlay | None, second: int | None) -> bool:
        # A number in `lastmodified` is Nextcloud's way; `getlastmodified` is refused and a date is a server error there.
        path = self._addresses.path(place, directory=entry.kind is Kind.DIRECTORY)
        name = DAV + "lastmodified" if overlay is None else PROPERTY
        stored, answer = await self._client.proppatch(path, nextcloud_overlay.body_of(overlay, second), name)
        if answer.status >= 300 and answer.status not in REFUSALS:
            raise error_of(answer, f"PROPPATCH {path}")
        return stored


def _sha1_of(body: Body) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    while piece := body.read(SEND_PIECE):
        digest.update(piece)
    body.rewind()
    return digest.hexdigest()


def _entry_itself(resource: Resource, name: str) -> Entry:
    entry = entry_of(resource, name)
    etag = parse_etag(resource.properties.get(DAV + "getetag"))
    mtime_ns = entry.attributes.mtime_ns
    if entry.kind is not Kind.FILE or etag is None or entry.size is None or mtime_ns is None:
        return entry
    version = nextcloud_version(etag[0], entry.size, mtime_ns // 10**9, _checksum(entry))
    return replace(entry, version=version)


def _checksum(entry: Entry) -> str:
    for algorithm in ("SHA1", *sorted(entry.checksums)):
        if algorithm in entry.checksums:
            return f"{algorithm}:{entry.checksums[algorithm]}"
    return ""


def _second(mtime_ns: int | None, size: int, replaces: Version | None) -> int:
    """The mtime to store: as wanted, but one later where it would hide that the content changed."""
    second = max((time.time_ns() if mtime_ns is None else mtime_ns) // 10**9, FIRST_SECOND)
    fields = (replaces or "").rsplit(";", 3)
    return second + 1 if fields[1:3] == [str(size), str(second)] else second


def _replaced(entry: Entry, size: int | None) -> Entry:
    """Somebody else's bytes came in between: a version that matches none, so that the next look shows theirs."""
    return replace(entry, size=size, version=Version(f"replaced:{secrets.token_hex(8)}"))


def _file_id(answer: Answer) -> str | None:
    match = FILE_ID.fullmatch(answer.headers.get("oc-fileid", ""))
    return match[1] if match else None


# --- where things are --------------------------------------------------------------------------------------------------


class Location:
    """The addresses of one user's files. `base` is the quoted path before `remote.php`, `below` names inside her files.

    `pages`: the server gives long listings in pages. `refused_names`: a regular expression for names that it refuses.
    """

    def __init__(self, base: str, user: str, below: tuple[str, ...], *, pages: bool, refused_names: str) -> None:
        self.pages = pages
        self.refused_names = refused_names
        self._base = base
        self._user = quote(user, safe="")
        self._below = below

    def files(self, origin: str, names: Rules) -> Addresses:
        below = "".join("/" + quote(name, safe="") for name in self._below)
        return Addresses(f"{origin}{self._base}/remote.php/dav/files/{self._user}{below}", names)

    @property
    def uploads(self) -> str:
        return f"{self._base}/remote.php/dav/uploads/{self._user}/"


def split_address(path: str) -> tuple[str, tuple[str, ...]]:
    """The path of a URL as users have it, as the path before `remote.php` and the names below the user's files.

    `/remote.php/webdav/…` (old), `/remote.php/dav/files/USER/…`, or the address of the web pages.
    """
    base, found, rest = path.partition("/remote.php")
    if not found:
        return base.rstrip("/").removesuffix("/index.php"), ()
    names = [unquote_to_bytes(part).decode("utf-8", "surrogateescape") for part in rest.split("/") if part]
    if names[:1] == ["webdav"]:
        return base, tuple(names[1:])
    if names[:2] == ["dav", "files"]:
        return base, tuple(names[3:])
    return base, ()


async def locate(client: WebDAVClient, path: str) -> Location:
    """Where the files of the user whose credential is used are; her internal id is not the name she logs in with."""
    base, below = split_address(path)
    dav = f"{base}/remote.php/dav/"
    resources, answer = await client.propfind(dav, 0, ("d:current-user-principal",))
    if answer.status >= 300:
        raise error_of(answer, f"PROPFIND {dav}")
    for resource in resources:
        principal = resource.properties.get(DAV + "current-user-principal", "")
        _, found, user = principal.rstrip("/").rpartition("/principals/users/")
        if found and user and "/" not in user:
            pages = "nc-paginate" in answer.headers.get("dav", "")
            name = unquote_to_bytes(user).decode("utf-8", "surrogateescape")
            return Location(base, name, below, pages=pages, refused_names=await _forbidden(client, base))
    raise RemoteProtocolError(f"PROPFIND {dav}: the server does not say who we are")


async def _forbidden(client: WebDAVClient, base: str) -> str:
    """What the administrator forbids; nothing where the server does not tell."""
    path = f"{base}/ocs/v2.php/cloud/capabilities?format=json"
    try:
        answer = await client.http.request("GET", client.http.origin + path, headers={"OCS-APIRequest": "true"})
    except RemoteProtocolError:  # of any length, perhaps
        return ""
    if answer.status == 429 or answer.status >= 500:
        raise error_of(answer, f"GET {path}")
    return refused_names(answer.body) if answer.status == 200 else ""
