"""The bytes of files on the local disk: one sparse file of the base version, and layers of unsent bytes above it.

It knows extents and descriptors, no remote, no names and no FUSE.

    layer 1      ······WWWW··········      newest unsent bytes; written to
    layer 0      WW····WWWWWWWW······|     frozen while an upload sends it; `|` is its floor
    base         BBBB····BBBB····BBBBBBBB  what was fetched of the base version (cache, may be deleted)

A reader sees, for each byte, the topmost layer that has it; the base shows through only below every floor. A layer's
floor is the smallest size that the file had since the layer began: what a truncation cut off stays cut off, and what a
later extension uncovers is zeros. So a snapshot for an upload costs nothing (the next write begins a new layer), a small
write into a large file needs no download, and clean bytes (cache directory) and unsent bytes (state directory) are in
different places.

When an upload has been confirmed its layers are `absorbed` into the base. Layers live in the database (`layers`) plus the
journal; a data file without a row is left over from a crash between the two and is deleted at start, after a row's
absence was made durable.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import google_crc32c

from nbmountd.disk.database import Database, Node
from nbmountd.disk.extents import Extents
from nbmountd.disk.journal import Journal, RecordKind

COPY_STEP: Final = 4 * 2**20
JOURNAL_LIMIT: Final = 16 * 2**20
"""The journal is settled into the database beyond this; 300,000 writes."""
OPEN_FILES: Final = 256
"""Descriptors kept open for contents that nobody uses now. A guess below every usual limit of 1,024."""


class Layer:
    """Unsent bytes of one file in a sparse file of their own. `stop` is the size that the file has with this layer."""

    __slots__ = ("extents", "fd", "floor", "frozen", "id", "mtime_ns", "settled", "size")

    def __init__(self, id: int, size: int, floor: int | None, mtime_ns: int, extents: Extents) -> None:
        self.id = id
        self.size = size
        self.floor = floor
        self.mtime_ns = mtime_ns
        self.extents = extents
        self.fd = -1
        self.frozen = False
        self.settled = True
        """The database knows everything that the journal says of it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Where the bytes [start, stop) of a file are: a layer's or the base's descriptor, nowhere (a hole: zeros), or missing."""

    start: int
    stop: int
    fd: int | None
    missing: bool = False


@dataclass(eq=False)
class Content:
    """The bytes of one node. Made by `ContentStore.open`; `users` counts who needs its descriptors."""

    node: Node
    layers: list[Layer]
    present: Extents
    base_size: int
    base_fd: int = -1
    users: int = 0
    stale: bool = False
    """The remote no longer has the base version: what is missing can never be fetched."""
    fetched_unsaved: bool = False
    used_at: float = 0.0

    @property
    def size(self) -> int:
        return self.layers[-1].size if self.layers else self.base_size

    @property
    def base_stop(self) -> int:
        """Where the base ends for readers: below every floor."""
        stop = self.base_size
        for layer in self.layers:
            if layer.floor is not None and layer.floor < stop:
                stop = layer.floor
        return stop

    def segments(self, start: int, stop: int, layers: list[Layer] | None = None) -> list[Segment]:
        """Where [start, stop) is, in order and without gaps, cut to the file's size. `layers`: a snapshot to look through."""
        layers = self.layers if layers is None else layers
        size = layers[-1].size if layers else self.base_size
        stop = min(stop, size)
        if start >= stop:
            return []
        found: list[Segment] = []
        self._look(start, stop, len(layers) - 1, layers, found)
        found.sort(key=lambda segment: segment.start)
        return found

    def _look(self, start: int, stop: int, depth: int, layers: list[Layer], found: list[Segment]) -> None:
        if depth < 0:
            end = min(stop, self.base_size)
            for begin, finish in self.present.within(start, end):
                found.append(Segment(begin, finish, self.base_fd))
            for begin, finish in self.present.gaps(start, end):
                found.append(Segment(begin, finish, None, missing=True))
            if end < stop:
                found.append(Segment(max(start, end), stop, None))
            return
        layer = layers[depth]
        for begin, finish in layer.extents.within(start, stop):
            found.append(Segment(begin, finish, layer.fd))
        floor = layer.floor
        for begin, finish in layer.extents.gaps(start, stop):
            if floor is not None and finish > floor:  # above the floor nothing below shows through
                found.append(Segment(max(begin, floor), finish, None))
                finish = floor
            if begin < finish:
                self._look(begin, finish, depth - 1, layers, found)

    def missing(self, start: int, stop: int, layers: list[Layer] | None = None) -> list[tuple[int, int]]:
        """The ranges of [start, stop) that must be fetched before they can be read."""
        if not (self.layers if layers is None else layers) and self.present.covers(start, min(stop, self.base_size)):
            return []
        return [(segment.start, segment.stop) for segment in self.segments(start, stop, layers) if segment.missing]

    def read(self, start: int, size: int, flags: int = 0, layers: list[Layer] | None = None) -> bytes:
        """The bytes [start, start+size), short at the end of the file. Nothing of it may be missing.

        With `flags` os.RWF_NOWAIT raises BlockingIOError when the disk would have to be waited for.
        """
        stop = min(start + size, (layers[-1].size if layers else self.base_size) if layers is not None else self.size)
        if start >= stop:
            return b""
        fd = self._single_source(start, stop) if layers is None else None
        if fd is not None:
            return _pread(fd, stop - start, start, flags)
        parts = []
        for segment in self.segments(start, stop, layers):
            length = segment.stop - segment.start
            if segment.missing:
                raise ValueError(f"bytes {segment.start}-{segment.stop} are not here")
            parts.append(bytes(length) if segment.fd is None else _pread(segment.fd, length, segment.start, flags))
        return b"".join(parts)

    def _single_source(self, start: int, stop: int) -> int | None:
        if not self.layers:
            return self.base_fd if self.present.covers(start, stop) else None
        top = self.layers[-1]
        return top.fd if top.extents.covers(start, stop) else None

    def data_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Ranges that are data here or on the remote; what is left out is a hole."""
        for segment in self.segments(start, stop):
            if segment.fd is not None or segment.missing:
                yield segment.start, segment.stop


def _pread(fd: int, length: int, offset: int, flags: int) -> bytes:
    buffer = bytearray(length)
    done = os.preadv(fd, [buffer], offset, flags)
    while done < length:  # the end of a sparse file's data, or a short read
        with memoryview(buffer) as view:
            count = os.preadv(fd, [view[done:]], offset + done, flags)
        if count == 0:
            break  # beyond the end of the local file: zeros
        done += count
    return bytes(buffer)


class ContentStore:
    """All contents of one mount. Used on the loop, except where a method says that it runs in a thread.

    `reserve(count)` is asked before unsent bytes are accepted and raises NoSpace or QuotaExceeded.
    """

    def __init__(
        self, database: Database, journal: Journal, state: Path, cache: Path, reserve: Callable[[int], None]
    ) -> None:
        self._database = database
        self._journal = journal
        self._state = state / "unsent"
        self._cache = cache / "base"
        for folder in (self._state, self._cache):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for shard in range(256):
                (folder / f"{shard:02x}").mkdir(mode=0o700, exist_ok=True)
        self._reserve = reserve
        self._open: dict[int, Content] = {}
        self._idle: OrderedDict[int, Content] = OrderedDict()
        self._unsettled: dict[int, tuple[Content, Layer]] = {}
        self.unsent_bytes = 0
        self.cached_bytes = 0
        self._unsent_present: dict[int, int] = {}

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
        """Gives one `open` back. Descriptors are closed later, when they are many."""
        content.users -= 1
        if content.users == 0:
            self._idle[content.node.ino] = content
            while len(self._idle) > OPEN_FILES:
                _, oldest = self._idle.popitem(last=False)
                self._close(oldest)

    def _load(self, node: Node) -> Content:
        rows = self._database.connection.execute(
            "SELECT id, size, floor, mtime_ns, extents FROM layers WHERE ino = ? ORDER BY id", (node.ino,)
        ).fetchall()
        layers = []
        for id, size, floor, mtime_ns, packed in rows:
            unsettled = self._unsettled.get(id)
            layers.append(unsettled[1] if unsettled else Layer(id, size, floor, mtime_ns, Extents.unpack(packed)))
        base_size = (node.base_size or 0) if node.base_version is not None else 0
        content = Content(node, layers, Extents(), base_size)
        row = self._database.connection.execute(
            "SELECT version, size, extents FROM cached WHERE ino = ?", (node.ino,)
        ).fetchone()
        path = self._base_path(node.ino)
        fresh = row is not None and row[0] == node.base_version and row[1] == base_size
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        if node.base_version is not None and base_size:
            if fresh:
                try:
                    content.base_fd = os.open(path, flags & ~os.O_CREAT)
                    content.present = Extents.unpack(row[2])
                except FileNotFoundError:
                    fresh = False
            if not fresh:
                content.base_fd = os.open(path, flags | os.O_TRUNC, 0o600)
                self.cached_bytes -= sum(stop - start for start, stop in Extents.unpack(row[2])) if row else 0
        for layer in layers:
            if layer.fd < 0:
                layer.fd = os.open(self._layer_path(layer.id), flags, 0o600)
        return content

    def _close(self, content: Content) -> None:
        self.save_present(content)
        self._open.pop(content.node.ino, None)
        for layer in content.layers:
            if not layer.settled:
                self._settle(content, layer)
            os.close(layer.fd)
            layer.fd = -1
        if content.base_fd >= 0:
            os.close(content.base_fd)
            content.base_fd = -1

    # -- the base -----------------------------------------------------------------------------------------------------

    def set_base(self, content: Content, version: str | None, size: int) -> None:
        """The base is another one from now on, of which nothing is here. For a node whose content was never looked at."""
        self.drop_base(content)
        content.base_size = size
        if version is not None and size and content.base_fd < 0:
            content.base_fd = os.open(
                self._base_path(content.node.ino), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )

    def fetched(self, content: Content, start: int, stop: int) -> None:
        """Notes that [start, stop) of the base has been written to `base_fd`."""
        before = content.present.total if content.present else 0
        content.present.add(start, stop)
        self.cached_bytes += content.present.total - before
        content.fetched_unsaved = True

    def save_present(self, content: Content) -> None:
        """Puts what is present of the base into the database; losing this costs a download."""
        if not content.fetched_unsaved or content.node.base_version is None:
            return
        content.fetched_unsaved = False
        self._database.connection.execute(
            "INSERT OR REPLACE INTO cached VALUES (?, ?, ?, ?, ?)",
            (content.node.ino, content.node.base_version, content.base_size, content.present.pack(), content.used_at),
        )

    def save_all_present(self) -> None:
        """`save_present` for everything that is loaded."""
        for content in self._open.values():
            self.save_present(content)

    def drop_base(self, content: Content) -> None:
        """Gives the cached bytes of the base up."""
        self.cached_bytes -= content.present.total
        content.present.clear()
        content.fetched_unsaved = False
        self._database.connection.execute("DELETE FROM cached WHERE ino = ?", (content.node.ino,))
        if content.base_fd >= 0:
            os.ftruncate(content.base_fd, 0)

    # -- unsent bytes -------------------------------------------------------------------------------------------------

    def write(self, content: Content, offset: int, data: bytes, mtime_ns: int) -> None:
        """Takes `data` at `offset`. When it returns, the death of this process loses nothing of it.

        Raises NoSpace, QuotaExceeded or OSError, and then nothing of it counts.
        """
        stop = offset + len(data)
        layer = self._writable_layer(content, mtime_ns)
        new_bytes = len(data) if stop > layer.extents.stop else len(data) - _overlap(layer.extents, offset, stop)
        if new_bytes:
            self._reserve(new_bytes)
        written = os.pwrite(layer.fd, data, offset)
        if written != len(data):
            _scrub(layer)
            raise OSError(errno.ENOSPC, "no space for unsent bytes")
        self._journal.append(RecordKind.WRITE, layer.id, offset, len(data), mtime_ns, google_crc32c.value(data))
        layer.extents.add(offset, stop)
        layer.size = max(layer.size, stop)
        self._changed(content, layer, mtime_ns)
        self.unsent_bytes += new_bytes

    def truncate(self, content: Content, size: int, mtime_ns: int) -> None:
        """The file has `size` bytes from now on; what is uncovered later is zeros."""
        layer = self._writable_layer(content, mtime_ns)
        self._journal.append(RecordKind.TRUNCATE, layer.id, size, 0, mtime_ns)
        before = layer.extents.total
        _cut(layer, size)
        os.ftruncate(layer.fd, min(size, os.fstat(layer.fd).st_size))
        self.unsent_bytes -= before - layer.extents.total
        self._changed(content, layer, mtime_ns)

    def _changed(self, content: Content, layer: Layer, mtime_ns: int) -> None:
        layer.mtime_ns = mtime_ns
        node = content.node
        node.size, node.mtime_ns, node.ctime_ns = layer.size, mtime_ns, mtime_ns  # the journal has them
        if layer.settled:
            layer.settled = False
            self._unsettled[layer.id] = (content, layer)
        if self._journal.size > JOURNAL_LIMIT:
            self.settle()

    def _writable_layer(self, content: Content, mtime_ns: int) -> Layer:
        if content.layers and not content.layers[-1].frozen:
            return content.layers[-1]
        with self._database.transaction() as change:
            layer = self.begin_layer(change.execute, content.node.ino, content.size, mtime_ns)
            change.update(content.node, unsent=True)
        self.add_layer(content, layer)
        return layer

    def begin_layer(self, execute: Callable[..., object], ino: int, size: int, mtime_ns: int) -> Layer:
        """The row of a new layer, inside the caller's transaction; its file is made by `add_layer`."""
        cursor = execute(
            "INSERT INTO layers (ino, size, floor, mtime_ns, extents) VALUES (?, ?, NULL, ?, ?)", (ino, size, mtime_ns, b"")
        )
        return Layer(int(cursor.lastrowid), size, None, mtime_ns, Extents())  # type: ignore[attr-defined]

    def add_layer(self, content: Content, layer: Layer) -> None:
        layer.fd = os.open(
            self._layer_path(layer.id), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        content.layers.append(layer)

    def freeze(self, content: Content) -> list[Layer]:
        """A snapshot: these layers do not change until they are absorbed or thawed."""
        for layer in content.layers:
            layer.frozen = True
        return content.layers.copy()

    def thaw(self, content: Content) -> None:
        """Takes the newest layer back for writing, when its upload did not succeed."""
        if content.layers:
            content.layers[-1].frozen = False

    def absorb(self, content: Content, layers: list[Layer], *, size: int) -> None:
        """`layers` (the oldest ones) have become the base of `size` bytes; their rows are gone already.

        Runs in a thread; nobody fetches meanwhile. Readers go on reading the layers until `finish_absorb`.
        """
        if len(layers) == 1 and (not content.present or layers[0].extents.covers(0, size)):
            return  # the layer's file itself becomes the base
        if content.base_fd < 0:
            content.base_fd = os.open(
                self._base_path(content.node.ino), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
        for layer in layers:
            if layer.floor is not None:
                os.ftruncate(content.base_fd, min(layer.floor, os.fstat(content.base_fd).st_size))
            for start, stop in layer.extents:
                _copy_range(layer.fd, content.base_fd, start, stop)

    def finish_absorb(self, content: Content, layers: list[Layer], *, size: int) -> None:
        """The second half of `absorb`, on the loop: the base is what readers see now."""
        before = content.present.total
        present, base_stop = content.present.copy(), content.base_size
        for layer in layers:
            if layer.floor is not None:
                present.truncate(layer.floor)
                base_stop = min(base_stop, layer.floor)
            if layer.size > base_stop:
                present.add(base_stop, layer.size)  # data or zeros, both known
                base_stop = layer.size
            for start, stop in layer.extents:
                present.add(start, stop)
        present.truncate(size)
        path = self._base_path(content.node.ino)
        taken = -1
        if len(layers) == 1 and (not content.present or layers[0].extents.covers(0, size)):
            try:
                os.rename(self._layer_path(layers[0].id), path)
                taken = layers[0].fd
            except OSError as exc:
                if exc.errno != errno.EXDEV:
                    raise
                present = self._copy_over(content, layers[0], size)
        for layer in layers:
            content.layers.remove(layer)
            self._unsettled.pop(layer.id, None)
            self.unsent_bytes -= layer.extents.total
            if layer.fd != taken:
                os.close(layer.fd)
                self._layer_path(layer.id).unlink(missing_ok=True)
        if taken >= 0:
            if content.base_fd >= 0:
                os.close(content.base_fd)
            content.base_fd = taken
        content.base_size = size
        content.present = present
        content.fetched_unsaved = True
        content.stale = False
        self.cached_bytes += present.total - before
        if content.base_fd >= 0 and os.fstat(content.base_fd).st_size < size:
            os.ftruncate(content.base_fd, size)
        self.save_present(content)

    def _copy_over(self, content: Content, layer: Layer, size: int) -> Extents:
        """Cache and state are on different file systems: small contents are copied, large ones fetched again if needed."""
        if content.base_fd >= 0:
            os.ftruncate(content.base_fd, 0)
        else:
            content.base_fd = os.open(
                self._base_path(content.node.ino), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
        if size > 8 * COPY_STEP:
            return Extents()
        for start, stop in layer.extents:
            _copy_range(layer.fd, content.base_fd, start, stop)
        return Extents([(0, size)]) if layer.extents.covers(0, size) else layer.extents.copy()

    def discard(self, node: Node) -> None:
        """Deletes every byte kept for a node whose row is gone. Only when nobody uses it."""
        content = self._open.pop(node.ino, None)
        self._idle.pop(node.ino, None)
        if content is None:
            self._base_path(node.ino).unlink(missing_ok=True)
            return
        for layer in content.layers:
            self._unsettled.pop(layer.id, None)
            self.unsent_bytes -= layer.extents.total
            os.close(layer.fd)
            self._layer_path(layer.id).unlink(missing_ok=True)
        self.cached_bytes -= content.present.total
        if content.base_fd >= 0:
            os.close(content.base_fd)
        self._base_path(node.ino).unlink(missing_ok=True)
        content.layers.clear()

    def evict(self, node: Node) -> int:
        """Gives up the cached base of a node that nobody uses; returns the bytes freed."""
        content = self._open.get(node.ino)
        if content is not None:
            if content.users:
                return 0
            self._idle.pop(node.ino, None)
            self._close(content)
        row = self._database.connection.execute("SELECT extents FROM cached WHERE ino = ?", (node.ino,)).fetchone()
        freed = Extents.unpack(row[0]).total if row else 0
        self._database.connection.execute("DELETE FROM cached WHERE ino = ?", (node.ino,))
        self._base_path(node.ino).unlink(missing_ok=True)
        self.cached_bytes -= freed
        return freed

    # -- settling and recovery ----------------------------------------------------------------------------------------

    def settle_content(self, content: Content) -> None:
        """Puts the journal's word on one content into the database."""
        for layer in content.layers:
            if not layer.settled:
                self._settle(content, layer)

    def settle(self) -> None:
        """Puts everything the journal says into the database, makes that durable, empties the journal."""
        with self._database.transaction() as change:
            for content, layer in list(self._unsettled.values()):
                self._write_row(change.execute, content, layer)
        for _, layer in self._unsettled.values():
            layer.settled = True
        self._unsettled.clear()
        self._database.checkpoint()
        self._journal.clear()

    def _settle(self, content: Content, layer: Layer) -> None:
        with self._database.transaction() as change:
            self._write_row(change.execute, content, layer)
        layer.settled = True
        self._unsettled.pop(layer.id, None)

    def _write_row(self, execute: Callable[..., object], content: Content, layer: Layer) -> None:
        execute(
            "UPDATE layers SET size = ?, floor = ?, mtime_ns = ?, extents = ? WHERE id = ?",
            (layer.size, layer.floor, layer.mtime_ns, layer.extents.pack(), layer.id),
        )
        if content.layers and layer is content.layers[-1]:
            node = content.node
            execute(
                "UPDATE nodes SET size = ?, mtime_ns = ?, ctime_ns = ? WHERE ino = ?",
                (node.size, node.mtime_ns, node.ctime_ns, node.ino),
            )

    def recover(self, *, power_lost: bool) -> None:
        """Brings the database to what the journal says and counts what there is. Once, before anything is opened.

        `power_lost`: the machine was restarted since; bytes that were not fsynced are checked before they are believed.
        """
        layers: dict[int, Layer] = {}
        owner: dict[int, int] = {}
        for id, ino, size, floor, mtime_ns, packed in self._database.connection.execute(
            "SELECT id, ino, size, floor, mtime_ns, extents FROM layers ORDER BY id"
        ):
            layers[id] = Layer(id, size, floor, mtime_ns, Extents.unpack(packed))
            owner[id] = ino
        trusted: dict[int, int] = {}
        records = list(self._journal.records())
        for index, record in enumerate(records):
            if record.kind is RecordKind.SYNC:
                trusted[record.layer] = index
        touched: set[int] = set()
        for record in records:
            layer = layers.get(record.layer)
            if layer is None or record.kind is RecordKind.SYNC:
                continue
            touched.add(layer.id)
            layer.mtime_ns = record.mtime_ns
            if record.kind is RecordKind.TRUNCATE:
                _cut(layer, record.offset)
            else:
                layer.extents.add(record.offset, record.offset + record.length)
                layer.size = max(layer.size, record.offset + record.length)
        if power_lost:
            self._distrust(layers, [r for i, r in enumerate(records) if i > trusted.get(r.layer, -1)])
        with self._database.transaction() as change:
            for id in touched:
                layer = layers[id]
                self._scrub_file(layer)
                change.execute(
                    "UPDATE layers SET size = ?, floor = ?, mtime_ns = ?, extents = ? WHERE id = ?",
                    (layer.size, layer.floor, layer.mtime_ns, layer.extents.pack(), id),
                )
            for id in sorted(touched):  # the newest layer's word on size and mtime stands
                layer, node = layers[id], self._database.get(owner[id])
                if node is not None:
                    change.update(node, size=layer.size, mtime_ns=layer.mtime_ns, ctime_ns=layer.mtime_ns)
        self._database.checkpoint()
        self._journal.clear()
        self._delete_strays(set(layers))
        self.unsent_bytes = sum(layer.extents.total for layer in layers.values())
        self.cached_bytes = sum(
            Extents.unpack(packed).total for (packed,) in self._database.connection.execute("SELECT extents FROM cached")
        )

    def _distrust(self, layers: dict[int, Layer], records: list[object]) -> None:
        """Takes back what the journal says was written when the bytes on the disk are others."""
        from nbmountd.disk.journal import Record

        later: dict[int, Extents] = {}
        for record in reversed(records):
            assert isinstance(record, Record)
            layer = layers.get(record.layer)
            if layer is None or record.kind is not RecordKind.WRITE:
                continue
            stop = record.offset + record.length
            covered = later.setdefault(record.layer, Extents())
            whole = not covered.within(record.offset, stop)
            covered.add(record.offset, stop)
            if not whole:
                continue  # overwritten since: the later record answers for its bytes, the rest is older and likelier there
            try:
                fd = os.open(self._layer_path(layer.id), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                layer.extents.clear()
                continue
            try:
                data = os.pread(fd, record.length, record.offset)
            finally:
                os.close(fd)
            if google_crc32c.value(data) != record.checksum:
                layer.extents.remove(record.offset, stop)

    def _scrub_file(self, layer: Layer) -> None:
        try:
            layer.fd = os.open(self._layer_path(layer.id), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            _scrub(layer)
        finally:
            os.close(layer.fd)
            layer.fd = -1

    def _delete_strays(self, known: set[int]) -> None:
        for shard in self._state.iterdir():
            for path in shard.iterdir():
                if path.name.isdigit() and int(path.name) not in known:
                    path.unlink()

    # -- durability ---------------------------------------------------------------------------------------------------

    def sync_data(self, content: Content) -> Callable[[], None]:
        """A call for a thread after which the unsent bytes and all names are on the disk; then call `data_synced`."""
        fds = [os.dup(layer.fd) for layer in content.layers if layer.fd >= 0]  # an upload may end and close ours meanwhile

        def sync() -> None:
            try:
                for fd in fds:
                    os.fdatasync(fd)
                os.fdatasync(self._database.sync_fd)
            finally:
                for fd in fds:
                    os.close(fd)

        return sync

    def data_synced(self, layers: list[tuple[int, int]]) -> int:
        """Notes that the bytes of these (layer, mtime_ns) are on the disk; returns the journal's descriptor to fsync."""
        for id, mtime_ns in layers:
            self._journal.append(RecordKind.SYNC, id, 0, 0, mtime_ns)
        return self._journal.sync_fd

    def read_later(
        self, content: Content, start: int, size: int, layers: list[Layer] | None = None
    ) -> Callable[[], bytes]:
        """A call for a thread that reads like `Content.read`, with descriptors of its own. Must be called once."""
        parts = [
            (segment.stop - segment.start, None if segment.fd is None else os.dup(segment.fd), segment.start)
            for segment in content.segments(start, start + size, layers)
        ]

        def read() -> bytes:
            try:
                return b"".join(bytes(n) if fd is None else _pread(fd, n, at, 0) for n, fd, at in parts)
            finally:
                for _, fd, _ in parts:
                    if fd is not None:
                        os.close(fd)

        return read

    def close(self) -> None:
        """Settles and closes everything."""
        for content in list(self._open.values()):
            self.save_present(content)
        self.settle()
        for content in list(self._open.values()):
            self._close(content)
        self._idle.clear()

    def _layer_path(self, id: int) -> Path:
        return self._state / f"{id % 256:02x}" / str(id)

    def _base_path(self, ino: int) -> Path:
        return self._cache / f"{ino % 256:02x}" / str(ino)


def _overlap(extents: Extents, start: int, stop: int) -> int:
    return sum(end - begin for begin, end in extents.within(start, stop))


def _cut(layer: Layer, size: int) -> None:
    if size < layer.size:
        layer.extents.truncate(size)
        layer.floor = size if layer.floor is None else min(layer.floor, size)
    layer.size = size


def _scrub(layer: Layer) -> None:
    """Zeros what a write left behind that was never acknowledged, so that a hole of the layer reads as zeros."""
    os.ftruncate(layer.fd, min(layer.extents.stop, os.fstat(layer.fd).st_size))
    for start, stop in layer.extents.gaps(0, layer.extents.stop):
        while start < stop:
            try:
                start = os.lseek(layer.fd, start, os.SEEK_DATA)
            except OSError:  # ENXIO: only holes from here on
                break
            if start < stop:
                start += os.pwrite(layer.fd, bytes(min(COPY_STEP, stop - start)), start)


def _copy_range(source: int, target: int, start: int, stop: int) -> None:
    while start < stop:
        try:
            count = os.copy_file_range(source, target, min(COPY_STEP, stop - start), start, start)
        except OSError as exc:
            if exc.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            count = os.pwrite(target, os.pread(source, min(COPY_STEP, stop - start), start), start)
        if count == 0:
            os.pwrite(target, bytes(min(COPY_STEP, stop - start)), start)  # beyond the source's end: zeros
            count = min(COPY_STEP, stop - start)
        start += count
