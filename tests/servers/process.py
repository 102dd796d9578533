"""A server as a process of its own: port, start, readiness, log of requests, certain end.

It knows nothing of any one server; apache.py and its neighbours say how each is configured and called.
"""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

START_LIMIT = 15.0
"""Seconds until a server must answer; on a machine with load they need about 0.1."""

STOP_LIMIT = 5.0
"""Seconds from SIGTERM to SIGKILL."""

GUARD = """
exec 3<&0
"$@" 3<&- </dev/null &
server=$!
{ read -r _ <&3; kill -TERM $server; sleep 1; kill -KILL 0; } &
wait $server
"""
"""Runs a server and ends its whole process group when standard input ends: when we are killed, however hard."""


class ServerMissing(Exception):
    """The program is not installed."""


class ServerProcess:
    """Base of all servers here; subclasses give `command` and `configure`."""

    prefix = "/dav/"
    """Path of the URL at which `root` appears."""

    logs_late = False
    """Requests are in the log some seconds later; then the first one, of our start, may be among them."""

    def __init__(self, root: Path, work: Path, user: str = "alice", password: str = "wonderland") -> None:
        self.root = Path(root)
        self.work = Path(work)
        self.user = user
        self.password = password
        self.port = free_port()
        self.log = self.work / "requests.log"
        self.output = self.work / "output.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.root.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        self.configure()

    def configure(self) -> None:
        """Writes what the program needs to `work`."""

    def command(self) -> list[str]:
        """How to run the program in the foreground."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """What the program needs in its environment beside what is there."""
        return {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.prefix}"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the server, if it does not run, and returns when it answers."""
        if self.running:
            return
        self.log.touch()
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", GUARD, "guard", *self.command()],
                stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True, cwd=self.work,
                env={**os.environ, **self.environment()},
            )  # fmt: skip
        deadline = time.monotonic() + START_LIMIT
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"{self.command()[0]} does not answer:\n{self.output.read_text()[-2000:]}")
            time.sleep(0.01)
        if not self.logs_late:
            self.wait_for_requests(1)
            self.clear_requests()

    def stop(self) -> None:
        """Ends the server and all its children, if it runs."""
        process, self._process = self._process, None
        if process is None:
            return
        # The group is the server's own (start_new_session) and holds the guard, the server and its children.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_LIMIT
        while _states(process.pid) and time.monotonic() < deadline:
            time.sleep(0.005)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def freeze(self) -> None:
        """Stops all processes of the server in their tracks: connections stand, nothing answers."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)
        while not all(state == "T" for state in _states(self._process.pid)):  # the signal takes a moment
            time.sleep(0.001)

    def thaw(self) -> None:
        """Ends `freeze`."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGCONT)

    def requests(self, below: str = "") -> list[str]:
        """"METHOD PATH STATUS" of each request since the start or `clear_requests`, for paths below prefix + `below`.

        A server may log a request some moments after it answered: see `wait_for_requests`.
        """
        lines = self.log.read_text("utf-8", "replace").splitlines()
        return [line for line in lines if line.partition(" ")[2].startswith(self.prefix + below)]

    def wait_for_requests(self, count: int, below: str = "") -> list[str]:
        """`requests(below)` when there are at least `count`; raises AssertionError after START_LIMIT seconds."""
        deadline = time.monotonic() + START_LIMIT
        while len(requests := self.requests(below)) < count:
            assert time.monotonic() < deadline, requests
            time.sleep(0.005)
        return requests

    def clear_requests(self) -> None:
        with self.log.open("wb"):
            pass

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("OPTIONS", self.prefix)
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return True


def _states(group: int) -> list[str]:
    """The states (proc(5)) of the processes of a process group."""
    states = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = path.read_text().rpartition(") ")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                states.append(state)
    return states


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def program(name: str, packages: str) -> str:
    """The path of a program. Raises ServerMissing with the Debian packages to install."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise ServerMissing(f"{name} is not installed; the tests need the Debian packages {packages}")
    return found


def python_script(module: Path, *arguments: str) -> list[str]:
    """A command that runs a file of this package in a Python of its own."""
    return [sys.executable, "-u", str(module), *arguments]
