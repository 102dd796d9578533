"""How far to ask ahead of readers that go forward: by what they have read so far, and by what a request to the remote costs.

Pure; it knows no remote and no task. Nothing is asked ahead of a reader that jumps about, and never more than half of what one
has read that began in the middle of a file (as much again, at the start): scattered reads cost little more than they ask.
Who has read a good deal in order is run ahead of by what comes in the time that two requests take before their first byte,
however little that reader has read yet: with less under way, the line is idle while everybody waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

MIB = 2**20
FIRST_WINDOW = MIB
"""Ahead of a reader that begins at offset 0."""
LARGEST_WINDOW = 128 * MIB
AHEAD_PIECE, LARGEST_PIECE = 8 * MIB, 32 * MIB
"""Longest single request ahead of a reader who has not read much yet, and of one with the largest window: a Nextcloud takes
50 ms for a request whatever its size."""
IN_ORDER = 2 * MIB
"""Who has read so much in order goes on, most likely: from then on the remote's pace counts, too."""
LEAP = 8
"""By the remote's pace, at most so many times what was read (half as many times, when it began in the middle)."""
LARGEST_LEAP = 64 * MIB
AT_ONCE = 3
"""Requests ahead of readers under way at once (worker.py): each gets an equal part of the window."""
STREAMS = 4
REORDER = 2 * MIB
"""The kernel's own read-ahead (1 MiB where it could be raised) asks out of order by this much."""
SAMPLE = 256 * 2**10
"""Bytes that an answer must have to tell how fast they come."""


class Pace:
    """What requests to a remote cost, as measured; means in which the last few count most."""

    def __init__(self) -> None:
        self.latency = 0.0
        """Seconds until the first byte."""
        self.rate = 0.0
        """Bytes a second after it."""

    def measured(self, waited: float, size: int, seconds: float) -> None:
        """An answer of `size` bytes began after `waited` seconds and took `seconds` more."""
        if size < SAMPLE:
            return
        rate = size / max(seconds, 1e-4)
        known = bool(self.rate)
        self.latency += (waited - self.latency) / (4 if known else 1)
        self.rate += (rate - self.rate) / (4 if known else 1)

    @property
    def leap(self) -> int:
        """Bytes that come in the time of two latencies; 0 while nothing is known."""
        return int(min(2 * self.latency * self.rate, LARGEST_LEAP))


class Ahead(NamedTuple):
    """Bytes to ask for, [start, stop), in requests of at most `piece`."""

    start: int
    stop: int
    piece: int


@dataclass(eq=False)
class Stream:
    """A reader that goes forward: where it is, how much it has read, how far we have asked ahead of it."""

    next: int
    read: int
    ahead: int


@dataclass(eq=False)
class Streams:
    """The readers of one file."""

    pace: Pace
    _streams: list[Stream] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self._streams)

    def clear(self) -> None:
        """Nobody reads any more."""
        self._streams.clear()

    def follow(self, start: int, stop: int, end: int, *, held: bool) -> Ahead | None:
        """Notes a read of [start, stop), of a file that ends at `end`; gives what to ask ahead of it now. `held`: nothing can
        be asked for now."""
        stream = self._stream(start, stop)
        stream.read += stop - start
        stream.next = max(stream.next, stop)
        window = self._window(stream, stop - start)
        target = min(stream.next + window, end)
        begin = max(stream.ahead, stop)
        piece = min(LARGEST_PIECE, max(AHEAD_PIECE, window // AT_ONCE))
        enough = target - begin >= min(window // 2, piece) > 0
        if held or not (enough or (window and target == end > begin)):
            return None
        stream.ahead = target
        return Ahead(begin, target, piece)

    def _stream(self, start: int, stop: int) -> Stream:
        for stream in self._streams:
            if stream.next - REORDER <= start <= stream.next + max(REORDER, stream.read // 4):
                return stream
        stream = Stream(start, 0, stop)
        self._streams.append(stream)
        if len(self._streams) > STREAMS:
            del self._streams[0]
        return stream

    def _window(self, stream: Stream, just_read: int) -> int:
        from_start = stream.read >= stream.next
        once = stream.read <= just_read
        window = max(FIRST_WINDOW, stream.read) if from_start else 0 if once else stream.read // 2
        if window and stream.read >= IN_ORDER:
            window = max(window, min(self.pace.leap, stream.read * (LEAP if from_start else LEAP // 2)))
        return min(window, LARGEST_WINDOW)
