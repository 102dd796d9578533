"""Programs use a mount over each kind of server as a directory, and the server ends up with the same bytes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.mounted import modes
from tests.mounted.conftest import Rig
from tests.mounted.kernel import listed


@pytest.fixture
def folder(webdav: Rig, request: pytest.FixtureRequest) -> Rig:
    """A directory of the test's own, made through the mount."""
    name = request.node.originalname
    (webdav.mount / name).mkdir(exist_ok=True)
    return webdav.below(name)


def assert_safe_and_equal(rig: Rig) -> None:
    rig.daemon.sync(rig.mount)
    assert rig.differences() == []
    assert (rig.status.unsent_files, rig.status.parked, rig.status.conflicts) == (0, 0, 0)


def test_a_created_file_reads_back_and_arrives(folder: Rig) -> None:
    data = os.urandom(300_000)

    (folder.mount / "new.bin").write_bytes(data)

    assert (folder.mount / "new.bin").read_bytes() == data
    assert_safe_and_equal(folder)
    assert (folder.root / "new.bin").read_bytes() == data


def test_an_empty_file_arrives(folder: Rig) -> None:
    (folder.mount / "empty").touch()

    assert_safe_and_equal(folder)
    assert (folder.root / "empty").stat().st_size == 0


def test_a_file_of_the_server_is_read_and_overwritten(folder: Rig) -> None:
    folder.daemon.sync(folder.mount)
    (folder.root / "there.txt").write_bytes(b"from the server\n" * 1000)
    folder.daemon.refresh(folder.mount)

    assert (folder.mount / "there.txt").read_bytes() == b"from the server\n" * 1000
    (folder.mount / "there.txt").write_bytes(b"from the mount\n")

    assert_safe_and_equal(folder)
    assert (folder.root / "there.txt").read_bytes() == b"from the mount\n"


def test_appending_keeps_what_was_there(folder: Rig) -> None:
    file = folder.mount / "log.txt"
    file.write_bytes(b"one\n")
    folder.daemon.sync(folder.mount)

    with file.open("ab") as log:
        log.write(b"two\n")
    with file.open("ab") as log:
        log.write(b"three\n")

    assert_safe_and_equal(folder)
    assert (folder.root / "log.txt").read_bytes() == b"one\ntwo\nthree\n"


def test_writing_in_the_middle_keeps_the_rest(folder: Rig) -> None:
    file = folder.mount / "middle.bin"
    file.write_bytes(b"a" * 500_000)
    folder.daemon.sync(folder.mount)

    with file.open("r+b") as handle:
        handle.seek(123_456)
        handle.write(b"b" * 1000)

    assert_safe_and_equal(folder)
    assert (folder.root / "middle.bin").read_bytes() == b"a" * 123_456 + b"b" * 1000 + b"a" * (500_000 - 124_456)


def test_truncating_shorter_and_longer(folder: Rig) -> None:
    file = folder.mount / "cut.bin"
    file.write_bytes(b"x" * 100_000)
    folder.daemon.sync(folder.mount)

    os.truncate(file, 10)
    assert file.read_bytes() == b"x" * 10
    os.truncate(file, 20)
    assert file.read_bytes() == b"x" * 10 + bytes(10)

    assert_safe_and_equal(folder)
    assert (folder.root / "cut.bin").read_bytes() == b"x" * 10 + bytes(10)


def test_renaming_over_a_file_replaces_it(folder: Rig) -> None:
    (folder.mount / "target").write_bytes(b"old")
    (folder.mount / "source").write_bytes(b"new")
    folder.daemon.sync(folder.mount)

    (folder.mount / "source").rename(folder.mount / "target")

    assert sorted(os.listdir(folder.mount)) == ["target"]
    assert_safe_and_equal(folder)
    assert (folder.root / "target").read_bytes() == b"new"


def test_saving_by_a_temporary_file_replaces_the_target(folder: Rig) -> None:
    (folder.mount / "report.csv").write_bytes(b"old")
    folder.daemon.sync(folder.mount)

    (folder.mount / "report.csv.tmp").write_bytes(b"new\n" * 50)
    (folder.mount / "report.csv.tmp").replace(folder.mount / "report.csv")

    assert_safe_and_equal(folder)
    assert listed(folder.root) == ["report.csv"]


def test_renaming_a_directory_takes_its_files_along(folder: Rig) -> None:
    (folder.mount / "old" / "deep").mkdir(parents=True)
    for number in range(5):
        (folder.mount / "old" / "deep" / f"{number}.txt").write_text(f"{number}\n")
    folder.daemon.sync(folder.mount)
    (folder.mount / "old" / "unsent.txt").write_text("written just before\n")

    with (folder.mount / "old" / "deep" / "0.txt").open("a") as still_open:
        (folder.mount / "old").rename(folder.mount / "new")
        still_open.write("and after\n")

    assert not (folder.mount / "old").exists()
    assert_safe_and_equal(folder)
    assert listed(folder.root) == ["new"]
    assert (folder.root / "new" / "deep" / "0.txt").read_text() == "0\nand after\n"
    assert (folder.root / "new" / "unsent.txt").read_text() == "written just before\n"


def test_removed_files_and_directories_go(folder: Rig) -> None:
    (folder.mount / "sub").mkdir()
    (folder.mount / "sub" / "file").write_text("x")
    (folder.mount / "other").write_text("y")
    folder.daemon.sync(folder.mount)

    with pytest.raises(OSError) as refused:
        (folder.mount / "sub").rmdir()
    (folder.mount / "sub" / "file").unlink()
    (folder.mount / "sub").rmdir()
    (folder.mount / "other").unlink()

    assert refused.value.errno == errno.ENOTEMPTY
    assert os.listdir(folder.mount) == []
    assert_safe_and_equal(folder)
    assert listed(folder.root) == []


def test_what_is_made_and_removed_again_never_travels(folder: Rig) -> None:
    folder.daemon.sync(folder.mount)
    sent = folder.status.bytes_sent

    (folder.mount / "scratch").write_bytes(b"s" * 50_000)
    (folder.mount / "scratch").unlink()

    assert_safe_and_equal(folder)
    assert folder.status.bytes_sent - sent < 50_000


@pytest.mark.parametrize("name", ["with space & ampersand", "naïve—Ünïcode 文件", "percent%20sign#hash?question", "a+b;c=d"])
def test_unusual_names_come_through(folder: Rig, name: str) -> None:
    # The parameter is part of the name, because the folder of the test is shared between its parameters.
    (folder.mount / name).mkdir()
    (folder.mount / name / f"{name}.txt").write_text(name)

    assert_safe_and_equal(folder)
    assert (folder.root / name / f"{name}.txt").read_text() == name


def test_thousands_of_entries_are_listed_with_their_sizes(webdav: Rig) -> None:
    # Once is enough; and rclone reads the directory anew for each of its entries, which would take it minutes.
    count = {"apache": 10_000, "rclone": 200}.get(webdav.name, 1000)
    many = webdav.root / "thousands"
    many.mkdir()
    for number in range(count):
        (many / f"entry-{number:05}").write_bytes(b"z" * (number % 3))
    webdav.daemon.refresh(webdav.mount)

    listed = {entry.name: entry.stat().st_size for entry in os.scandir(webdav.mount / "thousands")}

    assert listed == {f"entry-{number:05}": number % 3 for number in range(count)}


def test_the_directory_of_the_mount_looks_like_a_directory_of_its_user(webdav: Rig) -> None:
    found = webdav.mount.stat()

    assert found.st_mode & 0o700 == 0o700
    assert (found.st_uid, found.st_gid) == modes.OWNER
    assert found.st_nlink >= 1
    assert found.st_mtime > 1_000_000_000


def test_a_tree_copied_in_and_changed_is_the_same_on_the_server(folder: Rig, tmp_path: Path) -> None:
    """Many small operations before anything was sent, as an unpacked archive and a build make them."""
    for number in range(60):
        directory = folder.mount / f"d{number % 6}" / f"e{number % 4}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"f{number}").write_bytes(bytes([number]) * number * 100)
    (folder.mount / "d0").rename(folder.mount / "d5" / "moved")
    (folder.mount / "d1" / "e1").rename(folder.mount / "d0")
    for number in range(2, 60, 7):
        (folder.mount / f"d{number % 6}" / f"e{number % 4}" / f"f{number}").unlink(missing_ok=True)

    assert_safe_and_equal(folder)
