"""What a WebDAV server says of its resources, as our values: addresses, ETags, versions, entries.

Pure; it knows nothing of requests. Everything from the server is checked here.
"""

from __future__ import annotations

import calendar
import logging
import re
import unicodedata
from collections.abc import Mapping
from urllib.parse import quote, unquote_to_bytes, urlsplit

from nbmountd.backends.multistatus import DAV, OWNCLOUD, Resource
from nbmountd.errors import NameRefused, RemoteProtocolError
from nbmountd.escapes import AS_THEY_ARE, Rules
from nbmountd.model import Attributes, Entry, Kind, Place, Version

log = logging.getLogger(__name__)

ETAG = re.compile(r'\s*(W/)?"?([\x21\x23-\x7e]+?)"?\s*')
COMPRESSED = re.compile(r"(?:-|--|;)(?:gzip|br|zstd|deflate)$")
"""What mod_deflate and others append inside an ETag when they compress an answer."""
APACHE_ETAG = re.compile(r"[0-9a-f]+(?:-[0-9a-f]+){1,2}")

MONTHS = {
    "Jan": 1, "Feb": 2, "Mar": 3, "Apr": 4, "May": 5, "Jun": 6, "Jul": 7, "Aug": 8, "Sep": 9, "Oct": 10, "Nov": 11, "Dec": 12
}  # fmt: skip


class Addresses:
    """The URLs of one mount: names to quoted paths and back. `base` is the mount's root as the user gave it."""

    def __init__(self, base: str, names: Rules = AS_THEY_ARE) -> None:
        self.names = names
        parts = urlsplit(base)
        self.origin = f"{parts.scheme}://{parts.netloc}"
        path = unquote_to_bytes(parts.path)
        self._base = "/" + "/".join(quote(part, safe="") for part in path.split(b"/") if part)
        if self._base == "/":
            self._base = ""

    def path(self, place: Place, *, directory: bool = False) -> str:
        """The quoted path of `place`, with a slash at the end for a directory. Raises NameRefused for what is no name."""
        parts = [self._base]
        for name in place.path:
            if name in ("", ".", "..") or "/" in name or "\0" in name:
                raise NameRefused(f"not a name: {name!r}")
            parts.append(quote(self.names.stored(name).encode("utf-8", "surrogateescape"), safe=""))
        path = "/".join(parts)
        return path + "/" if directory or not place.path else path

    def url(self, place: Place, *, directory: bool = False) -> str:
        """The same as a whole URL."""
        return self.origin + self.path(place, directory=directory)


class Directory:
    """Tells the names in a listing of the directory at a quoted path; remembers the last parent, as all are alike."""

    def __init__(self, path: str) -> None:
        self._path = _comparable(path.strip("/"))
        self._known_parent = path.strip("/")

    def name(self, href: str) -> str | None:
        """The name of the resource at `href` in this directory; None if it is the directory itself.

        Raises RemoteProtocolError for any other resource: nothing outside of the mount's URL is believed.
        """
        path = href
        if not path.startswith("/"):
            scheme, _, rest = path.partition("://")
            if scheme.lower() not in ("http", "https"):
                raise RemoteProtocolError("an address in the listing that is neither a path nor a URL")
            path = rest[rest.find("/") :] if "/" in rest else ""
        path = path.strip("/")
        parent, _, leaf = path.rpartition("/")
        if leaf and parent == self._known_parent:
            return unquote_to_bytes(leaf).decode("utf-8", "surrogateescape")
        if _comparable(path) == self._path:
            return None
        if leaf and _comparable(parent) == self._path:
            self._known_parent = parent
            return unquote_to_bytes(leaf).decode("utf-8", "surrogateescape")
        raise RemoteProtocolError("the listing holds an address outside of the directory that was asked for")


def _comparable(path: str) -> str:
    """A path without its spelling: decoded, single slashes, composed (servers fold decomposed names)."""
    parts = [part for part in unquote_to_bytes(path).split(b"/") if part]
    return unicodedata.normalize("NFC", b"/".join(parts).decode("utf-8", "surrogateescape"))


# --- versions ----------------------------------------------------------------------------------------------------------
#
# "e:TAG": the opaque tag of an ETag that names exact bytes. "w:TAG;SIZE;SECOND" of a weak one. "t:SIZE;SECOND" without any.
# "n:TAG;SIZE;SECOND;CHECKSUM" of a Nextcloud, whose ETags stay the same when size and second do; the checksum may be empty.


def parse_etag(value: str | None) -> tuple[str, bool] | None:
    """The opaque tag, without quotes and traces of compression, and whether it is weak; None if there is no usable one.

    WsgiDAV leaves the quotes out in listings.
    """
    match = ETAG.fullmatch(value) if value else None
    if match is None:
        return None
    tag = COMPRESSED.sub("", match[2])
    return (tag, match[1] is not None) if tag else None


def version_of(etag: str | None, size: int | None, mtime: int | None) -> Version | None:
    """The version of a file, `mtime` in seconds.

    Apache's ETag (size and microseconds) is weak while the file is less than a second old, then the same tag is strong:
    both are one version.
    """
    parsed = parse_etag(etag)
    if parsed is not None and (not parsed[1] or APACHE_ETAG.fullmatch(parsed[0])):
        return Version(f"e:{parsed[0]}")
    known = f"{'' if size is None else size};{'' if mtime is None else mtime}"
    if parsed is not None:
        return Version(f"w:{parsed[0]};{known}")
    return Version(f"t:{known}") if known != ";" else None


def strong_tag(version: Version) -> str | None:
    """The tag to use in If-Match, None if the version has none that may be used there."""
    if version.startswith("n:"):
        return version[2:].rsplit(";", 3)[0]
    return version[2:] if version.startswith("e:") else None


def nextcloud_version(tag: str, size: int, second: int, checksum: str) -> Version:
    """The version of a file on a Nextcloud. `checksum` is "" or like "SHA1:0a1b"."""
    return Version(f"n:{tag};{size};{second};{checksum.upper()}")


def tells(version: Version, headers: Mapping[str, str], size: int | None) -> bool | None:
    """Whether an answer to GET with these headers, for a file of `size`, is of `version`; None if it does not tell."""
    parsed = parse_etag(headers.get("etag"))
    if version.startswith("e:"):
        return None if parsed is None else parsed[0] == version[2:]
    told: str = version
    undecided = False
    if version.startswith("n:"):
        told, _, checksum = version.rpartition(";")
        theirs = headers.get("oc-checksum", "").upper()
        if theirs != checksum and theirs.partition(":")[0] == checksum.partition(":")[0]:
            return False
        # Without the checksum that we know: replaced by somebody who sends none, most likely.
        undecided = parsed is None or (bool(checksum) and not theirs)
    fields = told[2:].rsplit(";", 2)
    old_size, old_mtime = fields[-2:]
    tag = None if version.startswith("t:") else fields[0]
    if size is not None and old_size and int(old_size) != size:
        return False
    if tag is not None and parsed is not None and parsed[0] != tag:
        return False
    mtime = parse_date(headers.get("last-modified"))
    if mtime is None or not old_mtime:
        return None
    return False if mtime != int(old_mtime) else None if undecided else True


# --- entries -----------------------------------------------------------------------------------------------------------


def entry_of(resource: Resource, name: str) -> Entry:
    """The entry that a resource stands for. Raises RemoteProtocolError for values that are not what they should be."""
    properties = resource.properties
    collection = resource.collection
    if collection is None:
        collection = resource.href.endswith("/")
    size = None if collection else parse_number(properties.get(DAV + "getcontentlength"))
    mtime = parse_date(properties.get(DAV + "getlastmodified"))
    etag = properties.get(DAV + "getetag")
    version = version_of(etag, size, mtime)
    if collection and parse_etag(etag) is None:
        version = None
    permissions = properties.get(OWNCLOUD + "permissions")
    return Entry(
        name=name,
        kind=Kind.DIRECTORY if collection else Kind.FILE,
        size=size,
        version=version,
        id=properties.get(OWNCLOUD + "fileid") or None,
        attributes=Attributes(mtime_ns=None if mtime is None else mtime * 1_000_000_000),
        writable=permissions is None or (("C" in permissions or "K" in permissions) if collection else "W" in permissions),
        removable=permissions is None or "D" in permissions or "N" in permissions,  # some may be renamed only
        checksums=_checksums(properties.get(OWNCLOUD + "checksums")),
    )


def _checksums(text: str | None) -> dict[str, str]:
    """ownCloud's "SHA1:abc MD5:def"."""
    found: dict[str, str] = {}
    for part in (text or "").split():
        algorithm, colon, digest = part.partition(":")
        if colon and digest.isalnum():
            found[algorithm.upper()] = digest.lower()
    return found


def parse_number(text: str | None) -> int | None:
    """A number of bytes; None if there is none. Raises RemoteProtocolError for anything else."""
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise RemoteProtocolError("a size in the listing that is no number")
    return int(text)


def parse_date(text: str | None) -> int | None:
    """Seconds since 1970 of an HTTP date in its fixed form (RFC 9110, section 5.6.7), None if it is not one.

    By hand: the standard library's parser would be half of the time a long listing takes.
    """
    if not text or len(text) != 29:
        return None
    try:
        moment = (int(text[12:16]), MONTHS[text[8:11]], int(text[5:7]), int(text[17:19]), int(text[20:22]), int(text[23:25]))
        return calendar.timegm(moment)
    except (ValueError, KeyError):
        return None
