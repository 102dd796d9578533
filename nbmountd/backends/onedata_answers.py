"""What Onedata says, as our values: attributes in both generations of names, versions, symlink texts, xattrs.

Pure; it knows nothing of requests. Everything from a server is checked here. Sources of the facts: op-worker and ctool,
API 21.02 and 25; names of attributes changed with 21.02.5.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from nbmountd.errors import RemoteProtocolError, RemoteUnsupported
from nbmountd.model import Attributes, Entry, Kind, Version

NEW_NAMES_SINCE = (21, 2, 5)
LONG_PAGES_SINCE = (21, 2, 4)
EVENTS_SINCE = (25,)

ATTRIBUTES = (
    "fileId", "name", "type", "size", "mtime", "ctime", "posixPermissions", "hardlinkCount", "symlinkValue",
    "hasCustomMetadata",
)  # fmt: skip
"""Asked for with every entry."""
PARENT = "parentFileId"

OLD_ATTRIBUTES = ("file_id", "name", "type", "size", "mtime", "ctime", "mode", "hardlinks_count")
OLD_PARENT = "parent_id"

KINDS = {"REG": Kind.FILE, "DIR": Kind.DIRECTORY, "SYMLNK": Kind.SYMLINK}
_SHA256 = hashlib.sha256()
"""Copying it takes half the time of making one (OpenSSL 3 looks the algorithm up each time)."""
LATEST = 2**34
"""Seconds. A time beyond the year 2500 is none."""
LARGEST = 2**62
IDENTIFIER = re.compile(r"[0-9A-Za-z_-]{1,1024}")
MODE = re.compile(r"[0-7]{1,6}")
SPACE_LINK = re.compile(r"<__onedata_space_id:([^>/]*)>(/.*)?", re.DOTALL)
BASE64 = "nbmountd.base64"
"""Key of the JSON object that holds an attribute's value when it is no text."""


class Told(msgspec.Struct, frozen=True, gc=False):
    """Attributes of one object as a provider told them. None: not told."""

    name: str | None = None
    type: str | None = None
    size: int | None = None
    mtime: int | None = None
    ctime: int | None = None
    new_id: str | None = msgspec.field(default=None, name="fileId")
    old_id: str | None = msgspec.field(default=None, name="file_id")
    new_parent: str | None = msgspec.field(default=None, name="parentFileId")
    old_parent: str | None = msgspec.field(default=None, name="parent_id")
    new_mode: str | None = msgspec.field(default=None, name="posixPermissions")
    old_mode: str | None = msgspec.field(default=None, name="mode")
    new_links: int | None = msgspec.field(default=None, name="hardlinkCount")
    old_links: int | None = msgspec.field(default=None, name="hardlinks_count")
    target: str | None = msgspec.field(default=None, name="symlinkValue")
    has_metadata: bool = msgspec.field(default=False, name="hasCustomMetadata")

    @property
    def id(self) -> str:
        """Raises RemoteProtocolError when there is none, or one that is no id."""
        return checked_id(self.new_id or self.old_id)

    @property
    def parent(self) -> str | None:
        return self.new_parent or self.old_parent

    @property
    def kind(self) -> Kind:
        try:
            return KINDS[self.type or ""]
        except KeyError:
            raise RemoteProtocolError("an object of no known type") from None

    @property
    def mode(self) -> int | None:
        return _mode_of(self.new_mode or self.old_mode or "")

    @property
    def links(self) -> int:
        return self.new_links or self.old_links or 1

    @property
    def version(self) -> Version | None:
        """Of a file or symlink. Providers tell times in seconds: two changes in one second that leave the size alone
        have the same version. ctime is in it, because native clients can set mtime back.
        """
        if self.kind is Kind.DIRECTORY or self.size is None or self.mtime is None:
            return None
        return self.version_with(self.id)

    def version_with(self, id: str) -> Version:
        """The version of a file or symlink with that id, checked before."""
        mark = _SHA256.copy()
        mark.update(id.encode())
        return Version(f"{self.size}-{self.mtime}-{self.ctime or 0}-{mark.hexdigest()[:8]}")


class Page(msgspec.Struct, frozen=True):
    """One page of a listing."""

    children: list[Told]
    last: bool = msgspec.field(name="isLast")
    token: str | None = msgspec.field(default=None, name="nextPageToken")


class Made(msgspec.Struct, frozen=True):
    """The answer to a creation or a look-up by path."""

    id: str = msgspec.field(name="fileId")


@lru_cache(maxsize=64)
def _mode_of(text: str) -> int | None:
    return int(text, 8) & 0o7777 if MODE.fullmatch(text) else None


def checked_id(identifier: str | None) -> str:
    if identifier is None or not IDENTIFIER.fullmatch(identifier):
        raise RemoteProtocolError("an object without a valid file id")
    return identifier


def entry_of(
    told: Told, name: str, *, depth: int, space: str, writable: bool, xattrs: Mapping[str, bytes] | None = None
) -> Entry:
    """`told` as an entry called `name`; `depth` directories of the space are above it. Raises RemoteProtocolError."""
    kind, id, size, mtime = told.kind, told.id, told.size, told.mtime
    if not (0 <= (size or 0) < LARGEST and 0 <= (mtime or 0) < LATEST and 0 <= (told.ctime or 0) < LATEST):
        raise RemoteProtocolError(f"an impossible size or time of {name!r}")
    mtime_ns = None if mtime is None else mtime * 1_000_000_000
    if kind is Kind.DIRECTORY:
        attributes = Attributes(mode=told.mode, mtime_ns=mtime_ns, xattrs=xattrs)
        return Entry(name, kind, None, None, id, attributes, writable, writable)
    version = None if size is None or mtime is None else told.version_with(id)
    if kind is Kind.FILE:
        if size is None:
            raise RemoteProtocolError(f"a file without a size: {name!r}")
        attributes = Attributes(mode=told.mode, mtime_ns=mtime_ns, xattrs=xattrs)
        return Entry(name, kind, size, version, id, attributes, writable, writable)
    target = None if told.target is None else local_target(told.target, depth, space)
    attributes = Attributes(mtime_ns=mtime_ns, target=target, xattrs=xattrs)
    return Entry(name, kind, None, version, id, attributes, writable, writable)


def local_target(text: str, depth: int, space: str) -> str:
    """What readlink says: an absolute link of Onedata, `<__onedata_space_id:ID>/rest`, made relative to the link."""
    match = SPACE_LINK.fullmatch(text)
    if match is None or match[1] != space:
        return text
    return "../" * depth + (match[2] or "").lstrip("/") or "."


def parse_version(text: str) -> tuple[int, ...]:
    """"21.02.8" as (21, 2, 8); what is no number ends it."""
    numbers = []
    for part in text.split("."):
        match = re.match(r"\d{1,9}", part)
        if match is None:
            break
        numbers.append(int(match[0]))
    return tuple(numbers)


# --- extended attributes ---------------------------------------------------------------------------------------------

DOCUMENTS = {"user.onedata.json": "onedata_json", "user.onedata.rdf": "onedata_rdf"}
"""A file's JSON and RDF metadata, which are attributes with these keys on the remote."""
_SHOWN_AS = {key: name for name, key in DOCUMENTS.items()}


def remote_key(name: str) -> str | None:
    """The remote's key of an attribute called `name` here, or None if it has no place there."""
    if name in DOCUMENTS:
        return DOCUMENTS[name]
    key = name.removeprefix("user.")
    if not name.startswith("user.") or not key or key.startswith(("onedata", "cdmi_", "nbmountd")):
        return None
    return key


def remote_value(name: str, value: bytes) -> Any:
    """The JSON value that stands for `value`. Raises RemoteUnsupported for a JSON document that is none."""
    if name == "user.onedata.json":
        try:
            return json.loads(value)
        except ValueError:
            raise RemoteUnsupported("user.onedata.json must hold JSON") from None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return {BASE64: base64.b64encode(value).decode("ascii")}


def shown_xattrs(values: Mapping[str, Any]) -> dict[str, bytes]:
    """The remote's attributes under the names and with the bytes that programs see."""
    shown = {}
    for key, value in values.items():
        name = _SHOWN_AS.get(key, f"user.{key}")
        if remote_key(name) == key and len(name.encode("utf-8", "replace")) <= 255 and "\0" not in name:
            shown[name] = _shown_value(name, value)
    return shown


def _shown_value(name: str, value: Any) -> bytes:
    if isinstance(value, str) and name != "user.onedata.json":
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, dict) and list(value) == [BASE64] and isinstance(value[BASE64], str):
        try:
            return base64.b64decode(value[BASE64])
        except ValueError:
            pass
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
