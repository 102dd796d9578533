"""An append-only log of writes and truncations of layers, so that `write` needs no SQLite transaction.

It knows no bytes of files and no database. A record is appended after the bytes are in the layer's file and before the
program gets its answer; a process that dies in between leaves bytes that no record mentions, so a hole is never taken for
data. Each record has a number, its sequence. The journal is a chain of files `journal.<sequence of the first record>`: to
let go of the oldest records a new file is begun (`rotate`), what the older ones say is made durable elsewhere, and they are
deleted (`retire`). Replaying records that the database knows already changes nothing: a layer's records lead to the same
extents from any of its own later states.

A torn record at the end of a file is where a process or the machine died in `append`, and is left out. An unreadable record
in the middle is damage: it is reported as None, and what stands behind it is read all the same.
"""

from __future__ import annotations

import enum
import errno
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_RECORD = struct.Struct("<IB3xQQQqI4x")  # crc32 of the rest, kind, layer, offset, length, mtime_ns, crc32c of the bytes


class RecordKind(enum.IntEnum):
    """What happened to a layer. Stored: numbers never change."""

    WRITE = 1
    TRUNCATE = 2
    """`offset` is the new size."""
    SYNC = 3
    """What the records of the layer with sequences below `offset` say is on the disk, bytes and all."""
    TOUCH = 4
    """Only `mtime_ns` moved."""


_KINDS = {int(kind): kind for kind in RecordKind}


class Record(NamedTuple):
    kind: RecordKind
    layer: int
    offset: int
    length: int
    mtime_ns: int
    checksum: int

    @property
    def stop(self) -> int:
        return self.offset + self.length


class Journal:
    """The open journal of one mount. Appended to on the loop only. Closed with `close`."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the chain of files whose names begin with `path`. Raises OSError."""
        self._path = path
        self._starts = sorted(
            int(other.suffix[1:]) for other in path.parent.glob(f"{path.name}.*") if other.suffix[1:].isdigit()
        )
        self._older = sum(self._file(start).stat().st_size for start in self._starts[:-1])
        if not self._starts:
            self._starts = [0]
        self._fd = self._open(self._starts[-1])
        self._end = os.fstat(self._fd).st_size
        if self._end % _RECORD.size:  # torn: never written behind, so that the place of a record tells its sequence
            os.ftruncate(self._fd, self._end - self._end % _RECORD.size)
            self._end -= self._end % _RECORD.size

    @property
    def size(self) -> int:
        """Bytes in all files; what a restart has to read."""
        return self._older + self._end

    @property
    def next_sequence(self) -> int:
        """The sequence of the record that is appended next."""
        return self._starts[-1] + self._end // _RECORD.size

    def append(self, kind: RecordKind, layer: int, offset: int, length: int, mtime_ns: int, checksum: int = 0) -> int:
        """Writes one record and returns its sequence. Raises OSError with nothing recorded."""
        record = bytearray(_RECORD.pack(0, kind, layer, offset, length, mtime_ns, checksum))
        struct.pack_into("<I", record, 0, zlib.crc32(memoryview(record)[4:]))
        # At an offset instead of O_APPEND: what a full disk cut is overwritten by the next record, and hides none.
        if os.pwrite(self._fd, record, self._end) != len(record):
            raise OSError(errno.ENOSPC, "no space for the journal")
        sequence = self.next_sequence
        self._end += len(record)
        return sequence

    def records(self) -> Iterator[tuple[int, Record | None]]:
        """Every record with its sequence, oldest first; None for one that cannot be read."""
        for start in self._starts:
            yield from enumerate(_decode(self._file(start).read_bytes()), start)

    def rotate(self) -> int:
        """Begins a new file; returns the sequence of its first record. Raises OSError, and then nothing has changed."""
        if not self._end:
            return self._starts[-1]
        start = self.next_sequence
        fd = self._open(start)
        os.close(self._fd)
        self._older += self._end
        self._fd, self._end = fd, 0
        self._starts.append(start)
        return start

    def skip_to(self, sequence: int) -> None:
        """Sees to it that the next record has at least this sequence. Raises OSError."""
        if self.next_sequence < sequence:
            fd = self._open(sequence)
            os.close(self._fd)
            self._older += self._end
            self._fd, self._end = fd, 0
            self._starts.append(sequence)

    def retire(self) -> None:
        """Deletes all files but the newest. Only after everything they say is durable elsewhere."""
        for start in self._starts[:-1]:
            self._file(start).unlink(missing_ok=True)
        del self._starts[:-1]
        self._older = 0

    def sync(self) -> None:
        """Returns when every record is on the disk, and the names of the files. In a thread. Raises OSError."""
        for start in list(self._starts):
            try:
                fd = os.open(self._file(start), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # retired meanwhile
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
        sync_directory(self._path.parent)

    def close(self) -> None:
        os.close(self._fd)

    def _file(self, start: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{start}")

    def _open(self, start: int) -> int:
        return os.open(self._file(start), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _decode(raw: bytes) -> Iterator[Record | None]:
    """Each whole record. A start waits for this, and there may be tens of thousands."""
    whole = memoryview(raw)[: len(raw) - len(raw) % _RECORD.size]
    at = 4
    for crc, kind, *values in _RECORD.iter_unpack(whole):
        known = _KINDS.get(kind)
        sound = known is not None and crc == zlib.crc32(whole[at : at + _RECORD.size - 4])
        yield Record(known, *values) if known is not None and sound else None
        at += _RECORD.size


def sync_directory(path: Path) -> None:
    """Returns when the names in a directory are on the disk. In a thread. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
