"""Keeps one mount: mounts it, holds its connection, and has a living worker serve it until it is told to let go.

It does no remote I/O and knows neither pyfuse3 nor a backend: a worker is a process that answers a control socket and file
operations. Its state is touched by its own task and, through the verbs, by the tasks of control requests; each verb changes it
between two awaits.

    starting --answers--> live --worker dies--> starting ...          (the mount stays; callers wait)
    starting --cannot mount / too many deaths--> failed --retry--> starting
    live --workers keep dying--> degraded --restart(), or after a while--> starting
    any --stop()--> stopping --worker gone, unmounted--> unmounted --start()--> starting
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import trio

from nbmountd import handover, launch
from nbmountd.config import DaemonConfig, MountConfig
from nbmountd.control.client import ControlError, ask
from nbmountd.control.schema import AnyReply, AnyRequest, Done, Event, Failed, Ping, Progress, Stop
from nbmountd.control.server import open_listener
from nbmountd.errors import ConfigError, NbmountdError, StateError
from nbmountd.fuse import mounting
from nbmountd.fuse.agreement import ALL_FLAGS, Flag
from nbmountd.fuse.mounting import Mounted, MountError
from nbmountd.handover import Inherited
from nbmountd.log import get_logger

T = TypeVar("T")
State = Literal["starting", "live", "degraded", "failed", "stopping", "unmounted"]
_DEGRADED = "workers kept dying: the mount can only be read, and nothing is sent; see the log, then `nbmountctl restart`"


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
    short_life: float = 0.5
    killed_pause: float = 0.1
    """A worker that was killed (SIGKILL: the OOM killer, a person, our own watch) did nothing wrong that we know of: it is
    replaced at once, after this pause if it was the second in turn that had served shorter than `short_life`, and only
    `outage` ends that. All other deaths count:"""
    deaths: int = 10
    window: float = 60.0
    """so many within so long, and the mount is only read from then on (`WorkerStart.degraded`); so many again, and it is given
    up..."""
    retry: float = 60.0
    """...and either is tried again as usual after this."""
    outage: float = 60.0
    """Without a worker that serves for so long, the connection is ended, so that no caller waits for ever."""


@dataclass(frozen=True)
class Holding:
    """What is kept while the mount lives, whoever serves it."""

    mounted: Mounted
    listener: socket.socket
    """The control socket of its workers."""
    held_fd: int
    """The memory of fs/held.py."""

    def close(self) -> None:
        self.listener.close()
        os.close(self.held_fd)


@dataclass
class Resources:
    """What all keepers of a daemon share. Descriptors belong to the supervisor."""

    daemon: DaemonConfig
    server: launch.ForkServer
    owner: tuple[int, int] | None
    sockets: Path
    lifeline_fd: int
    lock_fd: int
    changed: Callable[[], None] = lambda: None
    """Called at every change of state."""
    rhythm: Rhythm = Rhythm()
    kernel_flags: Flag = ALL_FLAGS
    """What of the kernel's offer is used; less makes it an older kernel."""
    passed: dict[str, int] = field(default_factory=dict)
    """Connections that somebody else mounted, by mount name; each is used once."""
    environ: Mapping[str, str] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()
    """Variables with credentials (`config.secret_variables`)."""


class Keeper:
    """One mount. `run()` is its task; the other verbs may be called from any task."""

    def __init__(self, mount: MountConfig, resources: Resources, inherited: Inherited | None = None) -> None:
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
        self._inherited = inherited
        self._holding: Holding | None = None
        self._left_behind = False
        self._degraded = self._restarting = self._told = False
        self._live_since: float | None = None
        """Since when this worker has answered file operations; None: not yet."""
        self._outage_since = 0.0
        self._short_lives = 0
        """Killed workers in turn that had not served for long."""
        self._served = trio.Event()
        """Set when the next worker has answered."""
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
            self._set("starting", self.reason if self.state == "failed" else "")  # whoever looks meanwhile shall see why
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

    async def restart(self) -> Done | Failed:
        """Replaces the worker by a new one; what it had taken is answered first. Returns when the new one serves."""
        if self.state in ("failed", "unmounted", "stopping"):
            return Failed(message=f"{self.mount.name} is {self.state}; `nbmountctl mount {self.mount.name}` starts it")
        self._served = trio.Event()
        if self._worker is not None:
            worker, self._restarting, self._told = self._worker, True, False
            with trio.move_on_after(self.mount.request_deadline + self._rhythm.stop_grace) as patience:
                reply = await self.ask_once(Stop(mount=self.mount.name, handover=True))
                self._told = isinstance(reply, Done)
                await worker.ended.wait()
            if patience.cancelled_caught:
                self._log.warning("worker does not end for its successor; killing it", pid=worker.pid)
                worker.kill()
        with trio.move_on_after(self._rhythm.start_patience):
            await self._served.wait()
        if self.state != "live":
            return Failed(message=f"{self.mount.name} is {self.state}: {self.reason}")
        return Done(message=f"{self.mount.name} has a new worker, pid {self.pid}")

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
        self._set("starting", self.reason)
        inherited, self._inherited = self._inherited, None
        holding = self._holding = await self._take_over(inherited) if inherited else await self._mount()
        try:
            await self._keep_served(holding, resume=inherited is not None)
        finally:
            if not self._left_behind:
                self._holding = None
                with trio.CancelScope(shield=True):
                    await self._in_thread(partial(self._let_go, holding.mounted))
                holding.close()
                self.socket_path.unlink(missing_ok=True)

    async def _mount(self) -> Holding:
        owner, mount = self._resources.owner, self.mount
        uid, gid = owner or (os.geteuid(), os.getegid())
        listener = open_listener(self.socket_path, owner=owner)
        try:
            passed = self._resources.passed.pop(mount.name, None)
            if passed is not None:
                mounted = await self._in_thread(partial(mounting.adopt, mount.path, passed, only=self._resources.kernel_flags))
            else:
                mounted = await self._in_thread(
                    partial(
                        mounting.mount, mount.path, mount.name, uid=uid, gid=gid, read_only=mount.read_only,
                        only=self._resources.kernel_flags,
                    )
                )  # fmt: skip
        except BaseException:
            listener.close()
            raise
        self._log.info("mounted", path=mounted.path, way=mounted.way, minor=mounted.agreement.minor)
        held_fd = os.memfd_create("nbmountd-held", os.MFD_CLOEXEC)
        handover.store(mount.name, mounted, held_fd, self._resources.environ)
        return Holding(mounted, listener, held_fd)

    async def _take_over(self, inherited: Inherited) -> Holding:
        """Goes on with the mount of an earlier supervisor, or makes another if that one cannot be used."""
        mounted = inherited.mounted()
        fits = mounted.path == mounting.resolve(self.mount.path) and mounted.is_connected()
        if fits and (inherited.worker is not None or mounted.agreement.has_resend):
            self._log.info("taking over the mount of the program before", path=mounted.path)
            self.restarts = inherited.restarts
            if inherited.worker is not None:
                worker = inherited.worker
                self._worker = launch.WorkerProcess(worker.pid, worker.pidfd, worker.reason_fd)
            if inherited.listener_fd is not None:
                listener = socket.socket(fileno=inherited.listener_fd)
            else:
                listener = open_listener(self.socket_path, owner=self._resources.owner)
            return Holding(mounted, listener, inherited.held_fd)
        self._log.warning("the mount of the program before cannot be used; open files are lost", path=mounted.path)
        if inherited.worker is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(inherited.worker.pidfd, signal.SIGKILL)
        await self._in_thread(partial(self._let_go, mounted))
        for fd in inherited.descriptors()[1:]:
            os.close(fd)
        return await self._mount()

    def dump(self) -> None:
        """Has the worker log what it is doing."""
        if self._worker is not None:
            self._worker.dump()

    def leave_behind(self) -> None:
        """From now on, an end of `run()` leaves mount and worker as they are, for the program after us."""
        self._left_behind = True

    def legacy(self) -> Inherited | None:
        """What was left behind; None if it was not mounted."""
        if self._holding is None:
            return None
        mounted, worker = self._holding.mounted, self._worker
        return Inherited(
            name=self.mount.name, note=handover.note_of(mounted), fuse_fd=mounted.fuse_fd, held_fd=self._holding.held_fd,
            listener_fd=self._holding.listener.fileno(), restarts=self.restarts,
            worker=handover.Worker(pid=worker.pid, pidfd=worker.pidfd, reason_fd=worker.reason_fd) if worker else None,
        )  # fmt: skip

    def _let_go(self, mounted: Mounted) -> None:
        """In this order: nobody comes in any more, then who is waiting inside is told that it is over."""
        handover.unstore(self.mount.name, self._resources.environ)
        try:
            if mounted.is_ours:
                mounting.unmount(mounted.path)
            self._log.info("unmounted", path=mounted.path)
        except MountError as exc:
            self._log.error("cannot unmount", cause=exc)
        finally:
            mounted.close()

    async def _keep_served(self, holding: Holding, *, resume: bool) -> None:
        """Has one worker after the other serve the mount, until it is unwanted. Raises NbmountdError when none can."""
        deaths: deque[float] = deque()
        mounted = holding.mounted
        self._degraded = False
        self._outage_since = trio.current_time()
        while not self._unwanted.is_set():
            ending = await self._serve_once(holding, resume=resume)
            if self._unwanted.is_set():
                return
            # Who was killed did not see the mount go; the next one does, if it went just then.
            if mounted.is_ours and not ending.killed and not await self._in_thread(partial(_is_ours, mounted.path)):
                self._unwanted.set()
                self._set("unmounted", f"unmounted from outside; `nbmountctl mount {self.mount.name}` brings it back")
                return
            if not mounted.is_connected():
                raise StateError("somebody aborted the connection to the kernel; open files are lost")
            resume = True
            restarting, self._restarting = self._restarting, False
            if restarting:
                self._degraded = False
                deaths.clear()
            if restarting and (ending.ordered or self._told):
                self._log.info("worker ended as told; the next one goes on")
                self._set("starting", "restarting")
                continue
            self.restarts += 1
            if not mounted.agreement.has_resend:
                raise StateError(
                    f"the worker died ({ending.reason}), and this kernel cannot send again what it had taken (Linux 6.9 can): "
                    "requests in flight fail, open files are lost"
                )
            if ending.final:
                raise ConfigError(ending.reason)
            pause = self._after_death(deaths, ending)
            self._set("starting", ending.reason)
            self._log.warning("worker ended unasked; starting another", cause=ending.reason, wait=pause)
            with trio.move_on_after(pause):
                await self._unwanted.wait()

    def _after_death(self, deaths: deque[float], ending: launch.Ending) -> float:
        """Seconds to wait before the next start. Raises StateError when the mount is to be given up."""
        now, rhythm = trio.current_time(), self._rhythm
        if self._live_since is not None:
            self._outage_since = now
        elif now - self._outage_since > rhythm.outage:
            raise StateError(f"no worker has served for {rhythm.outage:g} s, the last one: {ending.reason}")
        if ending.killed:
            lived = self._live_since is not None and now - self._live_since > rhythm.short_life
            before, self._short_lives = self._short_lives, 0 if lived else self._short_lives + 1
            return rhythm.killed_pause if before and not lived else 0.0
        deaths.append(now)
        while deaths[0] < now - rhythm.window:
            deaths.popleft()
        if len(deaths) >= rhythm.deaths:
            if self._degraded:
                raise StateError(f"{len(deaths)} workers died within {rhythm.window:g} s, the last one: {ending.reason}")
            self._degraded = True
            self._log.error("workers keep dying; nothing is written any more", deaths=len(deaths), cause=ending.reason)
            deaths.clear()
        return rhythm.pauses[min(max(len(deaths), 1), len(rhythm.pauses)) - 1]

    async def _serve_once(self, holding: Holding, *, resume: bool) -> launch.Ending:
        """One worker from start to end; the one that is there already, if there is. Kills it when cancelled."""
        mounted = holding.mounted
        self._live_since = None
        worker = self._worker
        if worker is None:
            try:
                worker = self._worker = await self._start_worker(holding, resume=resume)
            except (OSError, EOFError) as exc:
                return launch.Ending(None, f"cannot be started: {exc}", final=False)
        try:
            async with trio.open_nursery() as nursery:
                if self._unwanted.is_set():  # stop() came while there was no worker to tell
                    worker.kill()
                nursery.start_soon(self._watch, mounted, worker)
                if self._degraded:
                    nursery.start_soon(self._end_degraded)
                await worker.wait()
                nursery.cancel_scope.cancel()
        finally:
            if not self._left_behind:
                worker.kill()
                with trio.CancelScope(shield=True):
                    await self._bury(mounted.path, worker)
                    ending = await self._in_thread(worker.close)
                worker.ended.set()
                self._worker = None
        return ending

    async def _start_worker(self, holding: Holding, *, resume: bool) -> launch.WorkerProcess:
        """Raises OSError or EOFError."""
        uid, gid = self._resources.owner or (None, None)
        fields = {
            "mount": self.mount,
            "daemon": self._resources.daemon,
            "fuse_fd": launch.Descriptor(holding.mounted.fuse_fd),
            "control_fd": launch.Descriptor(holding.listener.fileno()),
            "lifeline_fd": launch.Descriptor(self._resources.lifeline_fd),
            "agreement": holding.mounted.agreement,
            "resume": resume,
            "uid": uid,
            "gid": gid,
            "held_fd": launch.Descriptor(holding.held_fd),
            "degraded": self._degraded,
            "hidden": self._resources.hidden,
        }
        return await self._in_thread(
            partial(self._resources.server.start, self.mount.name, fields, self._resources.lock_fd)
        )

    async def _end_degraded(self) -> None:
        await trio.sleep(self._rhythm.retry)
        await self.restart()

    async def _bury(self, path: str, worker: launch.WorkerProcess) -> None:
        """Waits for a killed worker to end. One that waits in the kernel for its own mount ends with the connection only."""
        with trio.move_on_after(self._rhythm.stop_grace):
            await worker.wait()
            return
        self._log.error("killed worker does not die; ending the connection", pid=worker.pid)
        mounting.abort(path)
        await worker.wait()

    # --- health --------------------------------------------------------------------------------------------------------

    async def _watch(self, mounted: Mounted, worker: launch.WorkerProcess) -> None:
        """Kills a worker that has stopped answering. Its statfs also frees one that sits in a blocking read of the device."""
        rhythm = self._rhythm
        begin = trio.current_time()
        answered = {"ping": begin, "statfs": begin}

        async def ping() -> None:
            if isinstance(await self.ask_once(Ping(mount=self.mount.name)), Done):
                answered["ping"] = trio.current_time()
                if not mounted.is_ours:  # who knows where it is mounted
                    answers()

        async def statfs() -> None:
            if mounted.is_ours and await trio.to_thread.run_sync(
                _answers, mounted.path, limiter=self._statfs_thread, abandon_on_cancel=True
            ):
                answers()

        def answers() -> None:
            answered["statfs"] = trio.current_time()
            if self.state == "starting":
                self._live_since = trio.current_time()
                self._set("degraded" if self._degraded else "live", _DEGRADED if self._degraded else "")
                self.settled.set()
                self._served.set()

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
