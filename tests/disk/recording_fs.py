"""A file system that passes everything on to a directory and writes down what a disk would be told, in order.

    python recording_fs.py DIRECTORY MOUNTPOINT RECORD

Serves until it is unmounted. Each entry of the record is one pickled tuple, written before the caller gets its answer; the
tuples are those of power_loss.py. It knows nothing of what is recorded.
"""

from __future__ import annotations

import errno
import os
import pickle
import stat
import sys
from typing import Any

import pyfuse3
import trio


class Recording(pyfuse3.Operations):  # type: ignore[misc]
    enable_writeback_cache = False

    def __init__(self, directory: str, record: str) -> None:
        super().__init__()
        self.paths: dict[int, str] = {pyfuse3.ROOT_INODE: directory}
        self.root = directory
        self.record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.names: dict[int, list[str]] = {}
        self.files: dict[int, int] = {}
        """Inode -> a number that is never used twice."""
        self.made = 0

    def note(self, *entry: Any) -> None:
        os.write(self.record, pickle.dumps(entry))

    def relative(self, path: str) -> str:
        return os.path.relpath(path, self.root)

    def entry(self, path: str) -> pyfuse3.EntryAttributes:
        try:
            status = os.lstat(path)
        except OSError as exc:
            raise pyfuse3.FUSEError(exc.errno or errno.EIO) from None
        entry = pyfuse3.EntryAttributes()
        for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            setattr(entry, name, getattr(status, name))
        entry.st_ino = pyfuse3.ROOT_INODE if path == self.root else status.st_ino
        entry.entry_timeout = entry.attr_timeout = 0
        entry.st_blksize, entry.st_blocks = 4096, status.st_blocks
        self.paths[entry.st_ino] = path
        return entry

    def below(self, parent: int, name: bytes) -> str:
        return f"{self.paths[parent]}/{os.fsdecode(name)}"

    async def lookup(self, parent: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        return self.entry(self.below(parent, name))

    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        return self.entry(self.paths[inode])

    async def setattr(self, inode: int, new: Any, fields: Any, handle: int | None, ctx: Any) -> pyfuse3.EntryAttributes:
        if fields.update_size:
            os.truncate(handle if handle is not None else self.paths[inode], new.st_size)
            self.note("truncate", self.files[inode], new.st_size)
        return self.entry(self.paths[inode])

    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        path = self.below(parent, name)
        os.mkdir(path, mode)
        self.note("mkdir", self.relative(path))
        return self.entry(path)

    async def unlink(self, parent: int, name: bytes, ctx: Any) -> None:
        path = self.below(parent, name)
        os.unlink(path)
        self.note("unlink", self.relative(path))

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: Any) -> None:
        source, target = self.below(parent, name), self.below(new_parent, new_name)
        os.rename(source, target)
        self.note("rename", self.relative(source), self.relative(target))
        for inode, path in self.paths.items():
            if path == source or path.startswith(f"{source}/"):
                self.paths[inode] = target + path[len(source) :]

    async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        path = self.below(parent, name)
        new = not os.path.exists(path)
        fd = os.open(path, flags & ~os.O_NOFOLLOW | os.O_CREAT, mode)
        entry = self.entry(path)
        if new:
            self.made += 1
            self.files[entry.st_ino] = self.made
            self.note("create", self.relative(path), self.made)
        return pyfuse3.FileInfo(fh=fd), entry

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        fd = os.open(self.paths[inode], flags & ~(os.O_NOFOLLOW | os.O_CREAT))
        if flags & os.O_TRUNC:
            self.note("truncate", self.files[inode], 0)
        return pyfuse3.FileInfo(fh=fd)

    async def read(self, fh: int, offset: int, length: int) -> bytes:
        return os.pread(fh, length, offset)

    async def write(self, fh: int, offset: int, data: bytes) -> int:
        written = os.pwrite(fh, data, offset)
        self.note("write", self.files[os.fstat(fh).st_ino], offset, bytes(data[:written]))
        return written

    async def fsync(self, fh: int, datasync: bool) -> None:
        self.note("fsync", self.files[os.fstat(fh).st_ino])

    async def flush(self, fh: int) -> None:
        return

    async def release(self, fh: int) -> None:
        os.close(fh)

    async def opendir(self, inode: int, ctx: Any) -> int:
        self.names[inode] = sorted(os.listdir(self.paths[inode]))
        return inode

    async def readdir(self, inode: int, start: int, token: Any) -> None:
        for number, name in enumerate(self.names[inode][start:], start + 1):
            if not pyfuse3.readdir_reply(token, os.fsencode(name), self.entry(f"{self.paths[inode]}/{name}"), number):
                return

    async def fsyncdir(self, inode: int, datasync: bool) -> None:
        self.note("fsyncdir", self.relative(self.paths[inode]))

    async def releasedir(self, inode: int) -> None:
        return

    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        answer = pyfuse3.StatvfsData()
        found = os.statvfs(self.root)
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax"):
            setattr(answer, name, getattr(found, name))
        return answer


async def serve(directory: str, mountpoint: str, record: str) -> None:
    pyfuse3.init(Recording(directory, record), mountpoint, {*pyfuse3.default_options, "fsname=nbmountd-recording"})
    print("mounted", flush=True)
    try:
        await pyfuse3.main()
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    assert stat.S_ISDIR(os.stat(sys.argv[1]).st_mode)
    trio.run(serve, sys.argv[1], sys.argv[2], sys.argv[3])
