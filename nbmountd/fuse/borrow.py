"""Asks the mount helper (nbmountd/mounthelper.py) to mount and unmount for us: the client's side of start mode P.

It knows where the helper listens and how it is spoken to, and nothing of mount points.
"""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Mapping

from nbmountd.errors import NbmountdError

VARIABLE = "NBMOUNTD_MOUNT_HELPER"
"""Names the helper's socket. When it is set, nothing else is tried."""
DEFAULT = "/run/nbmountd-helper/helper.sock"
"""Where it is looked for when no other way to mount is open."""
TIMEOUT = 10.0


class BorrowError(NbmountdError):
    """The helper is not there, or refused; the text says which."""


def helper_socket(environ: Mapping[str, str] = os.environ) -> str | None:
    """The helper's socket; None if none is named and there is none at the usual place."""
    named = environ.get(VARIABLE, "")
    if named:
        return named
    try:
        return DEFAULT if stat.S_ISSOCK(os.stat(DEFAULT).st_mode) else None
    except OSError:
        return None


def is_named(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether somebody decided for the helper."""
    return bool(environ.get(VARIABLE))


def ping(path: str) -> None:
    """Returns if the helper at `path` serves our uid. Raises BorrowError."""
    _ask(path, {"verb": "ping"})


def mount(path: str, directory: str, name: str, *, read_only: bool) -> int:
    """The FUSE connection of a new mount at `directory`, in our mount namespace. Raises BorrowError."""
    fd = _ask(path, {"verb": "mount", "path": directory, "name": name, "read_only": read_only})
    if fd is None:
        raise BorrowError(f"the mount helper at {path} sent no connection")
    return fd


def unmount(path: str, directory: str) -> None:
    """Has the topmost mount at `directory` taken away; it must be one of ours. Raises BorrowError."""
    _ask(path, {"verb": "unmount", "path": directory})


def _ask(path: str, request: dict[str, object]) -> int | None:
    namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as helper:
            helper.settimeout(TIMEOUT)
            helper.connect(path)
            socket.send_fds(helper, [json.dumps(request).encode()], [namespace])
            message, fds, _, _ = socket.recv_fds(helper, 8192, 1, socket.MSG_CMSG_CLOEXEC)
            helper.recv(1)  # the end: the helper has let go of the connection
    except OSError as exc:
        raise BorrowError(f"the mount helper at {path} cannot be asked: {exc.strerror or exc}") from exc
    finally:
        os.close(namespace)
    try:
        error = json.loads(message).get("error", "")
    except (ValueError, AttributeError) as exc:
        raise BorrowError(f"the mount helper at {path} gave no answer") from exc
    if error:
        raise BorrowError(f"the mount helper refused: {error}")
    return fds[0] if fds else None
