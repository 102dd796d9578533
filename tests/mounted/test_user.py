"""An ordinary user runs the whole daemon through fusermount3, with no capability at all.

`/dev/fuse` is for root alone on some machines, so the user gets a node of its own in a mount namespace of its own; nothing
outside of it changes. What the user does, it does in there.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.mounted.conftest import directory_mount
from tests.mounted.harness import Daemon
from tests.mounted.kernel import eventually, processes_of
from tests.mounted.modes import AS_NOBODY, ENTER, NOBODY, environment, python_for_users


class UserDaemon(Daemon):
    """`nbmountd run` as an ordinary user. Its mounts are seen by `run` only."""

    python = ""

    def launch(self) -> subprocess.Popen[bytes]:
        command = [self.python, "-c", "from nbmountd.cli import nbmountd; nbmountd()", "run", "--config", str(self.config)]
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                ["unshare", "-m", "sh", "-c", ENTER, "sh", str(self.home), *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**environment(), **{name: self.environment[name] for name in ("XDG_RUNTIME_DIR", "HOME")}},
            )
        return self.child

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """Runs a shell script as the user, where the mounts are seen."""
        assert self.child is not None
        return subprocess.run(
            ["nsenter", "-m", "-t", str(self.child.pid), *AS_NOBODY, "sh", "-ec", script],
            capture_output=True, text=True, timeout=60, check=False,
        )


@pytest.fixture
def daemon() -> Iterator[UserDaemon]:
    if os.geteuid() != 0:
        pytest.skip("needs root to make an ordinary user's surroundings")
    python = python_for_users()
    if python is None:
        pytest.skip("no interpreter with pyfuse3 that an ordinary user may execute")
    daemon = UserDaemon({})
    source = daemon.home / "source"
    source.mkdir()
    (source / "file.txt").write_text("hello\n")
    daemon.mounts["mine"] = directory_mount(source)
    daemon.write_config()
    daemon.python = python
    for path in (daemon.home, *daemon.home.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    try:
        yield daemon
    finally:
        daemon.discard()


def test_a_user_mounts_uses_and_stops(daemon: UserDaemon) -> None:
    mount = daemon.path("mine")
    daemon.start()

    used = daemon.run(f"cat {mount}/file.txt; echo written > {mount}/new.txt; chmod 640 {mount}/new.txt; cat {mount}/new.txt")
    daemon.sync()
    new = daemon.home / "source" / "new.txt"

    assert (used.returncode, used.stdout) == (0, "hello\nwritten\n"), used.stderr
    assert (new.read_text(), new.stat().st_uid, new.stat().st_mode & 0o777) == ("written\n", NOBODY, 0o640)
    assert daemon.child is not None
    daemon.child.terminate()
    assert daemon.child.wait(30) == 0
    eventually(lambda: not processes_of(daemon.home, daemon.child.pid if daemon.child else None), 2, "no process is left")


@pytest.mark.expects_log("worker|ended|killed|restart")
def test_a_user_does_not_notice_a_killed_worker(daemon: UserDaemon) -> None:
    mount = daemon.path("mine")
    daemon.start()
    daemon.run(f"echo before > {mount}/kept.txt")

    daemon.kill_worker("mine")
    used = daemon.run(f"cat {mount}/kept.txt; echo after >> {mount}/kept.txt; cat {mount}/kept.txt")

    assert (used.returncode, used.stdout) == (0, "before\nbefore\nafter\n"), used.stderr
