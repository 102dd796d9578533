"""All contents of one mount on the local disk: opened and closed, written, frozen for an upload, absorbed, made durable.

What a content looks like to readers is in layers.py, the cached base in cache.py, the start after a death in replay.py. It
knows no remote, no names and no FUSE.

Where the truth about unsent bytes is: a layer's row in the database describes bytes that are on the disk (it is written only
after their fsync); everything since is in the journal, with checksums, until `settling` has brought it into the rows. So a
process may die at any moment, and after a loss of power nothing that the disk forgot is taken for data.

A data file is deleted only after the deletion of its row is durable: else a loss of power would bring the row back alone. A
data file without a row is left over from a death between the two and is deleted at start.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import google_crc32c

from nbmountd.disk.absorption import Absorption
from nbmountd.disk.cache import BaseCache, Fill, len_in, open_new
from nbmountd.disk.database import Database, Node
from nbmountd.disk.extents import Extents
from nbmountd.disk.journal import Journal, RecordKind, sync_directory
from nbmountd.disk.layers import LOST, Content, Layer, pread
from nbmountd.disk.replay import SETTLED, Replay
from nbmountd.log import get_logger

__all__ = ["Content", "ContentStore", "Fill", "Layer"]

JOURNAL_LIMIT: Final = 4 * 2**20
"""The journal is settled into the database beyond this: 87,000 writes, a quarter of a second at the next start."""
SETTLE_EVERY: Final = 10.0
"""Seconds after which what the journal says is brought to the disk: about what a loss of power costs of bytes that no program
fsynced. A guess between the 5 s of ext4's commits and the 30 s of the kernel's write-back."""
OPEN_FILES: Final = 128
"""Contents kept open that nobody uses now. Each has one to three descriptors; the usual limit of a process is 1,024."""

_log = get_logger(__name__)


class ContentStore:
    """All contents of one mount. Used on the loop, except where a method says that it runs in a thread.

    `reserve(count)` is asked before unsent bytes are accepted and raises NoSpace or QuotaExceeded.
    """

    def __init__(
        self,
        database: Database,
        journal: Journal,
        state: Path,
        cache: Path,
        reserve: Callable[[int], None],
        *,
        journal_limit: int = JOURNAL_LIMIT,
        keep_open: int = OPEN_FILES,
    ) -> None:
        self._database = database
        self._journal = journal
        self._directory = state / "unsent"
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._cache = BaseCache(database, cache / "base")
        self._reserve = reserve
        self._journal_limit = journal_limit
        self._keep_open = keep_open
        self._open: dict[int, Content] = {}
        self._idle: OrderedDict[int, Content] = OrderedDict()
        self._unsettled: dict[int, tuple[Node, Layer]] = {}
        """Layers of which the journal knows more than the database. Keeps their nodes, whose size is unsettled too."""
        self._doomed: list[tuple[int, Path]] = []
        """Files to be deleted once so many commits are durable."""
        self._new_names: set[Path] = {state, self._directory}
        """Directories with names that may not be on the disk yet."""
        self._unsettled_since = float("inf")
        """Clock (monotonic) of the oldest record that is not settled."""
        self._inherited = False
        """The journal has records of an earlier process. They are settled soon: if that one died between a write and its
        record, a checksum is wrong, which after a loss of power would count against what came later."""
        self.unsent_bytes = 0
        self.sent_bytes = 0
        """Once unsent, and on the remote by now; since the start."""

    @property
    def cached_bytes(self) -> int:
        return self._cache.bytes

    # -- opening and closing ------------------------------------------------------------------------------------------

    def open(self, node: Node) -> Content:
        """The content of a file, with descriptors. Each call needs one `release`. Raises OSError."""
        content = self._open.get(node.ino)
        if content is None:
            content = self._load(node)
            self._open[node.ino] = content
        self._idle.pop(node.ino, None)
        content.users += 1
        return content

    def peek(self, ino: int) -> Content | None:
        """The content if it is loaded now; no `release` needed."""
        return self._open.get(ino)

    def release(self, content: Content) -> None:
        """Gives one `open` back. Descriptors are closed later, when they are many. Raises nothing."""
        content.users -= 1
        if content.users == 0 and self._open.get(content.node.ino) is content:
            self._cache.used(content)
            self._idle[content.node.ino] = content
            while len(self._idle) > self._keep_open:
                _, oldest = self._idle.popitem(last=False)
                self._unload(oldest)

    def _load(self, node: Node) -> Content:
        layers = self._load_layers(node.ino)
        content = self._cache.load(node)
        content.layers = layers
        return content

    def _load_layers(self, ino: int) -> list[Layer]:
        layers: list[Layer] = []
        try:
            for row in self._layer_rows("WHERE ino = ? ORDER BY id", (ino,)):
                known = self._unsettled.get(row[0])
                layer = known[1] if known else _layer_of(row)
                layers.append(layer)
                self._open_layer(layer)
        except OSError:
            _close_layers(layers)
            raise
        return layers

    def _layer_rows(self, where: str, parameters: Iterable[object]) -> list[tuple[int, int, int, int | None, int, bytes]]:
        return self._database.connection.execute(
            f"SELECT id, ino, size, floor, mtime_ns, extents FROM layers {where}", tuple(parameters)
        ).fetchall()

    def _open_layer(self, layer: Layer) -> None:
        """Opens the data file, and finds out what of it is no longer there."""
        path = self._layer_path(layer.id)
        try:
            layer.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            if layer.extents:
                layer.lost = layer.extents.copy()
                return
            layer.fd = open_new(path, self._new_names.add)
        length = os.fstat(layer.fd).st_size
        if length < layer.extents.stop:
            layer.lost = Extents(layer.extents.within(length, layer.extents.stop))

    def _unload(self, content: Content) -> None:
        del self._open[content.node.ino]
        self._cache.unload(content)
        _close_layers(content.layers)

    # -- the base -----------------------------------------------------------------------------------------------------

    def fill(self, content: Content, start: int) -> Fill:
        """A way for fetched bytes of the base from `start` on, closed by the caller. Raises OSError."""
        return self._cache.fill(content, start)

    def verify_later(self, content: Content, ranges: Iterable[tuple[int, int]]) -> Callable[[], Callable[[], None]] | None:
        """What is left of an earlier process in these ranges must be verified before its first use: a call for a thread that
        does it, and whose result is to be called on the loop. None: nothing is. To be called once. Raises OSError."""
        verify = self._cache.verify_later(content, ranges)
        if verify is None:
            return None
        generation = content.generation
        return lambda: partial(self._cache.verified, content, verify(), generation)

    def save_present(self, content: Content) -> None:
        """Puts what is present of the base into the database; losing this costs a download."""
        self._cache.save([content])

    def save_all_present(self) -> None:
        """`save_present` for everything that is loaded."""
        self._cache.save(self._open.values())

    def evict(self, node: Node) -> int:
        """Gives up the cached base of a node that nobody uses; returns the bytes freed. Not below unsent bytes: the remote
        may not have that version any more, and then nothing could complete them."""
        if node.unsent:
            return 0
        content = self._open.get(node.ino)
        if content is not None:
            if content.users:
                return 0
            self._idle.pop(node.ino, None)
            self._unload(content)
        return self._cache.evict(node)

    # -- unsent bytes -------------------------------------------------------------------------------------------------

    def write(self, content: Content, offset: int, data: bytes, mtime_ns: int) -> None:
        """Takes `data` at `offset`. When it returns, the death of this process loses nothing of it.

        Raises NoSpace, QuotaExceeded, OSError or sqlite3.Error, and then nothing of it counts.
        """
        stop = offset + len(data)
        top = self._writable(content)
        new_bytes = len(data) - (len_in(top.extents, offset, stop) if top else 0)
        if new_bytes:
            self._reserve(new_bytes)
        layer = top or self._begin_layer(content)
        before = [] if new_bytes == len(data) else [
            (begin, pread(layer.fd, end - begin, begin)) for begin, end in layer.extents.within(offset, stop)
        ]  # fmt: skip
        try:
            _pwrite(layer.fd, data, offset)
            sequence = self._journal.append(RecordKind.WRITE, layer.id, offset, len(data), mtime_ns, _checksum(data))
        except OSError:
            for begin, old in before:
                _pwrite(layer.fd, old, begin)
            raise
        layer.extend(offset, stop)
        self.unsent_bytes += new_bytes
        self._recorded(content.node, layer, sequence, mtime_ns, mtime_ns)

    def truncate(self, content: Content, size: int, mtime_ns: int) -> None:
        """The file has `size` bytes from now on; what is uncovered later is zeros. Raises as `write`.

        The data file keeps its length for now: if the power goes, it may have been cut while the record of it is lost.
        """
        layer = self._writable(content) or self._begin_layer(content)
        sequence = self._journal.append(RecordKind.TRUNCATE, layer.id, size, 0, mtime_ns)
        before = layer.extents.total
        layer.resize(size)
        self.unsent_bytes -= before - layer.extents.total
        self._recorded(content.node, layer, sequence, mtime_ns, mtime_ns)

    def touch(self, node: Node, mtime_ns: int) -> None:
        """A program sets the mtime: what the journal says of earlier writes must not come back after it.

        To be called before the transaction that sets it in the node's row. Raises OSError.
        """
        if not node.unsent or node.is_directory:
            return
        content = self.open(node)
        try:
            if content.layers:
                layer = content.layers[-1]
                sequence = self._journal.append(RecordKind.TOUCH, layer.id, 0, 0, mtime_ns)
                self._recorded(node, layer, sequence, mtime_ns, node.ctime_ns)
        finally:
            self.release(content)

    def _recorded(self, node: Node, layer: Layer, sequence: int, mtime_ns: int, ctime_ns: int) -> None:
        """The journal has it: memory may say so."""
        layer.sequence, layer.mtime_ns = sequence, mtime_ns
        node.size, node.mtime_ns, node.ctime_ns = layer.size, mtime_ns, ctime_ns
        if not self._unsettled:
            self._unsettled_since = time.monotonic()
        self._unsettled[layer.id] = (node, layer)

    def _writable(self, content: Content) -> Layer | None:
        top = content.layers[-1] if content.layers else None
        return None if top is None or top.frozen or top.lost is not None else top

    def _begin_layer(self, content: Content) -> Layer:
        """A new layer on top: row and file, or neither. The file's time moves with the first record, not before: whoever is
        killed in between has written nothing."""
        fd, mtime_ns = LOST, content.node.mtime_ns
        try:
            with self._database.transaction() as change:
                cursor = change.execute(
                    "INSERT INTO layers (ino, size, floor, mtime_ns, extents) VALUES (?, ?, NULL, ?, ?)",
                    (content.node.ino, content.size, mtime_ns, b""),
                )
                layer = Layer(int(cursor.lastrowid or 0), content.size, None, mtime_ns, Extents())
                fd = open_new(self._layer_path(layer.id), self._new_names.add)
                change.update(content.node, unsent=True)
        except BaseException:
            if fd != LOST:
                os.close(fd)
            raise
        layer.fd = fd
        content.layers.append(layer)
        return layer

    # -- uploads ------------------------------------------------------------------------------------------------------

    def freeze(self, content: Content) -> list[Layer]:
        """A snapshot: these layers do not change until they are absorbed or thawed."""
        for layer in content.layers:
            layer.frozen = True
        return content.layers.copy()

    def thaw(self, content: Content) -> None:
        """Takes the newest layer back for writing, when its upload did not succeed."""
        if content.layers:
            content.layers[-1].frozen = False

    def begin_absorb(self, content: Content, layers: list[Layer], *, size: int) -> Absorption:
        """`layers` (the oldest ones) have become the base of `size` bytes; the transaction before this, without an await in
        between, has deleted their rows. Then `Absorption.copy` in a thread, then `finish_absorb`: always both."""
        content.generation += 1  # what is being fetched is of the old base
        content.absorbing = True
        for layer in layers:
            self._unsettled.pop(layer.id, None)
        return Absorption(
            content, layers, size, self._cache.path(content.node.ino), self._layer_path,
            partial(self._database.sync, self._database.commits),
        )  # fmt: skip

    def finish_absorb(self, absorption: Absorption) -> None:
        """The base is what readers see now, and the layers are gone. Raises nothing: a base that could not be made is
        fetched again."""
        content, before = absorption.content, absorption.content.present.total
        for layer in absorption.layers:
            content.layers.remove(layer)
            self.unsent_bytes -= layer.extents.total
            self.sent_bytes += layer.extents.total
            self._doom(self._layer_path(layer.id))
        _close_layers(absorption.layers)
        content.base_size = absorption.size
        content.stale = content.absorbing = False
        if absorption.failure is None:
            absorption.apply()
            self._cache.bytes += content.present.total - before
            self._cache.save([content])
        else:
            _log.info("cannot keep what was sent; it is fetched when needed", inode=content.node.ino, cause=absorption.failure)
            self._cache.drop(content)
        absorption.close()

    def discard(self, node: Node) -> None:
        """Deletes a node's row and every byte kept for it. Only when nobody uses it. Raises sqlite3.Error: then all stays."""
        rows = self._layer_rows("WHERE ino = ?", (node.ino,))
        with self._database.transaction() as change:
            (cached,) = change.execute("SELECT coalesce(sum(bytes), 0) FROM cached WHERE ino = ?", (node.ino,)).fetchone()
            change.delete(node)
        content = self._open.pop(node.ino, None)
        self._idle.pop(node.ino, None)
        if content is not None:
            cached = content.present.total
            content.generation += 1
            if content.base_fd >= 0:
                os.close(content.base_fd)
            _close_layers(content.layers)
        self._cache.bytes -= cached
        for row in rows:
            known = self._unsettled.pop(row[0], None)
            self.unsent_bytes -= (known[1] if known else _layer_of(row)).extents.total
            self._doom(self._layer_path(row[0]))
        if node.base_size or cached:
            self._doom(self._cache.path(node.ino))

    def _doom(self, path: Path) -> None:
        self._doomed.append((self._database.commits, path))

    # -- durability ---------------------------------------------------------------------------------------------------

    def syncing(self, content: Content) -> Iterator[Callable[[], None]]:
        """Calls for a thread, one after the other; after the last, every unsent byte of the content and all names survive a
        loss of power. Raises OSError, also when an earlier fsync of these bytes failed."""
        sequence = self._journal.next_sequence
        layers = [layer for layer in content.layers if layer.fd != LOST]
        if any(layer.sync_failed for layer in layers):
            raise OSError(errno.EIO, "the local disk refused these bytes before")
        fds = [os.dup(layer.fd) for layer in layers]  # an upload may end and close ours meanwhile
        names, self._new_names = self._new_names, set()
        commits = self._database.commits

        def sync_bytes() -> None:
            try:
                for fd in fds:
                    os.fdatasync(fd)
            except OSError:
                for layer in layers:
                    layer.sync_failed = True
                raise
            for directory in names:
                sync_directory(directory)
            self._database.sync(commits)

        try:
            yield sync_bytes
            names = set()
        finally:
            self._new_names |= names
            for fd in fds:
                os.close(fd)
        for layer in layers:
            self._journal.append(RecordKind.SYNC, layer.id, sequence, 0, layer.mtime_ns)
        yield self._journal.sync

    def settling(self, *, now: bool = False) -> Iterator[Callable[[], None]]:
        """Calls for a thread, one after the other: deletes what is doomed, and brings a journal that is old or long (or any,
        with `now`) to the disk and into the database.

        May be given up at any point and begun anew. Raises OSError or sqlite3.Error; what is not done is done next time.
        """
        if self._doomed:
            doomed, self._doomed = self._doomed, []
            try:
                yield partial(self._bury, doomed)
                doomed = []
            finally:
                self._doomed += doomed
        old = time.monotonic() - self._unsettled_since > SETTLE_EVERY
        if self._journal.size and (now or old or self._inherited or self._journal.size > self._journal_limit):
            yield from self._settle_journal()
            self._inherited = False

    def _bury(self, doomed: list[tuple[int, Path]]) -> None:
        self._database.sync(max(commits for commits, _ in doomed))
        for _, path in doomed:
            path.unlink(missing_ok=True)

    def _settle_journal(self) -> Iterator[Callable[[], None]]:
        begin, began = self._journal.rotate(), time.monotonic()
        states = [
            (layer.id, layer.size, layer.floor, layer.mtime_ns, layer.extents.pack()) for _, layer in self._unsettled.values()
        ]
        names, self._new_names = self._new_names, set()
        try:
            yield partial(self._sync_files, [state[0] for state in states], names)
            names = set()
        finally:
            self._new_names |= names
        with self._database.transaction() as change:
            for id, *values in states:
                change.execute("UPDATE layers SET size = ?, floor = ?, mtime_ns = ?, extents = ? WHERE id = ?", (*values, id))
            change.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (SETTLED, str(begin)))
            for node, layer in self._unsettled.values():
                if layer.sequence < begin:
                    change.update(node, size=node.size, mtime_ns=node.mtime_ns, ctime_ns=node.ctime_ns)
        yield partial(self._database.sync, self._database.commits)
        self._journal.retire()
        self._unsettled_since = began
        for id, (_, layer) in list(self._unsettled.items()):
            if layer.sequence < begin:
                layer.sequence = -1
                del self._unsettled[id]
                if layer.fd != LOST:  # the part of the file that no row and no record claims any more
                    os.ftruncate(layer.fd, layer.extents.stop)

    def _sync_files(self, layers: list[int], names: set[Path]) -> None:
        for id in layers:
            try:
                fd = os.open(self._layer_path(id), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # sent meanwhile, or lost, which `_open_layer` finds
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
        for directory in names:
            sync_directory(directory)

    def read_later(
        self, content: Content, start: int, size: int, layers: list[Layer] | None = None
    ) -> Callable[[], bytes]:
        """A call for a thread that reads like `Content.read`, with descriptors of its own. Must be called once."""
        parts = [
            (segment.stop - segment.start, segment.start, segment.fd if segment.fd in (None, LOST) else os.dup(segment.fd))
            for segment in content.readable(start, start + size, layers)
        ]

        def read() -> bytes:
            try:
                return b"".join(bytes(count) if fd is None else pread(fd, count, at) for count, at, fd in parts)
            finally:
                for _, _, fd in parts:
                    if fd is not None and fd != LOST:
                        os.close(fd)

        return read

    # -- start and end ------------------------------------------------------------------------------------------------

    def recover(self, *, power_lost: bool, boot_id: str = "") -> None:
        """Brings memory and database to what the journal says, and counts what there is. Once, before anything is opened.

        `power_lost`: the machine was restarted since; bytes that were not fsynced are checked before they are believed.
        `boot_id` is remembered with the result. Raises OSError, sqlite3.Error.
        """
        layers = {row[0]: (row[1], _layer_of(row)) for row in self._layer_rows("ORDER BY id", ())}
        replay = Replay(self._database, self._journal, layers, self._layer_path)
        replay.run(power_lost=power_lost)
        if power_lost:
            self._sync_files(list(replay.touched), set())
        with self._database.transaction() as change:
            replay.write_nodes(change)
            if power_lost:
                replay.write_layers(change)
            if boot_id:
                change.execute("INSERT OR REPLACE INTO meta VALUES ('boot_id', ?)", (boot_id,))
        if power_lost:
            self._database.sync(self._database.commits)
            self._journal.rotate()
            self._journal.retire()
        else:
            self._unsettled = replay.unsettled()
            self._inherited = self._journal.size > 0
        self._delete_strays(layers)
        self.unsent_bytes = sum(layer.extents.total for _, layer in layers.values())
        self._cache.recount()

    def _delete_strays(self, known: Container[int]) -> None:
        """Files that no row mentions. Whoever starts is waited for, so all that needs an fsync first is done by `settling`."""
        row = self._database.connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'layers'").fetchone()
        newest = row[0] if row else 0
        for shard in os.listdir(self._directory):
            for name in os.listdir(self._directory / shard):
                if not name.isdigit() or int(name) in known:
                    continue
                if int(name) > newest:  # its row was never committed: the next layer gets that number
                    (self._directory / shard / name).unlink()
                else:  # the absence of its row must be on the disk first
                    self._doom(self._directory / shard / name)

    def recount(self) -> tuple[int, int]:
        """What `unsent_bytes` and `cached_bytes` must be, counted anew. Slow: for tests and doctors."""
        loaded = {layer.id: layer for content in self._open.values() for layer in content.layers}
        loaded |= {id: layer for id, (_, layer) in self._unsettled.items()}
        unsent = sum(loaded.get(row[0], _layer_of(row)).extents.total for row in self._layer_rows("", ()))
        cached = sum(content.present.total for content in self._open.values())
        for ino, count in self._database.connection.execute("SELECT ino, bytes FROM cached"):
            cached += 0 if ino in self._open else count
        return unsent, cached

    def close(self) -> None:
        """Brings everything to the disk as far as it lets us, and closes it. What is not settled stays in the journal."""
        self.save_all_present()
        try:
            for call in self.settling(now=True):
                call()
        except (OSError, sqlite3.Error) as exc:
            _log.info("what is left is settled at the next start", cause=exc)
        for content in list(self._open.values()):
            self._unload(content)
        self._idle.clear()

    def _layer_path(self, id: int) -> Path:
        return self._directory / f"{id % 256:02x}" / str(id)


def _layer_of(row: tuple[int, int, int, int | None, int, bytes]) -> Layer:
    id, _, size, floor, mtime_ns, packed = row
    try:
        return Layer(id, size, floor, mtime_ns, Extents.unpack(packed))
    except ValueError:  # nobody knows what is in its file: reading it is an error, never zeros
        layer = Layer(id, size, floor, mtime_ns, Extents([(0, size)]))
        layer.lost = layer.extents.copy()
        return layer


def _close_layers(layers: Iterable[Layer]) -> None:
    for layer in layers:
        if layer.fd != LOST:
            os.close(layer.fd)
            layer.fd = LOST


def _checksum(data: bytes) -> int:
    return int(google_crc32c.value(bytes(data)))


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    """All of it. Raises OSError."""
    written = os.pwrite(fd, data, offset)
    while written < len(data):
        count = os.pwrite(fd, memoryview(data)[written:], offset + written)
        if count == 0:
            raise OSError(errno.ENOSPC, "no space for unsent bytes")
        written += count
