"""The directory backend: the suite, and a folder whose other users are careless or hostile."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from nbmountd.backends import beneath
from nbmountd.backends.directory import CHUNK, UPLOAD_PREFIX, DirectoryBackend
from nbmountd.config import DirectoryOptions
from nbmountd.errors import (
    NameRefused,
    ParentMissing,
    RemoteDenied,
    RemoteError,
    RemoteExists,
    RemoteFull,
    RemoteNotFound,
    RemoteUnavailable,
    VersionMismatch,
)
from nbmountd.model import Attributes, Kind, Place
from tests.backends.suite import (
    NO_ATTRIBUTES,
    BackendSuite,
    Collector,
    FolderOutside,
    Remote,
    free,
    listing,
    read,
    upload,
)

CLOCK_REALTIME_COARSE = 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder


@pytest.fixture
async def remote(folder: Path) -> AsyncIterator[Remote]:
    backend = DirectoryBackend(DirectoryOptions(source=str(folder)))
    yield Remote(backend, await backend.connect(), FolderOutside(folder))
    await backend.aclose()


class TestConformance(BackendSuite):
    pass


# --- paths that leave the folder ---


async def test_a_symlink_in_a_path_is_never_followed(remote: Remote, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (folder / "way").symlink_to(outside)
    (folder / "direct").symlink_to(outside / "secret")
    through = Place(("way", "secret"))
    backend = remote.backend

    for looking in (backend.stat(through), backend.list(Place(("way",))), read(backend, through, None, 0, 6)):
        with pytest.raises((RemoteNotFound, RemoteExists)):
            await looking
    with pytest.raises((RemoteNotFound, VersionMismatch)):
        await read(backend, free("direct"), None, 0, 6)
    for changing in (
        upload(backend, Place(("way", "new")), b"1"),
        backend.make_directory(Place(("way", "new")), NO_ATTRIBUTES),
        backend.make_symlink(Place(("way", "new")), "x", NO_ATTRIBUTES),
        backend.move(through, free("mine"), kind=Kind.FILE, version=None, replaces=None),
        backend.set_attributes(through, Attributes(mode=0o777), kind=Kind.FILE),
    ):
        with pytest.raises((ParentMissing, RemoteNotFound)):
            await changing
    with pytest.raises((RemoteNotFound, VersionMismatch)):
        await backend.set_attributes(free("direct"), Attributes(mode=0o777), kind=Kind.FILE)
    await backend.remove(through, kind=Kind.FILE, version=None)

    assert [child.name for child in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"
    assert (outside / "secret").stat().st_mode & 0o777 != 0o777


@pytest.mark.parametrize("path", [("..",), ("..", "x"), ("a/../../x",), (".",), ("",), ("a", "..", "..", "x"), ("x\0",)])
async def test_names_that_climb_are_refused(remote: Remote, folder: Path, tmp_path: Path, path: tuple[str, ...]) -> None:
    (folder / "a").mkdir()
    (tmp_path / "x").write_bytes(b"secret")

    for looking in (
        remote.backend.stat(Place(path)),
        remote.backend.list(Place(path)),
        read(remote.backend, Place(path), None, 0, 6),
    ):
        with pytest.raises((NameRefused, RemoteNotFound)):
            await looking
    with pytest.raises((NameRefused, ParentMissing)):
        await upload(remote.backend, Place(path), b"mine")

    assert (tmp_path / "x").read_bytes() == b"secret"


async def test_a_directory_swapped_for_a_symlink_during_reads_never_leads_outside(
    remote: Remote, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_bytes(b"secret")
    (folder / "inside").mkdir()
    (folder / "inside" / "file").write_bytes(b"public")
    (folder / "link").symlink_to(tmp_path / "outside")
    seen: set[bytes] = set()
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            for source, target in [("inside", "aside"), ("link", "inside"), ("inside", "link"), ("aside", "inside")]:
                (folder / source).rename(folder / target)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for _ in range(300):
            with suppress(RemoteNotFound):
                seen.add(await read(remote.backend, Place(("inside", "file")), None, 0, 6))
    finally:
        done.set()
        swapper.join()

    assert seen <= {b"public"}


# --- other users ---


async def test_special_files_are_left_out_of_listings_and_said_once(
    remote: Remote, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(folder / "fifo")
    (folder / "file").write_bytes(b"1")

    with trio.fail_after(5):
        assert list(await listing(remote.backend)) == ["file"]
        assert list(await listing(remote.backend)) == ["file"]
        with pytest.raises(RemoteError):
            await remote.backend.stat(free("fifo"))
        with pytest.raises(RemoteError):
            await read(remote.backend, free("fifo"), None, 0, 1)
        with pytest.raises(RemoteExists):
            await upload(remote.backend, free("fifo"), b"1")

    assert [record.getMessage() for record in caplog.records if "fifo" in record.getMessage()] == [
        "'/fifo' is neither file, directory nor symlink: left out of listings"
    ]


async def test_a_listing_survives_names_that_disappear(remote: Remote, folder: Path) -> None:
    kept = {f"kept{number}" for number in range(100)}
    for name in kept:
        (folder / name).write_bytes(b"1")
    done = threading.Event()

    def come_and_go() -> None:
        while not done.is_set():
            for number in range(50):
                (folder / f"brief{number}").write_bytes(b"")
            for number in range(50):
                (folder / f"brief{number}").unlink()

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        for _ in range(30):
            assert set(await listing(remote.backend)) >= kept
    finally:
        done.set()
        other.join()


async def test_a_file_written_in_place_right_after_it_was_listed_has_another_version(
    remote: Remote, folder: Path
) -> None:
    """Same size and same tick of the kernel's clock: without waiting for the next tick this is not seen."""
    for number in range(30):
        (folder / "file").write_bytes(b"%08d" % number)
        entry = (await listing(remote.backend))["file"]
        with (folder / "file").open("r+b") as file:
            file.write(b"%08d" % (number + 1000))

        assert (await remote.backend.stat(free("file"))).version != entry.version
        with pytest.raises(VersionMismatch):
            await read(remote.backend, free("file"), entry.version, 0, 8)


def test_settling_waits_until_a_further_write_would_be_seen(folder: Path) -> None:
    """Kernels from 6.13 on may stamp finely; those before give all writes of one tick the same time."""
    (folder / "file").write_bytes(b"1")
    status = (folder / "file").stat()

    beneath.settle(status)

    assert time.clock_gettime_ns(CLOCK_REALTIME_COARSE) > status.st_ctime_ns
    assert not beneath.settle(status)


def test_settling_does_not_wait_for_the_clock_of_another_machine(folder: Path) -> None:
    class FromTheFuture:
        st_ctime_ns = time.time_ns() + 3600 * 10**9

    assert not beneath.settle(FromTheFuture())  # type: ignore[arg-type]


async def test_a_read_during_writing_in_place_never_mixes(remote: Remote, folder: Path) -> None:
    size = 3 * CHUNK
    (folder / "file").write_bytes(b"a" * size)
    entry = await remote.backend.stat(free("file"))

    def overwrite(got: int) -> None:
        if got == CHUNK:
            with (folder / "file").open("r+b") as file:
                file.write(b"b" * size)

    collector = Collector(overwrite)
    with pytest.raises(VersionMismatch):
        await remote.backend.read(free("file"), entry.version, 0, size, collector)

    assert bytes(collector.content) == b"a" * CHUNK


async def test_an_upload_keeps_mode_owner_and_attributes_of_the_file_it_replaces(remote: Remote, folder: Path) -> None:
    old = await upload(remote.backend, free("file"), b"old", attributes=Attributes(mode=0o640))
    if os.geteuid() == 0:
        os.chown(folder / "file", 12345, 54321)
        old = await remote.backend.stat(free("file"))
    owner = ((folder / "file").stat().st_uid, (folder / "file").stat().st_gid)

    await upload(remote.backend, free("file"), b"new", old.version)

    status = (folder / "file").stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o640, *owner)


async def test_uploads_under_way_are_hidden_and_those_of_the_dead_do_not_hold_a_directory(
    remote: Remote, folder: Path
) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / f"{UPLOAD_PREFIX}0123").write_bytes(b"left by a process that died")
    alive = folder / "sub" / f"{UPLOAD_PREFIX}4567"
    sub = free("sub")

    with alive.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert await remote.backend.list(sub) == []
        with pytest.raises(RemoteExists):
            await remote.backend.remove(sub, kind=Kind.DIRECTORY, version=None)
        assert alive.exists()
    await remote.backend.remove(sub, kind=Kind.DIRECTORY, version=None)

    assert not (folder / "sub").exists()


async def test_the_name_of_an_upload_under_way_cannot_be_taken(remote: Remote) -> None:
    with pytest.raises(NameRefused):
        await upload(remote.backend, free(f"{UPLOAD_PREFIX}x"), b"1")


async def test_a_directory_is_not_moved_into_itself(remote: Remote, folder: Path) -> None:
    (folder / "a" / "b").mkdir(parents=True)

    with pytest.raises(RemoteDenied):
        await remote.backend.move(free("a"), Place(("a", "b", "c")), kind=Kind.DIRECTORY, version=None, replaces=None)


# --- refusals ---


async def test_read_only_refuses_every_change_and_says_so_of_each_entry(folder: Path) -> None:
    (folder / "file").write_bytes(b"1")
    backend = DirectoryBackend(DirectoryOptions(source=str(folder)), read_only=True)
    await backend.connect()

    with pytest.raises(RemoteDenied):
        await upload(backend, free("new"), b"1")
    with pytest.raises(RemoteDenied):
        await backend.remove(free("file"), kind=Kind.FILE, version=None)
    entry = await backend.stat(free("file"))
    await backend.aclose()

    assert (entry.writable, entry.removable) == (False, False)
    assert os.listdir(folder) == ["file"]


async def test_a_folder_that_is_not_there_is_unavailable_not_empty(folder: Path) -> None:
    backend = DirectoryBackend(DirectoryOptions(source=str(folder / "not mounted yet")))

    with pytest.raises(RemoteUnavailable):
        await backend.connect()
    with pytest.raises(RemoteUnavailable):
        await backend.list(Place())
    await backend.aclose()


def test_permissions_are_told_of_and_refused_where_the_process_lacks_them(folder: Path) -> None:
    """In a child that is nobody, as root may do everything."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    folder.chmod(0o755)
    (folder / "locked").mkdir(mode=0o755)
    (folder / "locked" / "mine").write_bytes(b"1")
    (folder / "locked" / "mine").chmod(0o600)
    (folder / "locked" / "open").write_bytes(b"1")
    (folder / "sticky").mkdir()
    (folder / "sticky").chmod(0o1777)
    (folder / "sticky" / "of root").write_bytes(b"1")
    (folder / "sticky" / "of root").chmod(0o666)
    code = textwrap.dedent(
        """
        import os, sys, trio
        from nbmountd.backends.directory import DirectoryBackend
        from nbmountd.config import DirectoryOptions
        from nbmountd.errors import RemoteDenied
        from nbmountd.model import Attributes, Place
        async def main(root):
            backend = DirectoryBackend(DirectoryOptions(source=f"/proc/self/fd/{root}"))
            await backend.connect()
            for name in ("locked", "sticky"):
                for entry in await backend.list(Place((name,))):
                    print(entry.name, entry.writable, entry.removable)
            for verb in (
                backend.read(Place(("locked", "mine")), None, 0, 1, print),
                backend.make_directory(Place(("locked", "new")), Attributes()),
            ):
                try:
                    await verb
                except RemoteDenied:
                    print("denied")
        root = os.open(sys.argv[1], os.O_PATH)  # the directories above it are closed to others
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        trio.run(main, root)
        """
    )

    told = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60, check=False
    )

    assert told.stderr == ""
    assert sorted(told.stdout.splitlines()) == [
        "denied",
        "denied",
        "mine False False",
        "of root True False",
        "open False False",
    ]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EACCES, RemoteDenied),
        (errno.EROFS, RemoteDenied),
        (errno.ENOSPC, RemoteFull),
        (errno.EDQUOT, RemoteFull),
        (errno.ENAMETOOLONG, NameRefused),
        (errno.EILSEQ, NameRefused),
        (errno.ESTALE, RemoteUnavailable),
        (errno.EIO, RemoteUnavailable),
        (errno.ENOTCONN, RemoteUnavailable),
    ],
)
def test_each_errno_has_its_error(code: int, kind: type[RemoteError]) -> None:
    with pytest.raises(kind) as caught:
        with beneath.translated(free("file"), in_doubt=True):
            raise OSError(code, os.strerror(code))

    assert type(caught.value) is kind
    assert caught.value.in_doubt == (kind is RemoteUnavailable)


async def test_a_full_disk_at_home_is_not_a_full_remote(remote: Remote, folder: Path) -> None:
    """An OSError of the sink is the sink's."""
    (folder / "file").write_bytes(b"1")

    def fail(got: int) -> None:
        raise OSError(errno.ENOSPC, "no space here")

    with pytest.raises(OSError, match="no space here"):
        await remote.backend.read(free("file"), None, 0, 1, Collector(fail))


async def test_no_descriptor_is_left_open(remote: Remote, folder: Path) -> None:
    (folder / "fifo-less").mkdir()
    before = len(os.listdir("/proc/self/fd"))

    for number in range(20):
        entry = await upload(remote.backend, free("file"), b"x" * number, None)
        with suppress(RemoteError):
            await upload(remote.backend, free("file"), b"")
        with suppress(RemoteError):
            await read(remote.backend, free("file"), entry.version, 0, 1000)
        with suppress(RemoteError):
            await remote.backend.list(Place(("file", "x")))
        assert entry.version is not None
        entry = await remote.backend.write_ranges(
            free("file"), [], number + 5, replaces=entry.version, attributes=NO_ATTRIBUTES
        )
        await remote.backend.remove(free("file"), kind=Kind.FILE, version=entry.version)

    assert len(os.listdir("/proc/self/fd")) == before
