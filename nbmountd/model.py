"""The words of the design as types: what a remote says of an object, what a mount is able to do, how healthy it is.

Values only; nothing here waits, opens or knows a protocol. Names are `str` with surrogateescape for bytes that are not
UTF-8. Times are integer nanoseconds since 1970, sizes are bytes.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NewType

from nbmountd.escapes import AS_THEY_ARE, Rules

Version = NewType("Version", str)
"""Opaque token naming exact bytes on the remote: equal version = equal bytes. Compared, never parsed."""

ROOT_INODE = 1


class Kind(enum.IntEnum):
    """What a node is. Stored in the database: numbers never change."""

    FILE = 1
    DIRECTORY = 2
    SYMLINK = 3
    FIFO = 4
    SOCKET = 5


@dataclass(frozen=True, slots=True)
class Place:
    """Where an object is on the remote: names from the mount's root, and ids where the remote has them.

    `id` is the object's own, `parent_id` its directory's; None means the remote gave none (or the object is new).
    The root is the empty path.
    """

    path: tuple[str, ...] = ()
    id: str | None = None
    parent_id: str | None = None

    @property
    def name(self) -> str:
        return self.path[-1] if self.path else ""

    def __str__(self) -> str:
        return "/" + "/".join(self.path)


@dataclass(frozen=True, slots=True)
class Attributes:
    """What may be stored beside the bytes. None means "leave it" when sent and "unknown" when received.

    `target` is a symlink's. `xattrs` holds whole names such as "user.colour".
    """

    mode: int | None = None
    mtime_ns: int | None = None
    target: str | None = None
    xattrs: Mapping[str, bytes] | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """What a remote says of one object at one moment.

    `version` of a directory changes at least when its own listing does, where the remote has such a thing; None where
    it has not. `size` is None when the remote does not tell. `writable` and `removable` are the remote's own word on
    permissions; what is not removable is not renamed either. `border`: a directory that is a world of its own (a space, a
    shared folder): nothing is moved into it or out of it, and it stays where it is. `checksums` maps an upper-case
    algorithm name to a lower-case hex digest. `details` is shown by `explain` and nothing else.
    """

    name: str
    kind: Kind
    size: int | None = None
    version: Version | None = None
    id: str | None = None
    attributes: Attributes = Attributes()
    writable: bool = True
    removable: bool = True
    border: bool = False
    checksums: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Quota:
    """Bytes that the remote allows; None where it does not tell or sets no limit."""

    used: int | None = None
    available: int | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a remote can do. The core asks these values, never which backend it talks to."""

    ranged_reads: bool = True
    read_unit: int = 1
    """Bytes, a power of two. Fewer are asked for at the remote as slowly as so many: what is read comes in aligned pieces
    of so much, so that scattered reads of one neighbourhood share a request."""
    ranged_writes: bool = False
    """`write_ranges` exists: only dirty extents travel."""
    conditional_writes: bool = True
    """`replaces=` and `version=` are checked by the remote in the same request; else by asking just before."""
    atomic_replace: bool = True
    """A cut upload leaves the old content, never a mixture. (A backend may reach this by a temporary name and a move.)"""
    strong_versions: bool = True
    """Equal version = equal bytes. False: size and mtime are compared as well before bytes are trusted."""
    stable_ids: bool = False
    """An object keeps its id when it is renamed or moved."""
    moves_directories: bool = True
    partitions: bool = False
    """Each directory at the root is a world of its own (a space, a share): the root itself cannot be changed, and nothing
    is moved or linked from one of them into another."""
    native_mode: bool = False
    native_mtime: bool = False
    """An mtime can be set (at upload or by `set_attributes`); False: the remote stamps its own."""
    mtime_granularity_ns: int = 1_000_000_000
    native_symlinks: bool = False
    native_xattrs: bool = False
    attributes_move: bool = True
    """A directory that moves takes along mode, target and xattrs of all that is in it. False: they are lost there (an entry
    then says None, or that a symlink is a file), and whoever moves it stores them again."""
    told_attributes: tuple[str, ...] = ()
    """Names of read-only extended attributes that are asked of the remote when a program reads one by its name. No program
    is told of them in a list: a copy with all attributes would ask for each, and asking for some does something."""
    change_feed: bool = False
    """`changes` exists."""
    propagating_versions: bool = False
    """A directory's version changes when anything below it changes."""
    checksum_algorithm: str | None = None
    """Algorithm (hashlib name) whose digest the remote keeps of an upload, so that a lost answer can be settled."""
    max_name_bytes: int = 255
    names: Rules = AS_THEY_ARE
    """How names are written that the remote refuses, changes or hides; `max_name_bytes` is of those."""
    refused_names: str = ""
    """A regular expression, in which case does not matter, for parts of names as they are written there: nothing new is called
    so, but what is called so already can be used. Empty: there are none."""
    max_file_size: int | None = None
    connections: int = 8
    """Requests that may be under way at once."""


class Health(str, enum.Enum):
    """How a remote is doing, as `policy` sees it.

    live: answers. degraded: answers with errors or late. offline: does not answer; one probe at a time looks again.
    unauthenticated: the credential is refused or missing; nothing is sent until there is another one.
    """

    LIVE = "live"
    DEGRADED = "degraded"
    OFFLINE = "offline"
    UNAUTHENTICATED = "unauthenticated"


class FileState(str, enum.Enum):
    """What `user.nbmountd.state` says of a file."""

    SAFE = "safe"
    DIRTY = "dirty"
    UPLOADING = "uploading"
    CONFLICT = "conflict"
    PARKED = "parked"
    CACHED = "cached"
    REMOTE = "remote"
    LOCAL = "local"
