"""What a listing of the remote means for the nodes of a directory: the remote position compared with base and local.

remote = base: nothing. Else `rules.py` says what is to be. What takes the remote's word is done here; what sends ours is
left for the step, which is conditional on the base, finds the difference and settles it. One plain function for a
listing, without an await; a changed version of a file becomes a new node, so that an open file, its pages in the kernel
and its inode number stay with the version that was opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from typing import Any

from nbmountd.disk.database import Node
from nbmountd.fs.nodes import UNSENT_MODE, UNSENT_MTIME, UNSENT_XATTRS, Nodes
from nbmountd.fs.rules import Here, Outcome, There, decide, what_happened_here
from nbmountd.log import get_logger
from nbmountd.model import Entry, Kind

_log = get_logger(__name__)

BATCH = 2000
"""Entries adopted in one transaction; about 20 ms on the loop."""


def adopt(nodes: Nodes, directory: Node, entries: Iterable[Entry], mark: int) -> list[int]:
    """Brings the directory's nodes to what a whole listing, begun at `mark`, says.

    Returns directories that were made on both sides: what the remote has in them is not known yet.
    """
    database = nodes.database
    if directory.base_parent is None or directory.removed:
        return []  # one side has removed it meanwhile; the parent's listing decides, or the step that removes it
    skip = nodes.touched_since(directory.ino, mark)
    known = {node.base_name: node for node in database.base_children(directory.ino)}
    # What was renamed here is left for its step: the remote may have carried it out without our having heard of it. And
    # where a step may have gone, that is asked first.
    skip |= {name for name, node in known.items() if here_of(nodes, node) in (Here.MOVED, Here.MOVED_EDITED)}
    skip |= nodes.doubts.names(directory.ino) | {name for name, node in known.items() if node.ino in nodes.doubts}
    changed = False
    fresh: list[Entry] = []
    borders: list[str] = []
    for entry in entries:
        if entry.border:
            borders.append(entry.name)
        node = known.pop(entry.name, None)
        if entry.name in skip:
            continue
        if entry.kind is Kind.FILE and entry.size is None:
            _log.warning("not shown: the remote tells no size", name=entry.name)  # 0 bytes would be a lie to be written over
            continue
        if node is None:
            fresh.append(entry)
        elif is_forgotten_symlink(node, entry):
            _remind(nodes, node)
        elif node.kind is not entry.kind:
            if _other_kind(nodes, node):
                fresh.append(entry)
            changed = True
        elif is_another_version(nodes, node, entry):
            changed |= take(nodes, node, entry)
        else:
            _same(nodes, node, entry)
    left = {name: node for name, node in known.items() if name not in skip}
    if left and fresh and nodes.capabilities.stable_ids:
        names: dict[str | None, str] = {node.base_id: name for name, node in left.items() if node.base_id is not None}
        fresh = [entry for entry in fresh if not _renamed(nodes, directory, entry, left, names)]
        changed = True
    for node in left.values():
        gone(nodes, node)
        changed = True
    unknown: list[int] = []
    changed |= _take_in(nodes, directory, fresh, unknown)
    nodes.borders.learn(directory, borders)
    values: dict[str, Any] = {}
    if not directory.listed:
        values["listed"] = True
    elif changed:
        values["mtime_ns"] = nodes.now()[0]
    if values:
        with database.transaction() as change:
            change.update(directory, **values)
        nodes.kernel.attributes_changed(directory.ino)
    return unknown


def base_values(nodes: Nodes, entry: Entry) -> dict[str, Any]:
    """The base columns that an entry gives, without its position."""
    return {
        "base_id": entry.id,
        "base_version": entry.version if entry.kind is Kind.FILE else entry.version or "",
        "base_size": entry.size,
        "base_mtime_ns": entry.attributes.mtime_ns,
        "writable": entry.writable,
        "removable": entry.removable,
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


def here_of(nodes: Nodes, node: Node) -> Here:
    """What this side did with a node, as the rules want it."""
    name_taken = (
        node.removed and node.base_parent is not None and nodes.database.child(node.base_parent, node.base_name) is not None
    )
    return what_happened_here(
        has_base=node.base_parent is not None, removed=node.removed, name_taken=name_taken, in_place=node.in_place,
        edited=node.unsent,
    )  # fmt: skip


def is_another_version(nodes: Nodes, node: Node, entry: Entry) -> bool:
    """Whether the entry has other bytes than the base of the node."""
    if node.kind is not Kind.FILE:
        return False
    if node.base_version != entry.version:
        return True
    if entry.size is not None and entry.size != node.base_size:
        return True  # one of the two answers was wrong; the newer one counts
    return not nodes.capabilities.strong_versions and entry.attributes.mtime_ns != node.base_mtime_ns


def is_forgotten_symlink(node: Node, entry: Entry) -> bool:
    """Whether the remote keeps symlinks as files beside which it says what they are, and has lost what it said of this one."""
    same = entry.version is not None and entry.version == node.base_version
    return node.kind is Kind.SYMLINK and entry.kind is Kind.FILE and same


def _remind(nodes: Nodes, node: Node) -> None:
    """The remote is to be told once more what the node is."""
    if not node.unsent_attributes:
        with nodes.transaction() as change:
            change.update(node, unsent_attributes=UNSENT_MODE, changed_at=nodes.now()[1])


def _renamed(
    nodes: Nodes, directory: Node, entry: Entry, left: dict[str, Node], names: Mapping[str | None, str]
) -> bool:
    """Whether somebody else has renamed a node of the directory, untouched here, to what `entry` says: then it is that still.

    `left` are the nodes whose names the listing does not have; the node is taken out of it. `names` are theirs by id.
    """
    old = names.get(entry.id)
    if old is None or old not in left or nodes.database.child(directory.ino, entry.name) is not None:
        return False
    node = left[old]
    untouched = here_of(nodes, node) is Here.SAME and not node.unsent_attributes and not node.link_of
    if node.kind is not entry.kind or not untouched or is_another_version(nodes, node, entry):
        return False
    del left[old]
    with nodes.database.transaction() as change:
        change.update(node, name=entry.name, base_name=entry.name)
    nodes.kernel.entry_changed(directory.ino, old)
    nodes.kernel.entry_changed(directory.ino, entry.name)
    _same(nodes, node, entry)
    return True


def _take_in(nodes: Nodes, directory: Node, fresh: list[Entry], unknown: list[int]) -> bool:
    """Entries that no node has as its base. A name that is in use here is left for the step that will meet it.

    Whether any became a node.
    """
    database = nodes.database
    empty = not database.has_children(directory.ino)  # as at a first listing: then there is nobody to be asked for by name
    taken: set[bytes] = set()
    for start in range(0, len(fresh), BATCH):
        new: list[dict[str, Any]] = []
        with database.transaction() as change:
            for entry in fresh[start : start + BATCH]:
                name = os.fsencode(entry.name)
                if name in taken:  # of two with one name the first one counts
                    continue
                occupant = None if empty else database.child(directory.ino, entry.name)
                base = base_values(nodes, entry)
                if occupant is None:
                    taken.add(name)
                    new.append({"kind": entry.kind, "name": entry.name, **base, **local_values(nodes, entry)})
                elif _is_the_same_directory(occupant, entry):
                    change.update(occupant, base_parent=directory.ino, base_name=entry.name, **base)
                    unknown.append(occupant.ino)
            change.insert_clean(directory.ino, new)
        if directory.listed:  # the kernel may remember that there was no such name
            for values in new:
                nodes.kernel.entry_changed(directory.ino, values["name"])
    return bool(taken)


def _is_the_same_directory(occupant: Node, entry: Entry) -> bool:
    """Whether both sides have made a directory with that name."""
    made_here = occupant.is_directory and occupant.base_parent is None and not occupant.local_only
    return made_here and entry.kind is Kind.DIRECTORY


def _same(nodes: Nodes, node: Node, entry: Entry) -> None:
    content = nodes.store.peek(node.ino)
    if content is not None:
        content.stale = False  # whoever said that the remote has another version was wrong, or it is back
    values = {
        key: value for key, value in base_values(nodes, entry).items() if value != getattr(node, key) and key != "base_mtime_ns"
    }
    if node.kind is Kind.SYMLINK and entry.attributes.target not in (None, node.target) and not node.unsent_attributes:
        values["target"] = entry.attributes.target
    native = nodes.capabilities
    if not node.unsent_attributes and not node.unsent and entry.attributes.mtime_ns != node.base_mtime_ns:
        values["base_mtime_ns"] = entry.attributes.mtime_ns
        if native.native_mtime and entry.attributes.mtime_ns is not None and not node.is_directory:
            values["mtime_ns"] = entry.attributes.mtime_ns
    xattrs = entry.attributes.xattrs
    if native.native_xattrs and xattrs is not None and not node.unsent_attributes and dict(xattrs) != dict(node.xattrs):
        values["xattrs"] = dict(xattrs)
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


def take(nodes: Nodes, node: Node, entry: Entry) -> bool:
    """The remote has other bytes of a file now, where its base is. Returns whether something changed here."""
    outcome = decide(here_of(nodes, node), There.CHANGED)
    if outcome not in (Outcome.TAKE, Outcome.COME_BACK):
        return False  # the step that sends ours is conditional on the version it knows, and will find this one
    assert node.base_parent is not None
    parent, name = node.parent, node.name
    if parent is None:
        parent, name = node.base_parent, node.base_name
    local = local_values(nodes, entry)
    kept = 0 if outcome is Outcome.COME_BACK else node.unsent_attributes & ~UNSENT_MTIME
    if kept & UNSENT_MODE or not nodes.capabilities.native_mode or entry.attributes.mode is None:
        local["mode"] = node.mode
    if kept & UNSENT_XATTRS or not nodes.capabilities.native_xattrs or entry.attributes.xattrs is None:
        local["xattrs"] = node.xattrs
    base = base_values(nodes, entry) | {"base_parent": node.base_parent, "base_name": node.base_name}
    changed_at = node.changed_at if kept or not node.in_place else 0.0
    with nodes.database.transaction() as change:
        if outcome is Outcome.TAKE:
            nodes.orphan(change, node, parent)
        nodes.detach(change, node, base_parent=None, unsent_attributes=0)
        change.insert(entry.kind, parent=parent, name=name, unsent_attributes=kept, changed_at=changed_at, **base, **local)
    _lost_base(nodes, node)
    nodes.kernel.entry_changed(parent, name)
    nodes.drop_if_unused(node)
    return True


def _other_kind(nodes: Nodes, node: Node) -> bool:
    """A file is where a directory was, or the like. Returns whether the newcomer may be taken in now."""
    if here_of(nodes, node) is Here.REPLACED:
        return False  # the step that replaces it will meet the newcomer
    gone(nodes, node)
    return True


def gone(nodes: Nodes, node: Node) -> bool:
    """The remote no longer has it. What was edited here, or is above such, stays and is sent anew; returns whether."""
    if node.is_directory:
        for child in nodes.database.base_children(node.ino):
            gone(nodes, child)
        stays = not node.removed and nodes.database.has_children(node.ino)
    else:
        stays = decide(here_of(nodes, node), There.GONE) is Outcome.SEND_AS_NEW and not node.removed
    parent, name = node.parent, node.name
    if stays:
        # The base version stays with a file: its unsent bytes lie above those bytes, as far as they are here.
        values: dict[str, Any] = {} if node.kind is Kind.FILE else {"base_version": None}
        with nodes.transaction() as change:
            change.update(node, base_parent=None, base_id=None, **values)
        _lost_base(nodes, node)
        return True
    with nodes.database.transaction() as change:
        if parent is not None:
            nodes.orphan(change, node, parent)
        nodes.detach(change, node, base_parent=None)
    _lost_base(nodes, node)
    if parent is not None:
        nodes.kernel.entry_changed(parent, name)
    nodes.drop_if_unused(node)
    return False


def _lost_base(nodes: Nodes, node: Node) -> None:
    """What was not fetched of the base can never be fetched now."""
    content = nodes.store.peek(node.ino)
    if content is not None and node.base_parent is None:
        content.stale = True
