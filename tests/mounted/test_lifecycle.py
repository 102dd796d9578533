"""Stopping is ordered and bounded; being killed loses nothing and is not an event for programs."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted.conftest import Rig, directory_mount, webdav_mount
from tests.mounted.harness import Daemon
from tests.mounted.kernel import eventually, listed, mounts_below, processes_of
from tests.servers import ServerProcess, WsgiDAVServer

NEVER = 3600.0
"""A `write_back_delay` at which nothing is sent by itself during a test, in seconds."""


@pytest.fixture
def unsent(apache_server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A daemon of the test's own, over Apache, that sends nothing by itself."""
    name = str(request.node.name).replace("[", "-").rstrip("]")
    root = apache_server.root / name
    root.mkdir()
    daemon = Daemon({"dav": {**webdav_mount(apache_server, f"{name}/"), "write_back_delay": NEVER}})
    try:
        daemon.start()
        yield Rig(daemon, "dav", daemon.path("dav"), root)
    finally:
        daemon.discard()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_unmounts_and_leaves_nothing(unsent: Rig, number: signal.Signals) -> None:
    (unsent.mount / "folder").mkdir()
    (unsent.mount / "folder" / "written.txt").write_text("written just before the signal")
    assert listed(unsent.root) == []

    status = unsent.daemon.terminate(number)

    assert status == 0
    assert (unsent.root / "folder" / "written.txt").read_text() == "written just before the signal"
    assert os.listdir(unsent.mount) == []


def test_a_signal_stops_although_files_are_open_in_the_mount(unsent: Rig) -> None:
    with (unsent.mount / "open.txt").open("w") as opened:
        opened.write("written\n")
        opened.flush()
        inside = os.open(unsent.mount, os.O_DIRECTORY)

        status = unsent.daemon.terminate(within=30)

        os.close(inside)
        # A daemon that is gone cannot answer this close; what matters is that the written bytes are kept or sent.
        with contextlib.suppress(OSError):
            opened.close()
    assert status == 0
    unsent.daemon.start()
    assert (unsent.mount / "open.txt").read_text() == "written\n"


@pytest.mark.expects_log("offline|timeout|time limit|not answer|degraded|retry|drain|left|unsent|deadline")
def test_a_stop_without_the_server_is_bounded_and_the_rest_is_sent_at_the_next_start(tmp_path: Path) -> None:
    with WsgiDAVServer(tmp_path / "dav", tmp_path / "work") as server:
        daemon = Daemon({"dav": {**webdav_mount(server), "request_timeout": 2.0}}, drain_timeout=3.0)
        try:
            daemon.start()
            os.listdir(daemon.path("dav"))
            server.freeze()
            (daemon.path("dav") / "kept.txt").write_text("not lost")

            started = time.monotonic()
            daemon.terminate(within=30)
            took = time.monotonic() - started
            server.thaw()
            daemon.start()
            daemon.sync()

            assert took < 3.0 + 5.0
            assert (server.root / "kept.txt").read_text() == "not lost"
        finally:
            server.thaw()
            daemon.discard()


@pytest.mark.expects_log("worker|restart|ended|died|killed|signal")
def test_files_stay_open_and_go_on_over_a_killed_worker(unsent: Rig) -> None:
    (unsent.root / "remote.bin").write_bytes(bytes(range(256)) * 4096)
    unsent.daemon.refresh(unsent.mount)
    with (
        (unsent.mount / "growing.txt").open("wb", buffering=0) as writer,
        (unsent.mount / "remote.bin").open("rb", buffering=0) as reader,
    ):
        writer.write(b"before\n")
        assert os.pread(reader.fileno(), 256, 0) == bytes(range(256))

        killed = unsent.daemon.kill_worker("dav")
        writer.write(b"after\n")
        os.fsync(writer.fileno())

        assert os.pread(reader.fileno(), 256, 1024 * 1023) == bytes(range(256))
        assert (unsent.mount / "growing.txt").read_bytes() == b"before\nafter\n"
    status = unsent.daemon.wait_for_state("dav", "live")
    unsent.daemon.sync()

    assert status.pid != killed
    assert status.restarts == 1
    assert (unsent.root / "growing.txt").read_bytes() == b"before\nafter\n"


@pytest.mark.expects_log("worker|restart|ended|died|killed|signal")
def test_a_program_that_writes_all_along_does_not_notice_killed_workers(unsent: Rig) -> None:
    done = threading.Event()
    failures: list[OSError] = []
    lines = 0

    def write_lines() -> None:
        nonlocal lines
        with (unsent.mount / "steady.log").open("wb", buffering=0) as log:
            while not done.is_set():
                try:
                    log.write(f"line {lines}\n".encode())
                    os.fsync(log.fileno())
                except OSError as error:
                    failures.append(error)
                    return
                lines += 1

    writer = threading.Thread(target=write_lines)
    writer.start()
    for _ in range(2):
        progress = lines
        eventually(lambda seen=progress: lines > seen + 5, 20, "lines are written")  # type: ignore[misc]
        unsent.daemon.kill_worker("dav")
    progress = lines
    eventually(lambda: lines > progress + 5, 20, "lines are written again")
    done.set()
    writer.join(30)
    unsent.daemon.sync()

    assert failures == []
    assert (unsent.root / "steady.log").read_text().splitlines() == [f"line {number}" for number in range(lines)]


@pytest.mark.expects_log("worker|restart|ended|died|killed|signal|dead|supervisor")
def test_after_a_killed_supervisor_the_next_run_cleans_up_and_sends_what_was_written(unsent: Rig) -> None:
    session = unsent.daemon.child.pid if unsent.daemon.child else None
    with (unsent.mount / "unclosed.txt").open("wb", buffering=0) as file:
        file.write(b"never closed\n")
        (unsent.mount / "closed.txt").write_text("closed\n")

        unsent.daemon.kill_supervisor()
        eventually(lambda: processes_of(unsent.daemon.home, session) == [], 20, "the workers end by themselves")
        with contextlib.suppress(OSError):
            file.close()
    unsent.daemon.start()

    assert unsent.status.state == "live"
    assert (unsent.mount / "closed.txt").read_text() == "closed\n"
    assert (unsent.mount / "unclosed.txt").read_text() == "never closed\n"
    unsent.daemon.sync()
    assert (unsent.root / "closed.txt").read_text() == "closed\n"
    assert (unsent.root / "unclosed.txt").read_text() == "never closed\n"
    assert len(mounts_below(unsent.daemon.home)) == 1


@pytest.mark.expects_log("worker|restart|ended|died|killed|signal|dead|supervisor")
def test_everything_killed_at_once_loses_no_byte_that_was_written(unsent: Rig) -> None:
    block = os.urandom(65536)
    with (unsent.mount / "big.bin").open("wb", buffering=0) as file:
        for _ in range(100):
            file.write(block)

        unsent.daemon.abandon()
        with contextlib.suppress(OSError):
            file.close()
    unsent.daemon.kill_supervisor()
    unsent.daemon.start()

    assert (unsent.mount / "big.bin").read_bytes() == block * 100
    unsent.daemon.sync()
    assert (unsent.root / "big.bin").read_bytes() == block * 100


def test_a_restart_finds_the_cache_and_asks_the_server_for_no_byte_again(unsent: Rig) -> None:
    (unsent.root / "cached.bin").write_bytes(os.urandom(2_000_000))
    unsent.daemon.refresh(unsent.mount)
    first = (unsent.mount / "cached.bin").read_bytes()
    inode = (unsent.mount / "cached.bin").stat().st_ino

    unsent.daemon.terminate()
    unsent.daemon.start()

    assert (unsent.mount / "cached.bin").read_bytes() == first
    assert (unsent.mount / "cached.bin").stat().st_ino == inode
    assert unsent.status.bytes_received < 100_000


@pytest.mark.expects_log("offline|connect|unreachable")
def test_a_mount_starts_without_its_server_and_shows_what_it_knows(tmp_path: Path) -> None:
    server = WsgiDAVServer(tmp_path / "dav", tmp_path / "work")
    with server:
        (server.root / "cached.txt").write_text("known")
        daemon = Daemon({"dav": {**webdav_mount(server), "request_deadline": 3.0}}, drain_timeout=1.0)
        try:
            daemon.start()
            assert (daemon.path("dav") / "cached.txt").read_text() == "known"
            daemon.terminate()
        except BaseException:
            daemon.discard()
            raise
    try:
        daemon.start()

        assert os.listdir(daemon.path("dav")) == ["cached.txt"]
        assert (daemon.path("dav") / "cached.txt").read_text() == "known"
        (daemon.path("dav") / "new.txt").write_text("kept")
        assert (daemon.path("dav") / "new.txt").read_text() == "kept"
        assert daemon.wait_for_state("dav", "offline").unsent_files == 1
    finally:
        daemon.discard()


def test_modes_links_and_attributes_survive_a_restart_where_the_server_has_no_place_for_them(unsent: Rig) -> None:
    file = unsent.mount / "script.sh"
    file.write_text("#!/bin/sh\n")
    file.chmod(0o750)
    os.utime(file, ns=(0, 1_600_000_000_123_456_789))
    os.setxattr(file, "user.colour", b"blue")
    (unsent.mount / "link").symlink_to("script.sh")
    unsent.daemon.sync()

    unsent.daemon.terminate()
    unsent.daemon.start()

    assert (file.stat().st_mode & 0o777, file.stat().st_mtime_ns) == (0o750, 1_600_000_000_123_456_789)
    assert os.getxattr(file, "user.colour") == b"blue"
    assert os.readlink(unsent.mount / "link") == "script.sh"


def test_a_directory_mount_and_a_webdav_mount_stop_together(apache_server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (apache_server.root / "together").mkdir()
    daemon = Daemon(
        {"dav": webdav_mount(apache_server, "together/"), "folder": directory_mount(tmp_path / "source")}
    )
    try:
        daemon.start()
        (daemon.path("dav") / "a").write_text("a")
        (daemon.path("folder") / "b").write_text("b")

        status = daemon.terminate()

        assert status == 0
        assert (apache_server.root / "together" / "a").read_text() == "a"
        assert (tmp_path / "source" / "b").read_text() == "b"
    finally:
        daemon.discard()
