"""Tells the service manager how we are (sd_notify(3)), if there is one.

It does not know what the words mean.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress


def notify(message: str, environ: Mapping[str, str] = os.environ) -> None:
    """Sends `message` (lines like `READY=1`) to $NOTIFY_SOCKET. Nothing listening, or nothing set, is fine; never waits."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        sender.sendto(message.encode(), address)


def watchdog_interval(environ: Mapping[str, str] = os.environ) -> float | None:
    """Seconds between two `WATCHDOG=1`, half of what the manager asks for; None if it does not watch this process."""
    microseconds = environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdigit() or environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 2e6
