"""The supervisor with a worker that serves a real mount but has no remote."""

from __future__ import annotations

import base64
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from nbmountd import launch, ownership, relay, supervisor
from nbmountd.config import Config, DaemonConfig, DirectoryOptions, MountConfig
from nbmountd.control.client import ask
from nbmountd.control.schema import (
    AnyReply,
    AnyRequest,
    Cache,
    Done,
    Event,
    Events,
    Failed,
    Mount,
    MountStatus,
    Progress,
    Queue,
    QueueReply,
    Restart,
    Status,
    StatusReply,
    Stop,
    Sync,
    Text,
    Unmount,
)
from nbmountd.errors import StateError
from nbmountd.fuse import mounting
from nbmountd.fuse.agreement import ALL_FLAGS, Flag
from nbmountd.keeper import Rhythm

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse"),
]

ROOT = Path(__file__).parents[1]
WORKER = "tests.stub_worker:run"
FAST = Rhythm(probe=0.1, patience=1.0, start_patience=10.0, statfs_patience=5.0, stop_grace=0.5, deaths=4, retry=60.0,
              pauses=(0.0, 0.01))  # fmt: skip


def configuration(tmp_path: Path, *names: str, drain_timeout: float = 5.0) -> Config:
    daemon = DaemonConfig(
        state_dir=str(tmp_path / "state"), cache_dir=str(tmp_path / "cache"), drain_timeout=drain_timeout
    )
    mounts = tuple(
        MountConfig(name=name, path=str(tmp_path / "home" / name), backend="directory", options=DirectoryOptions(source="/"))
        for name in names
    )
    return Config(daemon=daemon, mounts=mounts)


def backing(config: Config, name: str) -> Path:
    directory = Path(config.daemon.state_dir) / name
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory.parent.chmod(0o700)
    return directory


@asynccontextmanager
async def running(config: Config, rhythm: Rhythm = FAST, kernel_flags: Flag = ALL_FLAGS) -> AsyncIterator[Path]:
    stop = trio.Event()
    socket_path = Path(config.daemon.state_dir).parent / "run" / "control.sock"

    async def run(*, task_status: trio.TaskStatus[Path]) -> None:
        await supervisor.run(
            config, server=launch.ForkServer(WORKER), socket_path=socket_path, rhythm=rhythm, stop=stop, environ={},
            kernel_flags=kernel_flags, task_status=task_status,
        )  # fmt: skip

    async with trio.open_nursery() as nursery:
        with trio.fail_after(20):
            yield await nursery.start(run)
        stop.set()
    for mount in config.mounts:
        assert mounting.find(mount.path) is None


async def replies(path: Path, request: AnyRequest) -> list[AnyReply]:
    async with aclosing(ask(path, request)) as answers:
        return [answer async for answer in answers]


async def answer(path: Path, request: AnyRequest) -> AnyReply:
    return (await replies(path, request))[-1]


async def status(path: Path, name: str) -> MountStatus:
    reply = await answer(path, Status(mount=name))
    assert isinstance(reply, StatusReply)
    return reply.mounts[0]


async def until(path: Path, name: str, **wanted: object) -> MountStatus:
    while True:
        seen = await status(path, name)
        if all(getattr(seen, field) == value for field, value in wanted.items()):
            return seen
        await trio.sleep(0.02)


async def read(path: str) -> bytes:
    return await trio.to_thread.run_sync(Path(path).read_bytes, abandon_on_cancel=True)


async def test_mounts_serve_files_and_are_gone_afterwards(tmp_path: Path) -> None:
    config = configuration(tmp_path, "a", "b")
    (backing(config, "a") / "f").write_bytes(b"first")

    async with running(config) as control:
        assert await read(f"{config.mounts[0].path}/f") == b"first"
        reply = await answer(control, Status())

        assert isinstance(reply, StatusReply)
        assert [(mount.name, mount.state, mount.unsent_files) for mount in reply.mounts] == [("a", "live", 7), ("b", "live", 7)]
        assert not reply.safe
        assert reply.pid == os.getpid()
    assert not control.exists()
    assert oct(os.stat(config.mounts[0].path).st_mode & 0o777) == "0o555"


async def test_a_killed_worker_is_replaced_and_the_reader_waits(tmp_path: Path) -> None:
    config = configuration(tmp_path, "a")
    path = config.mounts[0].path
    async with running(config) as control:
        before = await status(control, "a")
        with Path(path, "f").open("wb", buffering=0) as file:
            for number in range(3):
                await trio.to_thread.run_sync(file.write, b"x" * 4096)
                now = await until(control, "a", state="live")
                assert now.pid is not None
                os.kill(now.pid, signal.SIGKILL)
                await trio.to_thread.run_sync(file.write, b"y" * 4096)
                after = await until(control, "a", restarts=number + 1, state="live")
        assert after.pid != before.pid
        assert len(await read(f"{path}/f")) == 6 * 4096


async def test_a_worker_that_answers_nothing_is_replaced(tmp_path: Path) -> None:
    config = configuration(tmp_path, "a")
    async with running(config) as control:
        (backing(config, "a") / "deaf").touch()

        await until(control, "a", restarts=1, state="live")

        await read(f"{config.mounts[0].path}/counts")


async def test_a_status_does_not_wait_for_a_silent_worker(tmp_path: Path) -> None:
    config = configuration(tmp_path, "a", "b")
    async with running(config, Rhythm(probe=0.1)) as control:  # patient: nobody is killed within the test
        (backing(config, "a") / "deaf").touch()
        while (backing(config, "a") / "deaf").exists():  # noqa: ASYNC110
            await trio.sleep(0.01)

        begin = trio.current_time()
        reply = await answer(control, Status())

        assert isinstance(reply, StatusReply)
        assert trio.current_time() - begin < 3.5
        assert [mount.state for mount in reply.mounts] == ["degraded", "live"]
        assert "does not answer" in reply.mounts[0].reason
        os.kill(reply.mounts[0].pid or 0, signal.SIGKILL)
        await until(control, "a", state="live")


async def test_a_mount_whose_workers_keep_dying_can_still_be_read_and_is_tried_again(tmp_path: Path) -> None:
    config = configuration(tmp_path, "home")
    (backing(config, "home") / "f").write_text("still here\n")
    (backing(config, "home") / "crash-unless-degraded").touch()

    async with running(config, replace(FAST, retry=0.5)) as path:
        degraded = await until(path, "home", state="degraded")
        assert await read(f"{config.mounts[0].path}/f") == b"still here\n"
        (backing(config, "home") / "crash-unless-degraded").unlink()
        with trio.fail_after(10):
            await until(path, "home", state="live")

    assert "can only be read" in degraded.reason


async def test_a_kernel_that_cannot_send_again_gets_a_new_mount_and_no_caller_hangs(tmp_path: Path) -> None:
    config = configuration(tmp_path, "home")
    (backing(config, "home") / "f").write_text("still here\n")

    async with running(config, replace(FAST, retry=0.1), ALL_FLAGS & ~Flag.HAS_RESEND) as path:
        mount = config.mounts[0].path
        fd = os.open(f"{mount}/f", os.O_RDONLY)
        try:
            pid = (await status(path, "home")).pid or 0
            async with trio.open_nursery() as callers:
                (backing(config, "home") / "deaf").touch()
                while (backing(config, "home") / "deaf").exists():  # noqa: ASYNC110 (it has heard, and takes nothing any more)
                    await trio.sleep(0.01)
                callers.start_soon(trio.to_thread.run_sync, fails_or_is_answered, f"{mount}/f")
                with suppress(ProcessLookupError):  # the watch was faster
                    os.kill(pid, signal.SIGKILL)
                lost = await until(path, "home", state="failed")
            with trio.fail_after(10):
                await until(path, "home", state="live")

            with pytest.raises(OSError, match=r"not connected|aborted"):
                os.pread(fd, 100, 0)
            assert await read(f"{mount}/f") == b"still here\n"
        finally:
            with suppress(OSError):  # the flush finds nobody
                os.close(fd)

    assert "open files are lost" in lost.reason


def fails_or_is_answered(path: str) -> None:
    with suppress(OSError):
        os.stat(path + "-that-is-not-there")


async def test_a_kernel_that_cannot_send_again_keeps_open_files_over_a_restart_on_purpose(tmp_path: Path) -> None:
    config = configuration(tmp_path, "home")
    (backing(config, "home") / "f").write_text("still here\n")

    async with running(config, kernel_flags=ALL_FLAGS & ~Flag.HAS_RESEND) as path:
        fd = os.open(f"{config.mounts[0].path}/f", os.O_RDONLY)
        try:
            before = (await status(path, "home")).pid
            assert isinstance(await answer(path, Restart(mount="home")), Done)

            assert (await status(path, "home")).pid != before
            assert await trio.to_thread.run_sync(os.pread, fd, 100, 0) == b"still here\n"
        finally:
            os.close(fd)


async def test_a_worker_that_keeps_dying_is_given_up_and_the_mount_taken_away(tmp_path: Path) -> None:
    config = configuration(tmp_path, "a", "b")
    (backing(config, "a") / "crash").touch()

    async with running(config) as control:
        failed = await until(control, "a", state="failed")

        assert "4 workers died" in failed.reason
        assert "status 3" in failed.reason
        assert mounting.find(config.mounts[0].path) is None
        assert (await status(control, "b")).state == "live"
        (backing(config, "a") / "crash").unlink()
        assert isinstance(await answer(control, Mount(mount="a")), Done)
        await read(f"{config.mounts[0].path}/counts")


@pytest.mark.parametrize("how", ["mute", "crash"])
async def test_when_no_worker_can_be_had_the_connection_ends_and_is_tried_again(tmp_path: Path, how: str) -> None:
    """A caller that waits must not wait for ever, and the directory must not stay a dead mount."""
    config = configuration(tmp_path, "a")
    mount = Path(config.mounts[0].path)
    (backing(config, "a") / "f").write_text("still here\n")
    rhythm = replace(FAST, start_patience=0.3, outage=1.0, deaths=1000, pauses=(0.2,), retry=0.5)
    said: list[OSError | bytes] = []

    def call() -> None:
        try:
            said.append((mount / "f").read_bytes())
        except OSError as exc:
            said.append(exc)

    async with running(config, rhythm) as control, trio.open_nursery() as nursery:
        (backing(config, "a") / how).touch()
        os.kill((await status(control, "a")).pid or 0, signal.SIGKILL)
        with trio.fail_after(15):
            async with trio.open_nursery() as callers:
                callers.start_soon(trio.to_thread.run_sync, call)
                failed = await until(control, "a", state="failed")
        found = mounting.find(str(mount))
        (backing(config, "a") / how).unlink()
        with trio.fail_after(15):
            await until(control, "a", state="live")
        nursery.cancel_scope.cancel()

    assert "no worker has served for 1 s" in failed.reason
    assert isinstance(said[0], OSError), said
    assert found is None


async def test_a_wrong_configuration_is_said_at_once_and_stops_no_other_mount(tmp_path: Path) -> None:
    config = configuration(tmp_path, "a", "b")
    (backing(config, "a") / "refuse").touch()

    async with running(config) as control:
        failed = await status(control, "a")
        assert (failed.state, failed.reason, failed.restarts) == ("failed", "the url of the remote is no url", 1)
        assert (await status(control, "b")).state == "live"


async def test_a_mount_point_with_files_in_it_fails_alone_and_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tmp_path, "a", "b")
    mine = Path(config.mounts[0].path) / "mine.txt"
    trying, mount = threading.Lock(), mounting.mount

    def mount_unless_held(path: str, *args: Any, **options: Any) -> Any:
        with trying if path == config.mounts[0].path else nullcontext():
            return mount(path, *args, **options)

    monkeypatch.setattr(mounting, "mount", mount_unless_held)
    mine.parent.mkdir(parents=True)
    mine.touch()

    async with running(config, Rhythm(probe=0.1, retry=0.2)) as control:
        failed = await until(control, "a", state="failed")
        assert "not empty" in failed.reason and "mine.txt" in failed.reason
        assert (await status(control, "b")).state == "live"
        with trying:  # the next try waits, so that it can be looked at
            again = await until(control, "a", state="starting")
        assert failed.reason in again.reason, "why it failed is to be seen while it is tried again, too"
        mine.unlink()
        assert (await until(control, "a", state="live")).reason == ""


async def test_unmount_drains_and_mount_brings_it_back(tmp_path: Path) -> None:
    config = configuration(tmp_path, "a")
    (backing(config, "a") / "unsent").touch()
    async with running(config) as control:
        unmounted = await answer(control, Unmount(mount="a", timeout=3.0))

        assert unmounted == Failed(message="1 file is unsent", code=4)
        assert (backing(config, "a") / "stopped").read_text() == "3.0"
        assert mounting.find(config.mounts[0].path) is None
        assert (await status(control, "a")).state == "unmounted"
        assert isinstance(await answer(control, Queue(mount="a")), Failed)
        with pytest.raises(PermissionError):
            await _as_user(config.mounts[0].path + "/hidden")
        assert await answer(control, Mount(mount="a")) == Done(message=f"a at {config.mounts[0].path}")
        await read(f"{config.mounts[0].path}/counts")


async def _as_user(path: str) -> None:
    """Root may write anywhere; a plain user must not."""
    done = await trio.run_process(
        ["setpriv", "--reuid=1234", "--clear-groups", "touch", path], check=False, capture_stderr=True
    )
    if b"ermission denied" in done.stderr:
        raise PermissionError


async def test_a_mount_removed_by_hand_stays_removed(tmp_path: Path) -> None:
    config = configuration(tmp_path, "a")
    async with running(config) as control:
        await trio.to_thread.run_sync(mounting.unmount, config.mounts[0].path)

        gone = await until(control, "a", state="unmounted")

        assert "nbmountctl mount a" in gone.reason


async def test_a_mount_whose_connection_was_aborted_is_made_again(tmp_path: Path) -> None:
    config = configuration(tmp_path, "a")
    async with running(config, Rhythm(probe=0.1, retry=0.1)) as control:
        await trio.to_thread.run_sync(mounting.abort, config.mounts[0].path)

        while "aborted" not in (await status(control, "a")).reason:  # noqa: ASYNC110
            await trio.sleep(0.01)
        await until(control, "a", state="live")

        await read(f"{config.mounts[0].path}/counts")


async def test_nothing_is_called_safe_that_was_left_in_a_journal(tmp_path: Path) -> None:
    config = configuration(tmp_path, "a")
    (backing(config, "a") / "unsent").touch()
    async with running(config) as control:
        await answer(control, Unmount(mount="a"))

        reply = await answer(control, Status())

        assert isinstance(reply, StatusReply)
        assert not reply.safe
        assert reply.mounts[0].reason == "1 file is unsent"


def test_what_all_mounts_say_is_said_once() -> None:
    answers = [Done(message="safe"), Done(message="safe"), Done(), Done(message="sent")]
    assert relay._one_answer(answers) == Done(message="safe; sent")


async def test_requests_reach_the_worker_of_the_path_or_all(tmp_path: Path) -> None:
    config = configuration(tmp_path, "a", "b")
    a, b = (mount.path for mount in config.mounts)
    async with running(config) as control:
        queue = await answer(control, Queue())
        assert isinstance(queue, QueueReply)
        assert (queue.total, {item.mount for item in queue.items}) == (2, {"a", "b"})
        assert await answer(control, Cache(path=f"{b}/x/y")) == Text(text="b\n")
        synced = await replies(control, Sync())
        assert isinstance(synced[-1], Done)
        assert max(r.bytes_left for r in synced if isinstance(r, Progress)) == 40
        assert await answer(control, Sync(paths=(f"{a}/1", f"{a}/2"))) == Done(message="a 2")
        assert "no mount" in str(await answer(control, Sync(paths=("/etc/passwd",))))
        assert "there are: a, b" in str(await answer(control, Queue(mount="c")))
        assert isinstance(await answer(control, Stop()), Failed)


async def test_events_of_all_workers_are_relayed_until_the_client_leaves(tmp_path: Path) -> None:
    config = configuration(tmp_path, "a", "b")
    async with running(config) as control:
        seen = set()
        async with aclosing(ask(control, Events())) as events:
            async for event in events:
                assert isinstance(event, Event)
                seen.add(event.mount)
                if len(seen) == 2:
                    break
        assert seen == {"a", "b"}


async def test_a_worker_that_does_not_stop_is_killed_after_the_grace(tmp_path: Path) -> None:
    config = configuration(tmp_path, "a", drain_timeout=0.1)
    (backing(config, "a") / "slow-stop").touch()

    with trio.fail_after(10):
        async with running(config):
            pass


async def test_a_second_daemon_on_a_state_directory_is_refused_at_once(tmp_path: Path) -> None:
    config = configuration(tmp_path, "a")
    async with running(config):
        other = Config(daemon=config.daemon, mounts=())
        with pytest.raises(StateError, match=f"in use by another nbmountd \\(pid {os.getpid()}\\)"):
            with trio.fail_after(ownership.WAIT / 2):
                await supervisor.run(other, socket_path=tmp_path / "run2" / "control.sock", environ={})


async def test_a_daemon_waits_for_one_that_is_stopping(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    stopped = trio.Event()

    async def stop_slowly(*, task_status: trio.TaskStatus[None]) -> None:
        async with ownership.owned(state) as (lock_fd, _):
            ownership.say_stopping(lock_fd)
            task_status.started()
            await trio.sleep(0.3)
            stopped.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(stop_slowly)
        async with ownership.owned(state):
            assert stopped.is_set()
    assert (state / "lock").read_text() == f"{os.getpid()}\n"


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Not pytest's own, which each session closes to other users."""
    with tempfile.TemporaryDirectory(prefix="nbmountd-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


async def test_root_mounts_for_the_owner_and_the_worker_becomes_that_user(open_directory: Path) -> None:
    config = configuration(open_directory, "a")
    home = open_directory / "home"
    home.mkdir()
    os.chown(home, 1234, 1235)
    async with running(config) as control:
        seen = await status(control, "a")
        ids = Path(f"/proc/{seen.pid}/status").read_text().splitlines()
        values = dict(line.split(":\t", 1) for line in ids if ":\t" in line)
        assert values["Uid"].split() == ["1234"] * 4
        assert values["Gid"].split() == ["1235"] * 4
        assert values["Groups"].split() == ["1235"]
        assert (values["CapEff"], values["CapPrm"], values["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
        assert os.stat(config.daemon.state_dir).st_uid == 1234
        assert os.stat(control).st_uid == 1234
        done = await trio.run_process(
            ["setpriv", "--reuid=1234", "--regid=1235", "--clear-groups", "cat", f"{home}/a/counts"], capture_stdout=True
        )
        assert b"read" in done.stdout


# --- as a process of its own -------------------------------------------------------------------------------------------

DAEMON = """
import base64, pickle, sys, trio
from pathlib import Path
from typing import Any
from nbmountd import launch, supervisor
from nbmountd.keeper import Rhythm
config = pickle.loads(base64.b64decode(sys.argv[1]))
trio.run(lambda: supervisor.run(config, server=launch.ForkServer("tests.stub_worker:run"), socket_path=Path(sys.argv[2]),
                                rhythm=Rhythm(probe=0.1)))
for name in ("pyfuse3", "urllib3", "nbmountd.worker"):
    assert name not in sys.modules, name
"""


class Daemon:
    def __init__(self, config: Config, tmp_path: Path, **environment: str) -> None:
        self.control = tmp_path / "run" / "control.sock"
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = f"\0nbmountd-test-{os.getpid()}-{id(self)}"
        self.notify.bind(address)
        self.notify.settimeout(20)
        self.process = subprocess.Popen(
            [sys.executable, "-c", DAEMON, base64.b64encode(pickle.dumps(config)).decode(), self.control],
            cwd=ROOT, env={**os.environ, "NOTIFY_SOCKET": "@" + address[1:], **environment},
        )  # fmt: skip

    def wait_for(self, message: bytes) -> None:
        while message not in self.notify.recv(1000):
            pass


@pytest.fixture
def daemons() -> Iterator[list[Daemon]]:
    started: list[Daemon] = []
    yield started
    for daemon in started:
        daemon.notify.close()
        if daemon.process.poll() is None:
            daemon.process.terminate()
            daemon.process.wait(20)


def relatives(pid: int) -> set[int]:
    """All descendants: fork server, workers."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def stat(pid: int) -> list[str]:
    """The fields of proc(5)'s stat from the third on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def alive(pid: int) -> bool:
    try:
        return stat(pid)[0] not in ("Z", "X")
    except OSError:
        return False


def wait_until_dead(pids: set[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids if alive(pid)}
        time.sleep(0.02)


def test_sigterm_ends_everything_with_status_0_and_systemd_is_told(tmp_path: Path, daemons: list[Daemon]) -> None:
    config = configuration(tmp_path, "a", "b")
    daemon = Daemon(config, tmp_path, WATCHDOG_USEC="200000")
    daemons.append(daemon)
    daemon.wait_for(b"READY=1")
    daemon.wait_for(b"WATCHDOG=1")
    family = relatives(daemon.process.pid)
    assert len(family) >= 3

    daemon.process.terminate()

    daemon.wait_for(b"STOPPING=1")
    assert daemon.process.wait(15) == 0
    assert not any(mounting.find(mount.path) for mount in config.mounts)
    wait_until_dead(family)


def test_a_second_sigint_does_not_wait_for_the_drain(tmp_path: Path, daemons: list[Daemon]) -> None:
    config = configuration(tmp_path, "a", drain_timeout=300.0)
    (backing(config, "a") / "slow-stop").touch()
    daemon = Daemon(config, tmp_path)
    daemons.append(daemon)
    daemon.wait_for(b"READY=1")
    daemon.process.send_signal(signal.SIGINT)
    daemon.wait_for(b"STOPPING=1")

    daemon.process.send_signal(signal.SIGINT)

    assert daemon.process.wait(10) == 0


def test_after_kill_9_of_the_supervisor_all_processes_end_and_the_next_run_goes_on(
    tmp_path: Path, daemons: list[Daemon]
) -> None:
    config = configuration(tmp_path, "a", "b")
    first = Daemon(config, tmp_path)
    daemons.append(first)
    first.wait_for(b"READY=1")
    Path(config.mounts[0].path, "f").write_bytes(b"kept")
    family = relatives(first.process.pid)

    first.process.kill()
    first.process.wait()
    second = Daemon(config, tmp_path)
    daemons.append(second)
    second.wait_for(b"READY=1")

    assert Path(config.mounts[0].path, "f").read_bytes() == b"kept"
    wait_until_dead(family)


def test_workers_live_on_when_the_fork_server_dies(tmp_path: Path, daemons: list[Daemon]) -> None:
    config = configuration(tmp_path, "a")
    daemon = Daemon(config, tmp_path)
    daemons.append(daemon)
    daemon.wait_for(b"READY=1")
    parents = {pid: int(stat(pid)[1]) for pid in relatives(daemon.process.pid)}
    (parent,) = [pid for pid, its in parents.items() if its == daemon.process.pid]
    (worker,) = [pid for pid, its in parents.items() if its == parent]

    os.kill(parent, signal.SIGKILL)
    time.sleep(0.3)
    assert alive(worker)
    os.kill(worker, signal.SIGKILL)

    Path(config.mounts[0].path, "f").write_bytes(b"served by a worker of the next fork server")


# --- as an ordinary user -----------------------------------------------------------------------------------------------

NOBODY = 65534

IN_NAMESPACE = r"""
set -e
mount --make-rprivate /
mknod -m 666 "$1/fuse" c 10 229
mount --bind "$1/fuse" /dev/fuse
setpriv --reuid=$5 --regid=$5 --clear-groups --inh-caps=-all env "$2" -c "$3" "$4" "$1/home/run/control.sock"
"""

USE_IT = """
import base64, os, pickle, signal, sys, trio
from contextlib import aclosing
from pathlib import Path
from typing import Any
from nbmountd import launch, supervisor
from nbmountd.control.client import ask
from nbmountd.control.schema import Status
from nbmountd.fuse import mounting
from nbmountd.keeper import Rhythm
config = pickle.loads(base64.b64decode(sys.argv[1]))
file = Path(config.mounts[0].path) / "f"

async def main():
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        control = await nursery.start(lambda task_status: supervisor.run(
            config, server=launch.ForkServer("tests.stub_worker:run"), socket_path=Path(sys.argv[2]), rhythm=Rhythm(probe=0.1),
            stop=stop, environ={}, task_status=task_status))
        await trio.to_thread.run_sync(file.write_bytes, b"one")
        async with aclosing(ask(control, Status())) as replies:
            pid = (await replies.__anext__()).mounts[0].pid
        os.kill(pid, signal.SIGKILL)
        assert await trio.to_thread.run_sync(file.read_bytes) == b"one"
        stop.set()
    assert mounting.find(config.mounts[0].path) is None
    print("done as", os.geteuid())

trio.run(main)
"""


def test_an_ordinary_user_runs_it_with_the_setuid_helper(open_directory: Path) -> None:
    tmp_path = open_directory
    (tmp_path / "home").mkdir()
    os.chown(tmp_path / "home", NOBODY, NOBODY)
    config = configuration(tmp_path / "home", "a")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    setpriv = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", "env"]
    candidates = [sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"]
    usable = [
        python for python in candidates
        if not subprocess.run(
            [*setpriv, python, "-c", "import pyfuse3, trio"], env=environment, capture_output=True, check=False
        ).returncode
    ]  # fmt: skip
    if not usable:
        pytest.skip("no interpreter with pyfuse3 that an ordinary user may execute")
    blob = base64.b64encode(pickle.dumps(config)).decode()

    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", IN_NAMESPACE, "sh", tmp_path, usable[0], USE_IT, blob, str(NOBODY)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip

    assert done.stdout == f"done as {NOBODY}\n", done.stderr
