"""Translates between the kernel's requests and the file system's verbs, and nothing else.

Bytes become `str` only here (surrogateescape), nodes become attributes in one helper, and the lookup count goes up in one
helper, before the answer is sent. Every handler runs in the guard: it has a deadline, an error becomes an errno, and what is
no error of ours becomes EIO with a traceback in the log (pyfuse3 ends its loop on anything but FUSEError).

A file handle is `inode * 2 + (1 if open for writing)`, below a serial number: the next worker can read it, whoever gave it
out. The serial number tells the handles of one file apart, so that each hears of a write error once.
"""

from __future__ import annotations

import errno
import math
import os
import secrets
import stat
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import pyfuse3
import trio

from nbmountd.disk.database import Node
from nbmountd.errors import Exists, NotFound, RemoteTimeout
from nbmountd.fs.filesystem import FileSystem, SetAttributes
from nbmountd.fuse.errno_map import errno_of, is_expected
from nbmountd.log import get_logger
from nbmountd.model import ROOT_INODE, Kind

FILE_BLOCK_SIZE = 128 * 2**10
"""st_blksize of files: also the buffer of Python's open(); larger would make every small read a large one."""
DIRECTORY_BLOCK_SIZE = 2**20
"""st_blksize of directories sizes glibc's getdents buffer, and with it READDIRPLUS: 17 requests for 100,000 entries."""
READDIR_BATCH = 500
GRACE = 5.0
"""Seconds that a handler has beyond the mount's deadline for remote work, before its caller is let go all the same."""

_TYPES = {
    Kind.FILE: stat.S_IFREG,
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.FIFO: stat.S_IFIFO,
    Kind.SOCKET: stat.S_IFSOCK,
}
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_SERIAL_SHIFT = 44
_SERIALS = 2**20
_BY_HANDLE = frozenset(("read", "write", "flush", "fsync", "release"))
"""Operations whose first argument is a file handle."""
_log = get_logger(__name__)

Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])


def _guarded(handler: Handler) -> Handler:
    operation = handler.__name__

    @wraps(handler)
    async def guard(self: Operations, *arguments: Any) -> Any:
        self.requests[operation] += 1
        self.fs.nodes.held.answered()
        self._taken += 1
        taken = self._taken
        self.in_flight[taken] = (operation, arguments, time.monotonic())
        try:
            with trio.fail_after(self._deadline_of(operation)):
                return await handler(self, *arguments)
        except pyfuse3.FUSEError:
            raise
        except trio.TooSlowError:
            exc: Exception = RemoteTimeout(f"{operation} did not end within its deadline")
        except Exception as error:
            exc = error
            if not is_expected(exc):  # inside, where the traceback still is
                _log.exception("bug", operation=operation, node=arguments[0] if arguments else None)
        finally:
            del self.in_flight[taken]
        code = errno_of(exc)
        if code not in (errno.ENOENT, errno.EEXIST, errno.ENODATA, errno.ENOTEMPTY) and is_expected(exc):
            _log.debug("refused", operation=operation, node=arguments[0], errno=errno.errorcode.get(code, code), cause=exc)
        raise pyfuse3.FUSEError(code) from None

    return cast(Handler, guard)


def _once(handler: Handler) -> Handler:
    """For requests that mean something else when they are made again: what was carried out is only answered again."""
    operation = handler.__name__

    @wraps(handler)
    async def once(self: Operations, *arguments: Any) -> Any:
        *what, ctx = arguments
        request = ascii((operation, ctx.pid, *what))
        ino = self.fs.repeats.carried_out(request)
        if ino is not None:
            _log.info("answering again what an earlier worker had done", operation=operation)
            return self._answer_again(operation, ino)
        with self.fs.repeats.asked(request):
            return await handler(self, *arguments)

    return cast(Handler, once)


class Operations(pyfuse3.Operations):  # type: ignore[misc]
    """The handlers of one mount."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, filesystem: FileSystem, *, deadline: float) -> None:
        super().__init__()
        self.fs = filesystem
        self.deadline = deadline + GRACE
        self.requests: Counter[str] = Counter()
        """Requests served, by operation."""
        self.in_flight: dict[int, tuple[str, tuple[Any, ...], float]] = {}
        """Requests taken and not answered: operation, arguments, and since when (time.monotonic)."""
        self._taken = 0
        self._serial = secrets.randbelow(_SERIALS)  # the handles of an earlier worker may still be open
        self._heard: dict[int, tuple[int, int]] = {}
        """Handle open for writing -> the newest write error that it has heard of at an fsync, and at all; or that is older than
        the handle."""

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _deadline_of(self, operation: str) -> float:
        """Seconds. A read of a remote that sends whole files only goes on while bytes come: reads.py says when they do not."""
        patient = operation == "read" and not self.fs.nodes.capabilities.ranged_reads
        return math.inf if patient else self.deadline

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = node.ino
        attributes.st_mode = _TYPES[node.kind] | node.mode
        attributes.st_nlink = 0 if node.removed else 1 + self.fs.nodes.aliases.get(node.ino, 0)
        attributes.st_uid = self.fs.uid
        attributes.st_gid = self.fs.gid
        attributes.st_rdev = node.rdev
        attributes.st_size = node.size
        attributes.st_blocks = self.fs.blocks(node)
        attributes.st_blksize = DIRECTORY_BLOCK_SIZE if node.kind is Kind.DIRECTORY else FILE_BLOCK_SIZE
        attributes.st_atime_ns = self.fs.atime_ns(node)
        attributes.st_mtime_ns = node.mtime_ns
        attributes.st_ctime_ns = node.ctime_ns
        attributes.entry_timeout = attributes.attr_timeout = self.fs.refresh.kernel_timeout
        return attributes

    def _entry(self, node: Node) -> pyfuse3.EntryAttributes:
        """Attributes for an answer that makes the kernel remember the number."""
        self.fs.nodes.looked_up(node.ino)
        return self._attributes(node)

    def _inode(self, handle: int) -> int:
        """The inode of an open file; a handle of an earlier worker is taken over at its first use."""
        ino, writing = _inode_of(handle), bool(handle & 1)
        if not self.fs.is_open(ino, writing=writing):
            self.fs.adopt_handle(ino, writing=writing)
        return ino

    def _handle(self, ino: int, *, writing: bool) -> int:
        """A new handle."""
        self._serial = (self._serial + 1) % _SERIALS
        handle = self._serial << _SERIAL_SHIFT | ino * 2 + writing
        if writing:
            self._heard[handle] = self.fs.write_errors, self.fs.write_errors
        return handle

    def _tell_write_error(self, handle: int, *, at_fsync: bool) -> None:
        """Raises what the remote said to the file's bytes after they were written, once for each handle that wrote.

        A flush does not count against a later fsync: it may have been made for a child of the program, which closes all
        that it has inherited and looks at no result.
        """
        if not handle & 1:
            return
        by_fsync, at_all = self._heard.get(handle, (0, 0))
        error = self.fs.write_error_since(_inode_of(handle), by_fsync if at_fsync else at_all)
        if error is not None:
            self._heard[handle] = (error[0] if at_fsync else by_fsync, error[0])
            raise error[1]

    def describe_in_flight(self) -> list[tuple[str, int, str, float]]:
        """(operation, inode, name or nothing, seconds) of what was taken and not answered, longest first."""
        now, found = time.monotonic(), []
        for operation, arguments, since in list(self.in_flight.values()):
            inode = next((value for value in arguments if isinstance(value, int)), ROOT_INODE)
            name = next((os.fsdecode(value) for value in arguments[:2] if isinstance(value, bytes)), "")
            found.append((operation, _inode_of(inode) if operation in _BY_HANDLE else inode, name, now - since))
        return found

    def _answer_again(self, operation: str, ino: int) -> Any:
        if not ino:
            return None
        node = self.fs.nodes.get(ino)
        if operation != "create":
            return self._entry(node)
        self.fs.open(ino, writing=True, truncate=False)
        return pyfuse3.FileInfo(fh=self._handle(ino, writing=True), keep_cache=True), self._entry(node)

    # -- names --------------------------------------------------------------------------------------------------------

    @_guarded
    async def lookup(self, parent: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        try:
            return self._entry(await self.fs.lookup(parent, os.fsdecode(name)))
        except NotFound:
            absent = pyfuse3.EntryAttributes()  # number 0: the kernel may remember that there is no such name
            absent.st_ino = 0
            absent.entry_timeout = self.fs.refresh.kernel_timeout
            return absent

    @_guarded
    async def forget(self, forgotten: Sequence[tuple[int, int]]) -> None:
        for ino, count in forgotten:
            self.fs.nodes.forgotten(ino, count)

    @_guarded
    async def opendir(self, ino: int, ctx: Any) -> int:
        await self.fs.open_directory(ino)
        return ino

    @_guarded
    async def readdir(self, handle: int, after: int, token: Any) -> None:
        """The place behind an entry is its inode number + 1; 1 and 2 are the places behind the dots, which count no lookup."""
        directory = self.fs.getattr(handle)
        for place, name, ino in ((1, b".", handle), (2, b"..", directory.parent or handle)):
            if after < place:
                if not pyfuse3.readdir_reply(token, name, self._attributes(self.fs.getattr(ino)), place):
                    return
                after = place
        after -= 1
        while True:
            nodes = self.fs.read_directory(handle, after, READDIR_BATCH)
            for node in nodes:
                owner = self.fs.nodes.owner(node)
                self.fs.nodes.looked_up(owner.ino)
                if not pyfuse3.readdir_reply(token, os.fsencode(node.name), self._attributes(owner), node.ino + 1):
                    self.fs.nodes.forgotten(owner.ino, 1)
                    return
                after = node.ino
            if len(nodes) < READDIR_BATCH:
                return

    @_guarded
    async def releasedir(self, handle: int) -> None:
        self.fs.close_directory(handle)

    @_guarded
    async def fsyncdir(self, handle: int, datasync: bool) -> None:
        await self.fs.fsync(handle)

    # -- making, removing, renaming -----------------------------------------------------------------------------------

    @_guarded
    @_once
    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._entry(await self.fs.make_directory(parent, os.fsdecode(name), mode))

    @_guarded
    @_once
    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._entry(await self.fs.make_special(parent, os.fsdecode(name), mode, rdev))

    @_guarded
    @_once
    async def symlink(self, parent: int, name: bytes, target: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._entry(await self.fs.make_symlink(parent, os.fsdecode(name), os.fsdecode(target)))

    @_guarded
    @_once
    async def link(self, ino: int, parent: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._entry(await self.fs.link(ino, parent, os.fsdecode(name)))

    @_guarded
    async def readlink(self, ino: int, ctx: Any) -> bytes:
        return os.fsencode(self.fs.readlink(ino))

    @_guarded
    @_once
    async def unlink(self, parent: int, name: bytes, ctx: Any) -> None:
        await self.fs.unlink(parent, os.fsdecode(name))

    @_guarded
    @_once
    async def rmdir(self, parent: int, name: bytes, ctx: Any) -> None:
        await self.fs.remove_directory(parent, os.fsdecode(name))

    @_guarded
    @_once
    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: Any) -> None:
        if flags & ~(_RENAME_NOREPLACE | _RENAME_EXCHANGE):
            raise pyfuse3.FUSEError(errno.EINVAL)
        await self.fs.rename(
            parent, os.fsdecode(name), new_parent, os.fsdecode(new_name),
            replace=not flags & _RENAME_NOREPLACE, exchange=bool(flags & _RENAME_EXCHANGE),
        )  # fmt: skip

    # -- attributes ---------------------------------------------------------------------------------------------------

    @_guarded
    async def getattr(self, ino: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        return self._attributes(self.fs.getattr(ino))

    @_guarded
    async def setattr(
        self, ino: int, new: pyfuse3.EntryAttributes, fields: Any, handle: int | None, ctx: Any
    ) -> pyfuse3.EntryAttributes:
        wanted = SetAttributes(
            mode=stat.S_IMODE(new.st_mode) if fields.update_mode else None,
            uid=new.st_uid if fields.update_uid else None,
            gid=new.st_gid if fields.update_gid else None,
            size=new.st_size if fields.update_size else None,
            atime_ns=new.st_atime_ns if fields.update_atime else None,
            mtime_ns=new.st_mtime_ns if fields.update_mtime else None,
        )
        return self._attributes(await self.fs.setattr(ino, wanted))

    @_guarded
    async def getxattr(self, ino: int, name: bytes, ctx: Any) -> bytes:
        return await self.fs.read_xattr(ino, os.fsdecode(name))

    @_guarded
    async def listxattr(self, ino: int, ctx: Any) -> list[bytes]:
        return [os.fsencode(name) for name in self.fs.list_xattrs(ino)]

    @_guarded
    async def setxattr(self, ino: int, name: bytes, value: bytes, ctx: Any) -> None:
        self.fs.set_xattr(ino, os.fsdecode(name), bytes(value))

    @_guarded
    @_once
    async def removexattr(self, ino: int, name: bytes, ctx: Any) -> None:
        self.fs.remove_xattr(ino, os.fsdecode(name))

    @_guarded
    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        return self._statfs()

    def _statfs(self) -> pyfuse3.StatvfsData:
        block = 4096
        used, available = self.fs.quota.used, self.fs.quota.available
        if available is None:
            available = 2**50  # no limit known: a number that no program takes for "full"
        left = self.fs.budget.quota_available
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = block
        answer.f_blocks = ((used or 0) + available) // block
        answer.f_bfree = answer.f_bavail = (available if left is None else min(left, available)) // block
        answer.f_files = answer.f_ffree = answer.f_favail = 2**32
        answer.f_namemax = 255
        return answer

    # -- files --------------------------------------------------------------------------------------------------------

    @_guarded
    async def open(self, ino: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        self.fs.open(ino, writing=writing, truncate=bool(flags & os.O_TRUNC))
        return pyfuse3.FileInfo(fh=self._handle(ino, writing=writing), keep_cache=True)

    @_guarded
    @_once
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: Any
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        try:
            node = await self.fs.create(parent, os.fsdecode(name), mode)
        except Exists:
            if flags & os.O_EXCL:
                raise
            node = await self.fs.lookup(parent, os.fsdecode(name))
            self.fs.open(node.ino, writing=True, truncate=bool(flags & os.O_TRUNC))
        return pyfuse3.FileInfo(fh=self._handle(node.ino, writing=True), keep_cache=True), self._entry(node)

    @_guarded
    async def read(self, handle: int, offset: int, size: int) -> bytes | memoryview:
        return await self.fs.read(self._inode(handle), offset, size)

    @_guarded
    async def write(self, handle: int, offset: int, data: bytes) -> int:
        return self.fs.write(self._inode(handle), offset, data)

    @_guarded
    async def flush(self, handle: int) -> None:
        self._tell_write_error(handle, at_fsync=False)
        await self.fs.flush(_inode_of(handle))

    @_guarded
    async def fsync(self, handle: int, datasync: bool) -> None:
        await self.fs.fsync(self._inode(handle))
        self._tell_write_error(handle, at_fsync=True)

    @_guarded
    async def release(self, handle: int) -> None:
        self._heard.pop(handle, None)
        self.fs.close_file(_inode_of(handle), writing=bool(handle & 1))


def _inode_of(handle: int) -> int:
    return (handle & (1 << _SERIAL_SHIFT) - 1) >> 1
