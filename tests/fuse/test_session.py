"""The session on real mounts: requests of every size, workers that die, older kernels."""

from __future__ import annotations

import base64
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from nbmountd.fuse import mounting
from nbmountd.fuse.agreement import ALL_FLAGS, DECISIONS, Flag, agree

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse"),
]

ROOT = Path(__file__).parents[2]


class Server:
    """A process that serves `mounted`."""

    def __init__(self, mounted: mounting.Mounted, backing: Path, *, resume: bool = False) -> None:
        self.control, theirs = socket.socketpair()
        self.control.settimeout(10)
        with theirs:
            agreement = base64.b64encode(pickle.dumps(mounted.agreement)).decode()
            command = [sys.executable, "-m", "tests.fuse.serve_tinyfs"]
            fds = (mounted.fuse_fd, theirs.fileno())
            arguments = [*map(str, fds), str(backing), str(resume), agreement]
            self.process = subprocess.Popen([*command, *arguments], pass_fds=fds, cwd=ROOT)
        assert self.control.recv(1) == b"r"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.control.close()

    def stop(self) -> str:
        self.control.send(b"s")
        ending = self.control.recv(100).decode()
        self.process.wait(10)
        self.control.close()
        return ending


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    directory = tmp_path / "backing"
    directory.mkdir()
    return directory


@contextmanager
def mounted_at(path: Path, *, only: Flag = ALL_FLAGS) -> Iterator[mounting.Mounted]:
    mounted = mounting.mount(str(path), "tiny", uid=0, gid=0, only=only)
    try:
        yield mounted
    finally:
        mounting.unmount(str(path))
        mounted.close()


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[mounting.Mounted]:
    with mounted_at(tmp_path / "m") as mounted:
        yield mounted


@pytest.fixture
def server(mounted: mounting.Mounted, backing: Path) -> Iterator[Server]:
    server = Server(mounted, backing)
    yield server
    if server.process.poll() is None:
        server.kill()


def counts(mounted: mounting.Mounted) -> dict[str, int]:
    return json.loads((Path(mounted.path) / "counts").read_bytes())


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.005)


@pytest.mark.parametrize("size", [1, 4096, 128 * 1024, 1024 * 1024, 3 * 1024 * 1024 + 5])
def test_bytes_come_back_as_they_were_written(mounted: mounting.Mounted, server: Server, size: int) -> None:
    content = os.urandom(size)
    file = Path(mounted.path) / "f"

    file.write_bytes(content)

    assert file.read_bytes() == content
    assert server.stop() == "stopped"


def test_one_request_carries_a_mebibyte(mounted: mounting.Mounted, server: Server) -> None:
    buffer = _page_aligned(1024 * 1024)

    with (Path(mounted.path) / "f").open("wb", buffering=0) as file:
        file.write(buffer)

    assert counts(mounted)["largest write"] == 1024 * 1024
    assert counts(mounted)["write"] == 1


def test_writes_are_not_preceded_by_getxattr(mounted: mounting.Mounted, server: Server) -> None:
    with (Path(mounted.path) / "f").open("wb", buffering=0) as file:
        for _ in range(200):
            file.write(b"x" * 4096)

    seen = counts(mounted)
    assert seen["write"] == 200
    assert seen.get("getxattr", 0) <= 2  # the truncating open and the first write


def test_without_killpriv_v2_a_mount_works_but_asks_before_each_write(tmp_path: Path, backing: Path) -> None:
    with mounted_at(tmp_path / "m", only=ALL_FLAGS & ~Flag.HANDLE_KILLPRIV_V2) as mounted:
        server = Server(mounted, backing)
        with (Path(mounted.path) / "f").open("wb", buffering=0) as file:
            for _ in range(20):
                file.write(b"x" * 4096)

        assert counts(mounted)["getxattr"] >= 20
        server.kill()


OLDER = {
    "Linux 4.19": Flag(sum(flag for flag in Flag if flag < Flag.MAX_PAGES)),
    "Linux 5.4": Flag(sum(flag for flag in Flag if flag < Flag.MAP_ALIGNMENT)),
    "Linux 6.1": Flag(sum(flag for flag in Flag if flag <= Flag.HAS_INODE_DAX)),
}


@pytest.mark.parametrize("only", OLDER.values(), ids=OLDER)
def test_an_older_kernel_is_served_all_the_same(tmp_path: Path, backing: Path, only: Flag) -> None:
    content = os.urandom(2 * 1024 * 1024)
    with mounted_at(tmp_path / "m", only=only) as mounted:
        server = Server(mounted, backing)
        file = Path(mounted.path) / "f"

        file.write_bytes(content)

        assert file.read_bytes() == content
        assert sorted(os.listdir(mounted.path)) == ["burn", "counts", "f", "gate"]
        assert counts(mounted)["largest write"] <= mounted.agreement.max_write
        assert not mounted.agreement.has_resend
        assert server.stop() == "stopped"


def test_a_read_that_a_killed_server_had_taken_is_answered_by_the_next(
    mounted: mounting.Mounted, server: Server, backing: Path
) -> None:
    assert mounted.agreement.has_resend, "this test needs Linux 6.9"
    client = subprocess.Popen(["cat", f"{mounted.path}/gate"], stdout=subprocess.PIPE)
    wait_for((backing / "taken").exists, "read in the server's hands")

    server.kill()
    (backing / "open").touch()
    successor = Server(mounted, backing, resume=True)

    assert client.communicate(timeout=10)[0] == b"open"
    assert client.returncode == 0
    assert successor.stop() == "stopped"


WRITER = """
import os, sys
with open(sys.argv[1], "r+b", buffering=0) as file:
    for number in range(int(sys.argv[2])):
        assert file.write(number.to_bytes(4096, "big")) == 4096
        if number % 50 == 0:
            os.fsync(file.fileno())
    file.seek(0)
    for number in range(int(sys.argv[2])):
        assert int.from_bytes(file.read(4096), "big") == number, number
"""


def test_a_writer_sees_no_error_when_servers_are_killed_under_it(
    mounted: mounting.Mounted, server: Server, backing: Path
) -> None:
    assert mounted.agreement.has_resend, "this test needs Linux 6.9"
    client = subprocess.Popen([sys.executable, "-c", WRITER, f"{mounted.path}/f", "10000"])
    for kills in (1, 2, 3):
        wait_for(lambda: (backing / "f").stat().st_size > kills * 2_000_000, "progress of the writer")  # noqa: B023
        assert client.poll() is None
        server.kill()
        server = Server(mounted, backing, resume=True)

    assert client.wait(60) == 0
    assert (backing / "f").stat().st_size == 10000 * 4096
    assert server.stop() == "stopped"


def test_stop_answers_what_was_taken_and_leaves_the_rest_to_the_next(
    mounted: mounting.Mounted, server: Server, backing: Path
) -> None:
    client = subprocess.Popen(["cat", f"{mounted.path}/gate"], stdout=subprocess.PIPE)
    wait_for((backing / "taken").exists, "read in the server's hands")
    server.control.send(b"s")
    later = subprocess.Popen(["cat", f"{mounted.path}/counts"], stdout=subprocess.PIPE)
    (backing / "open").touch()

    assert client.communicate(timeout=10)[0] == b"open"
    server.process.wait(10)
    with Server(mounted, backing).control:  # no resume: nothing was lost, so nothing needs to be sent again
        assert b"read" in later.communicate(timeout=10)[0]


def test_stop_ends_under_constant_load_and_loses_no_request(
    mounted: mounting.Mounted, server: Server, backing: Path
) -> None:
    clients = [subprocess.Popen([sys.executable, "-c", WRITER, f"{mounted.path}/f", "3000"]) for _ in range(3)]
    for _ in range(5):
        server.control.send(b"s")
        server.process.wait(10)
        server = Server(mounted, backing)

    assert [client.wait(60) for client in clients] == [0, 0, 0]
    server.kill()


def test_serve_says_when_the_mount_is_gone(mounted: mounting.Mounted, server: Server) -> None:
    assert os.listdir(mounted.path)

    mounting.unmount(mounted.path)

    assert server.control.recv(100) == b"unmounted"
    assert server.process.wait(10) == 0


READ_AND_HOLD = "import os, sys, time; os.read(os.open(sys.argv[1], 0), 4); time.sleep(60)"  # closing would be a request


def test_a_read_of_the_device_that_lost_its_request_does_not_stop_the_server(
    mounted: mounting.Mounted, server: Server, backing: Path
) -> None:
    """A client dies between our poll and our read: in every second round, as a task that blocks the loop may run first."""
    for _ in range(5):
        (backing / "taken").unlink(missing_ok=True)
        burner = subprocess.Popen([sys.executable, "-c", READ_AND_HOLD, f"{mounted.path}/burn"])
        wait_for((backing / "taken").exists, "blocked loop")
        doomed = subprocess.Popen(["cat", f"{mounted.path}/f"], stdout=subprocess.DEVNULL)
        time.sleep(0.35)
        doomed.kill()
        doomed.wait()

        server.control.send(b"p")  # over a socket, because a request would wake it
        assert server.control.recv(1) == b"p"
        burner.kill()
        burner.wait()


def test_every_flag_has_a_decision_and_what_libfuse_cannot_parse_is_never_asked_for() -> None:
    assert set(DECISIONS) == set(Flag)
    refused = Flag.SETXATTR_EXT | Flag.SECURITY_CTX | Flag.CREATE_SUPP_GROUP | Flag.OVER_IO_URING
    assert agree(45, ALL_FLAGS, 131072).flags & refused == Flag(0)


def test_only_what_the_kernel_offers_is_asked_for() -> None:
    for flag in Flag:
        assert agree(38, flag, 131072).flags in (Flag(0), flag)


async def test_a_process_serves_one_mount_at_most(mounted: mounting.Mounted, backing: Path) -> None:
    from nbmountd.fuse import session
    from tests.fuse.tinyfs import TinyOperations

    async with trio.open_nursery() as nursery:

        async def serve(*, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            await session.serve(
                TinyOperations(backing), mounted.fuse_fd, mounted.agreement, resume=False, task_status=task_status
            )

        await nursery.start(serve)
        with pytest.raises(RuntimeError, match="already"):
            await session.serve(TinyOperations(backing), mounted.fuse_fd, mounted.agreement, resume=False)
        session.stop()


async def test_pages_pushed_by_notify_store_are_read_without_a_request(mounted: mounting.Mounted, backing: Path) -> None:
    from nbmountd.fuse import session
    from tests.fuse.tinyfs import TinyOperations

    (backing / "f").write_bytes(b"remote" * 10000)
    operations = TinyOperations(backing)
    file = Path(mounted.path) / "f"
    async with trio.open_nursery() as nursery:

        async def serve(*, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            await session.serve(operations, mounted.fuse_fd, mounted.agreement, resume=False, task_status=task_status)

        await nursery.start(serve)
        await trio.to_thread.run_sync(file.stat)
        await trio.to_thread.run_sync(session.notify_store, 2, 0, b"pushed" * 10000)
        assert await trio.to_thread.run_sync(file.read_bytes) == b"pushed" * 10000
        assert operations.counts["read"] == 0
        await trio.to_thread.run_sync(lambda: session.invalidate_inode(2, offset=0))
        assert await trio.to_thread.run_sync(file.read_bytes) == b"remote" * 10000
        with pytest.raises(OSError, match="No such file"):
            await trio.to_thread.run_sync(session.invalidate_entry, 1, b"nobody")
        await trio.to_thread.run_sync(session.notify_delete, 1, 2, b"f")
        session.stop()


def _page_aligned(size: int) -> memoryview:
    import mmap

    return memoryview(mmap.mmap(-1, size))


