"""A folder that is already there (a shared or network file system) as a remote.

It knows nothing of who else writes to the folder, and expects them to. A file is replaced by writing a hidden temporary
one beside it, syncing it, comparing the version once more and renaming; so a cut upload, whole or in ranges, never harms
what is there (but hard links to the old file, and programs that have it open, keep the old one). The comparison and the
rename are two calls: another program that writes in the microseconds between is not seen, hence
`conditional_writes=False`. New names are taken in one step, which fails if they are taken.

It gives no ids: an inode number is given to the next new file at once (ext4), which would then look like a move.

All calls run in worker threads. `stat`, `list` and `quota` can be abandoned in one when cancelled. The others stop at the
next part of up to 1 MiB; where the kernel itself hangs (a dead hard-mounted NFS server) they wait for it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

import trio

from nbmountd.backends import beneath
from nbmountd.backends.base import Body, Change, Piece, Sink, Ticket, heard
from nbmountd.config import DirectoryOptions
from nbmountd.errors import (
    NameRefused,
    ParentMissing,
    RemoteDenied,
    RemoteError,
    RemoteExists,
    RemoteNotFound,
    RemoteProtocolError,
    RemoteUnavailable,
    RemoteUnsupported,
    VersionMismatch,
)
from nbmountd.model import Attributes, Capabilities, Entry, Kind, Place, Quota, Version
from nbmountd.threads import run_interruptible

logger = logging.getLogger(__name__)

T = TypeVar("T")
Listing = list[Entry]
Stop = Callable[[], None]
"""Raises when the verb was cancelled or the backend closed; called between parts."""

CHUNK = 1024 * 1024
UPLOAD_PREFIX = ".nbmountd-upload-"
CONNECTIONS = 8
PROBE_TIME_NS = 1_500_000_000_123_456_789
GRANULARITIES_NS = (1, 100, 1_000, 1_000_000, 1_000_000_000, 2_000_000_000)
KINDS = {stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFLNK: Kind.SYMLINK}


class DirectoryBackend:
    """A driver for the folder `options.source`. With `read_only` every change is refused with RemoteDenied."""

    def __init__(self, options: DirectoryOptions, *, read_only: bool = False) -> None:
        self._source = options.source
        self._read_only = read_only
        self._root = -1
        self._closed = False
        self._limiter = trio.CapacityLimiter(2 * CONNECTIONS)
        self._root_lock = threading.Lock()
        self._commit = threading.Lock()
        """Held from the last comparison to the rename, so that at least our own verbs cannot come between."""
        self._warned: set[str] = set()
        self._has_xattrs = False

    async def connect(self) -> Capabilities:
        return await self._ask(self._connect)

    async def stat(self, place: Place) -> Entry:
        return await self._ask(partial(self._stat, place))

    async def list(self, place: Place) -> Listing:
        return await self._ask(partial(self._list, place))

    async def quota(self) -> Quota:
        return await self._ask(self._quota)

    async def read(self, place: Place, version: Version | None, start: int, stop: int, sink: Sink) -> None:
        await self._do(partial(self._read, place, version, start, stop, sink))

    async def upload(
        self, place: Place, body: Body, *, replaces: Version | None, attributes: Attributes, ticket: Ticket
    ) -> Entry:
        return await self._change(partial(self._upload, place, body, replaces, attributes))

    async def write_ranges(
        self, place: Place, pieces: Sequence[Piece], size: int, *, replaces: Version, attributes: Attributes
    ) -> Entry:
        """The file is copied inside the folder first (blocks are shared where the file system can), then replaced."""
        return await self._change(partial(self._write_ranges, place, pieces, size, replaces, attributes))

    async def make_directory(self, place: Place, attributes: Attributes) -> Entry:
        return await self._change(partial(self._make, place, None, attributes))

    async def make_symlink(self, place: Place, target: str, attributes: Attributes) -> Entry:
        return await self._change(partial(self._make, place, target, attributes))

    async def move(
        self, source: Place, target: Place, *, kind: Kind, version: Version | None, replaces: Version | None
    ) -> Entry:
        return await self._change(partial(self._move, source, target, kind, version, replaces))

    async def remove(self, place: Place, *, kind: Kind, version: Version | None) -> None:
        await self._change(partial(self._remove, place, kind, version))

    async def set_attributes(self, place: Place, attributes: Attributes, *, kind: Kind) -> Entry:
        return await self._change(partial(self._set_attributes, place, attributes, kind))

    def changes(self) -> AsyncIterator[Change]:
        raise RemoteUnsupported("a folder tells of no changes")

    async def aclose(self) -> None:
        self._closed = True
        self._set_root(-1)
        await trio.lowlevel.checkpoint()

    # --- on the loop ---

    async def _ask(self, call: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(call, limiter=self._limiter, abandon_on_cancel=True)

    async def _do(self, call: Callable[[Stop], T]) -> T:
        cancelled = threading.Event()

        def stop() -> None:
            if cancelled.is_set() or self._closed:
                raise RemoteUnavailable("closed")

        return await run_interruptible(partial(call, stop), cancelled.set, self._limiter)

    async def _change(self, call: Callable[[Stop], T]) -> T:
        if self._read_only:
            await trio.lowlevel.checkpoint()
            raise RemoteDenied("this mount is read-only")
        return await self._do(call)

    # --- in worker threads: looking ---

    def _set_root(self, root: int) -> None:
        with self._root_lock:
            old, self._root = self._root, root
        if old >= 0:
            os.close(old)  # running verbs have descriptors of their own

    def _open_directory(self, path: tuple[str, ...]) -> int:
        with beneath.translated(Place(path)), self._root_lock:
            if self._root < 0:
                raise RemoteUnavailable("closed" if self._closed else "not connected")
            root = os.dup(self._root)
        try:
            with beneath.translated(Place(path)):
                return beneath.open_directory(root, path)
        finally:
            os.close(root)

    @contextmanager
    def _directory(self, path: tuple[str, ...]) -> Iterator[int]:
        """The directory at `path`, open. Errors of finding it are translated, errors of the block are not."""
        fd = self._open_directory(path)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _parent(self, place: Place) -> Iterator[int]:
        """The directory that is to hold `place`, for a change there: ParentMissing if there is none."""
        beneath.check_name(place.name)
        if place.name.startswith(UPLOAD_PREFIX):
            raise NameRefused(f"{place}: the name is kept for uploads under way")
        try:
            fd = self._open_directory(place.path[:-1])
        except RemoteNotFound as error:
            raise ParentMissing(f"{Place(place.path[:-1])} is not there") from error
        try:
            yield fd
        finally:
            os.close(fd)

    def _connect(self) -> Capabilities:
        if self._closed:
            raise RemoteUnavailable("closed")
        try:
            root = os.open(self._source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            # Not there: perhaps not mounted yet. That says nothing about the files in it.
            raise RemoteUnavailable(f"{self._source}: {error.strerror}") from error
        try:
            with beneath.translated(self._source):
                capabilities = self._probe(root)
        except BaseException:
            os.close(root)
            raise
        self._set_root(root)
        self._has_xattrs = capabilities.native_xattrs
        return capabilities

    def _probe(self, root: int) -> Capabilities:
        """Tries attributes on a file that has no name; where that cannot be, believes in the usual."""
        capabilities = Capabilities(
            ranged_writes=True,
            conditional_writes=False,
            native_mode=True,
            native_mtime=True,
            mtime_granularity_ns=1,
            native_symlinks=True,
            native_xattrs=beneath.read_xattrs(f"/proc/self/fd/{root}/.") is not None,
            max_name_bytes=os.fpathconf(root, "PC_NAME_MAX"),
            connections=CONNECTIONS,
        )
        if self._read_only:
            return capabilities
        try:
            fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=root)
        except OSError:
            return capabilities
        try:
            os.fchmod(fd, 0o640)
            os.utime(fd, ns=(PROBE_TIME_NS, PROBE_TIME_NS))
            with suppress(OSError):
                os.setxattr(fd, "user.nbmountd.probe", b"1")
            status = os.fstat(fd)
            kept = status.st_mtime_ns
            return replace(
                capabilities,
                native_mode=stat.S_IMODE(status.st_mode) == 0o640,
                mtime_granularity_ns=next(
                    (step for step in GRANULARITIES_NS if kept == PROBE_TIME_NS - PROBE_TIME_NS % step),
                    GRANULARITIES_NS[-1],
                ),
                native_xattrs="user.nbmountd.probe" in os.listxattr(fd),
            )
        except OSError:
            return capabilities
        finally:
            os.close(fd)

    def _stat(self, place: Place) -> Entry:
        if not place.path:
            with self._directory(()) as root, beneath.translated(place):
                return self._entry("", root, beneath.settled_status(".", root), self._may_change(root), name_below=".")
        with self._directory(place.path[:-1]) as parent:
            return self._entry_at(place, parent)

    def _entry_at(self, place: Place, parent: int) -> Entry:
        with beneath.translated(place):
            beneath.check_name(place.name)
            status = beneath.settled_status(place.name, parent)
            if not beneath.is_shown(status):
                raise RemoteUnsupported(f"{place} is neither file, directory nor symlink")
            return self._entry(place.name, parent, status, self._may_change(parent))

    def _list(self, place: Place) -> Listing:
        entries = []
        with self._directory(place.path) as fd, beneath.translated(place):
            may_change = self._may_change(fd)
            with os.scandir(fd) as found:
                names = [item.name for item in found if not item.name.startswith(UPLOAD_PREFIX)]
            for name in names:
                heard()
                try:
                    status = beneath.settled_status(name, fd)
                    if beneath.is_shown(status):
                        entries.append(self._entry(name, fd, status, may_change))
                    else:
                        self._leave_out(place, name)
                except FileNotFoundError:
                    continue  # removed since its name was read
        return entries

    def _leave_out(self, place: Place, name: str) -> None:
        where = f"{place}/{name}".replace("//", "/")
        if where not in self._warned and len(self._warned) < 10_000:
            self._warned.add(where)
            logger.warning("%r is neither file, directory nor symlink: left out of listings", where)

    def _may_change(self, directory: int) -> os.stat_result | None:
        """The directory's status if names in it may be made and removed, else None."""
        if self._read_only or not os.access(f"/proc/self/fd/{directory}", os.W_OK | os.X_OK, effective_ids=True):
            return None
        return os.fstat(directory)

    def _entry(
        self,
        name: str,
        parent: int,
        status: os.stat_result,
        may_change: os.stat_result | None,
        *,
        name_below: str | None = None,
    ) -> Entry:
        where = name_below or name
        kind = KINDS[stat.S_IFMT(status.st_mode)]
        writable = may_change is not None
        if kind is not Kind.SYMLINK and not self._read_only:
            allowed = os.access(where, os.W_OK, dir_fd=parent, effective_ids=True)
            writable = allowed if kind is Kind.DIRECTORY else allowed and writable
        xattrs = None
        if self._has_xattrs:
            xattrs = beneath.read_xattrs(f"/proc/self/fd/{parent}/{where}")
        return Entry(
            name=name,
            kind=kind,
            size=status.st_size if kind is Kind.FILE else None,
            version=beneath.version_of(status),
            attributes=Attributes(
                mode=stat.S_IMODE(status.st_mode),
                mtime_ns=status.st_mtime_ns,
                target=os.readlink(where, dir_fd=parent) if kind is Kind.SYMLINK else None,
                xattrs=xattrs,
            ),
            writable=writable,
            removable=may_change is not None and _sticky_allows(may_change, status) and name_below is None,
        )

    def _quota(self) -> Quota:
        with self._directory(()) as root, beneath.translated(Place()):
            status = os.fstatvfs(root)
        size = status.f_frsize
        return Quota(used=(status.f_blocks - status.f_bfree) * size, available=status.f_bavail * size)

    def _read(self, place: Place, version: Version | None, start: int, end: int, sink: Sink, stop: Stop) -> None:
        flags = os.O_RDONLY | os.O_NONBLOCK  # what has just become a FIFO must not make us wait for its other end
        with self._directory(place.path[:-1]) as parent, beneath.translated(place):
            beneath.check_name(place.name)
            fd = beneath.open_file(place.name, flags, parent)
        try:
            with beneath.translated(place):
                version = _checked(place, os.fstat(fd), version, Kind.FILE)
            at = start
            while at < end:
                stop()
                with beneath.translated(place):
                    part = os.pread(fd, min(CHUNK, end - at), at)
                    _checked(place, os.fstat(fd), version, Kind.FILE)  # after it: a writer stamps before it writes
                if not part:
                    raise RemoteProtocolError(f"{place} ends at {at}, before {end}")
                sink(memoryview(part))
                at += len(part)
        finally:
            os.close(fd)

    # --- in worker threads: changing ---

    def _upload(
        self, place: Place, body: Body, replaces: Version | None, attributes: Attributes, stop: Stop
    ) -> Entry:
        def fill(fd: int, old: int | None) -> None:
            done = 0
            while part := body.read(CHUNK):
                stop()
                with beneath.translated(place):
                    beneath.write_all(fd, part, done)
                done += len(part)
            if done != body.size:
                raise RemoteProtocolError(f"{place}: the body gave {done} bytes of {body.size}")

        return self._replace(place, replaces, attributes, os.O_PATH, fill, stop)

    def _write_ranges(
        self,
        place: Place,
        pieces: Sequence[Piece],
        size: int,
        replaces: Version,
        attributes: Attributes,
        stop: Stop,
    ) -> Entry:
        def fill(fd: int, old: int | None) -> None:
            assert old is not None
            with beneath.translated(place):
                beneath.copy(old, fd, min(size, os.fstat(old).st_size), stop)
                os.ftruncate(fd, size)
            for piece in pieces:
                for at in range(piece.start, piece.stop, CHUNK):
                    stop()
                    part = piece.read(at, min(CHUNK, piece.stop - at))
                    with beneath.translated(place):
                        beneath.write_all(fd, part, at)

        return self._replace(place, replaces, attributes, os.O_RDONLY | os.O_NONBLOCK, fill, stop)

    def _replace(
        self,
        place: Place,
        replaces: Version | None,
        attributes: Attributes,
        old_flags: int,
        fill: Callable[[int, int | None], None],
        stop: Stop,
    ) -> Entry:
        """Fills a temporary file with `fill(new, old)`, gives it attributes, and puts it at `place`.

        `old` is the file to be replaced, opened with `old_flags`; None for a new one.
        """
        temporary = UPLOAD_PREFIX + secrets.token_hex(8)
        with self._parent(place) as parent:
            self._check_target(place, parent, Kind.FILE, replaces)
            old = None if replaces is None else self._open_old(place, parent, replaces, old_flags)
            try:
                with beneath.translated(place):
                    mode = 0o666 if old is None and attributes.mode is None else 0o600
                    fd = beneath.open_file(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, parent, mode)
                try:
                    with suppress(OSError):
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # says "not a leftover"; see _remove_leftovers
                    fill(fd, old)
                    with beneath.translated(place):
                        _dress(place, fd, old, attributes)
                        os.fsync(fd)
                    stop()
                    with self._commit, beneath.translated(place, in_doubt=True):
                        self._check_target(place, parent, Kind.FILE, replaces)
                        if replaces is None:
                            beneath.rename_to_free_name(temporary, parent, place.name, parent)
                        else:
                            os.rename(temporary, place.name, src_dir_fd=parent, dst_dir_fd=parent)
                        os.fsync(parent)
                    return self._entry_at(place, parent)
                except BaseException:
                    with suppress(OSError):
                        os.unlink(temporary, dir_fd=parent)
                    raise
                finally:
                    os.close(fd)
            finally:
                if old is not None:
                    os.close(old)

    def _open_old(self, place: Place, parent: int, version: Version, flags: int) -> int:
        with beneath.translated(place):
            fd = beneath.open_file(place.name, flags, parent)
        try:
            _checked(place, os.fstat(fd), version, Kind.FILE)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _check_target(self, place: Place, parent: int, kind: Kind, replaces: Version | None) -> None:
        with beneath.translated(place):
            try:
                status = os.stat(place.name, dir_fd=parent, follow_symlinks=False)
            except FileNotFoundError:
                if replaces is None:
                    return
                raise
            if replaces is None:
                raise RemoteExists(f"{place} is there")
            _checked(place, status, replaces, kind)

    def _make(self, place: Place, target: str | None, attributes: Attributes, stop: Stop) -> Entry:
        """A directory, or a symlink if `target` is given."""
        with self._parent(place) as parent:
            with beneath.translated(place, in_doubt=True):
                if target is None:
                    os.mkdir(place.name, dir_fd=parent)
                else:
                    os.symlink(target, place.name, dir_fd=parent)
                os.fsync(parent)
            with suppress(RemoteError):  # it is made; what could not be stored is seen in the entry
                self._store(place, parent, attributes, Kind.DIRECTORY if target is None else Kind.SYMLINK)
            return self._entry_at(place, parent)

    def _move(
        self,
        source: Place,
        target: Place,
        kind: Kind,
        version: Version | None,
        replaces: Version | None,
        stop: Stop,
    ) -> Entry:
        if target.path[: len(source.path)] == source.path:
            raise RemoteDenied(f"{source} cannot be moved to {target}, into itself")
        with self._directory(source.path[:-1]) as old_parent, self._parent(target) as parent, self._commit:
            with beneath.translated(source):
                beneath.check_name(source.name)
                status = os.stat(source.name, dir_fd=old_parent, follow_symlinks=False)
                _checked(source, status, version, kind)
            try:
                self._check_target(target, parent, kind, replaces)
            except RemoteNotFound as error:
                raise VersionMismatch(f"{target} is gone") from error
            with beneath.translated(target, in_doubt=True):
                if replaces is None:
                    beneath.rename_to_free_name(source.name, old_parent, target.name, parent)
                else:
                    os.rename(source.name, target.name, src_dir_fd=old_parent, dst_dir_fd=parent)
                os.fsync(parent)
                os.fsync(old_parent)
            return self._entry_at(target, parent)

    def _remove(self, place: Place, kind: Kind, version: Version | None, stop: Stop) -> None:
        try:
            with self._parent(place) as parent, self._commit:
                with beneath.translated(place, in_doubt=True):
                    status = os.stat(place.name, dir_fd=parent, follow_symlinks=False)
                    _checked(place, status, version if kind is Kind.FILE else None, kind)
                    if kind is Kind.DIRECTORY:
                        self._remove_leftovers(place)
                        os.rmdir(place.name, dir_fd=parent)
                    else:
                        os.unlink(place.name, dir_fd=parent)
                    os.fsync(parent)
        except (RemoteNotFound, ParentMissing):
            return

    def _remove_leftovers(self, place: Place) -> None:
        """Removes temporary files of uploads whose process died: nobody else could, as they are shown to nobody."""
        with self._directory(place.path) as fd:
            with os.scandir(fd) as found:
                leftovers = [item.name for item in found if item.name.startswith(UPLOAD_PREFIX)]
            for name in leftovers:
                with suppress(OSError), beneath.opened(name, os.O_RDONLY | os.O_NONBLOCK, fd) as leftover:
                    fcntl.flock(leftover, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by the upload as long as it lives
                    os.unlink(name, dir_fd=fd)

    def _set_attributes(self, place: Place, attributes: Attributes, kind: Kind, stop: Stop) -> Entry:
        if not place.path:
            raise RemoteDenied("the folder itself is not changed")
        with self._directory(place.path[:-1]) as parent:
            self._store(place, parent, attributes, kind)
            return self._entry_at(place, parent)

    def _store(self, place: Place, parent: int, attributes: Attributes, kind: Kind) -> None:
        with beneath.translated(place), beneath.opened(place.name, os.O_PATH, parent) as fd:
            _checked(place, os.fstat(fd), None, kind)
            path = f"/proc/self/fd/{fd}"  # leads to the very object, whatever is at the name by now
            if kind is Kind.SYMLINK:
                if attributes.mtime_ns is not None:
                    times = (os.fstat(fd).st_atime_ns, attributes.mtime_ns)
                    os.utime(place.name, ns=times, dir_fd=parent, follow_symlinks=False)
                elif attributes.mode is not None or attributes.xattrs:
                    raise RemoteUnsupported(f"{place}: a symlink has neither mode nor attributes")
                return
            if attributes.xattrs is not None and (attributes.xattrs or self._has_xattrs):
                beneath.write_xattrs(path, attributes.xattrs)
            if attributes.mode is not None:
                os.chmod(path, attributes.mode)
            if attributes.mtime_ns is not None:
                os.utime(path, ns=(os.fstat(fd).st_atime_ns, attributes.mtime_ns))


def _checked(place: Place, status: os.stat_result, version: Version | None, kind: Kind) -> Version:
    """The version of `status`, which must be of `kind` and, if `version` is given, of that; else VersionMismatch."""
    there = beneath.version_of(status)
    if KINDS.get(stat.S_IFMT(status.st_mode)) is not kind:
        raise VersionMismatch(f"{place} is no {kind.name.lower()} any more")
    if version is not None and there != version:
        raise VersionMismatch(f"{place} is {there}, not {version}")
    return there


def _dress(place: Place, fd: int, old: int | None, attributes: Attributes) -> None:
    """Gives the new file the wanted attributes, and those of the old one that nobody mentioned, as far as may be."""
    mode, xattrs = attributes.mode, attributes.xattrs
    if old is not None:
        status, path = os.fstat(old), f"/proc/self/fd/{old}"
        mode = stat.S_IMODE(status.st_mode) if mode is None else mode
        for name in _names_of_xattrs(path):
            if name == "system.posix_acl_access" or (xattrs is None and name.startswith("user.")):
                with suppress(OSError):
                    os.setxattr(fd, name, os.getxattr(path, name))
        with suppress(OSError):
            os.fchown(fd, status.st_uid, status.st_gid)
    try:
        if mode is not None:
            os.fchmod(fd, mode)
        if attributes.mtime_ns is not None:
            os.utime(fd, ns=(os.fstat(fd).st_atime_ns, attributes.mtime_ns))
        if xattrs is not None:
            beneath.write_xattrs(f"/proc/self/fd/{fd}", xattrs)
    except OSError as error:
        # The content matters more than an attribute that has no place here; the entry tells what was kept.
        logger.info("%s: uploaded without some attributes: %s", place, error.strerror)


def _names_of_xattrs(path: str) -> list[str]:
    try:
        return os.listxattr(path)
    except OSError:
        return []


def _sticky_allows(directory: os.stat_result, status: os.stat_result) -> bool:
    return not directory.st_mode & stat.S_ISVTX or os.geteuid() in (0, status.st_uid, directory.st_uid)
