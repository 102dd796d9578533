"""The demo's home: its directories, its server, its daemon, and that nothing of an earlier run is in the way.

It does not know what is shown. Every process it starts carries the home's path in its environment; only a process that
does is ever ended. A directory is only emptied if it was made here (it holds a file that says so).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from rich.console import Console

from nbmountd.control.client import ControlError, ask_sync
from nbmountd.control.schema import MountStatus, Status, StatusReply
from nbmountd.errors import NbmountdError

MARKER = "NBMOUNTD_DEMO_HOME"
LABEL = "made-by-nbmountd-demo"
USER = "ada"
NAME = "b2drop"
SERVERS = Path(__file__).parents[2] / "tests" / "servers"
"""Stand-ins for services that nobody can install. A pip install has none."""

Check = Callable[[str, bool], None]
"""What is claimed, and whether it holds."""


class StageError(NbmountdError):
    """The demo cannot go on; the message says why and what to do."""


class Stage:
    """The demo's home in use by this process: entering cleans it, leaving ends what runs, unless `keep` was called."""

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()
        self.remote = self.home / "server"
        self.mount = self.home / "home" / NAME
        self.log = self.home / "nbmountd.log"
        self._lock: IO[str] | None = None
        self._kept = False
        self._daemon: subprocess.Popen[bytes] | None = None
        self.runtime = self.home / "run"

    def __enter__(self) -> Stage:
        if self.home.exists() and any(self.home.iterdir()) and not (self.home / LABEL).exists():
            raise StageError(f"{self.home} holds files that are not the demo's; choose another --directory")
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / LABEL).touch()
        self._lock = (self.home / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(f"another demo is at work in {self.home}; wait for it or choose another --directory") from None
        self._clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._kept:
            self._clear()
        if self._lock is not None:
            self._lock.close()

    def keep(self) -> None:
        """Leaves everything running when the stage is left."""
        self._kept = True

    def say_stopped(self) -> int:
        """Says that nothing of the demo runs any more (entering the stage has seen to it)."""
        Console().print("The demo's server and mount are gone.")
        return 0

    # --- server and daemon ---------------------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("NBMOUNTD_", "WEBDAV_"))}
        return {**kept, MARKER: str(self.home), "XDG_RUNTIME_DIR": str(self.runtime)}

    def start_server(self) -> str:
        """Starts the WebDAV server over `remote` and returns its address."""
        self.remote.mkdir(exist_ok=True)
        password = secrets.token_urlsafe(12)
        port = self.start_python("-m", "nbmountd.demo.server", str(self.remote), told=f"{USER}\n{password}\n")
        (self.home / "password").touch(mode=0o600)
        (self.home / "password").write_text(password)
        return f"http://127.0.0.1:{port}/"

    def start_python(self, *arguments: str | Path, told: str = "") -> int:
        """Starts a server in a Python process of this home and returns the port that it says on standard output first.
        `told` is written to its standard input."""
        output = self.home / "server.log"
        with output.open("ab") as log:
            server = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env=self.environment, start_new_session=True, text=True,
            )  # fmt: skip
        assert server.stdin is not None and server.stdout is not None
        with server.stdin, server.stdout:
            with contextlib.suppress(BrokenPipeError):
                server.stdin.write(told)
                server.stdin.flush()
            port = server.stdout.readline().strip()
        if not port:
            raise StageError(f"{arguments[0]} did not start: {output.read_text()}")
        return int(port)

    def start_daemon(self, url: str, further: Mapping[str, Mapping[str, object]]) -> None:
        """Starts `nbmountd run` over the server, and over `further` remotes (name -> keys), and returns when all are live."""
        self.runtime.mkdir(mode=0o700, exist_ok=True)
        self.mount.parent.mkdir(exist_ok=True)
        config = self.home / "config.toml"
        config.write_text(
            "[daemon]\n"
            f'state_dir = "{self.home}/state"\ncache_dir = "{self.home}/cache"\n\n'
            "[[mount]]\n"
            f'name = "{NAME}"\npath = "{self.mount}"\n'
            f'backend = "webdav"\nurl = "{url}"\nuser = "{USER}"\npassword_file = "{self.home}/password"\n'
            + "".join(
                f'\n[[mount]]\nname = "{name}"\npath = "{self.mount.with_name(name)}"\n'
                + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
                for name, keys in further.items()
            )
        )
        with self.log.open("ab") as log:
            self._daemon = subprocess.Popen(
                [*program("nbmountd"), "run", "--config", str(config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, start_new_session=True,
            )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if self._daemon.poll() is not None:
                raise StageError(f"nbmountd ended with {self._daemon.returncode}:\n{self.log.read_text()}")
            with contextlib.suppress(ControlError):
                mounts = self.statuses()
                if all(mount.state == "live" for mount in mounts):
                    return
                for mount in mounts:
                    if mount.state not in ("starting", "live"):
                        raise StageError(f"{mount.name} is {mount.state}: {mount.reason}")
            time.sleep(0.02)
        raise StageError(f"the mount was not ready after 30 seconds:\n{self.log.read_text()}")

    def status(self) -> MountStatus:
        """What the daemon says of the first mount. Raises ControlError when it does not answer."""
        return self.statuses()[0]

    def statuses(self) -> tuple[MountStatus, ...]:
        """What it says of all mounts. Raises ControlError."""
        *_, reply = ask_sync(self.runtime / "nbmountd" / "control.sock", Status(), timeout=30)
        if not isinstance(reply, StatusReply):
            raise ControlError(f"unexpected answer: {reply}")
        return reply.mounts

    def ctl(self, *arguments: str) -> int:
        """Runs `nbmountctl` as the user would, on the user's terminal; returns its exit status."""
        return subprocess.run([*program("nbmountctl"), *arguments], env=self.environment, check=False).returncode

    def ctl_output(self, *arguments: str) -> str:
        """What `nbmountctl` prints."""
        ended = subprocess.run(
            [*program("nbmountctl"), *arguments], env=self.environment, check=False, capture_output=True, text=True
        )
        return ended.stdout + ended.stderr

    def stop_daemon(self) -> int:
        """Asks the daemon to stop, as Ctrl-C or a pod's end would, and returns its exit status."""
        assert self._daemon is not None
        self._daemon.send_signal(signal.SIGTERM)
        return self._daemon.wait(60)

    # --- leaving nothing behind ----------------------------------------------------------------------------------------

    def processes(self) -> dict[int, str]:
        """Living processes of this home, pid -> command."""
        marker = os.fsencode(f"{MARKER}={self.home}")
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
                    if alive and marker in (entry / "environ").read_bytes().split(b"\0"):
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def mounts(self) -> list[str]:
        """Mount points below the home, deepest first, dead ones too."""
        found = []
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), line.split(" ")[4])
            if point.startswith(f"{self.home}/"):
                found.append(point)
        return sorted(found, reverse=True)

    def _clear(self) -> None:
        """Ends processes, mounts and files of this home, whoever left them there. The lock stays."""
        for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + patience
            while self.processes() and time.monotonic() < deadline:
                time.sleep(0.05)
        for point in self.mounts():
            command = ["umount", "-l", point] if os.geteuid() == 0 else ["fusermount3", "-u", "-z", point]
            subprocess.run(command, check=False, capture_output=True)
        # What is still mounted would be emptied with the directory: the server's files, not ours.
        if self.mounts() or self.processes():
            raise StageError(f"an earlier demo cannot be ended: {self.mounts()} {self.processes()}")
        for entry in self.home.iterdir():
            if entry.name not in (LABEL, "lock"):
                if entry.is_dir() and not entry.is_symlink():
                    make_writable(entry)
                    shutil.rmtree(entry)
                else:
                    entry.unlink()


def make_writable(directory: Path) -> None:
    """Lets the owner remove what is below; a mount point that is not mounted is guarded against writing."""
    for path, _, _ in os.walk(directory):
        os.chmod(path, 0o700)


def program(name: str) -> Sequence[str]:
    """The command line of `nbmountd` or `nbmountctl`, as installed beside this Python."""
    installed = Path(sys.executable).parent / name
    if installed.exists():
        return [str(installed)]
    return [sys.executable, "-c", f"from nbmountd.cli import {name}; {name}()"]
