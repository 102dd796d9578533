"""Makes the cached base of layers whose upload has been confirmed, so that what was sent need not be fetched.

It knows files and extents, no database: content.py begins and finishes it. The layers' rows are deleted before, and readers
go on reading the layers until `apply`; so whatever goes wrong here costs a download and nothing else.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from nbmountd.disk.cache import BLOCK, block_sum, open_base, open_new
from nbmountd.disk.extents import Extents
from nbmountd.disk.layers import LOST, Content, Layer

COPY_STEP: Final = 4 * 2**20
COPIED_ACROSS: Final = 32 * 2**20
"""Where cache and state are on different file systems, larger contents are not copied but fetched again when needed."""
ZEROS_KEPT: Final = 64 * 2**20
"""A longer run of zeros that no program wrote (an extended file) is not counted as cached."""


class Absorption:
    """One content's layers on their way into its base. Made on the loop by `ContentStore.begin_absorb`."""

    def __init__(
        self,
        content: Content,
        layers: list[Layer],
        size: int,
        path: Path,
        layer_path: Callable[[int], Path],
        make_durable: Callable[[], None],
    ) -> None:
        """`make_durable` returns when the deletion of the layers' rows is: before that their files must not change."""
        self.content = content
        self.layers = layers
        self.size = size
        self.failure: OSError | None = None
        self._path = path
        self._layer_path = layer_path
        self._make_durable = make_durable
        covered = len(layers) == 1 and layers[0].extents.covers(0, size)
        self._takes = len(layers) == 1 and (covered or not content.present)
        self._fd = LOST
        self._old_stop = content.base_size
        self._present = Extents() if self._takes else content.present.copy()
        self._unverified = Extents() if self._takes else content.unverified.copy()
        self._sums = {} if self._takes else content.sums.copy()
        self._unsummed = set() if self._takes else content.unsummed.copy()
        self._count()
        try:
            if any(layer.lost is not None for layer in layers):
                raise OSError(errno.EIO, "the local disk has lost some of its bytes")
            if not self._takes and content.base_fd != LOST:
                self._fd = os.dup(content.base_fd)
        except OSError as exc:
            self.failure = exc

    def _count(self) -> None:
        """What will be present, and which blocks get new checksums."""
        changed, stop = Extents(), self._old_stop
        for layer in self.layers:
            if layer.floor is not None:
                changed.add(min(stop, layer.floor), stop)
                self._present.truncate(layer.floor)
                self._unverified.truncate(layer.floor)
                stop = min(stop, layer.floor)
            if stop < layer.size <= stop + ZEROS_KEPT:
                self._present.add(stop, layer.size)  # zeros, or data of this layer
                changed.add(stop, layer.size)
            stop = layer.size
            for begin, end in layer.extents:
                self._present.add(begin, end)
                changed.add(begin, end)
        self._present.truncate(self.size)
        self._unverified.truncate(self.size)
        edge = -(-self.size // BLOCK) * BLOCK  # a block of which only the end went has another checksum too
        self._changed: set[int] = set()
        for begin, end in changed.within(0, edge):
            first, last = begin // BLOCK, -(-end // BLOCK)
            for start, finish in self._unverified.within(first * BLOCK, last * BLOCK):
                for inside, outside in changed.gaps(start, finish):  # a block is verified whole or not at all
                    self._present.remove(inside, outside)
            self._unverified.remove(first * BLOCK, last * BLOCK)
            self._changed.update(
                block for start, finish in self._present.within(first * BLOCK, last * BLOCK)
                for block in range(start // BLOCK, -(-finish // BLOCK))
            )  # fmt: skip

    def copy(self) -> None:
        """Does it, in a thread. Raises nothing: see `failure`."""
        if self.failure is not None:
            return
        try:
            self._make_durable()
            if self._takes:
                self._take()
            else:
                self._merge()
            for block in self._changed:
                checksum = block_sum(self._fd, self._present, block)
                if checksum is not None:
                    self._sums[block] = checksum
        except OSError as exc:
            self.failure = exc

    def _take(self) -> None:
        """The layer's own file becomes the base."""
        (layer,) = self.layers
        _zero_holes(layer)
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            os.rename(self._layer_path(layer.id), self._path)
            self._fd = os.dup(layer.fd)
            os.ftruncate(self._fd, self.size)
        except OSError as exc:
            if exc.errno != errno.EXDEV or layer.extents.total > COPIED_ACROSS:
                raise
            arriving = self._path.with_suffix(".new")  # readers may have the old one
            self._fd = open_new(arriving)
            self._write(layer, 0)
            os.rename(arriving, self._path)

    def _merge(self) -> None:
        if self._fd == LOST:
            self._fd = open_base(self._path)
        stop = self._old_stop
        for layer in self.layers:
            stop = self._write(layer, stop)

    def _write(self, layer: Layer, stop: int) -> int:
        """Puts a layer over a base that ends at `stop`; returns where it ends then."""
        if layer.floor is not None:
            stop = min(stop, layer.floor)
        if os.fstat(self._fd).st_size > stop:
            os.ftruncate(self._fd, stop)  # readers see nothing of the base behind any floor
        for begin, end in layer.extents:
            _copy_range(layer.fd, self._fd, begin, end)
        os.ftruncate(self._fd, layer.size)
        return layer.size

    def apply(self) -> None:
        """On the loop, after `copy` without a failure: readers see the new base. The layers are the caller's."""
        content = self.content
        content.generation += 1
        if content.base_fd != LOST:
            os.close(content.base_fd)
        content.base_fd, self._fd = self._fd, LOST
        content.present, content.unverified = self._present, self._unverified
        content.sums, content.unsummed = self._sums, self._unsummed - self._changed
        content.fetched_unsaved = True

    def close(self) -> None:
        """Closes what `apply` did not take over."""
        if self._fd != LOST:
            os.close(self._fd)
            self._fd = LOST


def _zero_holes(layer: Layer) -> None:
    """Zeros what a write left behind that was never acknowledged."""
    os.ftruncate(layer.fd, layer.extents.stop)
    for start, stop in layer.extents.gaps(0, layer.extents.stop):
        while start < stop:
            try:
                start = os.lseek(layer.fd, start, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno != errno.ENXIO:  # only holes from here on
                    raise
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
            raise OSError(errno.EIO, "the local disk has lost these bytes")
        start += count
