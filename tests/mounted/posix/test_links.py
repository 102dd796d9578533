"""Hard links, symbolic links, FIFOs, sockets and devices."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from tests.mounted.conftest import Rig
from tests.mounted.kernel import listed
from tests.mounted.posix.twins import Twins, shape, tree


def test_a_second_name_is_the_same_file(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "one").write_bytes(b"first")
        os.link(place / "one", place / "two")
        (place / "two").open("ab").write(b", second")
        (place / "one").chmod(0o604)
        same = os.path.samefile(place / "one", place / "two")
        return same, tree(place)

    twins.same(call)


def test_a_file_lives_until_its_last_name_goes(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "sub").mkdir()
        (place / "one").write_bytes(b"kept")
        os.link(place / "one", place / "sub" / "two")
        os.link(place / "sub" / "two", place / "three")
        counts = [(place / "one").stat().st_nlink]
        (place / "one").unlink()
        counts.append((place / "three").stat().st_nlink)
        (place / "sub" / "two").rename(place / "sub" / "moved")
        (place / "three").unlink()
        return counts, tree(place)

    twins.same(call)


def test_writing_by_one_name_is_seen_by_a_descriptor_of_the_other(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "one").write_bytes(b"before")
        os.link(place / "one", place / "two")
        with (place / "two").open("rb", buffering=0) as reader:
            (place / "one").open("r+b").write(b"AFTER")
            (place / "two").unlink()
            return reader.read(), os.fstat(reader.fileno()).st_nlink

    twins.same(call)


def test_renaming_over_one_of_two_names_leaves_the_other(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "one").write_bytes(b"old")
        os.link(place / "one", place / "two")
        (place / "new").write_bytes(b"new")
        (place / "new").rename(place / "two")
        return tree(place)

    twins.same(call)


def test_links_that_cannot_be(twins: Twins) -> None:
    def directory(place: Path) -> None:
        (place / "directory").mkdir()
        os.link(place / "directory", place / "second")

    def existing(place: Path) -> None:
        (place / "a").write_bytes(b"a")
        (place / "b").write_bytes(b"b")
        os.link(place / "a", place / "b")

    assert twins.same(directory).error == "EPERM"
    assert twins.same(existing).error == "EEXIST"
    assert twins.same(lambda place: os.link(place / "none", place / "new")).error == "ENOENT"


@pytest.mark.parametrize("kind", ["symlink", "fifo"])
def test_a_second_name_is_for_regular_files_only(twins: Twins, kind: str) -> None:
    """EPERM is what POSIX has for a file system that cannot; there is no program known to need it."""
    one = twins.mounted / "one"
    one.symlink_to("somewhere") if kind == "symlink" else os.mkfifo(one)

    with pytest.raises(PermissionError):
        os.link(one, twins.mounted / "two", follow_symlinks=False)

    assert os.listdir(twins.mounted) == ["one"]


def test_every_name_of_a_file_arrives_as_a_file_of_its_own(folder: Rig) -> None:
    (folder.mount / "one").write_bytes(b"linked")
    os.link(folder.mount / "one", folder.mount / "two")
    folder.daemon.sync(folder.mount)
    first = {name: (folder.root / name).read_bytes() for name in listed(folder.root)}

    (folder.mount / "two").open("ab").write(b" and changed")
    folder.daemon.sync(folder.mount)
    second = {name: (folder.root / name).read_bytes() for name in listed(folder.root)}

    def state() -> bytes:
        return os.getxattr(folder.mount / "one", "user.nbmountd.state")

    before = state()
    os.link(folder.mount / "one", folder.mount / "three")
    assert (before, state()) == (b"safe", b"dirty"), "it is safe when all of its names are"
    (folder.mount / "three").unlink()

    assert first == {"one": b"linked", "two": b"linked"}
    assert second == {"one": b"linked and changed", "two": b"linked and changed"}


@pytest.mark.parametrize(
    "target",
    ["file", "../up", "/absolute/path", ".", "sub/", "x" * 255, "a/" * 1500 + "z", "naïve 文件", "\udcff\udcfe"],
    ids=lambda target: f"{len(target)}-{target[:8].encode(errors='surrogateescape')!r}",
)
def test_a_symlink_says_what_it_was_given(twins: Twins, target: str) -> None:
    def call(place: Path) -> object:
        os.symlink(target, place / "link")
        return os.readlink(place / "link"), shape(place / "link")

    twins.same(call)


def test_symlinks_lead_where_they_should(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "sub").mkdir()
        (place / "sub" / "file").write_bytes(b"found")
        (place / "to-file").symlink_to("sub/file")
        (place / "to-directory").symlink_to("sub")
        (place / "sub" / "back").symlink_to("../to-file")
        (place / "loop").symlink_to("loop")
        (place / "to-directory" / "new").write_bytes(b"through the link")
        said: list[object] = [(place / name).read_bytes() for name in ("to-file", "to-directory/file", "sub/back")]
        for name in ("loop", "to-file/below", "dangling"):
            try:
                (place / name).read_bytes()
            except OSError as exc:
                said.append(exc.errno)
        return said, tree(place)

    twins.same(call)


def test_symlinks_that_cannot_be(twins: Twins) -> None:
    assert twins.same(lambda place: os.symlink("", place / "empty")).error == "ENOENT"
    assert twins.same(lambda place: os.symlink("a/" * 2500, place / "long")).error == "ENAMETOOLONG"
    (twins.local / "there").touch()
    (twins.mounted / "there").touch()
    assert twins.same(lambda place: os.symlink("x", place / "there")).error == "EEXIST"
    assert twins.same(lambda place: os.readlink(place / "there")).error == "EINVAL"


def test_bytes_go_through_a_fifo(twins: Twins) -> None:
    def call(place: Path) -> object:
        os.mkfifo(place / "fifo", 0o640)
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append((place / "fifo").read_bytes()))
        reader.start()
        (place / "fifo").write_bytes(b"through")
        reader.join(10)
        return got, shape(place / "fifo")

    twins.same(call)


def test_a_socket_is_connected_to(folder: Rig) -> None:
    """The path is taken from inside, because the path of a socket must fit into 107 bytes."""
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        here = os.open(folder.mount, os.O_PATH)
        try:
            server.bind(f"/proc/self/fd/{here}/socket")
            server.listen()
            client.connect(f"/proc/self/fd/{here}/socket")
        finally:
            os.close(here)
        client.sendall(b"hello")
        accepted, _ = server.accept()
        with accepted:
            assert accepted.recv(5) == b"hello"

    assert stat.S_ISSOCK((folder.mount / "socket").stat().st_mode)


def test_fifos_and_sockets_stay_here(folder: Rig) -> None:
    os.mkfifo(folder.mount / "fifo")
    os.mknod(folder.mount / "socket", stat.S_IFSOCK | 0o600)

    folder.daemon.sync(folder.mount)
    folder.daemon.refresh(folder.mount)

    assert sorted(os.listdir(folder.mount)) == ["fifo", "socket"]
    assert not folder.root.exists() or listed(folder.root) == []


def test_mknod_makes_a_regular_file(twins: Twins) -> None:
    def call(place: Path) -> object:
        os.mknod(place / "file", stat.S_IFREG | 0o604)
        (place / "file").open("ab").write(b"x")
        return tree(place)

    twins.same(call)


def test_devices_are_refused(twins: Twins) -> None:
    with pytest.raises(PermissionError):
        os.mknod(twins.mounted / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))

    assert os.listdir(twins.mounted) == []


def test_find_sees_every_directory(twins: Twins) -> None:
    """find(1) believes link counts of directories where they are 2 or more; ours must not hide what is below."""

    def call(place: Path) -> object:
        for name in ("a/b/c", "a/d", "e"):
            (place / name).mkdir(parents=True)
            (place / name / "file").touch()
        found = subprocess.run(["find", ".", "-type", "f"], cwd=place, capture_output=True, check=True).stdout
        return sorted(found.split())

    twins.same(call)
