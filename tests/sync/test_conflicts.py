"""The promises of `conflict_name`: who sees the copy knows what it is, opens it with the same program, and it is new."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbmountd.fs.conflicts import conflict_name

WHEN = datetime.datetime(2026, 11, 22, 14, 3, 59)
MARK = " (conflict 2026-11-22 1403)"


def never(_name: str) -> bool:
    return False


def size(name: str) -> int:
    return len(name.encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("table.csv", f"table{MARK}.csv"),
        ("archive.tar.gz", f"archive{MARK}.tar.gz"),
        ("v1.2.txt", f"v1.2{MARK}.txt"),
        ("Makefile", f"Makefile{MARK}"),
        (".bashrc", f".bashrc{MARK}"),
        (".config.toml", f".config{MARK}.toml"),
        (".tar.gz", f".tar{MARK}.gz"),
    ],
)
def test_the_extension_stays_at_the_end(name: str, expected: str) -> None:
    assert conflict_name(name, WHEN, never) == expected


def test_a_taken_name_is_numbered_from_two() -> None:
    taken = {f"a{MARK}.txt", f"a{MARK[:-1]} 2).txt"}

    assert conflict_name("a.txt", WHEN, taken.__contains__) == f"a{MARK[:-1]} 3).txt"


def test_a_long_name_is_cut_at_a_character_border() -> None:
    name = conflict_name("é" * 127, WHEN, never)

    assert name == "é" * 114 + MARK
    assert size(name) == 255


def test_bytes_that_are_not_utf8_are_kept() -> None:
    assert conflict_name("caf\udce9.txt", WHEN, never) == f"caf\udce9{MARK}.txt"
    assert conflict_name("\udce9" + "a" * 253, WHEN, never) == "\udce9" + "a" * 227 + MARK


NAMES = st.binary(min_size=1, max_size=255).map(lambda raw: raw.decode("utf-8", "surrogateescape").replace("/", "_"))


def test_an_extension_that_leaves_no_room_is_given_up() -> None:
    assert conflict_name("a." + "😀" * 16, WHEN, never, max_bytes=60) == "a." + "😀" * 7 + MARK


@given(name=NAMES, max_bytes=st.integers(40, 255), numbers=st.integers(0, 3))
def test_a_copy_is_free_fits_and_is_a_valid_name(name: str, max_bytes: int, numbers: int) -> None:
    taken: set[str] = {name}
    for _ in range(numbers):
        taken.add(conflict_name(name, WHEN, taken.__contains__, max_bytes))

    copy = conflict_name(name, WHEN, taken.__contains__, max_bytes)

    assert copy not in taken
    assert len(taken) == numbers + 1
    assert size(copy) <= max_bytes
    assert "(conflict 2026-11-22 1403" in copy
    assert copy.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") == copy
