"""Tokens come late, come in halves, rotate, are revoked and vanish; the daemon goes on, with the same processes.

NBMOUNTD_ROTATION_MIB=1024 does the rotation with files of that size instead of 24 MiB.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbmountd.control import schema
from tests.mounted import modes
from tests.mounted.conftest import directory_mount
from tests.mounted.harness import Daemon, daemon_over
from tests.mounted.kernel import eventually
from tests.servers import TokenServer, WsgiDAVServer

MIB = 2**20
SIZE = int(os.environ.get("NBMOUNTD_ROTATION_MIB", "24")) * MIB
SECONDS_PER_MIB = 0.06 if SIZE < 100 * MIB else 0.008
"""Slow enough for several rotations during one file."""
ROTATE_EVERY = 0.3
AWAY = r"the remote is unauthenticated", r"not connected"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TokenServer]:
    with TokenServer(tmp_path / "root", tmp_path / "work", seconds_per_mebibyte=SECONDS_PER_MIB) as server:
        yield server


def mount(server: TokenServer, token_file: Path) -> dict[str, object]:
    return {"backend": "webdav", "url": server.url, "token_file": str(token_file), "write_back_delay": "0s", "freshness": "1s"}


class MountedSecret:
    """A Secret as the kubelet shows it: `access_token` is a symlink through `..data`, which is swapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.token_file = path / "access_token"
        self._generation = 0

    def write(self, token: str) -> None:
        self._generation += 1
        generation = self.path / f"..{self._generation}"
        generation.mkdir(parents=True)
        (generation / "access_token").write_text(token)
        (self.path / "..data_tmp").symlink_to(generation.name)
        (self.path / "..data_tmp").replace(self.path / "..data")
        if not self.token_file.is_symlink():
            self.token_file.symlink_to("..data/access_token")


def pids(daemon: Daemon) -> tuple[int, int | None, int]:
    assert daemon.child is not None
    status = daemon.status("dav")
    return daemon.child.pid, status.pid, status.restarts


@pytest.mark.expects_log(*AWAY)
def test_a_token_that_comes_late_and_in_halves_brings_the_mount_to_life(server: TokenServer, tmp_path: Path) -> None:
    """The directory is not even there at the start."""
    server.allow("whole-token")
    (server.root / "theirs.txt").write_text("from the server")
    token_file = tmp_path / "secrets" / "access_token"
    with daemon_over({"dav": mount(server, token_file)}) as daemon:
        daemon.wait_for_state("dav", "unauthenticated")
        before = pids(daemon)
        assert str(token_file) in daemon.status("dav").reason
        with pytest.raises(PermissionError):  # nothing is known of it yet, so nothing can be shown; and nobody waits
            os.listdir(daemon.path("dav"))

        token_file.parent.mkdir()
        token_file.write_text("")
        modes.hand_over(token_file.parent)
        token_file.write_text("whole-")
        eventually(lambda: any(line.endswith("401 whole-") for line in server.requests()), 30, "the half token was tried")
        token_file.write_text("whole-token\n")

        daemon.wait_for_state("dav", "live")
        assert (daemon.path("dav") / "theirs.txt").read_text() == "from the server"
        (daemon.path("dav") / "ours.txt").write_text("to the server")
        daemon.sync()
        assert (server.root / "ours.txt").read_text() == "to the server"
        assert pids(daemon) == before


@pytest.mark.expects_log(*AWAY)
def test_a_token_that_is_revoked_and_vanishes_leaves_what_is_cached_and_the_next_one_cures_it(
    server: TokenServer, tmp_path: Path
) -> None:
    """So it is while a server is shared: the hub revokes the token and gives no other for hours."""
    secret = MountedSecret(tmp_path / "secrets")
    secret.write("first")
    server.allow("first")
    (server.root / "read.txt").write_text("seen before")
    with daemon_over({"dav": mount(server, secret.token_file)}) as daemon:
        assert (daemon.path("dav") / "read.txt").read_text() == "seen before"
        before = pids(daemon)

        server.allow("second")
        secret.token_file.unlink()
        assert isinstance(daemon.ask(schema.Refresh()), schema.Failed)
        (daemon.path("dav") / "new.txt").write_text("while it was shared")
        daemon.wait_for_state("dav", "unauthenticated")
        refused = len([line for line in server.requests() if " 401 " in line])
        assert (daemon.path("dav") / "read.txt").read_text() == "seen before"
        assert (daemon.path("dav") / "new.txt").read_text() == "while it was shared"

        secret.write("second")

        daemon.wait_for_state("dav", "live")
        daemon.sync()
        assert (server.root / "new.txt").read_text() == "while it was shared"
        assert pids(daemon) == before
        assert len([line for line in server.requests() if " 401 " in line]) == refused <= 2, "a refused token is not sent again"


@contextlib.contextmanager
def rotating(server: TokenServer, secret: MountedSecret) -> Iterator[list[str]]:
    """Puts a new token into place and revokes the old one, again and again; gives the tokens."""
    tokens = ["token-0"]
    secret.write(tokens[0])
    server.allow(*tokens)
    stop = threading.Event()

    def rotate() -> None:
        while not stop.wait(ROTATE_EVERY):
            tokens.append(f"token-{len(tokens)}")
            server.allow(*tokens[-2:])
            secret.write(tokens[-1])
            server.allow(tokens[-1])

    thread = threading.Thread(target=rotate)
    thread.start()
    try:
        yield tokens
    finally:
        stop.set()
        thread.join()


def used_during(server: TokenServer, method: str) -> set[str]:
    return {line.split()[3] for line in server.requests() if line.startswith(method) and line.split()[2][0] == "2"}


def test_rotation_disturbs_neither_a_long_read_nor_a_long_upload(server: TokenServer, tmp_path: Path) -> None:
    secret = MountedSecret(tmp_path / "secrets")
    with rotating(server, secret) as tokens, daemon_over({"dav": mount(server, secret.token_file)}) as daemon:
        before = pids(daemon)
        for number in range(5):  # on a busy machine too few rotations may fall into the first
            at_first = len(tokens)
            during_read = copy_back(server, daemon, number, tokens)
            enough = during_read - at_first >= 3 and len(tokens) - during_read >= 3
            if enough and len(used_during(server, "GET")) >= 2:  # later pieces came with later tokens
                break
        else:
            pytest.fail(f"no rotation fell into a read or into an upload: {len(tokens)} tokens")
        assert daemon.status("dav").state == "live" and pids(daemon) == before
    # The log of the daemon holds no warning (conftest.py): it was live all the time.


def copy_back(server: TokenServer, daemon: Daemon, number: int, tokens: list[str]) -> int:
    """Reads a large file of the server and writes it to another one, both on the mount, and sees that every byte is right;
    how many tokens there had been when all was read."""
    block, digest = random.Random(number).randbytes(MIB), hashlib.sha256()
    with (server.root / f"theirs-{number}.bin").open("wb") as file:
        for at in range(SIZE // MIB):
            piece = at.to_bytes(8, "big") + block[8:]
            digest.update(piece)
            file.write(piece)
    daemon.refresh(daemon.path("dav"))

    theirs, ours = daemon.path("dav") / f"theirs-{number}.bin", daemon.path("dav") / f"ours-{number}.bin"
    read = hashlib.sha256()
    with theirs.open("rb") as reading, ours.open("wb") as writing:
        while piece := reading.read(MIB):
            read.update(piece)
            writing.write(piece)
    during_read = len(tokens)
    daemon.sync(timeout=SIZE / MIB + 60)

    assert read.digest() == digest.digest()
    sent = hashlib.sha256()
    with (server.root / ours.name).open("rb") as file:
        while piece := file.read(MIB):
            sent.update(piece)
    assert sent.digest() == digest.digest()
    return during_read


@pytest.mark.skipif(modes.MODE == "drop", reason="the user adds accounts, and what these tests run is root's")
@pytest.mark.expects_log(*AWAY)
def test_an_account_is_added_corrected_and_removed_while_the_daemon_runs(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with (
        WsgiDAVServer(tmp_path / "root", tmp_path / "work") as server,
        daemon_over({"local": directory_mount(tmp_path / "source")}) as daemon,
    ):
        assert daemon.child is not None
        supervisor, mount = daemon.child.pid, daemon.home / "dav"
        keys = ["--backend", "webdav", "--url", server.url, "--user", server.user]

        added = daemon.ctl("add", "dav", *keys, "--set", "write_back_delay=0s", stdin="wrong\n")
        assert added.returncode == 0, added.stderr
        daemon.wait_for_state("dav", "unauthenticated")
        worker = daemon.status("dav").pid
        corrected = daemon.ctl("add", "dav", stdin=f"{server.password}\n")
        assert corrected.returncode == 0, corrected.stderr
        daemon.wait_for_state("dav", "live")
        (mount / "file.txt").write_text("content")
        daemon.sync()
        assert (server.root / "file.txt").read_text() == "content"
        assert (daemon.child.pid, daemon.status("dav").pid) == (supervisor, worker)

        assert daemon.ctl("remove", "dav").returncode == 0
        assert [status.name for status in daemon.statuses()] == ["local"]
        assert not mount.is_mount()
        assert server.password not in added.stdout + corrected.stdout + daemon.log.read_text()
