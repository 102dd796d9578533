"""The bytes of files: holes, the end, maps, sizes on disk, and what full means."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounted.conftest import Rig
from tests.mounted.posix.twins import Twins

PAGE = 4096


def test_a_hole_reads_as_zeros(twins: Twins) -> None:
    def call(place: Path) -> object:
        fd = os.open(place / "file", os.O_CREAT | os.O_RDWR)
        os.pwrite(fd, b"start", 0)
        os.pwrite(fd, b"middle", 1_000_000)
        os.ftruncate(fd, 3_000_000)
        parts = [os.pread(fd, 100, at) for at in (0, 3, 999_950, 2_999_950, 3_000_000, 5_000_000)]
        os.close(fd)
        return parts, hash((place / "file").read_bytes())

    twins.same(call)


def test_what_truncation_cut_off_never_comes_back(twins: Twins) -> None:
    def call(place: Path) -> object:
        path = place / "file"
        path.write_bytes(b"secret " * 10_000)
        os.truncate(path, 10)
        os.truncate(path, 5_000)
        first = path.read_bytes()
        with path.open("r+b", buffering=0) as file:
            file.seek(40_000)
            file.write(b"far")
        return first, path.read_bytes()

    twins.same(call)


def test_what_truncation_cut_off_an_uploaded_file_never_comes_back(twins: Twins, folder: Rig) -> None:
    (twins.local / "file").write_bytes(b"secret " * 10_000)
    (twins.mounted / "file").write_bytes(b"secret " * 10_000)
    folder.daemon.sync(folder.mount)

    def call(place: Path) -> object:
        with (place / "file").open("r+b", buffering=0) as file:
            os.ftruncate(file.fileno(), 4097)
            first = os.pread(file.fileno(), 100_000, 0)
            os.ftruncate(file.fileno(), 50_000)
            return first, os.pread(file.fileno(), 100_000, 0)

    twins.same(call)
    folder.daemon.sync(folder.mount)
    assert (folder.root / "file").read_bytes() == (twins.local / "file").read_bytes()


def test_du_says_what_a_file_weighs(twins: Twins, folder: Rig) -> None:
    """A hole weighs nothing while the file is here, what was written weighs what it is, to a block of 4 KiB."""

    def call(place: Path) -> object:
        (place / "full").write_bytes(os.urandom(1_000_000))
        (place / "empty").touch()
        (place / "small").write_bytes(b"x")
        with (place / "sparse").open("wb") as file:
            file.truncate(50_000_000)
            file.seek(10_000_000)
            file.write(os.urandom(100_000))
        said = {}
        for name in ("full", "empty", "small", "sparse"):
            output = subprocess.run(["du", "-B1", name], cwd=place, capture_output=True, check=True).stdout
            said[name] = int(output.split()[0])
        return said

    local, mounted = call(twins.local), call(twins.mounted)
    assert isinstance(local, dict) and isinstance(mounted, dict)
    for name, weight in local.items():
        assert abs(mounted[name] - weight) <= 2 * PAGE, (name, weight, mounted[name])
    folder.daemon.sync(folder.mount)
    assert (folder.mount / "full").stat().st_blocks * 512 >= 1_000_000


def test_du_of_an_untouched_remote_file_is_its_size(folder: Rig) -> None:
    """Jupyter asks `du` before it copies a folder."""
    folder.daemon.sync(folder.mount)
    (folder.root / "remote").write_bytes(os.urandom(700_000))
    folder.daemon.refresh(folder.mount)

    output = subprocess.run(["du", "-B1", folder.mount / "remote"], capture_output=True, check=True).stdout

    assert 700_000 <= int(output.split()[0]) <= 700_000 + PAGE


def test_tools_that_look_for_holes_copy_the_same_bytes(twins: Twins) -> None:
    def call(place: Path) -> object:
        with (place / "sparse").open("wb") as file:
            file.seek(300_000)
            file.write(b"data")
            file.truncate(1_000_000)
        subprocess.run(["cp", "--sparse=always", "sparse", "copy"], cwd=place, check=True)
        subprocess.run(["tar", "-cSf", "archive.tar", "sparse"], cwd=place, check=True)
        subprocess.run(["tar", "-xOf", "archive.tar"], cwd=place, check=True, stdout=(place / "out").open("wb"))
        contents = {(place / name).read_bytes() for name in ("sparse", "copy", "out")}
        return len(contents)

    assert twins.same(call).value == 1


def test_seek_data_and_hole_hide_no_data(folder: Rig) -> None:
    path = folder.mount / "sparse"
    with path.open("wb") as file:
        file.seek(1_000_000)
        file.write(b"d" * 10_000)
        file.truncate(3_000_000)
    fd = os.open(path, os.O_RDONLY)
    try:
        data = os.lseek(fd, 0, os.SEEK_DATA)
        hole = os.lseek(fd, 1_005_000, os.SEEK_HOLE)
        with pytest.raises(OSError, match="No such device or address"):
            os.lseek(fd, 3_000_000, os.SEEK_DATA)
    finally:
        os.close(fd)

    assert data <= 1_000_000
    assert hole >= 1_010_000


def test_allocation_is_done_or_refused_but_never_pretended(twins: Twins) -> None:
    """posix_fallocate of glibc writes where the file system cannot allocate."""

    def call(place: Path) -> object:
        (place / "file").write_bytes(b"start")
        fd = os.open(place / "file", os.O_RDWR)
        try:
            os.posix_fallocate(fd, 0, 100_000)
        finally:
            os.close(fd)
        return (place / "file").read_bytes()

    twins.same(call)


def test_reads_at_and_behind_the_end(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "file").write_bytes(b"x" * (PAGE + 5))
        fd = os.open(place / "file", os.O_RDONLY)
        places = (0, PAGE - 1, PAGE, PAGE + 5, PAGE + 6, 10**12)
        said = [len(os.pread(fd, size, at)) for at in places for size in (0, 1, 10, 10**6)]
        os.close(fd)
        return said

    twins.same(call)


def test_a_shared_map_and_write_are_coherent(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "file").write_bytes(bytes(3 * PAGE))
        said = []
        with (place / "file").open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), 0) as view:
            view[10:15] = b"mmap1"
            said.append(os.pread(file.fileno(), 20, 5))
            os.pwrite(file.fileno(), b"write", PAGE - 2)
            said.append(view[PAGE - 5 : PAGE + 5])
            view[2 * PAGE : 2 * PAGE + 4] = b"last"
            view.flush()
            said.append((place / "file").read_bytes())
            view[0:3] = b"end"
        said.append((place / "file").read_bytes())
        return said

    twins.same(call)


def test_a_map_made_before_the_descriptor_was_closed_still_reaches_the_file(twins: Twins, folder: Rig) -> None:
    def call(place: Path) -> object:
        (place / "file").write_bytes(bytes(2 * PAGE))
        with (place / "file").open("r+b") as file:
            view = mmap.mmap(file.fileno(), 0)
        view[PAGE - 3 : PAGE + 3] = b"abcdef"
        view.close()
        return (place / "file").read_bytes()

    twins.same(call)
    folder.daemon.sync(folder.mount)
    assert (folder.root / "file").read_bytes() == (twins.local / "file").read_bytes()


def test_a_private_map_changes_nothing(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "file").write_bytes(b"unchanged" * 1000)
        with (place / "file").open("r+b") as file:
            with mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as view:
                view[:7] = b"private"
                seen = view[:9]
        return seen, (place / "file").read_bytes()

    twins.same(call)


def test_two_processes_share_a_map(folder: Rig) -> None:
    code = """if True:
        import mmap, sys
        with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            for line in sys.stdin:
                view[5000:5005] = view[:5].upper()
                print("done", flush=True)
    """
    path = folder.mount / "shared"
    path.write_bytes(bytes(10_000))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        with subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdin is not None and other.stdout is not None
            view[:5] = b"hello"
            other.stdin.write(b"go\n")
            other.stdin.flush()
            assert other.stdout.readline() == b"done\n"
            seen = view[5000:5005]
            other.stdin.close()

    assert seen == b"HELLO"
    assert path.read_bytes()[5000:5005] == b"HELLO"


def test_fsync_and_fsyncdir_and_syncfs_answer(twins: Twins) -> None:
    def call(place: Path) -> object:
        fd = os.open(place / "file", os.O_CREAT | os.O_RDWR)
        os.write(fd, b"x")
        os.fsync(fd)
        os.fdatasync(fd)
        os.close(fd)
        fd = os.open(place / "file", os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        directory = os.open(place, os.O_RDONLY)
        os.fsync(directory)
        os.fdatasync(directory)
        os.close(directory)
        return (place / "file").read_bytes()

    twins.same(call)


def test_statfs_says_how_long_a_name_may_be_and_that_there_is_room(folder: Rig) -> None:
    found = os.statvfs(folder.mount)

    assert found.f_namemax == 255
    assert found.f_bavail * found.f_frsize > 2**30
    assert found.f_ffree > 1000


def test_copying_in_the_kernel_gives_the_same_bytes(twins: Twins) -> None:
    """copy_file_range and sendfile, with which shutil and cp copy."""

    def call(place: Path) -> object:
        content = bytes(range(256)) * 2000
        (place / "from").write_bytes(content)
        with (place / "from").open("rb") as source, (place / "to").open("wb") as target:
            copied = 0
            while count := os.copy_file_range(source.fileno(), target.fileno(), 100_000):
                copied += count
        with (place / "from").open("rb") as source, (place / "sent").open("wb") as target:
            sent = os.sendfile(target.fileno(), source.fileno(), 1000, 5000)
        return copied, sent, (place / "to").read_bytes() == content, (place / "sent").read_bytes() == content[1000:6000]

    twins.same(call)
