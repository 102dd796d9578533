"""Keeps what is known of directories fresh: decides when a listing is needed, and asks for one at a time per directory.

Freshness F of a mount is divided so that a change by others is seen within F, whoever caches: the kernel keeps names and
attributes for 0.4 F; a listing younger than 0.3 F is used as it is; one up to 0.6 F old is used and renewed behind the
program's back; an older one is waited for.

Listings are made by a task of their own (`run_listings`): who waits for one may stop waiting, and the next who looks finds
it further on, or done. So a directory is shown at last that cannot be listed within a program's patience.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from nbmountd.backends.base import Backend
from nbmountd.disk.database import Node
from nbmountd.errors import LocalError, NbmountdError, RemoteError, RemoteNotFound, RemoteTimeout, RemoteUnavailable
from nbmountd.fs import moved
from nbmountd.fs.adopt import adopt
from nbmountd.fs.ahead import LARGEST_WINDOW, Walks
from nbmountd.fs.nodes import Nodes
from nbmountd.log import get_logger
from nbmountd.model import ROOT_INODE, Place

_log = get_logger(__name__)

KERNEL_SHARE = 0.4
SOFT_SHARE = 0.3
HARD_SHARE = 0.6
ATTEMPTS = 3
"""Listings of a directory that keeps moving meanwhile."""


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise RemoteTimeout("no listing within the deadline; it goes on")


@dataclass
class _Listing:
    """One that is wanted or under way."""

    directory: Node
    asked_at: float
    ended: trio.Event = field(default_factory=trio.Event)
    error: Exception | None = None
    abandoned: bool = False
    """Whoever asked for it does not wait any longer."""


class Refresh:
    """Listings of one mount's directories. Nothing is listed before `run_listings` runs."""

    def __init__(self, nodes: Nodes, backend: Backend, *, freshness: float, deadline: float) -> None:
        self._nodes = nodes
        self._backend = backend
        self._freshness = freshness
        self._deadline = deadline
        self._listed_at: dict[int, float] = {}
        self._listed_mark: dict[int, int] = {}
        self._running: dict[int, _Listing] = {}
        self._jobs_send, self._jobs = trio.open_memory_channel[_Listing](float("inf"))
        self._wanted_send, self._wanted = trio.open_memory_channel[int](1000)
        self._walks = Walks(nodes.database.child_directories)
        self._ahead_send, self._ahead = trio.open_memory_channel[int](2 * LARGEST_WINDOW)
        self._ahead_of: set[int] = set()
        """Directories in that channel."""
        self._outdated: set[int] = set()
        """Directories that were to be forgotten while they were being listed: that listing makes nothing fresh."""
        self.listings = 0

    @property
    def kernel_timeout(self) -> float:
        """Seconds for which the kernel may keep a name or attributes."""
        return self._freshness * KERNEL_SHARE

    async def ensure_fresh(self, directory: Node) -> None:
        """Returns when the directory's nodes are what the remote had within the freshness time.

        When the remote cannot be asked, or not in time, what is known counts if the directory was ever listed; else raises
        RemoteError. A listing that takes longer goes on without its callers.
        """
        if directory.base_parent is None or directory.local_only:
            return  # the remote does not have it: local is all there is
        age = self._age(directory.ino)
        if directory.listed and age < self._freshness * SOFT_SHARE:
            return
        if directory.listed and age < self._freshness * HARD_SHARE:
            self._renew_later(directory.ino)
            return
        patience = self._deadline
        running = self._running.get(directory.ino)
        if running is not None and directory.listed:  # others have waited for it already
            patience = max(0.0, patience - (trio.current_time() - running.asked_at))
        try:
            with _patience(patience):
                if running is not None:
                    await running.ended.wait()
                    if directory.listed and self._age(directory.ino) < self._freshness * HARD_SHARE:
                        return
                await self.list_now(directory)
        except RemoteError:
            if not directory.listed:
                raise

    async def list_soon(self, directory: Node) -> None:
        """`list_now`, waited for up to the deadline only. Raises RemoteError."""
        with _patience(self._deadline):
            await self.list_now(directory)

    def _age(self, ino: int) -> float:
        """Seconds since the directory was for the last time what its listing said."""
        return trio.current_time() - self._listed_at.get(ino, float("-inf"))

    def forget(self, ino: int | None = None) -> None:
        """The next look asks the remote again: at one directory, or (None) everywhere."""
        if ino is None:
            self._listed_at.clear()
            self._outdated.update(self._running)
        else:
            self._listed_at.pop(ino, None)
            if ino in self._running:
                self._outdated.add(ino)

    def known_fresh(self, ino: int) -> None:
        """A directory that we have just made ourselves."""
        self._listed_at[ino] = trio.current_time()

    async def list_now(self, directory: Node) -> None:
        """Lists the directory on the remote and adopts the answer. The listing begins after this call: what was so when it
        was called is known when it returns. Callers who wait at the same time share one request. It goes on when the caller
        is cancelled.

        Raises RemoteError. Returns quietly when the directory lost its place meanwhile.
        """
        called = self._nodes.moment()
        while (running := self._running.get(directory.ino)) is not None:
            await running.ended.wait()
            if self._listed_mark.get(directory.ino, 0) > called:
                return
        listing = self._running[directory.ino] = _Listing(directory, trio.current_time())
        self._jobs_send.send_nowait(listing)
        try:
            await listing.ended.wait()
        except trio.Cancelled:
            listing.abandoned = True
            raise
        if listing.error is not None:
            raise listing.error

    async def run_listings(self) -> None:
        """Makes the listings, side by side; the policy limits how many. Started by worker.py."""
        async with trio.open_nursery() as nursery:
            async for listing in self._jobs:
                nursery.start_soon(self._carry_out, listing)

    async def _carry_out(self, listing: _Listing) -> None:
        try:
            for _ in range(ATTEMPTS):
                if await self._list_once(listing.directory):
                    return
            raise RemoteUnavailable("the directory was moved again and again while it was listed")
        except Exception as exc:  # it is the caller's, as if he had made the listing himself
            listing.error = exc
            if listing.abandoned and not isinstance(exc, NbmountdError):
                _log.exception("a listing failed, and nobody waits for it", inode=listing.directory.ino)
        finally:
            del self._running[listing.directory.ino]
            listing.ended.set()

    async def _list_once(self, directory: Node) -> bool:
        """Whether that is settled; False when the directory was elsewhere when the answer came."""
        mark = self._nodes.listing_begins()
        began = trio.current_time()
        self._outdated.discard(directory.ino)
        try:
            try:
                place = self._nodes.place(directory)
            except LocalError:
                return True  # removed meanwhile
            self.listings += 1
            try:
                entries = await self._backend.list(place)
            except RemoteNotFound as exc:
                if not self._is_still_at(directory, place):
                    return False
                await self._directory_vanished(directory, exc)
                return True
            if not self._is_still_at(directory, place):
                return False  # what was listed may be another directory that has taken the old place
            if moves := moved.suggested(self._nodes, directory, entries):
                moves = await self._confirmed(moves)
                if not self._is_still_at(directory, place):
                    return False
                moved.carry_out(self._nodes, directory, moves, mark)
            for unknown in adopt(self._nodes, directory, entries, mark):
                self.forget(unknown)
            if directory.ino not in self._outdated:
                now = trio.current_time()
                slow = now - began > self._deadline  # nobody would ever see it if it did not count for a while
                self._listed_at[directory.ino] = now - self._freshness * SOFT_SHARE if slow else began
            self._listed_mark[directory.ino] = mark
            return True
        finally:
            self._nodes.listing_ends(mark)

    async def _confirmed(self, moves: list[moved.Move]) -> list[moved.Move]:
        """Those of which the remote says that they are no longer where they were."""
        there: dict[int, set[str | None] | None] = {}
        for parent in {move.left for move in moves if move.left is not None}:
            self.listings += 1
            try:
                there[parent] = {entry.id for entry in await self._backend.list(self._nodes.place(self._nodes.get(parent)))}
            except RemoteNotFound:
                there[parent] = set()
            except (RemoteError, LocalError):
                there[parent] = None
        found = []
        for move in moves:
            ids = set() if move.left is None else there[move.left]
            if ids is not None and move.node.base_id not in ids:
                found.append(move)
        return found

    def _is_still_at(self, directory: Node, place: Place) -> bool:
        try:
            return self._nodes.place(directory).path == place.path
        except LocalError:
            return False

    async def _directory_vanished(self, directory: Node, cause: RemoteNotFound) -> None:
        """A 404 for a listing is believed only when the parent's listing says the same."""
        if directory.base_parent is None or directory.base_parent == directory.ino:
            raise cause
        await self.list_now(self._nodes.get(directory.base_parent))
        if directory.base_parent is not None:
            raise cause

    def _renew_later(self, ino: int) -> None:
        if ino in self._running:
            return
        try:
            self._wanted_send.send_nowait(ino)
        except trio.WouldBlock:
            return  # the next look finds it older and waits

    def opened(self, directory: Node) -> None:
        """A program has opened the directory. If it walks a tree, what it will want next is listed by `run_ahead`."""
        if directory.base_parent is None or directory.ino == ROOT_INODE or directory.parent is None:
            return
        for ino in self._walks.opened(directory.ino, directory.parent, trio.current_time()):
            node = self._nodes.database.get(ino)
            if node is None or ino in self._ahead_of or ino in self._running or not self._is_worth_listing(node):
                continue
            try:
                self._ahead_send.send_nowait(ino)
            except trio.WouldBlock:
                return
            self._ahead_of.add(ino)

    def _is_worth_listing(self, directory: Node) -> bool:
        if directory.base_parent is None or directory.local_only:
            return False
        return not directory.listed or self._age(directory.ino) >= self._freshness * SOFT_SHARE

    async def run_ahead(self) -> None:
        """Lists ahead of programs that walk. Several are started by worker.py."""
        async for ino in self._ahead.clone():
            self._ahead_of.discard(ino)
            node = self._nodes.database.get(ino)
            if node is None or ino in self._running or not self._is_worth_listing(node):
                continue
            try:
                with trio.move_on_after(self._deadline):
                    await self.list_now(node)
            except RemoteError:
                continue  # whoever opens it is told

    async def run(self) -> None:
        """Renews listings behind the programs' backs. Started by worker.py."""
        async for ino in self._wanted:
            node = self._nodes.database.get(ino)
            if node is None or node.base_parent is None or self._age(ino) < self._freshness * SOFT_SHARE:
                continue
            try:
                with trio.move_on_after(self._deadline):
                    await self.list_now(node)
            except RemoteError:
                continue  # health knows; the next look tries again
