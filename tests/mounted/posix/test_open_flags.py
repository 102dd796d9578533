"""open(2): every access mode with every combination of flags, on everything that a name can be."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounted.posix.twins import Twins, shape

ACCESS = {"O_RDONLY": os.O_RDONLY, "O_WRONLY": os.O_WRONLY, "O_RDWR": os.O_RDWR}
FLAGS = {
    name: getattr(os, name) for name in ("O_CREAT", "O_EXCL", "O_TRUNC", "O_APPEND", "O_DIRECTORY", "O_NOFOLLOW")
}  # fmt: skip
CONTENT = b"0123456789"


def prepare(kind: str, place: Path) -> None:
    match kind:
        case "file":
            (place / "name").write_bytes(CONTENT)
        case "directory":
            (place / "name").mkdir()
        case "symlink":
            (place / "target").write_bytes(CONTENT)
            (place / "name").symlink_to("target")
        case "symlink to a directory":
            (place / "target").mkdir()
            (place / "name").symlink_to("target")
        case "dangling symlink":
            (place / "name").symlink_to("nowhere")


def open_and_use(kind: str, access: int, flags: int) -> Callable[[Path], object]:
    """Opens, reads and writes what may be, and tells what came of it."""

    def call(place: Path) -> object:
        prepare(kind, place)
        said: list[object] = []
        try:
            fd = os.open(place / "name", access | flags, 0o640)
        except OSError as exc:
            said.append(exc.errno)
        else:
            for use in (lambda: os.read(fd, 4), lambda: os.write(fd, b"ab"), lambda: os.pread(fd, 100, 0)):
                try:
                    said.append(use())
                except OSError as exc:
                    said.append(exc.errno)
            os.close(fd)
        names = sorted(os.listdir(place))
        said.append([(name, shape(place / name)) for name in names])
        said.append([(place / name).read_bytes() for name in names if (place / name).is_file()])
        return said

    return call


@pytest.mark.parametrize("access", ACCESS)
@pytest.mark.parametrize(
    "kind", ["file", "directory", "symlink", "symlink to a directory", "dangling symlink", "missing"]
)
def test_every_combination_of_flags_answers_like_a_local_directory(kind: str, access: str, twins: Twins) -> None:
    calls = {}
    for count in range(len(FLAGS) + 1):
        for names in itertools.combinations(FLAGS, count):
            flags = 0
            for name in names:
                flags |= FLAGS[name]
            calls[" | ".join((access, *names))] = open_and_use(kind, ACCESS[access], flags)

    assert twins.differences(calls) == []


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o666, 0o755, 0o4755, 0o2711, 0o1777, 0o7777])
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777])
def test_a_new_file_has_the_mode_that_the_umask_leaves(twins: Twins, mode: int, mask: int) -> None:
    def create(place: Path) -> object:
        before = os.umask(mask)
        try:
            os.close(os.open(place / "file", os.O_CREAT | os.O_WRONLY, mode))
            os.mkdir(place / "directory", mode)
            os.mkfifo(place / "fifo", mode)
        finally:
            os.umask(before)
        return [shape(place / name) for name in ("file", "directory", "fifo")]

    twins.same(create)


def test_a_file_made_without_write_permission_is_written_through_its_own_descriptor(twins: Twins) -> None:
    def call(place: Path) -> object:
        fd = os.open(place / "file", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o444)
        os.write(fd, b"git writes its objects so")
        os.fsync(fd)
        os.close(fd)
        return (place / "file").read_bytes(), shape(place / "file")

    twins.same(call)


def test_a_component_that_is_a_file_is_not_a_directory(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "file").write_bytes(b"x")
        return os.stat(place / "file" / "below")

    assert twins.same(call).error == "ENOTDIR"


def test_opening_below_a_missing_directory_says_so(twins: Twins) -> None:
    assert twins.same(lambda place: os.open(place / "no" / "file", os.O_CREAT | os.O_WRONLY)).error == "ENOENT"


def test_o_truncate_empties_for_every_descriptor_that_is_open(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "file").write_bytes(CONTENT * 10_000)
        with (place / "file").open("rb", buffering=0) as reader, (place / "file").open("r+b", buffering=0) as writer:
            first = reader.read(5)
            os.close(os.open(place / "file", os.O_WRONLY | os.O_TRUNC))
            sizes = os.fstat(reader.fileno()).st_size, os.fstat(writer.fileno()).st_size
            writer.seek(7)
            writer.write(b"after")
            return first, sizes, reader.read(100), os.pread(reader.fileno(), 100, 0)

    twins.same(call)


def test_o_direct_and_o_sync_write_and_read_the_same_bytes(twins: Twins) -> None:
    """O_DIRECT may be refused by a file system, but what it does it must do right."""
    import mmap

    for flags in (os.O_SYNC, os.O_DSYNC, os.O_DIRECT):
        page = mmap.mmap(-1, 8192)
        page[:] = os.urandom(8192)
        fd = os.open(twins.mounted / "direct", os.O_CREAT | os.O_RDWR | os.O_TRUNC | flags)
        assert os.writev(fd, [page]) == 8192
        os.close(fd)
        assert (twins.mounted / "direct").read_bytes() == page[:]
        fd = os.open(twins.mounted / "direct", os.O_RDONLY | flags)
        back = mmap.mmap(-1, 8192)
        assert os.preadv(fd, [back], 0) == 8192
        os.close(fd)
        assert back[:] == page[:]
