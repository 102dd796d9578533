"""How much room unsent and cached bytes may take, and what gives way.

Unsent bytes have priority: the cache gives way to them. It knows numbers only; who evicts is given as a call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from nbmountd.errors import NoSpace, QuotaExceeded

KEEP_FREE = 64 * 2**20
"""Bytes of the local disk that are never used: the database and the journal must be able to note an end. A guess."""
STATVFS_EVERY = 16 * 2**20
"""Accepted bytes between two looks at the free space of the disk."""


class Budget:
    """Accepts or refuses unsent bytes. `unsent`, `cached` tell what is used now, `sent` how many unsent bytes have gone out
    since the start; `evict(count)` frees cached bytes."""

    def __init__(
        self,
        directories: tuple[Path, Path],
        *,
        unsent_limit: int,
        cache_limit: int,
        unsent: Callable[[], int],
        sent: Callable[[], int],
        cached: Callable[[], int],
        evict: Callable[[int], int],
    ) -> None:
        """`directories` are those of unsent and of cached bytes; they may be on different file systems."""
        self._state, self._cache = directories
        self.unsent_limit = unsent_limit
        self.cache_limit = cache_limit
        self._unsent = unsent
        self._sent = sent
        self._cached = cached
        self._evict = evict
        self._until_look = 0
        self._quota: int | None = None
        """What the remote took before it is full when it was last asked, counted like `sent`; None: no limit known."""

    def learn_quota(self, available: int | None) -> None:
        """What the remote says that it still takes now; None: no limit known."""
        self._quota = None if available is None else self._sent() + available

    @property
    def quota_available(self) -> int | None:
        """What of that nothing is waiting for: what is accepted takes it, what is cut off or removed unsent gives it back."""
        return None if self._quota is None else max(0, self._quota - self._sent() - self._unsent())

    def reserve(self, count: int) -> None:
        """Returns if `count` more unsent bytes can be kept. Raises NoSpace or QuotaExceeded, and then nothing changed."""
        quota = self.quota_available
        if quota is not None and count > quota:
            raise QuotaExceeded("the remote's quota is used up")
        if self._unsent() + count > self.unsent_limit:
            raise NoSpace("too many bytes wait to be sent (unsent_size)")
        self._until_look -= count
        if self._until_look <= 0:
            self._look(count)
            self._until_look = STATVFS_EVERY

    def _look(self, count: int) -> None:
        free = _free(self._state)
        if free < count + KEEP_FREE and self._same_disk() and self._evict(count + KEEP_FREE - free):
            free = _free(self._state)
        if free < count + KEEP_FREE:
            self._until_look = 0
            raise NoSpace("the local disk is full")

    def _same_disk(self) -> bool:
        """Whether evicting cached bytes makes room for unsent ones. False where there is no cache yet."""
        try:
            return self._state.stat().st_dev == self._cache.stat().st_dev
        except FileNotFoundError:
            return False

    @property
    def cache_excess(self) -> int:
        """Cached bytes above the limit; also what a nearly full disk wants back. Raises OSError."""
        try:
            free = _free(self._cache)
        except FileNotFoundError:  # deleted, and not needed since
            free = 2 * KEEP_FREE
        return min(self._cached(), max(0, self._cached() - self.cache_limit, 2 * KEEP_FREE - free))


def _free(directory: Path) -> int:
    stat = os.statvfs(directory)
    return stat.f_bavail * stat.f_frsize
