"""What a person can do with parked work besides trying it again: copy it out of the mount, or give it up.

Giving up brings the local position back to base: what the remote never saw is removed, what was edited is again as the remote
has it, what was moved or removed is back where the remote has it. It does not know why something is parked (engine.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import trio

from nbmountd.disk.content import Content
from nbmountd.disk.database import Node
from nbmountd.errors import Exists, InvalidArgument, LocalError, RemoteError, StaleFile
from nbmountd.fs.filesystem import FileSystem
from nbmountd.model import ROOT_INODE, Kind

COPY_PIECE = 4 * 2**20


async def export(fs: FileSystem, node: Node, target: Path) -> list[str]:
    """Copies `node`, and what is below it, to `target`, which must not exist. Returns what could not be copied and why.

    Bytes that only the remote has are fetched. Nothing that exists is overwritten. Raises nothing for a single file.
    """
    problems: list[str] = []
    owner = fs.nodes.owner(node)
    try:
        if node.is_directory:
            await trio.to_thread.run_sync(lambda: target.mkdir(mode=0o700, parents=True))
        elif node.kind is Kind.SYMLINK:
            await trio.to_thread.run_sync(_link, owner.target or "", target)
        elif node.kind is Kind.FILE:
            await _copy(fs, owner, target)
    except (OSError, LocalError, RemoteError) as exc:
        return [f"{fs.nodes.local_path(node)}: {exc}"]
    if node.is_directory:
        for child in fs.nodes.database.children(node.ino):
            problems += await export(fs, child, target / child.name)
    return problems


def _link(pointing_to: str, target: Path) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    target.symlink_to(pointing_to)


async def _copy(fs: FileSystem, node: Node, target: Path) -> None:
    content = fs.store.open(node)
    try:
        with await trio.to_thread.run_sync(_create, target) as file:
            await _copy_bytes(fs, content, file)
        os.utime(target, ns=(node.mtime_ns, node.mtime_ns))
    finally:
        fs.store.release(content)


def _create(target: Path) -> BinaryIO:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb")  # noqa: PTH123


async def _copy_bytes(fs: FileSystem, content: Content, file: BinaryIO) -> None:
    at = 0
    while at < content.size:
        piece = await fs.reads.read(content, at, COPY_PIECE)
        if not piece:
            raise StaleFile("it became shorter while it was copied")
        await trio.to_thread.run_sync(file.write, piece)
        at += len(piece)


def discard(fs: FileSystem, node: Node) -> None:
    """Brings `node`, and what is below it, back to base. Raises Exists when the place that the remote has it at is taken here,
    InvalidArgument when it holds something that is elsewhere on the remote; then nothing has changed."""
    if node.is_directory and node.base_parent is None:
        _check_all_new(fs, node)
        _remove(fs, node)
    elif node.base_parent is None:
        _remove(fs, node)
    elif node.unsent and node.kind is Kind.FILE and node.link_of is None:
        _take_base(fs, node)
    else:
        _return(fs, node)
    fs.nodes.wake()


def _check_all_new(fs: FileSystem, directory: Node) -> None:
    for child in fs.nodes.database.children(directory.ino):
        if child.base_parent is not None:
            raise InvalidArgument(f"{fs.nodes.local_path(child)} is elsewhere on the remote: move it out of there first")
        if child.is_directory:
            _check_all_new(fs, child)


def _remove(fs: FileSystem, node: Node) -> None:
    """Takes the name from what the remote never saw; an open file lives on as a removed one does."""
    nodes = fs.nodes
    for child in nodes.database.children(node.ino) if node.is_directory else ():
        _remove(fs, child)
    if node.parent is not None:
        parent, name = node.parent, node.name
        with nodes.transaction() as change:
            nodes.detach(change, node, ctime_ns=nodes.now()[0])
        nodes.kernel.entry_changed(parent, name)
    nodes.drop_if_unused(node, although_known=True)  # the kernel may remember it for a long time


def _take_base(fs: FileSystem, node: Node) -> None:
    """The remote's version becomes a new node, as after a change by others; who has the old one open keeps its bytes."""
    nodes = fs.nodes
    if nodes.aliases[node.ino]:
        raise InvalidArgument("it has further names (hard links): remove those first")
    parent, name = _place_of(fs, node)
    mtime_ns = node.base_mtime_ns or 0
    base: dict[str, Any] = {
        key: getattr(node, key)
        for key in (
            "base_parent", "base_name", "base_id", "base_version", "base_size", "base_mtime_ns", "writable", "removable"
        )
    }
    local = {
        "mode": node.mode, "xattrs": node.xattrs, "size": node.base_size or 0, "mtime_ns": mtime_ns, "ctime_ns": nodes.now()[0],
    }  # fmt: skip
    was = node.parent or ROOT_INODE, node.name
    with nodes.transaction() as change:
        nodes.detach(change, node, base_parent=None, unsent_attributes=0)
        change.insert(Kind.FILE, parent=parent, name=name, **base, **local)
    nodes.kernel.entry_changed(*was)
    nodes.kernel.entry_changed(parent, name)
    nodes.drop_if_unused(node, although_known=True)  # the kernel may remember it for a long time


def _return(fs: FileSystem, node: Node) -> None:
    """Name and attributes are the remote's again."""
    nodes = fs.nodes
    parent, name = _place_of(fs, node)
    was = node.parent or ROOT_INODE, node.name
    with nodes.transaction() as change:
        change.update(node, parent=parent, name=name, unsent_attributes=0, ctime_ns=nodes.now()[0])
    nodes.kernel.entry_changed(*was)
    nodes.kernel.entry_changed(parent, name)
    nodes.kernel.attributes_changed(node.ino)


def _place_of(fs: FileSystem, node: Node) -> tuple[int, str]:
    """Where the remote has it, if that is free here."""
    assert node.base_parent is not None
    occupant = fs.nodes.database.child(node.base_parent, node.base_name)
    if occupant is not None and occupant is not node:
        raise Exists(f"{fs.nodes.local_path(occupant)} has taken its place: rename that first")
    directory = fs.nodes.get(node.base_parent)
    if directory.removed:
        raise InvalidArgument(f"its directory {fs.nodes.local_path(directory)} was removed as well: discard that first")
    return node.base_parent, node.base_name
