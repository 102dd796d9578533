"""The node table as the file system sees it: names, places on the remote, who still needs a removed node.

State that several tasks touch: the database (every change is one transaction without an await, so each task sees whole
changes), the kernel's lookup counts, and `_touched`: which remote names our own steps have changed, and when, so that a
listing that was under way meanwhile does not bring old news. It knows no FUSE and no content.
"""

from __future__ import annotations

import datetime
import fnmatch
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import trio

from nbmountd.config import MountConfig
from nbmountd.disk.content import ContentStore
from nbmountd.disk.database import Database, Node, Transaction
from nbmountd.errors import NotADirectory, NotFound, StaleFile
from nbmountd.fs.borders import Borders
from nbmountd.fs.conflicts import conflict_name
from nbmountd.fs.doubts import Doubts
from nbmountd.fs.held import Held
from nbmountd.model import ROOT_INODE, Capabilities, Kind, Place

_ORPHAN = "orphan:"
_BASE = ("base_parent", "base_name", "base_id", "base_version", "base_size", "base_mtime_ns")

UNSENT_MODE, UNSENT_MTIME, UNSENT_XATTRS = 1, 2, 4
"""Bits of `Node.unsent_attributes`."""


class KernelView(Protocol):
    """What the kernel is told when something changed that it did not ask for. Calls only queue; none waits."""

    def entry_changed(self, parent: int, name: str) -> None:
        """The name means something else now, or nothing."""

    def attributes_changed(self, ino: int) -> None:
        """Size, times or mode are others now."""

    async def wait_told(self) -> None:
        """Returns when the kernel has been told what is queued now, or after a bounded time."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who owns everything in the mount."""

    uid: int
    gid: int


class Nodes:
    """The nodes of one mount."""

    def __init__(
        self,
        config: MountConfig,
        database: Database,
        store: ContentStore,
        kernel: KernelView,
        *,
        held: Held | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`held`: what the kernel has of the mount already; None for a mount that begins. `clock_ns` is the wall clock."""
        self._clock_ns = clock_ns
        self.config = config
        self.database = database
        self.store = store
        self.kernel = kernel
        self.capabilities = Capabilities()
        self.held = Held() if held is None else held
        self.opens: Counter[int] = Counter()
        """Open handles of an inode; `writers` are those of them that may write."""
        self.writers: Counter[int] = Counter()
        self.aliases: Counter[int] = Counter(database.count_aliases())
        """How many further names (hard links) a file has."""
        self.borders = Borders(database)
        self._clock = itertools.count(1)
        self._touched: dict[tuple[int, str], float] = {}
        self._listings: set[int] = set()
        self.changed = trio.Event()
        """Set, and replaced, whenever there is something new to send."""
        self.working: Counter[int] = Counter()
        """Steps of ours that are under way for a node: it must not go before they know how they ended."""
        self.settling: set[int] = set()
        """Of those, nodes of which base says already what the step did: only our own bytes are still being put in order."""
        self.doubts = Doubts(database)
        self.observers: list[Callable[[str, Node], None]] = []
        self.orphans: dict[int, int] = {
            ino: int(token.removeprefix(_ORPHAN))
            for ino, token in database.connection.execute("SELECT ino, token FROM work WHERE token LIKE ?", (_ORPHAN + "%",))
        }
        """Files that lost their name to a change by others while somebody had them open -> the directory they were in."""
        for ino in list(self.orphans):
            orphan = database.get(ino)
            if orphan is not None and orphan.unsent:
                self.adopt_orphan(orphan)

    # -- finding ------------------------------------------------------------------------------------------------------

    def get(self, ino: int) -> Node:
        """The node with that number. Raises StaleFile."""
        node = self.database.get(ino)
        if node is None:
            raise StaleFile(f"inode {ino} is not known")
        return node

    def directory(self, ino: int) -> Node:
        """The directory with that number. Raises StaleFile, NotADirectory, NotFound (removed)."""
        node = self.get(ino)
        if not node.is_directory:
            raise NotADirectory(node.name)
        if node.removed:
            raise NotFound(node.name)
        return node

    def find(self, path: str) -> Node | None:
        """The node at a path relative to the mount, from what is known now."""
        node: Node | None = self.database.root
        for name in path.split("/"):
            if name and node is not None:
                node = self.database.child(node.ino, name)
        return node

    def local_path(self, node: Node) -> str:
        """Path relative to the mount, for people; a removed node's last name with a note."""
        names: list[str] = []
        at: Node | None = node
        while at is not None and at.ino != ROOT_INODE:
            if at.parent is None:
                return "/".join([f"{at.name} (removed)", *reversed(names)])
            names.append(at.name)
            at = self.database.get(at.parent)
        return "/".join(reversed(names))

    def place(self, node: Node) -> Place:
        """Where the remote has it, by its base. Raises NotFound if the remote does not have it."""
        if node.ino == ROOT_INODE:
            return Place((), node.base_id, None)
        if node.base_parent is None:
            raise NotFound(f"{node.name} is not on the remote")
        parent = self.place(self.get(node.base_parent))
        return Place((*parent.path, node.base_name), node.base_id, parent.id)

    def place_in(self, parent: int, name: str, id: str | None = None) -> Place:
        """The place of `name` in a directory that the remote has."""
        directory = self.place(self.get(parent))
        return Place((*directory.path, name), id, directory.id)

    def excluded(self, parent: Node, name: str, kind: Kind) -> bool:
        """Whether something with that name is kept here and never sent."""
        if kind in (Kind.FIFO, Kind.SOCKET) or (kind is Kind.SYMLINK and not self.capabilities.native_symlinks):
            return True
        if parent.local_only and parent.ino != ROOT_INODE:
            return True
        for pattern in self.config.exclude:
            if pattern.endswith("/"):
                if kind is Kind.DIRECTORY and fnmatch.fnmatchcase(name, pattern[:-1]):
                    return True
            elif fnmatch.fnmatchcase(name, pattern):
                return True
        return False

    # -- changing -----------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """A local change; whoever sends is told afterwards."""
        with self.database.transaction() as change:
            yield change
        self.wake()

    async def wait_settled(self) -> None:
        """Returns when no file that is safe by now is still hidden from listings by the step that made it so."""
        waited = set(self.settling)
        while waited := waited & self.settling:
            await self.changed.wait()

    def wake(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def now(self) -> tuple[int, float]:
        """(nanoseconds, seconds) since 1970, for mtimes and for `changed_at`."""
        now_ns = self._clock_ns()
        return now_ns, now_ns / 1e9

    def owner(self, node: Node) -> Node:
        """The node that has the content and attributes: itself, or the one that it is a further name of."""
        return node if node.link_of is None else self.get(node.link_of)

    def names(self, node: Node) -> list[Node]:
        """The node, and one for each further name of a file."""
        return [node, *(self.database.aliases(node.ino) if self.aliases[node.ino] else ())]

    def detach(self, change: Transaction, node: Node, **values: Any) -> None:
        """Takes the local name from a node. A file with further names takes one of those instead and lives on.

        `values` are set besides (`base_parent=None` when the remote no longer has it). What is left of a further name is
        its place on the remote, to be removed or replaced.
        """
        if node.link_of is not None and not node.removed:
            self.aliases[node.link_of] -= 1
        if not self.aliases[node.ino]:
            change.update(node, parent=None, **values)
            return
        alias = self.database.aliases(node.ino)[0]
        self.aliases[node.ino] -= 1
        taken: dict[str, Any] = {}
        if "base_parent" in values and alias.base_parent is not None and not alias.unsent:  # the same bytes are there
            taken = {key: getattr(alias, key) for key in (*_BASE, "unsent_attributes")}
            change.execute(
                "UPDATE cached SET version = ? WHERE ino = ? AND version = ?", (alias.base_version, node.ino, node.base_version)
            )
            change.update(alias, base_parent=None)
        change.update(alias, parent=None)
        change.update(node, **(values | {"parent": alias.parent, "name": alias.name} | taken))

    # -- open files that others took the name from --------------------------------------------------------------------

    def orphan(self, change: Transaction, node: Node, directory: int) -> None:
        """The name of an open file means something else on the remote now, or nothing. If it is written to after all,
        `adopt_orphan` gives it a name again; until then it is as an unlinked file."""
        if node.kind is not Kind.FILE or node.link_of is not None or self.aliases[node.ino] or not self.may_be_open(node.ino):
            return
        self.orphans[node.ino] = directory
        change.execute(
            "INSERT INTO work (ino, token) VALUES (?, ?) ON CONFLICT (ino) DO UPDATE SET token = excluded.token",
            (node.ino, f"{_ORPHAN}{directory}"),
        )

    def adopt_orphan(self, node: Node) -> None:
        """An orphan was written to: an edit wins over a removal, and beside another version it is a conflict copy."""
        directory = self.database.get(self.orphans.pop(node.ino))
        if directory is None or directory.removed:
            directory = self.database.root
        other = self.database.child(directory.ino, node.name)
        name = node.name
        now_ns, now = self.now()
        if other is not None:
            name = conflict_name(node.name, datetime.datetime.now(), self.name_is_taken(directory.ino))
        with self.transaction() as change:
            change.update(
                node, parent=directory.ino, name=name, base_parent=None, base_id=None, changed_at=now, ctime_ns=now_ns
            )
            change.execute("UPDATE work SET token = NULL WHERE ino = ?", (node.ino,))
            if other is not None:
                self.note_conflict(change, node, other.ino, other.size, other.mtime_ns)
        self.kernel.entry_changed(directory.ino, name)

    def give_back(self, node: Node) -> None:
        """An orphan is elsewhere on the remote: whoever knows where gives it that place."""
        del self.orphans[node.ino]
        with self.database.transaction() as change:
            change.execute("UPDATE work SET token = NULL WHERE ino = ?", (node.ino,))

    # -- conflicts ----------------------------------------------------------------------------------------------------

    def name_is_taken(self, directory: int) -> Callable[[str], bool]:
        """Whether a name in the directory is in use here, or on the remote as far as is known."""
        return lambda name: (
            self.database.child(directory, name) is not None or self.database.base_child(directory, name) is not None
        )

    def note_conflict(
        self, change: Transaction, copy: Node, remote_ino: int | None, size: int | None, mtime_ns: int | None
    ) -> None:
        """Lists `copy` as ours beside the remote's version, of which size and mtime are given."""
        change.execute("DELETE FROM conflicts WHERE ino = ?", (copy.ino,))
        change.execute(
            "INSERT INTO conflicts (ino, remote_ino, at, local_size, local_mtime_ns, remote_size, remote_mtime_ns)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (copy.ino, remote_ino, self.now()[1], copy.size, copy.mtime_ns, size, mtime_ns),
        )

    # -- who needs a node ---------------------------------------------------------------------------------------------

    def looked_up(self, ino: int, count: int = 1) -> None:
        """The kernel will hear of the number: its lookup count goes up. Call before the answer is sent."""
        self.held.looked_up(ino, count)

    def forgotten(self, ino: int, count: int) -> None:
        """The kernel dropped `count` lookups."""
        if not self.held.forgotten(ino, count):
            return
        node = self.database.get(ino)
        if node is not None and node.removed:
            self.drop_if_unused(node)

    def known_to_kernel(self, ino: int) -> bool:
        return self.held.is_known(ino)

    def may_be_open(self, ino: int) -> bool:
        """Whether somebody has the file open, or may have without our knowing for sure."""
        return bool(self.opens[ino]) or ino == self.held.doubtful

    def drop_if_unused(self, node: Node, *, although_known: bool = False) -> None:
        """Deletes a node that has neither a name, nor a base, nor anybody who holds it, and its bytes. `although_known`: also
        one that the kernel remembers, which then is ESTALE, and the kernel looks its name up again."""
        if node.parent is not None or node.base_parent is not None or self.opens[node.ino] or self.working[node.ino]:
            return
        if node.ino in self.doubts:
            return  # the remote may have it after all; once that is known, it is removed there or this is called again
        if self.known_to_kernel(node.ino) and not although_known:
            return
        if node.ino == self.held.doubtful:
            return
        content = self.store.peek(node.ino)
        if content is not None and content.users:
            return
        self.store.discard(node)
        self.database.connection.execute("DELETE FROM conflicts WHERE ino = ?", (node.ino,))
        self.orphans.pop(node.ino, None)

    def drop_leftovers(self) -> None:
        """Deletes what only an earlier kernel connection could have needed. At the start, after open files were taken over."""
        for node in self.database.removed():
            self.drop_if_unused(node)

    # -- our own steps against listings -------------------------------------------------------------------------------

    def moment(self) -> int:
        """Now, on the clock of listings and steps: smaller than the mark of every listing that begins later."""
        return next(self._clock)

    def listing_begins(self) -> int:
        """A mark to be given to `listing_ends` and `touched_since`."""
        mark = next(self._clock)
        self._listings.add(mark)
        return mark

    def listing_ends(self, mark: int) -> None:
        self._listings.discard(mark)
        oldest = min(self._listings, default=float("inf"))
        for key, at in list(self._touched.items()):
            if at < oldest:
                del self._touched[key]

    def touch(self, parent: int | None, name: str, *, running: bool) -> None:
        """A step of ours changes this remote name now (`running`), or has just finished doing so."""
        if parent is None:
            return
        if running:
            self._touched[(parent, name)] = float("inf")
        elif self._listings:
            self._touched[(parent, name)] = next(self._clock)
        else:  # no listing is under way that could have begun before now
            self._touched.pop((parent, name), None)

    def touched_since(self, parent: int, mark: int) -> set[str]:
        """Remote names in the directory of which a listing begun at `mark` may say something old."""
        return {name for (owner, name), at in self._touched.items() if owner == parent and at >= mark}
