"""The FUSE_INIT conversation: what we ask of the kernel and why, held by us and not by libfuse.

It knows the wire format of that one request (include/uapi/linux/fuse.h, protocol 7.45) and nothing of mounting or serving.
"""

from __future__ import annotations

import os
import select
import struct
from dataclasses import dataclass
from enum import IntFlag

PROTOCOL_MAJOR = 7
PROTOCOL_MINOR = 38
"""The newest minor that libfuse 3.14 can parse. The flags that we ask for from later minors change no message of libfuse's."""

MAX_WRITE = 1024 * 1024
"""Bytes of one READ or WRITE: fs.fuse.max_pages_limit and libfuse's buffer both end at 256 pages."""
PAGE = 4096
DEFAULT_MAX_PAGES = 32
"""What kernels before 4.20 (no MAX_PAGES) put into one request."""

MAX_BACKGROUND = 64
"""Read-ahead and asynchronous requests in flight; with the kernel's own 12 a remote with latency starves (8 -> 31 reads)."""
CONGESTION_THRESHOLD = 48

OP_INIT = 26
IN_HEADER = struct.Struct("=IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding."""
OUT_HEADER = struct.Struct("=IiQ")
"""len, error (or the code of a notification), unique (0 for a notification)."""
INIT_IN = struct.Struct("=IIIII44x")
"""major, minor, max_readahead, flags, flags2; 64 bytes since 7.36, the first 16 before."""
INIT_OUT = struct.Struct("=IIIIHHIIHHII24x")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages, map_alignment,
flags2, max_stack_depth, (request_timeout, unused)."""


class Flag(IntFlag):
    """Bits of FUSE_INIT; 32 and above travel in flags2."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    SPLICE_WRITE = 1 << 7
    SPLICE_MOVE = 1 << 8
    SPLICE_READ = 1 << 9
    FLOCK_LOCKS = 1 << 10
    HAS_IOCTL_DIR = 1 << 11
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    MAP_ALIGNMENT = 1 << 26
    SUBMOUNTS = 1 << 27
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    SECURITY_CTX = 1 << 32
    HAS_INODE_DAX = 1 << 33
    CREATE_SUPP_GROUP = 1 << 34
    HAS_EXPIRE_ONLY = 1 << 35
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    NO_EXPORT_SUPPORT = 1 << 38
    HAS_RESEND = 1 << 39
    ALLOW_IDMAP = 1 << 40
    OVER_IO_URING = 1 << 41
    REQUEST_TIMEOUT = 1 << 42


DECISIONS: dict[Flag, tuple[bool, str]] = {
    Flag.ASYNC_READ: (True, "several read-ahead requests of one file at a time"),
    Flag.POSIX_LOCKS: (False, "the kernel keeps fcntl locks itself, between the processes of this machine"),
    Flag.ATOMIC_O_TRUNC: (True, "open(O_TRUNC) is one request; operations.open must honour O_TRUNC"),
    Flag.EXPORT_SUPPORT: (False, "nobody exports us over NFS, and lookups of '..' need not be answered"),
    Flag.BIG_WRITES: (True, "writes above one page"),
    Flag.DONT_MASK: (False, "the kernel applies the umask, so `mode` arrives as it is to be stored"),
    Flag.SPLICE_WRITE: (False, "only told by the kernel, not asked for"),
    Flag.SPLICE_MOVE: (False, "only told by the kernel, not asked for"),
    Flag.SPLICE_READ: (False, "only told by the kernel; splicing small requests is 2.6 times slower than read(2)"),
    Flag.FLOCK_LOCKS: (False, "as POSIX_LOCKS"),
    Flag.HAS_IOCTL_DIR: (False, "we serve no ioctl"),
    Flag.AUTO_INVAL_DATA: (False, "a new remote version is a new inode: our content changes by local writes only"),
    Flag.DO_READDIRPLUS: (True, "pyfuse3 serves no plain READDIR"),
    Flag.READDIRPLUS_AUTO: (False, "would make the kernel use plain READDIR for later pages"),
    Flag.ASYNC_DIO: (True, "several requests of one O_DIRECT call at a time"),
    Flag.WRITEBACK_CACHE: (False, "keeps size and mtime in the kernel against the remote's, and skips FLUSH after an error"),
    Flag.NO_OPEN_SUPPORT: (False, "only told by the kernel; we want every open"),
    Flag.PARALLEL_DIROPS: (True, "lookups in one directory do not wait for each other (155/s -> 1163/s at 5 ms)"),
    Flag.HANDLE_KILLPRIV: (False, "replaced by V2; without either the kernel clears suid bits by SETATTR"),
    Flag.POSIX_ACL: (False, "mode bits only"),
    Flag.ABORT_ERROR: (False, "libfuse takes ENODEV for the end of the mount and ECONNABORTED for an accident"),
    Flag.MAX_PAGES: (True, "requests of up to 1 MiB"),
    Flag.CACHE_SYMLINKS: (True, "readlink is asked once"),
    Flag.NO_OPENDIR_SUPPORT: (False, "an opendir is where a listing is made fresh"),
    Flag.EXPLICIT_INVAL_DATA: (True, "pages go only when we say so; see AUTO_INVAL_DATA"),
    Flag.MAP_ALIGNMENT: (False, "virtiofs only"),
    Flag.SUBMOUNTS: (False, "one file system a mount"),
    Flag.HANDLE_KILLPRIV_V2: (True, "no GETXATTR(security.capability) before each write (4 KiB writes 2.7 times faster)"),
    Flag.SETXATTR_EXT: (False, "libfuse 3.14 cannot parse the longer SETXATTR"),
    Flag.INIT_EXT: (True, "the way to the flags from bit 32 on"),
    Flag.SECURITY_CTX: (False, "libfuse 3.14 cannot parse the appended context"),
    Flag.HAS_INODE_DAX: (False, "virtiofs only"),
    Flag.CREATE_SUPP_GROUP: (False, "libfuse 3.14 cannot parse the extension header"),
    Flag.HAS_EXPIRE_ONLY: (True, "entries can be expired without being thrown away"),
    Flag.DIRECT_IO_ALLOW_MMAP: (True, "a file opened with direct_io can still be mapped"),
    Flag.PASSTHROUGH: (False, "libfuse 3.14 cannot carry a backing id in its answer to OPEN"),
    Flag.NO_EXPORT_SUPPORT: (False, "name_to_handle_at of what is in memory may go on working"),
    Flag.HAS_RESEND: (True, "a new worker asks for the requests that the dead one had taken"),
    Flag.ALLOW_IDMAP: (False, "changes whose ids are in a request"),
    Flag.OVER_IO_URING: (False, "libfuse 3.14 does not know it"),
    Flag.REQUEST_TIMEOUT: (False, "would abort the mount; each handler has a deadline of its own"),
}
"""Every flag with our answer and its reason. A flag that is not here is not asked for."""

WANTED = Flag(sum(flag for flag, (wanted, _) in DECISIONS.items() if wanted))
ALL_FLAGS = Flag(sum(Flag))


@dataclass(frozen=True)
class InitAgreement:
    """What holds between the kernel and every worker of one mount, from FUSE_INIT to the unmount. Can be pickled.

    `minor` is the protocol minor in force, `kernel_minor` the kernel's own. `flags` are those in force, `offered` those of
    the kernel. `max_write` is the size in bytes of the largest READ or WRITE.
    """

    minor: int
    kernel_minor: int
    flags: Flag
    offered: Flag
    max_write: int
    max_readahead: int

    @property
    def has_resend(self) -> bool:
        """Whether requests that a dead worker had taken can be asked for again (Linux 6.9)."""
        return Flag.HAS_RESEND in self.flags


class InitError(Exception):
    """The kernel's FUSE_INIT did not come or makes no sense."""


def answer_init(fuse_fd: int, *, only: Flag = ALL_FLAGS, timeout: float = 5.0) -> InitAgreement:
    """Reads FUSE_INIT from a descriptor just mounted and answers it; returns what was agreed.

    `only` masks what the kernel offers, so that a test can be an older kernel. Waits at most `timeout` seconds (the kernel
    queues the request during mount(2), so it is there). Raises InitError; OSError with ENODEV if the mount is gone.
    """
    ready = select.poll()  # select() takes no descriptor above 1023
    ready.register(fuse_fd, select.POLLIN)
    if not ready.poll(timeout * 1000):
        raise InitError(f"the kernel sent no FUSE_INIT within {timeout:g} s")
    request = os.read(fuse_fd, PAGE * 4)
    opcode, unique = IN_HEADER.unpack_from(request)[1:3]
    if opcode != OP_INIT or len(request) < IN_HEADER.size + 16:
        raise InitError(f"the first request of the kernel is no FUSE_INIT but number {opcode}")
    body = request[IN_HEADER.size : IN_HEADER.size + INIT_IN.size].ljust(INIT_IN.size, b"\0")
    major, minor, max_readahead, low, high = INIT_IN.unpack(body)
    if major != PROTOCOL_MAJOR or minor < 23:
        raise InitError(f"the kernel speaks FUSE {major}.{minor}; 7.23 (Linux 3.15) or later is needed")
    offered = low | (high << 32 if low & Flag.INIT_EXT else 0)
    agreement = agree(minor, Flag(offered & only & ALL_FLAGS), max_readahead)
    reply = _init_out(agreement)
    os.write(fuse_fd, OUT_HEADER.pack(OUT_HEADER.size + len(reply), 0, unique) + reply)
    return agreement


def agree(kernel_minor: int, offered: Flag, max_readahead: int) -> InitAgreement:
    """What we make of the kernel's offer."""
    if Flag.INIT_EXT not in offered:
        offered &= Flag(0xFFFFFFFF)
    flags = offered & WANTED
    max_write = MAX_WRITE if Flag.MAX_PAGES in flags else DEFAULT_MAX_PAGES * PAGE
    return InitAgreement(min(kernel_minor, PROTOCOL_MINOR), kernel_minor, flags, offered, max_write, max_readahead)


def _init_out(agreement: InitAgreement) -> bytes:
    max_pages = agreement.max_write // PAGE if Flag.MAX_PAGES in agreement.flags else 0
    low, high = agreement.flags & 0xFFFFFFFF, agreement.flags >> 32
    return INIT_OUT.pack(
        PROTOCOL_MAJOR, agreement.minor, agreement.max_readahead, low, MAX_BACKGROUND, CONGESTION_THRESHOLD,
        agreement.max_write, 1, max_pages, 0, high, 0,
    )


def init_request_for_libfuse(minor: int) -> bytes:
    """A FUSE_INIT of our own making that leaves libfuse with buffers of 1 MiB and nothing else to decide.

    What libfuse answers goes nowhere: the flags in force are the kernel's. It is shown READDIRPLUS because pyfuse3 refuses to
    serve without it, and MAX_PAGES because else its buffer holds 128 KiB and the kernel's requests do not fit. Everything
    else would only change `want` bits that libfuse 3.14 consults nowhere but here (lib/fuse_lowlevel.c, `do_init`).
    """
    flags = Flag.MAX_PAGES | Flag.DO_READDIRPLUS | Flag.BIG_WRITES | Flag.ATOMIC_O_TRUNC | Flag.ASYNC_READ
    body = INIT_IN.pack(PROTOCOL_MAJOR, minor, 128 * 1024, flags, 0)
    header = IN_HEADER.pack(IN_HEADER.size + len(body), OP_INIT, 2, 0, 0, 0, 0, 0, 0)
    return header + body
