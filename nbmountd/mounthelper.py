"""`nbmountd mount-helper` (start mode P): mounts for clients that may not, and hands them the connection over a unix socket.

It is the one privileged program of a node or a pod; its clients are the daemons in notebook containers, which need neither
`/dev/fuse` nor any right. It serves no file system, keeps no descriptor and no state: a client's death ends its mount.
Clients are hostile: the parent reads nothing from them; each connection has a child of its own, which lives a few seconds.

What keeps a client from more than a FUSE mount on a directory of its own:
- its uid is the kernel's word (SO_PEERCRED) and must be allowed; the mount belongs to that uid, without allow_other, suid, dev;
- it names its mount namespace by a descriptor, which it can only have of a place where it is (a pid could be another's by now);
- the path is below an allowed prefix, in its simplest form, and is walked with that uid's file rights and without following
  any symlink (openat2(2), setfsuid(2)); what it leads to must be a directory of that uid, and is mounted on by descriptor;
- no byte of a request reaches the mount options but a name of letters and digits.

The wire: one SOCK_SEQPACKET message each way. Request: JSON of `verb` ("ping", "mount", "unmount"), `path`, `name`,
`read_only`, with a descriptor of the mount namespace. Reply: JSON of `error`, or of nothing and, to "mount", the connection.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import select
import signal
import socket
import stat
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from nbmountd.errors import NbmountdError

LONGEST_REQUEST = 8192
PATIENCE = 2.0
"""Seconds for a client's request to arrive."""
LONGEST_LIFE = 8
"""Seconds, after which the child of a connection is ended, whatever it does."""
MOST_CHILDREN = 128
MAY_BE_NAMED = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

_CLONE_NEWNS, _NS_GET_NSTYPE = 0x00020000, 0xB703  # linux/nsfs.h
_SYS_OPENAT2 = 437  # the same on every architecture
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS = 0x02, 0x04
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(NbmountdError):
    """The client does not get it; the text is for it."""


@dataclass(frozen=True)
class Rules:
    """Who may mount where. Prefixes are absolute directories; what is mounted lies below one of them."""

    uids: frozenset[int]
    prefixes: tuple[str, ...]
    device: str = "/dev/fuse"

    def check_path(self, path: object) -> str:
        if not isinstance(path, str) or not path.isprintable() or len(path) > 4000:
            raise Refused("a path is a text of printable characters")
        if not path.startswith("/") or path != os.path.normpath(path) or path.startswith("//"):
            raise Refused(f"{path!r} is not an absolute path in its simplest form")
        if not any(path.startswith(prefix.rstrip("/") + "/") for prefix in self.prefixes):
            raise Refused(f"{path!r} is not below {' or '.join(self.prefixes)}")
        return path


def serve(socket_path: Path, rules: Rules, *, mode: int = 0o666) -> NoReturn:
    """Serves until SIGTERM or SIGINT. Raises NbmountdError when it cannot listen or has no `/dev/fuse`.

    Anybody may connect by default, because who it is is asked of the kernel.
    """
    try:
        os.close(os.open(rules.device, os.O_RDWR | os.O_CLOEXEC))
        listener = _listen(socket_path, mode)
    except OSError as exc:
        raise NbmountdError(f"{exc.filename or socket_path}: {exc.strerror}") from exc
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _end(socket_path))
    children: set[int] = set()
    _say(f"listening at {socket_path} for uids {sorted(rules.uids)} below {', '.join(rules.prefixes)}")
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    while True:
        poller.poll(1000 if children else None)
        children -= set(_ended(children))
        with suppress(BlockingIOError):
            client, _ = listener.accept()
            with client:
                if len(children) >= MOST_CHILDREN:
                    _answer(client, {"error": "the mount helper is busy"})
                    continue
                pid = os.fork()
                if pid == 0:
                    listener.close()
                    _be_child(client, rules)
                children.add(pid)


def _listen(path: Path, mode: int) -> socket.socket:
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    path.chmod(mode)
    listener.listen(128)
    listener.setblocking(False)
    return listener


def _end(path: Path) -> NoReturn:
    path.unlink(missing_ok=True)
    os._exit(0)


def _ended(children: set[int]) -> list[int]:
    return [pid for pid in children if os.waitpid(pid, os.WNOHANG)[0]]


def _say(text: str) -> None:
    """A line of the log. A client's texts are in it as `repr` only."""
    os.write(2, f"nbmountd mount-helper: {text}\n".encode(errors="backslashreplace"))


# --- one connection, in a process of its own ---------------------------------------------------------------------------


def _be_child(client: socket.socket, rules: Rules) -> NoReturn:
    """Nothing may be imported and no traceback be printed here: after setns(2), files are the client's."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(LONGEST_LIFE)
        client.setblocking(True)
        client.settimeout(PATIENCE)
        pid, uid, gid = struct.unpack("iII", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        fds: list[int] = []
        try:
            request, fds = _receive(client)  # first, so that the answer meets nobody who is still sending
            if uid not in rules.uids:
                raise Refused(f"uid {uid} may not mount here")
            fd = _do(request, fds, uid, gid, rules)
        except (Refused, OSError) as exc:
            text = str(exc) if isinstance(exc, Refused) else f"{exc.strerror or exc}"
            _say(f"refused uid {uid}, pid {pid}: {text}")
            _answer(client, {"error": text})
        else:
            if request.get("verb") != "ping":
                _say(f"{request.get('verb')} of {request.get('path')!r} for uid {uid}, pid {pid}")
            _answer(client, {}, fd)
            if fd is not None:
                os.close(fd)  # before the client sees the end: from then on it alone holds the connection
        os._exit(0)
    finally:
        os._exit(1)


def _receive(client: socket.socket) -> tuple[dict[str, object], list[int]]:
    try:
        message, fds, flags, _ = socket.recv_fds(client, LONGEST_REQUEST, 4, socket.MSG_CMSG_CLOEXEC)
    except TimeoutError as exc:
        raise Refused("no request came") from exc
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or not message:
        raise Refused("the request is too long, or empty")
    try:
        request = json.loads(message)
    except (ValueError, RecursionError) as exc:
        raise Refused("the request is not JSON") from exc
    if not isinstance(request, dict):
        raise Refused("the request is not an object")
    return request, fds


def _answer(client: socket.socket, reply: dict[str, object], fd: int | None = None) -> None:
    with suppress(OSError):
        socket.send_fds(client, [json.dumps(reply).encode()], [] if fd is None else [fd])


def _do(request: dict[str, object], fds: Sequence[int], uid: int, gid: int, rules: Rules) -> int | None:
    verb, name = request.get("verb"), request.get("name", "")
    if verb == "ping":
        return None
    if verb not in ("mount", "unmount"):
        raise Refused(f"{verb!r} is no verb of the mount helper")
    if verb == "mount" and not (isinstance(name, str) and MAY_BE_NAMED.fullmatch(name)):
        raise Refused("a name is of letters, digits, dots, dashes and underscores")
    path = rules.check_path(request.get("path"))
    # Opened before the client's files come into sight.
    fuse_fd = os.open(rules.device, os.O_RDWR | os.O_CLOEXEC)
    proc_fd = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    _enter(fds, uid, gid)
    if verb == "unmount":
        _unmount(path, uid, proc_fd)
        return None
    flags = _MS_NOSUID | _MS_NODEV | (_MS_RDONLY if request.get("read_only") is True else 0)
    _mount(path, str(name), fuse_fd, uid, gid, flags)
    return fuse_fd


def _enter(fds: Sequence[int], uid: int, gid: int) -> None:
    """Into the client's mount namespace, with its rights to files (capabilities to files go with setfsuid, SYS_ADMIN stays)."""
    if len(fds) != 1:
        raise Refused("one descriptor, of the mount namespace, belongs to the request")
    try:
        kind = fcntl.ioctl(fds[0], _NS_GET_NSTYPE)
    except OSError as exc:
        raise Refused("the descriptor is not of a namespace") from exc
    if kind != _CLONE_NEWNS:
        raise Refused("the descriptor is not of a mount namespace")
    _check(_libc.setns(fds[0], _CLONE_NEWNS), "setns")
    os.setgroups([])
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)
    if _libc.setfsuid(uid) != uid:  # it gives back the one before, and no error
        raise Refused("setfsuid failed")


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def _open_directory(path: str) -> int:
    how = _OpenHow(
        os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, 0, _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS
    )
    fd: int = _libc.syscall(_SYS_OPENAT2, -100, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))  # AT_FDCWD
    if fd < 0:
        code = ctypes.get_errno()
        hint = " (no symbolic link is followed)" if code in (errno.ELOOP, errno.ENOTDIR) else ""
        raise Refused(f"{path!r}: {os.strerror(code)}{hint}")
    return fd


def _mount(path: str, name: str, fuse_fd: int, uid: int, gid: int, flags: int) -> None:
    directory = _open_directory(path)
    found = os.fstat(directory)
    if found.st_uid != uid:
        raise Refused(f"{path!r} belongs to uid {found.st_uid}, not to uid {uid}")
    os.fchdir(directory)  # "." is the very directory that was checked, and needs no /proc of the client's
    options = f"fd={fuse_fd},rootmode={stat.S_IFDIR:o},user_id={uid},group_id={gid},default_permissions"
    _check(_libc.mount(f"nbmountd#{name}".encode(), b".", b"fuse.nbmountd", flags, options.encode()), "mount(2)")


def _unmount(path: str, uid: int, proc_fd: int) -> None:
    """Only a mount that was made here for this uid, and only if it is the topmost one at `path`."""
    with os.fdopen(os.open("self/mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc_fd), "rb") as file:
        lines = file.read().splitlines()
    wanted = os.fsencode(path)
    here = [line for line in lines if _plain(line.split(b" ")[4]) == wanted]
    if not here:
        raise Refused(f"nothing is mounted at {path!r}")
    kind, source, options = (_plain(field) for field in here[-1].partition(b" - ")[2].split(b" ", 2))
    owned = f"user_id={uid}".encode() in options.split(b",")
    if kind != b"fuse.nbmountd" or not source.startswith(b"nbmountd#") or not owned:
        raise Refused(f"what is mounted at {path!r} is not yours")
    os.fchdir(_open_directory(os.path.dirname(path)))
    _check(_libc.umount2(os.fsencode(os.path.basename(path)), _MNT_DETACH | _UMOUNT_NOFOLLOW), "umount(2)")


def _plain(field: bytes) -> bytes:
    """A field of mountinfo without its escapes; "#" has one, too."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)


def _check(result: int, step: str) -> None:
    if result != 0:
        raise Refused(f"{step}: {os.strerror(ctypes.get_errno())}")
