"""Extents against a set of integers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbmountd.disk.extents import Extents

POINT = st.integers(0, 40)
CHANGES = st.lists(st.tuples(st.sampled_from(["add", "remove", "truncate"]), POINT, POINT), max_size=25)


@given(CHANGES, POINT, POINT)
@settings(max_examples=1500, deadline=None)
def test_extents_are_the_set_of_integers_that_was_put_in(
    changes: list[tuple[str, int, int]], start: int, stop: int
) -> None:
    extents, model = Extents(), set[int]()
    for what, one, other in changes:
        if what == "add":
            extents.add(one, other)
            model |= set(range(one, other))
        elif what == "remove":
            extents.remove(one, other)
            model -= set(range(one, other))
        else:
            extents.truncate(one)
            model -= set(range(one, 100))
    window = set(range(start, stop))

    ranges = list(extents)

    assert {at for begin, end in ranges for at in range(begin, end)} == model
    assert all(begin < end for begin, end in ranges)
    assert all(end < begin for (_, end), (begin, _) in pairwise(ranges)), "merged, sorted, disjoint"
    assert extents.total == len(model)
    assert extents.stop == max(model, default=-1) + 1
    assert bool(extents) == bool(model)
    assert extents.covers(start, stop) == (window <= model)
    assert [at for begin, end in extents.within(start, stop) for at in range(begin, end)] == sorted(window & model)
    assert [at for begin, end in extents.gaps(start, stop) for at in range(begin, end)] == sorted(window - model)
    assert Extents.unpack(extents.pack()) == extents == Extents(reversed(ranges))


@given(CHANGES)
def test_a_copy_does_not_follow_its_original(changes: list[tuple[str, int, int]]) -> None:
    extents = Extents((one, other) for _, one, other in changes)
    before = list(extents)

    copy = extents.copy()
    copy.add(50, 60)
    copy.remove(0, 10)

    assert list(extents) == before


@pytest.mark.parametrize("packed", [b"x", Extents([(3, 9)]).pack()[:12], Extents([(5, 6)]).pack() + Extents([(1, 2)]).pack()])
def test_what_pack_did_not_write_is_refused(packed: bytes) -> None:
    with pytest.raises(ValueError, match="extents are"):
        Extents.unpack(packed)
