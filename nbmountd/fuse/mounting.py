"""Mounts and unmounts: from a directory to an initialised /dev/fuse descriptor, and back to a guarded empty directory.

It does not know who serves the descriptor. Everything here is synchronous; calls end within seconds because nothing asks
the file system that is mounted.

Ways to mount, in this order: the mount helper if one is named (borrow.py); mount(2) where this process has CAP_SYS_ADMIN
(root, an ambient capability, its own user namespace); the setuid helper fusermount3; a mount helper that happens to be there.
As root nothing is mounted over a directory that is not its owner's, so that a user who controls the path cannot have root put a
file system over /etc.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import re
import select
import shutil
import socket
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from nbmountd.errors import NbmountdError
from nbmountd.fuse import borrow
from nbmountd.fuse.agreement import ALL_FLAGS, Flag, InitAgreement, InitError, answer_init

DEVICE = "/dev/fuse"
TYPE = "fuse.nbmountd"
SOURCE_PREFIX = "nbmountd#"
HELPER = "fusermount3"
HELPER_TIMEOUT = 10.0

PASSED = "passed"
BORROWED = "mount-helper"

GUARDED = 0o555
OPEN = 0o755

_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_MNT_FORCE, _MNT_DETACH, _UMOUNT_NOFOLLOW = 1, 2, 8
_CAP_SYS_ADMIN = 1 << 21
_libc = ctypes.CDLL(None, use_errno=True)


class MountError(NbmountdError):
    """The directory cannot be mounted or unmounted. The message says why and what a person can do."""


@dataclass(frozen=True)
class MountPoint:
    """One line of /proc/self/mountinfo."""

    path: str
    type: str
    source: str
    device: str

    @property
    def is_ours(self) -> bool:
        return self.source.startswith(SOURCE_PREFIX) and self.type.startswith("fuse")

    def is_dead(self) -> bool:
        """Whether nobody holds the connection any more. Asks the mount, so use it on ours only: a hung one waits."""
        try:
            os.statvfs(self.path)
        except OSError as exc:
            return exc.errno == errno.ENOTCONN
        return False


READ_AHEAD = 2**20
"""Bytes; the largest READ that the kernel makes (256 pages)."""


@dataclass
class Mounted:
    """A live mount: the connection and the directory below it. `close()` when it is unmounted, or to let it die."""

    path: str
    fuse_fd: int
    agreement: InitAgreement
    way: str
    """"mount", "fusermount3", "mount-helper", or "passed" for a connection that somebody else mounted and will unmount."""

    @property
    def is_ours(self) -> bool:
        return self.way != PASSED

    def is_connected(self) -> bool:
        """Whether the connection lives: neither unmounted nor aborted. Asks the device and not the mount, so it cannot hang."""
        poller = select.poll()
        poller.register(self.fuse_fd, 0)
        return not poller.poll(0)  # POLLERR, fs/fuse/dev.c fuse_dev_poll

    def close(self) -> None:
        """Gives up the connection; with its last copy the kernel ends every waiting request. May be repeated."""
        if self.fuse_fd >= 0:
            os.close(self.fuse_fd)
            self.fuse_fd = -1


def mount(
    path: str,
    name: str,
    *,
    uid: int,
    gid: int,
    read_only: bool = False,
    allow_other: bool | None = None,
    only: Flag = ALL_FLAGS,
) -> Mounted:
    """Mounts at the absolute directory `path` for `uid`/`gid` and answers FUSE_INIT; the caller closes the result.

    The directory is made if it is missing and stays behind. `allow_other`: whether other users may enter (permissions are
    checked by the kernel in any case); None means yes when root mounts for somebody else, because root itself is an "other"
    then. A dead mount of ours at `path` is cleaned first. Raises MountError.
    """
    path = resolve(path)
    clean(path)
    _refuse_what_is_mounted(path)
    if allow_other is None:
        allow_other = _has_sys_admin() and uid != os.geteuid()
    directory = _open_directory(path, uid, gid)
    try:
        _refuse_what_is_in_it(path, directory)
        if stat.S_IMODE(os.fstat(directory).st_mode) == GUARDED:
            _set_mode(directory, OPEN)  # fusermount3 wants a directory that its caller may write to
        fuse_fd, way = _connect(path, directory, name, uid, gid, read_only=read_only, allow_other=allow_other)
        _set_mode(directory, GUARDED)
    finally:
        os.close(directory)
    try:
        agreement = answer_init(fuse_fd, only=only)
    except (InitError, OSError) as exc:
        os.close(fuse_fd)
        unmount(path)
        raise MountError(f"{path}: the hand-shake with the kernel failed: {exc}") from exc
    _read_ahead_in_large_pieces(path)
    return Mounted(path, fuse_fd, agreement, way)


def _read_ahead_in_large_pieces(path: str) -> None:
    """A program that reads on and on gets 1 MiB with each request, and not the 128 KiB that the kernel starts every file
    system with: FUSE_INIT can only lower that, sysfs raises it (Documentation/ABI/testing/sysfs-class-bdi).

    Only root of the host may; scattered reads ask for what they want in either case.
    """
    mounted = find(path)
    if mounted is not None:
        with contextlib.suppress(OSError):
            Path(f"/sys/class/bdi/{mounted.device}/read_ahead_kb").write_text(str(READ_AHEAD // 1024))


def adopt(path: str, fuse_fd: int, *, only: Flag = ALL_FLAGS) -> Mounted:
    """Takes a connection that somebody else has mounted, at `path` as far as we know; owns `fuse_fd`. Raises MountError."""
    try:
        agreement = answer_init(fuse_fd, only=only)
    except (InitError, OSError) as exc:
        os.close(fuse_fd)
        raise MountError(f"{path}: the descriptor that was passed in is no new FUSE connection: {exc}") from exc
    return Mounted(path, fuse_fd, agreement, PASSED)


def unmount(path: str) -> None:
    """Takes the topmost mount of ours at `path` out of the tree; open files go on until they are closed.

    Nothing to do is fine. The directory stays, guarded. Raises MountError.
    """
    mounted = find(path)
    if mounted is None or not mounted.is_ours:
        return
    if _has_sys_admin():
        if _libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0:
            return
        code = ctypes.get_errno()
        if code == errno.EINVAL:  # somebody else was faster
            return
        reason = os.strerror(code)
    else:
        reason = ""
    if (helper := borrow.helper_socket()) is not None:
        try:
            borrow.unmount(helper, path)
            return
        except borrow.BorrowError as exc:
            reason = str(exc)
            if find(path) is None:
                return
    if shutil.which(HELPER) is None:
        raise MountError(f"{path}: cannot unmount: {reason or HELPER + ' is not installed'}; run `umount -l {path}` as root")
    done = _run_helper(["-u", "-z", "--", path])
    if done.returncode and find(path) is not None:
        raise MountError(f"{path}: cannot unmount: {_helper_text(done)}; run `umount -l {path}` as root")


def abort(path: str) -> None:
    """Ends the connection of our mount at `path`: all its requests fail, whoever holds the descriptor. Does what it may.

    The dead mount stays where it is.
    """
    mounted = find(path)
    if mounted is None or not mounted.is_ours:
        return
    if _has_sys_admin():
        with contextlib.suppress(OSError):
            busy = os.open(path, os.O_PATH | os.O_CLOEXEC)  # asks the mount nothing, and keeps it from being unmounted
            _libc.umount2(os.fsencode(path), _MNT_FORCE | _UMOUNT_NOFOLLOW)  # fuse_umount_begin aborts, busy or not
            os.close(busy)
    with contextlib.suppress(OSError):  # needs fusectl to be mounted; the file belongs to the mount's user
        (Path("/sys/fs/fuse/connections") / mounted.device.partition(":")[2] / "abort").write_text("1")


def clean(path: str) -> bool:
    """Removes dead mounts of ours from `path`; True if there were any. Raises MountError if one does not go."""
    cleaned = False
    while (mounted := find(path)) is not None and mounted.is_ours and mounted.is_dead():
        unmount(path)
        cleaned = True
    return cleaned


def find(path: str) -> MountPoint | None:
    """The topmost mount at exactly `path`, or None. Does not touch the file system, so a dead or hung mount is no danger."""
    return next((entry for entry in reversed(mounts()) if entry.path == path), None)


def mounts() -> list[MountPoint]:
    """All mounts that this process sees, lowest first (proc(5), mountinfo: fields 5 and, behind the dash, type and source)."""
    entries = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        left, _, right = line.partition(b" - ")
        fields, behind = left.split(b" "), right.split(b" ")
        entries.append(MountPoint(_unescape(fields[4]), _unescape(behind[0]), _unescape(behind[1]), _unescape(fields[2])))
    return entries


# --- what speaks against it --------------------------------------------------------------------------------------------


def resolve(path: str) -> str:
    """The path without links above its last part. That part must not be a link."""
    if not path.startswith("/") or not os.path.normpath(path).strip("/"):
        raise MountError(f"{path!r} cannot be a mount point: an absolute directory below / is needed")
    parent, last = os.path.split(os.path.normpath(path))
    return os.path.join(os.path.realpath(parent), last)


def _refuse_what_is_mounted(path: str) -> None:
    above = [entry for entry in mounts() if entry.is_ours and path.startswith(entry.path + "/")]
    if above:
        raise MountError(f"{path} lies inside {above[-1].path}, which is a mount of nbmountd; choose a path outside of it")
    there = find(path)
    if there is None:
        return
    if there.is_ours:
        raise MountError(f"{path} is served by another nbmountd; stop that one first, or `umount -l {path}` if it is stuck")
    raise MountError(f"{path} is the mount point of {there.source} ({there.type}); unmount that, or choose another path")


def _open_directory(path: str, uid: int, gid: int) -> int:
    """A descriptor of the directory below the mount, made if it is missing, with the rights of its owner."""
    if not os.path.lexists(path):
        _make_directory(path, uid, gid)
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in (errno.ENOTDIR, errno.ELOOP):
            what = "a symbolic link" if os.path.islink(path) else "not a directory"
            raise MountError(f"{path} is {what}; move it aside (`mv {path} {path}.local`) and mount again") from exc
        raise MountError(f"{path}: {exc.strerror}; nbmountd must be able to open the directory it mounts at") from exc
    owner = os.fstat(directory).st_uid
    if os.geteuid() == 0 and owner != uid:
        os.close(directory)
        raise MountError(
            f"{path} belongs to uid {owner} and not to the mount's owner, uid {uid}; `chown {uid}:{gid} {path}`"
        )
    return directory


def _make_directory(path: str, uid: int, gid: int) -> None:
    """Makes it as its owner would, so that root follows no link into places where that user may not write."""
    if os.geteuid() == uid:
        try:
            os.makedirs(path, OPEN, exist_ok=True)
        except OSError as exc:
            raise MountError(f"{path} cannot be made: {exc.strerror}; make it, or choose another path") from exc
        return
    made = subprocess.run(
        ["mkdir", "-p", "-m", "755", "--", path], user=uid, group=gid, extra_groups=[], cwd="/", env=_clean_environment(),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=HELPER_TIMEOUT, check=False,
    )  # fmt: skip
    if made.returncode:
        raise MountError(
            f"{path} cannot be made by uid {uid}: {made.stderr.decode(errors='replace').strip()}; "
            f"make it as root and `chown {uid}:{gid} {path}`"
        )


def _refuse_what_is_in_it(path: str, directory: int) -> None:
    names = os.listdir(directory)
    if names:
        shown = ", ".join([*(repr(name) for name in sorted(names)[:3]), *(["..."] if len(names) > 3 else [])])
        raise MountError(
            f"{path} is not empty ({len(names)} entries: {shown}) and nbmountd hides no files; "
            f"move them aside (`mv {path} {path}.local && mkdir {path}`), mount again, and copy them in"
        )


def _set_mode(directory: int, mode: int) -> None:
    """The guard is a courtesy: on a directory of somebody else's it cannot be set, and mounting goes on without it."""
    with contextlib.suppress(PermissionError):
        os.fchmod(directory, mode)


# --- the ways ----------------------------------------------------------------------------------------------------------


def _connect(
    path: str, directory: int, name: str, uid: int, gid: int, *, read_only: bool, allow_other: bool
) -> tuple[int, str]:
    """The descriptor and the way, by the first way that is open."""
    source = SOURCE_PREFIX + name
    helper = borrow.helper_socket()
    if helper is None or not borrow.is_named():
        if _has_sys_admin():
            fuse_fd = _mount_directly(path, directory, source, uid, gid, read_only=read_only, allow_other=allow_other)
            if fuse_fd is not None:
                return fuse_fd, "mount"
        try:
            return _mount_by_helper(path, source, read_only=read_only, allow_other=allow_other), HELPER
        except MountError:
            if helper is None:
                raise
    try:
        return borrow.mount(helper, path, name, read_only=read_only), BORROWED
    except borrow.BorrowError as exc:
        raise MountError(f"{path}: {exc}") from exc


def _mount_directly(
    path: str, directory: int, source: str, uid: int, gid: int, *, read_only: bool, allow_other: bool
) -> int | None:
    """The descriptor, by mount(2); None where the kernel refuses although we have the capability, and the helper may do."""
    try:
        fuse_fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise MountError(f"{path}: {_why_no_device(exc)}") from exc
    options = f"fd={fuse_fd},rootmode={stat.S_IFDIR:o},user_id={uid},group_id={gid},default_permissions"
    if allow_other:
        options += ",allow_other"
    flags = _MS_NOSUID | _MS_NODEV | (_MS_RDONLY if read_only else 0)
    target = f"/proc/self/fd/{directory}".encode()  # the very directory that was checked, whatever the path is by now
    if _libc.mount(os.fsencode(source), target, TYPE.encode(), flags, options.encode()) == 0:
        return fuse_fd
    code = ctypes.get_errno()
    os.close(fuse_fd)
    if code == errno.EPERM and os.geteuid() != 0 and shutil.which(HELPER) is not None:
        return None
    if code == errno.ENODEV:
        raise MountError(f"{path}: the kernel has no FUSE; load it on the host with `modprobe fuse`")
    raise MountError(f"{path}: mount(2): {os.strerror(code)}{_hint_for(code)}")


def _mount_by_helper(path: str, source: str, *, read_only: bool, allow_other: bool) -> int:
    """The descriptor, by fusermount3, which sends it over a socket that the environment names (libfuse lib/mount.c)."""
    if shutil.which(HELPER) is None:
        raise MountError(f"{path}: neither CAP_SYS_ADMIN nor {HELPER}; install the package fuse3, or start nbmountd as root")
    escaped = re.sub(r"([\\,])", r"\\\1", source)
    options = ["ro" if read_only else "rw", "nosuid", "nodev", "default_permissions", "subtype=nbmountd", f"fsname={escaped}"]
    if allow_other:
        options.append("allow_other")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            done = _run_helper(["-o", ",".join(options), "--", path], commfd=theirs.fileno())
        if done.returncode:
            raise MountError(f"{path}: {_explain_helper(_helper_text(done))}")
        ours.settimeout(HELPER_TIMEOUT)
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(array.array("i").itemsize))
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fuse_fd: int = array.array("i", content)[0]
            os.set_inheritable(fuse_fd, False)
            return fuse_fd
    raise MountError(f"{path}: {HELPER} said nothing and sent no descriptor")


def _run_helper(arguments: list[str], commfd: int | None = None) -> subprocess.CompletedProcess[bytes]:
    environment = _clean_environment()
    if commfd is not None:
        environment["_FUSE_COMMFD"] = str(commfd)
    try:
        return subprocess.run(
            [HELPER, *arguments], env=environment, pass_fds=() if commfd is None else (commfd,), cwd="/",
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=HELPER_TIMEOUT, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise MountError(f"{HELPER} cannot be run: {exc}") from exc


def _clean_environment() -> dict[str, str]:
    """For programs that need nothing of ours, and no credential."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def _helper_text(done: subprocess.CompletedProcess[bytes]) -> str:
    return done.stderr.decode(errors="replace").strip().removeprefix(HELPER + ": ") or f"{HELPER} ended with {done.returncode}"


def _explain_helper(text: str) -> str:
    if DEVICE in text or "device not found" in text:
        return f"{text}; {_DEVICE_HINT}"
    if "Operation not permitted" in text:
        return text + _hint_for(errno.EPERM)
    if "user_allow_other" in text:
        return f"{text}; have root write user_allow_other into /etc/fuse.conf, or leave allow_other out"
    if "could not determine username" in text:
        return f"{text}; {HELPER} wants a line for uid {os.getuid()} in /etc/passwd (libfuse util/fusermount.c, get_user_name)"
    if "no write access" in text:
        return f"{text}; the directory must belong to the user who mounts"
    return text


_DEVICE_HINT = f"the container needs {DEVICE} (`--device {DEVICE}`, or a device plugin) readable for this user"


def _why_no_device(exc: OSError) -> str:
    return f"{DEVICE}: {exc.strerror}; {_DEVICE_HINT}"


def _hint_for(code: int) -> str:
    if code != errno.EPERM:
        return ""
    if _status("NoNewPrivs") == "1":
        return (
            "; no_new_privs is set (allowPrivilegeEscalation: false), which takes setuid programs their rights: start"
            " nbmountd as root, allow escalation, or use `nbmountd exec --userns`"
        )
    return "; the container needs CAP_SYS_ADMIN for mounting (`--cap-add SYS_ADMIN`), or use `nbmountd exec --userns`"


def _has_sys_admin() -> bool:
    return bool(int(_status("CapEff") or "0", 16) & _CAP_SYS_ADMIN)


def _status(field: str) -> str:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return line.partition(":")[2].strip()
    return ""


def _unescape(field: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field))
