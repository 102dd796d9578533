"""Finds out what is so when the remote is not as base says, and settles it: a lost answer, or a conflict.

Nothing is repeated blindly: after a lost answer the remote is asked whether the step was done. In a conflict nothing is
overwritten: the remote keeps its name, the local version becomes a copy beside it, listed until somebody resolves it.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable

import trio

from nbmountd.backends.base import Backend
from nbmountd.disk.content import ContentStore
from nbmountd.disk.database import Node
from nbmountd.errors import NotFound, RemoteError, RemoteExists, RemoteNotFound, RemoteUnavailable
from nbmountd.fs.adopt import base_values, local_values
from nbmountd.fs.nodes import Nodes
from nbmountd.fs.refresh import Refresh
from nbmountd.log import get_logger
from nbmountd.model import Entry, Kind, Place, Version
from nbmountd.sync.conflicts import conflict_name
from nbmountd.sync.upload import Snapshot

COMPARE_LIMIT = 64 * 2**20
"""Up to this size the remote's bytes are compared with ours when it keeps no checksum: a false conflict costs more."""

_log = get_logger(__name__)


class Settle:
    """Settling for one mount."""

    def __init__(
        self, nodes: Nodes, store: ContentStore, refresh: Refresh, backend: Backend, emit: Callable[..., None]
    ) -> None:
        self._nodes = nodes
        self._store = store
        self._refresh = refresh
        self._backend = backend
        self._emit = emit

    def ticket(self, layer: int, ino: int) -> JournalTicket:
        """Where the upload of exactly this content remembers how far it is."""
        return JournalTicket(self._nodes, layer, ino)

    async def upload(
        self, node: Node, replaced: Node, place: Place, version: Version | None, snapshot: Snapshot, cause: RemoteError
    ) -> Entry | None:
        """What became of an upload that was refused or got no answer: its entry if it arrived after all; None if a
        conflict copy was made; raises `cause` when nothing happened and it may be tried again."""
        try:
            found = await self._backend.stat(place)
        except RemoteNotFound:
            if version is not None:
                with self._nodes.transaction() as change:  # removed by somebody: ours goes up as a new file
                    change.update(replaced, base_parent=None)
            raise RemoteUnavailable(f"{cause}; it is sent as a new file") from cause
        if found.kind is Kind.FILE and await self._is_ours(found, place, snapshot):
            return found
        if version is not None and found.version == version:
            raise RemoteUnavailable(str(cause)) from cause  # the remote is as before: nothing arrived
        self.make_copy(node, replaced, found)
        return None

    async def _is_ours(self, found: Entry, place: Place, snapshot: Snapshot) -> bool:
        """Whether the remote's file has exactly the snapshot's bytes."""
        if found.size != snapshot.size:
            return False
        if snapshot.digest is not None:
            theirs = found.checksums.get((self._nodes.capabilities.checksum_algorithm or "").upper())
            if theirs is not None:
                return theirs == snapshot.digest
        if snapshot.size > COMPARE_LIMIT:
            return False
        at = 0

        def compare(piece: memoryview) -> None:
            nonlocal at
            if snapshot.read_at(at, len(piece)) != piece:
                raise _DifferentError
            at += len(piece)

        try:
            await self._backend.read(place, found.version, 0, snapshot.size, compare)
        except _DifferentError:
            return False
        return at == snapshot.size

    async def made(self, node: Node, place: Place, cause: RemoteError) -> Entry | None:
        """The name of a new directory or symlink is taken, or no answer came."""
        try:
            found = await self._backend.stat(place)
        except RemoteNotFound:
            raise RemoteUnavailable(str(cause)) from cause
        if found.kind is node.kind and (node.is_directory or found.attributes.target == node.target):
            self._refresh.forget(node.ino)
            if node.is_directory:
                with self._nodes.database.transaction() as change:
                    change.update(node, listed=False)  # it may hold what we do not know
            return found
        self.make_copy(node, node, found)
        return None

    async def moved(self, node: Node, source: Place, target: Place, cause: RemoteError) -> Entry | None:
        """A move was refused or got no answer: the entry at the target if it is ours by now; else what is there is
        adopted, and the next plan starts from that."""
        there = await self._stat(target)
        here = await self._stat(source)
        if there is not None and here is None and there.kind is node.kind:
            same_id = there.id is not None and there.id == node.base_id
            if same_id or node.is_directory or there.version == node.base_version or there.size == node.base_size:
                return there
        unchanged = here is not None and here.version == (node.base_version or here.version)
        if there is not None and unchanged and isinstance(cause, RemoteExists):
            self.make_copy(node, None, there)
            return None
        await self.look_at_parent(node)
        raise RemoteUnavailable(str(cause)) from cause

    async def _stat(self, place: Place) -> Entry | None:
        try:
            return await self._backend.stat(Place(place.path))
        except RemoteNotFound:
            return None

    async def not_removed(self, node: Node) -> None:
        """What was removed here was changed there: the change wins and comes back as what the remote has now."""
        parent = self._nodes.get(node.base_parent or 1)
        path = self._nodes.local_path(node)
        with self._nodes.transaction() as change:
            change.update(node, base_parent=None)
        self._nodes.drop_if_unused(node)
        _log.warning("removed here, but changed on the remote: it comes back", path=path)
        self._emit("conflict", path, kept="remote")
        self._nodes.touch(parent.ino, node.base_name, running=False)
        await trio.lowlevel.checkpoint()
        self._refresh.forget(parent.ino)

    async def parent_missing(self, nodes: Nodes, parent: int | None) -> None:
        """The directory that a step wanted is gone from the remote: its own parent's listing says what is so."""
        directory = None if parent is None else nodes.database.get(parent)
        if directory is None or directory.base_parent is None:
            return
        try:
            await self._refresh.list_now(nodes.get(directory.base_parent))
        except RemoteError as exc:
            _log.info("cannot look for a missing directory", directory=directory.name, cause=exc)

    async def look_at_parent(self, node: Node) -> None:
        """Lists the directory that should have the node, so that what is there now is adopted."""
        if node.base_parent is None:
            return
        self._nodes.touch(node.base_parent, node.base_name, running=False)
        try:
            await self._refresh.list_now(self._nodes.get(node.base_parent))
        except (RemoteError, NotFound) as exc:
            _log.info("cannot look at the remote", path=self._nodes.local_path(node), cause=exc)

    def make_copy(self, node: Node, replaced: Node | None, found: Entry) -> None:
        """The remote keeps the name; what is local gets a name of its own beside it, and is sent as something new."""
        if node.parent is None:
            with self._nodes.transaction() as change:
                change.update(node, base_parent=None)
            return
        nodes, parent, name = self._nodes, node.parent, node.name
        now_ns, now = nodes.now()

        def taken(candidate: str) -> bool:
            return nodes.database.child(parent, candidate) is not None

        copy = conflict_name(name, datetime.datetime.now(), taken)
        with nodes.transaction() as change:
            if replaced is not None:
                change.update(replaced, base_parent=None)
                change.update(node, name=copy, base_parent=None, base_id=None, changed_at=now, ctime_ns=now_ns)
            else:
                change.update(node, name=copy, changed_at=now, ctime_ns=now_ns)
            remote = change.insert(
                found.kind, parent=parent, name=name, base_parent=parent, base_name=name,
                **base_values(nodes, found), **local_values(nodes, found),
            )  # fmt: skip
            change.execute(
                "INSERT INTO conflicts (ino, remote_ino, at, local_size, local_mtime_ns, remote_size, remote_mtime_ns)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (node.ino, remote.ino, now, node.size, node.mtime_ns, found.size, found.attributes.mtime_ns),
            )
        nodes.kernel.entry_changed(parent, name)
        nodes.kernel.entry_changed(parent, copy)
        _log.warning("conflict: both versions are kept", path=nodes.local_path(remote), copy=nodes.local_path(node))
        self._emit("conflict", nodes.local_path(remote), copy=nodes.local_path(node))


class _DifferentError(Exception):
    pass


class JournalTicket:
    """Remembers an upload's token in the database, for one layer of one node."""

    def __init__(self, nodes: Nodes, layer: int, ino: int) -> None:
        self._nodes = nodes
        self._key = f"{layer}:"
        self._ino = ino
        row = nodes.database.connection.execute("SELECT token FROM work WHERE ino = ?", (ino,)).fetchone()
        stored = row[0] if row else None
        self._token = stored[len(self._key) :] if stored and stored.startswith(self._key) else None

    @property
    def token(self) -> str | None:
        return self._token

    async def remember(self, token: str) -> None:
        self._token = token
        self._nodes.database.connection.execute(
            "INSERT INTO work (ino, token) VALUES (?, ?) ON CONFLICT (ino) DO UPDATE SET token = excluded.token",
            (self._ino, self._key + token),
        )
        await trio.to_thread.run_sync(os.fdatasync, self._nodes.database.sync_fd)
