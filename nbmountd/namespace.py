"""A user and mount namespace in which an ordinary user may mount, with nothing but `/dev/fuse` (start mode D).

What is mounted is seen only by processes started inside, so the notebook server has to be started there as well. The uid stays
what it is. It knows nothing of mounts or daemons. Facts: user_namespaces(7), capabilities(7); FUSE can be mounted in a user
namespace since Linux 4.18.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from nbmountd.errors import NbmountdError

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_CAP_SYS_ADMIN = 21
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 2, 4
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceError(NbmountdError):
    """The kernel or the container's profile does not allow it; the text says which step."""


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def enter() -> None:
    """Puts this process, which must have one thread, into new namespaces. Raises NamespaceError."""
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS), "unshare (user namespaces may be switched off here)")
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    except OSError as exc:
        raise NamespaceError(f"the user namespace takes no ids: {exc.strerror}") from exc
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "making the mounts private")


def enter_mounts_only() -> None:
    """Puts this process, which must have CAP_SYS_ADMIN, into a new mount namespace. Raises NamespaceError."""
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "making the mounts private")


def try_to_mount(device: Path) -> None:
    """Mounts FUSE over a directory that everybody has; only for a process in a namespace of its own that ends then."""
    try:
        fuse_fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise NamespaceError(f"{device}: {exc.strerror}") from exc
    options = f"fd={fuse_fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
    _check(_libc.mount(b"nbmountd#trial", b"/tmp", b"fuse.nbmountd", 0, options.encode()), "mount(2) of FUSE")


def keep_mount_right() -> None:
    """Lets the next program that this process executes mount (CAP_SYS_ADMIN of the namespace, as an ambient capability)."""
    header, data = _Header(_CAPABILITY_VERSION_3, 0), (_Data * 2)()
    _check(_libc.capget(ctypes.byref(header), data), "capget")
    data[0].inheritable |= data[0].permitted & (1 << _CAP_SYS_ADMIN)
    _check(_libc.capset(ctypes.byref(header), data), "capset")
    _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_SYS_ADMIN, 0, 0), "raising CAP_SYS_ADMIN")


def give_up_rights() -> None:
    """Leaves the next program that this process executes without any capability."""
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)


def _check(result: int, step: str) -> None:
    if result != 0:
        raise NamespaceError(f"{step}: {os.strerror(ctypes.get_errno())}")
