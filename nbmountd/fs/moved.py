"""Nodes that somebody else has moved to another directory of the remote, known by their ids: they stay the same nodes.

It asks the remote nothing: refresh.py confirms that the old places are empty. Only what is as the remote has it is moved so;
with anything unsent, or a step under way, the plan and settle.py find out. A file that was open when its old place was found
empty has lost its name; it gets one again here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nbmountd.disk.database import Node
from nbmountd.fs.adopt import here_of, is_another_version
from nbmountd.fs.nodes import Nodes
from nbmountd.fs.rules import Here
from nbmountd.model import ROOT_INODE, Entry, Kind

MOST_PARENTS = 8
"""Directories that are asked whether something has left them, for one listing; what came from others is taken for new."""


@dataclass(frozen=True, slots=True)
class Move:
    """What a listing of one directory suggests. `left` is the inode of the directory that it has left, if that is to be seen;
    None if it has left it for certain."""

    node: Node
    entry: Entry
    left: int | None


def suggested(nodes: Nodes, directory: Node, entries: Sequence[Entry]) -> list[Move]:
    """What the entries of a directory say has come there from elsewhere."""
    if not nodes.capabilities.stable_ids:
        return []
    by_id = {entry.id: entry for entry in entries if entry.id is not None and not entry.border}
    moves: list[Move] = []
    parents: set[int] = set()
    for node in nodes.database.elsewhere(directory.ino, list(by_id)):
        entry = by_id[node.base_id or ""]
        if not _may_move(nodes, node, directory, entry):
            continue
        if node.base_parent is not None:
            parents.add(node.base_parent)
            if len(parents) > MOST_PARENTS:
                break
        moves.append(Move(node, entry, node.base_parent))
    return moves


def carry_out(nodes: Nodes, directory: Node, moves: Iterable[Move], mark: int) -> None:
    """Gives the nodes their new places, as far as that is still so. `mark` is that of the listing."""
    skip = nodes.touched_since(directory.ino, mark) | nodes.doubts.names(directory.ino)
    for move in moves:
        node, entry = move.node, move.entry
        if entry.name in skip or node.base_parent != move.left or not _may_move(nodes, node, directory, entry):
            continue
        old = (node.parent, node.name)
        if move.left is None:
            nodes.give_back(node)
        with nodes.database.transaction() as change:
            change.update(
                node, parent=directory.ino, name=entry.name, base_parent=directory.ino, base_name=entry.name
            )
        content = nodes.store.peek(node.ino)
        if content is not None:
            content.stale = False
        if old[0] is not None:
            nodes.kernel.entry_changed(old[0], old[1])
        nodes.kernel.entry_changed(directory.ino, entry.name)


def _may_move(nodes: Nodes, node: Node, directory: Node, entry: Entry) -> bool:
    if node.kind is not entry.kind or node.unsent or node.unsent_attributes or node.local_only or node.link_of is not None:
        return False
    if nodes.aliases[node.ino] or node.ino in nodes.doubts or nodes.working[node.ino] or node.ino == ROOT_INODE:
        return False
    if is_another_version(nodes, node, entry) or directory.base_parent is None or directory.removed:
        return False
    taken = nodes.database.child(directory.ino, entry.name), nodes.database.base_child(directory.ino, entry.name)
    if taken != (None, None):
        return False
    if node.base_parent is None:
        return node.kind is Kind.FILE and node.ino in nodes.orphans
    return here_of(nodes, node) is Here.SAME and not _is_within(nodes, directory, node)


def _is_within(nodes: Nodes, directory: Node, node: Node) -> bool:
    """Whether the directory is the node or below it, here or on the remote."""
    for parent_of in ("parent", "base_parent"):
        above: Node | None = directory
        while above is not None and above.ino != ROOT_INODE:
            if above is node:
                return True
            parent = getattr(above, parent_of)
            above = None if parent is None else nodes.database.get(parent)
    return False
