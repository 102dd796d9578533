"""What the kernel holds of ours: lookup counts and open handles, in memory that outlives the worker.

The memory is a memfd of the supervisor's, given to each worker of one mount in turn; a worker may die at any instruction. It
knows no nodes. A row of 8 bytes for each inode number: lookups (u32), handles open for reading and for writing (u16 each).

Counts can be wrong in one direction only, whatever dies when:

- Lookups go up before the answer is sent, and a request that is sent again counts twice: never too low, so nothing is deleted
  that the kernel knows. What is too high is a removed node kept until the mount ends.
- Handles are never counted too high, or a file would wait for its last close for ever. The open that may not have been
  answered stands in row 0 and is taken back by the next worker; if its caller had the answer after all, the handle is counted
  again at its first use (`FileSystem.adopt_handle`). Until then the inode is `doubtful`.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterator

_ROW = 8
_FIRST_SIZE = 2**16
"""Bytes; pages that are never touched cost nothing."""
_MOST_LOOKUPS, _MOST_HANDLES = 2**32 - 1, 2**16 - 1
_WRITING, _OPENED, _SHIFT = 1, 2, 2


class Held:
    """The counts of one mount. `fd` is taken over, and closed with the object; None: a new mount."""

    def __init__(self, fd: int | None = None) -> None:
        self._fd = os.memfd_create("nbmountd-held", os.MFD_CLOEXEC) if fd is None else fd
        weakref.finalize(self, os.close, self._fd)
        self.doubtful = 0
        """The inode whose handle count may be one too low since an earlier worker died; 0: none."""
        self._pending = False
        self._map(max(os.fstat(self._fd).st_size, _FIRST_SIZE))

    def take_over(self) -> Iterator[tuple[int, int, int]]:
        """(inode, handles for reading, handles for writing) that an earlier worker left open. Once, before all else."""
        doubt = self._rows[0]
        self._rows[0] = 0
        self.doubtful = doubt >> _SHIFT
        if doubt & _OPENED:
            self.closed(self.doubtful, writing=bool(doubt & _WRITING))
        self.answered()
        for ino in [ino for ino, row in enumerate(self._rows) if row >> 32 and ino]:
            yield ino, self._handles[4 * ino + 2], self._handles[4 * ino + 3]

    # -- lookups ------------------------------------------------------------------------------------------------------

    def looked_up(self, ino: int, count: int) -> None:
        """Call before the answer is sent."""
        if ino >= self._limit:
            self._grow(ino)
        self._lookups[2 * ino] = min(self._lookups[2 * ino] + count, _MOST_LOOKUPS)

    def forgotten(self, ino: int, count: int) -> bool:
        """Whether that was the last of them."""
        if ino >= self._limit:
            return True
        left = self._lookups[2 * ino] - count
        self._lookups[2 * ino] = max(left, 0)
        return left <= 0

    def is_known(self, ino: int) -> bool:
        return ino < self._limit and self._lookups[2 * ino] > 0

    # -- handles ------------------------------------------------------------------------------------------------------

    def opened(self, ino: int, *, writing: bool) -> None:
        """Call before the answer is sent; nothing may be awaited until then."""
        if ino >= self._limit:
            self._grow(ino)
        self._rows[0] = ino << _SHIFT | _OPENED | writing
        self._pending = True
        place = 4 * ino + 2 + writing
        self._handles[place] = min(self._handles[place] + 1, _MOST_HANDLES)

    def closed(self, ino: int, *, writing: bool) -> None:
        """Call before the answer is sent; nothing may be awaited until then."""
        place = 4 * ino + 2 + writing
        if ino >= self._limit or not self._handles[place]:
            return
        self._rows[0] = ino << _SHIFT | writing
        self._pending = True
        self._handles[place] -= 1

    def answered(self) -> None:
        """Every answer so far has been sent. Called when the next request begins."""
        if self._pending:
            self._rows[0] = 0
            self._pending = False

    def drop(self, ino: int) -> None:
        """The inode is no more."""
        if ino < self._limit:
            self._rows[ino] = 0

    def close(self) -> None:
        self._release()
        os.close(self._fd)

    # -- the memory ---------------------------------------------------------------------------------------------------

    def _map(self, size: int) -> None:
        if os.fstat(self._fd).st_size < size:
            os.ftruncate(self._fd, size)
        self._memory = mmap.mmap(self._fd, size)
        whole = memoryview(self._memory)
        self._rows, self._lookups, self._handles = whole.cast("Q"), whole.cast("I"), whole.cast("H")
        whole.release()
        self._limit = size // _ROW

    def _release(self) -> None:
        for view in (self._rows, self._lookups, self._handles):
            view.release()
        self._memory.close()

    def _grow(self, ino: int) -> None:
        self._release()
        size = self._limit * _ROW
        while ino >= size // _ROW:
            size *= 2
        self._map(size)
