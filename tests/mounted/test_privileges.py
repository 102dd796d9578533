"""The same programs work whoever mounts: an ordinary user, root for a user, or somebody else who passes the descriptor."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted.conftest import directory_mount
from tests.mounted.harness import Daemon, program
from tests.mounted.modes import NOBODY, USER, mount_by_hand, python_for_users
from tests.mounted.test_user import UserDaemon

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be other users")

BASICS = r"""
import errno, mmap, os, sys
os.chdir(sys.argv[1])
owner = os.stat(".").st_uid, os.stat(".").st_gid
assert owner == (os.geteuid(), os.getegid()), owner
os.makedirs("a/b")
with open("a/b/file", "wb") as file:
    file.write(b"0123456789" * 1000)
assert (os.stat("a/b/file").st_uid, os.stat("a/b/file").st_gid) == owner
with open("a/b/file", "r+b") as file:
    with mmap.mmap(file.fileno(), 0) as view:
        view[5:10] = b"ABCDE"
    os.fsync(file.fileno())
with open("a/b/file", "ab") as file:
    file.write(b"end")
assert open("a/b/file", "rb").read() == b"01234ABCDE" + b"0123456789" * 999 + b"end"
os.truncate("a/b/file", 12)
os.chmod("a/b/file", 0o4755)
with open("a/b/file", "r+b") as file:
    file.write(b"x")
assert os.geteuid() == 0 or os.stat("a/b/file").st_mode & 0o7777 == 0o755, "a write takes the suid bit away"
os.rename("a/b/file", "a/renamed")
os.link("a/renamed", "a/linked")
os.symlink("renamed", "a/symlink")
assert open("a/symlink", "rb").read() == b"x1234ABCDE01"
os.setxattr("a/renamed", "user.note", b"value")
assert os.getxattr("a/linked", "user.note") == b"value"
os.utime("a/renamed", ns=(10**9, 2 * 10**9))
assert os.stat("a/renamed").st_mtime_ns == 2 * 10**9
with open("a/unlinked", "w+b") as file:
    os.unlink("a/unlinked")
    file.write(b"still")
    file.seek(0)
    assert file.read() == b"still"
os.rmdir("a/b")
for name in ("a/linked", "a/symlink"):
    os.unlink(name)
try:
    os.open("a/none", os.O_RDONLY)
except OSError as error:
    assert error.errno == errno.ENOENT
assert sorted(os.listdir("a")) == ["renamed"]
print("all is well")
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for directory in (tmp_path, *list(tmp_path.parents)[:2]):
        directory.chmod(0o755)
    source = tmp_path / "source"
    source.mkdir()
    return source


def run_as(uid: int, mount: Path) -> str:
    command = [sys.executable, "-c", BASICS, str(mount)]
    if uid:
        become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all"]
        command = [*become, "/usr/bin/python3", *command[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def capabilities(pid: int | None) -> tuple[str, str, str]:
    """(real and effective uids, effective capabilities, no_new_privs)"""
    text = Path(f"/proc/{pid}/status").read_text()
    fields = dict(re.findall(r"^(Uid|CapPrm|NoNewPrivs):\s+(.*)$", text, re.MULTILINE))
    return fields["Uid"], fields["CapPrm"], fields["NoNewPrivs"]


def test_an_ordinary_user_through_fusermount3(source: Path) -> None:
    python = python_for_users()
    if python is None:
        pytest.skip("no interpreter with pyfuse3 that an ordinary user may execute")
    os.chown(source, NOBODY, NOBODY)
    daemon = UserDaemon({"one": directory_mount(source)})
    daemon.python = python
    for path in (daemon.home, *daemon.home.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    daemon.home.chmod(0o755)
    (daemon.home / "basics.py").write_text(BASICS)
    try:
        daemon.start()
        done = daemon.run(f"cd /; {python} {daemon.home}/basics.py {daemon.path('one')}")
        daemon.sync()

        assert done.stdout == "all is well\n", done.stderr
        assert (source / "a" / "renamed").read_bytes() == b"x1234ABCDE01"
    finally:
        daemon.discard()


class DaemonOfRoot(Daemon):
    """Root's daemon for user 1000."""

    arguments: tuple[str, ...] = ()
    descriptors: tuple[int, ...] = ()
    uid = USER

    def launch(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                [*program("nbmountd"), "run", "--config", str(self.config), *self.arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=self.descriptors,
                env={**self.environment, "NB_UID": str(self.uid), "NB_GID": str(self.uid)},
            )  # fmt: skip
        return self.child


@pytest.fixture
def daemon(source: Path) -> Iterator[DaemonOfRoot]:
    os.chown(source, USER, USER)
    daemon = DaemonOfRoot({"one": directory_mount(source)})
    daemon.path("one").mkdir()
    for path in (daemon.home, *daemon.home.rglob("*")):  # now: a connection that nobody has answered yet hangs whoever looks
        os.chown(path, USER, USER)
    daemon.home.chmod(0o755)
    try:
        yield daemon
        if daemon.child is not None and daemon.child.poll() is None:
            daemon.child.terminate()
            assert daemon.child.wait(30) == 0
    finally:
        subprocess.run(["umount", "-l", "-f", str(daemon.path("one"))], check=False, capture_output=True)
        daemon.discard()


def test_root_mounts_and_its_worker_becomes_the_user(daemon: DaemonOfRoot, source: Path) -> None:
    daemon.start()

    assert run_as(USER, daemon.path("one")) == "all is well\n"
    daemon.sync()
    assert (source / "a" / "renamed").stat().st_uid == USER
    assert capabilities(daemon.status("one").pid) == ("\t".join([str(USER)] * 4), "0" * 16, "1")


def test_a_descriptor_is_passed_in(daemon: DaemonOfRoot) -> None:
    point = daemon.path("one")
    device = mount_by_hand(point, USER)
    daemon.arguments, daemon.descriptors = ("--fuse-fd", f"one={device}"), (device,)
    daemon.start()
    os.close(device)

    assert run_as(USER, point) == "all is well\n"
    daemon.sync()


def test_a_descriptor_is_received_over_a_socket(daemon: DaemonOfRoot) -> None:
    point = daemon.path("one")
    device = mount_by_hand(point, USER)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(daemon.home / "helper.sock"))
        listener.listen()

        def give() -> None:
            connection, _ = listener.accept()
            with connection:
                socket.send_fds(connection, [b"1"], [device])
            os.close(device)

        giver = threading.Thread(target=give)
        giver.start()
        daemon.arguments = ("--fuse-fd", f"one={daemon.home}/helper.sock")
        daemon.start()
        giver.join()

    assert run_as(USER, point) == "all is well\n"
    daemon.sync()
