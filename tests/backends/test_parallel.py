"""How many changes at once, by how quickly a remote answers and whether it complains."""

from __future__ import annotations

from nbmountd.backends.parallel import LEAST, START, Parallel


def rounds(parallel: Parallel, count: int, seconds: float, *, wanted: bool = True) -> None:
    for _ in range(count):
        for _ in range(parallel.limit):
            parallel.answered("upload", seconds, wanted=wanted)


def test_where_more_at_once_costs_no_time_there_are_more_up_to_what_is_allowed() -> None:
    parallel = Parallel(12)
    assert parallel.limit == START

    rounds(parallel, 20, 0.05)

    assert parallel.limit == 12


def test_without_anybody_waiting_there_are_no_more() -> None:
    parallel = Parallel(12)

    rounds(parallel, 20, 0.05, wanted=False)

    assert parallel.limit == START


def test_where_each_takes_longer_there_are_no_more_than_in_the_beginning() -> None:
    parallel = Parallel(12)

    for _ in range(200):
        parallel.answered("upload", 0.05 * (1 + max(0, parallel.limit - START)), wanted=True)

    assert START <= parallel.limit <= START + 2


def test_a_server_that_has_become_slow_gets_fewer() -> None:
    parallel = Parallel(12)
    rounds(parallel, 20, 0.05)

    rounds(parallel, 5, 0.5)

    assert parallel.limit == START


def test_a_complaint_halves_once_a_round_and_never_ends_everything() -> None:
    parallel = Parallel(12)
    rounds(parallel, 20, 0.05)

    for _ in range(12):
        parallel.complained()
    assert parallel.limit == 6

    for _ in range(10):
        rounds(parallel, 1, 0.05, wanted=False)
        parallel.complained()
    assert parallel.limit == LEAST


def test_what_was_halved_comes_back_with_good_answers() -> None:
    parallel = Parallel(12)
    parallel.complained()
    assert parallel.limit == START // 2

    rounds(parallel, 20, 0.05)

    assert parallel.limit == 12


def test_what_is_allowed_is_never_exceeded() -> None:
    for most in range(1, 5):
        parallel = Parallel(most)
        rounds(parallel, 5, 0.05)
        parallel.complained()
        rounds(parallel, 5, 0.05)

        assert 1 <= parallel.limit <= most
