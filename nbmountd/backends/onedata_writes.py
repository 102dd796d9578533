"""Files made, replaced, written in part and cut short, so that a failure leaves the old content or can be taken up again.

It knows nothing of listings or of what the caller is told. Onedata has no conditional requests: conditions are checked
just before. Writing over a file is not atomic there, so it is replaced by a new one moved over it; only ranges are
written in place, and what a failed write left is remembered (in memory) so that doing it again is no conflict.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import trio

from nbmountd.backends.base import Body, Piece, Ticket
from nbmountd.backends.onedata_answers import Told
from nbmountd.backends.onedata_paths import TEMPORARY, Names, Paths
from nbmountd.backends.onedata_reads import LONGEST_READ, Reads
from nbmountd.backends.onedata_spaces import Space
from nbmountd.backends.onedata_xattrs import Xattrs
from nbmountd.errors import RemoteDenied, RemoteError, VersionMismatch
from nbmountd.model import Attributes, Kind, Place, Version

PIECE_READ = 1024 * 1024
"""Bytes asked of a piece at a time."""
CLEANING_LIMIT, LOOKING_LIMIT = 3.0, 5.0
"""Seconds for tidying up, and for a look at what is left, after a failure or a cancellation."""
UNFINISHED_GRACE = 5.0
"""Seconds after a write failed together with the network, in which a change is taken for its own."""


@dataclass(frozen=True)
class Target:
    """A file to be changed."""

    space: Space
    names: Names
    place: Place


class Writes:
    """The changes of files of one mount."""

    def __init__(self, paths: Paths, reads: Reads, xattrs: Xattrs) -> None:
        self._paths = paths
        self._reads = reads
        self._xattrs = xattrs
        self._unfinished: dict[str, _Unfinished] = {}
        """By file id: what a write of ours in place left when it failed."""

    async def must_have(self, target: Target, version: Version) -> Told:
        """The file, if it has `version` or what our own unfinished write on it left. Raises VersionMismatch."""
        told = await self._paths.find(target.space, target.names, target.place)
        unfinished = self._unfinished.get(told.id)
        if told.version != version and (unfinished is None or not unfinished.left_it(told, version)):
            raise VersionMismatch(f"{target.place} has another version now")
        return told

    async def create(self, target: Target, body: Body, attributes: Attributes) -> str:
        """A new file with its content in one request, which the server takes back if it fails; its id."""
        parent = await self._paths.parent(target.space, target.names, target.place)
        return await self._make(target.space, parent, target.place.name, body, attributes)

    async def replace(
        self, target: Target, body: Body, replaces: Version, attributes: Attributes, ticket: Ticket
    ) -> str:
        """A new file beside, with all that the old one had, moved over it; its id. `ticket` keeps the name beside."""
        client = target.space.client
        current = await self.must_have(target, replaces)
        if current.links > 1:  # its other names must go on showing the same file
            async with self._may_be_finished_later(target.space, current.id, replaces):
                await client.write(current.id, body, None)
            return current.id
        parent = await self._paths.parent(target.space, target.names, target.place)
        if ticket.token is not None and ticket.token.startswith(TEMPORARY):
            await self._clear_away(target.space, parent, ticket.token)
        beside = TEMPORARY + secrets.token_hex(8)
        await ticket.remember(beside)
        async with self._cleared_away_if_it_fails(target.space, parent, beside):
            id = await self._make(target.space, parent, beside, body, _inherited(attributes, current), current)
            await self._move_over(target, parent, id, replaces)
        return id

    async def write_ranges(
        self, target: Target, pieces: Sequence[Piece], size: int, replaces: Version, attributes: Attributes
    ) -> str:
        """Writes the pieces in place and sets the size; the file's id, another one after it was cut."""
        current = await self.must_have(target, replaces)
        if 0 < size < (current.size or 0):
            return await self._shorten(target, current, pieces, size, attributes)
        client = target.space.client
        async with self._may_be_finished_later(target.space, current.id, replaces):
            await self._write_pieces(target.space, current, pieces, size)
        if attributes.mode is not None and attributes.mode != current.mode:
            with suppress(RemoteDenied):  # the bytes matter more, and only the owner may
                await client.set_mode(current.id, attributes.mode)
        if attributes.xattrs is not None and client.new_names:
            await self._xattrs.store(client, current.id, attributes.xattrs)
        return current.id

    # --- parts ---

    async def _make(
        self, space: Space, parent: str, name: str, body: Body, attributes: Attributes, like: Told | None = None
    ) -> str:
        """A new file, also one that its owner may not write: it is made writable first."""
        mode = attributes.mode
        first = None if mode is None else mode | 0o600
        id = await space.client.make(parent, name, Kind.FILE, mode=first, body=body)
        await self._dress(space, id, mode if mode != first else None, attributes, like)
        return id

    async def _dress(self, space: Space, id: str, mode: int | None, attributes: Attributes, like: Told | None) -> None:
        """Mode (unless None) and extended attributes of a new file: those of `like`, and over them the given ones."""
        if like is not None and like.has_metadata:
            await self._xattrs.copy(space.client, like.id, id)
        await self._xattrs.add(space.client, id, attributes.xattrs)
        if mode is not None:
            with suppress(RemoteDenied):
                await space.client.set_mode(id, mode)

    async def _write_pieces(self, space: Space, current: Told, pieces: Sequence[Piece], size: int) -> None:
        end = current.size or 0
        if size == 0 and end:
            await space.client.write(current.id, b"", None)
            return
        for piece in pieces:
            await space.client.write(current.id, _PieceBody(piece), piece.start)
            end = max(end, piece.stop)
        if size > end:
            await space.client.write(current.id, b"\0", size - 1)

    async def _shorten(
        self, target: Target, current: Told, pieces: Sequence[Piece], size: int, attributes: Attributes
    ) -> str:
        """The file cut to `size`: there is no such request, so its beginning goes into a new file, moved over it."""
        space, client, version = target.space, target.space.client, current.version
        assert version is not None
        parent = await self._paths.parent(space, target.names, target.place)
        attributes = _inherited(attributes, current)
        beside = TEMPORARY + secrets.token_hex(8)
        async with self._cleared_away_if_it_fails(space, parent, beside):
            id = await client.make(parent, beside, Kind.FILE)
            for start in range(0, size, LONGEST_READ):
                content = await self._reads.exactly(client, current.id, version, start, min(start + LONGEST_READ, size))
                await trio.to_thread.run_sync(_overlay, pieces, start, content)
                await client.write(id, bytes(content), start)
            await self._dress(space, id, attributes.mode, attributes, current)
            await self._move_over(target, parent, id, version)
        return id

    async def _move_over(self, target: Target, parent: str, id: str, replaces: Version) -> None:
        """Moves our file over the target if that has its version still. A lost answer is settled by the id there."""
        client, name = target.space.client, target.place.name
        await self.must_have(target, replaces)
        try:
            await client.move(id, await self._paths.file_id(target.space, parent), name, directory=False)
        except RemoteError as exc:
            if not exc.in_doubt:
                raise
            told = await client.child(parent, name)
            if told is None or told.id != id:
                raise

    @asynccontextmanager
    async def _cleared_away_if_it_fails(self, space: Space, parent: str, name: str) -> AsyncIterator[None]:
        try:
            yield
        except BaseException:
            with trio.move_on_after(CLEANING_LIMIT, shield=True), suppress(RemoteError):
                await self._clear_away(space, parent, name)
            raise

    async def _clear_away(self, space: Space, parent: str, name: str) -> None:
        left = await space.client.child(parent, name)
        if left is not None:
            await space.client.remove(left.id)

    @asynccontextmanager
    async def _may_be_finished_later(self, space: Space, id: str, base: Version) -> AsyncIterator[None]:
        """Around a write in place that may fail half way: notes what it leaves, so that the same write on the same base
        can be done again. Writing the same bytes twice does no harm, so nothing is in doubt.
        """
        try:
            yield
        except BaseException as exc:
            left = None
            failed_at = time.time()
            with trio.move_on_after(LOOKING_LIMIT, shield=True), suppress(RemoteError):
                left = (await space.client.attributes(id)).version
            if left != base:
                self._unfinished[id] = _Unfinished(base, left, failed_at + UNFINISHED_GRACE)
            if isinstance(exc, RemoteError):
                exc.in_doubt = False
            raise
        self._unfinished.pop(id, None)


@dataclass(frozen=True)
class _Unfinished:
    """A write in place on `base` that failed. `left` None: nobody could be asked what it left."""

    base: Version
    left: Version | None
    until: float

    def left_it(self, told: Told, version: Version) -> bool:
        """Whether the file is as our own write on `version` left it. Not known for sure, it must be as old as that."""
        if self.base != version:
            return False
        return told.version == self.left if self.left is not None else (told.mtime or 0) <= self.until


class _PieceBody:
    """One piece as the body of a request."""

    def __init__(self, piece: Piece) -> None:
        self.size = piece.stop - piece.start
        self._piece = piece
        self._at = piece.start

    def read(self, count: int = -1, /) -> bytes:
        left = self._piece.stop - self._at
        count = min(left, PIECE_READ if count < 0 else count)
        data = self._piece.read(self._at, count) if count else b""
        self._at += len(data)
        return data

    def rewind(self) -> None:
        self._at = self._piece.start


def _overlay(pieces: Sequence[Piece], start: int, content: bytearray) -> None:
    """Puts what `pieces` hold of [start, start + len(content)) over `content`. For worker threads."""
    stop = start + len(content)
    for piece in pieces:
        at, end = max(start, piece.start), min(stop, piece.stop)
        while at < end:
            data = piece.read(at, min(end - at, PIECE_READ))
            content[at - start : at - start + len(data)] = data
            at += len(data)


def _inherited(attributes: Attributes, current: Told) -> Attributes:
    """`attributes`, with the mode of the old file where none is given."""
    return attributes if attributes.mode is not None else Attributes(mode=current.mode, xattrs=attributes.xattrs)
