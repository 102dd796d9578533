"""The property in which we keep what WebDAV has no place for: mode, exact mtime, symlink target, extended attributes.

Pure; it knows no requests. One dead property of a file or directory, in a namespace of ours, holds compact JSON. Servers
keep dead properties when somebody replaces the content, so the property says of which version it was said: mtime and
target count only while the file still has that version; mode and extended attributes stay with the name.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from xml.sax.saxutils import escape

from nbmountd.model import Attributes, Entry, Kind, Version

NAMESPACE = "urn:nbmountd:1"
PROPERTY = f"{NAMESPACE} attributes"
"""The property's name as multistatus.py writes it."""

LIMIT = 8 * 1024
"""Characters of the property. It comes with every listing; extended attributes that make it longer stay in this mount."""

NO_ROOM = "elsewhere"
"""Stands in the place of extended attributes that were too large."""

DEFAULT_MODES = {Kind.FILE: 0o644, Kind.DIRECTORY: 0o755, Kind.SYMLINK: 0o777}
"""Modes that need no property."""


@dataclass(frozen=True)
class Overlay:
    """What the property says. None: nothing. `of` is the version that `mtime_ns` and `target` belong to, `id` the file
    that all belongs to (where the server keeps properties by name: nextcloud_overlay.py).

    `xattrs` None: there are some that had no room; only the mount that set them knows.
    """

    mode: int | None = None
    mtime_ns: int | None = None
    target: str | None = None
    xattrs: Mapping[str, bytes] | None = field(default_factory=dict)
    of: Version | None = None
    id: str | None = None

    def __bool__(self) -> bool:
        return self != Overlay(of=self.of, id=self.id)


def parse(text: str | None) -> Overlay:
    """The property's value as anybody may have written it: what is not as we write it counts as nothing said."""
    try:
        found = json.loads(text) if text else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return Overlay()
    mode, mtime_ns, target, of, id = (found.get(key) for key in ("mode", "mtime_ns", "target", "of", "id"))
    return Overlay(
        mode=mode if type(mode) is int and 0 <= mode <= 0o7777 else None,
        mtime_ns=mtime_ns if type(mtime_ns) is int and abs(mtime_ns) < 1 << 63 else None,
        target=target if isinstance(target, str) and target and "\0" not in target else None,
        xattrs=_xattrs(found.get("xattrs")),
        of=Version(of) if isinstance(of, str) else None,
        id=id if isinstance(id, str) else None,
    )


def _xattrs(found: object) -> dict[str, bytes] | None:
    if found == NO_ROOM:
        return None
    xattrs: dict[str, bytes] = {}
    for name, value in found.items() if isinstance(found, dict) else ():
        if isinstance(value, str) and name.startswith("user.") and "\0" not in name:
            try:
                xattrs[name] = base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError):
                continue
    return xattrs


def write(overlay: Overlay) -> str:
    """The property's value; ASCII, and longer than LIMIT if there is that much to say."""
    said: dict[str, Any] = {
        key: value
        for key, value in (("mode", overlay.mode), ("mtime_ns", overlay.mtime_ns), ("target", overlay.target))
        if value is not None
    }
    if overlay.xattrs is None:
        said["xattrs"] = NO_ROOM
    elif overlay.xattrs:
        said["xattrs"] = {name: base64.b64encode(value).decode() for name, value in overlay.xattrs.items()}
    if overlay.of is not None and (overlay.mtime_ns is not None or overlay.target is not None):
        said["of"] = overlay.of
    if overlay.id is not None:
        said["id"] = overlay.id
    return json.dumps(said, separators=(",", ":"), sort_keys=True)


def update_body(overlay: Overlay | None, lastmodified: int | None = None) -> bytes:
    """The body of a PROPPATCH that stores the property, or removes it when there is nothing to say; None leaves it alone.

    `lastmodified`: seconds since 1970, for a Nextcloud, where `d:lastmodified` sets the time.
    """
    parts = []
    if overlay is not None:
        verb, value = ("set", escape(write(overlay))) if overlay else ("remove", "")
        parts.append(f"<d:{verb}><d:prop><n:attributes>{value}</n:attributes></d:prop></d:{verb}>")
    if lastmodified is not None:
        parts.append(f"<d:set><d:prop><d:lastmodified>{lastmodified}</d:lastmodified></d:prop></d:set>")
    return (
        f'<?xml version="1.0" encoding="utf-8"?><d:propertyupdate xmlns:d="DAV:" xmlns:n="{NAMESPACE}">'
        f"{''.join(parts)}</d:propertyupdate>"
    ).encode()


PROBE_BODY = (
    f'<?xml version="1.0" encoding="utf-8"?><d:propertyupdate xmlns:d="DAV:" xmlns:n="{NAMESPACE}">'
    "<d:remove><d:prop><n:probe/></d:prop></d:remove></d:propertyupdate>"
).encode()
"""Removes a property that nobody has: a success where dead properties are kept (RFC 4918, section 9.2)."""


def seen(entry: Entry, overlay: Overlay) -> Entry:
    """`entry`, which has what the server itself says, together with the property."""
    kind = entry.kind
    present = overlay.of is not None and overlay.of == entry.version and kind is Kind.FILE
    target = overlay.target if present else None
    if target is not None:
        kind = Kind.SYMLINK
    attributes = Attributes(
        mode=DEFAULT_MODES[kind] if overlay.mode is None or kind is Kind.SYMLINK else overlay.mode,
        mtime_ns=overlay.mtime_ns if present and overlay.mtime_ns is not None else entry.attributes.mtime_ns,
        target=target,
        xattrs=overlay.xattrs,
    )
    return replace(entry, kind=kind, attributes=attributes)


def wanted(entry: Entry, attributes: Attributes) -> Overlay:
    """What the property of `entry` has to say so that it has `attributes`; None among them leaves what it says now."""
    mode = entry.attributes.mode if attributes.mode is None else attributes.mode
    mtime_ns = entry.attributes.mtime_ns if attributes.mtime_ns is None else attributes.mtime_ns
    xattrs = entry.attributes.xattrs if attributes.xattrs is None else attributes.xattrs
    directory = entry.kind is Kind.DIRECTORY
    return Overlay(
        mode=None if mode == DEFAULT_MODES[entry.kind] else mode,
        mtime_ns=None if directory else mtime_ns,
        target=attributes.target or entry.attributes.target,
        xattrs=xattrs,
        of=None if directory else entry.version,
    )


def bounded(overlay: Overlay) -> Overlay:
    """`overlay` without its extended attributes if they make it longer than LIMIT."""
    return overlay if len(write(overlay)) <= LIMIT else replace(overlay, xattrs=None)
