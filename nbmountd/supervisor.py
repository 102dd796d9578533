"""The daemon's first process: one keeper for each mount, the control socket, the signals, and the service manager.

It does no remote I/O and imports neither pyfuse3 nor a backend; what it holds (mounts, descriptors) outlives every worker.
Tasks: one keeper a mount, the control server, the signals, the watchdog. They end together; the keepers last.
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from nbmountd import launch, places, systemd
from nbmountd.config import Config
from nbmountd.control.server import open_listener, serve_requests
from nbmountd.errors import StateError
from nbmountd.keeper import Keeper, Resources, Rhythm
from nbmountd.log import get_logger
from nbmountd.privileges import owner_of_mounts
from nbmountd.relay import Relay

log = get_logger(__name__)

WORKER = "nbmountd.worker:run_worker"
LOCK_WAIT = 10.0
"""Seconds: a worker of a daemon that was killed notices the end of its lifeline and is gone well before."""


async def run(
    config: Config,
    *,
    worker: str = WORKER,
    socket_path: Path | None = None,
    rhythm: Rhythm | None = None,
    stop: trio.Event | None = None,
    environ: Mapping[str, str] = os.environ,
    task_status: trio.TaskStatus[Path] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keeps all mounts until SIGTERM, SIGINT or `stop`; then drains, unmounts and returns. Must run in the main thread.

    A second signal ends the drain: what is unsent stays in the journal. `task_status.started(socket)` when each mount has
    answered or failed; one mount's failure stops no other. `worker`: "module:function" that serves a mount. Raises
    StateError when directories cannot be used or another daemon uses them, ConfigError when NB_UID makes no sense.
    """
    rhythm = rhythm or Rhythm()
    owner = owner_of_mounts((mount.path for mount in config.mounts), environ)
    for directory in (config.daemon.state_dir, config.daemon.cache_dir):
        places.private_directory(Path(directory), owner=owner)
    if socket_path is None:
        uid, gid = owner or (None, None)
        socket_path = places.control_socket(environ, uid=uid, gid=gid)
    launch.preload(worker)
    stop = trio.Event() if stop is None else stop
    hurry = trio.Event()
    keepers: list[Keeper] = []

    def changed() -> None:
        states = [keeper.state for keeper in keepers]
        parts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
        systemd.notify(f"STATUS={', '.join(parts)}", environ)

    async with _locked(Path(config.daemon.state_dir) / "lock") as lock_fd:
        listener = open_listener(socket_path, owner=owner)
        lifeline_fd, lifeline_end = os.pipe2(os.O_CLOEXEC)
        try:
            resources = Resources(
                config.daemon, worker, owner, socket_path.parent / "workers", lifeline_fd, lock_fd, changed, rhythm
            )
            keepers += [Keeper(mount, resources) for mount in config.mounts]
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
                async with trio.open_nursery() as nursery:
                    for keeper in keepers:
                        nursery.start_soon(keeper.run)
                    relay = Relay(keepers, nursery, config.daemon.drain_timeout)
                    allowed = {0, os.geteuid(), *(owner or ())[:1]}
                    server = await nursery.start(_serve, listener, relay, allowed)
                    nursery.start_soon(_heed, signals, stop, hurry)
                    nursery.start_soon(_feed_watchdog, environ)
                    nursery.start_soon(_announce, keepers, socket_path, environ, task_status)
                    await stop.wait()
                    await _drain(keepers, config.daemon.drain_timeout, rhythm, hurry, environ)
                    server.cancel()
                    nursery.cancel_scope.cancel()
        finally:
            listener.close()
            os.close(lifeline_end)
            os.close(lifeline_fd)
            socket_path.unlink(missing_ok=True)
    log.info("stopped")


async def _serve(
    listener: object, relay: Relay, allowed: set[int], task_status: trio.TaskStatus[trio.CancelScope]
) -> None:
    with trio.CancelScope() as scope:
        task_status.started(scope)
        await serve_requests(listener, relay.handle, allowed_uids=allowed)  # type: ignore[arg-type]


async def _announce(
    keepers: list[Keeper], socket_path: Path, environ: Mapping[str, str], task_status: trio.TaskStatus[Path]
) -> None:
    for keeper in keepers:
        await keeper.settled.wait()
    for keeper in keepers:
        if keeper.state == "failed":
            log.warning("started without this mount", mount=keeper.mount.name, cause=keeper.reason)
    systemd.notify("READY=1", environ)
    log.info("ready", mounts=len(keepers), socket=socket_path)
    task_status.started(socket_path)


async def _heed(signals: AsyncIterator[int], stop: trio.Event, hurry: trio.Event) -> None:
    async for number in signals:
        if number == signal.SIGHUP:
            log.info("SIGHUP is reserved and does nothing")
        elif not stop.is_set():
            log.info("stopping", signal=signal.Signals(number).name)
            stop.set()
        else:
            log.warning("told to stop again: ending without waiting for uploads; the rest stays in the journal")
            hurry.set()


async def _drain(
    keepers: list[Keeper], timeout: float, rhythm: Rhythm, hurry: trio.Event, environ: Mapping[str, str]
) -> None:
    """All at once, so the slowest remote costs its own time only. Each `stop` is bounded; `hurry` kills what is left."""
    longest = int((timeout + 2 * rhythm.stop_grace + 10) * 1e6)  # the unit's TimeoutStopSec may be meant for less
    systemd.notify(
        f"STOPPING=1\nEXTEND_TIMEOUT_USEC={longest}\nSTATUS=sending what is unsent, at most {timeout:g} s", environ
    )
    async with trio.open_nursery() as nursery:

        async def cut_short() -> None:
            await hurry.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(cut_short)
        async with trio.open_nursery() as stopping:
            for keeper in keepers:
                stopping.start_soon(_stop, keeper, timeout)
        nursery.cancel_scope.cancel()


async def _stop(keeper: Keeper, timeout: float) -> None:
    answer = await keeper.stop(timeout)
    if message := answer.message:
        log.info("mount stopped", mount=keeper.mount.name, message=message)


async def _feed_watchdog(environ: Mapping[str, str]) -> None:
    interval = systemd.watchdog_interval(environ)
    while interval is not None:
        systemd.notify("WATCHDOG=1", environ)
        await trio.sleep(interval)


@asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[int]:
    """Holds the state directory: one daemon, and no worker of an earlier one. Raises StateError after `LOCK_WAIT` seconds.

    The lock belongs to the open file, which every worker inherits; it is free when the last of them is gone.
    """
    try:
        lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise StateError(f"{path}: {exc.strerror}; nbmountd must be able to write to its state directory") from exc
    try:
        with trio.move_on_after(LOCK_WAIT):
            while not _try_lock(lock_fd):  # noqa: ASYNC110 (the holder is another process)
                await trio.sleep(0.1)
        if not _try_lock(lock_fd):
            holder = os.pread(lock_fd, 32, 0).decode(errors="replace").strip()
            raise StateError(
                f"{path.parent} is in use by another nbmountd (pid {holder or 'unknown'}); stop that one, or give this one "
                "another state_dir"
            )
        os.ftruncate(lock_fd, 0)
        os.pwrite(lock_fd, f"{os.getpid()}\n".encode(), 0)
        yield lock_fd
    finally:
        os.close(lock_fd)


def _try_lock(lock_fd: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
