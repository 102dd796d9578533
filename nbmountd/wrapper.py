"""`nbmountd exec`: runs a command (a notebook server) with the mounts beside it, and sends what is unsent after its end.

It is a container's only child of tini: the container ends when it ends. It chooses the start mode (ways.py), has the daemon
started or uses one that is there (companion.py), and hides the mounts' credentials from the command.
Whatever goes wrong with mounting, the command runs. It knows no mount and no remote.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from nbmountd import namespace, ways
from nbmountd.companion import Foreign, Own, running, say
from nbmountd.config import Config, secret_variables
from nbmountd.configfile import load_config
from nbmountd.errors import NbmountdError
from nbmountd.fuse import borrow
from nbmountd.places import SIDECAR

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)
CANNOT_EXECUTE, NOT_FOUND = 126, 127
UNSET, KEEP = "NBMOUNTD_UNSET", "NBMOUNTD_KEEP"
"""Names of variables, separated by commas: those that the command does not get besides the mounts' credentials, and those
credentials that it does get."""
_LOOK = 1.0
_PR_SET_DUMPABLE = 4


def run(command: Sequence[str], config_path: Path | None, *, userns: bool) -> int:
    """Runs `command` with the mounts; returns its exit status (128 + signal number if a signal ended it)."""
    config: Config | None = None
    beside: Own | Foreign | None = None
    inside = False
    sidecar = os.environ.get(SIDECAR)
    if sidecar or running():
        with suppress(NbmountdError):
            config = load_config(config_path)  # for the names of what is to be hidden
        beside = Foreign(sidecar)
    else:
        config = _load(config_path)
        if config is not None:
            inside = _enter_namespace() if userns else False
            if inside or (way := _choose()) is not None:
                inside = inside or (way == "userns" and _enter_namespace())
                beside = Own(config, config_path, userns=inside)
    # Our environment, with the credentials, is readable to the command's processes otherwise (proc(5), /proc/pid/environ).
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    status = _run_command(command, _without_secrets(config, os.environ), beside, userns=inside)
    if beside is not None:
        beside.end()
    return status


def _load(path: Path | None) -> Config | None:
    try:
        return load_config(path)
    except NbmountdError as exc:
        say(f"nothing is mounted: {exc}")
        return None


def _choose() -> str | None:
    try:
        return ways.choose().name
    except ways.NoWayToMount as exc:
        say(f"nothing is mounted: {exc}; `nbmountctl doctor` says more")
        return "helper" if borrow.is_named() else None  # a helper that somebody decided for may come later


def _enter_namespace() -> bool:
    try:
        namespace.enter()
    except namespace.NamespaceError as exc:
        say(f"no namespace of its own: {exc}; trying to mount without")
        return False
    return True


def _without_secrets(config: Config | None, environ: Mapping[str, str]) -> dict[str, str]:
    """The command's environment: ours, less the variables that hold credentials of mounts."""
    hidden = {UNSET, *_names(environ.get(UNSET, ""))}
    hidden |= set() if config is None else set(secret_variables(config))
    hidden -= _names(environ.get(KEEP, ""))
    return {name: value for name, value in environ.items() if name not in hidden}


def _names(text: str) -> set[str]:
    return {name.strip() for name in text.split(",")}


def _run_command(
    command: Sequence[str], environment: dict[str, str], beside: Own | Foreign | None, *, userns: bool
) -> int:
    # `tini -g` signals our whole process group. In a group of its own the command gets each signal once, from here; but a
    # terminal's programs belong into the group that the terminal knows.
    own_group = not os.isatty(0)

    def in_child() -> None:
        if own_group:
            os.setpgid(0, 0)
        if userns:
            namespace.give_up_rights()

    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []
    told: set[int] = set()

    def forward(number: int, _frame: object) -> None:
        if child is None:
            early.append(number)
            return
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number) if own_group else child.send_signal(number)
        if number == signal.SIGTERM and number not in told and beside is not None:
            told.add(number)
            beside.hurry()

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        child = subprocess.Popen(list(command), env=environment, preexec_fn=in_child)
        for number in early:
            forward(number, None)
        while True:
            with suppress(subprocess.TimeoutExpired):
                status = child.wait(_LOOK)
                break
            if beside is not None:
                beside.look()
    except FileNotFoundError:
        say(f"{command[0]}: no such command")
        return NOT_FOUND
    except OSError as exc:
        say(f"{command[0]}: {exc.strerror}")
        return CANNOT_EXECUTE
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status
