"""StorageHub's items: what is read of their JSON, which kind and name they have, and the entries that the core gets.

Pure; it knows nothing of requests. Answers are hostile input: any field may be missing, null or absurd. Only the fields
named here are kept, so thumbnails and accounting cost no memory. Facts are from the server's source (1.x) and its API
pages (2.x).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from nbmountd.backends.d4science_names import decode
from nbmountd.backends.hygiene import NOT_JSON
from nbmountd.errors import RemoteProtocolError
from nbmountd.model import Attributes, Entry, Kind, Version

log = logging.getLogger(__name__)

LARGEST_SIZE = 2**62

VRE_FOLDERS = "nbmountd:vre-folders"
"""The id of the directory that shows the VRE folders. It is ours: the server keeps them where no listing shows them."""

FOLDERS = frozenset({"nthl:workspaceItem", "nthl:workspaceSharedItem", "nthl:workspaceVreItem"})
SHARES = frozenset({"nthl:workspaceSharedItem", "nthl:workspaceVreItem"})
FILES = frozenset({"nthl:externalFile", "nthl:externalImage", "nthl:externalPdf"})
NEVER = frozenset({"nthl:trashItem", "nthl:gCubeItem"})
_TYPE_OF_CLASS = {
    "FolderItem": "nthl:workspaceItem",
    "SharedFolder": "nthl:workspaceSharedItem",
    "VreFolder": "nthl:workspaceVreItem",
    "GenericFileItem": "nthl:externalFile",
    "ImageFile": "nthl:externalImage",
    "PDFFileItem": "nthl:externalPdf",
}

MTIME, MODE, OF_CONTENT = "nbmountd-mtime-ns", "nbmountd-mode", "nbmountd-content"
"""Keys of ours in an item's metadata. The time counts only for the content (storageId) it was stored with: others replace
contents without knowing of it."""


class Content(msgspec.Struct, rename="camel"):
    size: int | float | None = None
    storage_id: str | None = None
    mime_type: str | None = None


class Item(msgspec.Struct, rename="camel"):
    """One item as the server tells it. `metadata` is `propertyMap` in 1.x."""

    id: str = ""
    name: str | None = None
    title: str | None = None
    java_class: str | None = msgspec.field(default=None, name="@class")
    primary_type: str | None = None
    parent_id: str | None = None
    owner: str | None = None
    last_modified_by: str | None = None
    last_action: str | None = None
    """CREATED, UPDATED, RENAMED, MOVED and CLONED were seen."""
    last_modification_time: int | float | None = None
    shared: bool | None = None
    trashed: bool | None = None
    content: Content | None = None
    metadata: Any = None
    property_map: Any = None
    privilege: str | None = None
    vre_folder: bool | None = None
    display_name: str | None = None

    @property
    def type(self) -> str:
        """The primary type, also when only the class is told; "" if neither is known."""
        return self.primary_type or _TYPE_OF_CLASS.get((self.java_class or "").rpartition(".")[2], "")

    @property
    def kind(self) -> Kind | None:
        """None for what cannot be shown as a file or directory."""
        if self.type in FOLDERS:
            return Kind.DIRECTORY
        if self.type in FILES:
            return Kind.FILE
        has_bytes = self.content is not None and (self.content.storage_id or self.content.size is not None)
        return Kind.FILE if has_bytes and self.type not in NEVER else None

    @property
    def is_share(self) -> bool:
        """Whether it is the top of a shared or VRE folder: its parentId may be a place that nobody sees."""
        return self.type in SHARES

    @property
    def size(self) -> int:
        """Bytes; 0 for a damaged item without content."""
        size = self.content.size if self.content is not None else None
        return int(size) if size is not None and 0 <= size < LARGEST_SIZE else 0

    @property
    def values(self) -> dict[str, Any]:
        """The metadata as key and value."""
        told = self.metadata if self.metadata is not None else self.property_map
        if not isinstance(told, dict):
            return {}
        inner = told.get("map", told.get("values"))
        return dict(inner) if isinstance(inner, dict) else {}

    @property
    def values_key(self) -> str:
        """What the server calls the map inside its metadata."""
        told = self.metadata if self.metadata is not None else self.property_map
        return "values" if isinstance(told, dict) and "values" in told and "map" not in told else "map"


class _One(msgspec.Struct):
    item: msgspec.Raw


class _List(msgspec.Struct):
    itemlist: list[msgspec.Raw]


def parse_item(body: bytes, what: str) -> Item:
    """The item of an answer. Raises RemoteProtocolError when there is none."""
    try:
        item = msgspec.json.decode(msgspec.json.decode(body, type=_One).item, type=Item)
    except NOT_JSON as exc:
        raise RemoteProtocolError(f"{what}: the answer is no item: {_reason(exc)}") from None
    if not item.id:
        raise RemoteProtocolError(f"{what}: an item without an id")
    return item


def parse_list(body: bytes, what: str) -> tuple[list[Item], int]:
    """The items of a list, and how many there were with those that make no sense, which are logged and left out."""
    try:
        raw = msgspec.json.decode(body, type=_List).itemlist
    except NOT_JSON as exc:
        raise RemoteProtocolError(f"{what}: the answer is no list of items: {_reason(exc)}") from None
    items = []
    for each in raw:
        try:
            item = msgspec.json.decode(each, type=Item)
        except NOT_JSON as exc:
            log.warning("%s: left out an item that makes no sense: %s", what, _reason(exc))
            continue
        if item.id:
            items.append(item)
    return items, len(raw)


def shown_name(item: Item) -> str | None:
    """The name that programs see; None if there is none that they could use.

    VRE folders: `displayName`, for the node name is the whole context. Shared folders: `title`, for the node name is the id.
    """
    if item.type == "nthl:workspaceVreItem" or (item.is_share and item.vre_folder):
        name = item.display_name or item.title or item.name
    elif item.is_share:
        name = item.title or item.name
    else:
        name = item.name
    if name is None or (item.is_share and name == item.id):
        return None
    name = decode(name)
    return None if name in ("", ".", "..") or "/" in name or "\0" in name else name


def shown_names(items: Iterable[Item]) -> dict[str, Item]:
    """The items of one listing by the name they are shown under; what cannot be shown is logged and left out.

    Of several with one name, all but the first by id get "~" and eight characters of their id.
    """
    shown: dict[str, Item] = {}
    for item in sorted(items, key=lambda item: item.id):
        name = shown_name(item)
        if name is None or item.kind is None:
            log.info("left out item %.64r (%.64r): nothing that a program could open", item.id, item.type)
            continue
        if name in shown:
            name = with_id(name, item)
        shown[name] = item
    return shown


def with_id(name: str, item: Item) -> str:
    return f"{name}~{item.id[:8]}"


def version_of(item: Item) -> Version | None:
    """Names the bytes of a file: (id, storageId, size), since a new storageId is made at each upload and at nothing else.

    Without storageId the time stands in, which also changes when the item is renamed. None for folders.
    """
    if item.kind is not Kind.FILE:
        return None
    storage = item.content.storage_id if item.content is not None else None
    if storage:
        return Version(f"{item.id}:{storage}:{item.size}")
    return Version(f"{item.id}:t{int(item.last_modification_time or 0)}:{item.size}")


def entry_of(item: Item, name: str, *, writable: bool = True, removable: bool = True) -> Entry:
    """The entry that the core gets."""
    kind = item.kind
    assert kind is not None
    return Entry(
        name,
        kind,
        item.size if kind is Kind.FILE else None,
        version_of(item),
        item.id,
        Attributes(mode=_mode(item), mtime_ns=_mtime_ns(item)),
        writable=writable,
        removable=removable and writable and not item.is_share,
        border=item.is_share or item.id == VRE_FOLDERS,
        details=details_of(item),
    )


def stored_attributes(item: Item, attributes: Attributes) -> dict[str, Any]:
    """The item's metadata with `attributes` among them; what others keep there stays."""
    values = item.values
    if attributes.mode is not None:
        values[MODE] = f"{attributes.mode & 0o7777:o}"
    if attributes.mtime_ns is not None:
        values[MTIME] = str(attributes.mtime_ns)
        values[OF_CONTENT] = _content_key(item)
    return values


def _content_key(item: Item) -> str:
    return (item.content.storage_id or "") if item.content is not None else ""


def _mtime_ns(item: Item) -> int | None:
    values = item.values
    stored = values.get(MTIME)
    if isinstance(stored, str) and re.fullmatch(r"-?[0-9]{1,19}", stored) and values.get(OF_CONTENT) == _content_key(item):
        return int(stored)
    told = item.last_modification_time
    return int(told) * 1_000_000 if told is not None and 0 <= told < 2**43 else None


def _mode(item: Item) -> int | None:
    stored = item.values.get(MODE)
    if isinstance(stored, str) and 0 < len(stored) <= 4 and set(stored) <= set("01234567"):
        return int(stored, 8)
    return None


def details_of(item: Item) -> Mapping[str, str]:
    """What `explain` shows."""
    details = {
        "id": item.id,
        "type": item.type.rpartition(":")[2],
        "owner": item.owner,
        "last changed by": item.last_modified_by,
        "shared": "yes" if item.shared or item.is_share else None,
        "privilege": item.privilege,
        "storage id": item.content.storage_id if item.content is not None else None,
        "content type": item.content.mime_type if item.content is not None else None,
        "name on the remote": item.name if item.name != shown_name(item) else None,
    }
    return {key: value for key, value in details.items() if value}


def _reason(exc: Exception) -> str:
    """A short text without the server's own words: they may hold anything."""
    return "not UTF-8" if isinstance(exc, UnicodeDecodeError) else str(exc)[:120].encode("ascii", "replace").decode()
