"""What outlives a supervisor: the descriptors of its mounts, and what must be known to go on with them.

Two ways lead to the next one. An upgrade is an exec of the installed program in the same process: every descriptor stays open,
the workers go on serving meanwhile. After a death, systemd's descriptor store (`FileDescriptorStoreMax=`) gives the connections
back; the workers are gone then, the mounts are not. This module knows the form of both, and nothing of what is done with them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NoReturn

import msgspec

from nbmountd import systemd
from nbmountd.fuse.agreement import Flag, InitAgreement
from nbmountd.fuse.mounting import Mounted

VARIABLE = "NBMOUNTD_HANDOVER"
"""Names the descriptor of a memfd with a `Handover`, from one program to the next in the same process."""
_KINDS = ("fuse", "held", "note")


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """A mount in words."""

    path: str
    way: str
    minor: int
    kernel_minor: int
    flags: int
    offered: int
    max_write: int
    max_readahead: int


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """A process that goes on serving."""

    pid: int
    pidfd: int
    reason_fd: int


class Inherited(msgspec.Struct, frozen=True, kw_only=True):
    """One mount. The descriptors belong to whoever has the value; `listener_fd` None: the control socket is to be made anew."""

    name: str
    note: Note
    fuse_fd: int
    held_fd: int
    listener_fd: int | None = None
    worker: Worker | None = None
    restarts: int = 0

    def mounted(self) -> Mounted:
        note = self.note
        agreement = InitAgreement(
            note.minor, note.kernel_minor, Flag(note.flags), Flag(note.offered), note.max_write, note.max_readahead
        )
        return Mounted(note.path, self.fuse_fd, agreement, note.way)

    def close(self) -> None:
        """Gives everything up."""
        for fd in self.descriptors():
            os.close(fd)

    def descriptors(self) -> list[int]:
        worker = [] if self.worker is None else [self.worker.pidfd, self.worker.reason_fd]
        return [self.fuse_fd, self.held_fd, *([] if self.listener_fd is None else [self.listener_fd]), *worker]


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that an upgrade takes along; `children`: processes that end now and are to be waited for."""

    lock_fd: int
    own_lock_fd: int
    lifeline_fd: int
    lifeline_end: int
    listener_fd: int
    mounts: tuple[Inherited, ...]
    children: tuple[int, ...] = ()


def note_of(mounted: Mounted) -> Note:
    agreement = mounted.agreement
    return Note(
        path=mounted.path, way=mounted.way, minor=agreement.minor, kernel_minor=agreement.kernel_minor,
        flags=int(agreement.flags), offered=int(agreement.offered), max_write=agreement.max_write,
        max_readahead=agreement.max_readahead,
    )  # fmt: skip


# --- exec --------------------------------------------------------------------------------------------------------------


def become_installed(handover: Handover) -> NoReturn:
    """Replaces this program by the one that is installed now, started as this one was. Raises OSError if that fails."""
    memory = _memory(msgspec.json.encode(handover))
    fds = [handover.lock_fd, handover.own_lock_fd, handover.lifeline_fd, handover.lifeline_end, handover.listener_fd, memory]
    for mount in handover.mounts:
        fds += mount.descriptors()
    for fd in fds:
        os.set_inheritable(fd, True)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, VARIABLE: str(memory)})


def received(environ: Mapping[str, str] = os.environ) -> Handover | None:
    """What the program before us in this process left, if there was one. Once: the variable is gone afterwards."""
    number = environ.get(VARIABLE, "")
    if not number.isdigit():
        return None
    os.environ.pop(VARIABLE, None)
    handover = msgspec.json.decode(_content(int(number)), type=Handover)
    os.close(int(number))
    for fd in (handover.lock_fd, handover.own_lock_fd, handover.lifeline_fd, handover.lifeline_end, handover.listener_fd):
        os.set_inheritable(fd, False)
    for mount in handover.mounts:
        for fd in mount.descriptors():
            os.set_inheritable(fd, False)
    return handover


# --- systemd's store ---------------------------------------------------------------------------------------------------


def store(name: str, mounted: Mounted, held_fd: int, environ: Mapping[str, str] = os.environ) -> None:
    """Has the service manager keep the connection of mount `name`, if there is one that does."""
    note = _memory(msgspec.json.encode(note_of(mounted)))
    try:
        for kind, fd in zip(_KINDS, (mounted.fuse_fd, held_fd, note), strict=True):
            systemd.notify(f"FDSTORE=1\nFDNAME={kind}.{name}", environ, fds=[fd])
    finally:
        os.close(note)


def unstore(name: str, environ: Mapping[str, str] = os.environ) -> None:
    """Has the service manager forget it."""
    for kind in _KINDS:
        systemd.notify(f"FDSTOREREMOVE=1\nFDNAME={kind}.{name}", environ)


def stored(environ: Mapping[str, str] = os.environ) -> Sequence[Inherited]:
    """The mounts that the service manager kept for us. Once: their descriptors are the caller's."""
    found: dict[str, dict[str, int]] = {}
    for label, fd in systemd.stored(environ):
        kind, _, name = label.partition(".")
        if kind not in _KINDS or kind in found.get(name, {}):
            os.close(fd)
            continue
        found.setdefault(name, {})[kind] = fd
    mounts = []
    for name, fds in found.items():
        with suppress(KeyError, msgspec.DecodeError):
            note = msgspec.json.decode(_content(fds["note"]), type=Note)
            mounts.append(Inherited(name=name, note=note, fuse_fd=fds.pop("fuse"), held_fd=fds.pop("held")))
        for fd in fds.values():
            os.close(fd)
    return mounts


def _memory(content: bytes) -> int:
    fd = os.memfd_create("nbmountd-handover", os.MFD_CLOEXEC)
    os.pwrite(fd, content, 0)
    return fd


def _content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)
