"""A daemon that is killed at random moments loses no byte and no name for which a call has returned.

CRASHES=300 is the benchmark's number; SEED=n repeats a run as far as chance in time allows. NBMOUNTD_TEST_SERVERS="nginx
rclone", or "all", plays it over those servers.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mounted.conftest import OTHER_SERVERS, asked_for, webdav_mount
from tests.mounted.crash_loop import Loop, Outcome
from tests.mounted.harness import daemon_over

CRASHES = int(os.environ.get("CRASHES", "20"))
SEED = int(os.environ.get("SEED", random.randrange(10**6)))

KEEP_SYMLINKS = ("lighttpd", "wsgidav", "nextcloud")
"""Beside Apache."""

pytestmark = [
    pytest.mark.timeout(120 + 20 * CRASHES),
    # The remote may be slow to answer on a machine that is busy with restarts, and is called degraded then.
    pytest.mark.expects_log("worker|restart|ended|died|killed|signal|dead|supervisor|the remote is degraded"),
    # WsgiDAV and rclone, of a directory in which something is just being renamed.
    pytest.mark.expects_log("PROPFIND .*: 500 ", "the listing is not whole XML"),
]


@dataclass(frozen=True)
class Remote:
    """A directory of a server, the keys of a mount over it, and how often to crash."""

    directory: Path
    keys: dict[str, object]
    crashes: int
    keeps_symlinks: bool


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


@pytest.fixture
def loop(remote: Remote, tmp_path: Path) -> Iterator[Loop]:
    print(f"SEED={SEED} CRASHES={CRASHES}")
    with daemon_over({"dav": {**remote.keys, "write_back_delay": 0.3}}) as daemon:
        yield Loop(
            daemon, daemon.path("dav"), remote.directory, tmp_path / "manifest", remote.crashes, SEED, remote.keeps_symlinks
        )


def assert_nothing_lost(outcome: Outcome, loop: Loop) -> None:
    print(f"{outcome.operations} operations, {outcome.kills} kills, away for at most {max(outcome.away):.1f} s")
    assert outcome.differences == [], f"after crash {outcome.kills} of SEED={SEED}"
    assert outcome.kills == loop.kills
    assert outcome.operations > 5 * loop.kills


def test_a_worker_that_is_killed_is_not_even_noticed(loop: Loop) -> None:
    assert_nothing_lost(loop.kill_workers(), loop)


def test_a_daemon_that_is_killed_whole_finds_everything_at_its_next_start(loop: Loop) -> None:
    assert_nothing_lost(loop.kill_everything(), loop)
