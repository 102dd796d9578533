"""What our property says of a file on a Nextcloud, and whether it is believed: mode, extended attributes, symlink target.

Pure; it knows no requests. The property is the one of webdav_overlay.py. Nextcloud keeps properties by user and path, not by
file (CustomPropertiesBackend, 32): what was removed leaves its own behind for the next file of that name, and what is below
a folder loses its own when the folder moves. So it says which file it belongs to (oc:fileid), and where there is none nothing
is known: a mount keeps what it knew. A target counts only while the file's content is the target.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from nbmountd.backends.webdav_overlay import DEFAULT_MODES, Overlay, bounded, parse, update_body
from nbmountd.model import Attributes, Entry, Kind


def seen(entry: Entry, text: str | None) -> Entry:
    """`entry`, which has what the server itself says, together with the property's value as anybody may have written it."""
    overlay = parse(text)
    if entry.id is None or overlay.id != entry.id:
        return entry
    target = overlay.target if _is_content_of(entry, overlay.target) else None
    kind = entry.kind if target is None else Kind.SYMLINK
    mode = DEFAULT_MODES[kind] if overlay.mode is None or kind is Kind.SYMLINK else overlay.mode
    attributes = replace(entry.attributes, mode=mode, target=target, xattrs=overlay.xattrs)
    return replace(entry, kind=kind, attributes=attributes)


def wanted(entry: Entry, attributes: Attributes) -> Overlay | None:
    """What the property has to say so that `entry` has the mode, xattrs and target of `attributes` (None: those it has).

    None if it need say nothing that it does not say already: of most files there is nothing to be said.
    """
    now = entry.attributes
    known = now.mode is not None
    old_mode = now.mode if now.mode is not None else DEFAULT_MODES[entry.kind]
    old_xattrs = now.xattrs if known else {}
    target = attributes.target if _is_content_of(entry, attributes.target) else now.target
    mode = old_mode if attributes.mode is None else attributes.mode
    xattrs = old_xattrs if attributes.xattrs is None else attributes.xattrs
    if target is not None:
        mode, old_mode = DEFAULT_MODES[Kind.SYMLINK], DEFAULT_MODES[Kind.SYMLINK]
    if entry.id is None or (mode, xattrs, target) == (old_mode, old_xattrs, now.target):
        return None
    return Overlay(mode=mode, xattrs=xattrs, target=target, id=entry.id)


def body_of(overlay: Overlay | None, second: int | None) -> bytes:
    """The body of a PROPPATCH that stores `overlay`, without xattrs that have no room, and the mtime; either may be None."""
    return update_body(None if overlay is None else bounded(overlay), second)


def _is_content_of(entry: Entry, target: str | None) -> bool:
    """Whether the file holds just the target, as a symlink of ours does until somebody writes to it."""
    if target is None or entry.kind is Kind.DIRECTORY:
        return False
    content = target.encode("utf-8", "surrogateescape")
    digest = hashlib.sha1(content, usedforsecurity=False).hexdigest()
    return entry.size == len(content) and entry.checksums.get("SHA1") == digest

