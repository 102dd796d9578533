"""Changes of StorageHub's items that are looked at afterwards, because its answers cannot be relied on.

It knows nothing of places. The server answers a rename or move onto a taken name with success and makes `name(1)`; it
answers 200 to a removal that failed on a lock; and answers get lost. So each change here is followed by a look at the item,
which says whether it was done, undone, or done otherwise. What was done otherwise is undone.
"""

from __future__ import annotations

import logging
import secrets
from contextlib import suppress

import trio

from nbmountd.backends.d4science_answers import Unclear
from nbmountd.backends.d4science_api import StorageHub
from nbmountd.backends.d4science_items import Item
from nbmountd.backends.d4science_recent import Recent
from nbmountd.errors import RemoteError, RemoteExists, RemoteLocked, RemoteNotFound, RemoteTimeout

log = logging.getLogger(__name__)

UNDO_TIME = 10.0
"""Seconds for taking back what went wrong, also when the caller is cancelled meanwhile."""


class Changes:
    """Verified changes. Each raises with `in_doubt` only if nothing could be found out."""

    def __init__(self, hub: StorageHub, recent: Recent) -> None:
        self._hub = hub
        self._recent = recent

    async def look(self, id: str) -> Item:
        """The item after a change of ours; failing leaves in doubt what the change came to."""
        try:
            item = await self._hub.item(id)
        except RemoteError as exc:
            exc.in_doubt = True
            raise
        self._recent.note(item, removed=bool(item.trashed))
        return item

    async def rename(self, item: Item, wire: str) -> Item:
        """The item under its new name. Raises RemoteExists when the name was taken."""
        lost = await self._sent(self._hub.rename, item.id, wire)
        now = await self.look(item.id)
        if now.name == wire and not now.trashed:
            return now
        self._raise_if_undone(item, now, lost, changed=now.name != item.name)
        await self._undo(now, item)
        raise RemoteExists(f"the name is taken: the server made {now.name!r} of {wire!r}, which was undone")

    async def relocate(self, item: Item, folder: str) -> Item:
        """The item in another folder, under the same name. Raises RemoteExists when that is taken there."""
        lost = await self._sent(self._hub.move, item.id, folder)
        now = await self.look(item.id)
        if now.parent_id in (folder, None) and now.name == item.name and not now.trashed:
            return now
        self._raise_if_undone(item, now, lost, changed=now.parent_id != item.parent_id)
        await self._undo(now, item)
        raise RemoteExists(f"the name is taken: the server made {now.name!r} of {item.name!r}, which was undone")

    async def shift(self, item: Item, folder: str, wire: str) -> Item:
        """The item in `folder` as `wire`: renamed, moved or both. Taken back when only a part of it can be done."""
        start = item
        try:
            if item.parent_id != folder:
                if item.name != wire and await self._recent.named(folder, item.name or ""):
                    # On its way it would meet another item there.
                    item = await self.rename(item, f".nbmountd-moving-{secrets.token_hex(8)}")
                item = await self.relocate(item, folder)
            if item.name != wire:
                item = await self.rename(item, wire)
        except RemoteError as exc:
            if not exc.in_doubt and item is not start:
                await self._undo(item, start)
            raise
        return item

    async def delete(self, item: Item, *, force: bool) -> None:
        """Returns when the item is gone or in the trash. Raises RemoteLocked when the server only said so."""
        lost: RemoteError | None = None
        try:
            await self._hub.delete(item.id, force=force)
        except RemoteNotFound:
            return
        except RemoteError as exc:
            if not exc.in_doubt:
                raise
            lost = exc
        try:
            now = await self.look(item.id)
        except RemoteNotFound:
            self._recent.note(item, removed=True)
            return
        except Unclear:
            if not await self._is_listed(item):
                self._recent.note(item, removed=True)
                return
            raise
        if now.trashed:
            return
        if lost is not None:
            raise lost
        raise RemoteLocked(f"the server answered that item {item.id} was removed, but it is still there")

    async def discard(self, item: Item) -> None:
        """Removes for good what we have just made by mistake; but never what was there before and only got a new version.

        Failing is not an error: it stays where it is seen.
        """
        if item.last_action != "CREATED":
            log.warning("item %s was there before and has one version more now; it is left as it is", item.id)
            return
        with trio.move_on_after(UNDO_TIME, shield=True), suppress(RemoteError):
            await self._hub.delete(item.id, force=True)

    async def _sent(self, call: object, id: str, argument: str) -> RemoteError | None:
        """Sends; the error if it may have been carried out nevertheless."""
        assert callable(call)
        try:
            await call(id, argument)
        except RemoteError as exc:
            if not exc.in_doubt:
                raise
            return exc
        return None

    def _raise_if_undone(self, before: Item, now: Item, lost: RemoteError | None, *, changed: bool) -> None:
        if now.trashed:
            raise RemoteNotFound(f"item {before.id} went to the trash meanwhile")
        if changed:
            return
        if lost is not None:
            # After a time-out the server may still be at it; in all other cases its answer was lost, and it did nothing.
            lost.in_doubt = isinstance(lost, RemoteTimeout)
            raise lost
        raise RemoteLocked(f"the server answered that item {before.id} was changed, but it is as before")

    async def _undo(self, now: Item, before: Item) -> None:
        with trio.move_on_after(UNDO_TIME, shield=True), suppress(RemoteError):
            if before.parent_id is not None and now.parent_id not in (before.parent_id, None):
                await self._hub.move(now.id, before.parent_id)
                now = await self._hub.item(now.id)
            if before.name is not None and now.name != before.name:
                await self._hub.rename(now.id, before.name)

    async def _is_listed(self, item: Item) -> bool:
        """Whether the folder still shows the item. Without a folder to ask nothing is known, so it counts as there."""
        if item.parent_id is None or item.name is None:
            return True
        return any(each.id == item.id and not each.trashed for each in await self._hub.named(item.parent_id, item.name))
