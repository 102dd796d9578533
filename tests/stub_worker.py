"""A worker for tests of the supervisor: serves tinyfs and a control socket, and misbehaves on request.

What it shall do wrong is said by files in its backing directory (<state_dir>/<mount>/): `refuse` (ConfigError), `crash`
(exit at once), `crash-unless-degraded`, `mute` (never begins to serve), `deaf` (no control answer and no file operation),
`slow-stop` (does not end when told to stop).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from nbmountd.control.schema import (
    AnyReply,
    AnyRequest,
    Done,
    Event,
    Events,
    Failed,
    MountStatus,
    Ping,
    Progress,
    Queue,
    QueueItem,
    QueueReply,
    Status,
    StatusReply,
    Stop,
    Sync,
    Text,
)
from nbmountd.control.server import serve_requests
from nbmountd.errors import ConfigError
from nbmountd.fuse import session
from nbmountd.privileges import drop_privileges
from nbmountd.worker import WorkerStart
from tests.fuse.tinyfs import TinyOperations


def run(start: WorkerStart) -> None:
    if start.uid is not None:
        drop_privileges(start.uid, start.gid)
    backing = Path(start.daemon.state_dir) / start.mount.name
    backing.mkdir(exist_ok=True)
    if (backing / "refuse").exists():
        raise ConfigError("the url of the remote is no url")
    if (backing / "crash").exists() or ((backing / "crash-unless-degraded").exists() and not start.degraded):
        os._exit(3)
    if (backing / "mute").exists():
        time.sleep(1000)
    trio.run(_serve, start, backing)


async def _serve(start: WorkerStart, backing: Path) -> None:
    ended = trio.Event()

    async def handle(request: AnyRequest) -> AsyncIterator[AnyReply]:
        name = start.mount.name
        if isinstance(request, Ping):
            yield Done()
        elif isinstance(request, Status):
            status = MountStatus(name=name, path=start.mount.path, backend="stub", state="live", unsent_files=7)
            yield StatusReply(version="stub", pid=os.getpid(), safe=True, mounts=(status,))
        elif isinstance(request, Queue):
            yield QueueReply(items=(QueueItem(mount=name, path="a", step="upload", state="waiting"),), total=1)
        elif isinstance(request, Sync):
            yield Progress(files_left=2, bytes_left=20, bytes_total=20)
            yield Done(message=f"{name} {len(request.paths)}")
        elif isinstance(request, Events):
            yield Event(at=time.time(), mount=name, event="hello")
            await trio.sleep_forever()
        elif isinstance(request, Stop):
            (backing / "stopped").write_text(str(request.timeout))
            if (backing / "slow-stop").exists():
                await trio.sleep_forever()
            session.stop()
            await ended.wait()
            try:
                yield Failed(message="1 file is unsent", code=4) if (backing / "unsent").exists() else Done()
            finally:  # the server closes this generator as soon as the answer is sent
                nursery.cancel_scope.cancel()
        else:
            yield Text(text=f"{name}\n")

    async def heed_the_lifeline() -> None:
        await trio.lowlevel.wait_readable(start.lifeline_fd)
        nursery.cancel_scope.cancel()

    async def be_deaf_on_request() -> None:
        while not (backing / "deaf").exists():  # noqa: ASYNC110 (another process makes it)
            await trio.sleep(0.02)
        (backing / "deaf").unlink()
        time.sleep(1000)  # blocks the loop, on purpose

    async with trio.open_nursery() as nursery:
        nursery.start_soon(heed_the_lifeline)
        nursery.start_soon(be_deaf_on_request)
        nursery.start_soon(serve_requests, socket.socket(fileno=start.control_fd), handle)
        ending = await session.serve(TinyOperations(backing), start.fuse_fd, start.agreement, resume=start.resume)
        ended.set()
        if ending == "unmounted":
            nursery.cancel_scope.cancel()
