"""A full disk for the state, a read-only server, a password revoked in mid-upload: said, kept, and sent when cured."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounted import modes
from tests.mounted.conftest import webdav_mount
from tests.mounted.harness import daemon_over, program
from tests.mounted.kernel import eventually
from tests.servers import ApacheServer, ServerProcess

MIB = 2**20

# --- the disk of the state directory --------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory with room for 96 MiB, of which the daemon leaves 64 free as long as it can."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "small", place]).returncode:
        pytest.skip("a small disk needs the right to mount a tmpfs")
    modes.hand_over(place)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def write_until_full(path: Path) -> tuple[int, int | None]:
    """Writes random mebibytes until one is refused: how many bytes were acknowledged, and the errno."""
    acknowledged = 0
    with path.open("wb", buffering=0) as file:
        for _ in range(200):
            try:
                acknowledged += file.write(pattern(acknowledged, MIB))
            except OSError as refused:
                return acknowledged, refused.errno
    return acknowledged, None


def pattern(offset: int, size: int) -> bytes:
    """The bytes of a file of ours at that place: each block of 8 tells where it belongs."""
    return b"".join(at.to_bytes(8, "little") for at in range(offset, offset + size, 8))


def fill(path: Path) -> None:
    """Takes whatever room there is."""
    with path.open("wb", buffering=0) as file:
        for block in (MIB, 4096):
            try:
                while True:
                    file.write(bytes(block))
            except OSError as full:
                assert full.errno == errno.ENOSPC


@pytest.mark.expects_log("full|ENOSPC|[Nn]o space|No room")
def test_a_full_disk_is_enospc_at_write_and_what_was_acknowledged_is_kept_and_sent(
    apache_server: ServerProcess, small_disk: Path
) -> None:
    folder = apache_server.root / "full-disk"
    folder.mkdir()
    keys = {**webdav_mount(apache_server, "full-disk/"), "write_back_delay": 3600.0}
    with daemon_over({"dav": keys}, state_dir=str(small_disk / "state")) as daemon:
        mount, before = daemon.path("dav"), daemon.status("dav")
        (mount / "before.bin").write_bytes(pattern(0, 5 * MIB))

        first, refused = write_until_full(mount / "first.bin")
        fill(small_disk / "ballast")
        second, refused_again = write_until_full(mount / "before.bin.part") if _can_make(mount) else (0, errno.ENOSPC)

        assert (refused, refused_again) == (errno.ENOSPC, errno.ENOSPC)
        assert first >= MIB
        assert (mount / "before.bin").read_bytes() == pattern(0, 5 * MIB)
        assert (mount / "first.bin").read_bytes() == pattern(0, first)
        (small_disk / "ballast").unlink()
        daemon.sync()
        # The local disk has the room of what was sent a moment after that is safe.
        eventually(lambda: os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize > 70 * MIB, 30, "room")
        (mount / "afterwards.bin").write_bytes(pattern(0, 3 * MIB))
        daemon.sync()
        assert (folder / "before.bin").read_bytes() == pattern(0, 5 * MIB)
        assert (folder / "first.bin").read_bytes() == pattern(0, first)
        assert (folder / "afterwards.bin").read_bytes() == pattern(0, 3 * MIB)
        if second:
            assert (folder / "before.bin.part").read_bytes() == pattern(0, second)
        after = daemon.status("dav")
        assert (after.pid, after.restarts, after.state) == (before.pid, before.restarts, "live")


def _can_make(mount: Path) -> bool:
    """Whether a name can be made on the full disk: it may be refused, but only by ENOSPC."""
    try:
        (mount / "before.bin.part").touch()
    except OSError as refused:
        assert refused.errno == errno.ENOSPC
        return False
    return True


@pytest.mark.expects_log("full|ENOSPC|[Nn]o space|No room|ended unasked")
def test_a_disk_that_somebody_else_fills_loses_nothing_when_the_worker_is_killed_then(
    apache_server: ServerProcess, small_disk: Path
) -> None:
    """No look at the free space has seen it yet: the disk itself refuses in the middle of a file."""
    folder = apache_server.root / "filled-disk"
    folder.mkdir()
    keys = {**webdav_mount(apache_server, "filled-disk/"), "write_back_delay": 3600.0}
    with daemon_over({"dav": keys}, state_dir=str(small_disk / "state")) as daemon:
        mount = daemon.path("dav")
        with (mount / "ours.bin").open("wb", buffering=0) as file:
            acknowledged = file.write(pattern(0, MIB))
            fill(small_disk / "ballast")
            with pytest.raises(OSError) as refused:
                for _ in range(64):
                    acknowledged += file.write(pattern(acknowledged, MIB))
            assert refused.value.errno == errno.ENOSPC
            (small_disk / "ballast").unlink()
            acknowledged += file.write(pattern(acknowledged, MIB))

        daemon.kill_worker("dav")

        daemon.wait_for_state("dav", "live")
        assert (mount / "ours.bin").read_bytes() == pattern(0, acknowledged)
        daemon.sync()
        assert (folder / "ours.bin").read_bytes() == pattern(0, acknowledged)


# --- the password ----------------------------------------------------------------------------------------------------------


class Relay:
    """A port of 127.0.0.1 that is `target`'s, until `limit` bytes of one connection went there: then `then` is called and the
    connection ends. Once; nothing is counted before `armed` is set. Stopped by leaving the `with`."""

    def __init__(self, target: int, limit: int, then: Callable[[], object]) -> None:
        self.armed, self.fired = threading.Event(), threading.Event()
        self._target, self._limit, self._then = target, limit, then
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        try:
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                threading.Thread(target=self._forward, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._forward, args=(server, client, False), daemon=True).start()
        except OSError:
            return  # closed

    def _forward(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        passed = 0
        try:
            while piece := source.recv(65536):
                passed += len(piece) if counts and self.armed.is_set() and not self.fired.is_set() else 0
                if passed > self._limit:
                    self._then()
                    self.fired.set()
                    break
                target.sendall(piece)
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.mark.expects_log("unauthenticated|degraded|401|[Pp]assword|credential|retry|sent again|not connected")
def test_a_password_revoked_in_mid_upload_keeps_the_file_and_the_right_one_sends_it_whole(tmp_path: Path) -> None:
    old, new = os.urandom(3 * MIB), os.urandom(4 * MIB)
    password = tmp_path / "password"
    with ApacheServer(tmp_path / "root", tmp_path / "work") as server:
        assert isinstance(server, ApacheServer)
        password.write_text(server.password)
        (server.root / "file.bin").write_bytes(old)
        with Relay(server.port, 2 * MIB, lambda: server.set_password("another")) as relay:
            keys = {
                "backend": "webdav", "url": f"http://127.0.0.1:{relay.port}{server.prefix}", "user": server.user,
                "password_file": str(password), "write_back_delay": 0.1, "freshness": 1.0,
            }  # fmt: skip
            with daemon_over({"dav": keys}) as daemon:
                path = daemon.path("dav") / "file.bin"
                assert path.read_bytes() == old

                relay.armed.set()
                path.write_bytes(new)
                assert relay.fired.wait(60)
                status = daemon.wait_for_state("dav", "unauthenticated")

                assert "password" in status.reason.lower()
                assert str(password) in daemon.ctl("status").stdout + status.reason
                assert path.read_bytes() == new
                assert (server.root / "file.bin").read_bytes() == old
                assert daemon.status("dav").unsent_files + daemon.status("dav").parked == 1
                password.write_text("another")
                daemon.wait_for_state("dav", "live")
                eventually(lambda: (server.root / "file.bin").read_bytes() != old, 60, "it is sent by itself")
                daemon.sync()
                assert (server.root / "file.bin").read_bytes() == new
                assert set(os.listdir(server.root)) - {".DAV"} == {"file.bin"}


# --- a server that takes no changes ---------------------------------------------------------------------------------------


@pytest.mark.expects_log("parked|refused|403|[Ff]orbidden|could be sent|not changed")
@pytest.mark.parametrize("how", ["asked to", "restart"])
def test_a_read_only_server_parks_what_is_written_and_takes_it_when_it_is_cured(how: str, tmp_path: Path) -> None:
    flag = tmp_path / "read-only"
    methods = "%{REQUEST_METHOD} =~ m#^(PUT|DELETE|MOVE|COPY|MKCOL|PROPPATCH)$#"
    extra = f'<If "{methods} && -f \'{flag}\'">\n    Require all denied\n  </If>'
    with ApacheServer(tmp_path / "root", tmp_path / "work", extra=extra) as server:
        (server.root / "old.txt").write_text("as the server has it")
        (server.root / "removed.txt").write_text("to be removed")
        with daemon_over({"dav": {**webdav_mount(server), "write_back_delay": 0.1}}) as daemon:
            mount = daemon.path("dav")
            assert (mount / "removed.txt").read_text() == "to be removed"
            flag.touch()

            (mount / "old.txt").write_text("edited here")
            (mount / "made").mkdir()
            (mount / "made" / "new.bin").write_bytes(pattern(0, MIB))
            (mount / "removed.txt").unlink()
            eventually(lambda: daemon.status("dav").parked >= 3, 60, "all of it is parked")

            late = daemon.ctl("sync", "--timeout", "0.2")
            shown = daemon.ctl("parked").stdout
            assert late.returncode == 4, late.stderr
            assert "403" in shown
            assert str(mount / "old.txt") in shown
            assert (mount / "old.txt").read_text() == "edited here"
            assert (mount / "made" / "new.bin").read_bytes() == pattern(0, MIB)
            assert (server.root / "old.txt").read_text() == "as the server has it"
            flag.unlink()
            if how == "asked to":
                assert daemon.ctl("parked", "retry").returncode == 0
            else:
                daemon.terminate()
                daemon.start()
            eventually(lambda: daemon.status("dav").unsent_files + daemon.status("dav").parked == 0, 60, "nothing is left")
            assert (server.root / "old.txt").read_text() == "edited here"
            assert (server.root / "made" / "new.bin").read_bytes() == pattern(0, MIB)
            assert not (server.root / "removed.txt").exists()
            assert daemon.status("dav").parked == 0


# --- who follows ----------------------------------------------------------------------------------------------------------


def test_events_are_json_lines_and_the_log_has_one_line_for_each_upload(apache_server: ServerProcess) -> None:
    (apache_server.root / "events").mkdir()
    keys = {**webdav_mount(apache_server, "events/"), "write_back_delay": 0.1}
    with daemon_over({"dav": keys}) as daemon:
        following = subprocess.Popen(
            [*program("nbmountctl"), "--json", "events"], env=daemon.environment, stdout=subprocess.PIPE, text=True
        )
        seen: list[str] = []
        assert following.stdout is not None
        reader = threading.Thread(target=lambda: seen.extend(iter(following.stdout.readline, "")))  # type: ignore[union-attr]
        reader.start()
        try:
            # When it has begun to follow is not said: so there is something to be told until something was.
            for number in range(100):
                name = f"file {number}"
                (daemon.path("dav") / name).write_text("said\n")
                daemon.sync()
                if any(name in line for line in list(seen)):
                    break
        finally:
            following.terminate()
            following.wait(20)
            reader.join(20)

        events = [json.loads(line) for line in seen if line.endswith("\n")]
        sent = [event for event in events if event["event"] == "sent"]
        assert sent, seen
        assert {event["mount"] for event in events} == {"dav"}
        assert all(event["at"] > 1_600_000_000 for event in events)
        assert any(event["path"].endswith(name) for event in sent)
        lines = [json.loads(line) for line in daemon.log.read_text().splitlines()]
        uploads = [line for line in lines if str(line.get("path", "")).endswith("file 0") and "seconds" in str(line)]
        assert len(uploads) == 1, lines
