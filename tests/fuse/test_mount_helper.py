"""The mount helper: an ordinary user without /dev/fuse gets a mount of its own through it, and nothing else from it.

The clients are processes of another user in a mount namespace of their own, as notebook containers are.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbmountd.fuse import borrow, mounting
from nbmountd.fuse.agreement import answer_init
from nbmountd.mounthelper import PATIENCE

USER, OTHER = 65534, 65533
_libc = ctypes.CDLL(None, use_errno=True)

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="the helper has to be root"),
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK) and "CI" not in os.environ, reason="no /dev/fuse"),
]


class Place:
    """A helper for `USER` below `home`, and who asks it."""

    def __init__(self, base: Path) -> None:
        base.chmod(0o755)
        self.base, self.home, self.socket = base, base / "home", base / "helper.sock"
        for directory, uid in ((self.home, USER), (self.home / "mine", USER), (self.home / "others", OTHER)):
            directory.mkdir()
            os.chown(directory, uid, uid)
        (base / "outside").mkdir()
        os.chown(base / "outside", USER, USER)
        command = [
            sys.executable, "-c", "from nbmountd.cli import nbmountd; nbmountd()", "mount-helper", "--socket", str(self.socket),
            "--allow-uid", str(USER), "--allow-prefix", str(self.home),
        ]  # fmt: skip
        self.log = base / "log"
        with self.log.open("wb") as log:
            self.helper = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/")
        deadline = time.monotonic() + 30
        while b"listening" not in self.log.read_bytes():
            assert self.helper.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def as_user(self, ask: Callable[[], Any], uid: int = USER) -> Any:
        """What `ask` gives, or the text of what it raises, in a process of `uid` with a mount namespace of its own."""
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of threads; the child only computes and ends
            pid = os.fork()
        if pid == 0:
            try:
                assert _libc.unshare(0x20000) == 0
                assert _libc.mount(b"none", b"/", None, 0x44000, None) == 0  # private, all of them
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                try:
                    answer = ask()
                except BaseException as exc:
                    answer = f"{type(exc).__name__}: {exc}"
                os.write(writing, json.dumps(answer).encode())
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            text = pipe.read()
        os.waitpid(pid, 0)
        return json.loads(text)

    def raw(self, message: bytes, *fds: int) -> str:
        """The helper's reply to any bytes."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.settimeout(20)
            client.connect(str(self.socket))
            socket.send_fds(client, [message], fds) if fds else client.send(message)
            return client.recv(4096).decode()


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    base = Path(tempfile.mkdtemp(prefix="nbm-helper-"))
    place = Place(base)
    try:
        yield place
        assert place.helper.poll() is None, "the helper is gone"
        assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(base) in line]
    finally:
        place.helper.terminate()
        place.helper.wait(10)
        assert not place.socket.exists()
        shutil.rmtree(base)


def mountinfo() -> list[str]:
    """The mounts below any helper's place."""
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "/nbm-helper-" in line]


def test_a_user_without_any_right_gets_a_connection_to_a_mount_of_its_own(place: Place) -> None:
    mine = str(place.home / "mine")

    def ask() -> Any:
        device = not os.access("/dev/fuse", os.R_OK)
        fd = borrow.mount(str(place.socket), mine, "b2drop", read_only=False)
        agreement = answer_init(fd)
        there = mountinfo()
        borrow.unmount(str(place.socket), mine)
        return [device, agreement.minor, there, mountinfo()]

    answer = place.as_user(ask)
    assert isinstance(answer, list), answer
    _, minor, there, afterwards = answer

    assert minor > 20
    assert len(there) == 1 and afterwards == []
    line = there[0]
    assert f" {mine} rw,nosuid,nodev" in line and r"fuse.nbmountd nbmountd\043b2drop " in line
    assert f"user_id={USER},group_id={USER},default_permissions" in line and "allow_other" not in line


def test_a_read_only_mount_is_read_only_to_the_kernel(place: Place) -> None:
    mine = str(place.home / "mine")

    def ask() -> Any:
        fd = borrow.mount(str(place.socket), mine, "data", read_only=True)
        answer_init(fd)
        return mountinfo()

    (line,) = place.as_user(ask)

    assert f" {mine} ro,nosuid,nodev" in line


def test_the_daemon_uses_it_and_cleans_a_dead_mount_with_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = str(place.home / "mine")
    monkeypatch.setenv(borrow.VARIABLE, str(place.socket))

    def ask() -> Any:
        first = mounting.mount(mine, "first", uid=USER, gid=USER)
        ways = [first.way]
        first.close()  # as a daemon that was killed
        dead = mounting.find(mine)
        assert dead is not None and dead.is_dead()
        second = mounting.mount(mine, "second", uid=USER, gid=USER)
        ways.append(second.way)
        found = [entry.source for entry in mounting.mounts() if entry.path == mine]
        mounting.unmount(mine)
        second.close()
        return [ways, found, mountinfo(), os.stat(mine).st_mode & 0o777]

    answer = place.as_user(ask)
    assert isinstance(answer, list), answer
    ways, found, afterwards, mode = answer

    assert (ways, found, afterwards) == (["mount-helper"] * 2, ["nbmountd#second"], [])
    assert mode == mounting.GUARDED


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("{base}/outside", "not below"),
        ("{home}", "not below"),
        ("{home}/../outside", "simplest form"),
        ("{home}//mine", "simplest form"),
        ("/{home}/mine", "simplest form"),
        ("{home}/mine/", "simplest form"),
        ("home/mine", "simplest form"),
        ("{home}/link", "symbolic link"),
        ("{home}/link-to-base/outside", "symbolic link"),
        ("{home}/others", "belongs to uid"),
        ("{home}/file", "Not a directory"),
        ("{home}/nowhere", "No such file"),
        ("{home}/mi\0ne", "printable"),
        ("{home}/\ud800", "printable"),
    ],
)
def test_no_path_leads_to_anything_but_a_directory_of_the_users_own_below_the_prefix(place: Place, path: str, why: str) -> None:
    for link, target in (("link", "/etc"), ("link-to-base", "..")):
        if not (place.home / link).is_symlink():
            (place.home / link).symlink_to(target)
    (place.home / "file").touch()
    os.chown(place.home / "file", USER, USER)
    wanted = path.format(home=place.home, base=place.base)

    answer = place.as_user(lambda: borrow.mount(str(place.socket), wanted, "x", read_only=False))

    assert isinstance(answer, str) and answer.startswith("BorrowError") and why in answer


def test_a_directory_that_the_user_cannot_reach_is_refused_although_it_is_the_users(place: Place) -> None:
    (place.home / "others" / "deep").mkdir(exist_ok=True)
    os.chown(place.home / "others" / "deep", USER, USER)
    (place.home / "others").chmod(0o700)

    answer = place.as_user(lambda: borrow.mount(str(place.socket), f"{place.home}/others/deep", "x", read_only=False))

    assert "Permission denied" in answer


@pytest.mark.parametrize("uid", [OTHER, 0])
def test_another_user_gets_nothing(place: Place, uid: int) -> None:
    answer = place.as_user(lambda: borrow.mount(str(place.socket), f"{place.home}/mine", "x", read_only=False), uid)

    assert f"uid {uid} may not mount here" in answer


@pytest.mark.parametrize(
    "name", ["", "a,allow_other", "a b", "x" * 65, "a\nb", "../x", 7, None, ["a"]], ids=lambda name: repr(name)[:12]
)
def test_a_name_cannot_smuggle_options(place: Place, name: object) -> None:
    request = json.dumps({"verb": "mount", "path": f"{place.home}/mine", "name": name}).encode()

    def ask() -> str:
        with Path("/proc/self/ns/mnt").open() as namespace:
            return place.raw(request, namespace.fileno())

    assert "a name is of letters" in place.as_user(ask)


@pytest.mark.parametrize("what", ["none", "file", "network namespace", "two", "socket"])
def test_only_a_mount_namespace_is_entered(place: Place, what: str) -> None:
    request = json.dumps({"verb": "mount", "path": f"{place.home}/mine", "name": "x"}).encode()

    def ask() -> str:
        names = {"none": [], "file": ["/etc/passwd"], "network namespace": ["/proc/self/ns/net"],
                 "two": ["/proc/self/ns/mnt"] * 2, "socket": []}[what]  # fmt: skip
        fds = [os.open(name, os.O_RDONLY) for name in names]
        if what == "socket":
            fds = [socket.socket(socket.AF_UNIX).detach()]
        return place.raw(request, *fds)

    assert "descriptor" in place.as_user(ask)


@pytest.mark.parametrize(
    "message",
    [b"{", b"[]", b"null", b"\xff\xfe", b'{"verb": "format"}', b'{"verb": 1}', b"[" * 5000, b"x" * 100_000, b"{}",
     b'{"verb": "mount", "path": 1e999, "name": "a"}', b'{"verb": "unmount", "path": null}'],
    ids=lambda message: repr(message)[:20],
)  # fmt: skip
def test_nonsense_is_refused(place: Place, message: bytes) -> None:
    assert "error" in json.loads(place.as_user(lambda: place.raw(message)))


def test_nothing_but_the_users_own_mount_is_unmounted(place: Place) -> None:
    theirs = place.home / "theirs"
    theirs.mkdir()

    def ask_with_foreign_mounts() -> list[str]:
        answers = []
        for directory in (theirs, place.home / "mine", Path("/proc")):
            try:
                borrow.unmount(str(place.socket), str(directory))
            except borrow.BorrowError as exc:
                answers.append(str(exc))
        return answers

    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", theirs], check=True)
    try:
        answers = place.as_user(ask_with_foreign_mounts)
        still = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(theirs) in line]
    finally:
        subprocess.run(["umount", theirs], check=True)

    assert "is not yours" in answers[0] and "nothing is mounted" in answers[1] and "not below" in answers[2]
    assert len(still) == 1


def test_silent_and_greedy_clients_hold_up_nobody_and_cost_nothing_afterwards(place: Place) -> None:
    descriptors = Path(f"/proc/{place.helper.pid}/fd")
    before = len(list(descriptors.iterdir()))
    silent = []
    for _ in range(40):
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.connect(str(place.socket))
        silent.append(client)

    assert place.as_user(lambda: borrow.ping(str(place.socket))) is None  # served beside them

    for client in silent:
        client.settimeout(PATIENCE + 30)
        assert b"no request came" in client.recv(4096)
        client.close()

    def stay_silent() -> str:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(place.socket))
            return client.recv(4096).decode()

    assert "no request came" in place.as_user(stay_silent)
    deadline = time.monotonic() + 20
    while (children := children_of(place.helper.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (children, len(list(descriptors.iterdir()))) == ([], before)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_without_rights_the_helper_says_so_and_ends(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from nbmountd.cli import nbmountd; nbmountd()", "mount-helper", "--socket",
         str(tmp_path / "nowhere" / "helper.sock"), "--allow-uid", "1000"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "No such file" in done.stderr
