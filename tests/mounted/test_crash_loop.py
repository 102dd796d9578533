"""A daemon that is killed at random moments loses no byte and no name for which a call has returned.

CRASHES=300 is the benchmark's number; SEED=n repeats a run as far as chance in time allows. NBMOUNTD_TEST_SERVERS="nginx
rclone", or "all", plays it over those servers.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mounted.conftest import OTHER_SERVERS, asked_for, webdav_mount
from tests.mounted.crash_model import Item, Tree, compare, look
from tests.mounted.crash_writer import DIRECTORIES
from tests.mounted.harness import Daemon, daemon_over, eventually

CRASHES = int(os.environ.get("CRASHES", "20"))
SEED = int(os.environ.get("SEED", random.randrange(10**6)))
ROOT = Path(__file__).parent.parent.parent

UNFINISHED = ".nbmountd-upload-"
"""What uploads that a worker died in leave behind on a server that takes no other way; no mount shows them."""

KEEP_SYMLINKS = ("lighttpd", "wsgidav", "nextcloud")
"""Beside Apache."""

pytestmark = [
    pytest.mark.timeout(120 + 10 * CRASHES),
    pytest.mark.expects_log("worker|restart|ended|died|killed|signal|dead|supervisor"),
    # WsgiDAV and rclone, of a directory in which something is just being renamed.
    pytest.mark.expects_log("PROPFIND .*: 500 ", "the listing is not whole XML"),
]


class Writing:
    """The writer's process, and how it is made to stand still."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def pause(self) -> None:
        """Returns when no operation is under way; it may have paused by itself, after a failure."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("pause\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "paused\n"

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(30) == 0


@contextmanager
def writing(mount: Path, manifest: Path, seed: int) -> Iterator[Writing]:
    for directory in filter(None, DIRECTORIES):
        (mount / directory).mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.mounted.crash_writer", str(mount), str(manifest), str(seed)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        yield Writing(process)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def kill_worker(daemon: Daemon) -> None:
    pid = eventually(lambda: daemon.status("dav").pid, 30, "a worker")
    os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Remote:
    """A directory of a server, the keys of a mount over it, and how often to crash."""

    directory: Path
    keys: dict[str, object]
    crashes: int
    keeps_symlinks: bool


def assert_same_on_the_server(tree: Tree, daemon: Daemon, remote: Remote) -> None:
    """Names, directories and bytes; modes and times have no place there. Apache keeps a symlink as a file with its target."""
    below = remote.directory
    daemon.sync(timeout=120)
    expected = {
        name: Item("file", item.target.encode()) if item.kind == "symlink" else Item(item.kind, item.data)
        for name, item in tree.items.items()
        if remote.keeps_symlinks or item.kind != "symlink"
    }
    there = {
        name: Item(item.kind, item.data) for name, item in look(below).items()
        if not name.rpartition("/")[2].startswith(UNFINISHED)
    }  # fmt: skip
    assert compare(expected, there) == []


@pytest.fixture(params=asked_for("apache", "nextcloud"))
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Remote]:
    name = str(request.node.originalname)
    if request.param == "apache":
        server = request.getfixturevalue("apache_server")
        directory = Path(server.root, name)
        directory.mkdir()
        yield Remote(directory, webdav_mount(server, f"{name}/"), CRASHES, True)
        return
    crashes = CRASHES if "CRASHES" in os.environ else max(4, CRASHES // 4)
    with OTHER_SERVERS[request.param](tmp_path / "root", tmp_path / "work") as other:
        yield Remote(other.root, webdav_mount(other), crashes, request.param in KEEP_SYMLINKS)


def test_a_worker_that_is_killed_is_not_even_noticed(
    remote: Remote, tmp_path: Path
) -> None:
    print(f"SEED={SEED} CRASHES={CRASHES}")
    chance = random.Random(SEED)
    keys = {**remote.keys, "write_back_delay": 0.3}
    with daemon_over({"dav": keys}) as daemon:
        mount, tree = daemon.path("dav"), Tree(tmp_path / "manifest")
        with writing(mount, tree.manifest, SEED) as writer:
            for crash in range(remote.crashes):
                # The moment is what is tested. Few die young: ten such in a minute are taken for a fault of the mount.
                time.sleep(chance.uniform(0.02, 0.3) if crash % 8 == 1 else chance.uniform(0.6, 1.0))
                kill_worker(daemon)
                if crash % 3 == 2:
                    writer.pause()
                    assert tree.differences(mount, may_be_undecided=False) == [], f"after crash {crash} of SEED={SEED}"
                    writer.go()
            writer.pause()
            assert tree.differences(mount, may_be_undecided=False) == [], f"at the end of SEED={SEED}"
            assert_same_on_the_server(tree, daemon, remote)
            assert tree.differences(mount, may_be_undecided=False) == []
            writer.end()
        assert tree.lines > 10 * remote.crashes


def test_a_daemon_that_is_killed_whole_finds_everything_at_its_next_start(
    remote: Remote, tmp_path: Path
) -> None:
    print(f"SEED={SEED} CRASHES={CRASHES}")
    chance = random.Random(SEED)
    keys = {**remote.keys, "write_back_delay": 0.3}
    with daemon_over({"dav": keys}) as daemon:
        mount, tree = daemon.path("dav"), Tree(tmp_path / "manifest")
        with writing(mount, tree.manifest, SEED) as writer:
            for crash in range(remote.crashes):
                time.sleep(chance.uniform(0.05, 0.7))
                daemon.abandon()
                assert daemon.child is not None
                daemon.child.wait(10)
                writer.pause()
                daemon.start()
                assert tree.differences(mount, may_be_undecided=True) == [], f"after crash {crash} of SEED={SEED}"
                writer.go()
            writer.pause()
            assert tree.differences(mount, may_be_undecided=False) == [], f"at the end of SEED={SEED}"
            assert_same_on_the_server(tree, daemon, remote)
            writer.end()
        assert tree.lines > 10 * remote.crashes
