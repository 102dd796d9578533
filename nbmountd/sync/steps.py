"""Carries out one planned step: asks the remote, then moves base in one transaction.

When the remote is not as base says (a version moved, a name is taken, a parent is gone, an answer was lost), settle.py
finds out what is so. It does not decide when or in which order steps run.
"""

from __future__ import annotations

import time
from typing import Any
from weakref import WeakValueDictionary

import trio

from nbmountd.backends.base import Backend
from nbmountd.disk.content import Content, ContentStore
from nbmountd.disk.database import Node
from nbmountd.errors import (
    NotFound,
    ParentMissing,
    RemoteError,
    RemoteExists,
    RemoteNotFound,
    RemoteProtocolError,
    VersionMismatch,
)
from nbmountd.fs.adopt import base_values
from nbmountd.fs.nodes import UNSENT_MODE, UNSENT_MTIME, UNSENT_XATTRS, Nodes
from nbmountd.fs.reads import Reads
from nbmountd.fs.refresh import Refresh
from nbmountd.log import get_logger
from nbmountd.model import Attributes, Entry, Kind, Place, Version
from nbmountd.sync.plan import (
    TEMPORARY_PREFIX,
    MakeDirectory,
    MakeSymlink,
    Move,
    Position,
    Remove,
    SetAttributes,
    Step,
    Upload,
)
from nbmountd.sync.settle import Settle
from nbmountd.sync.upload import Snapshot

_log = get_logger(__name__)


class Steps:
    """The steps of one mount."""

    def __init__(
        self, nodes: Nodes, store: ContentStore, reads: Reads, refresh: Refresh, backend: Backend, settle: Settle
    ) -> None:
        self._nodes = nodes
        self._store = store
        self._reads = reads
        self._refresh = refresh
        self._backend = backend
        self._settle = settle
        self._snapshots: dict[int, Snapshot] = {}
        self._locks: WeakValueDictionary[int, trio.Lock] = WeakValueDictionary()

    def incomplete(self, node: Node) -> bool:
        """Whether bytes of the file are only on the remote."""
        content = self._store.peek(node.ino)
        return content is not None and bool(content.missing(0, content.size))

    def sent(self, node: Node) -> int:
        """Bytes of a running upload that have gone out."""
        snapshot = self._snapshots.get(node.ino)
        return snapshot.sent if snapshot else 0

    def still_fits(self, step: Step, node: Node) -> bool:
        """Whether the world is still as it was when the step was planned."""
        base = None if node.base_parent is None else Position(node.base_parent, node.base_name)
        local = None if node.parent is None else Position(node.parent, node.name)
        if isinstance(step, Remove):
            return base == step.at and local is None
        if isinstance(step, Move):
            wanted = local is not None or step.target.name.startswith(TEMPORARY_PREFIX)
            return base == step.source and wanted and self._replaced_fits(step.replaces, step.target)
        if isinstance(step, Upload):
            return local == step.at and base in (None, step.at) and self._replaced_fits(step.replaces, step.at)
        if isinstance(step, (MakeDirectory, MakeSymlink)):
            return local == step.at and base is None
        return base is not None and base == local

    def _replaced_fits(self, ino: int | None, at: Position) -> bool:
        if ino is None:
            return True
        replaced = self._nodes.database.get(ino)
        return (
            replaced is not None
            and replaced.removed
            and (replaced.base_parent, replaced.base_name) == (at.parent, at.name)
        )

    async def carry_out(self, step: Step, node: Node) -> None:
        """Does it. Raises RemoteError or LocalError when it was not done; a conflict found and settled is done."""
        names = _names(step, node)
        for parent, name in names:
            self._nodes.touch(parent, name, running=True)
        try:
            if isinstance(step, Upload):
                await self._upload(step, node)
            elif isinstance(step, Move):
                await self._move(step, node)
            elif isinstance(step, Remove):
                await self._remove(step, node)
            elif isinstance(step, MakeDirectory):
                await self._make_directory(step, node)
            elif isinstance(step, MakeSymlink):
                await self._make_symlink(step, node)
            else:
                await self._set_attributes(node)
        except ParentMissing:
            await self._settle.parent_missing(self._nodes, names[0][0])
            raise
        finally:
            for parent, name in names:
                self._nodes.touch(parent, name, running=False)

    # -- uploads ------------------------------------------------------------------------------------------------------

    async def _upload(self, step: Upload, node: Node) -> None:
        async with self._locks.setdefault(node.link_of or node.ino, trio.Lock()):  # names of one file, one after the other
            await self._upload_alone(step, node)

    async def _upload_alone(self, step: Upload, node: Node) -> None:
        began = time.monotonic()
        content = self._store.open(self._nodes.owner(node))
        layers = self._store.freeze(content)
        algorithm = self._nodes.capabilities.checksum_algorithm
        snapshot = Snapshot(self._store, content, layers, self._ensure, algorithm)
        self._snapshots[node.ino] = snapshot
        replaced = node if step.replaces is None else self._nodes.get(step.replaces)
        try:
            attributes, sending = self._attributes(self._nodes.owner(node))
            entry = await self._send(step, replaced, snapshot, attributes)
            if entry is None:
                return  # settled as a conflict; the copy goes out as a new file
            await self._confirm(step, node, content, snapshot, entry, sending)
            _log.info(
                "uploaded", path=self._nodes.local_path(node), size=snapshot.size,
                seconds=round(time.monotonic() - began, 2),
            )  # fmt: skip
        finally:
            del self._snapshots[node.ino]
            self._store.thaw(content)
            self._store.release(content)
            self._nodes.drop_if_unused(node)

    async def _ensure(self, content: Content, start: int, stop: int, layers: Any) -> None:
        await self._reads.ensure(content, start, stop, layers)

    async def _send(self, step: Upload, replaced: Node, snapshot: Snapshot, attributes: Attributes) -> Entry | None:
        """The entry of the uploaded file; None when the remote's version had to be kept beside ours."""
        node = self._nodes.get(step.ino)
        if replaced.base_parent is None:
            place, version = self._nodes.place_in(step.at.parent, step.at.name), None
        else:
            place, version = self._nodes.place(replaced), Version(replaced.base_version or "")
        ticket = self._settle.ticket(snapshot.layers[-1].id if snapshot.layers else 0, node.ino)
        try:
            if version is not None and replaced is node and self._nodes.capabilities.ranged_writes and snapshot.layers:
                entry = await self._backend.write_ranges(
                    place, snapshot.pieces(), snapshot.size, replaces=version, attributes=attributes
                )
            else:
                entry = await self._backend.upload(
                    place, snapshot, replaces=version, attributes=attributes, ticket=ticket
                )
        except (VersionMismatch, RemoteExists, RemoteNotFound) as exc:
            return await self._settle.upload(node, replaced, place, version, snapshot, exc)
        except RemoteError as exc:
            if not exc.in_doubt:
                raise
            return await self._settle.upload(node, replaced, place, version, snapshot, exc)
        if entry.size is not None and entry.size != snapshot.size:
            raise RemoteProtocolError(f"the remote has {entry.size} bytes of {snapshot.size}", in_doubt=True)
        return entry

    async def _confirm(
        self, step: Upload, node: Node, content: Content, snapshot: Snapshot, entry: Entry, sending: int
    ) -> None:
        """The remote has the snapshot: base moves, its layers become the cached base version."""
        newer = content.layers[len(snapshot.layers) :]
        if node.link_of is not None:
            self._confirm_alias(step, node, entry, snapshot.size, unsent=bool(newer))
            return
        with self._nodes.transaction() as change:
            for layer in snapshot.layers:
                change.execute("DELETE FROM layers WHERE id = ?", (layer.id,))
            if step.replaces is not None:
                change.update(self._nodes.get(step.replaces), base_parent=None)
            change.update(
                node, base_parent=step.at.parent, base_name=step.at.name, unsent=bool(newer), size=node.size,
                mtime_ns=node.mtime_ns, ctime_ns=node.ctime_ns, unsent_attributes=node.unsent_attributes & ~sending,
                **(base_values(self._nodes, entry) | {"base_size": snapshot.size, "writable": node.writable}),
            )  # fmt: skip
            change.execute("DELETE FROM work WHERE ino = ?", (node.ino,))
        await self._reads.settle(content)
        if snapshot.layers:
            await trio.to_thread.run_sync(lambda: self._store.absorb(content, snapshot.layers, size=snapshot.size))
            self._store.finish_absorb(content, snapshot.layers, size=snapshot.size)
        else:
            content.base_size = snapshot.size
        if step.replaces is not None:
            replaced = self._nodes.get(step.replaces)
            old = self._store.peek(replaced.ino)
            if old is not None:
                old.stale = True
            self._nodes.drop_if_unused(replaced)

    def _confirm_alias(self, step: Upload, node: Node, entry: Entry, size: int, *, unsent: bool) -> None:
        """The remote has the file under a further name; the layers stay for the name that owns them."""
        with self._nodes.transaction() as change:
            if step.replaces is not None:
                change.update(self._nodes.get(step.replaces), base_parent=None)
            change.update(
                node, base_parent=step.at.parent, base_name=step.at.name, unsent=unsent, unsent_attributes=0,
                **(base_values(self._nodes, entry) | {"base_size": size}),
            )  # fmt: skip
        if step.replaces is not None:
            self._nodes.drop_if_unused(self._nodes.get(step.replaces))

    def _attributes(self, node: Node) -> tuple[Attributes, int]:
        """What goes along, and the bits of `unsent_attributes` that it settles."""
        can = self._nodes.capabilities
        sending = (
            (UNSENT_MODE if can.native_mode else 0)
            | (UNSENT_MTIME if can.native_mtime else 0)
            | (UNSENT_XATTRS if can.native_xattrs else 0)
        )
        return (
            Attributes(
                mode=node.mode if can.native_mode else None,
                mtime_ns=node.mtime_ns if can.native_mtime else None,
                xattrs=node.xattrs if can.native_xattrs and node.unsent_attributes & UNSENT_XATTRS else None,
            ),
            sending,
        )

    # -- the others ---------------------------------------------------------------------------------------------------

    async def _make_directory(self, step: MakeDirectory, node: Node) -> None:
        place = self._nodes.place_in(step.at.parent, step.at.name)
        attributes, sending = self._attributes(node)
        try:
            entry = await self._backend.make_directory(place, attributes)
        except RemoteError as exc:
            if not isinstance(exc, RemoteExists) and not exc.in_doubt:
                raise
            found = await self._settle.made(node, place, exc)
            if found is None:
                return
            entry = found
        with self._nodes.transaction() as change:
            change.update(
                node, base_parent=step.at.parent, base_name=step.at.name,
                unsent_attributes=node.unsent_attributes & ~sending, **base_values(self._nodes, entry),
            )  # fmt: skip

    async def _make_symlink(self, step: MakeSymlink, node: Node) -> None:
        place = self._nodes.place_in(step.at.parent, step.at.name)
        attributes, sending = self._attributes(node)
        try:
            entry = await self._backend.make_symlink(place, node.target or "", attributes)
        except RemoteError as exc:
            if not isinstance(exc, RemoteExists) and not exc.in_doubt:
                raise
            found = await self._settle.made(node, place, exc)
            if found is None:
                return
            entry = found
        with self._nodes.transaction() as change:
            change.update(
                node, base_parent=step.at.parent, base_name=step.at.name,
                unsent_attributes=node.unsent_attributes & ~sending, **base_values(self._nodes, entry),
            )  # fmt: skip

    async def _move(self, step: Move, node: Node) -> None:
        source = self._nodes.place(node)
        target = self._nodes.place_in(step.target.parent, step.target.name)
        version = _version(node)
        replaced = None if step.replaces is None else self._nodes.get(step.replaces)
        if replaced is not None:
            target = Place(target.path, replaced.base_id, target.parent_id)
        try:
            entry = await self._backend.move(
                source, target, kind=node.kind, version=version, replaces=None if replaced is None else _version(replaced)
            )
        except RemoteError as exc:
            if not isinstance(exc, (VersionMismatch, RemoteExists, RemoteNotFound)) and not exc.in_doubt:
                raise
            found = await self._settle.moved(node, source, target, exc)
            if found is None:
                return
            entry = found
        with self._nodes.transaction() as change:
            if replaced is not None:
                change.update(replaced, base_parent=None)
            values = base_values(self._nodes, entry)
            content = self._store.peek(node.ino)
            if node.kind is Kind.FILE:
                values["base_size"] = node.base_size
            change.update(node, base_parent=step.target.parent, base_name=step.target.name, **values)
            change.execute("UPDATE cached SET version = ? WHERE ino = ?", (values["base_version"], node.ino))
            if content is not None:
                content.fetched_unsaved = True
        if replaced is not None:
            self._nodes.drop_if_unused(replaced)

    async def _remove(self, step: Remove, node: Node) -> None:
        try:
            await self._backend.remove(self._nodes.place(node), kind=node.kind, version=_version(node))
        except (VersionMismatch, RemoteExists):
            await self._settle.not_removed(node)
            return
        except RemoteNotFound:
            pass
        with self._nodes.transaction() as change:
            change.update(node, base_parent=None)
            change.execute("DELETE FROM work WHERE ino = ?", (node.ino,))
        self._nodes.drop_if_unused(node)

    async def _set_attributes(self, node: Node) -> None:
        attributes, sending = self._attributes(node)
        before = node.unsent_attributes
        try:
            entry = await self._backend.set_attributes(self._nodes.place(node), attributes, kind=node.kind)
        except RemoteNotFound as exc:
            await self._settle.look_at_parent(node)
            raise NotFound(f"{node.name} is no longer on the remote") from exc
        with self._nodes.transaction() as change:
            left = node.unsent_attributes & ~sending if node.unsent_attributes == before else node.unsent_attributes
            values = base_values(self._nodes, entry)
            change.update(node, unsent_attributes=left, **values)
            change.execute("UPDATE cached SET version = ? WHERE ino = ?", (values["base_version"], node.ino))


def _version(node: Node) -> Version | None:
    return Version(node.base_version) if node.kind is Kind.FILE and node.base_version else None


def _names(step: Step, node: Node) -> list[tuple[int | None, str]]:
    """The remote names that the step changes."""
    if isinstance(step, Move):
        return [(step.target.parent, step.target.name), (step.source.parent, step.source.name)]
    if isinstance(step, SetAttributes):
        return [(node.base_parent, node.base_name)]
    at: Position = getattr(step, "at")  # noqa: B009  # every other step has one; Step itself has none
    return [(at.parent, at.name)]
