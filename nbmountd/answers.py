"""Answers control requests about one mount, in the worker that serves it.

It reads the state of the layers below and asks them to act; it holds none of its own. It knows no socket.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from nbmountd.backends.policy import PolicyBackend
from nbmountd.config import MountConfig
from nbmountd.control import schema
from nbmountd.disk.database import Node
from nbmountd.errors import NotFound, RemoteError
from nbmountd.fs.filesystem import FileSystem
from nbmountd.fs.resolve import resolve
from nbmountd.log import configure
from nbmountd.model import Health, Kind
from nbmountd.sync.engine import Engine
from nbmountd.units import show_size
from nbmountd.unresolved import Unresolved, absolute, relative

DESCRIBED_WITHIN = 10.0
"""Seconds that `explain` waits for the remote."""
LONGEST_DETAIL = 2000


class Watched(Protocol):
    """What serves the kernel, as seen from here."""

    requests: Counter[str]

    def describe_in_flight(self) -> list[tuple[str, int, str, float]]:
        """(operation, inode, name or nothing, seconds) of what was taken and not answered, longest first."""


class Answers:
    """What a worker says on its control socket. `stop(timeout, handover=...)` ends it and gives how much was not sent; `state`
    is its state directory."""

    def __init__(
        self,
        config: MountConfig,
        filesystem: FileSystem,
        engine: Engine,
        backend: PolicyBackend,
        operations: Watched,
        traffic: Callable[[], tuple[int, int, int]],
        stop: Callable[..., AsyncGenerator[int, None]],
        events: Callable[[], trio.MemoryReceiveChannel[schema.Event]],
        log_format: str,
        state: Path,
        token_warning: Callable[[], str] = str,
    ) -> None:
        self._config = config
        self._fs = filesystem
        self._engine = engine
        self._backend = backend
        self._operations = operations
        self._traffic = traffic
        self._stop = stop
        self._events = events
        self._log_format = log_format
        self._unresolved = Unresolved(config, filesystem, engine, state)
        self._token_warning = token_warning
        self.stopping = False

    async def answer(self, request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
        """Replies to one request; the last is neither Progress nor Event."""
        if isinstance(request, schema.Ping):
            yield schema.Done()
        elif isinstance(request, schema.Status):
            status = self.status()
            yield schema.StatusReply(version="", pid=os.getpid(), safe=status.unsent_files == 0, mounts=(status,))
        elif isinstance(request, schema.Sync):
            async for reply in self._sync(request):
                yield reply
        elif isinstance(request, schema.Queue):
            items, total = self._engine.queue(self._config.name)
            absolute = tuple(msgspec.structs.replace(item, path=self._absolute(item.path)) for item in items)
            yield schema.QueueReply(items=absolute, total=total)
        elif isinstance(request, schema.Refresh):
            self._engine.try_parked()
            await self._fs.refresh_now(self._node(request.path) if request.path else None)
            await self._fs.nodes.kernel.wait_told()
            yield schema.Done()
        elif isinstance(request, schema.Explain):
            fields = self._explain(request.path)
            yield schema.ExplainReply(fields=(*fields, *await self._described(self._node(request.path))))
        elif isinstance(request, schema.Conflicts):
            if request.keep is not None and request.path is not None:
                await resolve(self._fs, self._node(request.path), request.keep)
            yield schema.ConflictsReply(items=tuple(self._unresolved.conflicts(None if request.keep else request.path)))
        elif isinstance(request, schema.Parked):
            yield await self._unresolved.parked(request)
        elif isinstance(request, schema.Cache):
            yield self._cache(request)
        elif isinstance(request, schema.Events):
            async with self._events() as events:
                async for event in events:
                    yield event
            yield schema.Done()
        elif isinstance(request, schema.LogLevel):
            configure(request.level, self._log_format, self._config.name)  # type: ignore[arg-type]
            yield schema.Done()
        elif isinstance(request, schema.Prefetch):
            async for reply in self._prefetch(request):
                yield reply
        elif isinstance(request, schema.Stop):
            self.stopping = True
            async with aclosing(self._stop(request.timeout, handover=request.handover)) as stopping:
                async for left in stopping:
                    if left:
                        yield schema.Failed(message=f"{left} files or directories were not sent; they are kept", code=4)
                    else:
                        yield schema.Done()
        elif isinstance(request, schema.Requests):
            yield schema.RequestsReply(items=tuple(self._in_flight()))
        else:
            yield schema.Failed(message=f"the worker does not know {type(request).__name__.lower()}", code=2)

    # -- looking ------------------------------------------------------------------------------------------------------

    def status(self) -> schema.MountStatus:
        fs, health = self._fs, self._backend.health
        unsent = fs.nodes.database.to_send()
        remote_requests, received, sent = self._traffic()
        return schema.MountStatus(
            name=self._config.name,
            path=self._config.path,
            backend=self._config.backend,
            state="stopping" if self.stopping else health.value if self._backend.asked else "starting",
            reason="" if health is Health.LIVE else self._backend.health_reason,
            since=self._backend.health_since,
            read_only=self._config.read_only,
            unsent_files=len(unsent),
            unsent_bytes=fs.store.unsent_bytes,
            uploading=self._engine.uploading,
            conflicts=len(self._unresolved.conflicts()),
            parked=self._unresolved.parked_count,
            local_only=fs.nodes.database.count_local_only(),
            cached_bytes=fs.store.cached_bytes,
            open_files=len(fs.nodes.opens),
            quota_used=fs.quota.used,
            quota_available=fs.quota.available,
            pid=os.getpid(),
            requests=dict(self._operations.requests),
            remote_requests=remote_requests,
            bytes_received=received,
            bytes_sent=sent,
            token_warning=self._token_warning(),
            calls={
                verb: schema.Calls(count=calls.count, errors=calls.errors, retries=calls.retries, seconds=calls.seconds)
                for verb, calls in self._backend.statistics().items()
            },
        )

    def _absolute(self, path: str) -> str:
        return absolute(self._config, path)

    def _node(self, path: str) -> Node:
        below = relative(path, self._config.path)
        if below.startswith(".."):
            raise NotFound(f"{path} is not below {self._config.path}")
        node = self._fs.nodes.find(below)
        if node is None:
            raise NotFound(f"{path} is not known; it may not exist, or its directory was never looked at")
        return node

    def _explain(self, path: str) -> list[tuple[str, str]]:
        fs, node = self._fs, self._node(path)
        fields = [
            ("path", self._absolute(fs.nodes.local_path(node))),
            ("kind", node.kind.name.lower()),
            ("state", fs.state(node).value),
            ("inode", str(node.ino)),
            ("size", f"{node.size} ({show_size(node.size)})"),
            ("mode", f"{node.mode:04o}"),
            ("modified", _when(node.mtime_ns)),
        ]
        if node.base_parent is None:
            fields.append(("remote", "never seen there" if node.base_version is None else "no longer there"))
        else:
            fields.append(("remote path", str(fs.nodes.place(node))))
            fields.append(("remote id", node.base_id or "none"))
            fields.append(("remote version", node.base_version or "none"))
            if node.kind is Kind.FILE:
                fields.append(("remote size", str(node.base_size)))
            if node.base_mtime_ns is not None:
                fields.append(("remote modified", _when(node.base_mtime_ns)))
        if node.kind is Kind.FILE:
            content = fs.store.open(node)
            try:
                fields.append(("cached", f"{content.present.total} bytes in {len(list(content.present))} extents"))
                unsent = sum(layer.extents.total for layer in content.layers)
                fields.append(("unsent", f"{unsent} bytes in {len(content.layers)} layers"))
            finally:
                fs.store.release(content)
        fields.append(("open", f"{fs.nodes.opens[node.ino]} times, {fs.nodes.writers[node.ino]} for writing"))
        failure = self._engine.failure(node)
        if failure is not None:
            fields.append(("last error", f"{failure.error} (attempt {failure.attempts})"))
        return fields

    async def _described(self, node: Node) -> list[tuple[str, str]]:
        """What the remote says of it now, and why if it does not."""
        if node.base_parent is None:
            return []
        try:
            with trio.fail_after(DESCRIBED_WITHIN):
                told = await self._backend.describe(self._fs.nodes.place(node))
        except trio.TooSlowError:
            return [("asked now", f"no answer in {DESCRIBED_WITHIN:g} s")]
        except RemoteError as exc:
            return [("asked now", f"no answer: {exc}")]
        return [(name, value[:LONGEST_DETAIL]) for name, value in told.items()]

    def _in_flight(self) -> list[schema.RequestItem]:
        items = []
        for operation, inode, name, seconds in self._operations.describe_in_flight():
            node = self._fs.nodes.database.get(inode)
            path = f"inode {inode}" if node is None else self._fs.nodes.local_path(node)
            path = "/".join(part for part in (path, name) if part)
            items.append(
                schema.RequestItem(
                    mount=self._config.name, operation=operation, path=self._absolute(path), inode=inode, seconds=seconds
                )
            )
        return items

    # -- acting -------------------------------------------------------------------------------------------------------


    async def _sync(self, request: schema.Sync) -> AsyncIterator[schema.AnyReply]:
        prefixes = [relative(path, self._config.path) for path in request.paths] or [""]
        deadline = trio.current_time() + (float("inf") if request.timeout is None else request.timeout)
        total, last = 0, None
        async for left, current in self._engine.send_now(prefixes):
            bytes_left = sum(node.size for node in left if node.unsent)
            total = max(total, bytes_left)
            progress = schema.Progress(files_left=len(left), bytes_left=bytes_left, bytes_total=total, current=current)
            if left and progress != last:
                yield progress
                last = progress
            if left and self._engine.all_stuck(left):
                parked = self._engine.parked(self._config.name)
                yield schema.Failed(
                    message=f"{len(left)} could not be sent and wait for you: {parked[0].path}: {parked[0].error}."
                    " See `nbmountctl parked`.",
                    code=4,
                )
                return
            if left and trio.current_time() >= deadline:
                health = "" if self._backend.health is Health.LIVE else f": {self._backend.health_reason}"
                yield schema.Failed(
                    message=f"{len(left)} files or directories ({show_size(bytes_left)}) are not safe yet{health}."
                    " They are kept here and go on being sent.",
                    code=4,
                )
                return
        yield schema.Done(message="everything is safe")

    def _cache(self, request: schema.Cache) -> schema.AnyReply:
        store = self._fs.store
        if request.evict:
            top = self._node(request.path) if request.path else None
            prefix = self._fs.nodes.local_path(top) if top is not None else ""
            for (ino,) in self._fs.nodes.database.connection.execute("SELECT ino FROM cached").fetchall():
                node = self._fs.nodes.database.get(ino)
                path = self._fs.nodes.local_path(node) if node is not None else ""
                if node is not None and (not prefix or path == prefix or path.startswith(prefix + "/")):
                    store.evict(node)
        return schema.CacheReply(mounts=((self._config.name, store.cached_bytes, self._fs.budget.cache_limit),))

    async def _prefetch(self, request: schema.Prefetch) -> AsyncIterator[schema.AnyReply]:
        todo, files = [self._node(request.path)], []
        while todo:
            node = todo.pop()
            if node.is_directory:
                await self._fs.refresh.ensure_fresh(node)
                todo += self._fs.nodes.database.children(node.ino)
            elif node.kind is Kind.FILE:
                files.append(node)
        total = left = sum(node.size for node in files)
        for count, node in enumerate(files):
            yield schema.Progress(
                files_left=len(files) - count, bytes_left=left, bytes_total=total, current=self._fs.nodes.local_path(node)
            )
            content = self._fs.store.open(node)
            try:
                for start in range(0, node.size, 8 * 2**20):
                    await self._fs.reads.ensure(content, start, min(node.size, start + 8 * 2**20))
            finally:
                self._fs.store.save_present(content)
                self._fs.store.release(content)
            left -= node.size
        yield schema.Done(message=f"{len(files)} files, {show_size(total)}")


def _when(nanoseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(nanoseconds / 1e9))
