"""What the kernel holds of ours is known to the next worker, wherever the last one died."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from nbmountd.fs.held import Held


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("held")
    yield fd
    os.close(fd)


def successor(memory: int) -> Held:
    """The counts as another process finds them, the first one having died just now."""
    return Held(os.dup(memory))


def test_lookups_and_handles_are_found_by_the_next_worker(memory: int) -> None:
    held = successor(memory)
    held.looked_up(5, 3)
    held.opened(5, writing=True)
    held.opened(5, writing=False)
    held.opened(5, writing=False)
    held.opened(1_000_000, writing=True)
    held.answered()

    found = successor(memory)

    assert list(found.take_over()) == [(5, 2, 1), (1_000_000, 0, 1)]
    assert (found.is_known(5), found.is_known(6)) == (True, False)
    assert not found.forgotten(5, 2)
    assert found.forgotten(5, 1)
    assert not found.is_known(5)


def test_an_open_that_may_not_have_been_answered_counts_for_nothing_but_doubt(memory: int) -> None:
    held = successor(memory)
    held.opened(7, writing=True)
    held.answered()
    held.opened(7, writing=True)

    found = successor(memory)

    assert list(found.take_over()) == [(7, 0, 1)]
    assert found.doubtful == 7
    assert list(successor(memory).take_over()) == [(7, 0, 1)], "it is taken back once"


def test_a_close_that_comes_again_never_leaves_a_handle_too_many(memory: int) -> None:
    held = successor(memory)
    held.opened(7, writing=False)
    held.answered()
    held.closed(7, writing=False)

    found = successor(memory)
    taken = list(found.take_over())
    found.closed(7, writing=False)

    assert taken == []
    assert found.doubtful == 7
    assert list(successor(memory).take_over()) == []


def test_forgets_that_do_not_add_up_are_endured(memory: int) -> None:
    held = successor(memory)

    assert held.forgotten(9, 4)
    assert held.forgotten(10**9, 1)
    held.looked_up(9, 1)
    assert held.is_known(9)
