"""What goes wrong is said clearly, with what to do; it stays where it happened, and nothing hangs."""

from __future__ import annotations

import errno
import http.server
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from tests.mounted import modes
from tests.mounted.conftest import directory_mount, webdav_mount
from tests.mounted.harness import Daemon, daemon_over, program
from tests.mounted.kernel import eventually, mounts_below
from tests.servers import ServerProcess, WsgiDAVServer

DEADLINE = 3.0
"""`request_deadline` of the mounts here, in seconds."""
SLACK = 2.0
"""What a busy machine with two cores may add to a deadline, in seconds."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The source of a healthy mount, which stands beside each broken one and must not notice."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "file.txt").write_text("healthy\n")
    return source


OWN_POINT = pytest.mark.skipif(
    modes.MODE == "fd", reason="whoever mounts for the daemon has the mount point: nothing else is there"
)


def assert_healthy(daemon: Daemon) -> None:
    started = time.monotonic()
    assert (daemon.path("healthy") / "file.txt").read_text() == "healthy\n"
    (daemon.path("healthy") / "written.txt").write_text("also\n")
    assert time.monotonic() - started < SLACK
    assert daemon.status("healthy").state == "live"


def answered(call: Callable[[], object]) -> tuple[float, int | None]:
    """How long `call` took in seconds, and the errno it ended with, or None."""
    started = time.monotonic()
    try:
        call()
    except OSError as error:
        return time.monotonic() - started, error.errno
    return time.monotonic() - started, None


def assert_all_answered_in_time(mount: Path) -> None:
    """Tries what programs do; each call must come back, with a result or an error, within the mount's deadline."""
    calls: dict[str, Callable[[], object]] = {
        "stat": mount.stat,
        "list": lambda: os.listdir(mount),
        "stat of an unknown name": (mount / "unknown").lstat,
        "read of an unknown name": lambda: (mount / "unknown").read_bytes(),
        "statvfs": lambda: os.statvfs(mount),
        "mkdir": lambda: (mount / "made").mkdir(),
        "create and write": lambda: (mount / "made.txt").write_text("kept until it can be sent"),
    }
    late = {name: seconds for name, call in calls.items() if (seconds := answered(call)[0]) > DEADLINE + SLACK}
    assert late == {}


@pytest.mark.expects_log("401|unauthenticated|[Pp]assword|credential")
def test_a_wrong_password_is_named_and_never_tried_again(apache_server: ServerProcess, folder: Path) -> None:
    broken = {**webdav_mount(apache_server), "password": "not the password", "request_deadline": DEADLINE}
    with daemon_over({"broken": broken, "healthy": directory_mount(folder)}) as daemon:
        status = daemon.wait_for_state("broken", "unauthenticated")

        assert "password" in status.reason.lower()
        assert "not the password" not in daemon.log.read_text()
        assert_all_answered_in_time(daemon.path("broken"))
        before = daemon.status("broken").remote_requests
        assert_all_answered_in_time(daemon.path("broken"))
        assert daemon.status("broken").remote_requests == before
        assert_healthy(daemon)
        assert "password" in daemon.ctl("status").stdout.lower()
        daemon.ctl("unmount", "broken", "--timeout", "0")


@pytest.mark.expects_log("offline|resolve|unreachable|connect")
@pytest.mark.parametrize("url", ["http://no-such-host.invalid/dav/", "http://127.0.0.1:{closed}/dav/"])
def test_a_host_that_is_not_there_is_named(url: str, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = listener.getsockname()[1]
    url = url.format(closed=closed)
    broken = {"backend": "webdav", "url": url, "user": "u", "password": "p", "request_deadline": DEADLINE}
    with daemon_over({"broken": broken, "healthy": directory_mount(folder)}, drain_timeout=1.0) as daemon:
        status = daemon.wait_for_state("broken", "offline")

        assert url.split("/")[2].split(":")[0] in status.reason
        assert_all_answered_in_time(daemon.path("broken"))
        assert_healthy(daemon)


@pytest.fixture
def self_signed() -> Iterator[str]:
    """The address of an HTTPS server whose certificate nobody here trusts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    # The handshake happens in the thread of its connection and fails there: that is what the test is about.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    yield f"https://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    serving.join()
    server.server_close()


@pytest.mark.expects_log("certificate|offline")
def test_a_certificate_that_is_not_trusted_is_named(self_signed: str, folder: Path) -> None:
    broken = {"backend": "webdav", "url": self_signed, "user": "u", "password": "p", "request_deadline": DEADLINE}
    with daemon_over({"broken": broken, "healthy": directory_mount(folder)}, drain_timeout=1.0) as daemon:
        status = daemon.wait_for_state("broken", "offline", "failed")

        assert "certificate" in status.reason.lower()
        assert "ca_bundle" in status.reason
        assert_all_answered_in_time(daemon.path("broken"))
        assert_healthy(daemon)


@pytest.mark.expects_log("offline|timeout|time limit|not answer|degraded|retry")
def test_a_server_that_stops_answering_holds_nobody_up(folder: Path, tmp_path: Path) -> None:
    with WsgiDAVServer(tmp_path / "dav", tmp_path / "work") as server:
        (server.root / "cached.txt").write_text("read before\n")
        (server.root / "uncached.txt").write_text("never read\n")
        stuck = {
            **webdav_mount(server), "request_deadline": DEADLINE, "request_timeout": 2.0, "freshness": 1.0,
            "write_back_delay": 0.2,
        }
        with daemon_over({"stuck": stuck, "healthy": directory_mount(folder)}, drain_timeout=2.0) as daemon:
            mount = daemon.path("stuck")
            assert (mount / "cached.txt").read_text() == "read before\n"

            server.freeze()
            try:
                assert answered((mount / "uncached.txt").read_bytes)[0] < DEADLINE + SLACK
                assert_all_answered_in_time(mount)
                assert answered((mount / "uncached.txt").read_bytes)[0] < DEADLINE + SLACK
                assert (mount / "cached.txt").read_text() == "read before\n"
                assert daemon.wait_for_state("stuck", "offline", "degraded").reason
                assert_healthy(daemon)
            finally:
                server.thaw()

            daemon.wait_for_state("stuck", "live", within=60)
            daemon.sync(mount)
            assert (mount / "uncached.txt").read_text() == "never read\n"
            assert (server.root / "made.txt").read_text() == "kept until it can be sent"


@OWN_POINT
@pytest.mark.expects_log("not empty")
def test_a_mount_point_that_holds_files_is_left_alone(folder: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious.txt").write_text("would be hidden")
    broken = {**directory_mount(folder), "path": str(full)}
    with daemon_over({"broken": broken, "healthy": directory_mount(folder)}) as daemon:
        status = daemon.status("broken")
        refused = daemon.ctl("mount", "broken")
        (full / "precious.txt").rename(tmp_path / "precious.txt")
        accepted = daemon.ctl("mount", "broken")

        assert status.state == "failed"
        assert str(full) in status.reason
        assert "not empty" in status.reason
        assert (refused.returncode, accepted.returncode) == (1, 0), accepted.stderr
        assert "not empty" in refused.stderr
        assert (full / "file.txt").read_text() == "healthy\n"
        assert_healthy(daemon)


@pytest.fixture
def make_dead_mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a FUSE mount of a source whose daemon is gone (a look at it is ENOTCONN); clears it away at the end."""
    if os.geteuid() != 0:
        pytest.skip("mount(2) needs root")
    point = tmp_path / "dead"
    point.mkdir()
    os.chown(point, *modes.OWNER)

    def make(source: str) -> Path:
        device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0"
        subprocess.run(["mount", "-i", "-t", "fuse.test", "-o", options, source, str(point)], pass_fds=[device], check=True)
        os.close(device)
        assert answered(point.stat)[1] == errno.ENOTCONN
        return point

    yield make
    for left in mounts_below(point):
        subprocess.run(["umount", "-l", left], check=False)


@OWN_POINT
def test_a_dead_mount_of_ours_in_the_way_is_cleaned(make_dead_mount: Callable[[str], Path], folder: Path) -> None:
    point = make_dead_mount("nbmountd#here")

    with daemon_over({"here": {**directory_mount(folder), "path": str(point)}}) as daemon:
        assert daemon.status("here").state == "live"
        assert (point / "file.txt").read_text() == "healthy\n"

    assert mounts_below(point) == []


@OWN_POINT
@pytest.mark.expects_log("is the mount point of")
def test_a_dead_mount_of_another_program_is_named(make_dead_mount: Callable[[str], Path], folder: Path) -> None:
    point = make_dead_mount("other")

    mounts = {"here": {**directory_mount(folder), "path": str(point)}, "healthy": directory_mount(folder)}
    with daemon_over(mounts) as daemon:
        status = daemon.status("here")
        assert_healthy(daemon)
        subprocess.run(["umount", "-l", str(point)], check=True)
        accepted = daemon.ctl("mount", "here")

        assert status.state == "failed"
        assert str(point) in status.reason
        assert "unmount" in status.reason
        assert accepted.returncode == 0, accepted.stderr
        assert (point / "file.txt").read_text() == "healthy\n"


def run_to_its_end(config: str, home: Path) -> subprocess.CompletedProcess[str]:
    path = home / "config.toml"
    path.write_text(config)
    environment = {**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": str(home)}
    return subprocess.run(
        [*program("nbmountd"), "run", "--config", str(path)],
        env=environment, capture_output=True, text=True, timeout=30, check=False,
    )


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ('[daemon]\nstat_dir = "/x"\n', "stat_dir"),
        ('[[mount]]\nname = "a"\npath = "/x"\nbackend = "webdaf"\n', "webdaf"),
        ('[[mount]]\nname = "a"\npath = "/x"\nbackend = "webdav"\n', "url"),
        ('[[mount]]\nname = "a"\npath = "/x"\nbackend = "directory"\nsource = 3\n', "source"),
        ("[daemon\n", "config.toml"),
    ],
)
def test_a_wrong_configuration_names_the_place(config: str, named: str, tmp_path: Path) -> None:
    ended = run_to_its_end(config, tmp_path)

    assert ended.returncode == 2
    assert named in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_second_daemon_in_the_same_home_says_that_one_is_running(folder: Path) -> None:
    with daemon_over({"healthy": directory_mount(folder)}) as daemon:
        second = subprocess.run(
            [*program("nbmountd"), "run", "--config", str(daemon.config)],
            env=daemon.environment, capture_output=True, text=True, timeout=30, check=False,
        )

        assert second.returncode == 1
        assert "another nbmountd" in second.stderr
        assert "Traceback" not in second.stderr
        assert_healthy(daemon)


@pytest.mark.expects_log("offline|timeout|time limit|not answer|degraded|retry")
def test_a_program_killed_while_it_waits_for_the_server_ends(tmp_path: Path, folder: Path) -> None:
    """A request that the daemon has taken makes its caller unkillable until the answer: the deadline ends it."""
    with WsgiDAVServer(tmp_path / "dav", tmp_path / "work") as server:
        (server.root / "file.bin").write_bytes(b"x" * 1000)
        stuck = {**webdav_mount(server), "request_deadline": DEADLINE, "request_timeout": 2.0}
        with daemon_over({"stuck": stuck}, drain_timeout=1.0) as daemon:
            os.listdir(daemon.path("stuck"))
            server.freeze()
            try:
                reader = subprocess.Popen(["cat", str(daemon.path("stuck") / "file.bin")], stderr=subprocess.DEVNULL)
                eventually(lambda: "D" in state_of(reader.pid), 5, "the reader waits in the mount")
                reader.send_signal(signal.SIGKILL)
                reader.wait(DEADLINE + SLACK)
            finally:
                server.thaw()


def state_of(pid: int) -> str:
    """The state letter of a process; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""
