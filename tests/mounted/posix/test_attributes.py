"""chmod, chown, utimes, truncate in all combinations, and which times each operation moves."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounted import modes
from tests.mounted.posix.twins import Twins, moved_times, owner, shape

UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
AT_FDCWD, AT_SYMLINK_NOFOLLOW = -100, 0x100
OLD = 1_000_000_000_123_456_789
libc = ctypes.CDLL(None, use_errno=True)


class Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def utimensat(path: Path, atime: tuple[int, int], mtime: tuple[int, int], flags: int = 0) -> None:
    """utimensat(2), which Python offers without UTIME_NOW and UTIME_OMIT."""
    times = (Timespec * 2)(Timespec(*atime), Timespec(*mtime))
    if libc.utimensat(AT_FDCWD, os.fsencode(path), times, flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def set_by_descriptor(path: Path, flags: int, change: Callable[[int], object]) -> None:
    fd = os.open(path, flags)
    try:
        change(fd)
    finally:
        os.close(fd)


OTHERS_MOUNT = pytest.mark.skipif(modes.MODE == "drop", reason="a write to a user's mount takes suid and sgid away, root's too")

CHANGES: dict[str, Callable[[Path], object]] = {
    "chmod 0600": lambda path: path.chmod(0o600),
    "chmod 0444": lambda path: path.chmod(0o444),
    "chmod 06755": lambda path: path.chmod(0o6755),
    "fchmod 0711": lambda path: set_by_descriptor(path, os.O_RDONLY, lambda fd: os.fchmod(fd, 0o711)),
    "chown to oneself": lambda path: os.chown(path, *owner(path)),
    "chown of nothing": lambda path: os.chown(path, -1, -1),
    "lchown to oneself": lambda path: os.chown(path, owner(path)[0], -1, follow_symlinks=False),
    "utimes": lambda path: os.utime(path, ns=(OLD, OLD + 1)),
    "futimes": lambda path: set_by_descriptor(path, os.O_RDONLY, lambda fd: os.utime(fd, ns=(OLD + 2, OLD + 3))),
    "mtime only": lambda path: utimensat(path, (0, UTIME_OMIT), (1_600_000_000, 5)),
    "no time at all": lambda path: utimensat(path, (0, UTIME_OMIT), (0, UTIME_OMIT)),
    "before 1970": lambda path: os.utime(path, ns=(0, -1_500_000_000)),
    "truncate to 3": lambda path: os.truncate(path, 3),
    "truncate to 100000": lambda path: os.truncate(path, 100_000),
    "truncate to nothing": lambda path: os.truncate(path, 0),
    "truncate to the same": lambda path: os.truncate(path, path.stat().st_size),
    "truncate below nothing": lambda path: os.truncate(path, -1),
    "ftruncate to 7": lambda path: set_by_descriptor(path, os.O_WRONLY, lambda fd: os.ftruncate(fd, 7)),
    "ftruncate for reading": lambda path: set_by_descriptor(path, os.O_RDONLY, lambda fd: os.ftruncate(fd, 7)),
}
if modes.MODE == "drop":
    del CHANGES["chmod 06755"]  # see `OTHERS_MOUNT`


def settled(path: Path) -> object:
    """What must be equal after changes with fixed values: the times too, unless they are of this moment."""
    found = path.stat()
    recent = time.time_ns() - 3600 * 10**9
    content = path.read_bytes() if path.is_file() else None
    return shape(path), "now" if found.st_mtime_ns > recent else found.st_mtime_ns, content


@pytest.mark.parametrize("kind", ["file", "directory", "through a symlink"])
def test_every_pair_of_changes_leaves_what_it_leaves_locally(kind: str, twins: Twins) -> None:
    def pair(first: Callable[[Path], object], second: Callable[[Path], object]) -> Callable[[Path], object]:
        def call(place: Path) -> object:
            path = place / "object"
            if kind == "directory":
                path.mkdir()
            elif kind == "file":
                path.write_bytes(b"content of the file")
            else:
                (place / "target").write_bytes(b"content of the file")
                path.symlink_to("target")
            said = []
            for change in (first, second):
                try:
                    change(path)
                except OSError as exc:
                    said.append(exc.errno)
            return said, settled(path)

        return call

    calls = {
        f"{first}, then {second}": pair(CHANGES[first], CHANGES[second])
        for first, second in itertools.product(CHANGES, CHANGES)
        if kind != "through a symlink" or CHANGES[first] is CHANGES[second]
    }

    assert twins.differences(calls) == []


@pytest.mark.parametrize("atime", [(5, 6), (0, UTIME_OMIT), (0, UTIME_NOW)])
@pytest.mark.parametrize("mtime", [(1_234_567_890, 987_654_321), (0, UTIME_OMIT), (0, UTIME_NOW)])
@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_utimensat_with_now_and_omit(twins: Twins, kind: str, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    def call(place: Path) -> object:
        path = place / "object"
        if kind == "file":
            path.write_bytes(b"x")
        elif kind == "directory":
            path.mkdir()
        else:
            path.symlink_to("nowhere")
        os.utime(path, ns=(OLD, OLD), follow_symlinks=False)
        began = time.time_ns()
        utimensat(path, atime, mtime, AT_SYMLINK_NOFOLLOW)
        found = path.lstat()
        return "now" if abs(found.st_mtime_ns - began) < 10**10 else found.st_mtime_ns

    twins.same(call)


def test_the_access_time_that_a_program_sets_is_the_one_it_reads(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "file").write_bytes(b"x")
        os.utime(place / "file", ns=(OLD, OLD + 77))
        found = (place / "file").stat()
        return found.st_atime_ns, found.st_mtime_ns

    twins.same(call)


def test_times_have_nanoseconds_and_stay_after_the_upload(twins: Twins, folder) -> None:  # type: ignore[no-untyped-def]
    path = twins.mounted / "file"
    path.write_bytes(b"x")
    os.utime(path, ns=(OLD, OLD))
    written = twins.mounted / "written"
    written.write_bytes(b"y")
    its_time = written.stat().st_mtime_ns

    folder.daemon.sync(folder.mount)
    folder.daemon.refresh(folder.mount)

    assert path.stat().st_mtime_ns == OLD
    assert written.stat().st_mtime_ns == its_time


OPERATIONS: dict[str, Callable[[Path], object]] = {
    "write": lambda path: path.open("r+b", buffering=0).write(b"new"),
    "append": lambda path: path.open("ab", buffering=0).write(b"new"),
    "open to write and close": lambda path: os.close(os.open(path, os.O_WRONLY)),
    "open with O_TRUNC": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
    "truncate shorter": lambda path: os.truncate(path, 1),
    "truncate longer": lambda path: os.truncate(path, 1000),
    "truncate to the same size": lambda path: os.truncate(path, 7),
    "read": lambda path: path.read_bytes(),
    "chmod": lambda path: path.chmod(0o640),
    "chmod to the same": lambda path: path.chmod(0o644),
    "chown to oneself": lambda path: os.chown(path, *owner(path)),
    "utimes": lambda path: os.utime(path, ns=(OLD, OLD)),
    "setxattr": lambda path: os.setxattr(path, "user.colour", b"blue"),
    "rename": lambda path: (path.rename(path.with_name("other")), path.with_name("other").rename(path)),
    "write of nothing": lambda path: set_by_descriptor(path, os.O_WRONLY, lambda fd: os.write(fd, b"")),
    "a new name": lambda path: os.link(path, path.with_name("second")),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_moves_the_times_of_a_file_as_it_does_locally(name: str, twins: Twins) -> None:
    def call(place: Path) -> object:
        path = place / "file"
        path.write_bytes(b"content")
        path.chmod(0o644)
        return moved_times(path, lambda: OPERATIONS[name](path))

    twins.same(call)


IN_DIRECTORY: dict[str, Callable[[Path], object]] = {
    "create": lambda place: (place / "new").touch(),
    "mkdir": lambda place: (place / "new").mkdir(),
    "symlink": lambda place: (place / "new").symlink_to("x"),
    "mkfifo": lambda place: os.mkfifo(place / "new"),
    "unlink": lambda place: (place / "file").unlink(),
    "rmdir": lambda place: (place / "sub").rmdir(),
    "rename inside": lambda place: (place / "file").rename(place / "renamed"),
    "rename into a directory below": lambda place: (place / "file").rename(place / "sub" / "file"),
    "rename over": lambda place: (place / "file").rename(place / "second"),
    "write into a file": lambda place: (place / "file").write_bytes(b"changed"),
    "chmod of a file": lambda place: (place / "file").chmod(0o600),
    "create below": lambda place: (place / "sub" / "new").touch(),
    "list": lambda place: os.listdir(place),
    "chmod of itself": lambda place: place.chmod(0o700),
}


@pytest.mark.parametrize("name", IN_DIRECTORY)
def test_an_operation_moves_the_times_of_its_directory_as_it_does_locally(name: str, twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "file").write_bytes(b"x")
        (place / "second").write_bytes(b"y")
        (place / "sub").mkdir()
        return moved_times(place, lambda: IN_DIRECTORY[name](place))

    twins.same(call)


@pytest.mark.skipif(os.geteuid() == 0, reason="root keeps the bits; the next test does this as somebody else")
def test_writing_takes_suid_and_sgid_away(twins: Twins) -> None:
    twins.same(write_into_suid)


def write_into_suid(place: Path) -> object:
    (place / "program").write_bytes(b"#!/bin/sh\n")
    (place / "program").chmod(0o6755)
    with (place / "program").open("ab") as file:
        file.write(b"exit 0\n")
    return shape(place / "program")


@OTHERS_MOUNT
def test_root_keeps_suid_and_a_chown_takes_it_away_as_locally(twins: Twins) -> None:
    def chown(place: Path) -> object:
        (place / "file").write_bytes(b"x")
        (place / "file").chmod(0o6755)
        os.chown(place / "file", *owner(place / "file"))
        return shape(place / "file")

    twins.same(chown)
    twins.same(write_into_suid)


def test_somebody_elses_ownership_is_refused_and_changes_nothing(twins: Twins) -> None:
    path = twins.mounted / "file"
    path.write_bytes(b"x")
    before = shape(path)

    with pytest.raises(PermissionError):
        os.chown(path, owner(path)[0] + 1234, -1)

    assert shape(path) == before


def test_access_answers_from_the_mode(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "file").write_bytes(b"x")
        said = []
        for mode in (0o000, 0o444, 0o200, 0o755):
            (place / "file").chmod(mode)
            said += [os.access(place / "file", how) for how in (os.F_OK, os.R_OK, os.W_OK, os.X_OK)]
            with contextlib.suppress(FileNotFoundError):
                said.append(os.access(place / "none", os.F_OK))
        return said

    twins.same(call)


def test_a_script_with_the_executable_bit_runs_and_one_without_does_not(twins: Twins) -> None:
    import subprocess

    def call(place: Path) -> object:
        script = place / "script"
        script.write_text("#!/bin/sh\necho ran\n")
        script.chmod(0o755)
        ran = subprocess.run([script], capture_output=True, check=True).stdout
        script.chmod(0o644)
        return ran, os.access(script, os.X_OK), subprocess.run([script]).returncode

    assert twins.same(call).error == "EACCES"


@pytest.mark.parametrize("how", ["open with O_TRUNC", "truncate"])
def test_emptying_an_empty_file_moves_its_time(twins: Twins, how: str) -> None:
    """`: > stamp` is how a shell touches a file, and make looks at it."""

    def call(place: Path) -> object:
        path = place / "stamp"
        path.touch()
        if how == "truncate":
            return moved_times(path, lambda: os.truncate(path, 0))
        return moved_times(path, lambda: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)))

    assert twins.same(call).value == (True, True)
