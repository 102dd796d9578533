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
from nbmountd.disk.content import Content, ContentStore, Layer
from nbmountd.disk.database import Node, Transaction
from nbmountd.errors import (
    LocalError,
    ParentMissing,
    RemoteError,
    RemoteExists,
    RemoteNotFound,
    RemoteProtocolError,
    RemoteUnavailable,
    RemoteUnsupported,
    StaleFile,
    VersionMismatch,
)
from nbmountd.fs.adopt import base_values, is_forgotten_symlink
from nbmountd.fs.doubts import ATTRIBUTES, MAKE, MOVE, UPLOAD, Doubt
from nbmountd.fs.nodes import UNSENT_MODE, UNSENT_MTIME, UNSENT_XATTRS, Nodes
from nbmountd.fs.reads import Reads
from nbmountd.fs.refresh import Refresh
from nbmountd.log import get_logger
from nbmountd.model import Attributes, Entry, Kind, Place, Version
from nbmountd.sync.journal_ticket import JournalTicket, all_begun, begun
from nbmountd.sync.plan import (
    TEMPORARY_PREFIX,
    Ask,
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

KEPT_FOR_READERS = 256 * 2**20
"""Up to so much is fetched of a file that is removed or replaced while programs here have it open. A guess."""

DEFAULT_MODES = {Kind.FILE: 0o644, Kind.DIRECTORY: 0o755, Kind.SYMLINK: 0o777}
"""What something has of which the remote says no mode, as adopt.py shows it."""

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
        self._open_questions: dict[int, Content] = {}
        """Contents of which an upload may have arrived or not: kept as they were then, until that is known."""
        for ino, layer in all_begun(nodes.database).items():
            node = nodes.database.get(ino)
            if node is not None and node.unsent and node.link_of is None:
                self._keep_open(store.open(node), layer)

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
        if isinstance(step, Ask):
            return self.is_to_be_asked(node)
        if self.is_to_be_asked(node):
            return False
        if isinstance(step, Remove):
            return base == step.at and local is None
        if isinstance(step, Move):
            wanted = local is not None or step.target.name.startswith(TEMPORARY_PREFIX)
            return base == step.source and wanted and self._replaced_fits(step.replaces, node, step.target)
        if isinstance(step, Upload):
            return local == step.at and base in (None, step.at) and self._replaced_fits(step.replaces, node, step.at)
        if isinstance(step, (MakeDirectory, MakeSymlink)):
            return local == step.at and base is None and self._is_free(node, step.at)
        return base is not None and base == local

    def is_to_be_asked(self, node: Node) -> bool:
        """Whether an earlier step may have brought the node to a place where it is not wanted any more, or nothing is left to
        do that would find out."""
        doubt = self._nodes.doubts.get(node.ino)
        if doubt is None:
            return False
        # Some remotes give a file another version with its time, which no other step would know for ours.
        if doubt.kind == ATTRIBUTES or not node.to_send or (node.parent, node.name) != (doubt.parent, doubt.name):
            return True
        # A further name has no layers that were kept as they were sent: written to since, it would not be known again.
        return node.link_of is not None and doubt.kind == UPLOAD and self._newest_layer(node.link_of) > doubt.layer

    def _newest_layer(self, ino: int) -> int:
        query = "SELECT coalesce(max(id), 0) FROM layers WHERE ino = ?"
        (newest,) = self._nodes.database.connection.execute(query, (ino,)).fetchone()
        return int(newest)

    def _replaced_fits(self, ino: int | None, node: Node, at: Position) -> bool:
        if ino is None:
            return self._is_free(node, at)
        replaced = self._nodes.database.get(ino)
        return (
            replaced is not None
            and replaced.removed
            and (replaced.base_parent, replaced.base_name) == (at.parent, at.name)
        )

    def _is_free(self, node: Node, at: Position) -> bool:
        """Whether no other node is at that place on the remote, as far as is known."""
        occupant = self._nodes.database.base_child(at.parent, at.name)
        return occupant is None or occupant is node

    async def carry_out(self, step: Step, node: Node) -> None:
        """Does it. Raises RemoteError or LocalError when it was not done; a conflict found and settled is done."""
        names = _names(step, node)
        for parent, name in names:
            self._nodes.touch(parent, name, running=True)
        self._nodes.working[node.ino] += 1
        doubts, before = self._nodes.doubts, node.ino in self._nodes.doubts
        try:
            if isinstance(step, Ask):
                await self._ask(node)
            elif isinstance(step, Upload):
                await self._upload(step, node)
            elif isinstance(step, Move):
                await self._move(step, node)
            elif isinstance(step, Remove):
                await self._remove(step, node)
            elif isinstance(step, (MakeDirectory, MakeSymlink)):
                await self._make(step, node)
            else:
                await self._set_attributes(node)
            doubts.end(node.ino)
        except (RemoteError, LocalError, OSError) as exc:
            if not before and not _was_in_doubt(exc):
                doubts.end(node.ino)  # it was not carried out, and none before it
            if isinstance(exc, ParentMissing):
                await self._settle.parent_missing(names[0][0])
            raise
        finally:
            for parent, name in names:
                self._nodes.touch(parent, name, running=False)
            self._nodes.settling.discard(node.ino)
            self._nodes.working[node.ino] -= 1
            if not self._nodes.working[node.ino]:
                del self._nodes.working[node.ino]
            self._nodes.drop_if_unused(node)

    # -- uploads ------------------------------------------------------------------------------------------------------

    async def _upload(self, step: Upload, node: Node) -> None:
        async with self._locks.setdefault(node.link_of or node.ino, trio.Lock()):  # names of one file, one after the other
            await self._upload_alone(step, node)

    async def _upload_alone(self, step: Upload, node: Node) -> None:
        began = time.monotonic()
        replaced = node if step.replaces is None else self._nodes.get(step.replaces)
        if replaced is not node:
            await self._keep_for_readers(replaced)
        content = self._store.open(self._nodes.owner(node))
        layers = self._store.freeze(content)
        algorithm = self._nodes.capabilities.checksum_algorithm
        doubt, in_doubt = self._nodes.doubts.get(node.ino), False
        try:
            snapshot = self._earlier_snapshot(node, content, layers)
            entry = None
            attributes, version = self._attributes(node), None
            if snapshot is not None:
                place, version = self._target(step, replaced)
                entry = await self._settle.arrived(place, version, snapshot)
            if snapshot is None or entry is None:
                snapshot = Snapshot(self._store, content, layers, self._ensure, algorithm)
                self._snapshots[node.ino] = snapshot
                entry = await self._send(step, node, replaced, snapshot, attributes)
            if entry is None:
                return  # settled as a conflict; the copy goes out as a new file
            await self._confirm(step, node, content, snapshot, entry, attributes)
            _log.info(
                "uploaded", path=self._nodes.local_path(node), size=snapshot.size,
                seconds=round(time.monotonic() - began, 2),
            )  # fmt: skip
        except RemoteError as exc:
            in_doubt = _was_in_doubt(exc) or (doubt is not None and doubt.kind == UPLOAD)  # of an earlier attempt
            raise
        finally:
            self._snapshots.pop(node.ino, None)
            self._let_go(node)
            if in_doubt and layers and node.link_of is None and content.layers[: len(layers)] == layers:
                content.users += 1
                self._keep_open(content, layers[-1].id)
            else:
                self._store.thaw(content)
            self._store.release(content)

    def _earlier_snapshot(self, node: Node, content: Content, layers: list[Layer]) -> Snapshot | None:
        """The older part of these layers, if that was sent before and nobody knows whether it arrived."""
        newest = begun(self._nodes.database, node.ino)  # 0: before there was any layer, as of a new and empty file
        if newest is None or not layers or layers[-1].id == newest or newest not in [0, *(layer.id for layer in layers)]:
            return None
        older = [layer for layer in layers if layer.id <= newest]
        return Snapshot(self._store, content, older, self._ensure, None)

    def _keep_open(self, content: Content, newest: int) -> None:
        """Takes over one use of the content: its layers up to `newest` stay as they were when they were sent."""
        self._let_go(content.node)
        for layer in content.layers:
            if layer.id <= newest:
                layer.frozen = True
        self._open_questions[content.node.ino] = content

    def _let_go(self, node: Node) -> None:
        content = self._open_questions.pop(node.ino, None)
        if content is not None:
            self._store.release(content)

    async def _ensure(self, content: Content, start: int, stop: int, layers: list[Layer]) -> None:
        try:
            await self._reads.ensure(content, start, stop, layers, patient=True)
        except RemoteNotFound as exc:  # of what it is made of; not to be taken for an answer to the upload
            await self._settle.look_at_parent(content.node)
            if content.node.ino in self._nodes.doubts and not await self._settle.is_there(content.node):
                raise StaleFile("the remote has it no more, and these bytes were never fetched") from exc
            raise RemoteUnavailable(f"the rest of its bytes: {exc}") from exc

    async def _keep_for_readers(self, old: Node) -> None:
        """The remote is about to lose a file that programs here may still have open: what they may read is fetched."""
        content = self._store.peek(old.ino)
        if content is None or not self._nodes.opens[old.ino] or content.stale:
            return
        missing = sum(stop - start for start, stop in content.missing(0, content.size))
        if not missing:
            return
        if missing > KEPT_FOR_READERS:
            _log.warning("open here, removed and too large to be fetched first", inode=old.ino, missing=missing)
            return
        try:
            await self._reads.ensure(content, 0, content.size, patient=True)
        except (StaleFile, RemoteNotFound):
            return  # it is gone from the remote already

    def _target(self, step: Upload, replaced: Node) -> tuple[Place, Version | None]:
        """Where an upload goes, and which version it replaces there."""
        if replaced.base_parent is None:
            return self._nodes.place_in(step.at.parent, step.at.name), None
        return self._nodes.place(replaced), Version(replaced.base_version or "")

    async def _send(
        self, step: Upload, node: Node, replaced: Node, snapshot: Snapshot, attributes: Attributes
    ) -> Entry | None:
        """The entry of the uploaded file; None when the remote's version had to be kept beside ours."""
        place, version = self._target(step, replaced)
        can = self._nodes.capabilities
        sent_before = begun(self._nodes.database, node.ino) == snapshot.top
        try:
            if version is not None and not can.atomic_replace and not snapshot.whole:
                await snapshot.fetch_all()  # the remote's old bytes are gone with the first new one
            await snapshot.fetch_some()  # a further name, or cut shorter and nothing else: how would it be known again?
            ticket = JournalTicket(self._nodes.database, snapshot.top, node.ino)
            doubt = Doubt(node.ino, UPLOAD, step.at.parent, step.at.name, version, snapshot.top)
            self._nodes.doubts.begin(doubt, *([ticket.begin] if node.link_of is None else []))
            if version is not None and replaced is node and can.ranged_writes and snapshot.layers:
                entry = await self._backend.write_ranges(
                    place, snapshot.pieces(), snapshot.size, replaces=version, attributes=attributes
                )
            else:
                entry = await self._backend.upload(
                    place, snapshot, replaces=version, attributes=attributes, ticket=ticket
                )
            if entry.size is not None and entry.size != snapshot.size:
                raise RemoteProtocolError(f"the remote says it has {entry.size} bytes of {snapshot.size}", in_doubt=True)
        except StaleFile as exc:
            arrived = await self._settle.incomplete(node, replaced, step.at, place, snapshot, exc, sent=sent_before)
            if arrived is None:
                raise
            return arrived
        except RemoteError as exc:
            if not isinstance(exc, (VersionMismatch, RemoteExists, RemoteNotFound)) and not exc.in_doubt:
                raise
            return await self._settle.upload(
                node, replaced, step.at, place, version, snapshot, attributes, exc, sent=sent_before
            )
        return entry

    async def _confirm(
        self, step: Upload, node: Node, content: Content, snapshot: Snapshot, entry: Entry, attributes: Attributes
    ) -> None:
        """The remote has the snapshot: base moves, its layers become the cached base version."""
        newer = content.layers[len(snapshot.layers) :]
        if node.link_of is not None:
            self._confirm_alias(step, node, entry, snapshot.size, attributes, unsent=bool(newer))
            return
        with self._nodes.transaction() as change:
            for layer in snapshot.layers:
                change.execute("DELETE FROM layers WHERE id = ?", (layer.id,))
            if step.replaces is not None:
                change.update(self._nodes.get(step.replaces), base_parent=None)
            change.update(
                node, base_parent=step.at.parent, base_name=step.at.name, unsent=bool(newer), size=node.size,
                mtime_ns=node.mtime_ns, ctime_ns=node.ctime_ns,
                unsent_attributes=_left(node, node, attributes) | _lacking(entry, attributes),
                **base_values(self._nodes, entry)
                | {"base_size": snapshot.size, "writable": node.writable, "removable": node.removable},
            )  # fmt: skip
            change.execute("DELETE FROM work WHERE ino = ?", (node.ino,))
        self._nodes.settling.add(node.ino)
        absorption = self._store.begin_absorb(content, snapshot.layers, size=snapshot.size)
        try:
            with trio.CancelScope(shield=True):
                async with self._reads.held(content):
                    await trio.to_thread.run_sync(absorption.copy)
        finally:
            self._store.finish_absorb(absorption)
        if step.replaces is not None:
            replaced = self._nodes.get(step.replaces)
            old = self._store.peek(replaced.ino)
            if old is not None:
                old.stale = True
            self._nodes.drop_if_unused(replaced)

    def _confirm_alias(
        self, step: Upload, node: Node, entry: Entry, size: int, attributes: Attributes, *, unsent: bool
    ) -> None:
        """The remote has the file under a further name; the layers stay for the name that owns them."""
        with self._nodes.transaction() as change:
            if step.replaces is not None:
                change.update(self._nodes.get(step.replaces), base_parent=None)
            change.update(
                node, base_parent=step.at.parent, base_name=step.at.name, unsent=unsent,
                unsent_attributes=_left(node, self._nodes.owner(node), attributes) | _lacking(entry, attributes),
                **(base_values(self._nodes, entry) | {"base_size": size}),
            )  # fmt: skip
        if step.replaces is not None:
            self._nodes.drop_if_unused(self._nodes.get(step.replaces))

    def _attributes(self, node: Node) -> Attributes:
        """What goes along with a step: of a further name, what the file has that it is a name of."""
        can, owner = self._nodes.capabilities, self._nodes.owner(node)
        return Attributes(
            mode=owner.mode if can.native_mode else None,
            mtime_ns=owner.mtime_ns if can.native_mtime else None,
            target=owner.target if can.native_symlinks else None,
            xattrs=owner.xattrs if can.native_xattrs and (owner.xattrs or node.unsent_attributes & UNSENT_XATTRS) else None,
        )

    # -- questions ----------------------------------------------------------------------------------------------------

    async def _ask(self, node: Node) -> None:
        """What became of an earlier step. If it was carried out, base is where it went: as if the answer had just come."""
        doubt = self._nodes.doubts.get(node.ino)
        if doubt is None:
            return
        at = Position(doubt.parent, doubt.name)
        occupant = self._nodes.database.base_child(at.parent, at.name)
        replaced = None if occupant is node else occupant
        if replaced is not None and not (replaced.removed and replaced.kind is Kind.FILE):
            return  # what is there is known to be another one
        try:
            place = self._nodes.place_in(at.parent, at.name)
            owner = self._nodes.owner(node)
        except LocalError:
            return  # nor is the directory there
        if doubt.kind == UPLOAD:
            async with self._locks.setdefault(owner.ino, trio.Lock()):
                await self._ask_for_upload(Upload(node.ino, at, replaced.ino if replaced else None), node, owner, doubt, place)
        elif doubt.kind == MAKE and node.base_parent is None:
            entry = await self._settle.was_made(node, place)
            if entry is not None and replaced is None:
                self._made(node, at, entry, Attributes())
        elif doubt.kind == MOVE and node.base_parent is not None:
            entry = await self._settle.was_moved(node, self._nodes.place(node), place, replaced)
            if entry is not None:
                await self._moved(node, at, place, entry, replaced)
        elif doubt.kind == ATTRIBUTES and node.base_parent is not None and node.kind is Kind.FILE:
            await self._ask_for_attributes(node)

    async def _ask_for_attributes(self, node: Node) -> None:
        """If only the version of the bytes that base has is another one now, base has that version."""
        place = self._nodes.place(node)
        try:
            entry = await self._backend.stat(Place(place.path))
        except RemoteNotFound:
            return
        if entry.kind is node.kind and entry.version != node.base_version:
            values = await self._values_after(node, place, entry, sent_mtime_ns=self._nodes.owner(node).mtime_ns)
            if "base_version" in values:
                with self._nodes.transaction() as change:
                    self._rebase(change, node, values)

    async def _ask_for_upload(self, step: Upload, node: Node, owner: Node, doubt: Doubt, place: Place) -> None:
        content = self._store.open(owner)
        layers = self._store.freeze(content)
        sent = [layer for layer in layers if layer.id <= doubt.layer]
        known = False
        try:
            snapshot = Snapshot(self._store, content, sent, self._ensure, None)
            version = None if doubt.version is None else Version(doubt.version)
            replaced = node if step.replaces is None else self._nodes.get(step.replaces)
            entry = await self._settle.was_uploaded(node, replaced, place, version, snapshot)
            known = True
            if entry is not None:
                await self._confirm(step, node, content, snapshot, entry, Attributes())
        finally:
            if known:
                self._let_go(node)
            if known or sent != layers:
                self._store.thaw(content)
            self._store.release(content)

    # -- the others ---------------------------------------------------------------------------------------------------

    async def _make(self, step: MakeDirectory | MakeSymlink, node: Node) -> None:
        at, attributes = step.at, self._attributes(node)
        place = self._nodes.place_in(at.parent, at.name)
        self._nodes.doubts.begin(Doubt(node.ino, MAKE, at.parent, at.name))
        try:
            if isinstance(step, MakeDirectory):
                entry = await self._backend.make_directory(place, attributes)
            else:
                entry = await self._backend.make_symlink(place, node.target or "", attributes)
        except RemoteError as exc:
            if not isinstance(exc, RemoteExists) and not exc.in_doubt:
                raise
            found = await self._settle.made(node, at, place, exc)
            if found is None:
                return
            entry = found
        self._made(node, at, entry, attributes)

    def _made(self, node: Node, at: Position, entry: Entry, attributes: Attributes) -> None:
        with self._nodes.transaction() as change:
            change.update(
                node, base_parent=at.parent, base_name=at.name,
                unsent_attributes=_left(node, node, attributes) | _lacking(entry, attributes),
                **base_values(self._nodes, entry),
            )  # fmt: skip

    async def _move(self, step: Move, node: Node) -> None:
        source = self._nodes.place(node)
        target = self._nodes.place_in(step.target.parent, step.target.name)
        replaced = None if step.replaces is None else self._nodes.get(step.replaces)
        if replaced is not None:
            await self._keep_for_readers(replaced)
            target = Place(target.path, replaced.base_id, target.parent_id)
        if node.is_directory and not self._nodes.capabilities.attributes_move:
            await self._learn_below(node)
        self._nodes.doubts.begin(Doubt(node.ino, MOVE, step.target.parent, step.target.name))
        try:
            entry = await self._backend.move(
                source, target, kind=node.kind, version=_version(node),
                replaces=None if replaced is None else _version(replaced),
            )  # fmt: skip
        except RemoteError as exc:
            if not isinstance(exc, (VersionMismatch, RemoteExists, RemoteNotFound)) and not exc.in_doubt:
                raise
            found = await self._settle.moved(node, source, target, step.target, replaced, exc)
            if found is None:
                return
            entry = found
        await self._moved(node, step.target, target, entry, replaced)

    async def _learn_below(self, directory: Node) -> None:
        """Lists what was never listed in a directory that is about to lose what the remote says of the things in it."""
        if not directory.listed:
            await self._refresh.list_now(directory)
        for child in self._nodes.database.base_children(directory.ino):
            if child.is_directory:
                await self._learn_below(child)

    def _tell_again_below(self, change: Transaction, directory: Node) -> None:
        """The remote is to be told once more what it had been told of all that is in the directory."""
        now = self._nodes.now()[1]
        for child in self._nodes.database.base_children(directory.ino):
            if child.is_directory:
                self._tell_again_below(change, child)
            if child.removed:
                continue
            owner = self._nodes.owner(child)
            bits = UNSENT_MODE if owner.kind is Kind.SYMLINK or owner.mode != DEFAULT_MODES[owner.kind] else 0
            bits |= UNSENT_XATTRS if owner.xattrs else 0
            if bits & ~child.unsent_attributes:
                change.update(child, unsent_attributes=child.unsent_attributes | bits, changed_at=now)

    async def _moved(self, node: Node, at: Position, target: Place, entry: Entry, replaced: Node | None) -> None:
        """The remote has the node at `at`."""
        values = await self._values_after(node, target, entry)
        # A listing may have taken it for gone meanwhile, with its old directory. With a base it would be removed there now.
        vanished = node.parent is None and node.base_parent is None
        with self._nodes.transaction() as change:
            if replaced is not None:
                change.update(replaced, base_parent=None)
            if vanished:
                self._refresh.forget(at.parent)
            else:
                self._rebase(change, node, values | {"base_parent": at.parent, "base_name": at.name})
            if node.is_directory and not self._nodes.capabilities.attributes_move:
                self._tell_again_below(change, node)
        if replaced is not None:
            old = self._store.peek(replaced.ino)
            if old is not None:
                old.stale = True
            self._nodes.drop_if_unused(replaced)

    async def _remove(self, step: Remove, node: Node) -> None:
        await self._keep_for_readers(node)
        place = self._nodes.place(node)
        try:
            await self._backend.remove(place, kind=node.kind, version=_version(node))
        except (VersionMismatch, RemoteExists) as exc:
            await self._settle.not_removed(node, place, exc)
            return
        except RemoteNotFound:
            pass
        with self._nodes.transaction() as change:
            change.update(node, base_parent=None)
            change.execute("DELETE FROM work WHERE ino = ?", (node.ino,))

    async def _set_attributes(self, node: Node) -> None:
        place = self._nodes.place(node)
        attributes = self._attributes(node)
        try:
            before = await self._backend.stat(place)
            same_kind = before.kind is node.kind or is_forgotten_symlink(node, before)
            if not same_kind or (node.kind is Kind.FILE and before.version != node.base_version):
                await self._settle.look_at_parent(node)
                raise RemoteUnavailable("it was changed on the remote; that comes first")
            if node.ino not in self._nodes.doubts:
                self._nodes.doubts.begin(Doubt(node.ino, ATTRIBUTES, node.base_parent or 0, node.base_name))
            entry = await self._backend.set_attributes(place, attributes, kind=node.kind)
        except RemoteNotFound as exc:
            await self._settle.look_at_parent(node)
            raise RemoteUnavailable("it is no longer on the remote") from exc
        except RemoteUnsupported as exc:
            _log.debug("attributes stay here", path=self._nodes.local_path(node), cause=exc)
            with self._nodes.transaction() as change:
                change.update(node, unsent_attributes=0)
            return
        values = await self._values_after(node, place, entry, sent_mtime_ns=attributes.mtime_ns)
        with self._nodes.transaction() as change:
            self._rebase(change, node, values | {"unsent_attributes": _left(node, self._nodes.owner(node), attributes)})

    async def _values_after(
        self, node: Node, place: Place, entry: Entry, *, sent_mtime_ns: int | None = None
    ) -> dict[str, Any]:
        """The base values after a step that leaves the bytes alone. If the file has other bytes by now, base keeps the old
        version, and the next listing finds the new one."""
        values = base_values(self._nodes, entry)
        if node.kind is not Kind.FILE:
            return values
        if await self._settle.has_same_bytes(node, Place(place.path, entry.id), entry, sent_mtime_ns=sent_mtime_ns):
            return values | {"base_size": node.base_size}
        return {"base_id": entry.id}

    def _rebase(self, change: Transaction, node: Node, values: dict[str, Any]) -> None:
        """Moves base; what is cached of the old version is of the new one."""
        change.update(node, **values)
        if "base_version" in values and node.kind is Kind.FILE:
            change.execute(
                "UPDATE cached SET version = ? WHERE ino = ? AND version = ?",  # a stale row must not become believable
                (values["base_version"], node.ino, node.base_version),
            )
            content = self._store.peek(node.ino)
            if content is not None:
                content.fetched_unsaved = True


def _left(node: Node, owner: Node, sent: Attributes) -> int:
    """The bits of `unsent_attributes` of `node` of what `owner`, which has its attributes, has other than was sent."""
    left = node.unsent_attributes
    if sent.mode == owner.mode:
        left &= ~UNSENT_MODE
    if sent.mtime_ns == owner.mtime_ns:
        left &= ~UNSENT_MTIME
    if sent.xattrs is not None and dict(sent.xattrs) == owner.xattrs:
        left &= ~UNSENT_XATTRS
    return left


def _lacking(entry: Entry, sent: Attributes) -> int:
    """Bits of what was to go with a new content and did not arrive with it: the answer of an earlier attempt was lost, or
    another request stores them and failed. An mtime is allowed the seconds that remotes cut or move."""
    has = entry.attributes
    if entry.kind is Kind.SYMLINK:
        return 0
    mode = DEFAULT_MODES[entry.kind] if has.mode is None else has.mode  # if it knows of none, it was told none
    lacking = UNSENT_MODE if sent.mode not in (None, mode) else 0
    if entry.kind is Kind.FILE and sent.mtime_ns is not None and has.mtime_ns is not None:
        lacking |= UNSENT_MTIME if abs(sent.mtime_ns - has.mtime_ns) > 2 * 10**9 else 0
    if sent.xattrs is not None and dict(sent.xattrs) != dict(has.xattrs or {}):
        lacking |= UNSENT_XATTRS
    return lacking


def _was_in_doubt(exc: BaseException | None) -> bool:
    """Whether an error came of a lost answer, perhaps while asking about it: what was sent may have arrived, or arrive yet."""
    while exc is not None:
        if isinstance(exc, RemoteError) and exc.in_doubt:
            return True
        exc = exc.__cause__ or exc.__context__
    return False


def _version(node: Node) -> Version | None:
    return Version(node.base_version) if node.kind is Kind.FILE and node.base_version else None


def _names(step: Step, node: Node) -> list[tuple[int | None, str]]:
    """The remote names that the step changes; the first is where it leaves the node."""
    if isinstance(step, Move):
        return [(step.target.parent, step.target.name), (step.source.parent, step.source.name)]
    if isinstance(step, SetAttributes):
        return [(node.base_parent, node.base_name)]
    at: Position = getattr(step, "at")  # noqa: B009  # every other step has one; Step itself has none
    return [(at.parent, at.name)]
