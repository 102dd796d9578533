"""Which directories to list before a program that walks a tree asks for them: it has opened several of one parent.

Pure; it knows no remote and no task. A request to a remote costs 50 ms whatever its size, and a program that walks waits for
one after the other; listed side by side and ahead of it, a thousand directories take seconds instead of a minute. Who opens
one directory, or two far apart in time, causes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cachetools import LRUCache

FIRST_WINDOW, LARGEST_WINDOW = 4, 48
"""Directories to be ahead of a walk: at its second directory, and after it has doubled often enough."""

PAUSE = 10.0
"""Seconds after which a walk is over."""


@dataclass
class Walk:
    """Of the children of one directory: when one was opened last, and how far to look ahead."""

    opened_at: float
    window: int = 0
    last: int = 0


class Walks:
    """The walks through one mount. `directories(ino)` gives the child directories of one, in the order of their numbers."""

    def __init__(self, directories: Callable[[int], Sequence[tuple[str, int]]]) -> None:
        self._directories = directories
        self._walks: LRUCache[int, Walk] = LRUCache(256)
        self._children: LRUCache[int, list[int]] = LRUCache(16)

    def opened(self, ino: int, parent: int, now: float) -> list[int]:
        """A program has opened the directory `ino` of `parent`, which is listed by now; gives those to list, soonest first."""
        walk = self._walks.get(parent)
        if walk is None or now - walk.opened_at > PAUSE:
            walk = self._walks[parent] = Walk(now)
            self._children.pop(parent, None)
        elif ino != walk.last:
            walk.window = min(LARGEST_WINDOW, walk.window * 2 or FIRST_WINDOW)
        walk.opened_at, walk.last = now, ino
        if not walk.window:
            return []
        below = self._in_order(ino, again=True)[: walk.window]  # a walk goes down first
        siblings = self._in_order(parent)
        if ino not in siblings:
            siblings = self._in_order(parent, again=True)
        at = siblings.index(ino) + 1 if ino in siblings else 0
        return below + siblings[at : at + walk.window]

    def _in_order(self, ino: int, *, again: bool = False) -> list[int]:
        """Child directories by name, as most programs walk."""
        found = None if again else self._children.get(ino)
        if found is None:
            found = self._children[ino] = [child for _, child in sorted(self._directories(ino))]
        return found
