"""Keeps one mount: mounts it, holds its connection, and has a living worker serve it until it is told to let go.

It does no remote I/O and knows neither pyfuse3 nor a backend: a worker is a process that answers a control socket and file
operations. Its state is touched by its own task and, through the verbs, by the tasks of control requests; each verb changes it
between two awaits.

    starting --answers--> live --worker dies--> starting ...          (the mount stays; callers wait)
    starting --cannot mount / too many deaths--> failed --retry--> starting
    any --stop()--> stopping --worker gone, unmounted--> unmounted --start()--> starting
"""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import trio

from nbmountd import launch
from nbmountd.config import DaemonConfig, MountConfig
from nbmountd.control.client import ControlError, ask
from nbmountd.control.schema import AnyReply, AnyRequest, Done, Event, Failed, Ping, Progress, Stop
from nbmountd.control.server import open_listener
from nbmountd.errors import ConfigError, NbmountdError, StateError
from nbmountd.fuse import mounting
from nbmountd.fuse.mounting import Mounted, MountError
from nbmountd.log import get_logger

T = TypeVar("T")
State = Literal["starting", "live", "failed", "stopping", "unmounted"]


@dataclass(frozen=True)
class Rhythm:
    """Times in seconds. The defaults are for people; tests are in more of a hurry."""

    probe: float = 5.0
    """Between two pings, and between two statfs."""
    patience: float = 20.0
    """A worker that answers neither ping nor statfs for so long is replaced."""
    start_patience: float = 60.0
    """The same until its first answer: a large database may have to be recovered."""
    statfs_patience: float = 120.0
    """A worker that answers pings but no file operation for so long is replaced. Longer than any request's deadline."""
    stop_grace: float = 5.0
    """After the drain's deadline, before SIGKILL."""
    pauses: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0)
    """Before the next start, by deaths within `window`; the last one repeats."""
    deaths: int = 10
    window: float = 60.0
    """So many deaths within so long and the mount is given up..."""
    retry: float = 60.0
    """...and tried again after this."""


@dataclass(frozen=True)
class Resources:
    """What all keepers of a daemon share. Descriptors belong to the supervisor."""

    daemon: DaemonConfig
    worker: str
    owner: tuple[int, int] | None
    sockets: Path
    lifeline_fd: int
    lock_fd: int
    changed: Callable[[], None]
    """Called at every change of state."""
    rhythm: Rhythm = Rhythm()


class Keeper:
    """One mount. `run()` is its task; the other verbs may be called from any task."""

    def __init__(self, mount: MountConfig, resources: Resources) -> None:
        self.mount = mount
        self.state: State = "starting"
        self.reason = ""
        self.since = time.time()
        self.restarts = 0
        self.socket_path = resources.sockets / f"{mount.name}.sock"
        self.settled = trio.Event()
        """Set when the mount has answered or failed for the first time since it was asked for."""
        self._resources = resources
        self._rhythm = resources.rhythm
        self._log = get_logger(__name__, mount=mount.name)
        self._worker: launch.WorkerProcess | None = None
        self._unwanted = trio.Event()
        self._idle = trio.Event()
        self._poke = trio.Event()
        # Threads that hang in a file system are waited for by nobody but this mount.
        self._threads = trio.CapacityLimiter(4)
        self._statfs_thread = trio.CapacityLimiter(1)

    @property
    def pid(self) -> int | None:
        """The worker's, None while there is none."""
        return None if self._worker is None else self._worker.pid

    def start(self) -> None:
        """Wants the mount. A failed one is tried again at once. Raises StateError while it is stopping."""
        if self.state == "stopping":
            raise StateError(f"{self.mount.name} is just being unmounted; try again when that is done")
        if self._unwanted.is_set():
            self._unwanted = trio.Event()
        if self.state in ("failed", "unmounted"):
            self.settled = trio.Event()
            self._idle = trio.Event()
            self._set("starting")
        self._poke.set()

    async def stop(self, timeout: float) -> Done | Failed:
        """Has the worker drain for up to `timeout` seconds, then unmounts. Returns when nothing is left but the journal.

        Failed (code 4) if something is left in it. When cancelled, the worker is killed; what it had is in its journal.
        """
        self._unwanted.set()
        self._poke.set()
        worker = self._worker
        answer: Done | Failed = Done()
        if worker is not None:
            self._set("stopping")
            try:
                with trio.move_on_after(timeout + self._rhythm.stop_grace) as scope:
                    reply = await self.ask_once(Stop(mount=self.mount.name, timeout=timeout))
                    answer = reply if isinstance(reply, (Done, Failed)) else answer
                    await self._idle.wait()
                if scope.cancelled_caught:
                    answer = Failed(message=f"{self.mount.name} did not stop in time and was killed", code=4)
                    self._log.warning("worker does not end; killing it", pid=worker.pid)
            finally:
                if self._worker is worker:
                    worker.kill()
        await self._idle.wait()
        if isinstance(answer, Failed) and self.state == "unmounted":
            self._set("unmounted", answer.message)
        return answer

    async def ask_once(self, request: AnyRequest) -> AnyReply:
        """The worker's last reply to `request`; Failed when it cannot be asked. Waits while the worker is being replaced."""
        try:
            async with aclosing(ask(self.socket_path, request)) as replies:
                async for reply in replies:
                    if not isinstance(reply, (Progress, Event)):
                        return reply
        except ControlError as exc:
            return Failed(message=f"{self.mount.name}: {exc}")
        return Failed(message=f"{self.mount.name}: no answer")

    # --- the life of the mount -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled; leaves neither worker nor mount behind then."""
        while True:
            self._poke = trio.Event()
            if not self._unwanted.is_set():
                try:
                    await self._hold()
                except NbmountdError as exc:
                    self._set("failed", str(exc))
                    self._log.warning("mount failed", cause=exc, retry_in=self._rhythm.retry)
            if self._unwanted.is_set():
                self._set("unmounted", self.reason if self.state == "unmounted" else "")
            self._idle.set()
            with trio.move_on_after(self._rhythm.retry if self.state == "failed" else float("inf")) as pause:
                await self._poke.wait()
            if pause.cancelled_caught:
                self.start()

    async def _hold(self) -> None:
        """Mounts, and keeps the mount until it is unwanted. Raises NbmountdError when it cannot be kept."""
        self._set("starting")
        owner = self._resources.owner
        uid, gid = owner or (os.geteuid(), os.getegid())
        with open_listener(self.socket_path, owner=owner) as listener:
            mounted = await self._in_thread(
                partial(
                    mounting.mount, self.mount.path, self.mount.name, uid=uid, gid=gid, read_only=self.mount.read_only
                )
            )
            self._log.info("mounted", path=mounted.path, way=mounted.way, minor=mounted.agreement.minor)
            try:
                await self._keep_served(mounted, listener.fileno())
            finally:
                with trio.CancelScope(shield=True):
                    await self._in_thread(partial(self._let_go, mounted))
                self.socket_path.unlink(missing_ok=True)

    def _let_go(self, mounted: Mounted) -> None:
        """In this order: nobody comes in any more, then who is waiting inside is told that it is over."""
        try:
            mounting.unmount(mounted.path)
            self._log.info("unmounted", path=mounted.path)
        except MountError as exc:
            self._log.error("cannot unmount", cause=exc)
        finally:
            mounted.close()

    async def _keep_served(self, mounted: Mounted, listener_fd: int) -> None:
        deaths: deque[float] = deque()
        resume = False
        while not self._unwanted.is_set():
            ending = await self._serve_once(mounted, listener_fd, resume=resume)
            if self._unwanted.is_set():
                return
            if not await self._in_thread(partial(_is_ours, mounted.path)):
                self._unwanted.set()
                self._set("unmounted", f"unmounted from outside; `nbmountctl mount {self.mount.name}` brings it back")
                return
            if not mounted.is_connected():
                raise StateError("somebody aborted the connection to the kernel; open files are lost")
            resume = True
            self.restarts += 1
            deaths.append(trio.current_time())
            while deaths[0] < deaths[-1] - self._rhythm.window:
                deaths.popleft()
            if ending.final:
                raise ConfigError(ending.reason)
            if len(deaths) >= self._rhythm.deaths:
                raise StateError(f"{len(deaths)} workers died within {self._rhythm.window:g} s, the last one: {ending.reason}")
            self._set("starting", ending.reason)
            pause = self._rhythm.pauses[min(len(deaths), len(self._rhythm.pauses)) - 1]
            self._log.warning("worker ended unasked; starting another", cause=ending.reason, wait=pause)
            with trio.move_on_after(pause):
                await self._unwanted.wait()

    async def _serve_once(self, mounted: Mounted, listener_fd: int, *, resume: bool) -> launch.Ending:
        """One worker from start to end. Kills it when cancelled."""
        uid, gid = self._resources.owner or (None, None)
        fields = {
            "mount": self.mount,
            "daemon": self._resources.daemon,
            "fuse_fd": launch.Descriptor(mounted.fuse_fd),
            "control_fd": launch.Descriptor(listener_fd),
            "lifeline_fd": launch.Descriptor(self._resources.lifeline_fd),
            "agreement": mounted.agreement,
            "resume": resume,
            "uid": uid,
            "gid": gid,
        }
        try:
            worker = await self._in_thread(
                partial(launch.start, self._resources.worker, self.mount.name, fields, self._resources.lock_fd)
            )
        except (OSError, EOFError) as exc:
            return launch.Ending(None, f"cannot be started: {exc}", final=False)
        self._worker = worker
        self._log.debug("worker started", pid=worker.pid, resume=resume)
        try:
            async with trio.open_nursery() as nursery:
                if self._unwanted.is_set():  # stop() came while there was no worker to tell
                    worker.kill()
                nursery.start_soon(self._watch, mounted.path, worker)
                await worker.wait()
                nursery.cancel_scope.cancel()
        finally:
            worker.kill()
            with trio.CancelScope(shield=True):
                await self._bury(mounted.path, worker)
                ending = await self._in_thread(worker.close)
            self._worker = None
        return ending

    async def _bury(self, path: str, worker: launch.WorkerProcess) -> None:
        """Waits for a killed worker to end. One that waits in the kernel for its own mount ends with the connection only."""
        with trio.move_on_after(self._rhythm.stop_grace):
            await worker.wait()
            return
        self._log.error("killed worker does not die; ending the connection", pid=worker.pid)
        mounting.abort(path)
        await worker.wait()

    # --- health --------------------------------------------------------------------------------------------------------

    async def _watch(self, path: str, worker: launch.WorkerProcess) -> None:
        """Kills a worker that has stopped answering. Its statfs also frees one that sits in a blocking read of the device."""
        rhythm = self._rhythm
        begin = trio.current_time()
        answered = {"ping": begin, "statfs": begin}

        async def ping() -> None:
            if isinstance(await self.ask_once(Ping(mount=self.mount.name)), Done):
                answered["ping"] = trio.current_time()

        async def statfs() -> None:
            if await trio.to_thread.run_sync(_answers, path, limiter=self._statfs_thread, abandon_on_cancel=True):
                answered["statfs"] = trio.current_time()
                if self.state == "starting":
                    self._set("live")
                    self.settled.set()

        async with trio.open_nursery() as nursery:
            for probe in (ping, statfs):
                nursery.start_soon(self._repeat, probe)
            while True:
                await trio.sleep(rhythm.probe / 5)
                latest = max(answered.values())
                patience = rhythm.patience if latest > begin else rhythm.start_patience
                silent = trio.current_time() - latest > patience
                deaf = trio.current_time() - answered["statfs"] > max(rhythm.statfs_patience, patience)
                if (silent or deaf) and self.state != "stopping":
                    what = "neither ping nor file operations" if silent else "no file operation"
                    self._log.error("worker answers " + what + "; killing it", pid=worker.pid)
                    worker.kill()

    async def _repeat(self, probe: Callable[[], object]) -> None:
        pause = 0.05  # until it is live, somebody is waiting
        while True:
            with trio.move_on_after(self._rhythm.patience):
                await probe()  # type: ignore[misc]
            await trio.sleep(pause if self.state == "starting" else self._rhythm.probe)

    # --- helpers -------------------------------------------------------------------------------------------------------

    def _set(self, state: State, reason: str = "") -> None:
        if (state, reason) != (self.state, self.reason):
            self.state, self.reason, self.since = state, reason, time.time()
        if state in ("failed", "unmounted"):
            self.settled.set()
        self._resources.changed()

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(call, limiter=self._threads)


def _answers(path: str) -> bool:
    """Whether the file system at `path` answers statfs, be it with an error of its own."""
    try:
        os.statvfs(path)
    except OSError as exc:
        return exc.errno not in (errno.ENOTCONN, errno.ECONNABORTED, errno.ENODEV)
    return True


def _is_ours(path: str) -> bool:
    there = mounting.find(path)
    return there is not None and there.is_ours
