"""The daemon changes under its mounts (another worker, program or configuration) and programs go on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from nbmountd.control import schema
from tests.mounted.conftest import directory_mount, webdav_mount
from tests.mounted.harness import Daemon, daemon_over, eventually, program
from tests.servers import WsgiDAVServer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    (source / "there.txt").write_text("there\n")
    return source


@pytest.fixture
def daemon(source: Path) -> Iterator[Daemon]:
    with daemon_over({"one": directory_mount(source), "two": directory_mount(source)}) as daemon:
        yield daemon


class Writer:
    """A program that appends lines to an open file of a mount all along."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.lines = 0
        self.failure: OSError | None = None
        self.longest = 0.0

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(60)

    def _run(self) -> None:
        with self._path.open("ab", buffering=0) as file:
            while not self._done.wait(0.005):
                began = time.monotonic()
                try:
                    file.write(f"{self.lines}\n".encode())
                except OSError as error:
                    self.failure = error
                    return
                self.longest = max(self.longest, time.monotonic() - began)
                self.lines += 1

    def wait_for_more(self) -> None:
        seen = self.lines
        eventually(lambda: self.lines > seen + 5 or self.failure, 30, "the program goes on")


def assert_complete(path: Path, writer: Writer) -> None:
    assert writer.failure is None
    assert path.read_text().splitlines() == [str(number) for number in range(writer.lines)]


def workers(daemon: Daemon) -> dict[str, int | None]:
    return {status.name: status.pid for status in daemon.statuses()}


def test_restart_replaces_the_worker_of_one_mount_or_of_all(daemon: Daemon) -> None:
    first = workers(daemon)
    with Writer(daemon.path("one") / "log") as writer:
        writer.wait_for_more()
        assert daemon.ctl("restart", "one").returncode == 0
        second = workers(daemon)
        writer.wait_for_more()
        assert daemon.ctl("restart").returncode == 0
        third = workers(daemon)
        writer.wait_for_more()

    assert second["one"] != first["one"]
    assert second["two"] == first["two"]
    assert not set(third.values()) & set(second.values())
    assert [status.restarts for status in daemon.statuses()] == [0, 0]
    assert_complete(daemon.path("one") / "log", writer)


def test_upgrade_becomes_the_installed_program_and_nobody_notices(daemon: Daemon) -> None:
    first, child = workers(daemon), daemon.child
    assert child is not None
    with Writer(daemon.path("one") / "log") as writer, (daemon.path("two") / "there.txt").open("rb", buffering=0) as reader:
        writer.wait_for_more()
        upgraded = daemon.ctl("upgrade")
        writer.wait_for_more()
        eventually(lambda: not set(workers(daemon).values()) & {*first.values(), None}, 30, "every worker is a new one")
        writer.wait_for_more()

        assert upgraded.returncode == 0, upgraded.stderr
        assert reader.read() == b"there\n"
    assert child.poll() is None
    assert daemon.log.read_text().count('"message": "ready"') == 2
    assert [status.state for status in daemon.statuses()] == ["live", "live"]
    assert_complete(daemon.path("one") / "log", writer)
    eventually(lambda: not dead_children(child.pid), 5, f"no dead process is left behind: {dead_children(child.pid)}")


def dead_children(parent: int) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            name, _, rest = (process / "stat").read_text().rpartition(")")
            if rest.split()[:2] == ["Z", str(parent)]:
                found.append(name)
    return found


def test_two_upgrades_in_a_row_are_as_good_as_one(daemon: Daemon) -> None:
    with Writer(daemon.path("one") / "log") as writer:
        for ready in (2, 3):
            assert daemon.ctl("upgrade").returncode == 0
            eventually(lambda count=ready: daemon.log.read_text().count('"message": "ready"') == count, 30, "ready")  # type: ignore[misc]
            writer.wait_for_more()

    assert_complete(daemon.path("one") / "log", writer)


# --- another configuration ---------------------------------------------------------------------------------------------


def reload(daemon: Daemon) -> str:
    daemon.write_config()
    reply = daemon.ask(schema.Reload())
    assert isinstance(reply, schema.Done), reply
    return reply.message


def test_other_settings_are_taken_up_and_files_stay_open(daemon: Daemon) -> None:
    first = workers(daemon)
    with Writer(daemon.path("one") / "log") as writer:
        writer.wait_for_more()
        daemon.mounts["one"]["write_back_delay"] = 0.1
        message = reload(daemon)
        writer.wait_for_more()

    assert message == "one has other settings"
    assert workers(daemon)["two"] == first["two"]
    assert_complete(daemon.path("one") / "log", writer)
    assert reload(daemon) == "nothing is different"


def test_mounts_come_and_go_with_the_configuration(daemon: Daemon, source: Path) -> None:
    (daemon.path("two") / "kept.txt").write_text("sent before it goes\n")
    del daemon.mounts["two"]
    daemon.mounts["three"] = directory_mount(source)

    assert daemon.child is not None
    daemon.write_config()
    daemon.child.send_signal(signal.SIGHUP)
    eventually(lambda: [status.name for status in daemon.statuses()] == ["one", "three"], 20, "the mounts are others")
    daemon.wait_for_state("three", "live")

    assert (source / "kept.txt").read_text() == "sent before it goes\n"
    assert (daemon.path("three") / "there.txt").read_text() == "there\n"
    assert not os.path.ismount(daemon.home / "mnt" / "two")


@pytest.mark.expects_log("configuration is wrong")
def test_a_wrong_configuration_changes_nothing(daemon: Daemon) -> None:
    first = workers(daemon)
    daemon.config.write_text("[daemon\n")

    refused = daemon.ctl("reload")

    assert refused.returncode == 1
    assert "config.toml" in refused.stderr
    assert workers(daemon) == first
    assert (daemon.path("one") / "there.txt").read_text() == "there\n"


# --- looking inside ----------------------------------------------------------------------------------------------------


@pytest.mark.expects_log("offline|timeout|time limit|not answer|degraded|retry")
def test_what_programs_wait_for_is_listed(tmp_path: Path) -> None:
    with WsgiDAVServer(tmp_path / "dav", tmp_path / "work") as server:
        (server.root / "slow.bin").write_bytes(b"x" * 1000)
        keys = {**webdav_mount(server), "request_deadline": 5.0}
        with daemon_over({"dav": keys}, drain_timeout=1.0) as daemon:
            os.listdir(daemon.path("dav"))
            server.freeze()
            try:
                reader = subprocess.Popen(["cat", str(daemon.path("dav") / "slow.bin")], stderr=subprocess.DEVNULL)
                listed = eventually(lambda: daemon.ask(schema.Requests()).items, 5, "a request is listed")  # type: ignore[union-attr]
                shown = daemon.ctl("explain", "--requests")
                os.kill(daemon.status("dav").pid or 0, signal.SIGUSR1)
                eventually(lambda: '"message": "request"' in daemon.log.read_text(), 5, "the dump is in the log")
                reader.wait(20)
            finally:
                server.thaw()

            assert (listed[0].operation, listed[0].path) == ("read", str(daemon.path("dav") / "slow.bin"))
            assert "slow.bin" in shown.stdout
            assert '"message": "task"' in daemon.log.read_text()


# --- a service manager that keeps descriptors --------------------------------------------------------------------------


class Store:
    """What systemd does for a unit with `FileDescriptorStoreMax=`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fds: dict[str, int] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def look(self) -> None:
        """Takes in what was sent since the last look."""
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(self._socket, 4096, 4)
            except BlockingIOError:
                return
            fields = dict(line.split("=", 1) for line in message.decode().splitlines())
            if "FDSTOREREMOVE" in fields:
                os.close(self.fds.pop(fields["FDNAME"]))
            elif "FDSTORE" in fields:
                self.fds[fields["FDNAME"]] = fds[0]

    def close(self) -> None:
        self._socket.close()
        for fd in self.fds.values():
            os.close(fd)


WRITER = 'exec 5>>"$1"; echo before >&5; touch "$1.open"; read line; echo after >&5'


class KeptDaemon(Daemon):
    """A daemon whose service manager keeps its descriptors."""

    store: Store

    def launch(self) -> subprocess.Popen[bytes]:
        names, fds = list(self.store.fds), list(self.store.fds.values())
        # As systemd does it: descriptors from 3 on, and LISTEN_PID in the process that becomes the daemon.
        moves = " ".join(f"{3 + index}<&{fd}" for index, fd in enumerate(fds))
        script = f'export LISTEN_PID=$$; exec "$@" {moves}'
        listen = {"LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(names)} if fds else {}
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                ["bash", "-c", script, "bash", *program("nbmountd"), "run", "--config", str(self.config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=fds,
                env={**self.environment, "NOTIFY_SOCKET": str(self.store.path), **listen},
            )  # fmt: skip
        return self.child


@pytest.mark.expects_log("supervisor is gone")
def test_a_killed_supervisor_gets_its_mounts_back_from_the_service_manager(source: Path) -> None:
    daemon = KeptDaemon({"one": directory_mount(source)})
    daemon.store = Store(daemon.home / "notify")
    try:
        daemon.start()
        daemon.store.look()
        kept = sorted(daemon.store.fds)
        # A process of its own: a fork of ours would close its copy of the file, and wait for the daemon that it is to become.
        writer = subprocess.Popen(["sh", "-c", WRITER, "sh", str(daemon.path("one") / "log")], stdin=subprocess.PIPE)
        eventually(lambda: (daemon.path("one") / "log.open").exists(), 20, "the program has the file open")
        daemon.kill_supervisor()
        daemon.start()
        writer.communicate(b"go on\n", timeout=30)
        assert writer.returncode == 0
        assert (daemon.path("one") / "log").read_text() == "before\nafter\n"
        daemon.terminate()
        daemon.store.look()

        assert kept == ["fuse.one", "held.one", "note.one"]
        assert daemon.store.fds == {}
    finally:
        daemon.store.close()
        daemon.discard()
