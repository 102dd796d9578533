"""The contract between the core and a remote: a dozen verbs, each with its promises.

It knows nothing of nodes, caches or FUSE. Verbs raise `RemoteError` subclasses and nothing else. A verb that is
cancelled leaves no thread behind for longer than it takes to shut a socket down. Verbs may be called from several tasks
at once, up to `capabilities.connections`; `policy.py` keeps that limit, the deadlines and the retries, so a backend
does each request once.

What changes something and got no answer raises with `in_doubt=True`; the caller then looks (`stat`) before repeating.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from nbmountd.model import Attributes, Capabilities, Entry, Kind, Place, Quota, Version

Sink = Callable[[memoryview], None]
"""Takes the next bytes of a ranged read, in order. Called in a worker thread; the view is only valid during the call.
May raise to stop the transfer; that error comes out of `read` unchanged."""


_listener: ContextVar[Callable[[], None] | None] = ContextVar("_listener", default=None)


@contextmanager
def listening(noted: Callable[[], None]) -> Iterator[None]:
    """Inside, and in the worker threads started there, `heard` calls `noted`."""
    token = _listener.set(noted)
    try:
        yield
    finally:
        _listener.reset(token)


def heard() -> None:
    """For drivers, from any thread: a part of a long answer has come, so whoever asked may wait on for the rest."""
    noted = _listener.get()
    if noted is not None:
        noted()


class Body(Protocol):
    """The bytes of an upload, read in order in a worker thread. Never held in memory as a whole."""

    size: int

    def read(self, count: int = -1, /) -> bytes:
        """The next bytes, at most `count`; b"" at the end. May wait while missing bytes are fetched; may raise."""

    def rewind(self) -> None:
        """Starts again from offset 0, for a repeated request."""


class Ticket(Protocol):
    """A place in the journal where an upload in parts remembers where it stands, over restarts."""

    @property
    def token(self) -> str | None:
        """What `remember` stored last for this very content, or None."""

    async def remember(self, token: str) -> None:
        """Durably stores `token` before returning."""


class NoTicket:
    """A ticket for uploads that need no memory."""

    token: str | None = None

    async def remember(self, token: str) -> None:
        self.token = token


@dataclass(frozen=True, slots=True)
class Piece:
    """A dirty byte range of a body for `write_ranges`; `read(offset, count)` runs in a worker thread."""

    start: int
    stop: int
    read: Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Change:
    """Something below `place` is, or may be, different. `place.path == ()` means anything may be."""

    place: Place


@runtime_checkable
class Telling(Protocol):
    """What a backend offers beside the contract if it knows more of an object than an entry holds."""

    async def tell(self, place: Place, name: str) -> bytes:
        """The value of `name`, one of `capabilities.told_attributes`, asked now. RemoteUnsupported: not of this object."""

    async def describe(self, place: Place) -> Mapping[str, str]:
        """What a person may want to know of the object at `place`, asked now, as names and texts of one line."""


class Backend(Protocol):
    """A driver for one kind of remote, bound to one mount."""

    async def connect(self) -> Capabilities:
        """Finds out what the remote can do. Called first, and again after the remote was offline or changed.

        Sends as few requests as it can and changes nothing that a user could see.
        """

    async def stat(self, place: Place) -> Entry:
        """The object at `place`, asked anew. Raises RemoteNotFound only when the remote says so in so many words."""

    async def list(self, place: Place) -> list[Entry]:
        """All objects directly in the directory at `place`: the whole listing or an error, never a part.

        May take long, as long as `heard` is called now and then. Names are what programs will see; entries that cannot be
        shown (".", "..", "/" or NUL in the name) are left out and logged. Raises RemoteNotFound, RemoteProtocolError.
        """

    async def read(self, place: Place, version: Version | None, start: int, stop: int, sink: Sink) -> None:
        """Gives the bytes [start, stop) of exactly `version` to `sink`, in order, then returns.

        Raises VersionMismatch when the object now has another version (bytes given so far were of `version`),
        RemoteProtocolError when the answer is shorter or other than asked. `version` None: whatever is there.
        Without `capabilities.ranged_reads` only whole reads (start 0) are asked for.
        """

    async def upload(
        self, place: Place, body: Body, *, replaces: Version | None, attributes: Attributes, ticket: Ticket
    ) -> Entry:
        """Makes `body` the content of the file at `place` and returns what the remote then says of it.

        `replaces` None: the name must be free, else RemoteExists. Otherwise the file must have that version, else
        VersionMismatch (or RemoteNotFound when it is gone). `place.id` is the id of the file to replace, None for a new
        one. `attributes.mtime_ns` is stored where the remote can; other attributes where it has a place for them.
        The returned entry has at least name, kind, size and version.
        """

    async def write_ranges(
        self, place: Place, pieces: Sequence[Piece], size: int, *, replaces: Version, attributes: Attributes
    ) -> Entry:
        """Writes only `pieces` into the file, sets its size, returns the new entry. Needs `ranged_writes`."""

    async def make_directory(self, place: Place, attributes: Attributes) -> Entry:
        """Makes a directory. RemoteExists, ParentMissing."""

    async def make_symlink(self, place: Place, target: str, attributes: Attributes) -> Entry:
        """Makes a symlink. RemoteUnsupported without `native_symlinks`."""

    async def move(
        self, source: Place, target: Place, *, kind: Kind, version: Version | None, replaces: Version | None
    ) -> Entry:
        """Moves an object, keeping its identity where the remote can, and returns its entry at the target.

        `replaces` None: the target must be free, else RemoteExists; otherwise it is replaced if it has that version,
        else VersionMismatch. `version`, if given, is checked on the source where the remote can.
        """

    async def remove(self, place: Place, *, kind: Kind, version: Version | None) -> None:
        """Removes a file, a symlink or an EMPTY directory. Gone already counts as done.

        `version`, if given for a file, is checked, else VersionMismatch. A directory that holds anything: RemoteExists.
        """

    async def set_attributes(self, place: Place, attributes: Attributes, *, kind: Kind) -> Entry:
        """Stores what is not None and returns the entry. RemoteUnsupported if the remote has no place for any of it."""

    async def quota(self) -> Quota:
        """What the remote allows for this mount. Unknown values are None, not an error."""

    def changes(self) -> AsyncIterator[Change]:
        """Changes by others as they come, until closed. Needs `change_feed`. May raise to be called again."""

    async def aclose(self) -> None:
        """Ends connections. May be called twice; running verbs end with RemoteUnavailable."""
