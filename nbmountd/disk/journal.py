"""An append-only log of writes and truncations of layers, so that `write` needs no SQLite transaction.

A record is appended after the bytes are in the layer's file and before the program gets its answer; a process that dies
in between leaves bytes that no record mentions, so a hole is never taken for data. Extents move into the database when a
layer is settled; the journal is emptied once the database is durable. Replaying records that the database knows already
changes nothing: a layer's whole sequence leads to the same extents from any of its own later states.

After loss of power a record may be on the disk without its bytes: then (and only then) records after the layer's last
SYNC are believed only if the bytes still have their checksum.
"""

from __future__ import annotations

import enum
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_RECORD = struct.Struct("<IB3xQQQqI4x")  # crc32 of the rest, kind, layer, offset, length, mtime_ns, crc32c of the bytes


class RecordKind(enum.IntEnum):
    WRITE = 1
    TRUNCATE = 2
    """`offset` is the new size."""
    SYNC = 3
    """All earlier bytes of the layer are on the disk."""


@dataclass(frozen=True)
class Record:
    kind: RecordKind
    layer: int
    offset: int
    length: int
    mtime_ns: int
    checksum: int


class Journal:
    """The open journal of one mount. Closed with `close`."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._fd).st_size

    @property
    def size(self) -> int:
        """Bytes in the file; what a restart has to read."""
        return self._size

    @property
    def sync_fd(self) -> int:
        return self._fd

    def append(self, kind: RecordKind, layer: int, offset: int, length: int, mtime_ns: int, checksum: int = 0) -> None:
        """Writes one record. Raises OSError (ENOSPC) with nothing recorded."""
        record = bytearray(_RECORD.pack(0, kind, layer, offset, length, mtime_ns, checksum))
        struct.pack_into("<I", record, 0, zlib.crc32(memoryview(record)[4:]))
        written = os.write(self._fd, record)
        if written != len(record):  # a full disk can cut it; the torn tail must not hide later records
            os.ftruncate(self._fd, self._size)
            raise OSError(28, "no space for the journal")
        self._size += written

    def records(self) -> Iterator[Record]:
        """Every whole record from the start; stops at the first torn one (the end of what was written before a crash)."""
        offset = 0
        while True:
            chunk = os.pread(self._fd, _RECORD.size * 4096, offset)
            for at in range(0, len(chunk) - _RECORD.size + 1, _RECORD.size):
                raw = chunk[at : at + _RECORD.size]
                crc, kind, layer, start, length, mtime_ns, checksum = _RECORD.unpack(raw)
                if crc != zlib.crc32(raw[4:]) or kind not in RecordKind.__members__.values():
                    return
                yield Record(RecordKind(kind), layer, start, length, mtime_ns, checksum)
            if len(chunk) < _RECORD.size:
                return
            offset += len(chunk) - len(chunk) % _RECORD.size

    def clear(self) -> None:
        """Empties it. Only after everything it says is durable in the database."""
        os.ftruncate(self._fd, 0)
        self._size = 0

    def close(self) -> None:
        os.close(self._fd)
