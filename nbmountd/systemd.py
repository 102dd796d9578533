"""Tells the service manager how we are (sd_notify(3)), if there is one, and has it keep descriptors (sd_listen_fds(3)).

It does not know what the words mean.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress

_FIRST_FD = 3
"""SD_LISTEN_FDS_START."""


def notify(message: str, environ: Mapping[str, str] = os.environ, *, fds: Sequence[int] = ()) -> None:
    """Sends `message` (lines like `READY=1`), and descriptors, to $NOTIFY_SOCKET. Nothing listening, or nothing set, is fine;
    never waits."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        sender.connect(address)
        socket.send_fds(sender, [message.encode()], list(fds)) if fds else sender.send(message.encode())


def stored(environ: Mapping[str, str] = os.environ) -> list[tuple[str, int]]:
    """(name, descriptor) of what the manager kept for this process; they are the caller's, and closed at an exec."""
    if environ.get("LISTEN_PID") != str(os.getpid()) or not environ.get("LISTEN_FDS", "").isdigit():
        return []
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    found = []
    for index in range(int(environ["LISTEN_FDS"])):
        with suppress(OSError):
            os.set_inheritable(_FIRST_FD + index, False)
            found.append((names[index] if index < len(names) else "", _FIRST_FD + index))
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)
    return found


def watchdog_interval(environ: Mapping[str, str] = os.environ) -> float | None:
    """Seconds between two `WATCHDOG=1`, half of what the manager asks for; None if it does not watch this process."""
    microseconds = environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdigit() or environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 2e6
