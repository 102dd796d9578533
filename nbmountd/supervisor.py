"""The daemon's first process: one keeper for each mount, the control socket, the signals, and the service manager.

It does no remote I/O and imports neither pyfuse3 nor a backend; what it holds (mounts, descriptors) outlives every worker.
Tasks: one keeper a mount, the control server, the signals, the watchdog. They end together; the keepers last.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

from nbmountd import activity, exporter, handover, insight, launch, ownership, places, systemd
from nbmountd.config import Config, secret_variables
from nbmountd.control.schema import Failed
from nbmountd.control.server import open_listener, serve_requests
from nbmountd.fleet import Fleet
from nbmountd.fuse.agreement import ALL_FLAGS, Flag
from nbmountd.handover import Handover
from nbmountd.keeper import Keeper, Resources, Rhythm
from nbmountd.log import get_logger
from nbmountd.privileges import owner_of_mounts
from nbmountd.relay import Relay

log = get_logger(__name__)

WORKER = "nbmountd.worker:run_worker"


async def run(
    config: Config,
    *,
    server: launch.ForkServer | None = None,
    socket_path: Path | None = None,
    rhythm: Rhythm | None = None,
    stop: trio.Event | None = None,
    environ: Mapping[str, str] = os.environ,
    load: Callable[[], Config] | None = None,
    passed: Mapping[str, int] | None = None,
    kernel_flags: Flag = ALL_FLAGS,
    task_status: trio.TaskStatus[Path] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keeps all mounts until SIGTERM, SIGINT or `stop`; then drains, unmounts and returns. Must run in the main thread.

    A second signal ends the drain: what is unsent stays in the journal. `task_status.started(socket)` when each mount has
    answered or failed; one mount's failure stops no other. `server` starts the workers and is closed in the end; None: one is
    made. `load` reads the configuration again (SIGHUP); None: it cannot be. `passed`: connections that somebody else mounted,
    by mount name; they are taken over. `kernel_flags` masks what the kernel offers. Raises StateError when directories cannot
    be used or another daemon uses them, ConfigError when NB_UID makes no sense.
    """
    handed = handover.received(environ)
    owner = owner_of_mounts((mount.path for mount in config.mounts), environ)
    for directory in (config.daemon.state_dir, config.daemon.cache_dir):
        places.private_directory(Path(directory), owner=owner)
    if socket_path is None:
        uid, gid = owner or (None, None)
        socket_path = places.control_socket(environ, uid=uid, gid=gid)
    server = server or launch.ForkServer(WORKER)
    stop = trio.Event() if stop is None else stop
    hurry = trio.Event()

    locks = (handed.lock_fd, handed.own_lock_fd) if handed else None
    async with ownership.owned(Path(config.daemon.state_dir), locks) as (lock_fd, own_lock_fd):
        listener = socket.socket(fileno=handed.listener_fd) if handed else open_listener(socket_path, owner=owner)
        spare = os.dup(listener.fileno())  # the server closes the one that it is given
        lifeline_fd, lifeline_end = (handed.lifeline_fd, handed.lifeline_end) if handed else os.pipe2(os.O_CLOEXEC)
        resources = Resources(
            config.daemon, server, owner, socket_path.parent / "workers", lifeline_fd, lock_fd, rhythm=rhythm or Rhythm(),
            kernel_flags=kernel_flags, passed=dict(passed or {}), environ=environ,
            hidden=secret_variables(config),
        )  # fmt: skip
        try:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1) as signals:
                async with trio.open_nursery() as nursery:
                    fleet = Fleet(config, resources, nursery, load)
                    fleet.begin({left.name: left for left in (handed.mounts if handed else handover.stored(environ))})
                    relay = Relay(fleet, nursery)
                    allowed = {0, os.geteuid(), *(owner or ())[:1]}
                    serving = await nursery.start(_serve, listener, relay, allowed)
                    nursery.start_soon(_heed, signals, fleet, stop, hurry)
                    nursery.start_soon(_feed_watchdog, environ)
                    await _start_reports(nursery, config, relay, environ)
                    nursery.start_soon(_announce, fleet, socket_path, handed, task_status)
                    nursery.start_soon(_end_with, fleet.upgrading, stop)
                    await stop.wait()
                    if fleet.upgrading.is_set():
                        fleet.leave_behind()
                    else:
                        ownership.say_stopping(lock_fd)
                        await _drain(fleet, rhythm or Rhythm(), hurry)
                    serving.cancel()
                    nursery.cancel_scope.cancel()
            if fleet.upgrading.is_set():
                log.info("becoming the installed version")
                handover.become_installed(
                    Handover(
                        lock_fd=lock_fd, own_lock_fd=own_lock_fd, lifeline_fd=lifeline_fd, lifeline_end=lifeline_end,
                        listener_fd=spare, mounts=tuple(fleet.legacy()), children=server.leave_behind(),
                    )
                )  # fmt: skip
        finally:
            server.close()
            listener.close()
            for fd in (spare, lifeline_end, lifeline_fd):
                os.close(fd)
            socket_path.unlink(missing_ok=True)
    log.info("stopped")


async def _end_with(upgrading: trio.Event, stop: trio.Event) -> None:
    await upgrading.wait()
    stop.set()


async def _serve(
    listener: object, relay: Relay, allowed: set[int], task_status: trio.TaskStatus[trio.CancelScope]
) -> None:
    with trio.CancelScope() as scope:
        task_status.started(scope)
        await serve_requests(listener, relay.handle, allowed_uids=allowed)  # type: ignore[arg-type]


async def _start_reports(nursery: trio.Nursery, config: Config, relay: Relay, environ: Mapping[str, str]) -> None:
    """What the configuration asks to tell others. A new start is needed to change it."""
    if config.daemon.metrics_listen is not None:
        await nursery.start(exporter.serve, config.daemon.metrics_listen, relay.metrics)
    if config.daemon.report_activity:
        hub = activity.hub_of(environ)
        if hub is None:
            log.warning(f"report_activity: no {activity.URL} and {activity.TOKEN} in the environment")
        else:
            nursery.start_soon(partial(activity.report, hub, relay.status, limit=config.daemon.report_activity_limit))


async def _announce(
    fleet: Fleet, socket_path: Path, handed: Handover | None, task_status: trio.TaskStatus[Path]
) -> None:
    for keeper in fleet.keepers:
        await keeper.settled.wait()
    for keeper in fleet.keepers:
        if keeper.state == "failed":
            log.warning("started without this mount", mount=keeper.mount.name, cause=keeper.reason)
    systemd.notify("READY=1", fleet.resources.environ)
    log.info("ready", mounts=len(fleet.keepers), socket=socket_path)
    task_status.started(socket_path)
    if handed is not None:
        for keeper in list(fleet.keepers):  # one by one: what waits for one worker does not wait for all
            answer = await keeper.restart()
            if isinstance(answer, Failed):
                log.warning("the worker of the version before goes on", mount=keeper.mount.name, cause=answer.message)
        for pid in handed.children:
            with suppress(ChildProcessError):
                await trio.to_thread.run_sync(os.waitpid, pid, 0, abandon_on_cancel=True)


async def _heed(signals: AsyncIterator[int], fleet: Fleet, stop: trio.Event, hurry: trio.Event) -> None:
    async for number in signals:
        if number == signal.SIGHUP:
            await fleet.reload()
        elif number == signal.SIGUSR1:
            for line in insight.tasks():
                log.info("task", at=line)
            for keeper in fleet.keepers:
                keeper.dump()
        elif not stop.is_set():
            log.info("stopping", signal=signal.Signals(number).name)
            stop.set()
        else:
            log.warning("told to stop again: ending without waiting for uploads; the rest stays in the journal")
            hurry.set()


async def _drain(fleet: Fleet, rhythm: Rhythm, hurry: trio.Event) -> None:
    """All at once, so the slowest remote costs its own time only. Each `stop` is bounded; `hurry` kills what is left."""
    timeout = fleet.config.daemon.drain_timeout
    longest = int((timeout + 2 * rhythm.stop_grace + 10) * 1e6)  # the unit's TimeoutStopSec may be meant for less
    systemd.notify(
        f"STOPPING=1\nEXTEND_TIMEOUT_USEC={longest}\nSTATUS=sending what is unsent, at most {timeout:g} s",
        fleet.resources.environ,
    )
    async with trio.open_nursery() as nursery:

        async def cut_short() -> None:
            await hurry.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(cut_short)
        async with trio.open_nursery() as stopping:
            for keeper in fleet.keepers:
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
