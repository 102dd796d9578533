"""Blocking calls on names below a directory descriptor, none of which ever follows a symlink on the way.

It knows nothing of trio or of mounts. What a folder holds is written by others, who may swap a directory for a symlink at
any moment: so every path is walked name by name with O_NOFOLLOW, and the last step goes through the descriptor of the
parent. OSError becomes RemoteError in `translated`, by one table.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from nbmountd.errors import (
    NameRefused,
    RemoteDenied,
    RemoteError,
    RemoteExists,
    RemoteFull,
    RemoteLocked,
    RemoteNotFound,
    RemoteTooLarge,
    RemoteUnavailable,
    RemoteUnsupported,
)
from nbmountd.model import Version

ERRORS: dict[int, type[RemoteError]] = {
    errno.ENOENT: RemoteNotFound,
    errno.ENOTDIR: RemoteNotFound,
    errno.ELOOP: RemoteNotFound,  # a symlink where a directory was: for us there is nothing below it
    errno.EEXIST: RemoteExists,
    errno.ENOTEMPTY: RemoteExists,
    errno.EISDIR: RemoteExists,
    errno.EACCES: RemoteDenied,
    errno.EPERM: RemoteDenied,
    errno.EROFS: RemoteDenied,
    errno.EKEYEXPIRED: RemoteDenied,  # Kerberos or AFS credentials, which are not ours to renew
    errno.ENOSPC: RemoteFull,
    errno.EDQUOT: RemoteFull,
    errno.EFBIG: RemoteTooLarge,
    errno.ENAMETOOLONG: NameRefused,
    errno.EILSEQ: NameRefused,
    errno.EINVAL: NameRefused,  # what vfat, cifs and ntfs say to names such as "a?b"
    errno.EOPNOTSUPP: RemoteUnsupported,
    errno.ENOSYS: RemoteUnsupported,
    errno.EXDEV: RemoteUnsupported,
    errno.EMLINK: RemoteUnsupported,
    errno.EBUSY: RemoteLocked,
    errno.ETXTBSY: RemoteLocked,
}
"""What an errno says about the remote. All others (EIO, ESTALE, ENOTCONN, ETIMEDOUT, ...): RemoteUnavailable."""

COPY_CHUNK = 8 * 1024 * 1024
_FICLONE = 0x40049409  # linux/fs.h
_RENAME_NOREPLACE = 1  # linux/fs.h
_CLOCK_REALTIME_COARSE = 5  # linux/time.h: the clock that stamps files
_SETTLE_NS = 20_000_000
_LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def translated(what: object, *, in_doubt: bool = False) -> Iterator[None]:
    """OSErrors of the body come out as RemoteErrors about `what`; `in_doubt` marks those that may hide a success."""
    try:
        yield
    except OSError as error:
        kind = ERRORS.get(error.errno or 0, RemoteUnavailable)
        text = f"{what}: {os.strerror(error.errno) if error.errno else error}"
        raise kind(text, in_doubt=in_doubt and kind is RemoteUnavailable) from error


def open_file(name: str, flags: int, below: int, mode: int = 0o600) -> int:
    """A descriptor, to be closed by the caller. Never follows a symlink at `name`."""
    return os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode, dir_fd=below)


@contextmanager
def opened(name: str, flags: int, below: int) -> Iterator[int]:
    fd = open_file(name, flags, below)
    try:
        yield fd
    finally:
        os.close(fd)


def open_directory(root: int, path: tuple[str, ...]) -> int:
    """The directory at `path` below `root`, open for reading, to be closed by the caller. No part may be a symlink."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(".", flags, dir_fd=root)
    for name in path:
        try:
            check_name(name)
            below = os.open(name, flags, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
    return fd


def check_name(name: str) -> None:
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise NameRefused(f"{name!r} is no name")


def version_of(status: os.stat_result) -> Version:
    """ctime is in it because a program may set mtime back; inode and size because clocks of servers are coarse."""
    return Version(f"{status.st_ino:x}.{status.st_mtime_ns:x}.{status.st_size:x}.{status.st_ctime_ns:x}")


def settle(status: os.stat_result) -> bool:
    """Waits until a further change would get another ctime than `status` has; says whether it had to.

    The kernel stamps files with a clock of 1-10 ms steps, so a file just written may be written again with no trace in
    its times. A time of the future (another machine's clock) is not waited for.
    """
    age = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) - status.st_ctime_ns
    if age > 0 or age < -_SETTLE_NS:
        return False
    deadline = time.monotonic_ns() + _SETTLE_NS
    while time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) <= status.st_ctime_ns and time.monotonic_ns() < deadline:
        time.sleep(0.001)
    return True


def settled_status(name: str, below: int) -> os.stat_result:
    status = os.stat(name, dir_fd=below, follow_symlinks=False)
    if settle(status):
        status = os.stat(name, dir_fd=below, follow_symlinks=False)
    return status


def rename_to_free_name(source: str, source_fd: int, target: str, target_fd: int) -> None:
    """Renames in one step unless `target` is taken (FileExistsError). File systems without the flag: looks first."""
    result = _LIBC.renameat2(
        source_fd, os.fsencode(source), target_fd, os.fsencode(target), ctypes.c_uint(_RENAME_NOREPLACE)
    )
    if result == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise OSError(code, os.strerror(code), target)
    with suppress(FileNotFoundError):
        os.stat(target, dir_fd=target_fd, follow_symlinks=False)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
    os.rename(source, target, src_dir_fd=source_fd, dst_dir_fd=target_fd)


def write_all(fd: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def copy(source: int, target: int, size: int, check: Callable[[], None]) -> None:
    """Gives the empty file `target` the first `size` bytes of `source`: shared blocks, a copy by the server, or by us.

    `check` is called between parts and may raise to stop.
    """
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return
    except OSError:
        pass  # another file system, or one without shared blocks
    in_kernel = True
    done = 0
    while done < size:
        check()
        count = min(COPY_CHUNK, size - done)
        if in_kernel:
            try:
                copied = os.copy_file_range(source, target, count, done, done)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM):
                    raise
                in_kernel = False
                continue
        else:
            part = os.pread(source, count, done)
            write_all(target, part, done)
            copied = len(part)
        if copied == 0:
            return  # the source became shorter; the caller compares versions afterwards
        done += copied


def read_xattrs(path: str) -> dict[str, bytes] | None:
    """The user.* attributes of the object at `path` itself; None where there is no such thing."""
    found: dict[str, bytes] = {}
    try:
        for name in os.listxattr(path, follow_symlinks=False):
            if name.startswith("user."):
                with suppress(OSError):  # gone in between, or not readable by us
                    found[name] = os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return None
    return found


def write_xattrs(path: str, wanted: Mapping[str, bytes]) -> None:
    """Makes the user.* attributes of the object that `path` leads to exactly `wanted`."""
    present = {name for name in os.listxattr(path) if name.startswith("user.")}
    for name in present - set(wanted):
        os.removexattr(path, name)
    for name, content in wanted.items():
        if name.startswith("user."):
            os.setxattr(path, name, content)


def is_shown(status: os.stat_result) -> bool:
    """Whether it is a file, a directory or a symlink. FIFOs, sockets and devices mean nothing on another machine."""
    return stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode)
