"""The whole core over a remote in memory: state directory, nodes, contents, file system, engine, policy, under a clock that
jumps. It can be killed and built again from what is on the disk. It knows nothing of what a test does with it.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import trio
import trio.testing

from nbmountd.backends.base import Backend, Body, Piece, Sink, Ticket
from nbmountd.backends.memory import NO_ATTRIBUTES, Fault, MemoryBackend, MemoryRemote, Thing
from nbmountd.backends.policy import PolicyBackend
from nbmountd.config import DirectoryOptions, MountConfig
from nbmountd.disk.budget import Budget
from nbmountd.disk.content import Content, Layer
from nbmountd.disk.database import Node, Transaction
from nbmountd.disk.state import open_state
from nbmountd.errors import (
    NbmountdError,
    RemoteDenied,
    RemoteError,
    RemoteFull,
    RemoteLocked,
    RemoteProtocolError,
    RemoteTooLarge,
    RemoteUnavailable,
    Unauthenticated,
    VersionMismatch,
)
from nbmountd.fs.filesystem import FileSystem
from nbmountd.fs.held import Held
from nbmountd.fs.nodes import Nodes
from nbmountd.fs.reads import Reads
from nbmountd.fs.refresh import Refresh
from nbmountd.model import Attributes, Capabilities, Entry, Health, Kind, Place, Quota, Version
from nbmountd.sync.engine import Engine
from nbmountd.sync.settle import Settle
from nbmountd.sync.steps import Steps

T = TypeVar("T")
START_NS = 1_800_000_000 * 10**9
CHANGES = ("upload", "write_ranges", "make_directory", "make_symlink", "move", "remove", "set_attributes")
UNSET = object()


class Disk:
    """The state and cache directories of one life of the process."""

    def __init__(self, home: Path, generation: int = 0) -> None:
        self.home, self.generation = home, generation
        self.state_dir, self.cache_dir = home / f"state {generation}", home / f"cache {generation}"
        self.state = open_state(self.state_dir, self.cache_dir, lambda count: self.reserve(count), boot_id="always up")
        self.database, self.store = self.state.database, self.state.store
        self.reserve: Callable[[int], None] = lambda count: None

    def left_behind(self) -> Disk:
        """What the next process finds when this one dies now."""
        for old, name in ((self.state_dir, "state"), (self.cache_dir, "cache")):
            if old.exists():
                shutil.copytree(old, self.home / f"{name} {self.generation + 1}")
        return Disk(self.home, self.generation + 1)

    def abandon(self) -> None:
        """Closes without anything that an orderly end does, and leaves nothing."""
        store = self.store
        for content in list(store._open.values()):  # the only way to end a store without its consent
            store._cache._close(content)
            for layer in content.layers:
                if layer.fd >= 0:
                    os.close(layer.fd)
        self.state.journal.close()
        self.database.close()
        shutil.rmtree(self.state_dir, ignore_errors=True)
        shutil.rmtree(self.cache_dir, ignore_errors=True)


class Time:
    """Virtual time, which jumps when nobody can do anything now; unlike trio's autojump it waits for worker threads."""

    def __init__(self) -> None:
        self.clock = trio.testing.MockClock()
        self.wall_offset = 0.0
        self.blocked_threads = 0
        """Worker threads that wait for something that takes virtual time."""

    def wall_ns(self) -> int:
        return START_NS + int((self.clock.current_time() + self.wall_offset) * 1e9)

    @property
    def busy_threads(self) -> int:
        return int(trio.to_thread.current_default_thread_limiter().borrowed_tokens) - self.blocked_threads

    async def run(self) -> None:
        while True:
            await trio.testing.wait_all_tasks_blocked()
            if self.busy_threads > 0:
                time.sleep(0.00003)
                continue
            ahead = trio.lowlevel.current_statistics().seconds_to_next_deadline
            assert ahead != float("inf"), "everybody waits for ever"
            if ahead > 0:
                self.clock.jump(ahead)


class Recording(MemoryRemote):
    """A remote that remembers the bytes of every version it ever had. No two things have the time of one second: of two
    files of one size and time, one that others move to where ours was to go is taken for ours, if nothing of ours is here."""

    def __init__(self, clock_ns: Callable[[], int]) -> None:
        self.contents: dict[str, bytes] = {}
        self._last_ns = 0
        super().__init__(clock_ns=lambda: self._later_ns(clock_ns()))

    def _later_ns(self, now_ns: int) -> int:
        self._last_ns = max(self._last_ns + 10**9, now_ns)
        return self._last_ns

    def make(self, kind: Kind, attributes: Attributes = NO_ATTRIBUTES) -> Thing:
        thing = super().make(kind, attributes)
        self.contents[thing.version] = b""
        return thing

    def write(self, path: tuple[str, ...], thing: Thing, content: bytes, attributes: Attributes) -> None:
        super().write(path, thing, content, attributes)
        self.contents[thing.version] = content

    def renew(self, thing: Thing) -> None:
        """The same bytes under another version."""
        thing.version = self.new_version()
        self.contents[thing.version] = thing.content


class Flaky:
    """A driver that takes its time and fails as it is told: `plan[verb]` holds the kinds of failure of the next calls."""

    def __init__(self, inner: MemoryBackend, chance: random.Random) -> None:
        self.inner = inner
        self.chance = chance
        self.latency = 0.0
        self.plan: dict[str, deque[str]] = {}
        self.answers: dict[str, deque[Callable[[], Awaitable[Any]]]] = {}
        self.restless = False
        """Files get a new version when they are moved or their attributes are set."""
        self.refused: object = UNSET
        """A credential that is refused."""
        self.credential = 0

    def answer_with(self, verb: str, call: Callable[[], Awaitable[Any]]) -> None:
        """The next call of `verb` is answered by this one."""
        self.answers.setdefault(verb, deque()).append(call)

    def fail(self, verb: str, *kinds: str) -> None:
        self.plan.setdefault(verb, deque()).extend(kinds)

    def calm(self) -> None:
        self.plan.clear()
        self.latency = 0.0
        self.inner.outage = None
        self.inner.remote.space = None
        self.credential += 1

    async def _do(self, verb: str, call: Callable[[], Awaitable[T]]) -> T:
        if self.answers.get(verb):
            answer: T = await self.answers[verb].popleft()()
            return answer
        queue = self.plan.get(verb)
        kind = queue.popleft() if queue else ""
        change = verb in CHANGES
        credential = self.credential
        await self._pause()
        if self.refused == credential or kind == "unauthenticated":
            self.refused = credential
            raise Unauthenticated("refused")
        if kind == "error":
            raise RemoteUnavailable("500")
        if kind == "maybe":
            raise RemoteUnavailable("connection reset before it was taken", in_doubt=change)
        if kind == "busy":
            raise RemoteUnavailable("503", retry_after=20.0)
        if kind == "slow down":
            raise RemoteUnavailable("429", retry_after=5.0)
        if kind == "locked":
            raise RemoteLocked("423")
        if kind == "mismatch":
            raise VersionMismatch("412")
        if kind == "full":
            raise RemoteFull("507")
        if kind == "denied":
            raise RemoteDenied("403")
        if kind == "too large":
            raise RemoteTooLarge("413")
        if kind == "nonsense":
            raise RemoteProtocolError("nonsense", in_doubt=change)
        if kind == "hang":
            await trio.sleep(10_000)
        if kind == "cut":
            self.inner.fail(verb, Fault(cut=self.chance.randrange(0, 64)))
        if kind == "stall":
            self.inner.fail(verb, Fault(stall=(self.chance.randrange(0, 64), trio.Event())))
        result = await call()
        await self._pause()
        if kind == "lost":
            raise RemoteUnavailable("connection reset before the answer", in_doubt=change)
        if kind == "silent":
            await trio.sleep(10_000)
        if kind in ("short", "long") and isinstance(result, Entry) and result.size:
            return replace(result, size=result.size + (1 if kind == "long" else -1))
        return result

    async def _pause(self) -> None:
        if self.latency:
            await trio.sleep(self.chance.uniform(0, self.latency))

    async def connect(self) -> Capabilities:
        return await self._do("connect", self.inner.connect)

    async def stat(self, place: Place) -> Entry:
        return await self._do("stat", partial(self.inner.stat, place))

    async def list(self, place: Place) -> list[Entry]:
        return await self._do("list", partial(self.inner.list, place))

    async def read(self, place: Place, version: Version | None, start: int, stop: int, sink: Sink) -> None:
        kind = next(iter(self.plan.get("read", ())), "")

        async def call() -> None:
            await self.inner.read(place, version, start, max(start, stop - 1) if kind == "short" else stop, sink)
            if kind == "long":
                await trio.to_thread.run_sync(sink, memoryview(b"and some more"))

        await self._do("read", call)

    async def upload(
        self, place: Place, body: Body, *, replaces: Version | None, attributes: Attributes, ticket: Ticket
    ) -> Entry:
        call = partial(self.inner.upload, place, body, replaces=replaces, attributes=attributes, ticket=ticket)
        return await self._do("upload", call)

    async def write_ranges(
        self, place: Place, pieces: Sequence[Piece], size: int, *, replaces: Version, attributes: Attributes
    ) -> Entry:
        call = partial(self.inner.write_ranges, place, pieces, size, replaces=replaces, attributes=attributes)
        return await self._do("write_ranges", call)

    async def make_directory(self, place: Place, attributes: Attributes) -> Entry:
        return await self._do("make_directory", partial(self.inner.make_directory, place, attributes))

    async def make_symlink(self, place: Place, target: str, attributes: Attributes) -> Entry:
        return await self._do("make_symlink", partial(self.inner.make_symlink, place, target, attributes))

    async def move(
        self, source: Place, target: Place, *, kind: Kind, version: Version | None, replaces: Version | None
    ) -> Entry:
        call = partial(self.inner.move, source, target, kind=kind, version=version, replaces=replaces)
        return await self._do("move", partial(self._another_version, target, call))

    async def remove(self, place: Place, *, kind: Kind, version: Version | None) -> None:
        await self._do("remove", partial(self.inner.remove, place, kind=kind, version=version))

    async def set_attributes(self, place: Place, attributes: Attributes, *, kind: Kind) -> Entry:
        call = partial(self.inner.set_attributes, place, attributes, kind=kind)
        return await self._do("set_attributes", partial(self._another_version, place, call))

    async def _another_version(self, place: Place, call: Callable[[], Awaitable[Entry]]) -> Entry:
        entry = await call()
        thing = self.inner.remote.find(place.path)
        if self.restless and thing is not None and thing.kind is Kind.FILE:
            assert isinstance(self.inner.remote, Recording)
            self.inner.remote.renew(thing)
            entry = replace(entry, version=thing.version)
        return entry

    async def quota(self) -> Quota:
        return await self._do("quota", self.inner.quota)

    def changes(self) -> AsyncIterator[Any]:
        return self.inner.changes()

    async def aclose(self) -> None:
        await self.inner.aclose()


class WatchedNodes(Nodes):
    """Tells when a program takes the last name from a file."""

    on_removed: Callable[[Node], None] = staticmethod(lambda node: None)

    def detach(self, change: Transaction, node: Node, **values: Any) -> None:
        last = node.link_of is None and not self.aliases[node.ino]
        super().detach(change, node, **values)
        if last and "base_parent" not in values:
            self.on_removed(node)


class WatchedSteps(Steps):
    """Knows of threads that wait for a fetch."""

    time: Time

    async def _ensure(self, content: Content, start: int, stop: int, layers: list[Layer]) -> None:
        self.time.blocked_threads += 1
        try:
            await super()._ensure(content, start, stop, layers)
        finally:
            self.time.blocked_threads -= 1


class Silence:
    """A kernel that is told what changed and knows nothing."""

    def entry_changed(self, parent: int, name: str) -> None: ...

    def attributes_changed(self, ino: int) -> None: ...

    async def wait_told(self) -> None: ...


class World:
    """One mount, alive between `start` and `stop` or `kill`; the remote outlives it."""

    def __init__(self, home: Path, capabilities: Capabilities, *, seed: int = 0, **config: Any) -> None:
        self.time = Time()
        self.chance = random.Random(seed)
        self.remote = Recording(self.time.wall_ns)
        self.memory: MemoryBackend = MemoryBackend(self.remote, capabilities)
        self.flaky = Flaky(self.memory, self.chance)
        settings: dict[str, Any] = {"write_back_delay": 5.0, "freshness": 30.0, "request_deadline": 30.0}
        settings |= {"exclude": ("*.local",)} | config
        self.config = MountConfig(
            name="m", path="/m", backend="directory", options=DirectoryOptions(source="/nowhere"), **settings
        )
        self.rig = Disk(home)
        self.held_fd: int | None = None
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self.on_removed: Callable[[Node], None] = lambda node: None

    @property
    def alive(self) -> bool:
        return self._scope is not None

    nursery: trio.Nursery
    left: Sequence[Node] = ()
    """What was parked in the end, and `seen`: names in the end, files with their nodes."""
    seen: dict[str, Node | None]
    _scope: trio.CancelScope | None = None
    _ended: trio.Event

    async def start(self, nursery: trio.Nursery) -> None:
        """Builds everything and starts its tasks."""
        rig = self.rig
        self.policy = PolicyBackend(
            self.flaky, deadline=self.config.request_deadline, credential=lambda: self.flaky.credential,
            jitter=self.chance, wall_clock=lambda: self.time.wall_ns() / 1e9,
        )  # fmt: skip
        backend: Backend = self.policy
        self.nodes = WatchedNodes(
            self.config, rig.database, rig.store, Silence(), held=Held(), clock_ns=self.time.wall_ns
        )
        self.nodes.on_removed = self.on_removed
        self.nodes.capabilities = self.memory.capabilities
        store = rig.store
        budget = Budget(
            (rig.state_dir, rig.cache_dir), unsent_limit=2**40, cache_limit=2**40, unsent=lambda: store.unsent_bytes,
            sent=lambda: store.sent_bytes, cached=lambda: store.cached_bytes, evict=lambda count: 0,
        )  # fmt: skip
        rig.reserve = budget.reserve
        self.refresh = Refresh(self.nodes, backend, freshness=self.config.freshness, deadline=self.config.request_deadline)
        self.reads = Reads(
            self.nodes, store, backend, deadline=self.config.request_deadline, remote_changed=self._remote_changed
        )
        self.fs = FileSystem(self.nodes, store, self.reads, self.refresh, budget, uid=1000, gid=1000)
        self.settle = Settle(self.nodes, store, self.refresh, backend, self._emit)
        self.steps = WatchedSteps(self.nodes, store, self.reads, self.refresh, backend, self.settle)
        self.steps.time = self.time
        self.engine = Engine(
            self.nodes, self.steps, write_back_delay=self.config.write_back_delay, emit=self._emit, chance=self.chance,
            away=lambda: self.policy.health in (Health.OFFLINE, Health.UNAUTHENTICATED),
        )  # fmt: skip
        self.fs.sync = self.engine
        self._ended = trio.Event()
        await nursery.start(self._live)

    async def _live(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as service:
                service.start_soon(self.policy.run)
                service.start_soon(self._connect)
                service.start_soon(self.refresh.run_listings)
                service.start_soon(self.refresh.run)
                for urgent in (True, True, False):
                    service.start_soon(partial(self.reads.run, urgent=urgent))
                service.start_soon(self.engine.run)
                for _ in range(3):
                    service.start_soon(self.engine.run_worker)
                service.start_soon(self._housekeeping)
                await trio.sleep(0.001)  # connecting has begun
                task_status.started()
        self._scope = None
        self._ended.set()

    async def _connect(self) -> None:
        with suppress(RemoteError):
            await self.policy.connect()
        health = None
        while True:
            if health is not self.policy.health:
                health = self.policy.health
                if health is Health.LIVE:
                    self.refresh.forget()
                    self.engine.health_changed()
            await self.policy.wait_health_change()

    async def _housekeeping(self) -> None:
        while True:
            await trio.sleep(7.0)
            self.rig.store.save_all_present()
            for call in self.rig.store.settling():
                await trio.to_thread.run_sync(call)

    async def threads_rest(self) -> None:
        while self.time.busy_threads > 0:
            time.sleep(0.00003)
            await trio.lowlevel.checkpoint()

    async def kill(self, nursery: trio.Nursery) -> None:
        """The process dies at this moment, and the next one finds what was on the disk."""
        await self.threads_rest()
        dead = self.rig
        self.rig = dead.left_behind()
        assert self._scope is not None
        self._scope.cancel()
        await self._ended.wait()
        dead.abandon()
        await self.start(nursery)

    async def end(self) -> None:
        if self._scope is not None:
            self._scope.cancel()
            await self._ended.wait()
        self.rig.abandon()

    def _remote_changed(self, content: Content) -> None:
        self.refresh.forget(content.node.base_parent)

    def _emit(self, event: str, path: str, **details: Any) -> None:
        self.events.append((event, path, details))

    # -- what tests ask -----------------------------------------------------------------------------------------------

    async def find(self, path: str) -> Node:
        """Looks the path up as a program does. Raises NotFound and the like."""
        node = self.nodes.database.root
        for name in path.split("/"):
            if name:
                node = await self.fs.lookup(node.ino, name)
        return node

    async def write_file(self, path: str, data: bytes, offset: int = 0) -> Node:
        """Opens or makes it, writes, closes."""
        parent, _, name = path.rpartition("/")
        directory = await self.find(parent)
        node = self.nodes.database.child(directory.ino, name)
        if node is None:
            try:
                node = await self.fs.lookup(directory.ino, name)
            except NbmountdError:
                node = None
        if node is None:
            node = await self.fs.create(directory.ino, name, 0o644)
        else:
            self.fs.open(node.ino, writing=True, truncate=offset == 0)
        self.fs.write(node.ino, offset, data)
        self.fs.close_file(node.ino, writing=True)
        return node

    async def read_file(self, path: str) -> bytes:
        node = await self.find(path)
        self.fs.open(node.ino, writing=False, truncate=False)
        try:
            return bytes(await self.fs.read(node.ino, 0, node.size))
        finally:
            self.fs.close_file(node.ino, writing=False)

    async def drain(self, within: float = 3000.0) -> list[Node]:
        """Sends what can be sent; what is left waits for a person."""
        left: list[Node] = []
        with trio.move_on_after(within) as scope:
            async for left, _ in self.engine.send_now([""]):
                if left and self.engine.all_stuck(left):
                    return left
        if scope.cancelled_caught:
            told = [self.nodes.local_path(node) for node in left]
            failures = {ino: failure.error for ino, failure in self.engine._failures.items()}
            raise AssertionError(f"not sent within {within} virtual seconds: {told}; {failures}; {self.events[-6:]}")
        return left

    async def look_everywhere(self) -> None:
        """Lists every directory that both sides have."""
        waiting = [self.nodes.database.root]
        while waiting:
            directory = waiting.pop()
            if directory.base_parent is not None and not directory.removed:
                await self.refresh.list_now(directory)
            waiting += [child for child in self.nodes.database.children(directory.ino) if child.is_directory]

    async def converge(self) -> list[Node]:
        """Syncs and looks until nothing changes any more; returns what is parked."""
        for _ in range(6):
            parked = await self.drain()
            before = self.local_tree()
            await self.look_everywhere()
            if self.local_tree() == before and not [node for node in self.nodes.database.to_send() if node not in parked]:
                return parked
        raise AssertionError("both sides go on changing each other")

    def local_tree(self) -> dict[str, Node]:
        """Every name that is not local only."""
        found: dict[str, Node] = {}
        waiting = [("", self.nodes.database.root)]
        while waiting:
            prefix, directory = waiting.pop()
            for child in self.nodes.database.children(directory.ino):
                if not child.local_only:
                    found[prefix + child.name] = child
                    if child.is_directory:
                        waiting.append((f"{prefix}{child.name}/", child))
        return found


@asynccontextmanager
async def running(world: World) -> AsyncIterator[trio.Nursery]:
    """The world alive, and its time going on. Use under `world.time.clock`."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.time.run)
        await world.start(nursery)
        try:
            yield nursery
        finally:
            with trio.CancelScope(shield=True):
                await world.end()
            nursery.cancel_scope.cancel()
