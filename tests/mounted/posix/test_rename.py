"""rename(2) with each of its flags, between everything that a name can be."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounted.kernel import listed
from tests.mounted.posix.twins import Twins, tree

AT_FDCWD = -100
FLAGS = {"plain": 0, "RENAME_NOREPLACE": 1, "RENAME_EXCHANGE": 2, "both": 3, "RENAME_WHITEOUT": 4, "unknown": 64}
KINDS = ("file", "empty directory", "full directory", "symlink", "fifo", "missing")
libc = ctypes.CDLL(None, use_errno=True)


def rename(source: Path, target: Path, flags: int) -> None:
    if libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def make(kind: str, path: Path) -> None:
    match kind:
        case "file":
            path.write_bytes(os.fsencode(path.name))
        case "empty directory":
            path.mkdir()
        case "full directory":
            path.mkdir()
            (path / f"in {path.name}").write_bytes(b"below")
        case "symlink":
            path.symlink_to(f"of {path.name}")
        case "fifo":
            os.mkfifo(path)


def renamed(source: str, target: str, flags: int, *, apart: bool) -> Callable[[Path], object]:
    def call(place: Path) -> object:
        (place / "other").mkdir()
        end = place / "other" / "target" if apart else place / "target"
        make(source, place / "source")
        make(target, end)
        try:
            rename(place / "source", end, flags)
            error = 0
        except OSError as exc:
            error = exc.errno or -1
        return error, tree(place)

    return call


@pytest.mark.parametrize("name", [name for name in FLAGS if name != "RENAME_WHITEOUT"])
@pytest.mark.parametrize("apart", [False, True], ids=["in one directory", "between directories"])
def test_every_kind_over_every_kind(name: str, apart: bool, twins: Twins) -> None:
    calls = {
        f"{source} to {target}": renamed(source, target, FLAGS[name], apart=apart)
        for source, target in itertools.product(KINDS, KINDS)
    }

    assert twins.differences(calls) == []


def test_a_whiteout_is_refused(twins: Twins) -> None:
    (twins.mounted / "file").touch()

    with pytest.raises(OSError, match="Invalid argument"):
        rename(twins.mounted / "file", twins.mounted / "gone", FLAGS["RENAME_WHITEOUT"])

    assert os.listdir(twins.mounted) == ["file"]


@pytest.mark.parametrize("flags", [0, 1, 2])
def test_renaming_to_itself(twins: Twins, flags: int) -> None:
    def call(place: Path) -> object:
        (place / "file").write_bytes(b"x")
        try:
            rename(place / "file", place / "file", flags)
        finally:
            assert (place / "file").read_bytes() == b"x"
        return tree(place)

    twins.same(call)


@pytest.mark.parametrize("flags", [0, 2])
def test_a_directory_does_not_move_into_itself(twins: Twins, flags: int) -> None:
    def call(place: Path) -> object:
        (place / "a" / "b" / "c").mkdir(parents=True)
        rename(place / "a", place / "a" / "b" / "c", flags)
        return tree(place)

    assert twins.same(call).error == "EINVAL"


def test_a_directory_is_not_renamed_over_the_one_it_is_in(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "a" / "b").mkdir(parents=True)
        rename(place / "a" / "b", place / "a", 0)
        return tree(place)

    assert twins.same(call).error == "ENOTEMPTY"


def test_renaming_between_two_names_of_one_file_does_nothing(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "one").write_bytes(b"x")
        os.link(place / "one", place / "two")
        rename(place / "one", place / "two", 0)
        return tree(place)

    twins.same(call)


def test_a_ring_of_names_turns(twins: Twins) -> None:
    def call(place: Path) -> object:
        for name in "abc":
            (place / name).mkdir()
            (place / name / f"was {name}").write_text(name)
        rename(place / "a", place / "spare", 0)
        rename(place / "b", place / "a", 0)
        rename(place / "c", place / "b", 0)
        rename(place / "spare", place / "c", 0)
        return tree(place)

    twins.same(call)


def test_exchanging_a_full_directory_with_a_file_twice_and_sending_it(twins: Twins, folder) -> None:  # type: ignore[no-untyped-def]
    def call(place: Path) -> object:
        make("full directory", place / "one")
        make("file", place / "two")
        rename(place / "one", place / "two", 2)
        first = tree(place)
        rename(place / "one", place / "two", 2)
        rename(place / "two", place / "one", 2)
        return first, tree(place)

    twins.same(call)
    folder.daemon.sync(folder.mount)
    assert (folder.root / "one").read_bytes() == b"two"
    assert listed(folder.root / "two") == ["in one"]


def test_a_reader_always_finds_one_of_the_versions_that_are_renamed_over(twins: Twins) -> None:
    """Saving by rename is atomic: no look finds nothing, or half of it."""
    target = twins.mounted / "target"
    target.write_bytes(b"0" * 5000)

    for number in range(1, 60):
        fresh = twins.mounted / f"new-{number}"
        fresh.write_bytes(str(number % 10).encode() * 5000)
        with target.open("rb") as before:
            fresh.rename(target)
            assert before.read() == str((number - 1) % 10).encode() * 5000
        assert target.read_bytes() == str(number % 10).encode() * 5000

    assert os.listdir(twins.mounted) == ["target"]
