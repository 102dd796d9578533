"""The verbs of a file system on inode numbers: what each operation of a program means for nodes and content.

It is tested without a kernel. It knows neither FUSE nor a protocol: names come in as `str`, answers go out as `Node`s,
errors as `LocalError` and `RemoteError`. No verb waits for the remote but lookup, readdir and open of a directory (one
listing, bounded), read of bytes that are not here and of attributes that only it knows (bounded), and fsync or close
where the mount's `durability` says so.
"""

from __future__ import annotations

import re
import stat
from bisect import bisect_right
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import trio
from cachetools import LRUCache

from nbmountd.disk.budget import Budget
from nbmountd.disk.content import Content, ContentStore
from nbmountd.disk.database import Node, Transaction
from nbmountd.errors import (
    AccessDenied,
    CrossDevice,
    Exists,
    FileTooLarge,
    InvalidArgument,
    IsADirectory,
    NameRefused,
    NameTooLong,
    NoAttribute,
    NotADirectory,
    NotEmpty,
    NotFound,
    NotPermitted,
    NotSupported,
    ReadOnlyMount,
    RemoteError,
    RemoteUnsupported,
    StaleFile,
)
from nbmountd.fs.nodes import UNSENT_MODE, UNSENT_MTIME, UNSENT_XATTRS, Nodes
from nbmountd.fs.reads import Reads
from nbmountd.fs.refresh import Refresh
from nbmountd.fs.repeats import Repeats
from nbmountd.model import ROOT_INODE, FileState, Kind, Place, Quota

STATE_ATTRIBUTE = "user.nbmountd.state"
LARGEST_XATTR = 64 * 2**10
"""The kernel's own limit for a value."""


class Sync(Protocol):
    """What the file system asks of the engine that sends."""

    async def wait_until_safe(self, node: Node) -> None:
        """Returns when the remote has confirmed the node as it is now, by each of its names. Raises RemoteError when one is
        parked."""

    def state(self, node: Node) -> FileState | None:
        """uploading, conflict or parked; None if nothing of that."""

    @property
    def parkings(self) -> int:
        """How often something was parked since the start."""

    def write_error(self, node: Node) -> tuple[int, str] | None:
        """(which parking, why) of a file whose bytes, as they are now, the remote will not take; else None."""


@dataclass(frozen=True, slots=True)
class SetAttributes:
    """What a setattr asks for; None: leave it."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class FileSystem:
    """One mounted file system."""

    def __init__(
        self, nodes: Nodes, store: ContentStore, reads: Reads, refresh: Refresh, budget: Budget, *, uid: int, gid: int,
        repeats: Repeats | None = None,
    ) -> None:  # fmt: skip
        self.nodes = nodes
        self.store = store
        self.reads = reads
        self.refresh = refresh
        self.budget = budget
        self.uid = uid
        self.gid = gid
        self.quota = Quota()
        self.quota_wanted = trio.Event()
        """Set when the remote's quota is to be asked for anew, soon."""
        self.sync: Sync | None = None
        self.tell: Callable[[Place, str], Awaitable[bytes]] | None = None
        """Asks the remote for one of `capabilities.told_attributes`."""
        self.repeats = Repeats(nodes.database, resumed=False) if repeats is None else repeats
        self.config = nodes.config
        self._snapshots: dict[int, tuple[list[Node], list[int]]] = {}
        self._atimes: LRUCache[int, int] = LRUCache(10_000)
        """What programs have set, by inode; not kept over a restart. Reading moves no access time (as with noatime)."""

    # -- names --------------------------------------------------------------------------------------------------------

    async def lookup(self, parent: int, name: str) -> Node:
        """The node with that name. Raises NotFound when the remote has no such name either."""
        directory = self.nodes.directory(parent)
        self._check_name(name)
        await self.refresh.ensure_fresh(directory)
        node = self.nodes.database.child(parent, name)
        if node is None:
            raise NotFound(name)
        return self.nodes.owner(node)

    def getattr(self, ino: int) -> Node:
        """The node, at once. (An open file is one version; names are checked by lookup.)"""
        return self.nodes.get(ino)

    async def open_directory(self, ino: int) -> None:
        if self.nodes.get(ino).removed:
            return  # somebody's working directory still, and empty
        directory = self.nodes.directory(ino)
        await self.refresh.ensure_fresh(directory)
        self.refresh.opened(directory)
        self._snapshots.pop(ino, None)

    def read_directory(self, ino: int, after: int, count: int) -> list[Node]:
        """The next `count` children with inode numbers above `after`, in order; fewer only at the end.

        Numbers are places that survive changes.
        """
        if after <= ROOT_INODE or ino not in self._snapshots:
            children = self.nodes.database.children(ino)
            self._snapshots[ino] = (children, [child.ino for child in children])
        children, numbers = self._snapshots[ino]
        remaining = (children[at] for at in range(bisect_right(numbers, after), len(children)))
        return list(islice((child for child in remaining if child.parent == ino), count))

    def close_directory(self, ino: int) -> None:
        self._snapshots.pop(ino, None)

    def _check_name(self, name: str) -> None:
        if len(name.encode("utf-8", "surrogateescape")) > 255:
            raise NameTooLong(name)

    def _check_new_name(self, name: str) -> None:
        """Refuses what the remote would refuse when it is sent."""
        can = self.nodes.capabilities
        if can.names.stored_size(name) > can.max_name_bytes:
            raise NameTooLong(name)
        if can.refused_names and re.search(can.refused_names, can.names.stored(name), re.IGNORECASE):
            raise NameRefused(f"the remote takes nothing called {name!r}")

    def _check_writable(self) -> None:
        if self.config.read_only:
            raise ReadOnlyMount(self.config.name)

    def _check_changeable(self, directory: Node) -> None:
        """Raises AccessDenied where the remote lets nobody make, move or remove anything directly in the directory."""
        if not directory.writable:
            raise AccessDenied(directory.name)
        if directory.ino == ROOT_INODE and self.nodes.capabilities.partitions:
            raise AccessDenied(f"{self.config.name}: what is here is made and removed on the remote")

    def _check_removable(self, node: Node) -> None:
        """Raises AccessDenied where the remote lets nobody remove or rename the node."""
        if not node.removable and node.base_parent is not None:
            raise AccessDenied(node.name)

    async def _check_free(self, parent: int, name: str) -> Node:
        """The directory, if it can take the new name. Raises Exists, ReadOnlyMount and the like."""
        self._check_writable()
        self._check_new_name(name)
        directory = self.nodes.directory(parent)
        if self.nodes.database.child(parent, name) is not None:
            raise Exists(name)
        self._check_changeable(directory)
        if not directory.listed:  # else the kernel's lookup has just seen to it
            await self.refresh.ensure_fresh(directory)
            directory = self.nodes.directory(parent)  # others may have removed it meanwhile
            if self.nodes.database.child(parent, name) is not None:
                raise Exists(name)
        return directory

    # -- making -------------------------------------------------------------------------------------------------------

    async def make_directory(self, parent: int, name: str, mode: int) -> Node:
        directory = await self._check_free(parent, name)
        node = self._insert(directory, name, Kind.DIRECTORY, mode | (directory.mode & stat.S_ISGID), listed=True)
        self.refresh.known_fresh(node.ino)
        return node

    async def make_symlink(self, parent: int, name: str, target: str) -> Node:
        directory = await self._check_free(parent, name)
        size = len(target.encode("utf-8", "surrogateescape"))
        return self._insert(directory, name, Kind.SYMLINK, 0o777, target=target, size=size)

    async def make_special(self, parent: int, name: str, mode: int, rdev: int) -> Node:
        """A regular file, FIFO or socket; devices are refused."""
        kinds = {stat.S_IFREG: Kind.FILE, stat.S_IFIFO: Kind.FIFO, stat.S_IFSOCK: Kind.SOCKET}
        kind = kinds.get(stat.S_IFMT(mode))
        if kind is None:
            raise NotPermitted(name)
        directory = await self._check_free(parent, name)
        return self._insert(directory, name, kind, mode, rdev=rdev)

    async def create(self, parent: int, name: str, mode: int) -> Node:
        """Makes an empty file and opens it for writing."""
        directory = await self._check_free(parent, name)
        node = self._insert(directory, name, Kind.FILE, mode)
        self._opened(node, writing=True)
        return node

    def _insert(self, directory: Node, name: str, kind: Kind, mode: int, **values: Any) -> Node:
        now_ns, now = self.nodes.now()
        with self.nodes.transaction() as change:
            node = change.insert(
                kind, parent=directory.ino, name=name, mode=stat.S_IMODE(mode), mtime_ns=now_ns, ctime_ns=now_ns,
                changed_at=now, local_only=self.nodes.excluded(directory, name, kind), **values,
            )  # fmt: skip
            change.update(directory, mtime_ns=now_ns, ctime_ns=now_ns)
            self.repeats.note(change, values.get("link_of") or node.ino)
        return node

    async def link(self, ino: int, parent: int, name: str) -> Node:
        """A further name for a file. On a remote without hard links every name is a file of its own there."""
        node = self.nodes.get(ino)
        if node.kind is not Kind.FILE:
            raise NotPermitted(name)
        directory = await self._check_free(parent, name)
        if node.parent is None:
            raise NotFound(name)
        self._check_borders(node, self.nodes.get(node.parent), directory)
        self._insert(directory, name, Kind.FILE, node.mode, link_of=ino, unsent=True)
        with self.nodes.transaction() as change:
            change.update(node, ctime_ns=self.nodes.now()[0])
        self.nodes.aliases[ino] += 1
        return node

    # -- removing and renaming ----------------------------------------------------------------------------------------

    async def unlink(self, parent: int, name: str) -> None:
        node = await self._child_to_change(parent, name)
        if node.is_directory:
            raise IsADirectory(name)
        self._check_removable(node)
        self._remove(node)

    async def remove_directory(self, parent: int, name: str) -> None:
        node = await self._child_to_change(parent, name)
        if not node.is_directory:
            raise NotADirectory(name)
        if self.nodes.borders.is_border(node):
            raise AccessDenied(name)
        self._check_removable(node)
        await self._check_empty(node)
        if self.nodes.database.child(parent, name) is not node:
            raise NotFound(name)  # others removed it meanwhile
        self._remove(node)

    async def _child_to_change(self, parent: int, name: str) -> Node:
        self._check_writable()
        directory = self.nodes.directory(parent)
        self._check_changeable(directory)
        node = self.nodes.database.child(parent, name)
        if node is None:
            node = await self.lookup(parent, name)
        return node

    async def _check_empty(self, node: Node) -> None:
        await self.refresh.ensure_fresh(node)
        if self.nodes.database.has_children(node.ino):
            raise NotEmpty(node.name)

    def _remove(self, node: Node) -> None:
        now_ns, now = self.nodes.now()
        parent = self.nodes.get(node.parent or ROOT_INODE)
        with self.nodes.transaction() as change:
            self.nodes.detach(change, node, changed_at=now, ctime_ns=now_ns)
            change.update(parent, mtime_ns=now_ns, ctime_ns=now_ns)
            self.repeats.note(change, 0)
        self.nodes.drop_if_unused(node)

    async def rename(self, parent: int, name: str, new_parent: int, new_name: str, *, replace: bool, exchange: bool) -> None:
        """Renames within the mount; `replace` False refuses an existing target, `exchange` swaps the two."""
        node = await self._child_to_change(parent, name)
        self._check_new_name(new_name)
        target_directory = self.nodes.directory(new_parent)
        self._check_changeable(target_directory)
        await self.refresh.ensure_fresh(target_directory)
        target = self.nodes.database.child(new_parent, new_name)
        if target is not None and node.is_directory and not exchange and replace:
            await self._check_replaceable(node, target)
        # From here on nothing is awaited. What was looked at before may have been changed by others meanwhile.
        target_directory = self.nodes.directory(new_parent)
        if self.nodes.database.child(parent, name) is not node:
            raise NotFound(name)
        if self.nodes.database.child(new_parent, new_name) is not target:
            raise StaleFile(new_name)  # the kernel looks up again
        if exchange:
            if target is None:
                raise NotFound(new_name)
            self._exchange(node, target)
            return
        if target is not None and self.nodes.owner(target) is self.nodes.owner(node):
            return  # two names of one file: POSIX does nothing
        if target is not None:
            if not replace:
                raise Exists(new_name)
            if target.is_directory and not node.is_directory:
                raise IsADirectory(new_name)
        local_only = self._local_only_after(node, target_directory, new_name)
        old_directory = self.nodes.get(parent)
        self._check_borders(node, old_directory, target_directory)
        self._check_removable(node)
        if target is not None:
            if self.nodes.borders.is_border(target):
                raise AccessDenied(new_name)
            if not target.writable:  # else its bytes are replaced, which is no removal
                self._check_removable(target)
        now_ns, now = self.nodes.now()
        with self.nodes.transaction() as change:
            if target is not None:
                self.nodes.detach(change, target, changed_at=now, ctime_ns=now_ns)
            change.update(
                node, parent=new_parent, name=new_name, changed_at=now, ctime_ns=now_ns, local_only=local_only
            )
            change.update(old_directory, mtime_ns=now_ns, ctime_ns=now_ns)
            if target_directory is not old_directory:
                change.update(target_directory, mtime_ns=now_ns, ctime_ns=now_ns)
            self.repeats.note(change, 0)
        if target is not None:
            self.nodes.drop_if_unused(target)

    async def _check_replaceable(self, directory: Node, target: Node) -> None:
        if target is not directory:
            if not target.is_directory:
                raise NotADirectory(target.name)
            await self._check_empty(target)

    def _local_only_after(self, node: Node, directory: Node, name: str) -> bool:
        local_only = self.nodes.excluded(directory, name, node.kind)
        if local_only == node.local_only:
            return local_only
        if node.is_directory and self.nodes.database.has_children(node.ino):
            raise CrossDevice(name)  # mv and shutil copy then; each file is judged by its own name
        if local_only and node.base_parent is not None:
            raise CrossDevice(name)
        return local_only

    def _check_borders(self, node: Node, directory: Node, target_directory: Node) -> None:
        """Raises CrossDevice when the remote cannot take the node from one directory to the other (mv and shutil copy then),
        AccessDenied when it is, or holds, what stays where it is (a copy would empty that)."""
        borders = self.nodes.borders
        if borders.is_border(node) or (node.is_directory and borders.below(node)):
            raise AccessDenied(node.name)
        if directory is not target_directory and borders.world(directory) != borders.world(target_directory):
            raise CrossDevice(node.name)

    def _exchange(self, one: Node, other: Node) -> None:
        here, there = self.nodes.get(one.parent or ROOT_INODE), self.nodes.get(other.parent or ROOT_INODE)
        self._check_borders(one, here, there)
        self._check_borders(other, there, here)
        self._check_removable(one)
        self._check_removable(other)
        one_local = self._local_only_after(one, there, other.name)
        other_local = self._local_only_after(other, here, one.name)
        now_ns, now = self.nodes.now()
        moved = {"changed_at": now, "ctime_ns": now_ns}
        with self.nodes.transaction() as change:
            position, name = one.parent, one.name
            change.update(one, parent=None)  # two nodes never have one name, not even inside a transaction
            change.update(other, parent=position, name=name, local_only=other_local, **moved)
            change.update(one, parent=there.ino, name=other.name, local_only=one_local, **moved)
            for directory in {here.ino: here, there.ino: there}.values():
                change.update(directory, mtime_ns=now_ns, ctime_ns=now_ns)
            self.repeats.note(change, 0)

    # -- attributes ---------------------------------------------------------------------------------------------------

    async def setattr(self, ino: int, wanted: SetAttributes) -> Node:
        """Changes what is not None. Raises NotPermitted for another owner."""
        node = self.nodes.get(ino)
        self._check_writable()
        if wanted.uid not in (None, self.uid) or (wanted.gid not in (None, self.gid) and self.uid != 0):
            raise NotPermitted("the owner of files in this mount cannot be changed")
        now_ns, now = self.nodes.now()
        if wanted.size is not None:
            self._truncate(node, wanted.size, now_ns)
        if wanted.atime_ns is not None:
            self._atimes[ino] = wanted.atime_ns
        values: dict[str, Any] = {}
        capabilities, unsent = self.nodes.capabilities, node.unsent_attributes
        mode = node.mode if wanted.mode is None else stat.S_IMODE(wanted.mode)
        if wanted.mode is None and wanted.size is None and wanted.mtime_ns is None and not node.is_directory:
            if wanted.atime_ns is None:  # a chown, even one that names nobody
                mode = _without_privileges(mode)
        elif wanted.size is not None and self.uid != 0:
            mode = _without_privileges(mode)
        if mode != node.mode:
            self._check_is_no_partition(node)
            values["mode"] = mode
            unsent |= UNSENT_MODE if capabilities.native_mode else 0
        if wanted.mtime_ns is not None:
            self.store.touch(node, wanted.mtime_ns)
            values["mtime_ns"] = wanted.mtime_ns
            unsent |= UNSENT_MTIME if capabilities.native_mtime and not node.is_directory else 0
        values["ctime_ns"] = now_ns
        if unsent != node.unsent_attributes and not node.local_only:
            values |= {"unsent_attributes": unsent, "changed_at": now}
        with self.nodes.transaction() as change:
            change.update(node, **values)
            if wanted.mtime_ns is not None or "mode" in values:
                self._unsent_of_further_names(change, node, unsent, now)
        return node

    def _unsent_of_further_names(self, change: Transaction, node: Node, bits: int, now: float) -> None:
        """On the remote every name of a file is a file of its own: what is to be told of one is to be told of all."""
        for alias in self.nodes.names(node)[1:]:
            if not alias.local_only:
                change.update(alias, unsent_attributes=alias.unsent_attributes | bits, changed_at=now)

    def atime_ns(self, node: Node) -> int:
        """When the file was last read, as far as a program has said so."""
        return int(self._atimes.get(node.ino, node.mtime_ns))

    def _truncate(self, node: Node, size: int, now_ns: int) -> None:
        if node.is_directory:
            raise IsADirectory(node.name)
        if node.kind is not Kind.FILE:
            raise InvalidArgument(node.name)
        self._check_file_size(size)
        if self._is_lost(node):
            raise StaleFile("the name means something else by now")
        if size == node.size:  # moves the times, which is what `: > stamp` is for
            self.store.touch(node, now_ns)
            with self.nodes.transaction() as change:
                change.update(node, mtime_ns=now_ns, ctime_ns=now_ns)
            return
        content = self.store.open(node)
        try:
            self.store.truncate(content, size, now_ns)
            self._changed(node)
        finally:
            self.store.release(content)

    def _check_file_size(self, size: int) -> None:
        largest = self.nodes.capabilities.max_file_size
        if largest is not None and size > largest:
            raise FileTooLarge(f"the remote takes files up to {largest} bytes")

    def readlink(self, ino: int) -> str:
        target = self.nodes.get(ino).target
        if target is None:
            raise InvalidArgument("not a symlink")
        return target

    def get_xattr(self, ino: int, name: str) -> bytes:
        if not name.startswith("user."):
            raise NotSupported(name)  # `ls -l` asks a file system that says so once, instead of twice for each file
        node = self.nodes.get(ino)
        if name == STATE_ATTRIBUTE:
            return self.state(node).value.encode()
        value = node.xattrs.get(name)
        if value is None:
            raise NoAttribute(name)
        return value

    async def read_xattr(self, ino: int, name: str) -> bytes:
        """As `get_xattr`; what only the remote knows is asked there, now. Raises RemoteError for that."""
        if name not in self.nodes.capabilities.told_attributes or self.tell is None:
            return self.get_xattr(ino, name)
        node = self.nodes.get(ino)
        if node.base_parent is None:
            raise NoAttribute(name)  # the remote has no such file
        try:
            return await self.tell(self.nodes.place(node), name)
        except RemoteUnsupported as exc:
            raise NoAttribute(name) from exc

    def list_xattrs(self, ino: int) -> list[str]:
        return list(self.nodes.get(ino).xattrs)

    def set_xattr(self, ino: int, name: str, value: bytes) -> None:
        self._check_xattr(name)
        node = self.nodes.get(ino)
        if len(value) > LARGEST_XATTR or sum(map(len, node.xattrs.values())) + len(value) > 4 * LARGEST_XATTR:
            raise FileTooLarge(name)
        self._set_xattrs(node, {**node.xattrs, name: value})

    def remove_xattr(self, ino: int, name: str) -> None:
        self._check_xattr(name)
        node = self.nodes.get(ino)
        if name not in node.xattrs:
            raise NoAttribute(name)
        self._set_xattrs(node, {key: value for key, value in node.xattrs.items() if key != name})

    def _check_xattr(self, name: str) -> None:
        self._check_writable()
        if name.startswith("user.nbmountd.") or name in self.nodes.capabilities.told_attributes:
            raise NotPermitted(name)
        if name == "user.":
            raise InvalidArgument(name)
        if not name.startswith("user."):
            raise NotSupported(name)

    def _check_is_no_partition(self, node: Node) -> None:
        """Raises NotPermitted for what only the remote's own administration changes."""
        if self.nodes.capabilities.partitions and (node.ino == ROOT_INODE or self.nodes.borders.is_border(node)):
            raise NotPermitted(f"{node.name}: its attributes are the remote's own")

    def _set_xattrs(self, node: Node, xattrs: dict[str, bytes]) -> None:
        self._check_is_no_partition(node)
        now_ns, now = self.nodes.now()
        unsent = node.unsent_attributes | (UNSENT_XATTRS if self.nodes.capabilities.native_xattrs else 0)
        with self.nodes.transaction() as change:
            change.update(node, xattrs=xattrs, unsent_attributes=unsent, changed_at=now, ctime_ns=now_ns)
            self._unsent_of_further_names(change, node, unsent, now)
            self.repeats.note(change, 0)

    def state(self, node: Node) -> FileState:
        """Where the file's bytes are, in one word."""
        if node.local_only:
            return FileState.LOCAL
        if self.sync is not None:
            state = self.sync.state(node)
            if state is not None:
                return state
        if any(name.to_send for name in self.nodes.names(node)):
            return FileState.DIRTY
        if node.changed_at or node.kind is not Kind.FILE or node.size == 0:
            return FileState.SAFE  # it was changed here, and the remote has confirmed it
        content = self.store.open(node)
        try:
            present = content.present.covers(0, content.base_size)
        finally:
            self.store.release(content)
        return FileState.CACHED if present else FileState.REMOTE

    # -- open files ---------------------------------------------------------------------------------------------------

    def open(self, ino: int, *, writing: bool, truncate: bool) -> Node:
        """Opens a file. Needs one `close_file` with the same `writing`."""
        node = self.nodes.get(ino)
        if node.is_directory:
            raise IsADirectory(node.name)
        if ino in self.nodes.orphans or self._is_lost(node):
            raise StaleFile("the name means something else by now")  # the kernel looks the name up again and comes back
        if writing or truncate:
            self._check_writable()
            if not node.writable:
                raise AccessDenied(node.name)
        if truncate:
            self._truncate(node, 0, self.nodes.now()[0])
        self._opened(node, writing=writing)
        return node

    def _is_lost(self, node: Node) -> bool:
        """Whether it has no name and nobody has it open: who comes for it has not heard yet that others took the name, and
        what he wrote would be nowhere."""
        return node.removed and not self.nodes.may_be_open(node.ino)

    def _opened(self, node: Node, *, writing: bool) -> None:
        self.store.open(node)
        self.nodes.opens[node.ino] += 1
        if writing:
            self.nodes.writers[node.ino] += 1
        self.nodes.held.opened(node.ino, writing=writing)

    def take_over(self) -> None:
        """Counts what an earlier worker left open as open. Once, before the first request."""
        nodes = self.nodes
        for ino, readers, writers in nodes.held.take_over():
            node = nodes.database.get(ino)
            if node is None or node.kind is not Kind.FILE:
                nodes.held.drop(ino)
                continue
            for _ in range(readers + writers):
                self.store.open(node)
            nodes.opens[ino] = readers + writers
            if writers:
                nodes.writers[ino] = writers
        nodes.drop_leftovers()

    def adopt_handle(self, ino: int, *, writing: bool) -> None:
        """A handle that an earlier worker gave out, and that was not counted for sure, is used here for the first time."""
        self._opened(self.nodes.get(ino), writing=writing)

    def is_open(self, ino: int, *, writing: bool) -> bool:
        """Whether at least one handle of that sort is counted."""
        writers = self.nodes.writers[ino]
        return writers > 0 if writing else self.nodes.opens[ino] > writers

    def close_file(self, ino: int, *, writing: bool) -> None:
        """The last descriptor of one `open` is gone."""
        nodes = self.nodes
        content = self.store.peek(ino)
        if content is None or not self.is_open(ino, writing=writing):
            return
        nodes.held.closed(ino, writing=writing)
        nodes.opens[ino] -= 1
        if writing:
            nodes.writers[ino] -= 1
            if not nodes.writers[ino]:
                del nodes.writers[ino]
                if content.node.unsent:
                    self._changed(content.node)
        self.store.release(content)
        if not nodes.opens[ino]:
            del nodes.opens[ino]
            self.store.save_present(content)
            self.reads.closed(content)
            nodes.drop_if_unused(content.node)

    def content(self, ino: int) -> Content:
        """The content of an open file. Raises StaleFile."""
        content = self.store.peek(ino)
        if content is None:
            raise StaleFile(f"inode {ino} is not open")
        return content

    async def read(self, ino: int, start: int, size: int) -> bytes | memoryview:
        """The bytes, short at the end of the file; a view is valid until the next read of any file, so it is used without an
        await in between. Waits for the remote at most for the mount's deadline."""
        content = self.content(ino)
        data = self.reads.read_now(content, start, size)
        return await self.reads.read(content, start, size) if data is None else data

    def write(self, ino: int, offset: int, data: bytes) -> int:
        """Takes the bytes; when it returns, the death of this process loses nothing of them."""
        content = self.content(ino)
        self._check_file_size(offset + len(data))
        first = not content.node.unsent or bool(self.nodes.aliases[ino])
        self.store.write(content, offset, data, self.nodes.now()[0])
        if content.node.mode & (stat.S_ISUID | stat.S_ISGID) and self.uid != 0:  # root may write and keep them
            with self.nodes.transaction() as change:
                change.update(content.node, mode=_without_privileges(content.node.mode))
        if first:
            self._changed(content.node)
        return len(data)

    def _changed(self, node: Node) -> None:
        """The content moved: the write-back delay begins again, and whoever sends looks again."""
        node.changed_at = self.nodes.now()[1]
        if node.ino in self.nodes.orphans:
            self.nodes.adopt_orphan(node)
        if self.nodes.aliases[node.ino]:
            with self.nodes.database.transaction() as change:
                for alias in self.nodes.database.aliases(node.ino):
                    change.update(alias, unsent=True, changed_at=node.changed_at)
        self.nodes.wake()

    @property
    def write_errors(self) -> int:
        """The number of the newest write error there is now: whoever opens a file now hears of later ones only."""
        return 0 if self.sync is None else self.sync.parkings

    def write_error_since(self, ino: int, heard: int) -> tuple[int, RemoteError] | None:
        """What the remote said to bytes that are still unsent, and its number, if that is newer than `heard`."""
        node = self.nodes.database.get(ino)
        found = None if node is None or self.sync is None else self.sync.write_error(node)
        return None if found is None or found[0] <= heard else (found[0], RemoteError(found[1]))

    async def flush(self, ino: int) -> None:
        """A descriptor is closed. With durability "close", waits until the remote has it."""
        if self.config.durability == "close":
            await self._wait_until_safe(ino)

    async def fsync(self, ino: int) -> None:
        """Returns when the local disk has it, or the remote, as the mount's durability says."""
        content = self.store.peek(ino)
        if content is not None:
            await self.sync_content(content)
        else:
            await trio.to_thread.run_sync(self.nodes.database.sync, self.nodes.database.commits)
        if self.config.durability != "local":
            await self._wait_until_safe(ino)

    async def sync_content(self, content: Content) -> None:
        """Every byte accepted for the content so far, and its name, survive loss of power."""
        content.users += 1
        try:
            for call in self.store.syncing(content):
                await trio.to_thread.run_sync(call)
        finally:
            self.store.release(content)

    async def _wait_until_safe(self, ino: int) -> None:
        node = self.nodes.get(ino)
        if self.sync is not None and any(name.to_send for name in self.nodes.names(node)):
            await self.sync.wait_until_safe(node)

    def blocks(self, node: Node) -> int:
        """Units of 512 bytes that hold data, here or on the remote."""
        if node.unsent and node.kind is Kind.FILE:
            content = self.store.peek(node.ino)
            if content is not None and content.layers:
                return sum(-(-(stop - start) // 512) for start, stop in content.data_ranges(0, node.size))
        return -(-node.size // 512)

    # -- the whole mount ----------------------------------------------------------------------------------------------

    async def refresh_now(self, node: Node | None) -> None:
        """Forgets how fresh things are, and lists the directory of `node` (or the root) at once. Raises RemoteError."""
        await self.nodes.wait_settled()
        self.refresh.forget()
        self.quota_wanted.set()
        directory = self.nodes.database.root if node is None else node
        if not directory.is_directory:
            directory = self.nodes.get(directory.base_parent or directory.parent or ROOT_INODE)
        await self.refresh.list_soon(directory)
        for child in self.nodes.database.children(directory.ino):
            if child.is_directory and self.nodes.known_to_kernel(child.ino) and child.base_parent is not None:
                try:
                    await self.refresh.list_soon(child)
                except RemoteError:
                    continue


def _without_privileges(mode: int) -> int:
    """The mode after a write or a chown: without suid, and without sgid where that means more than locking."""
    return mode & ~stat.S_ISUID & ~(stat.S_ISGID if mode & stat.S_IXGRP else 0)
