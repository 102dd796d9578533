"""The server is away for a while: programs go on, and everything arrives by itself when it is back."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.mounted import modes
from tests.mounted.conftest import webdav_mount
from tests.mounted.harness import daemon_over
from tests.mounted.kernel import eventually, same_tree
from tests.servers import ApacheServer

NOTICED_WITHIN = 10.0
"""Seconds in which a server that is back is noticed."""


def git(*arguments: object, cwd: Path) -> None:
    identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    subprocess.run(["git", *identity, *map(str, arguments)], cwd=cwd, check=True, capture_output=True, timeout=120)


@pytest.mark.expects_log("the remote is|will try again")
def test_a_clone_made_while_the_server_was_away_arrives_by_itself(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    git("init", "-q", cwd=origin)
    for number in range(30):
        (origin / f"file {number}").write_text(f"content {number}\n" * 100)
    git("add", ".", cwd=origin)
    git("commit", "-q", "-m", "all of it", cwd=origin)
    with ApacheServer(tmp_path / "root", tmp_path / "work") as server:
        with daemon_over({"dav": {**webdav_mount(server), "write_back_delay": 0.1}}) as daemon:
            mount = daemon.path("dav")
            list(mount.iterdir())

            server.stop()
            git("clone", "-q", origin, mount / "clone", cwd=tmp_path)
            git("fsck", "--strict", cwd=mount / "clone")
            away = daemon.wait_for_state("dav", "offline", "degraded")
            server.start()
            started = time.monotonic()
            daemon.wait_for_state("dav", "live", within=60)
            noticed = time.monotonic() - started
            eventually(lambda: daemon.status("dav").unsent_files == 0, 100, "everything sent, though nobody asked for it")

            assert away.reason
            assert away.since <= time.time()
            assert noticed < NOTICED_WITHIN + 5  # of which 5 for a busy machine
            assert same_tree(mount / "clone", server.root / "clone") == []


def states_of_threads(pids: list[int]) -> set[str]:
    """The state letters of all threads of these processes."""
    stats = [stat for pid in pids for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    return {stat.read_text().rpartition(")")[2].split()[0] for stat in stats}


@pytest.mark.expects_log("the remote is|will try again")
def test_while_the_server_is_away_cached_reads_go_on_others_fail_in_time_and_nothing_hangs(tmp_path: Path) -> None:
    deadline = 4.0
    with ApacheServer(tmp_path / "root", tmp_path / "work") as server:
        (server.root / "cached").write_bytes(b"read before" * 1000)
        (server.root / "uncached").write_bytes(b"never read" * 1000)
        keys = {**webdav_mount(server), "request_deadline": deadline, "request_timeout": 2.0}
        with daemon_over({"dav": keys}, drain_timeout=1.0) as daemon:
            mount = daemon.path("dav")
            assert len((mount / "cached").read_bytes()) == 11_000
            server.stop()

            began = time.monotonic()
            readers = [
                subprocess.Popen(["cat", mount / "uncached"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                for _ in range(4)
            ]
            assert (mount / "cached").read_bytes() == b"read before" * 1000
            statuses = [reader.wait(deadline + 30) for reader in readers]
            took = time.monotonic() - began

            assert 0 not in statuses
            assert took < deadline + 10  # of which 10 for a busy machine
            pids = [process.pid for process in daemon.processes()]
            eventually(lambda: "D" not in states_of_threads(pids), 10, "no thread waits in the kernel")
            assert daemon.ctl("unmount", "dav", "--timeout", "1").returncode == 0
            assert not mount.is_mount() or modes.MODE == "fd"  # what a helper has mounted is for the helper to unmount
