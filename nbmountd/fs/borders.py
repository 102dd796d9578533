"""Which directories are a world of their own on the remote (a space, a shared folder), so that nothing is renamed across.

It knows nodes only by their numbers and their directories. What it knows is kept in the database, because a listing may be
older than the process; it is small, for people have few of those.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from nbmountd.disk.database import Database, Node
from nbmountd.model import ROOT_INODE

_META = "borders"


class Borders:
    """The borders of one mount."""

    def __init__(self, database: Database) -> None:
        self._database = database
        stored = database.get_meta(_META)
        self._inodes: set[int] = set(msgspec.json.decode(stored, type=list[int])) if stored else set()

    def learn(self, directory: Node, names: Iterable[str]) -> None:
        """A whole listing of `directory` says that those of its entries are borders, and no others."""
        children = (self._database.base_child(directory.ino, name) for name in names)
        now = {child.ino for child in children if child is not None}
        before = {ino for ino in self._inodes if self._base_parent(ino) in (directory.ino, None)}
        if now != before:
            self._inodes = (self._inodes - before) | now
            self._database.set_meta(_META, msgspec.json.encode(sorted(self._inodes)).decode())

    def is_border(self, node: Node) -> bool:
        return node.ino in self._inodes

    def world(self, directory: Node) -> int:
        """The world that entries of the directory belong to: the number of the border at or above it, or of the root."""
        at = directory
        while at.ino not in self._inodes and at.ino != ROOT_INODE and at.parent is not None:
            above = self._database.get(at.parent)
            if above is None:
                break
            at = above
        return at.ino

    def below(self, directory: Node) -> bool:
        """Whether one is known somewhere below the directory."""
        for ino in self._inodes:
            node = self._database.get(ino)
            while node is not None and node.ino != ROOT_INODE and node.parent is not None:
                if node.parent == directory.ino:
                    return True
                node = self._database.get(node.parent)
        return False

    def _base_parent(self, ino: int) -> int | None:
        node = self._database.get(ino)
        return None if node is None else node.base_parent
