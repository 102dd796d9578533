"""What we have just changed, for listings that do not know of it yet: a clustered repository may lag for seconds.

How far a listing may be behind is not known; here it is believed at once about everything but our own last changes. Where
it contradicts one of those, the item itself is asked, and its answer counts. Shared between tasks: the last changes.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from nbmountd.backends.d4science_answers import Unclear
from nbmountd.backends.d4science_api import StorageHub
from nbmountd.backends.d4science_items import Item
from nbmountd.errors import RemoteNotFound

LAG = 10.0
"""Seconds for which a listing is doubted. A guess: Jackrabbit's nodes look for each other's changes every five."""


class Recent:
    """The last changes of one workspace."""

    def __init__(self, hub: StorageHub, clock: Callable[[], float] = time.monotonic) -> None:
        self._hub = hub
        self._clock = clock
        self._changed: dict[str, tuple[float, Item, bool]] = {}
        """Id -> until when, the item as we left it, and whether it is there at all; in the order of their ends."""

    def note(self, item: Item, *, removed: bool = False) -> None:
        """We have just brought the item to this state."""
        self._changed.pop(item.id, None)
        self._changed[item.id] = self._clock() + LAG, item, not removed

    async def children(self, folder: str) -> list[Item]:
        """Everything in the folder. Raises RemoteNotFound, RemoteError."""
        return await self._corrected(folder, await self._listed(folder, self._hub.children(folder)), None)

    async def named(self, folder: str, wire: str) -> list[Item]:
        """What is in the folder under that name or title. Raises RemoteNotFound, RemoteError."""
        return await self._corrected(folder, await self._listed(folder, self._hub.named(folder, wire)), wire)

    async def holds_anything(self, folder: str) -> bool:
        """Whether the folder is not empty, hidden items counted. Raises RemoteError."""
        if await self._listed(folder, self._hub.some_children(folder, 1)):
            return bool(await self.children(folder))
        return bool(await self._corrected(folder, [], None))

    async def _listed(self, folder: str, listing: Awaitable[list[Item]]) -> list[Item]:
        """What `listing` gives; nothing where only we know of the folder yet."""
        try:
            return await listing
        except (RemoteNotFound, Unclear):
            if not self._is_recent(folder) or (await self._hub.item(folder)).trashed:
                raise
            return []

    def _is_recent(self, id: str) -> bool:
        self._forget_old()
        return id in self._changed and self._changed[id][2]

    async def _corrected(self, folder: str, items: list[Item], wire: str | None) -> list[Item]:
        self._forget_old()
        if not self._changed:
            return items
        listed = {item.id: item for item in items}
        for id, (_, left, there) in list(self._changed.items()):
            item = listed.get(id)
            belongs = there and left.parent_id == folder and wire in (None, left.name)
            if belongs == (item is not None) and (item is None or _is_same(item, left)):
                continue
            if item is None and not belongs:
                continue
            try:
                now = await self._hub.item(id)
            except (RemoteNotFound, Unclear):
                listed.pop(id, None)
                continue
            if now.trashed or now.parent_id not in (folder, None) or wire not in (None, now.name, now.title):
                listed.pop(id, None)
            else:
                listed[id] = now
        return list(listed.values())

    def _forget_old(self) -> None:
        now = self._clock()
        while self._changed and next(iter(self._changed.values()))[0] < now:
            del self._changed[next(iter(self._changed))]


def _is_same(one: Item, other: Item) -> bool:
    """As far as a listing that lags would tell another one."""
    contents = [item.content.storage_id if item.content is not None else None for item in (one, other)]
    return one.name == other.name and contents[0] == contents[1]
