"""A backend whose remote lives in memory: the double with which the core is tested, held to the suite of the others.

`MemoryRemote` is the far side, with plain methods by which a test plays another client; `MemoryBackend` is a driver for
it that knows how to fail on demand. It knows nothing of networks. Everything runs on the loop's thread, except sinks
and bodies, which are called in worker threads as the contract says.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import trio

from nbmountd.backends.base import Body, Change, Piece, Sink, Ticket
from nbmountd.errors import (
    NameRefused,
    ParentMissing,
    RemoteDenied,
    RemoteError,
    RemoteExists,
    RemoteFull,
    RemoteNotFound,
    RemoteProtocolError,
    RemoteTooLarge,
    RemoteUnavailable,
    RemoteUnsupported,
    VersionMismatch,
)
from nbmountd.model import Attributes, Capabilities, Entry, Kind, Place, Quota, Version

T = TypeVar("T")
Path = tuple[str, ...]

CHUNK = 256 * 1024
"""Bytes given to a sink, or asked from a body, at once."""

NO_ATTRIBUTES = Attributes()

EVERYTHING = Capabilities(
    ranged_writes=True,
    stable_ids=True,
    native_mode=True,
    native_mtime=True,
    mtime_granularity_ns=1,
    native_symlinks=True,
    native_xattrs=True,
)
"""A remote that can do all that files can; `dataclasses.replace` takes things away."""


@dataclass(eq=False)
class Thing:
    """One object of the far side. `children` is used by directories only, `content` by files only."""

    kind: Kind
    id: str
    version: Version
    attributes: Attributes
    content: bytes = b""
    children: dict[str, Thing] = field(default_factory=dict)
    writable: bool = True
    removable: bool = True


class MemoryRemote:
    """The far side. Its public methods are what another client does: unconditional, at once, with new versions.

    Paths are texts such as "a/b"; "" is the root. They raise KeyError when something is not there: a test's mistake.
    """

    def __init__(self, *, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self.clock_ns = clock_ns
        self.space: int | None = None
        """Bytes that all files together may have; None: no limit."""
        self.propagates = False
        self.watchers: list[Callable[[Path], None]] = []
        """Called with the path of each change made by the public methods."""
        self._counter = 0
        self.root = self.make(Kind.DIRECTORY)

    def put(self, path: str, content: bytes = b"", **attributes: object) -> Version:
        """Makes or overwrites a file; keyword arguments are fields of `Attributes`. Returns the new version."""
        names = split(path)
        there = self.find(names)
        if there is None:
            there = self.attach(names, self.make(Kind.FILE))
        self.write(names, there, content, Attributes(**attributes))  # type: ignore[arg-type]
        return self._tell(names, there.version)

    def mkdir(self, path: str) -> None:
        names = split(path)
        self._tell(names, self.attach(names, self.make(Kind.DIRECTORY)))

    def symlink(self, path: str, target: str) -> None:
        names = split(path)
        self._tell(names, self.attach(names, self.make(Kind.SYMLINK, Attributes(target=target))))

    def read(self, path: str) -> bytes:
        return self[path].content

    def remove(self, path: str) -> None:
        """Removes a file, or a directory with all that is in it."""
        self._tell(split(path), self.detach(split(path)))

    def move(self, source: str, target: str) -> None:
        """Moves a file or directory, over whatever is at `target`."""
        thing = self.detach(split(source))
        self._tell(split(source), None)
        self._tell(split(target), self.attach(split(target), thing))

    def listdir(self, path: str = "") -> list[str]:
        return sorted(self[path].children)

    def tree(self) -> dict[str, bytes | str | None]:
        """Every path with its content; the target for a symlink, None for a directory."""
        return dict(_walk("", self.root))

    def __getitem__(self, path: str) -> Thing:
        thing = self.find(split(path))
        if thing is None:
            raise KeyError(path)
        return thing

    # --- below: what both sides use ---

    def find(self, path: Path) -> Thing | None:
        thing = self.root
        for name in path:
            if name not in thing.children:
                return None
            thing = thing.children[name]
        return thing

    def make(self, kind: Kind, attributes: Attributes = NO_ATTRIBUTES) -> Thing:
        if attributes.mtime_ns is None:
            attributes = replace(attributes, mtime_ns=self.clock_ns())
        return Thing(kind, f"id{self._next()}", self.new_version(), attributes)

    def write(self, path: Path, thing: Thing, content: bytes, attributes: Attributes) -> None:
        stamped = replace(attributes, mtime_ns=attributes.mtime_ns or self.clock_ns())
        thing.content, thing.version = content, self.new_version()
        thing.attributes = merged(thing.attributes, stamped)
        self._touch_parents(path)

    def attach(self, path: Path, thing: Thing) -> Thing:
        parent = self.find(path[:-1])
        if parent is None or parent.kind is not Kind.DIRECTORY:
            raise KeyError("/".join(path[:-1]))
        parent.children[path[-1]] = thing
        parent.version = self.new_version()
        self._touch_parents(path)
        return thing

    def detach(self, path: Path) -> Thing:
        parent = self.find(path[:-1])
        if parent is None:
            raise KeyError("/".join(path[:-1]))
        thing = parent.children.pop(path[-1])
        parent.version = self.new_version()
        self._touch_parents(path)
        return thing

    def used(self) -> int:
        return sum(len(content) for content in self.tree().values() if isinstance(content, bytes))

    def new_version(self) -> Version:
        return Version(f"v{self._next()}")

    def _next(self) -> int:
        self._counter += 1
        return self._counter

    def _touch_parents(self, path: Path) -> None:
        if not self.propagates:
            return
        for depth in range(len(path)):
            parent = self.find(path[:depth])
            if parent is not None:
                parent.version = self.new_version()

    def _tell(self, path: Path, result: T) -> T:
        for watcher in list(self.watchers):
            watcher(path)
        return result


@dataclass(frozen=True)
class Request:
    """One verb that was called. `start` and `stop` are set for reads, and for uploads as 0 and the size."""

    verb: str
    place: Place
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    `wait_for`: nothing happens until the event is set. `before`: raised with nothing done. `after`: raised although all
    was done (a lost answer: give it `in_doubt=True` for a change). `cut`: a read gives that many bytes, an upload takes
    that many, then RemoteUnavailable; without `atomic_replace` a cut upload leaves what it took. `stall`: like `cut`,
    but waits for the event there and goes on when it is set.
    """

    wait_for: trio.Event | None = None
    before: RemoteError | None = None
    after: RemoteError | None = None
    cut: int | None = None
    stall: tuple[int, trio.Event] | None = None

    def next_stop(self, done: int, size: int) -> int:
        """Where the part that begins at `done` ends: never across a point where this fault acts."""
        marks = [self.cut, self.stall[0] if self.stall else None]
        return min([done + CHUNK, size, *(mark for mark in marks if mark is not None and mark > done)])

    async def act(self, done: int) -> None:
        if self.stall is not None and done >= self.stall[0]:
            await self.stall[1].wait()
        if self.cut is not None and done >= self.cut:
            raise RemoteUnavailable(f"cut after {done} bytes", in_doubt=True)


NO_FAULT = Fault()


class MemoryBackend:
    """A driver for a `MemoryRemote`, with faults on demand and a log of requests.

    `threads=False` calls sinks and bodies on the loop: for tests with trio's autojump clock, to which a running thread
    looks like idle time.
    """

    def __init__(
        self,
        remote: MemoryRemote | None = None,
        capabilities: Capabilities = EVERYTHING,
        *,
        threads: bool = True,
    ) -> None:
        self.remote = remote or MemoryRemote()
        self.remote.propagates |= capabilities.propagating_versions
        self.capabilities = capabilities
        self.requests: list[Request] = []
        self.outage: str | None = None
        """While not None every verb raises RemoteUnavailable with this text, nothing done."""
        self.busy = 0
        self.peak = 0
        """Most requests that were ever under way at once."""
        self._threads = threads
        self._faults: dict[str, deque[Fault]] = {}
        self._hooks: dict[str, Callable[[Place], Fault | None]] = {}
        self._closed = False
        self._scopes: set[trio.CancelScope] = set()

    # --- for tests ---

    def fail(self, verb: str, *faults: Fault | RemoteError) -> None:
        """The next calls of `verb` go wrong, one after the other; a bare error means `before`."""
        queue = self._faults.setdefault(verb, deque())
        queue.extend(fault if isinstance(fault, Fault) else Fault(before=fault) for fault in faults)

    def on(self, verb: str, hook: Callable[[Place], Fault | None] | None) -> None:
        """`hook` is asked for a fault at each call of `verb` ("*": of any) that has none queued. It may also act."""
        if hook is None:
            self._hooks.pop(verb, None)
        else:
            self._hooks[verb] = hook

    def count(self, verb: str | None = None) -> int:
        return len(self.requests) if verb is None else self.counts()[verb]

    def counts(self) -> Counter[str]:
        return Counter(request.verb for request in self.requests)

    # --- the contract ---

    async def connect(self) -> Capabilities:
        async with self._request("connect", Place()):
            return self.capabilities

    async def stat(self, place: Place) -> Entry:
        async with self._request("stat", place):
            return self._entry(place.name, self._get(place))

    async def list(self, place: Place) -> list[Entry]:
        async with self._request("list", place):
            thing = self._get(place)
            if thing.kind is not Kind.DIRECTORY:
                raise RemoteNotFound(f"{place} is not a directory")
            return [self._entry(name, child) for name, child in thing.children.items()]

    async def read(self, place: Place, version: Version | None, start: int, stop: int, sink: Sink) -> None:
        async with self._request("read", place, start, stop) as fault:
            if start and not self.capabilities.ranged_reads:
                raise RemoteUnsupported(f"{place}: no ranged reads here")
            done = 0
            while done < stop - start:
                await fault.act(done)
                thing = self._get(place)
                if version is not None and thing.version != version:
                    raise VersionMismatch(f"{place} is {thing.version}, not {version}")
                version = thing.version
                upto = fault.next_stop(done, stop - start)
                part = thing.content[start + done : start + upto]
                if thing.kind is not Kind.FILE or not part:
                    raise RemoteProtocolError(f"{place} ends at {len(thing.content)}, before {stop}")
                await self._call(partial(sink, memoryview(part)))
                done += len(part)
            await fault.act(done)

    async def upload(
        self, place: Place, body: Body, *, replaces: Version | None, attributes: Attributes, ticket: Ticket
    ) -> Entry:
        async with self._request("upload", place, 0, body.size) as fault:
            self._check_target(place, Kind.FILE, replaces)
            if self.capabilities.max_file_size is not None and body.size > self.capabilities.max_file_size:
                raise RemoteTooLarge(f"{place}: {body.size} bytes, at most {self.capabilities.max_file_size}")
            content = bytearray()
            try:
                while True:
                    await fault.act(len(content))
                    count = fault.next_stop(len(content), body.size + 1) - len(content)
                    part = await self._call(partial(body.read, count))
                    if not part:
                        break
                    content += part
            except RemoteUnavailable:
                if not self.capabilities.atomic_replace:
                    self._store(place, bytes(content), NO_ATTRIBUTES)
                raise
            if len(content) != body.size:
                raise RemoteProtocolError(f"{place}: the body gave {len(content)} bytes of {body.size}")
            if self.capabilities.conditional_writes:
                self._check_target(place, Kind.FILE, replaces)
            return self._store(place, bytes(content), attributes)

    async def write_ranges(
        self, place: Place, pieces: Sequence[Piece], size: int, *, replaces: Version, attributes: Attributes
    ) -> Entry:
        async with self._request("write_ranges", place, 0, size):
            if not self.capabilities.ranged_writes:
                raise RemoteUnsupported(f"{place}: no ranged writes here")
            self._check_target(place, Kind.FILE, replaces)
            parts: list[tuple[int, bytes]] = []
            for piece in pieces:
                for at in range(piece.start, piece.stop, CHUNK):
                    count = min(CHUNK, piece.stop - at)
                    parts.append((at, await self._call(partial(piece.read, at, count))))
            self._check_target(place, Kind.FILE, replaces)
            content = bytearray(self._get(place).content[:size].ljust(size, b"\0"))
            for at, part in parts:
                content[at : at + len(part)] = part
            return self._store(place, bytes(content[:size]), attributes)

    async def make_directory(self, place: Place, attributes: Attributes) -> Entry:
        async with self._request("make_directory", place):
            self._check_target(place, Kind.DIRECTORY, None)
            thing = self.remote.make(Kind.DIRECTORY, self._storable(attributes))
            return self._entry(place.name, self.remote.attach(place.path, thing))

    async def make_symlink(self, place: Place, target: str, attributes: Attributes) -> Entry:
        async with self._request("make_symlink", place):
            if not self.capabilities.native_symlinks:
                raise RemoteUnsupported(f"{place}: no symlinks here")
            self._check_target(place, Kind.SYMLINK, None)
            thing = self.remote.make(Kind.SYMLINK, replace(self._storable(attributes), target=target))
            return self._entry(place.name, self.remote.attach(place.path, thing))

    async def move(
        self, source: Place, target: Place, *, kind: Kind, version: Version | None, replaces: Version | None
    ) -> Entry:
        async with self._request("move", source):
            thing = self._get(source)
            if thing.kind is Kind.DIRECTORY and not self.capabilities.moves_directories:
                raise RemoteUnsupported(f"{source}: directories cannot be moved here")
            if thing.kind is not kind or (version is not None and thing.version != version):
                raise VersionMismatch(f"{source} is {thing.kind.name} {thing.version}, not {kind.name} {version}")
            if not thing.removable or target.path[: len(source.path)] == source.path:
                raise RemoteDenied(f"{source} may not be moved to {target}")
            try:
                self._check_target(target, kind, replaces)
            except RemoteNotFound as error:
                raise VersionMismatch(f"{target} is gone") from error
            self.remote.attach(target.path, self.remote.detach(source.path))
            return self._entry(target.name, thing)

    async def remove(self, place: Place, *, kind: Kind, version: Version | None) -> None:
        async with self._request("remove", place):
            thing = self.remote.find(place.path)
            if thing is None:
                return
            if thing.kind is not kind or (kind is Kind.FILE and version is not None and thing.version != version):
                raise VersionMismatch(f"{place} is {thing.kind.name} {thing.version}, not {kind.name} {version}")
            if thing.children:
                raise RemoteExists(f"{place} is not empty")
            if not thing.removable:
                raise RemoteDenied(f"{place} may not be removed")
            self.remote.detach(place.path)

    async def set_attributes(self, place: Place, attributes: Attributes, *, kind: Kind) -> Entry:
        async with self._request("set_attributes", place):
            thing = self._get(place)
            wanted = self._storable(attributes)
            if wanted == NO_ATTRIBUTES != attributes:
                raise RemoteUnsupported(f"{place}: no place for these attributes here")
            thing.attributes = merged(thing.attributes, wanted)
            return self._entry(place.name, thing)

    async def quota(self) -> Quota:
        async with self._request("quota", Place()):
            used, space = self.remote.used(), self.remote.space
            return Quota(used, None if space is None else max(0, space - used))

    async def changes(self) -> AsyncIterator[Change]:
        send, receive = trio.open_memory_channel[Path](1000)

        def watcher(path: Path) -> None:
            send.send_nowait(path)

        async with self._request("changes", Place()):
            if not self.capabilities.change_feed:
                raise RemoteUnsupported("no change feed here")
        self.remote.watchers.append(watcher)
        try:
            async for path in receive:
                yield Change(Place(path))
        finally:
            self.remote.watchers.remove(watcher)

    async def aclose(self) -> None:
        self._closed = True
        for scope in self._scopes:
            scope.cancel()
        await trio.lowlevel.checkpoint()

    # --- how ---

    @asynccontextmanager
    async def _request(self, verb: str, place: Place, start: int = 0, stop: int = 0) -> AsyncIterator[Fault]:
        self.requests.append(Request(verb, place, start, stop))
        fault = self._next_fault(verb, place)
        self.busy += 1
        self.peak = max(self.peak, self.busy)
        scope = trio.CancelScope()
        self._scopes.add(scope)
        try:
            with scope:
                await trio.lowlevel.checkpoint()
                if self._closed or self.outage is not None:
                    raise RemoteUnavailable(self.outage or "closed")
                if fault.wait_for is not None:
                    await fault.wait_for.wait()
                if fault.before is not None:
                    raise fault.before
                yield fault
                if fault.after is not None:
                    raise fault.after
        finally:
            self._scopes.discard(scope)
            self.busy -= 1
        if scope.cancelled_caught:
            raise RemoteUnavailable("closed", in_doubt=verb not in ("stat", "list", "read", "quota", "connect"))

    def _next_fault(self, verb: str, place: Place) -> Fault:
        queue = self._faults.get(verb)
        if queue:
            return queue.popleft()
        for name in (verb, "*"):
            fault = self._hooks[name](place) if name in self._hooks else None
            if fault is not None:
                return fault
        return NO_FAULT

    async def _call(self, call: Callable[[], T]) -> T:
        if self._threads:
            return await trio.to_thread.run_sync(call)
        await trio.lowlevel.checkpoint()
        return call()

    def _get(self, place: Place) -> Thing:
        thing = self.remote.find(place.path)
        if thing is None:
            raise RemoteNotFound(f"{place} is not there")
        return thing

    def _check_target(self, place: Place, kind: Kind, replaces: Version | None) -> None:
        """Whether something of `kind` may be put at `place`, in the order in which a careful server looks."""
        name = place.name
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise NameRefused(f"{name!r} is no name")
        if len(name.encode("utf-8", "surrogateescape")) > self.capabilities.max_name_bytes:
            raise NameRefused(f"{name!r} is too long")
        parent = self.remote.find(place.path[:-1])
        if parent is None or parent.kind is not Kind.DIRECTORY:
            raise ParentMissing(f"{Place(place.path[:-1])} is not there")
        there = parent.children.get(name)
        if there is None:
            if replaces is not None:
                raise RemoteNotFound(f"{place} is gone")
            if not parent.writable:
                raise RemoteDenied(f"{place} may not be made")
            return
        if replaces is None:
            raise RemoteExists(f"{place} is there")
        if there.version != replaces or there.kind is not kind:
            raise VersionMismatch(f"{place} is {there.version}, not {replaces}")
        if there.children:
            raise RemoteExists(f"{place} is not empty")
        if not there.writable:
            raise RemoteDenied(f"{place} may not be written")

    def _store(self, place: Place, content: bytes, attributes: Attributes) -> Entry:
        there = self.remote.find(place.path)
        growth = len(content) - (len(there.content) if there else 0)
        if self.remote.space is not None and self.remote.used() + growth > self.remote.space:
            raise RemoteFull(f"{place}: no room for {len(content)} bytes")
        if there is None:
            there = self.remote.attach(place.path, self.remote.make(Kind.FILE))
        self.remote.write(place.path, there, content, self._storable(attributes))
        return self._entry(place.name, there)

    def _storable(self, attributes: Attributes) -> Attributes:
        can = self.capabilities
        mtime_ns = attributes.mtime_ns if can.native_mtime else None
        return Attributes(
            mode=attributes.mode if can.native_mode else None,
            mtime_ns=None if mtime_ns is None else mtime_ns - mtime_ns % can.mtime_granularity_ns,
            xattrs=dict(attributes.xattrs) if can.native_xattrs and attributes.xattrs is not None else None,
        )

    def _entry(self, name: str, thing: Thing) -> Entry:
        can = self.capabilities
        is_file = thing.kind is Kind.FILE
        algorithm = can.checksum_algorithm
        mtime_ns = thing.attributes.mtime_ns or 0
        return Entry(
            name=name,
            kind=thing.kind,
            size=len(thing.content) if is_file else None,
            version=thing.version,
            id=thing.id if can.stable_ids else None,
            attributes=replace(
                thing.attributes,
                mode=thing.attributes.mode if can.native_mode else None,
                mtime_ns=mtime_ns - mtime_ns % can.mtime_granularity_ns,
                xattrs=(thing.attributes.xattrs or {}) if can.native_xattrs else None,
            ),
            writable=thing.writable,
            removable=thing.removable,
            checksums={algorithm.upper(): hashlib.new(algorithm, thing.content).hexdigest()}
            if algorithm is not None and is_file
            else {},
        )


def split(path: str) -> Path:
    return tuple(name for name in path.split("/") if name)


def merged(old: Attributes, new: Attributes) -> Attributes:
    """`old` with what is not None in `new`; `xattrs` is taken whole."""
    xattrs: Mapping[str, bytes] | None = old.xattrs if new.xattrs is None else new.xattrs
    return Attributes(
        mode=old.mode if new.mode is None else new.mode,
        mtime_ns=old.mtime_ns if new.mtime_ns is None else new.mtime_ns,
        target=old.target if new.target is None else new.target,
        xattrs=xattrs,
    )


def _walk(path: str, thing: Thing) -> Iterator[tuple[str, bytes | str | None]]:
    for name, child in sorted(thing.children.items()):
        where = f"{path}/{name}".lstrip("/")
        if child.kind is Kind.FILE:
            yield where, child.content
        elif child.kind is Kind.SYMLINK:
            yield where, child.attributes.target
        else:
            yield where, None
            yield from _walk(where, child)
