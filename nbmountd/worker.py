"""The process that serves one mount: builds the layers, starts every task, and ends them in order.

Lifecycle, from the inside out: **intake** (the FUSE session) ends first, so nothing new is accepted; **service** (fetches,
refresh, health, control) goes on while **drain** (the engine that sends) has its deadline; then everything is closed. Tasks
are started here and nowhere else in a worker; the layers below send to channels.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from nbmountd import places
from nbmountd.answers import Answers
from nbmountd.backends.base import Backend
from nbmountd.backends.directory import DirectoryBackend
from nbmountd.backends.policy import PolicyBackend
from nbmountd.backends.webdav import WebDAVBackend
from nbmountd.config import DaemonConfig, DirectoryOptions, MountConfig, WebDAVOptions
from nbmountd.control import schema
from nbmountd.control.server import serve_requests
from nbmountd.disk.budget import Budget
from nbmountd.disk.content import Content, ContentStore
from nbmountd.disk.database import Database
from nbmountd.disk.journal import Journal
from nbmountd.errors import ConfigError, NbmountdError, RemoteError
from nbmountd.fs.filesystem import FileSystem
from nbmountd.fs.nodes import Nodes
from nbmountd.fs.reads import Reads
from nbmountd.fs.refresh import Refresh
from nbmountd.fuse import session
from nbmountd.fuse.agreement import Flag
from nbmountd.fuse.notify import KernelNotifier
from nbmountd.fuse.operations import Operations
from nbmountd.log import configure, get_logger
from nbmountd.model import Capabilities, Health
from nbmountd.privileges import drop_privileges
from nbmountd.sync.engine import Engine
from nbmountd.sync.settle import Settle
from nbmountd.sync.steps import Steps

URGENT_FETCHES, AHEAD_FETCHES = 6, 3
"""Runners for fetches that somebody waits for, and for fetches ahead of readers."""
QUOTA_EVERY = 60.0
HOUSEKEEPING_EVERY = 1.0

_log = get_logger(__name__)


@dataclass(frozen=True)
class WorkerStart:
    """Everything a worker is given by its supervisor; it owns the descriptors.

    `fuse_fd` is the mounted, initialised connection (FUSE_INIT has been answered); `control_fd` a listening unix socket
    on which it serves control/schema.py; `lifeline_fd` the reading end of a pipe that ends when the supervisor is gone.
    `agreement` is what was agreed with the kernel (fuse/mounting.py). `resume`: the kernel already knows inodes and open
    files of an earlier worker. `uid`/`gid`: whom to become before the first byte from a remote is read, None to stay.
    The descriptors may be `multiprocessing.reduction.DupFd` objects on the way; they are integers when `serve` sees them.
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


def run_worker(start: WorkerStart) -> None:
    """Serves the mount until told to stop. Runs in a process of its own; the exit status is 0 after an ordered stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor says when to stop
    if start.uid is not None and start.gid is not None:
        drop_privileges(start.uid, start.gid)
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
    if isinstance(mount.options, DirectoryOptions):
        return DirectoryBackend(mount.options, read_only=mount.read_only), None, lambda: (0, 0, 0)
    raise ConfigError(f"{mount.name}: no backend for {type(mount.options).__name__}")


async def _serve(start: WorkerStart) -> None:
    mount = start.mount
    state = places.mount_directory(Path(start.daemon.state_dir), mount.name)
    cache = places.mount_directory(Path(start.daemon.cache_dir), mount.name)
    database = Database(state / "nodes.db")
    journal = Journal(state / "journal")
    budgets: list[Budget] = []
    store = ContentStore(database, journal, state, cache, lambda count: budgets[0].reserve(count))
    store.recover(power_lost=_rebooted(database))
    driver, credential, traffic = make_backend(mount)
    backend = PolicyBackend(driver, deadline=mount.request_deadline, credential=credential)
    notifier = KernelNotifier(expire_only=Flag.HAS_EXPIRE_ONLY in start.agreement.flags)
    nodes = Nodes(mount, database, store, notifier, resumed=start.resume)
    budgets.append(
        Budget(
            state,
            unsent_limit=start.daemon.unsent_size,
            cache_limit=start.daemon.cache_size,
            unsent=lambda: store.unsent_bytes,
            cached=lambda: store.cached_bytes,
            evict=partial(_evict, nodes, store),
        )
    )
    refresh = Refresh(nodes, backend, freshness=mount.freshness, deadline=mount.request_deadline)
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
    fs = FileSystem(nodes, store, reads, refresh, budgets[0], uid=uid, gid=gid)
    events = _Events(mount.name)
    steps = Steps(nodes, store, reads, refresh, backend, Settle(nodes, store, refresh, backend, events.emit))
    engine = Engine(nodes, steps, write_back_delay=mount.write_back_delay, emit=events.emit)
    fs.sync = engine
    operations = Operations(fs, deadline=mount.request_deadline)
    _load_capabilities(nodes)
    if not start.resume:
        nodes.drop_leftovers()

    ending = _Ending()
    answers = Answers(
        mount, fs, engine, backend, operations.requests, traffic, ending.stop, events.subscribe, start.daemon.log_format
    )
    async with trio.open_nursery() as service:
        listener = trio.socket.fromfd(start.control_fd, trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        os.close(start.control_fd)
        service.start_soon(serve_requests, listener, answers.answer)
        service.start_soon(_watch_lifeline, start.lifeline_fd, service.cancel_scope)
        service.start_soon(backend.run)
        service.start_soon(_connect, backend, nodes, engine, fs)
        service.start_soon(refresh.run)
        service.start_soon(_refresh_wanted, news, nodes, refresh)
        for _ in range(URGENT_FETCHES):
            service.start_soon(partial(reads.run, urgent=True))
        for _ in range(AHEAD_FETCHES):
            service.start_soon(partial(reads.run, urgent=False))
        service.start_soon(_housekeeping, nodes, store, budgets[0])
        service.start_soon(_watch_quota, backend, fs)
        service.start_soon(engine.run)
        for _ in range(max(1, min(6, nodes.capabilities.connections - 2))):
            service.start_soon(engine.run_worker)
        async with trio.open_nursery() as intake:
            await intake.start(partial(_intake, operations, start, ending))
            notifier.start()
            _log.info("serving", resumed=start.resume or None)
        notifier.disarm()
        ending.left = await _drain(engine, ending.timeout)
        ending.drained.set()
        await trio.sleep(0.1)  # the answer to Stop gets out
        service.cancel_scope.cancel()
    store.close()
    database.close()
    journal.close()
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
        self.timeout = 0.0
        self.left = 0

    async def stop(self, timeout: float) -> int:
        """Ends intake, drains up to `timeout` seconds; returns how many nodes stay in the journal."""
        self.timeout = timeout
        self.wanted.set()
        await self.drained.wait()
        return self.left


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
    health = None
    while True:
        if health is not backend.health:
            health = backend.health
            if health is Health.LIVE:
                _keep_capabilities(nodes, backend.capabilities)
                fs.refresh.forget()
                engine.health_changed()
            _log.info("remote is " + health.value, cause=backend.health_reason or None)
        await backend.wait_health_change()


async def _refresh_wanted(news: trio.MemoryReceiveChannel[int], nodes: Nodes, refresh: Refresh) -> None:
    async for ino in news:
        node = nodes.database.get(ino)
        if node is not None and node.base_parent is not None:
            try:
                refresh.forget(ino)
                await refresh.list_now(node)
            except NbmountdError as exc:
                _log.debug("cannot look at a changed directory", inode=ino, cause=exc)


async def _housekeeping(nodes: Nodes, store: ContentStore, budget: Budget) -> None:
    """Saves what was fetched, and makes the cache give way, once a second."""
    while True:
        await trio.sleep(HOUSEKEEPING_EVERY)
        store.save_all_present()
        excess = budget.cache_excess
        if excess:
            _evict(nodes, store, excess)


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
        try:
            quota = await backend.quota()
        except RemoteError:
            await trio.sleep(QUOTA_EVERY)
            continue
        fs.quota = quota
        available = quota.available
        fs.budget.quota_available = None if available is None else max(0, available - fs.store.unsent_bytes)
        await trio.sleep(QUOTA_EVERY)


def _load_capabilities(nodes: Nodes) -> None:
    """What the remote could do last time, for a start without network."""
    import msgspec

    stored = nodes.database.get_meta("capabilities")
    if stored is not None:
        try:
            nodes.capabilities = msgspec.json.decode(stored, type=Capabilities)
        except msgspec.DecodeError:
            return


def _keep_capabilities(nodes: Nodes, capabilities: Capabilities) -> None:
    import msgspec

    nodes.capabilities = capabilities
    nodes.database.set_meta("capabilities", msgspec.json.encode(capabilities).decode())


def _rebooted(database: Database) -> bool:
    """Whether the machine was restarted since the state was written: then unsynced bytes may be gone."""
    now = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    before = database.get_meta("boot_id")
    database.set_meta("boot_id", now)
    return before is not None and before != now


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
