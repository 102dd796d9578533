"""A file system of four files that outlives its process, for tests of mounting, serving and supervising.

`/f` is kept in a backing file; reading `/gate` leaves `taken` in the backing directory and waits for `open` to appear there;
`/counts` shows how many requests of which kind this process got; reading `/burn` blocks the loop for 0.2 s, looks once for what
became readable, and may block for another 0.3 s before it is read.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections import Counter
from pathlib import Path

import pyfuse3
import trio

NAMES = {b"f": 2, b"gate": 3, b"counts": 4, b"burn": 5}


class TinyOperations(pyfuse3.Operations):
    def __init__(self, backing: Path) -> None:
        super().__init__()
        self.backing = backing
        self.counts: Counter[str] = Counter()
        self.fd = os.open(backing / "f", os.O_RDWR | os.O_CREAT, 0o644)

    def attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755 if inode == 1 else stat.S_IFREG | 0o644
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = os.geteuid(), os.getegid()
        entry.st_size = {1: 0, 2: os.fstat(self.fd).st_size, 3: 4, 4: 4096, 5: 4}[inode]
        entry.attr_timeout = entry.entry_timeout = 60
        return entry

    async def getattr(self, inode, ctx=None):
        self.counts["getattr"] += 1
        return self.attributes(inode)

    async def lookup(self, parent, name, ctx=None):
        self.counts["lookup"] += 1
        if name in NAMES:
            return self.attributes(NAMES[name])
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def setattr(self, inode, attr, fields, fh, ctx):
        if fields.update_size:
            os.ftruncate(self.fd, attr.st_size)
        return self.attributes(inode)

    async def open(self, inode, flags, ctx):
        self.counts["open"] += 1
        if flags & os.O_TRUNC:
            os.ftruncate(self.fd, 0)
        return pyfuse3.FileInfo(fh=inode, keep_cache=inode == 2, direct_io=inode != 2)

    async def read(self, fh, offset, size):
        self.counts["read"] += 1
        self.counts["largest read"] = max(size, self.counts["largest read"])
        if fh == 3:
            (self.backing / "taken").touch()
            while not (self.backing / "open").exists():  # noqa: ASYNC110 (another process makes it)
                await trio.sleep(0.005)
            return b"open"[offset : offset + size]
        if fh == 4:
            return json.dumps(self.counts).encode().ljust(4096)[offset : offset + size]
        if fh == 5:
            trio.lowlevel.spawn_system_task(_block_in_the_next_batch)
            await trio.sleep(0.01)  # its deadline is running
            (self.backing / "taken").touch()
            time.sleep(0.2)
            return b"done"[offset : offset + size]
        return os.pread(self.fd, size, offset)

    async def write(self, fh, offset, data):
        self.counts["write"] += 1
        self.counts["largest write"] = max(len(data), self.counts["largest write"])
        return os.pwrite(self.fd, data, offset)

    async def getxattr(self, inode, name, ctx):
        self.counts["getxattr"] += 1
        raise pyfuse3.FUSEError(pyfuse3.ENOATTR)

    async def opendir(self, inode, ctx):
        return inode

    async def readdir(self, fh, start_id, token):
        for index, (name, inode) in enumerate(list(NAMES.items())[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, name, self.attributes(inode), index):
                break

    async def releasedir(self, fh):
        pass

    async def flush(self, fh):
        pass

    async def release(self, fh):
        pass

    async def fsync(self, fh, datasync):
        os.fsync(self.fd)

    async def statfs(self, ctx):
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = 4096
        answer.f_namemax = 255
        return answer


async def _block_in_the_next_batch() -> None:
    await trio.sleep(0.1)
    time.sleep(0.3)
