"""Finds out what is so when the remote is not as base says, and settles it: a lost answer, or a conflict.

Nothing is repeated blindly: after a lost answer the remote is asked whether the step was done. In a conflict nothing is
overwritten (fs/rules.py): the remote keeps its name, the local version becomes a copy beside it, listed until somebody
resolves it. What is settled by taking the remote's word is left to a listing (fs/adopt.py).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable

from nbmountd.backends.base import Backend
from nbmountd.disk.content import ContentStore
from nbmountd.disk.database import Node
from nbmountd.errors import LocalError, RemoteError, RemoteNotFound, RemoteProtocolError, RemoteUnavailable, StaleFile
from nbmountd.escapes import AS_THEY_ARE
from nbmountd.fs.adopt import base_values, gone, here_of, local_values, take
from nbmountd.fs.conflicts import conflict_name
from nbmountd.fs.nodes import Nodes
from nbmountd.fs.refresh import Refresh
from nbmountd.fs.rules import Here, Outcome, There, decide
from nbmountd.log import get_logger
from nbmountd.model import Attributes, Entry, Kind, Place, Version
from nbmountd.sync.plan import Position
from nbmountd.sync.upload import Snapshot

COMPARE_LIMIT = 64 * 2**20
"""Up to this size the remote's bytes are compared with ours when it keeps no checksum: a false conflict costs more."""

KEPT_WHEN_MOVED = 16 * 2**20
"""Up to this size a file that was renamed here and changed there keeps its old bytes under the new name, if they are here."""

_log = get_logger(__name__)


class Settle:
    """Settling for one mount. What cannot be settled now is raised and tried again: RemoteError, LocalError."""

    def __init__(
        self, nodes: Nodes, store: ContentStore, refresh: Refresh, backend: Backend, emit: Callable[..., None]
    ) -> None:
        self._nodes = nodes
        self._store = store
        self._refresh = refresh
        self._backend = backend
        self._emit = emit

    # -- uploads ------------------------------------------------------------------------------------------------------

    async def upload(
        self,
        node: Node,
        replaced: Node,
        at: Position,
        place: Place,
        version: Version | None,
        snapshot: Snapshot,
        attributes: Attributes,
        cause: RemoteError,
        *,
        sent: bool,
    ) -> Entry | None:
        """What became of an upload that was refused or got no answer: its entry if it arrived after all; None if a
        conflict copy was made; raises when nothing happened and it may be tried again. `sent`: this very snapshot may have
        been sent before, with an unknown end."""
        sent = sent or cause.in_doubt
        found = await self._ask(place)
        if found is None:
            if version is not None:
                with self._nodes.transaction() as change:  # removed by somebody: ours goes up as a new file
                    change.update(replaced, base_parent=None, base_id=None)
                self._nodes.drop_if_unused(replaced)
            raise RemoteUnavailable(f"{cause}; it is sent as a new file") from cause
        if version is not None and found.kind is Kind.FILE and found.version == version:
            raise RemoteUnavailable(str(cause)) from cause  # the remote is as before: nothing arrived
        if await self._is_ours(found, place, snapshot, attributes, sent=sent):
            return found
        if sent and await self._is_cut_short(found, place, snapshot):
            await self._backend.remove(Place(place.path, found.id), kind=Kind.FILE, version=found.version)
            with self._nodes.transaction() as change:
                change.update(replaced, base_parent=None, base_id=None)
            self._nodes.drop_if_unused(replaced)
            raise RemoteUnavailable(f"{cause}; only its first {found.size} bytes arrived, it is sent again") from cause
        self.make_copy(node, replaced, at, found)
        return None

    async def arrived(self, place: Place, version: Version | None, snapshot: Snapshot) -> Entry | None:
        """The remote's entry if it has exactly this older snapshot, of which we never heard how its upload ended."""
        found = await self._ask(place)
        if found is None or (version is not None and found.version == version):
            return None
        return found if await self._is_ours(found, place, snapshot, Attributes(), sent=True) else None

    async def was_uploaded(
        self, node: Node, replaced: Node, place: Place, version: Version | None, snapshot: Snapshot
    ) -> Entry | None:
        """The remote's entry if it has this snapshot, of which we never heard how its upload ended and which is not wanted
        there any more; None if it has not. A beginning of it is removed."""
        found = await self._ask(place)
        if found is None or (version is not None and found.version == version):
            return None
        if replaced is node and node.base_parent is not None and found.version == node.base_version:
            return None  # base says so already
        if await self._is_ours(found, place, snapshot, Attributes(), sent=True):
            return found
        if await self._is_cut_short(found, place, snapshot):
            await self._backend.remove(Place(place.path, found.id), kind=Kind.FILE, version=found.version)
            with self._nodes.transaction() as change:
                change.update(replaced, base_parent=None, base_id=None)
            self._nodes.drop_if_unused(replaced)
        return None

    async def incomplete(
        self, node: Node, replaced: Node, at: Position, place: Place, snapshot: Snapshot, cause: StaleFile, *, sent: bool
    ) -> Entry | None:
        """Bytes that an upload needs are gone with the version they belonged to. The remote's entry if that is because this
        snapshot was `sent` before and has arrived. Else what is there now gets the name, and ours stays beside it with what is
        here of it. Raises when that turns out not to be so."""
        found = await self._ask(place)
        if found is not None and sent and await self._is_ours(found, place, snapshot, Attributes(), sent=True):
            return found
        owner = self._nodes.owner(node)
        if owner.base_parent is None:
            source = None  # its own file is gone, whatever is where it is to go now
        elif owner is node:
            source = found
        else:  # a further name is made of the bytes of the first
            source = await self._ask(self._nodes.place(owner))
        if source is not None and source.version is not None and source.version == owner.base_version:
            content = self._store.peek(owner.ino)
            if content is not None:
                content.stale = False
            raise RemoteUnavailable(f"{cause}; the remote has that version again") from cause
        if found is not None:
            self.make_copy(node, replaced, at, found)
        elif replaced.base_parent is not None:
            with self._nodes.transaction() as change:
                change.update(replaced, base_parent=None, base_id=None)
        return None

    async def _is_ours(
        self, found: Entry, place: Place, snapshot: Snapshot, attributes: Attributes, *, sent: bool
    ) -> bool:
        """Whether the remote's file has the snapshot's bytes. If it was `sent` perhaps, those that are here are enough: the
        rest was taken from the version that it replaced."""
        if found.kind is not Kind.FILE or found.size != snapshot.size:
            return False
        algorithm = (self._nodes.capabilities.checksum_algorithm or "").upper()
        if snapshot.digest is not None and algorithm in found.checksums:
            return found.checksums[algorithm] == snapshot.digest
        if not snapshot.here:
            if not sent:
                return False
            try:
                await snapshot.fetch_some()
            except StaleFile:
                return False  # nothing to compare with
        if snapshot.size > COMPARE_LIMIT:  # too much to read; a moment and a size of ours are as good as a name
            return self._has_mtime(found, attributes)
        return await self._agrees(found, place, snapshot)

    def _has_mtime(self, found: Entry, attributes: Attributes) -> bool:
        can = self._nodes.capabilities
        sent, stored = attributes.mtime_ns, found.attributes.mtime_ns
        return can.native_mtime and sent is not None and stored is not None and 0 <= sent - stored < can.mtime_granularity_ns

    async def _is_cut_short(self, found: Entry, place: Place, snapshot: Snapshot) -> bool:
        """Whether the remote has the beginning of our upload and nothing else: then sending it again overwrites nobody."""
        if found.kind is not Kind.FILE or found.size is None or not found.size < snapshot.size or not snapshot.here:
            return False
        return found.size <= COMPARE_LIMIT and await self._agrees(found, place, snapshot)

    async def _agrees(self, found: Entry, place: Place, snapshot: Snapshot) -> bool:
        """Raises RemoteProtocolError when other than the file's size came: that proves nothing."""
        at, size = 0, found.size or 0

        def compare(piece: memoryview) -> None:
            nonlocal at
            if at + len(piece) > size:
                raise RemoteProtocolError(f"more than its {size} bytes came")
            if not snapshot.agrees(at, piece):
                raise _DifferentError
            at += len(piece)

        if size:
            try:
                await self._backend.read(Place(place.path, found.id), found.version, 0, size, compare)
            except _DifferentError:
                return False
            if at < size:
                raise RemoteProtocolError(f"{at} of its {size} bytes came")
        return found.size is not None

    # -- directories, symlinks and moves ------------------------------------------------------------------------------

    async def made(self, node: Node, at: Position, place: Place, cause: RemoteError) -> Entry | None:
        """The name of a new directory or symlink is taken, or no answer came."""
        found = await self._ask(place)
        if found is None:
            raise RemoteUnavailable(str(cause)) from cause
        if found.kind is node.kind and (node.is_directory or found.attributes.target == node.target):
            self._refresh.forget(node.ino)  # it may hold what we do not know
            return found
        self.make_copy(node, node, at, found)
        return None

    async def was_made(self, node: Node, place: Place) -> Entry | None:
        """The remote's entry if it has the directory or symlink that we may have made there."""
        found = await self._ask(place)
        if found is None or found.kind is not node.kind:
            return None
        return found if node.is_directory or found.attributes.target == node.target else None

    async def was_moved(self, node: Node, source: Place, target: Place, replaced: Node | None) -> Entry | None:
        """The remote's entry at the target if an earlier move has brought the node there."""
        there, here = await self._ask(target), await self._ask(source)
        return there if await self._has_moved(node, target, there, here, replaced) else None

    async def moved(
        self, node: Node, source: Place, target: Place, at: Position, replaced: Node | None, cause: RemoteError
    ) -> Entry | None:
        """A move was refused or got no answer: the entry at the target if it is ours by now; None if a conflict copy was
        made; else what is there is adopted, and this raises: the next plan starts from that."""
        there, here = await self._ask(target), await self._ask(source)
        untouched = _is_untouched(there, replaced)
        as_before = here is not None and here.kind is node.kind and _has_version(node, here)
        if await self._has_moved(node, target, there, here, replaced):
            return there
        if not as_before:
            await self._source_changed(node, here)
        elif there is not None and not untouched:
            self.make_copy(node, replaced, at, there, keeps_base=True)
            return None
        elif there is None and replaced is not None:
            with self._nodes.transaction() as change:
                change.update(replaced, base_parent=None, base_id=None)
            self._nodes.drop_if_unused(replaced)
        raise RemoteUnavailable(str(cause)) from cause

    async def _has_moved(
        self, node: Node, target: Place, there: Entry | None, here: Entry | None, replaced: Node | None
    ) -> bool:
        as_before = here is not None and here.kind is node.kind and _has_version(node, here)
        if there is None or as_before:
            return False
        if _is_untouched(there, replaced):  # others may have brought it where the replaced one was thought to be
            return here is None and node.kind is Kind.FILE and _is_that_file(node, there)
        return await self._is_same_thing(node, target, there, here)

    async def _is_same_thing(self, node: Node, target: Place, there: Entry, here: Entry | None) -> bool:
        """Whether what has appeared at the target of a move is what was to be moved, of which `here` is at the source."""
        if there.kind is not node.kind:
            return False
        if there.id is not None and node.base_id is not None:
            return there.id == node.base_id
        if node.kind is not Kind.FILE:
            return here is None  # a directory's own listing will tell more
        return _has_version(node, there) or (here is None and await self.has_same_bytes(node, target, there, proven=True))

    async def has_same_bytes(
        self, node: Node, place: Place, entry: Entry, *, sent_mtime_ns: int | None = None, proven: bool = False
    ) -> bool:
        """Whether a file that has another version now, after a step that leaves bytes alone, still has the bytes of base.

        Some remotes give a new version when a file is moved or its time is set; or somebody wrote to it in that moment. What
        is here is compared; where nothing is, nothing can be mixed, or the mtime tells: a write would have moved it from
        where it was, or from what the step set (`sent_mtime_ns`). `proven`: nothing to compare is not enough, as it may be
        another file altogether.
        """
        if _has_version(node, entry):
            return True
        if entry.kind is not Kind.FILE or entry.size != node.base_size:
            return False
        if sent_mtime_ns is None:
            untouched = entry.attributes.mtime_ns is not None and entry.attributes.mtime_ns == node.base_mtime_ns
        else:
            untouched = self._has_mtime(entry, Attributes(mtime_ns=sent_mtime_ns))
        if node.link_of is not None:  # what is here may be what another name of it has on the remote
            return untouched
        content = self._store.open(node)
        try:
            base = Snapshot(self._store, content, [], _never)
            if node.unsent and not base.here:  # our edit lies above those bytes
                return untouched
            if not base.has_some:
                return untouched or (entry.size == 0 if proven else not self._nodes.may_be_open(node.ino))
            return base.size == entry.size and base.size <= COMPARE_LIMIT and await self._agrees(entry, place, base)
        finally:
            self._store.release(content)

    async def _source_changed(self, node: Node, here: Entry | None) -> None:
        """What was renamed here was changed, replaced or removed there."""
        news = There.GONE if here is None else There.CHANGED if here.kind is node.kind else There.OTHER_KIND
        if news is There.CHANGED and here_of(self._nodes, node) is Here.MOVED:
            self._keep_if_whole(node)
        if decide(here_of(self._nodes, node), news) is Outcome.TAKE and here is not None:
            take(self._nodes, node, here)
        elif here_of(self._nodes, node) in (Here.MOVED, Here.MOVED_EDITED):
            gone(self._nodes, node)
        else:  # removed or put back since
            await self.look_at_parent(node)

    def _keep_if_whole(self, node: Node) -> None:
        """A file of which all bytes are here, so that a program may have read them under the new name, is as if edited: it
        stays what it is. If the name came to mean the remote's new bytes, who then removes what he has read would remove those.
        """
        nodes = self._nodes
        if node.kind is not Kind.FILE or node.link_of is not None or nodes.aliases[node.ino] or node.size > KEPT_WHEN_MOVED:
            return
        content = self._store.open(node)
        try:
            if not content.size:
                self._store.truncate(content, 0, node.mtime_ns)
            elif not content.missing(0, content.size) and not content.unverified:
                self._store.write(content, 0, content.read(0, content.size), node.mtime_ns)
        except (LocalError, OSError) as exc:
            _log.info("cannot keep what was renamed here", path=nodes.local_path(node), cause=exc)
        finally:
            self._store.release(content)

    # -- removals -----------------------------------------------------------------------------------------------------

    async def not_removed(self, node: Node, place: Place, cause: RemoteError) -> None:
        """What was removed here was changed there: the change wins and comes back as what the remote has now."""
        nodes = self._nodes
        at = Position(node.base_parent or 0, node.base_name)
        found = await self._ask(place)
        if node.base_parent is None or found is None:
            raise RemoteUnavailable(str(cause)) from cause
        occupant = nodes.database.child(at.parent, at.name)
        if node.is_directory and found.kind is Kind.DIRECTORY:
            if not await self._backend.list(place):
                raise RemoteUnavailable(str(cause)) from cause  # it is empty by now
            self._bring_back(node)
            self._refresh.forget(node.ino)
        elif node.kind is Kind.FILE and found.kind is Kind.FILE and found.version == node.base_version:
            raise RemoteUnavailable(str(cause)) from cause
        elif occupant is not None and not occupant.local_only:
            self.make_copy(occupant, node, at, found, keeps_base=occupant.base_parent is not None)
            nodes.drop_if_unused(node)
            return
        else:
            self._bring_back(nodes.get(at.parent))
            await self.look_at_parent(node)
        path = "/".join(place.path)
        _log.warning("removed here, but changed on the remote: it comes back", path=path)
        self._emit("conflict", path, kept="remote")

    def _bring_back(self, directory: Node) -> None:
        """A removed directory, and those above it, get their names again: the remote has news in it."""
        if not directory.removed or directory.base_parent is None:
            return
        nodes, parent, name = self._nodes, directory.base_parent, directory.base_name
        self._bring_back(nodes.get(parent))
        occupant = nodes.database.child(parent, name)
        now_ns, now = nodes.now()
        with nodes.transaction() as change:
            if occupant is not None:
                copy = self._copy_name(parent, name)
                change.update(occupant, name=copy, changed_at=now, ctime_ns=now_ns)
                nodes.note_conflict(change, occupant, directory.ino, None, directory.mtime_ns)
                nodes.kernel.entry_changed(parent, copy)
            change.update(directory, parent=parent, name=name, changed_at=now, ctime_ns=now_ns)
        nodes.kernel.entry_changed(parent, name)

    # -- looking ------------------------------------------------------------------------------------------------------

    async def parent_missing(self, parent: int | None) -> None:
        """The directory that a step wanted is gone from the remote: its own parent's listing says what is so."""
        directory = None if parent is None else self._nodes.database.get(parent)
        if directory is not None:
            await self.look_at_parent(directory)

    async def look_at_parent(self, node: Node) -> None:
        """Lists the directory that should have the node, so that what is there now is adopted."""
        if node.base_parent is None or node.base_parent == node.ino:
            return
        self._nodes.touch(node.base_parent, node.base_name, running=False)
        try:
            await self._refresh.list_now(self._nodes.get(node.base_parent))
        except (RemoteError, LocalError) as exc:
            _log.info("cannot look at the remote", path=self._nodes.local_path(node), cause=exc)

    async def is_there(self, node: Node) -> bool:
        """Whether the remote has anything where the base of the node is. Listings leave what is in doubt to its step."""
        try:
            return await self._ask(self._nodes.place(node)) is not None
        except LocalError:
            return False

    async def _ask(self, place: Place) -> Entry | None:
        """What is under that name now, whatever it was before; None: nothing."""
        try:
            return await self._backend.stat(Place(place.path))
        except RemoteNotFound:
            return None

    # -- conflicts ----------------------------------------------------------------------------------------------------

    def make_copy(
        self, node: Node, replaced: Node | None, at: Position, found: Entry, *, keeps_base: bool = False
    ) -> None:
        """The remote keeps the name `at`; what is local gets a name of its own beside it, and is sent as something new.

        `replaced`, if it is another node, had its base there and has none now. With `keeps_base` the local one is still
        where its own base says (it was about to move to `at`).
        """
        nodes = self._nodes
        now_ns, now = nodes.now()
        in_the_way = node.parent == at.parent and node.name == at.name
        directory = nodes.get(at.parent)
        with nodes.transaction() as change:
            if replaced is not None and replaced is not node:
                change.update(replaced, base_parent=None, base_id=None)
            if not keeps_base:
                change.update(node, base_parent=None, base_id=None)
            if in_the_way:
                copy = self._copy_name(at.parent, at.name)
                change.update(node, name=copy, changed_at=now, ctime_ns=now_ns)
            remote: Node | None = None
            if nodes.database.base_child(at.parent, at.name) is None and not directory.removed:
                free = in_the_way or nodes.database.child(at.parent, at.name) is None
                if free:
                    remote = change.insert(
                        found.kind, parent=at.parent, name=at.name, base_parent=at.parent, base_name=at.name,
                        **base_values(nodes, found), **local_values(nodes, found),
                    )  # fmt: skip
            if in_the_way:
                nodes.note_conflict(
                    change, node, remote.ino if remote else None, found.size, found.attributes.mtime_ns
                )
        nodes.kernel.entry_changed(at.parent, at.name)
        if replaced is not None:
            nodes.drop_if_unused(replaced)
        if not in_the_way:
            return  # it has another name by now, or none: nothing is in the way of anything
        nodes.kernel.entry_changed(at.parent, copy)
        path = "/".join(filter(None, [nodes.local_path(directory), at.name]))
        _log.warning("conflict: both versions are kept", path=path, copy=nodes.local_path(node))
        self._emit("conflict", path, copy=nodes.local_path(node))

    def _copy_name(self, directory: int, name: str) -> str:
        can = self._nodes.capabilities
        longer_there = can.names.stored_size(name) - AS_THEY_ARE.stored_size(name)
        longest = can.max_name_bytes - longer_there
        return conflict_name(
            name, datetime.datetime.now(), self._nodes.name_is_taken(directory), max_bytes=max(40, min(255, longest))
        )


class _DifferentError(Exception):
    pass


def _is_untouched(there: Entry | None, replaced: Node | None) -> bool:
    """Whether what was to be replaced is still there."""
    return (
        there is not None and replaced is not None and there.kind is replaced.kind and there.version == replaced.base_version
    )


async def _never(*_: object) -> None:
    raise StaleFile("not to be fetched")


def _is_that_file(node: Node, entry: Entry) -> bool:
    """Whether the entry, elsewhere, is the file that the node has as its base, with the same bytes."""
    same = entry.id == node.base_id if entry.id is not None and node.base_id is not None else True
    return same and entry.kind is Kind.FILE and entry.version is not None and entry.version == node.base_version


def _has_version(node: Node, entry: Entry) -> bool:
    return node.kind is not Kind.FILE or entry.version == node.base_version
