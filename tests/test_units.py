"""Sizes and durations as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbmountd.units import parse_duration, parse_size, show_duration, show_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("1000", 1000), ("12 B", 12), ("10G", 10 * 2**30), ("10g", 10 * 2**30), ("512MiB", 512 * 2**20),
        ("512 MiB", 512 * 2**20), ("2GB", 2 * 10**9), ("1.5K", 1536), (" 1T ", 2**40), ("1P", 2**50),
    ],
)
def test_a_size_is_read_in_the_usual_ways(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "ten", "1.2.3", "-1", "1 G B", "1X", "1e3", "inf", "9" * 400])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30), ("2.5", 2.5), ("30s", 30), ("5 min", 300), ("1h30min", 5400), ("1 h 30 min", 5400), ("250 ms", 0.25),
        ("2d", 172800),
    ],
)
def test_a_duration_is_read_in_the_usual_ways(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "soon", "-5", "-5s", "5 parsecs", "5s later", "1:30", "nan", "inf"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@given(st.integers(0, 2**59))
def test_a_shown_size_is_short_and_near_the_truth(size: int) -> None:
    shown = show_size(size)

    assert len(shown) <= 8
    assert parse_size(shown) == pytest.approx(size, rel=0.06)


@given(st.floats(0, 10**7))
def test_a_shown_duration_is_short_and_near_the_truth(seconds: float) -> None:
    shown = show_duration(seconds)

    assert len(shown) <= 12
    assert parse_duration(shown) == pytest.approx(seconds, rel=0.3, abs=0.06)
