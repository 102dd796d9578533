"""Looks again where the remote says that something has changed, sooner than the freshness time would have it.

Used where `capabilities.change_feed` says so. A change is only a hint of where to look: what is there now, a listing says. So
a feed that is silent, late or wrong costs at most what there would be without one. It knows no backend and no kernel.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

import trio

from nbmountd.backends.base import Backend, Change
from nbmountd.disk.database import Node
from nbmountd.errors import NbmountdError, RemoteError
from nbmountd.fs.nodes import Nodes
from nbmountd.fs.refresh import Refresh
from nbmountd.log import get_logger
from nbmountd.model import ROOT_INODE, Place

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before a feed that ended is asked for again, doubled each time until something was told."""

_log = get_logger(__name__)


class Feed:
    """The feed of one mount. `run` is started by worker.py."""

    def __init__(self, nodes: Nodes, backend: Backend, refresh: Refresh) -> None:
        self._nodes = nodes
        self._backend = backend
        self._refresh = refresh
        self.told = 0
        """Changes so far."""

    async def run(self) -> None:
        pause = FIRST_PAUSE
        while True:
            before = self.told
            if self._nodes.capabilities.change_feed:
                try:
                    await self._follow()
                except RemoteError as exc:
                    _log.debug("the feed of changes ended", cause=exc)
            pause = FIRST_PAUSE if self.told != before else min(LONGEST_PAUSE, 2 * pause)
            await trio.sleep(pause)

    async def _follow(self) -> None:
        async with aclosing(cast("AsyncGenerator[Change, None]", self._backend.changes())) as changes:
            async for change in changes:
                self.told += 1
                await self._look(change.place)

    async def _look(self, place: Place) -> None:
        """Lists the directory again if programs may have seen it; else the next look asks."""
        directory = self._directory(place)
        if directory is None:
            return
        self._refresh.forget(None if not place.path else directory.ino)
        if not directory.listed or (directory.ino != ROOT_INODE and not self._nodes.known_to_kernel(directory.ino)):
            return
        try:
            await self._refresh.list_soon(directory)
        except NbmountdError as exc:
            _log.debug("cannot look at a changed directory", inode=directory.ino, cause=exc)

    def _directory(self, place: Place) -> Node | None:
        """The directory at the place, or that holds what is there, by where the remote has it; None if it is not known."""
        node = self._nodes.database.root
        for name in place.path:
            below = self._nodes.database.base_child(node.ino, name)
            if below is None:
                return node if node.is_directory else None
            node = below
        if not node.is_directory:
            return self._nodes.database.get(node.base_parent) if node.base_parent is not None else None
        return node
