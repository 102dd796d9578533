"""The process that serves one mount: builds the layers, starts every task, and ends them in order.

Lifecycle, from the inside out: **intake** (the FUSE session) ends first, so nothing new is accepted; **service** (fetches,
refresh, health, control) goes on while **drain** (the engine that sends) has its deadline; then everything is closed. Tasks
are started here and nowhere else in a worker; the layers below send to channels.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio

from nbmountd import places
from nbmountd.answers import Answers
from nbmountd.backends.base import Backend
from nbmountd.backends.d4science import D4ScienceBackend
from nbmountd.backends.directory import DirectoryBackend
from nbmountd.backends.onedata import OnedataBackend
from nbmountd.backends.onedata_native import OnedataNativeBackend
from nbmountd.backends.policy import PolicyBackend
from nbmountd.backends.webdav import WebDAVBackend
from nbmountd.config import (
    D4ScienceOptions,
    DaemonConfig,
    DirectoryOptions,
    MountConfig,
    OnedataNativeOptions,
    OnedataOptions,
    WebDAVOptions,
)
from nbmountd.control import schema
from nbmountd.control.server import serve_requests
from nbmountd.disk.budget import Budget
from nbmountd.disk.content import Content, ContentStore
from nbmountd.disk.state import open_state
from nbmountd.errors import ConfigError, NbmountdError, RemoteError
from nbmountd.fs.feed import Feed
from nbmountd.fs.filesystem import FileSystem
from nbmountd.fs.held import Held
from nbmountd.fs.nodes import Nodes
from nbmountd.fs.poll import PollingRefresh
from nbmountd.fs.reads import Reads
from nbmountd.fs.refresh import Refresh
from nbmountd.fs.repeats import Repeats
from nbmountd.fuse import session
from nbmountd.fuse.agreement import Flag
from nbmountd.fuse.notify import KernelNotifier
from nbmountd.fuse.operations import Operations
from nbmountd.insight import dump_on_signal
from nbmountd.log import configure, get_logger
from nbmountd.model import Capabilities, Health
from nbmountd.privileges import drop_privileges, keep_memory_private
from nbmountd.sync.engine import Engine
from nbmountd.sync.settle import Settle
from nbmountd.sync.steps import Steps

URGENT_FETCHES, AHEAD_FETCHES = 6, 3
"""Runners for fetches that somebody waits for, and for fetches ahead of readers."""
STEPS_AT_ONCE = 16
"""Of the engine; the policy lets as many to the remote as are good for it, others read, hash or clean up meanwhile."""
LISTINGS_AHEAD = 6
"""Listings side by side ahead of a program that walks a tree; the policy keeps a connection for others."""
QUOTA_EVERY = 60.0
ANSWER_GRACE = 1.0
"""Seconds for the answer to `Stop` to get out before the process ends."""
HOUSEKEEPING_EVERY = 1.0
FIRST_HOUSEKEEPING = 0.25
"""Seconds. It settles the journal of an earlier worker, which every start has to read until then."""

_log = get_logger(__name__)


@dataclass(frozen=True)
class WorkerStart:
    """Everything a worker is given by its supervisor; it owns the descriptors.

    `fuse_fd` is the mounted, initialised connection (FUSE_INIT has been answered); `control_fd` a listening unix socket
    on which it serves control/schema.py; `lifeline_fd` the reading end of a pipe that ends when the supervisor is gone.
    `agreement` is what was agreed with the kernel (fuse/mounting.py). `resume`: the kernel already knows inodes and open
    files of an earlier worker. `uid`/`gid`: whom to become before the first byte from a remote is read, None to stay.
    `held_fd` is the memory of fs/held.py, which goes from worker to worker of one mount; None: nothing is kept. `degraded`:
    workers kept dying, so nothing is changed or sent; what is in the way can be looked at and read.
    The descriptors are `launch.Descriptor` objects on the way, and integers when `serve` sees them.
    """

    mount: MountConfig
    daemon: DaemonConfig
    fuse_fd: Any
    control_fd: Any
    lifeline_fd: Any
    agreement: Any
    resume: bool
    uid: int | None
    gid: int | None
    held_fd: Any = None
    degraded: bool = False
    hidden: tuple[str, ...] = ()
    """Environment variables that hold credentials: no child of ours gets them."""


def run_worker(start: WorkerStart) -> None:
    """Serves the mount until told to stop. Runs in a process of its own; the exit status is 0 after an ordered stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor says when to stop
    if start.uid is not None and start.gid is not None:
        drop_privileges(start.uid, start.gid)
    keep_memory_private()
    configure(start.daemon.log_level, start.daemon.log_format, start.mount.name)
    trio.run(_serve, start)


def make_backend(mount: MountConfig) -> tuple[Backend, Callable[[], object] | None, Callable[[], tuple[int, int, int]]]:
    """The driver for a mount, its credential's fingerprint, and its traffic as (requests, received, sent)."""
    if isinstance(mount.options, WebDAVOptions):
        webdav = WebDAVBackend(mount.options, read_only=mount.read_only)

        def traffic() -> tuple[int, int, int]:
            counts = webdav.statistics()
            return counts.requests, counts.bytes_received, counts.bytes_sent

        return webdav, getattr(webdav, "credential_fingerprint", None), traffic
    if isinstance(mount.options, D4ScienceOptions):
        workspace = D4ScienceBackend(mount.options, read_only=mount.read_only)

        def workspace_traffic() -> tuple[int, int, int]:
            counts = workspace.statistics()
            return counts.requests, counts.bytes_received, counts.bytes_sent

        return workspace, workspace.credential_fingerprint, workspace_traffic
    if isinstance(mount.options, OnedataOptions):
        datahub = OnedataBackend(mount.options, read_only=mount.read_only)

        def datahub_traffic() -> tuple[int, int, int]:
            counts = datahub.statistics()
            return counts.requests, counts.bytes_received, counts.bytes_sent

        return datahub, datahub.credential_fingerprint, datahub_traffic
    if isinstance(mount.options, OnedataNativeOptions):
        native = OnedataNativeBackend(mount.options, read_only=mount.read_only)

        def native_traffic() -> tuple[int, int, int]:
            counts = native.statistics()
            return counts.requests, counts.bytes_received, counts.bytes_sent

        return native, native.credential_fingerprint, native_traffic
    if isinstance(mount.options, DirectoryOptions):
        return DirectoryBackend(mount.options, read_only=mount.read_only), None, lambda: (0, 0, 0)
    raise ConfigError(f"{mount.name}: no backend for {type(mount.options).__name__}")


async def _serve(start: WorkerStart) -> None:
    mount = msgspec.structs.replace(start.mount, read_only=True) if start.degraded else start.mount
    state = places.mount_directory(Path(start.daemon.state_dir), mount.name)
    cache = places.mount_directory(Path(start.daemon.cache_dir), mount.name)
    budgets: list[Budget] = []
    disk = open_state(state, cache, lambda count: budgets[0].reserve(count))
    database, store = disk.database, disk.store
    driver, credential, traffic = make_backend(mount)
    for name in start.hidden:
        os.environ.pop(name, None)  # the driver has taken its own
    backend = PolicyBackend(driver, deadline=mount.request_deadline, credential=credential)
    notifier = KernelNotifier(expire_only=Flag.HAS_EXPIRE_ONLY in start.agreement.flags)
    nodes = Nodes(mount, database, store, notifier, held=Held(start.held_fd))
    budgets.append(
        Budget(
            (state, cache),
            unsent_limit=start.daemon.unsent_size,
            cache_limit=start.daemon.cache_size,
            unsent=lambda: store.unsent_bytes,
            sent=lambda: store.sent_bytes,
            cached=lambda: store.cached_bytes,
            evict=partial(_evict, nodes, store),
        )
    )
    refresh = PollingRefresh(nodes, backend, freshness=mount.freshness, deadline=mount.request_deadline)
    wanted, news = trio.open_memory_channel[int](100)

    def remote_changed(content: Content) -> None:
        try:
            if content.node.base_parent is not None:
                wanted.send_nowait(content.node.base_parent)
        except trio.WouldBlock:
            return

    reads = Reads(nodes, store, backend, deadline=mount.request_deadline, remote_changed=remote_changed)
    uid = os.geteuid() if start.uid is None else start.uid
    gid = os.getegid() if start.gid is None else start.gid
    repeats = Repeats(database, resumed=start.resume)
    fs = FileSystem(nodes, store, reads, refresh, budgets[0], uid=uid, gid=gid, repeats=repeats)
    events = _Events(mount.name)
    steps = Steps(nodes, store, reads, refresh, backend, Settle(nodes, store, refresh, backend, events.emit))
    engine = Engine(
        nodes, steps, write_back_delay=mount.write_back_delay, emit=events.emit,
        away=lambda: backend.health in (Health.OFFLINE, Health.UNAUTHENTICATED),
    )  # fmt: skip
    fs.sync = engine
    fs.tell = backend.tell
    operations = Operations(fs, deadline=mount.request_deadline)
    _load_capabilities(nodes)
    fs.take_over()

    ending = _Ending()
    answers = Answers(
        mount, fs, engine, backend, operations, traffic, ending.stop, events.subscribe, start.daemon.log_format, state,
        partial(getattr, driver, "token_warning", ""),
    )
    async with trio.open_nursery() as service:
        listener = trio.socket.fromfd(start.control_fd, trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        os.close(start.control_fd)
        async with trio.open_nursery() as intake:
            await intake.start(partial(_intake, operations, start, ending))
            # All else after the first requests: when a worker has died, somebody waits for their answers.
            service.start_soon(serve_requests, listener, answers.answer)
            service.start_soon(_watch_lifeline, start.lifeline_fd, service.cancel_scope)
            service.start_soon(backend.run)
            service.start_soon(_connect, backend, nodes, engine, fs)
            service.start_soon(refresh.run_listings)
            service.start_soon(refresh.run)
            for _ in range(LISTINGS_AHEAD):
                service.start_soon(refresh.run_ahead)
            service.start_soon(Feed(nodes, backend, refresh).run)
            service.start_soon(_refresh_wanted, news, nodes, refresh)
            for _ in range(URGENT_FETCHES):
                service.start_soon(partial(reads.run, urgent=True))
            for _ in range(AHEAD_FETCHES):
                service.start_soon(partial(reads.run, urgent=False))
            service.start_soon(_housekeeping, nodes, store, budgets[0])
            service.start_soon(_watch_quota, backend, fs)
            service.start_soon(dump_on_signal, operations.describe_in_flight)
            if not start.degraded:
                service.start_soon(engine.run)
            for _ in range(STEPS_AT_ONCE):
                service.start_soon(engine.run_worker)
            notifier.start()
            _log.info("serving", resumed=start.resume or None)
        notifier.disarm()
        if not ending.handover:
            ending.left = await _drain(engine, ending.timeout)
        ending.drained.set()
        if ending.wanted.is_set():
            with trio.move_on_after(ANSWER_GRACE):
                await ending.answered.wait()
        service.cancel_scope.cancel()
    disk.close()
    with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
        await backend.aclose()


async def _intake(
    operations: Operations, start: WorkerStart, ending: _Ending, *, task_status: trio.TaskStatus[None]
) -> None:
    async with trio.open_nursery() as nursery:

        async def end() -> None:
            await ending.wanted.wait()
            session.stop()

        nursery.start_soon(end)
        await session.serve(
            operations, start.fuse_fd, start.agreement, resume=start.resume, task_status=task_status
        )
        nursery.cancel_scope.cancel()


class _Ending:
    """How the worker is told to stop, and what is left when it has."""

    def __init__(self) -> None:
        self.wanted = trio.Event()
        self.drained = trio.Event()
        self.answered = trio.Event()
        self.timeout = 0.0
        self.handover = False
        self.left = 0

    async def stop(self, timeout: float, *, handover: bool) -> AsyncGenerator[int, None]:
        """Ends intake, drains up to `timeout` seconds (not at all for a `handover`); then gives, once, how many nodes stay in
        the journal. The process ends when the caller has sent its answer and comes back."""
        self.timeout, self.handover = timeout, handover
        self.wanted.set()
        await self.drained.wait()
        try:
            yield self.left
        finally:
            self.answered.set()


async def _drain(engine: Engine, timeout: float) -> int:
    left = 0
    with trio.move_on_after(timeout):
        async for nodes, _ in engine.send_now([""]):
            left = len(nodes)
            if left and engine.all_stuck(nodes):
                break
    if left:
        _log.warning("not everything could be sent; it is kept and goes out at the next start", left=left)
    return left


async def _watch_lifeline(fd: int, scope: trio.CancelScope) -> None:
    """Without a supervisor nobody would start the next worker: end at once, everything is in the journal."""
    await trio.lowlevel.wait_readable(fd)
    _log.warning("the supervisor is gone")
    scope.cancel()


async def _connect(backend: PolicyBackend, nodes: Nodes, engine: Engine, fs: FileSystem) -> None:
    """Learns what the remote can do, now and whenever it comes back."""
    try:
        await backend.connect()
    except RemoteError as exc:
        _log.warning("not connected", cause=exc)
    health, was_away = None, True
    while True:
        if health is not backend.health:
            health = backend.health
            was_away |= health in (Health.OFFLINE, Health.UNAUTHENTICATED)
            # A remote that answers some requests and breaks others is live and degraded in turns: that forgives nothing.
            if health is Health.LIVE and was_away:
                was_away = False
                _keep_capabilities(nodes, backend.capabilities)
                fs.refresh.forget()
                fs.quota_wanted.set()
                engine.health_changed()
            _log.info("remote is " + health.value, cause=backend.health_reason or None)
        await backend.wait_health_change()


async def _refresh_wanted(news: trio.MemoryReceiveChannel[int], nodes: Nodes, refresh: Refresh) -> None:
    async for ino in news:
        node = nodes.database.get(ino)
        if node is not None and node.base_parent is not None:
            try:
                refresh.forget(ino)
                await refresh.list_soon(node)
            except NbmountdError as exc:
                _log.debug("cannot look at a changed directory", inode=ino, cause=exc)


async def _housekeeping(nodes: Nodes, store: ContentStore, budget: Budget) -> None:
    """Saves what was fetched, settles the journal, and makes the cache give way, once a second."""
    pause = FIRST_HOUSEKEEPING
    while True:
        await trio.sleep(pause)
        pause = HOUSEKEEPING_EVERY
        try:
            store.save_all_present()
            for call in store.settling():
                await trio.to_thread.run_sync(call)
            excess = budget.cache_excess
            if excess:
                _evict(nodes, store, excess)
        except (OSError, sqlite3.OperationalError) as exc:
            _log.warning("the local disk refuses housekeeping; it is tried again", cause=exc)


def _evict(nodes: Nodes, store: ContentStore, wanted: int) -> int:
    """Gives up cached bytes, longest unused first, until `wanted` are free; returns how many were."""
    freed = 0
    rows = nodes.database.connection.execute("SELECT ino FROM cached ORDER BY used_at").fetchall()
    for (ino,) in rows:
        if freed >= wanted:
            break
        node = nodes.database.get(ino)
        if node is not None:
            freed += store.evict(node)
    return freed


async def _watch_quota(backend: PolicyBackend, fs: FileSystem) -> None:
    while True:
        fs.quota_wanted = trio.Event()
        try:
            fs.quota = await backend.quota()
        except RemoteError as exc:
            _log.debug("no quota", cause=exc)
        else:
            fs.budget.learn_quota(fs.quota.available)
        with trio.move_on_after(QUOTA_EVERY):
            await fs.quota_wanted.wait()


def _load_capabilities(nodes: Nodes) -> None:
    """What the remote could do last time, for a start without network."""
    stored = nodes.database.get_meta("capabilities")
    if stored is not None:
        try:
            nodes.capabilities = msgspec.json.decode(stored, type=Capabilities)
        except msgspec.DecodeError:
            return


def _keep_capabilities(nodes: Nodes, capabilities: Capabilities) -> None:
    nodes.capabilities = capabilities
    nodes.database.set_meta("capabilities", msgspec.json.encode(capabilities).decode())


class _Events:
    """State changes for whoever follows them."""

    def __init__(self, mount: str) -> None:
        self._mount = mount
        self._followers: list[trio.MemorySendChannel[schema.Event]] = []

    def emit(self, event: str, path: str, **details: Any) -> None:
        for follower in list(self._followers):
            try:
                follower.send_nowait(
                    schema.Event(at=time.time(), mount=self._mount, event=event, path=path, details=details)
                )
            except (trio.WouldBlock, trio.BrokenResourceError):
                self._followers.remove(follower)  # too slow, or gone

    def subscribe(self) -> trio.MemoryReceiveChannel[schema.Event]:
        send, receive = trio.open_memory_channel[schema.Event](10_000)
        self._followers.append(send)
        return receive
