"""How far is asked ahead of readers, by what they have read and by the remote's pace."""

from __future__ import annotations

from itertools import pairwise

from nbmountd.fs.streams import LARGEST_LEAP, LARGEST_WINDOW, MIB, Pace, Streams

GIB = 1024 * MIB
KIB = 1024


def paced(latency: float, rate: float) -> Pace:
    pace = Pace()
    pace.measured(latency, MIB, MIB / rate)
    return pace


def read_on(streams: Streams, start: int, stop: int, step: int = MIB, end: int = GIB) -> int:
    """How far is asked for, all in all, by somebody who reads [start, stop) in order."""
    reached = 0
    for at in range(start, stop, step):
        ahead = streams.follow(at, at + step, end, held=False)
        if ahead is not None:
            assert ahead.start >= at + step
            reached = max(reached, ahead.stop)
    return reached


def test_scattered_reads_have_nothing_asked_ahead_of_them() -> None:
    streams = Streams(paced(0.05, 500 * MIB))

    for place in range(500, 20, -7):
        assert streams.follow(place * MIB, place * MIB + 64 * KIB, GIB, held=False) is None


def test_of_a_mebibyte_read_in_the_middle_at_most_half_is_asked_ahead() -> None:
    assert read_on(Streams(paced(0.05, 500 * MIB)), 500 * MIB, 501 * MIB, 128 * KIB) <= 501.5 * MIB


def test_a_reader_from_the_start_is_run_ahead_of_by_what_it_has_read() -> None:
    streams = Streams(Pace())

    assert read_on(streams, 0, MIB) == 2 * MIB
    assert 12 * MIB <= read_on(streams, MIB, 8 * MIB) <= 16 * MIB
    assert read_on(streams, 8 * MIB, 512 * MIB) <= 512 * MIB + LARGEST_WINDOW


def test_where_a_request_costs_more_than_its_bytes_more_is_asked_at_once() -> None:
    far_and_fast, far_and_slow = Streams(paced(0.05, 400 * MIB)), Streams(paced(0.05, 5 * MIB))

    assert read_on(far_and_fast, 0, 2 * MIB) == 18 * MIB
    assert read_on(far_and_slow, 0, 2 * MIB) == 4 * MIB


def test_no_pace_however_odd_asks_beyond_the_limit() -> None:
    pace = paced(3600.0, 1e15)

    assert pace.leap == LARGEST_LEAP
    assert read_on(Streams(pace), 0, 16 * MIB) <= 16 * MIB + LARGEST_LEAP


def test_small_answers_say_nothing_of_the_pace() -> None:
    pace = Pace()

    pace.measured(0.05, 4 * KIB, 0.0)

    assert pace.leap == 0


def test_the_end_of_the_file_is_asked_for_at_once_when_it_is_in_reach() -> None:
    assert read_on(Streams(Pace()), 0, MIB, end=MIB + 10) == MIB + 10


def test_what_is_asked_for_is_asked_once() -> None:
    streams = Streams(paced(0.05, 400 * MIB))

    found = [streams.follow(at, at + MIB, 256 * MIB, held=False) for at in range(0, 256 * MIB, MIB)]

    asked = [(ahead.start, ahead.stop) for ahead in found if ahead is not None]
    assert all(before[1] <= after[0] for before, after in pairwise(asked))
    assert asked[-1][1] == 256 * MIB
