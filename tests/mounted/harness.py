"""The real daemon as a test sees it: started, watched, killed and cleaned up from outside.

It knows the command lines, the control socket and what the kernel tells in /proc, and nothing of the daemon's inside.
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
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from nbmountd.control import schema
from nbmountd.control.client import ControlError, ask_sync
from tests.mounted import modes
from tests.mounted.kernel import MARKER, Process, mounts_below, processes_of
from tests.mounted.kernel import eventually as eventually  # test_resume.py asks for both here
from tests.mounted.kernel import same_tree as same_tree

LIVE: list[Daemon] = []
"""Every daemon whose home still exists; conftest.py looks here for logs to judge and for what to clean."""

UNJUDGED: list[str] = []
"""Log lines of daemons that are gone, until conftest.py has judged them."""


def program(name: str) -> list[str]:
    """The command line of `nbmountd` or `nbmountctl` as installed beside this Python."""
    installed = Path(sys.executable).parent / name
    if installed.exists():
        return [str(installed)]
    return [sys.executable, "-c", f"from nbmountd.cli import {name}; {name}()"]


def toml(value: object) -> str:
    """A TOML value. JSON's strings, numbers, booleans and lists of them are TOML's."""
    return json.dumps(value)


class Daemon:
    """`nbmountd run` over `mounts` (name -> keys of its `[[mount]]`) in a home of its own, and the means to handle it.

    Whoever makes one calls `discard` in the end; it ends every process and mount, however the test ended.
    """

    def __init__(self, mounts: Mapping[str, Mapping[str, object]], **daemon_keys: object) -> None:
        # Short, because the path of a unix socket must fit into 107 bytes.
        self.home = Path(tempfile.mkdtemp(prefix="nbm-"))
        self.log = self.home / "daemon.log"
        self.log.touch()
        self.config = self.home / "config.toml"
        self.child: subprocess.Popen[bytes] | None = None
        self.judged = 0
        places = {"state_dir": f"{self.home}/state", "cache_dir": f"{self.home}/cache"}
        self._keys: dict[str, object] = {**places, "drain_timeout": 20.0, **daemon_keys}
        self.mounts = {name: dict(keys) for name, keys in mounts.items()}
        (self.home / "run").mkdir(mode=0o700)
        (self.home / "mnt").mkdir()
        self.write_config()
        LIVE.append(self)

    # --- where things are ----------------------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("NBMOUNTD_", "WEBDAV_"))}
        return {**kept, MARKER: str(self.home), "XDG_RUNTIME_DIR": f"{self.home}/run", "HOME": str(self.home)}

    @property
    def socket(self) -> Path:
        return self.home / "run" / "nbmountd" / "control.sock"

    def path(self, name: str) -> Path:
        """Where the mount `name` is."""
        return Path(str(self.mounts[name].get("path", self.home / "mnt" / name)))

    def write_config(self) -> None:
        lines = ["[daemon]", 'log_format = "json"']
        lines += [f"{key} = {toml(value)}" for key, value in self._keys.items()]
        for name, keys in self.mounts.items():
            settings = {"name": name, "path": str(self.path(name)), **keys}
            lines += ["[[mount]]", *(f"{key} = {toml(value)}" for key, value in settings.items())]
        self.config.write_text("\n".join(lines) + "\n")

    # --- starting and ending -------------------------------------------------------------------------------------------

    def launch(self) -> subprocess.Popen[bytes]:
        """Starts the daemon and does not wait for anything."""
        way = modes.prepare(self.home, {self.path(name): keys for name, keys in self.mounts.items()})
        arguments = [f"--fuse-fd={name}={fd}" for name in self.mounts if (fd := way.passed.get(self.path(name)))]
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                [*program("nbmountd"), "run", "--config", str(self.config), *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**self.environment, **way.environment}, pass_fds=tuple(way.passed.values()),
            )  # fmt: skip
        way.close()
        return self.child

    def start(self, within: float = 30) -> Daemon:
        """Starts the daemon and returns when no mount is "starting" any more."""
        child = self.launch()

        def settled() -> bool:
            assert child.poll() is None, f"nbmountd ended with {child.returncode}:\n{self.log.read_text()}"
            with contextlib.suppress(ControlError):
                return all(mount.state != "starting" for mount in self.statuses())
            return False

        eventually(settled, within, f"daemon ready; its log says:\n{self.log.read_text()}")
        return self

    def terminate(self, number: signal.Signals = signal.SIGTERM, within: float = 60) -> int:
        """Sends `number` to the supervisor and returns its exit status. What must be gone then is gone, or it fails."""
        assert self.child is not None
        session = self.child.pid
        self.child.send_signal(number)
        status = self.child.wait(within)
        modes.clean(self.home)
        assert mounts_below(self.home) == [], "mounts were left behind"
        # The fork server of a killed supervisor sees the end of its socket only afterwards.
        eventually(lambda: not processes_of(self.home, session), 20, f"no process left: {processes_of(self.home, session)}")
        return status

    def kill_supervisor(self) -> None:
        """As the OOM killer would. Returns when it is dead; its workers may still be ending."""
        assert self.child is not None
        self.child.kill()
        self.child.wait(10)

    def kill_worker(self, name: str) -> int:
        """Kills the worker of mount `name` by SIGKILL and returns its pid."""
        pid = self.status(name).pid
        assert pid is not None and pid > 1
        os.kill(pid, signal.SIGKILL)
        return pid

    def processes(self) -> list[Process]:
        return processes_of(self.home, self.child.pid if self.child else None)

    def abandon(self) -> None:
        """Ends every process of this daemon at once, which also ends every call that hangs in one of its mounts."""
        processes = self.processes()
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that none sees another one die
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def discard(self) -> None:
        """Leaves nothing: no process, no mount, no file. May be called in any state, and twice."""
        if self in LIVE:
            # Before the killing: what workers say of a supervisor killed here is no news.
            UNJUDGED.extend(self.new_log_lines())
            LIVE.remove(self)
        self.abandon()
        if self.child is not None:
            self.child.wait(10)
        for point in mounts_below(self.home):
            subprocess.run(["umount", "-l", point], check=False, capture_output=True)
        shutil.rmtree(self.home, ignore_errors=True)

    # --- talking to it -------------------------------------------------------------------------------------------------

    def ask(self, request: schema.AnyRequest, timeout: float = 60) -> schema.AnyReply:
        """The final reply to `request`, over the control socket. Raises ControlError when there is none."""
        *_, last = ask_sync(self.socket, request, timeout=timeout)
        return last

    def statuses(self) -> tuple[schema.MountStatus, ...]:
        reply = self.ask(schema.Status())
        assert isinstance(reply, schema.StatusReply), reply
        return reply.mounts

    def status(self, name: str) -> schema.MountStatus:
        return next(mount for mount in self.statuses() if mount.name == name)

    def wait_for_state(self, name: str, *states: str, within: float = 30) -> schema.MountStatus:
        def reached() -> schema.MountStatus | None:
            status = self.status(name)
            return status if status.state in states else None

        return eventually(reached, within, f"{name} is one of {states}")

    def sync(self, *paths: Path, timeout: float = 60) -> None:
        """Returns when everything (below `paths`, if any) is safe; fails when it is not in time."""
        request = schema.Sync(paths=tuple(map(str, paths)), timeout=timeout)
        reply = self.ask(request, timeout + 10)
        assert isinstance(reply, schema.Done), reply

    def refresh(self, path: Path | None = None) -> None:
        reply = self.ask(schema.Refresh(path=None if path is None else str(path)))
        assert isinstance(reply, schema.Done), reply

    def requests(self, name: str) -> dict[str, int]:
        """FUSE requests that the worker of `name` has served, by operation."""
        return self.status(name).requests

    def received(self, name: str) -> int:
        """Bytes that the worker of `name` has had from its remote."""
        return self.status(name).bytes_received

    def ctl(self, *arguments: str, timeout: float = 60, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """`nbmountctl` with `arguments` and `stdin`, as a user runs it; whatever its exit status."""
        return subprocess.run(
            [*program("nbmountctl"), *arguments],
            env=self.environment, capture_output=True, text=True, timeout=timeout, check=False, input=stdin,
        )

    # --- its log -------------------------------------------------------------------------------------------------------

    def new_log_lines(self) -> Iterator[str]:
        """The lines written since the last call."""
        with self.log.open("rb") as log:
            log.seek(self.judged)
            text = log.read()
        self.judged += len(text)
        yield from text.decode(errors="replace").splitlines()


def abandon_all() -> None:
    """Ends every process of every daemon, and so whatever hangs in a mount."""
    for daemon in LIVE:
        daemon.abandon()


def surprises(lines: Iterable[str], allowed: Iterable[str]) -> list[str]:
    """The log lines that nobody expected: warnings, errors, and whatever is not a log line at all (a traceback)."""
    found = []
    for line in lines:
        try:
            level = json.loads(line)["level"]
        except (ValueError, KeyError, TypeError):
            level = "none"
        if level.lower() not in ("debug", "info") and not any(re.search(pattern, line) for pattern in allowed):
            found.append(line)
    return found


@contextlib.contextmanager
def daemon_over(mounts: Mapping[str, Mapping[str, object]], **daemon_keys: object) -> Iterator[Daemon]:
    """A running daemon; at the end it is stopped in order, which must leave nothing behind, and discarded."""
    daemon = Daemon(mounts, **daemon_keys)
    try:
        yield daemon.start()
        if daemon.child is not None and daemon.child.poll() is None:
            daemon.terminate()
    finally:
        daemon.discard()
