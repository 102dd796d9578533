"""The cached bytes of base versions: what is here of each, with checksums, kept over restarts.

It knows no layers and no remote. Everything here can be fetched again, so an error costs a download and never stops a
program; but bytes that are called present must be right. So each block of a base has a checksum in the database, and what an
earlier process left is compared with it before its first use (`Content.unverified`): whatever the disk forgot in a loss of
power, or somebody changed, is fetched again.
"""

from __future__ import annotations

import os
import sqlite3
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import google_crc32c

from nbmountd.disk.database import Database, Node
from nbmountd.disk.extents import Extents
from nbmountd.disk.layers import Content, pread
from nbmountd.log import get_logger

BLOCK: Final = 128 * 2**10
"""Bytes that share a checksum. Its sum is that of the block's present bytes, in order."""

_SUM = struct.Struct("<QI")
_log = get_logger(__name__)


class Summing:
    """Checksums of the whole blocks in a run of bytes that comes in order, from `start`, of a file of `size` bytes."""

    def __init__(self, start: int, size: int) -> None:
        self._at = start
        self._size = size
        self._sum: int | None = 0 if start % BLOCK == 0 else None  # None: this block's beginning was not seen
        self.done: list[tuple[int, int]] = []
        """(block, checksum) of each block that has passed whole."""

    def feed(self, piece: memoryview) -> None:
        while len(piece):
            block_stop = min(self._at - self._at % BLOCK + BLOCK, self._size)
            part = piece[: max(block_stop - self._at, 1)]
            if self._sum is not None:
                self._sum = google_crc32c.extend(self._sum, bytes(part))
            self._at += len(part)
            if self._at >= block_stop:
                if self._sum is not None:
                    self.done.append(((self._at - 1) // BLOCK, self._sum))
                self._sum = 0
            piece = piece[len(part) :]


class Fill:
    """Bytes of the base on their way here: written in a thread, counted on the loop. Closed with `close`.

    It has a descriptor of its own. If the base becomes another file meanwhile (`Content.generation`), nothing counts.
    """

    def __init__(self, cache: BaseCache, content: Content, start: int) -> None:
        self._cache = cache
        self._content = content
        self._generation = content.generation
        self._fd = os.dup(content.base_fd)
        self._noted = start
        self._summing = Summing(start, content.base_size)
        self.at = start
        """Where the next piece goes: everything before it is written. May be read in any thread."""

    def write(self, piece: memoryview) -> None:
        """Takes the next bytes. In a thread, one at a time. Raises OSError."""
        if self._generation != self._content.generation:
            self.at += len(piece)  # of a version that is not wanted any more; its file may be the next one's
            return
        done = 0
        while done < len(piece):
            done += os.pwrite(self._fd, piece[done:], self.at + done)
        self._summing.feed(piece)
        self.at += len(piece)

    def note(self) -> None:
        """What was written so far is there for readers. On the loop."""
        start, stop = self._noted, self.at
        self._noted = stop
        done = self._summing.done[:]
        del self._summing.done[: len(done)]
        if self._generation == self._content.generation:
            self._cache.filled(self._content, start, stop, done)

    def close(self) -> None:
        os.close(self._fd)


class BaseCache:
    """The bases of one mount. Used on the loop, except where a method says that it runs in a thread."""

    def __init__(self, database: Database, directory: Path) -> None:
        self._database = database
        self._directory = directory
        self.bytes = 0
        """Cached bytes of all bases, loaded or not."""

    def recount(self) -> None:
        """Counts what the database says. Before anything is loaded."""
        (self.bytes,) = self._database.connection.execute("SELECT coalesce(sum(bytes), 0) FROM cached").fetchone()

    def path(self, ino: int) -> Path:
        return self._directory / f"{ino % 256:02x}" / str(ino)

    # -- loading and saving -------------------------------------------------------------------------------------------

    def load(self, node: Node) -> Content:
        """A content without layers, with what is here of its base. Nothing is opened that is not here."""
        base_size = (node.base_size or 0) if node.base_version is not None else 0
        content = Content(node, [], Extents(), base_size, used_at=time.time())
        row = self._database.connection.execute(
            "SELECT version, size, bytes, extents, sums FROM cached WHERE ino = ?", (node.ino,)
        ).fetchone()
        if row is None:
            return content
        version, size, count, extents, sums = row
        content.saved_bytes = count
        if (version, size) == (node.base_version, base_size) and self._open_saved(content, extents, sums):
            self.bytes += content.present.total - count
        else:
            self.bytes -= count
            self._forget(content)
        return content

    def _open_saved(self, content: Content, extents: bytes, sums: bytes) -> bool:
        try:
            present = Extents.unpack(extents)
            content.sums = dict(_SUM.iter_unpack(sums))
            content.base_fd = os.open(self.path(content.node.ino), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (FileNotFoundError, ValueError, struct.error):
            content.sums = {}
            return False
        present.truncate(min(os.fstat(content.base_fd).st_size, content.base_size))
        content.present = present
        content.unverified = present.copy()
        return True

    def _forget(self, content: Content) -> None:
        """Deletes the row; an error costs nothing, as a row that does not fit is not believed."""
        try:
            self._database.connection.execute("DELETE FROM cached WHERE ino = ?", (content.node.ino,))
            content.saved_bytes = 0
        except sqlite3.OperationalError as exc:
            _log.debug("cannot forget a cached file", inode=content.node.ino, cause=exc)

    def save(self, contents: Iterable[Content]) -> None:
        """Puts what is present into the database, in one transaction; what cannot be saved is tried again later."""
        unsaved = [
            content for content in contents
            if content.fetched_unsaved and not content.absorbing and content.node.base_version is not None
        ]  # fmt: skip
        if not unsaved:
            return
        try:
            for content in unsaved:
                self._sum(content)
            with self._database.transaction() as change:
                for content in unsaved:
                    change.execute(
                        "INSERT OR REPLACE INTO cached (ino, version, size, bytes, extents, sums, used_at)"
                        " VALUES (?, ?, ?, ?, ?, ?, ?)",
                        (
                            content.node.ino, content.node.base_version, content.base_size, content.present.total,
                            content.present.pack(), b"".join(_SUM.pack(*pair) for pair in sorted(content.sums.items())),
                            content.used_at,
                        ),
                    )  # fmt: skip
        except sqlite3.OperationalError as exc:
            _log.debug("cannot save what is cached", cause=exc)
            return
        for content in unsaved:
            content.fetched_unsaved = False
            content.saved_bytes = content.present.total

    def _sum(self, content: Content) -> None:
        """Sums the blocks that came in parts; they are few, or small, and were read just now."""
        for block in list(content.unsummed):
            try:
                checksum = block_sum(content.base_fd, content.present, block)
            except OSError:  # the file is shorter than it was, or unreadable
                self._lose(content, block * BLOCK, (block + 1) * BLOCK)
                checksum = None
            if checksum is None:
                content.sums.pop(block, None)
            else:
                content.sums[block] = checksum
            content.unsummed.discard(block)

    def unload(self, content: Content) -> None:
        """Saves and closes. The content is not used any more."""
        self.save([content])
        self.bytes += content.saved_bytes - content.present.total
        self._close(content)

    def _close(self, content: Content) -> None:
        content.generation += 1
        if content.base_fd >= 0:
            os.close(content.base_fd)
            content.base_fd = -1

    def used(self, content: Content) -> None:
        """Somebody has just used it: it is among the last to be evicted."""
        now = time.time()
        if now - content.used_at > 60 and content.present:
            content.fetched_unsaved = True
        content.used_at = now

    # -- filling ------------------------------------------------------------------------------------------------------

    def fill(self, content: Content, start: int) -> Fill:
        """A way for bytes of the base from `start` on. Raises OSError when the cache cannot be written."""
        if content.base_fd < 0:
            content.base_fd = open_base(self.path(content.node.ino))
        return Fill(self, content, start)

    def filled(self, content: Content, start: int, stop: int, sums: list[tuple[int, int]]) -> None:
        """[start, stop) is here, and these blocks of it have these checksums."""
        if start < stop:
            first, last = start - start % BLOCK, stop + -stop % BLOCK
            for begin, end in content.unverified.within(first, last):
                self._lose(content, begin, end)  # a block is verified whole or not at all
            before = len_in(content.present, start, stop)
            content.present.add(start, stop)
            self.bytes += stop - start - before
            content.unsummed.update(range(start // BLOCK, last // BLOCK))
            content.fetched_unsaved = True
        for block, checksum in sums:
            content.sums[block] = checksum
            content.unsummed.discard(block)

    def _lose(self, content: Content, start: int, stop: int) -> None:
        """[start, stop) of the base is not here any more."""
        self.bytes -= len_in(content.present, start, stop)
        content.present.remove(start, stop)
        content.unverified.remove(start, stop)
        content.unsummed.update(range(start // BLOCK, -(-stop // BLOCK)))
        content.fetched_unsaved = True

    # -- verifying ----------------------------------------------------------------------------------------------------

    def verify_later(self, content: Content, ranges: Iterable[tuple[int, int]]) -> Callable[[], list[tuple[int, bool]]] | None:
        """A call for a thread that compares the blocks of these ranges with their checksums; its result is for `verified`.
        None when there is nothing to verify. Must be called once. Raises OSError."""
        blocks: set[int] = set()
        for start, stop in ranges:
            for begin, end in content.unverified.within(start, stop):
                blocks.update(range(begin // BLOCK, -(-end // BLOCK)))
        if not blocks:
            return None
        ordered = sorted(blocks)
        unverified = Extents()
        for block in ordered:
            for begin, end in content.unverified.within(block * BLOCK, (block + 1) * BLOCK):
                unverified.add(begin, end)
        sums = [content.sums.get(block) for block in ordered]
        fd = os.dup(content.base_fd)

        def verify() -> list[tuple[int, bool]]:
            try:
                return [
                    (block, expected is not None and _block_sum_or_none(fd, unverified, block) == expected)
                    for block, expected in zip(ordered, sums, strict=True)
                ]
            finally:
                os.close(fd)

        return verify

    def verified(self, content: Content, results: Iterable[tuple[int, bool]], generation: int) -> None:
        """Takes the results of `verify_later`, asked for when the content had this generation: blocks that are not what
        they were are not here any more."""
        if generation != content.generation:
            return
        bad = 0
        for block, good in results:
            for begin, end in content.unverified.within(block * BLOCK, (block + 1) * BLOCK):
                if good:
                    content.unverified.remove(begin, end)
                else:
                    bad += end - begin
                    self._lose(content, begin, end)
        if bad:
            _log.warning("cached bytes were not what was fetched; they are fetched again", inode=content.node.ino, bytes=bad)

    # -- giving up ----------------------------------------------------------------------------------------------------

    def drop(self, content: Content) -> None:
        """Gives up what is here of a loaded content's base, and its file."""
        self.bytes -= content.present.total
        content.present, content.unverified = Extents(), Extents()
        content.sums, content.unsummed = {}, set()
        content.fetched_unsaved = False
        self._close(content)
        self._unlink(content.node.ino)
        self._forget(content)

    def evict(self, node: Node) -> int:
        """Gives up what is here of a node that is not loaded; returns the bytes freed."""
        row = self._database.connection.execute("SELECT bytes FROM cached WHERE ino = ?", (node.ino,)).fetchone()
        if row is None:
            return 0
        try:
            self._database.connection.execute("DELETE FROM cached WHERE ino = ?", (node.ino,))
        except sqlite3.OperationalError as exc:
            _log.debug("cannot evict", inode=node.ino, cause=exc)
            return 0
        self._unlink(node.ino)
        self.bytes -= row[0]
        return int(row[0])

    def _unlink(self, ino: int) -> None:
        try:
            self.path(ino).unlink(missing_ok=True)
        except OSError as exc:
            _log.debug("cannot delete a cached file", inode=ino, cause=exc)


def open_base(path: Path) -> int:
    """The file for a base's bytes. Not emptied: what is not present is not read, and an absorption may just have made it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o600)
    except FileNotFoundError:  # the cache may be deleted by anybody at any time
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, flags, 0o600)


def open_new(path: Path, made: Callable[[Path], None] = lambda directory: None) -> int:
    """An empty file for reading and writing, also where its directory is not there yet. `made` is told of a directory in
    which a name is new. Raises OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags, 0o600)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        made(path.parent.parent)
        fd = os.open(path, flags, 0o600)
    made(path.parent)
    return fd


def len_in(extents: Extents, start: int, stop: int) -> int:
    """How many bytes of [start, stop) are in."""
    return sum(end - begin for begin, end in extents.within(start, stop))


def block_sum(fd: int, present: Extents, block: int) -> int | None:
    """The checksum of a block as it is on the disk; None when nothing of it is present. Raises OSError."""
    checksum = None
    for begin, end in present.within(block * BLOCK, (block + 1) * BLOCK):
        checksum = google_crc32c.extend(checksum or 0, pread(fd, end - begin, begin))
    return checksum


def _block_sum_or_none(fd: int, present: Extents, block: int) -> int | None:
    try:
        return block_sum(fd, present, block)
    except OSError:
        return None  # shorter than it was, or unreadable: not what it was
