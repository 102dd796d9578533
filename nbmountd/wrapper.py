"""`nbmountd exec`: runs a command (a notebook server) with the mounts beside it, and sends what is unsent after its end.

It is a container's only child of tini: the container ends when it ends. It starts `nbmountd run` in a session of its own, so
that signals to the container's process group reach the command only through here; or uses the daemon that a root hook has
started.
Whatever goes wrong with mounting, the command runs. It knows no mount and no remote.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

from nbmountd import namespace, places
from nbmountd.config import Config
from nbmountd.configfile import load_config
from nbmountd.control.client import ControlError, DaemonNotRunning, ask_sync
from nbmountd.control.schema import AnyReply, AnyRequest, Failed, Ping, Status, StatusReply, Sync
from nbmountd.errors import NbmountdError

MOUNT_WAIT = 5.0
"""Seconds that the command waits for the mounts at most; they go on coming up behind it."""
STOP_GRACE = 10.0
"""Seconds for the daemon beyond its own drain before it is killed; its journal has everything."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)
CANNOT_EXECUTE, NOT_FOUND = 126, 127


def run(command: Sequence[str], config_path: Path | None, *, userns: bool) -> int:
    """Runs `command` with the mounts; returns its exit status (128 + signal number if a signal ended it)."""
    config = _load(config_path)
    if userns and config is not None:
        try:
            namespace.enter()
        except namespace.NamespaceError as exc:
            _say(f"no namespace of its own: {exc}; trying to mount without")
            userns = False
    daemon = None
    if config is not None and not _answers(Ping()):
        daemon = _start_daemon(config_path, userns=userns)
        _wait_for_mounts(daemon)
    status = _run_command(command, _without_secrets(config), userns=userns)
    if daemon is not None:
        _stop_daemon(daemon, config)
    elif config is not None:
        _sync(config)
    return status


def _load(path: Path | None) -> Config | None:
    try:
        return load_config(path)
    except NbmountdError as exc:
        _say(f"nothing is mounted: {exc}")
        return None


def _say(text: str) -> None:
    print(f"nbmountd exec: {text}", file=sys.stderr, flush=True)  # noqa: T201  # there is no log before the daemon


def _start_daemon(config_path: Path | None, *, userns: bool) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-c", "from nbmountd.cli import nbmountd; nbmountd()", "run"]
    if config_path is not None:
        arguments += ["--config", str(config_path)]
    return subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True,
        preexec_fn=namespace.keep_mount_right if userns else None,
    )  # fmt: skip


def _wait_for_mounts(daemon: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + MOUNT_WAIT
    while time.monotonic() < deadline:
        if daemon.poll() is not None:
            _say(f"nothing is mounted: the daemon ended with status {daemon.returncode}; see `nbmountctl doctor`")
            return
        reply = _answers(Status())
        if isinstance(reply, StatusReply) and all(mount.state != "starting" for mount in reply.mounts):
            for mount in reply.mounts:
                if mount.state == "failed":
                    _say(f"{mount.name} is not mounted: {mount.reason}")
            return
        time.sleep(0.05)
    _say(f"the mounts are not there after {MOUNT_WAIT:g} s; going on, they may come later")


def _answers(request: AnyRequest, timeout: float = 2.0) -> AnyReply | None:
    """The last reply of a daemon of ours; None if there is none."""
    last = None
    try:
        with closing(ask_sync(places.find_control_socket(), request, timeout=timeout)) as replies:
            for reply in replies:
                last = reply
    except (DaemonNotRunning, ControlError, OSError):
        return None
    return last


def _without_secrets(config: Config | None) -> dict[str, str]:
    """The command's environment: ours, less the variables that hold credentials of mounts."""
    hidden = set()
    for mount in config.mounts if config is not None else ():
        for key in ("password_env", "token_env"):
            hidden.add(getattr(mount.options, key, None))
    return {name: value for name, value in os.environ.items() if name not in hidden}


def _run_command(command: Sequence[str], environment: dict[str, str], *, userns: bool) -> int:
    try:
        child = subprocess.Popen(
            list(command), env=environment, preexec_fn=namespace.give_up_rights if userns else None
        )
    except FileNotFoundError:
        _say(f"{command[0]}: no such command")
        return NOT_FOUND
    except OSError as exc:
        _say(f"{command[0]}: {exc.strerror}")
        return CANNOT_EXECUTE

    def forward(number: int, _frame: object) -> None:
        with suppress(ProcessLookupError):
            child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        status = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def _stop_daemon(daemon: subprocess.Popen[bytes], config: Config | None) -> None:
    """Ends our daemon in order: it sends what it can until its deadline, unmounts, and keeps the rest in its journal."""
    if daemon.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGINT):  # a second signal to us: no more waiting for uploads
        signal.signal(number, lambda *_: daemon.send_signal(signal.SIGINT))
    daemon.terminate()
    drain = config.daemon.drain_timeout if config is not None else 0.0
    try:
        daemon.wait(drain + STOP_GRACE)
    except subprocess.TimeoutExpired:
        _say("the daemon did not end in time and was killed; what is unsent is in its journal")
        daemon.kill()
        daemon.wait()


def _sync(config: Config) -> None:
    """The daemon is somebody else's (a root hook's): it is only asked to send everything now."""
    timeout = config.daemon.drain_timeout
    reply = _answers(Sync(timeout=timeout), timeout=timeout + STOP_GRACE)
    if isinstance(reply, Failed):
        _say(reply.message)
