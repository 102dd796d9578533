"""What a listing of the remote means for the nodes of a directory: the remote position compared with base and local.

remote = base: nothing. remote ≠ base, local = base: the remote's is taken. remote ≠ base, local ≠ base: left for the step
that will send the local change; it is conditional on the base, finds the difference and makes a conflict of it. One plain
function for a listing, without an await; a changed version of a file becomes a new node, so that an open file, its pages
in the kernel and its inode number stay with the version that was opened.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Iterable
from typing import Any

from nbmountd.disk.database import Node, Transaction
from nbmountd.fs.nodes import Nodes
from nbmountd.model import Entry, Kind

BATCH = 2000
"""Entries adopted in one transaction; about 20 ms on the loop."""


def adopt(nodes: Nodes, directory: Node, entries: Iterable[Entry], mark: int) -> None:
    """Brings the directory's nodes to what a whole listing, begun at `mark`, says."""
    database = nodes.database
    if directory.base_parent is None:
        return  # removed on the remote while it was listed; the parent's listing decides
    skip = nodes.touched_since(directory.ino, mark)
    known = {node.base_name: node for node in database.base_children(directory.ino)}
    changed = not directory.listed
    fresh: list[Entry] = []
    for entry in entries:
        if entry.name in skip:
            known.pop(entry.name, None)
            continue
        node = known.pop(entry.name, None)
        if node is None:
            fresh.append(entry)
        elif node.kind is not entry.kind:
            _gone(nodes, node)
            fresh.append(entry)
        elif node.kind is Kind.FILE and node.base_version != entry.version:
            _new_version(nodes, node, entry)
            changed = True
        else:
            _same(nodes, node, entry)
    for name, node in known.items():
        if name not in skip:
            _gone(nodes, node)
            changed = True
    for start in range(0, len(fresh), BATCH):
        with database.transaction() as change:
            for entry in fresh[start : start + BATCH]:
                _new(nodes, change, directory, entry)
        changed = True
    values: dict[str, Any] = {}
    if not directory.listed:
        values["listed"] = True
    elif changed:
        values["mtime_ns"] = time.time_ns()
    if values:
        with database.transaction() as change:
            change.update(directory, **values)
        nodes.kernel.attributes_changed(directory.ino)


def base_values(nodes: Nodes, entry: Entry) -> dict[str, Any]:
    """The base columns that an entry gives, without its position."""
    return {
        "base_id": entry.id,
        "base_version": entry.version if entry.kind is Kind.FILE else entry.version or "",
        "base_size": entry.size,
        "base_mtime_ns": entry.attributes.mtime_ns,
        "writable": entry.writable,
    }


def local_values(nodes: Nodes, entry: Entry) -> dict[str, Any]:
    """The local columns of a node that is exactly what the remote has."""
    mtime_ns = entry.attributes.mtime_ns or 0
    mode = entry.attributes.mode
    if mode is None:
        mode = 0o755 if entry.kind is Kind.DIRECTORY else 0o777 if entry.kind is Kind.SYMLINK else 0o644
    if not entry.writable and entry.kind is not Kind.SYMLINK:
        mode &= ~0o222
    return {
        "mode": stat.S_IMODE(mode),
        "size": entry.size or 0,
        "mtime_ns": mtime_ns,
        "ctime_ns": mtime_ns,
        "target": entry.attributes.target,
        "xattrs": dict(entry.attributes.xattrs or {}),
    }


def _new(nodes: Nodes, change: Transaction, directory: Node, entry: Entry) -> None:
    occupant = nodes.database.child(directory.ino, entry.name)
    base = base_values(nodes, entry) | {"base_parent": directory.ino, "base_name": entry.name}
    if occupant is None:
        change.insert(entry.kind, parent=directory.ino, name=entry.name, **base, **local_values(nodes, entry))
        if directory.listed:  # the kernel may remember that there was no such name
            nodes.kernel.entry_changed(directory.ino, entry.name)
    elif occupant.is_directory and entry.kind is Kind.DIRECTORY and occupant.base_parent is None:
        change.update(occupant, **base)  # both sides made the same directory


def _same(nodes: Nodes, node: Node, entry: Entry) -> None:
    values = {
        key: value for key, value in base_values(nodes, entry).items() if value != getattr(node, key) and key != "base_mtime_ns"
    }
    if node.kind is Kind.SYMLINK and entry.attributes.target not in (None, node.target) and not node.unsent_attributes:
        values["target"] = entry.attributes.target
    native = nodes.capabilities
    if not node.unsent_attributes and entry.attributes.mtime_ns != node.base_mtime_ns:
        values["base_mtime_ns"] = entry.attributes.mtime_ns
        if native.native_mtime and entry.attributes.mtime_ns is not None and not node.is_directory:
            values["mtime_ns"] = entry.attributes.mtime_ns
    if native.native_mode and entry.attributes.mode is not None and not node.unsent_attributes:
        mode = local_values(nodes, entry)["mode"]
        if mode != node.mode:
            values["mode"] = mode
    elif values.get("writable") is not None:
        values["mode"] = node.mode | 0o200 if entry.writable else node.mode & ~0o222
    if values:
        with nodes.database.transaction() as change:
            change.update(node, **values)
        nodes.kernel.attributes_changed(node.ino)


def _new_version(nodes: Nodes, node: Node, entry: Entry) -> None:
    """The remote has other bytes now. Unsent local ones stay and will meet the conflict; else a new node takes over."""
    if node.unsent:
        return
    parent, name = node.parent, node.name
    position = {"parent": parent, "name": name, "base_parent": node.base_parent, "base_name": node.base_name}
    with nodes.database.transaction() as change:
        nodes.detach(change, node, base_parent=None, unsent_attributes=0)
        local = local_values(nodes, entry)
        if not nodes.capabilities.native_mode:
            local["mode"] = node.mode
            local["xattrs"] = node.xattrs
        change.insert(entry.kind, **position, **base_values(nodes, entry), **local)
    content = nodes.store.peek(node.ino)
    if content is not None and node.base_parent is None:
        content.stale = True
    if parent is not None:
        nodes.kernel.entry_changed(parent, name)
    nodes.drop_if_unused(node)


def _gone(nodes: Nodes, node: Node) -> bool:
    """The remote no longer has it. Unsent local bytes win over the removal; returns whether the node stays."""
    stays = node.unsent and not node.removed
    if node.is_directory:
        for child in nodes.database.base_children(node.ino):
            _gone(nodes, child)
        stays = not node.removed and any(
            child.to_send or child.local_only or child.is_directory for child in nodes.database.children(node.ino)
        )
    parent, name = node.parent, node.name
    if stays:
        with nodes.transaction() as change:
            change.update(node, base_parent=None, base_id=None, **({} if node.unsent else {"base_version": None}))
        return True
    with nodes.database.transaction() as change:
        nodes.detach(change, node, base_parent=None)
    content = nodes.store.peek(node.ino)
    if content is not None:
        content.stale = True
    if parent is not None:
        nodes.kernel.entry_changed(parent, name)
    nodes.drop_if_unused(node)
    return False
