"""Answers control requests for all mounts: what the supervisor knows itself, and what it asks the workers.

It knows no files and no remotes. A worker that does not answer holds up no other, and no status.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec
import trio

from nbmountd import __version__
from nbmountd.control.client import ControlError, ask
from nbmountd.control.schema import (
    AnyReply,
    AnyRequest,
    CacheReply,
    ConflictsReply,
    Done,
    Event,
    Failed,
    LogLevel,
    Metrics,
    Mount,
    MountStatus,
    ParkedReply,
    Ping,
    Progress,
    QueueReply,
    Reload,
    RequestsReply,
    Restart,
    Status,
    StatusReply,
    Stop,
    Sync,
    Text,
    Unmount,
    Upgrade,
)
from nbmountd.fleet import Fleet
from nbmountd.keeper import Keeper
from nbmountd.log import set_level
from nbmountd.metrics import exposition

STATUS_PATIENCE = 2.0
"""Seconds; a worker that has not told its status by then is shown without."""
MOUNT_PATIENCE = 90.0
SHOWN_QUEUE_ITEMS = 1000


@dataclass(frozen=True)
class Relay:
    """The handler for `control.server.serve_requests`. `nursery` lives as long as requests are answered."""

    fleet: Fleet
    nursery: trio.Nursery

    async def handle(self, request: AnyRequest) -> AsyncIterator[AnyReply]:
        """Replies to one request; the last one is neither Progress nor Event."""
        if isinstance(request, Ping):
            yield Done()
        elif isinstance(request, Stop):
            yield Failed(message="stop is for workers; stop the daemon with SIGTERM, a mount with unmount", code=2)
        elif isinstance(request, Status):
            yield await self._status(self._named(request.mount))
        elif isinstance(request, Metrics):
            yield Text(text=exposition(await self._status(self._named(request.mount))))
        elif isinstance(request, Mount):
            yield await self._mount(self._named(request.mount))
        elif isinstance(request, Unmount):
            timeout = self.fleet.config.daemon.drain_timeout if request.timeout is None else request.timeout
            yield await self._unmount(self._named(request.mount), timeout)
        elif isinstance(request, Restart):
            yield await self._restart(self._named(request.mount))
        elif isinstance(request, Reload):
            yield await self.fleet.reload()
        elif isinstance(request, Upgrade):
            failed = await self.fleet.try_installed()
            try:
                yield failed or Done(message="the daemon becomes the installed version now; workers follow one by one")
            finally:  # the answer is out
                if failed is None:
                    self.fleet.upgrading.set()
        else:
            if isinstance(request, LogLevel):
                set_level(request.level)
            async with aclosing(self._forward(request)) as replies:
                async for reply in replies:
                    yield reply

    @property
    def keepers(self) -> Sequence[Keeper]:
        return self.fleet.keepers

    async def status(self) -> StatusReply:
        """Of all mounts."""
        return await self._status(list(self.keepers))

    async def metrics(self) -> str:
        """Of all mounts, for Prometheus."""
        return exposition(await self.status())

    # --- which mounts --------------------------------------------------------------------------------------------------

    def _named(self, name: str | None) -> list[Keeper]:
        if name is None:
            return list(self.keepers)
        chosen = [keeper for keeper in self.keepers if keeper.mount.name == name]
        if not chosen:
            known = ", ".join(keeper.mount.name for keeper in self.keepers) or "none"
            raise ControlError(f"no mount is called {name!r} (there are: {known})")
        return chosen

    def _holding(self, path: str) -> Keeper:
        """The mount that `path` is in. Judged by names: nothing is looked up, so nothing can hang."""
        path = os.path.normpath(path)
        inside = [keeper for keeper in self.keepers if f"{path}/".startswith(keeper.mount.path.rstrip("/") + "/")]
        if not inside:
            raise ControlError(f"{path} is in no mount of this daemon")
        return max(inside, key=lambda keeper: len(keeper.mount.path))

    def _targets(self, request: AnyRequest) -> list[tuple[Keeper, AnyRequest]]:
        """Whom to ask what."""
        if isinstance(request, Sync) and request.paths and request.mount is None:
            paths: dict[Keeper, list[str]] = {}
            for path in request.paths:
                paths.setdefault(self._holding(path), []).append(path)
            return [(keeper, msgspec.structs.replace(request, paths=tuple(some))) for keeper, some in paths.items()]
        single: str | None = getattr(request, "path", None)
        if request.mount is None and single is not None:
            return [(self._holding(single), request)]
        return [(keeper, request) for keeper in self._named(request.mount)]

    # --- answered here -------------------------------------------------------------------------------------------------

    async def _status(self, keepers: list[Keeper]) -> StatusReply:
        told = dict(zip((keeper.mount.name for keeper in keepers), await _gather(self._status_of, keepers), strict=True))
        safe = all(_is_known(status) for status in told.values())
        safe = safe and not any(s.unsent_files or s.unsent_bytes or s.conflicts or s.parked for s in told.values())
        return StatusReply(version=__version__, pid=os.getpid(), safe=safe, mounts=tuple(told.values()))

    async def _status_of(self, keeper: Keeper) -> MountStatus:
        mount = keeper.mount
        ours = MountStatus(
            name=mount.name, path=mount.path, backend=mount.backend, state=keeper.state, reason=keeper.reason,
            since=keeper.since, read_only=mount.read_only, pid=keeper.pid, restarts=keeper.restarts,
        )  # fmt: skip
        if keeper.state in ("failed", "unmounted"):
            return ours
        reply: AnyReply | None = None
        with trio.move_on_after(STATUS_PATIENCE):
            reply = await keeper.ask_once(Status(mount=mount.name))
        if not isinstance(reply, StatusReply) or len(reply.mounts) != 1:
            reason = f"{_SILENT}; {ours.reason}" if ours.reason else _SILENT
            return msgspec.structs.replace(ours, state="degraded" if ours.state == "live" else ours.state, reason=reason)
        theirs = reply.mounts[0]
        merged = msgspec.structs.replace(theirs, pid=keeper.pid, restarts=keeper.restarts)
        if keeper.state != "live":
            merged = msgspec.structs.replace(merged, state=ours.state, reason=ours.reason or theirs.reason)
        return merged

    async def _mount(self, keepers: list[Keeper]) -> Done | Failed:
        for keeper in keepers:
            keeper.start()
        with trio.move_on_after(MOUNT_PATIENCE):
            for keeper in keepers:
                await keeper.settled.wait()
        bad = [keeper for keeper in keepers if keeper.state != "live"]
        if bad:
            return Failed(message="; ".join(f"{keeper.mount.name}: {keeper.reason or keeper.state}" for keeper in bad))
        return Done(message=", ".join(f"{keeper.mount.name} at {keeper.mount.path}" for keeper in keepers))

    async def _restart(self, keepers: list[Keeper]) -> Done | Failed:
        return _one_answer([await keeper.restart() for keeper in keepers])

    async def _unmount(self, keepers: list[Keeper], timeout: float) -> Done | Failed:
        async def stop(keeper: Keeper) -> Done | Failed:
            return await keeper.stop(timeout)

        return _one_answer(await _gather(stop, keepers))

    # --- answered by workers -------------------------------------------------------------------------------------------

    async def _forward(self, request: AnyRequest) -> AsyncGenerator[AnyReply, None]:
        targets = self._targets(request)
        progress: dict[Keeper, Progress] = {}
        last: list[AnyReply] = []
        async with aclosing(self._replies(targets)) as replies:
            async for keeper, reply in replies:
                if isinstance(reply, Event):
                    yield reply
                elif isinstance(reply, Progress):
                    progress[keeper] = reply
                    yield _sum(list(progress.values()), reply.current)
                else:
                    last.append(reply)
        yield _merge(last)

    async def _replies(self, targets: list[tuple[Keeper, AnyRequest]]) -> AsyncGenerator[tuple[Keeper, AnyReply], None]:
        """What the workers say, as it comes. Tasks of `nursery` ask them: an async generator must not hold one open."""
        scope = trio.CancelScope()
        send: trio.MemorySendChannel[tuple[Keeper, AnyReply]]
        send, receive = trio.open_memory_channel(0)

        async def ask_all() -> None:
            with scope:
                async with send, trio.open_nursery() as nursery:
                    for keeper, request in targets:
                        nursery.start_soon(_relay, keeper, request, send)

        self.nursery.start_soon(ask_all)
        try:
            async with receive:
                async for item in receive:
                    yield item
        finally:
            scope.cancel()


_SILENT = "the worker does not answer"


def _is_known(status: MountStatus) -> bool:
    """Whether its numbers are all there is. An unmounted one has a reason if it was not drained to the end."""
    if status.state == "unmounted":
        return not status.reason
    return status.state != "failed" and not status.reason.startswith(_SILENT)


async def _relay(keeper: Keeper, request: AnyRequest, send: trio.MemorySendChannel[tuple[Keeper, AnyReply]]) -> None:
    if keeper.state in ("failed", "unmounted"):
        code = 4 if isinstance(request, Sync) else 1  # whether something is unsent cannot be told without its worker
        why = f"{keeper.mount.name} is {keeper.state}" + (f": {keeper.reason}" if keeper.reason else "")
        await send.send((keeper, Failed(message=why, code=code)))
        return
    try:
        async with aclosing(ask(keeper.socket_path, request)) as replies:
            async for reply in replies:
                await send.send((keeper, reply))
    except ControlError as exc:
        await send.send((keeper, Failed(message=f"{keeper.mount.name}: {exc}")))


def _merge(replies: list[AnyReply]) -> AnyReply:
    """One reply for many. Lists are joined; what could be learned is shown even if some mounts could not be asked."""
    if len(replies) == 1:
        return replies[0]
    queues = [reply for reply in replies if isinstance(reply, QueueReply)]
    if queues:
        items = tuple(item for reply in queues for item in reply.items)[:SHOWN_QUEUE_ITEMS]
        return QueueReply(items=items, total=sum(reply.total for reply in queues))
    conflicts = [reply for reply in replies if isinstance(reply, ConflictsReply)]
    if conflicts:
        return ConflictsReply(items=tuple(item for reply in conflicts for item in reply.items))
    parked = [reply for reply in replies if isinstance(reply, ParkedReply)]
    if parked:
        return ParkedReply(items=tuple(item for reply in parked for item in reply.items))
    caches = [reply for reply in replies if isinstance(reply, CacheReply)]
    if caches:
        return CacheReply(mounts=tuple(line for reply in caches for line in reply.mounts))
    requests = [reply for reply in replies if isinstance(reply, RequestsReply)]
    if requests:
        items_waiting = [item for reply in requests for item in reply.items]
        return RequestsReply(items=tuple(sorted(items_waiting, key=lambda item: -item.seconds)))
    texts = [reply.text for reply in replies if isinstance(reply, Text)]
    if texts:
        return Text(text="".join(texts))
    return _one_answer([reply for reply in replies if isinstance(reply, (Done, Failed))])


def _one_answer(answers: Sequence[Done | Failed]) -> Done | Failed:
    failures = [answer for answer in answers if isinstance(answer, Failed)]
    if failures:
        return Failed(message="; ".join(failure.message for failure in failures), code=max(f.code for f in failures))
    return Done(message="; ".join(dict.fromkeys(answer.message for answer in answers if answer.message)))


def _sum(parts: list[Progress], current: str) -> Progress:
    return Progress(
        files_left=sum(part.files_left for part in parts),
        bytes_left=sum(part.bytes_left for part in parts),
        bytes_total=sum(part.bytes_total for part in parts),
        current=current,
    )


async def _gather(ask_one: Callable[[Keeper], object], keepers: Sequence[Keeper]) -> list:  # type: ignore[type-arg]
    """The results of `ask_one(keeper)` for all keepers at once, in their order."""
    results: dict[int, object] = {}

    async def run(index: int, keeper: Keeper) -> None:
        results[index] = await ask_one(keeper)  # type: ignore[misc]

    async with trio.open_nursery() as nursery:
        for index, keeper in enumerate(keepers):
            nursery.start_soon(run, index, keeper)
    return [results[index] for index in range(len(keepers))]
