"""The systems that are compared: each starts with empty caches, offers a directory, and can be looked at while it works.

It knows how to start and stop them and what they cost; what is done with the directory is rows.py's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nbmountd.control import schema
from nbmountd.control.client import ControlError, ask_sync
from tests.servers import ServerProcess

START_LIMIT = 30.0
TICK = os.sysconf("SC_CLK_TCK")


class System(Protocol):
    """One way to have the files of a remote in a directory."""

    name: str
    mount: Path
    """Where programs find the files."""
    remote: Path
    """The same place on the disk of whoever keeps the files in the end."""

    def start(self) -> None:
        """Starts with empty caches and returns when `mount` can be used."""

    def stop(self) -> None:
        """Ends everything `start` began. May be called twice."""

    def processes(self) -> list[int]:
        """The processes that serve the mount."""

    def sync(self) -> bool:
        """Asks for everything to be made safe now and waits for it; False if there is no way to ask."""


class Local:
    """A plain directory on the disk, which is as fast as it gets."""

    name = "local"

    def __init__(self, home: Path) -> None:
        self.mount = self.remote = home / "local"

    def start(self) -> None:
        self.mount.mkdir(exist_ok=True)

    def stop(self) -> None:
        pass

    def processes(self) -> list[int]:
        return []

    def sync(self) -> bool:
        return False


class Rclone:
    """Debian's rclone with its full cache, otherwise as it comes. `vendor`: what it is told of the server."""

    name = "rclone"

    def __init__(self, home: Path, server: ServerProcess, vendor: str = "other") -> None:
        self._vendor = vendor
        self.mount = home / "rclone"
        self.remote = server.root
        self._home = home
        self._server = server
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.mount.mkdir(exist_ok=True)
        cache = self._home / "rclone-cache"
        shutil.rmtree(cache, ignore_errors=True)
        obscured = subprocess.run(
            ["rclone", "obscure", "-"], input=self._server.password, capture_output=True, text=True, check=True
        ).stdout.strip()
        environment = {**os.environ, "RCLONE_CONFIG": "", "RCLONE_WEBDAV_PASS": obscured}
        command = ["rclone", "mount", ":webdav:", str(self.mount), "--vfs-cache-mode", "full", "--cache-dir", str(cache)]
        command += ["--webdav-url", self._server.url, "--webdav-user", self._server.user, "--webdav-vendor", self._vendor]
        with (self._home / "rclone.log").open("ab") as log:
            self._child = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        wait_until(lambda: self.mount.is_mount(), "rclone has mounted")

    def stop(self) -> None:
        if self._child is not None:
            end(self._child)
            self._child = None
        unmount(self.mount)

    def processes(self) -> list[int]:
        return [self._child.pid] if self._child is not None else []

    def sync(self) -> bool:
        return False


class Davfs2:
    """Debian's davfs2 as it comes, but for the locks, which the server does not know."""

    name = "davfs2"

    def __init__(self, home: Path, server: ServerProcess) -> None:
        self.mount = home / "davfs2"
        self.remote = server.root
        self._home = home
        self._server = server

    def start(self) -> None:
        self.mount.mkdir(exist_ok=True)
        self._forget()
        config = self._home / "davfs2.conf"
        config.write_text("use_locks 0\ncache_size 4000\n")
        options = f"conf={config},username={self._server.user}"
        command = ["mount", "-t", "davfs", "-o", options, self._server.url, str(self.mount)]
        # It asks for the password on its standard input.
        password = f"{self._server.password}\n".encode()
        subprocess.run(command, check=True, capture_output=True, input=password, timeout=START_LIMIT)

    def stop(self) -> None:
        processes = self.processes()
        unmount(self.mount)  # at once: an ordinary one would send everything first
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._forget()

    def _forget(self) -> None:
        """Empties its cache: the system's, because its processes give up being root and reach no private directory."""
        for cache in Path("/var/cache/davfs2").glob(f"*{str(self.mount).replace('/', '-').strip('-')}*"):
            shutil.rmtree(cache, ignore_errors=True)

    def processes(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if words[0].endswith(b"mount.davfs") and str(self.mount).encode() in words:
                        found.append(int(entry.name))
        return found

    def sync(self) -> bool:
        return False


class Nbmountd:
    """This project as it comes. `keys`: of the mount, instead of those for WebDAV."""

    name = "nbmountd"

    def __init__(self, home: Path, server: ServerProcess, keys: dict[str, str] | None = None) -> None:
        self._keys = keys or {"backend": "webdav", "url": server.url}
        self.mount = home / "nbmountd"
        self.remote = server.root
        self._home = home
        self._server = server
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        for name in ("state", "cache", "run"):
            shutil.rmtree(self._home / name, ignore_errors=True)
        (self._home / "run").mkdir(mode=0o700)
        config = self._home / "config.toml"
        config.write_text(
            f'[daemon]\nstate_dir = "{self._home}/state"\ncache_dir = "{self._home}/cache"\n'
            f'[[mount]]\nname = "bench"\npath = "{self.mount}"\n'
            + "".join(f"{key} = {json.dumps(value)}\n" for key, value in self._keys.items())
            + f"user = {json.dumps(self._server.user)}\n"
            f"password = {json.dumps(self._server.password)}\n"
        )
        config.chmod(0o600)
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(self._home / "run")}
        command = [str(Path(sys.executable).parent / "nbmountd"), "run", "--config", str(config)]
        with (self._home / "nbmountd.log").open("ab") as log:
            self._child = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        wait_until(lambda: self._state() == "live", "nbmountd has mounted")

    def stop(self) -> None:
        if self._child is not None:
            left = self.processes()
            end(self._child)
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._child = None
        unmount(self.mount)

    def processes(self) -> list[int]:
        if self._child is None:
            return []
        # Each worker has a session of its own, but the environment of the daemon.
        marker = f"XDG_RUNTIME_DIR={self._home}/run".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if marker in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def sync(self) -> bool:
        *_, reply = ask_sync(self._socket, schema.Sync(timeout=300), timeout=310)
        if not isinstance(reply, schema.Done):
            raise RuntimeError(f"nbmountd could not send everything: {reply}")
        return True

    @property
    def _socket(self) -> Path:
        return self._home / "run" / "nbmountd" / "control.sock"

    def _state(self) -> str:
        with contextlib.suppress(ControlError):
            return self.status().state
        return ""

    def status(self) -> schema.MountStatus:
        """The mount as the daemon sees it. Raises ControlError."""
        *_, reply = ask_sync(self._socket, schema.Status(), timeout=10)
        assert isinstance(reply, schema.StatusReply)
        return reply.mounts[0]


# --- what they cost ----------------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """What serving cost: CPU in seconds, memory in bytes (proportional set size, the most that was seen)."""

    cpu: float = 0.0
    memory: int = 0


@contextlib.contextmanager
def costing(system: System) -> Iterator[Cost]:
    """Measures what `system` uses inside the `with`; the value is filled when it is left."""
    cost = Cost()
    done = threading.Event()

    def watch() -> None:
        while True:
            cost.memory = max(cost.memory, sum(map(memory_of, system.processes())))
            if done.wait(0.25):
                return

    before = sum(map(cpu_of, system.processes()))
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield cost
    finally:
        done.set()
        watcher.join()
        cost.cpu = sum(map(cpu_of, system.processes())) - before


def cpu_of(pid: int) -> float:
    """Seconds of CPU used by a process and its ended children; 0 when it has gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / TICK


def memory_of(pid: int) -> int:
    """Proportional set size in bytes; 0 when it has gone."""
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


# --- helpers -----------------------------------------------------------------------------------------------------------


def wait_until(look: Callable[[], bool], what: str, limit: float = START_LIMIT) -> None:
    """Returns once `look()` is true; RuntimeError after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not look():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {limit} seconds: {what}")
        time.sleep(0.02)


def end(child: subprocess.Popen[bytes]) -> None:
    """Ends a child in order, or by force after 40 seconds."""
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(40)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def unmount(point: Path) -> None:
    """Leaves `point` without a mount, dead ones included."""
    command = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
    if f" {point} " in Path("/proc/self/mountinfo").read_text():
        subprocess.run([*command, str(point)], check=False, capture_output=True)
