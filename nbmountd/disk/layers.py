"""The bytes of one file as readers see them: one sparse file of the base version, and layers of unsent bytes above it.

It knows extents and descriptors, no database and no remote; who makes, moves and deletes layers is content.py.

    layer 1      ······WWWW··········      newest unsent bytes; written to
    layer 0      WW····WWWWWWWW······|     frozen while an upload sends it; `|` is its floor
    base         BBBB····BBBB····BBBBBBBB  what was fetched of the base version (cache, may be deleted)

A reader sees, for each byte, the topmost layer that has it; the base shows through only below every floor. A layer's
floor is the smallest size that the file had since the layer began: what a truncation cut off stays cut off, and what a
later extension uncovers is zeros. So a snapshot for an upload costs nothing (the next write begins a new layer), a small
write into a large file needs no download, and clean bytes (cache directory) and unsent bytes (state directory) are in
different places.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from nbmountd.disk.database import Node
from nbmountd.disk.extents import Extents

LOST: Final = -1
"""In the place of a descriptor: bytes that were accepted and that the local disk no longer has. Reading them is EIO."""


class Layer:
    """Unsent bytes of one file in a sparse file of their own."""

    __slots__ = ("extents", "fd", "floor", "frozen", "id", "lost", "mtime_ns", "sequence", "size", "sync_failed")

    def __init__(self, id: int, size: int, floor: int | None, mtime_ns: int, extents: Extents) -> None:
        self.id = id
        self.size = size
        """The size that the file has with this layer."""
        self.floor = floor
        self.mtime_ns = mtime_ns
        self.extents = extents
        self.fd = LOST
        self.frozen = False
        self.lost: Extents | None = None
        """The part of `extents` that the disk does not have any more (damage, never the normal course)."""
        self.sequence = -1
        """Of the newest journal record that the database does not know; -1 if it knows all."""
        self.sync_failed = False
        """An fsync failed once: the kernel may have dropped those pages, so no later one may claim success."""

    def extend(self, offset: int, stop: int) -> None:
        """Bytes were written to [offset, stop)."""
        self.extents.add(offset, stop)
        self.size = max(self.size, stop)

    def resize(self, size: int) -> None:
        """The file has `size` bytes now; what is cut off stays cut off."""
        if size < self.size:
            self.extents.truncate(size)
            self.floor = size if self.floor is None else min(self.floor, size)
        self.size = size


@dataclass(frozen=True, slots=True)
class Segment:
    """Where the bytes [start, stop) of a file are: a layer's or the base's descriptor (or LOST), nowhere (a hole: zeros), or
    missing: not here, or here and not verified yet."""

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
    """Of the base: what is in its file."""
    base_size: int
    base_fd: int = -1
    """-1 while nothing of the base is here."""
    users: int = 0
    stale: bool = False
    """The remote no longer has the base version: what is missing can never be fetched."""
    fetched_unsaved: bool = False
    """The database does not know all of `present`."""
    used_at: float = 0.0
    """Seconds since 1970."""
    unverified: Extents = field(default_factory=Extents)
    """The part of `present` that was written by an earlier process and not yet compared with its checksums."""
    sums: dict[int, int] = field(default_factory=dict)
    """CRC32C of the present bytes of a block of the base (cache.py); a block without one is summed when saved."""
    unsummed: set[int] = field(default_factory=set)
    generation: int = 0
    """Moves when the base becomes another file: what was on its way into the old one no longer counts."""
    absorbing: bool = False
    """Its base file is between two versions: nothing of it may be saved."""
    saved_bytes: int = 0
    """What the database counts for the base."""

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
        stop = min(stop, layers[-1].size if layers else self.base_size)
        if start >= stop:
            return []
        found: list[Segment] = []
        wanted = [(start, stop)]
        for layer in reversed(layers):
            below: list[tuple[int, int]] = []
            for first, last in wanted:
                found += _of_layer(layer, first, last)
                for begin, end in layer.extents.gaps(first, last):
                    if layer.floor is not None and end > layer.floor:  # above the floor nothing below shows through
                        found.append(Segment(max(begin, layer.floor), end, None))
                        end = layer.floor
                    if begin < end:
                        below.append((begin, end))
            wanted = below
        for first, last in wanted:
            found += self._of_base(first, last)
        found.sort(key=lambda segment: segment.start)
        return found

    def _of_base(self, start: int, stop: int) -> Iterator[Segment]:
        end = min(stop, self.base_size)
        for begin, finish in self.present.within(start, end):
            for first, last in self.unverified.within(begin, finish):
                yield Segment(first, last, None, missing=True)
            for first, last in self.unverified.gaps(begin, finish):
                yield Segment(first, last, self.base_fd)
        for begin, finish in self.present.gaps(start, end):
            yield Segment(begin, finish, None, missing=True)
        if end < stop:
            yield Segment(max(start, end), stop, None)

    def missing(self, start: int, stop: int, layers: list[Layer] | None = None) -> list[tuple[int, int]]:
        """The ranges of [start, stop) that must be verified or fetched before they can be read."""
        if not (self.layers if layers is None else layers) and not self.unverified:
            return self.present.gaps(start, min(stop, self.base_size))
        return [(segment.start, segment.stop) for segment in self.segments(start, stop, layers) if segment.missing]

    def read(self, start: int, size: int, layers: list[Layer] | None = None) -> bytes:
        """The bytes [start, start+size), short at the end of the file. Nothing of it may be missing.

        Raises OSError (EIO) for what the local disk has lost.
        """
        stop = min(start + size, (layers[-1].size if layers else self.base_size) if layers is not None else self.size)
        if start >= stop:
            return b""
        fd = self._single_source(start, stop) if layers is None else None
        if fd is not None:
            return pread(fd, stop - start, start)
        return b"".join(
            bytes(segment.stop - segment.start)
            if segment.fd is None
            else pread(segment.fd, segment.stop - segment.start, segment.start)
            for segment in self.readable(start, stop, layers)
        )

    def read_now(self, into: memoryview, start: int, size: int) -> memoryview:
        """Like `read`, into the beginning of `into` (at least `size` bytes), of which that part is returned.

        Raises BlockingIOError when the disk would have to be waited for, OSError (EOPNOTSUPP) where it cannot tell.
        """
        stop = min(start + size, self.size)
        if start >= stop:
            return into[:0]
        fd = self._single_source(start, stop)
        if fd is not None:
            _fill(into[: stop - start], fd, start)
            return into[: stop - start]
        for segment in self.readable(start, stop):
            part = into[segment.start - start : segment.stop - start]
            if segment.fd is None:
                part[:] = bytes(len(part))
            else:
                _fill(part, segment.fd, segment.start)
        return into[: stop - start]

    def readable(self, start: int, stop: int, layers: list[Layer] | None = None) -> list[Segment]:
        """The segments of [start, stop). Raises ValueError if something is missing: it must not be taken for zeros."""
        segments = self.segments(start, stop, layers)
        for segment in segments:
            if segment.missing:
                raise ValueError(f"bytes {segment.start}-{segment.stop} are not here")
        return segments

    def _single_source(self, start: int, stop: int) -> int | None:
        if not self.layers:
            return self.base_fd if self.present.covers(start, stop) and not self.unverified else None
        top = self.layers[-1]
        return top.fd if top.extents.covers(start, stop) and top.lost is None else None

    def data_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Ranges that are data here or on the remote; what is left out is a hole."""
        for segment in self.segments(start, stop):
            if segment.fd is not None or segment.missing:
                yield segment.start, segment.stop


def _of_layer(layer: Layer, start: int, stop: int) -> Iterator[Segment]:
    for begin, end in layer.extents.within(start, stop):
        if layer.lost is None:
            yield Segment(begin, end, layer.fd)
            continue
        for first, last in layer.lost.within(begin, end):
            yield Segment(first, last, LOST)
        for first, last in layer.lost.gaps(begin, end):
            yield Segment(first, last, layer.fd)


def pread(fd: int, length: int, offset: int) -> bytes:
    """Exactly `length` bytes. Raises OSError (EIO) when the file is shorter: those bytes were there and are lost."""
    data = b"" if fd == LOST else os.pread(fd, length, offset)
    while len(data) < length:
        more = b"" if fd == LOST else os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise OSError(errno.EIO, "the local disk has lost these bytes")
        data += more
    return data


def _fill(view: memoryview, fd: int, offset: int) -> None:
    """As `pread`, without waiting for the disk: raises BlockingIOError instead. Into a buffer that is there already: a new one
    of 1 MiB costs more in page faults than the bytes do (measured: a quarter of the processor time of a read)."""
    done = 0
    while done < len(view):
        count = 0 if fd == LOST else os.preadv(fd, [view[done:]], offset + done, os.RWF_NOWAIT)
        if not count:
            raise OSError(errno.EIO, "the local disk has lost these bytes")
        done += count
