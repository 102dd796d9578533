"""Sets of byte ranges: half-open, sorted, disjoint, merged. Pure; it knows no file."""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

_PAIR = struct.Struct("<QQ")


class Extents:
    """A set of byte offsets, kept as the fewest ranges `(start, stop)` that make it up."""

    __slots__ = ("_starts", "_stops")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in ranges:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> None:
        """Puts [start, stop) in. An empty range changes nothing."""
        if start >= stop:
            return
        if self._stops and start == self._stops[-1]:  # the hot path: appending
            self._stops[-1] = stop
            return
        first = bisect_left(self._stops, start)  # first range that touches or follows `start`
        last = bisect_right(self._starts, stop)  # first range that begins after `stop`
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def remove(self, start: int, stop: int) -> None:
        """Takes [start, stop) out."""
        if start >= stop:
            return
        first = bisect_right(self._stops, start)
        last = bisect_left(self._starts, stop)
        if first >= last:
            return
        starts, stops = [], []
        if self._starts[first] < start:
            starts.append(self._starts[first])
            stops.append(start)
        if self._stops[last - 1] > stop:
            starts.append(stop)
            stops.append(self._stops[last - 1])
        self._starts[first:last] = starts
        self._stops[first:last] = stops

    def truncate(self, size: int) -> None:
        """Takes everything from `size` on out."""
        if self._stops and self._stops[-1] > size:
            self.remove(size, self._stops[-1])

    def clear(self) -> None:
        self._starts.clear()
        self._stops.clear()

    def covers(self, start: int, stop: int) -> bool:
        """Whether all of [start, stop) is in; True for an empty range."""
        if start >= stop:
            return True
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and self._stops[at] >= stop

    def within(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The ranges that are in, cut to [start, stop)."""
        if start >= stop:
            return []
        first = bisect_right(self._stops, start)
        last = bisect_left(self._starts, stop)
        return [(max(start, self._starts[at]), min(stop, self._stops[at])) for at in range(first, last)]

    def gaps(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The ranges of [start, stop) that are not in."""
        gaps = []
        for begin, end in self.within(start, stop):
            if begin > start:
                gaps.append((start, begin))
            start = end
        if start < stop:
            gaps.append((start, stop))
        return gaps

    @property
    def total(self) -> int:
        """Number of bytes in the set."""
        return sum(self._stops) - sum(self._starts)

    @property
    def stop(self) -> int:
        """One past the last byte; 0 when empty."""
        return self._stops[-1] if self._stops else 0

    def copy(self) -> Extents:
        twin = Extents()
        twin._starts = self._starts.copy()
        twin._stops = self._stops.copy()
        return twin

    def pack(self) -> bytes:
        """16 bytes a range, little endian; `unpack` reads it."""
        return b"".join(_PAIR.pack(*pair) for pair in self)

    @classmethod
    def unpack(cls, packed: bytes) -> Extents:
        """The set that `pack` wrote. Raises ValueError if it cannot have been `pack`."""
        if len(packed) % _PAIR.size:
            raise ValueError("extents are cut short")
        new = cls()
        for start, stop in _PAIR.iter_unpack(packed):
            if start >= stop or start < new.stop:
                raise ValueError("extents are not sorted")
            new.add(start, stop)
        return new

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._stops, strict=True)))

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extents) and self._starts == other._starts and self._stops == other._stops

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"Extents({list(self)})"
