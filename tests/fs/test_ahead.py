"""What is listed ahead of a program: nothing for who opens a directory here and there, what comes next for who walks."""

from __future__ import annotations

from nbmountd.fs.ahead import LARGEST_WINDOW, PAUSE, Walks

TREE = {1: [("b", 30), ("a", 20), *((f"c{number:03}", 100 + number) for number in range(200))], 20: [("deep", 21)]}


def walks() -> Walks:
    return Walks(lambda ino: TREE.get(ino, []))


def test_who_opens_one_directory_causes_nothing() -> None:
    walk = walks()

    assert walk.opened(20, 1, 0.0) == []
    assert walk.opened(20, 1, 1.0) == []


def test_two_far_apart_in_time_are_no_walk() -> None:
    walk = walks()
    walk.opened(20, 1, 0.0)

    assert walk.opened(30, 1, PAUSE + 1) == []


def test_the_second_of_a_parent_brings_the_next_ones_by_name() -> None:
    walk = walks()
    walk.opened(20, 1, 0.0)

    assert walk.opened(30, 1, 0.1) == [100, 101, 102, 103]


def test_what_lies_below_comes_first() -> None:
    walk = walks()
    walk.opened(30, 1, 0.0)

    assert walk.opened(20, 1, 0.1)[:2] == [21, 30]


def test_a_long_walk_is_kept_ahead_of_but_not_without_limit() -> None:
    walk = walks()
    for number in range(100):
        ahead = walk.opened(100 + number, 1, number / 10)

    assert ahead == [200 + number for number in range(LARGEST_WINDOW)]


def test_a_new_directory_is_found_among_its_siblings() -> None:
    walk = walks()
    walk.opened(20, 1, 0.0)
    walk.opened(30, 1, 0.1)
    TREE[1].append(("aa", 25))

    try:
        assert walk.opened(25, 1, 0.2)[0] == 30
    finally:
        TREE[1].pop()
