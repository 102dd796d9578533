"""Uploads to StorageHub, looked at afterwards: whether the bytes arrived, in the item that was meant, with their attributes.

It knows nothing of conditions; the caller has looked just before. What became something else than was meant is taken back.
Shared between tasks: `takes_metadata`, which only ever goes from True to False.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from nbmountd.backends.base import Body
from nbmountd.backends.d4science_answers import Unclear
from nbmountd.backends.d4science_api import StorageHub
from nbmountd.backends.d4science_changes import Changes
from nbmountd.backends.d4science_items import Item, stored_attributes
from nbmountd.backends.d4science_places import Places
from nbmountd.errors import (
    NameRefused,
    ParentMissing,
    RemoteDenied,
    RemoteError,
    RemoteExists,
    RemoteNotFound,
    RemoteProtocolError,
    RemoteUnsupported,
)
from nbmountd.model import Attributes, Place

log = logging.getLogger(__name__)

UPLOADS = 2
"""Times that an upload is made when the server keeps another size than was sent."""


class Uploads:
    """Verified uploads and attributes. `takes_metadata`: whether the server has a place for attributes, as far as known."""

    def __init__(self, hub: StorageHub, places: Places, changes: Changes, *, takes_metadata: bool) -> None:
        self._hub = hub
        self._places = places
        self._changes = changes
        self.takes_metadata = takes_metadata

    async def send(self, place: Place, parent: str, wire: str, body: Body, old: Item | None) -> Item:
        """The item with the bytes of `body`: a new one, or `old` with a new version. Raises RemoteExists, ParentMissing,
        NameRefused, and RemoteProtocolError in doubt when the server does not keep all bytes."""
        for attempt in range(UPLOADS):
            if attempt:
                body.rewind()
            try:
                made = await self._hub.upload(parent, wire, body)
            except (RemoteNotFound, Unclear, RemoteDenied) as exc:
                raise await self._places.explained(exc, place, parent) from exc
            except RemoteProtocolError as exc:
                if body.size == 0:  # whether it takes empty ones is not known
                    text = f"the server refuses an empty file; it is kept here until there is something in it: {exc}"
                    raise RemoteProtocolError(text, in_doubt=exc.in_doubt) from exc
                raise
            item = await self._changes.look(made)
            if old is None:
                await self.must_be_as_meant(item, place, wire)
            elif item.id != old.id:
                await self._second_item(item, place, old)
            if item.size == body.size:
                return item
            log.warning("%s: the server has %d bytes of %d", place, item.size, body.size)
        raise RemoteProtocolError(f"{place}: the server has {item.size} bytes of {body.size}", in_doubt=True)

    async def must_be_as_meant(self, item: Item, place: Place, wire: str) -> None:
        """What was just made is in no trash, and has the name that was asked for; else it is taken back."""
        if item.trashed:  # it stays there: what a removal inside the trash takes with it is not known
            raise ParentMissing(f"the directory of {place} is in the trash")
        if item.name != wire:
            await self._changes.discard(item)
            if re.search(r"\([0-9]+\)", item.name or ""):
                raise RemoteExists(f"{place} exists already: the server made {item.name!r}, which was taken back")
            raise NameRefused(f"{place}: the server makes {item.name!r} of this name")

    async def with_attributes(self, item: Item, attributes: Attributes) -> Item:
        """The item with its times and mode stored, or as it is where the server does not take them."""
        if not self.takes_metadata or (attributes.mode is None and attributes.mtime_ns is None):
            return item
        return await self.with_metadata(item, stored_attributes(item, attributes))

    async def with_metadata(self, item: Item, values: Mapping[str, Any]) -> Item:
        """The item with exactly this metadata, or as it is where the server does not take it."""
        try:
            await self._hub.set_metadata(item.id, values, item.values_key)
        except RemoteError as exc:
            if isinstance(exc, (Unclear, RemoteUnsupported, RemoteNotFound)):
                log.warning("times and modes are kept here only: %s", exc)
                self.takes_metadata = False
            else:
                log.info("the time of %s is not on the server: %s", item.id, exc)
            return item
        if item.content is not None and not item.content.storage_id:
            return await self._changes.look(item.id)  # its version is made of a time that may have changed now
        item.metadata = {"map": dict(values)}
        return item

    async def _second_item(self, item: Item, place: Place, old: Item) -> None:
        """An upload that was to replace `old` has made another item. It is taken back."""
        await self._changes.discard(item)
        await self._places.find(Place(place.path, old.id, place.parent_id))  # raises RemoteNotFound
        raise NameRefused(f"{place}: under this name the server makes a second file instead of a new version; rename it")


class BytesInMemory:
    """A small body held in memory."""

    def __init__(self, content: bytes) -> None:
        self.size = len(content)
        self._content = content
        self._position = 0

    def read(self, count: int = -1, /) -> bytes:
        stop = self.size if count < 0 else self._position + count
        piece = self._content[self._position : stop]
        self._position += len(piece)
        return piece

    def rewind(self) -> None:
        self._position = 0
