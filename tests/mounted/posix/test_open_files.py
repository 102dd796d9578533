"""What is open stays what it is: removed, renamed, appended to by many, locked, unnamed."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.mounted.conftest import Rig
from tests.mounted.posix.twins import Twins, shape, tree


def python(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def test_a_removed_file_is_read_and_written_through_its_descriptor(twins: Twins) -> None:
    def call(place: Path) -> object:
        with (place / "file").open("w+b", buffering=0) as file:
            file.write(b"before ")
            (place / "file").unlink()
            names = os.listdir(place)
            file.write(b"and after")
            os.fsync(file.fileno())
            os.ftruncate(file.fileno(), 12)
            os.fchmod(file.fileno(), 0o600)
            found = os.fstat(file.fileno())
            return names, os.pread(file.fileno(), 100, 0), found.st_size, found.st_nlink, oct(found.st_mode)

    twins.same(call)


def test_a_removed_file_of_the_server_keeps_its_bytes_for_who_has_it_open(folder: Rig) -> None:
    content = os.urandom(500_000)
    (folder.mount / "file").write_bytes(content)
    folder.daemon.sync(folder.mount)

    with (folder.mount / "file").open("rb", buffering=0) as file:
        (folder.mount / "file").unlink()
        folder.daemon.sync(folder.mount)
        assert not (folder.root / "file").exists()
        assert file.read() == content


def test_the_name_of_a_removed_open_file_is_taken_by_another(twins: Twins) -> None:
    def call(place: Path) -> object:
        with (place / "name").open("w+b", buffering=0) as old:
            old.write(b"old")
            (place / "name").unlink()
            with (place / "name").open("w+b", buffering=0) as new:
                new.write(b"new")
                old.write(b" still")
                return os.pread(old.fileno(), 99, 0), os.pread(new.fileno(), 99, 0), tree(place)

    twins.same(call)


def test_a_file_renamed_over_lives_on_for_who_has_it_open(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "target").write_bytes(b"old content")
        with (place / "target").open("r+b", buffering=0) as old:
            (place / "new").write_bytes(b"new content")
            (place / "new").rename(place / "target")
            old.write(b"OLD")
            return os.pread(old.fileno(), 99, 0), os.fstat(old.fileno()).st_nlink, tree(place)

    twins.same(call)


def test_files_stay_open_while_the_directories_above_are_renamed(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "a" / "b").mkdir(parents=True)
        with (place / "a" / "b" / "file").open("w+b", buffering=0) as file:
            directory = os.open(place / "a" / "b", os.O_RDONLY)
            file.write(b"one ")
            (place / "a").rename(place / "c")
            file.write(b"two ")
            (place / "c" / "b").rename(place / "d")
            file.write(b"three")
            second = os.open("second", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=directory)
            os.write(second, b"beside it")
            os.close(second)
            os.close(directory)
            return os.pread(file.fileno(), 99, 0), tree(place)

    twins.same(call)


def test_a_removed_directory_takes_nothing_new(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "gone").mkdir()
        directory = os.open(place / "gone", os.O_RDONLY)
        try:
            (place / "gone").rmdir()
            listed = os.listdir(directory)
            assert listed == []
            return os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=directory)
        finally:
            os.close(directory)

    assert twins.same(call).error == "ENOENT"


def test_appending_from_several_processes_loses_no_line(folder: Rig) -> None:
    code = """if True:
        import os, sys
        fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        sys.stdin.readline()
        for number in range(300):
            os.write(fd, f"{sys.argv[2]} {number} {'x' * (number % 50)}\\n".encode())
    """
    writers = [python(code, folder.mount / "log", name) for name in "abcd"]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0

    lines = (folder.mount / "log").read_text().splitlines()

    assert sorted(lines) == sorted(f"{name} {number} {'x' * (number % 50)}" for name in "abcd" for number in range(300))
    for name in "abcd":
        own = [line for line in lines if line.startswith(name)]
        assert own == [f"{name} {number} {'x' * (number % 50)}" for number in range(300)]


def test_an_appending_descriptor_writes_at_the_end_wherever_it_was(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "file").write_bytes(b"start ")
        fd = os.open(place / "file", os.O_RDWR | os.O_APPEND)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"one ")
        (place / "file").open("ab").write(b"other ")
        os.pwrite(fd, b"two", 0)
        os.truncate(place / "file", 3)
        os.write(fd, b"END")
        os.close(fd)
        return (place / "file").read_bytes()

    twins.same(call)


def test_a_file_without_a_name_is_made_another_way(folder: Rig) -> None:
    """O_TMPFILE is not offered by FUSE; tempfile and others fall back when the errno is one of these."""
    with pytest.raises(OSError) as refused:
        os.open(folder.mount, os.O_TMPFILE | os.O_RDWR)
    with tempfile.TemporaryFile(dir=folder.mount) as file:
        file.write(b"nobody sees it")
        file.seek(0)
        assert file.read() == b"nobody sees it"
        assert os.listdir(folder.mount) == []

    assert refused.value.errno in (errno.EOPNOTSUPP, errno.EISDIR)


@pytest.mark.parametrize("lock", ["flock", "fcntl", "open file description"])
def test_a_lock_keeps_another_process_out_until_it_is_given_back(folder: Rig, lock: str) -> None:
    code = """if True:
        import fcntl, struct, sys
        how, path = sys.argv[1:]
        file = open(path, "r+b")
        def take():
            try:
                if how == "flock":
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                elif how == "fcntl":
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                else:
                    fcntl.fcntl(file, 37, struct.pack("hhqqi", fcntl.F_WRLCK, 0, 0, 0, 0))
                return "taken"
            except OSError:
                return "refused"
        for _ in sys.stdin:
            print(take(), flush=True)
    """
    path = folder.mount / "locked"
    path.write_bytes(b"x")
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX) if lock == "flock" else fcntl.lockf(file, fcntl.LOCK_EX)
        with python(code, lock, path) as other:
            assert other.stdin is not None and other.stdout is not None
            other.stdin.write(b"?\n")
            other.stdin.flush()
            while_held = other.stdout.readline()
            fcntl.flock(file, fcntl.LOCK_UN) if lock == "flock" else fcntl.lockf(file, fcntl.LOCK_UN)
            other.stdin.write(b"?\n")
            other.stdin.flush()
            afterwards = other.stdout.readline()

    assert (while_held, afterwards) == (b"refused\n", b"taken\n")


def test_what_another_process_writes_is_seen_at_once(folder: Rig) -> None:
    path = folder.mount / "shared"
    path.write_bytes(b"before")
    with path.open("rb", buffering=0) as file:
        assert file.read() == b"before"
        subprocess.run([sys.executable, "-c", f"open({str(path)!r}, 'ab').write(b' after')"], check=True)

        assert os.fstat(file.fileno()).st_size == 12
        assert os.pread(file.fileno(), 99, 0) == b"before after"


def test_many_descriptors_of_one_file_are_one_file(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "file").write_bytes(b"." * 100)
        files = [(place / "file").open("r+b", buffering=0) for _ in range(50)]
        for number, file in enumerate(files):
            file.seek(number)
            file.write(bytes([65 + number % 26]))
        contents = {file.read() if file.seek(0) == 0 else b"" for file in files}
        for file in files:
            file.close()
        return len(contents), (place / "file").read_bytes(), shape(place / "file")

    twins.same(call)
