"""The daemon beside a command: ours, kept alive until we stop it, or somebody else's, which is only asked.

It knows no mount and no remote; how a command is run is in wrapper.py. Everything is bounded in time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

from nbmountd import namespace, places
from nbmountd.config import Config
from nbmountd.control.client import ControlError, DaemonNotRunning, ask_sync
from nbmountd.control.schema import AnyReply, AnyRequest, Failed, MountStatus, Ping, Status, StatusReply, Sync

MOUNT_WAIT = 5.0
"""Seconds that the command waits for the mounts at most; they go on coming up behind it."""
STOP_GRACE = 10.0
"""Seconds for the daemon beyond its own drain before it is killed; its journal has everything."""
DRAIN = 30.0
"""Seconds for somebody else's daemon, whose configuration we may not know."""
RESTARTS = 5
"""In a row, the second one after 1 s, the third after 2 s...; the count begins anew when a daemon has lived for `SETTLED` s."""
SETTLED = 60.0
_PR_SET_PDEATHSIG = 1


def say(text: str) -> None:
    print(f"nbmountd exec: {text}", file=sys.stderr, flush=True)  # noqa: T201  # there is no log before the daemon


class Own:
    """`nbmountd run` in a session of its own, so that signals to the container's process group do not reach it.

    It gets SIGTERM when this process dies, however hard.
    """

    def __init__(self, config: Config, config_path: Path | None, *, userns: bool) -> None:
        self._drain = config.daemon.drain_timeout
        self._arguments = [] if config_path is None else ["--config", str(config_path)]
        self._userns = userns
        self._deaths = 0
        self._again_at: float | None = None
        self._ending = False
        self._start()
        self._wait_for_mounts()

    def _start(self) -> None:
        self._since = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from nbmountd.cli import nbmountd; nbmountd()", "run", *self._arguments],
            stdin=subprocess.DEVNULL, stdout=2, start_new_session=True, preexec_fn=self._in_child,
        )  # fmt: skip

    def _in_child(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if self._userns:
            namespace.keep_mount_right()

    def _wait_for_mounts(self) -> None:
        deadline = time.monotonic() + MOUNT_WAIT
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                say(f"nothing is mounted: the daemon ended with status {self._process.returncode}; see `nbmountctl doctor`")
                return
            mounts = _mounts()
            if mounts is not None and all(mount.state != "starting" for mount in mounts):
                for mount in mounts:
                    if mount.state == "failed":
                        say(f"{mount.name} is not mounted: {mount.reason}")
                return
            time.sleep(0.05)
        say(f"the mounts are not there after {MOUNT_WAIT:g} s; going on, they may come later")

    def look(self) -> None:
        """Starts it again if it has died (OOM killer, kill -9): dead mounts come back, and its journal has what was unsent."""
        now = time.monotonic()
        if self._again_at is not None:
            if now >= self._again_at:
                self._again_at = None
                self._start()
            return
        if self._ending or self._process.poll() is None:
            return
        if self._process.returncode >= 0 and now - self._since < SETTLED:
            self._ending = True  # it gave up by itself and has said why; trying again cannot help
            return
        self._deaths = 1 if now - self._since > SETTLED else self._deaths + 1
        if self._deaths > RESTARTS:
            self._ending = True
            say(f"the daemon died {RESTARTS} times in a row; nothing is mounted any more")
            return
        say(f"the daemon died (status {self._process.returncode}); starting it again")
        self._again_at = now + self._deaths - 1

    def hurry(self) -> None:
        """Has it send what is unsent while the command still ends; does not wait."""
        self._ending = True
        threading.Thread(target=answers, args=(Sync(timeout=self._drain), self._drain), daemon=True).start()

    def end(self) -> None:
        """Ends it in order: it sends what it can until its deadline, unmounts, and keeps the rest in its journal."""
        self._ending = True
        if self._process.poll() is not None:
            return
        for number in (signal.SIGTERM, signal.SIGINT):  # a second signal to us: no more waiting for uploads
            signal.signal(number, lambda *_: self._process.send_signal(signal.SIGINT))
        self._process.terminate()
        try:
            self._process.wait(self._drain + STOP_GRACE)
        except subprocess.TimeoutExpired:
            say("the daemon did not end in time and was killed; what is unsent is in its journal")
            self._process.kill()
            self._process.wait()


class Foreign:
    """Somebody else's: a root hook's in this container (start mode F), or a sidecar's (S). It outlives the command."""

    def __init__(self, sidecar: str | None) -> None:
        if sidecar is None:
            return
        deadline = time.monotonic() + MOUNT_WAIT
        while (mounts := _mounts()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if mounts is None:
            say(f"the sidecar has not answered below {sidecar} within {MOUNT_WAIT:g} s; nothing is linked")
        for mount in mounts or ():
            _link(Path(mount.path), places.home())

    def look(self) -> None:
        """Whoever started it looks after it."""

    def hurry(self) -> None:
        threading.Thread(target=answers, args=(Sync(timeout=DRAIN), DRAIN), daemon=True).start()

    def end(self) -> None:
        reply = answers(Sync(timeout=DRAIN), timeout=DRAIN + STOP_GRACE)
        if isinstance(reply, Failed):
            say(reply.message)


def running() -> bool:
    """Whether a daemon of ours answers."""
    return answers(Ping()) is not None


def answers(request: AnyRequest, timeout: float = 2.0) -> AnyReply | None:
    """The last reply of a daemon of ours; None if there is none."""
    last = None
    try:
        with closing(ask_sync(places.find_control_socket(), request, timeout=timeout)) as replies:
            for reply in replies:
                last = reply
    except (DaemonNotRunning, ControlError, OSError):
        return None
    return last


def _mounts() -> tuple[MountStatus, ...] | None:
    reply = answers(Status())
    return reply.mounts if isinstance(reply, StatusReply) else None


def _link(path: Path, home: Path) -> None:
    """`~/NAME` leads to a mount that a sidecar makes elsewhere. Nothing but an empty directory or a link of ours gives way."""
    link = home / path.name
    if path.parent == home:
        return
    try:
        if link.is_symlink() and os.readlink(link) == str(path):
            return
        if link.is_dir() and not link.is_symlink():
            with suppress(OSError):
                link.rmdir()
        link.symlink_to(path)
    except OSError as exc:
        say(f"{link} is not made a link to {path}: {exc.strerror}")
