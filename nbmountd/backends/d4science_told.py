"""What StorageHub knows of an item beside its bytes: as read-only attributes for programs, and as lines for a person.

It knows nothing of listings. What only a further request tells (versions, a public link) is asked for when it is wanted;
a public link is made by asking for it, so nobody asks in passing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timezone
from typing import Any

from nbmountd.backends.d4science_answers import Unclear
from nbmountd.backends.d4science_api import StorageHub
from nbmountd.backends.d4science_items import VRE_FOLDERS, Item, details_of
from nbmountd.backends.d4science_places import Places
from nbmountd.errors import RemoteDenied, RemoteNotFound, RemoteUnsupported
from nbmountd.model import Kind, Place

PREFIX = "user.d4science."

SHOWN_VERSIONS = 20
"""That a person is told of, newest first."""


class Told:
    """Answers for one workspace."""

    def __init__(self, hub: StorageHub, places: Places) -> None:
        self._hub = hub
        self._places = places
        self._tellers: Mapping[str, Callable[[Item], Awaitable[str]]] = {
            f"{PREFIX}id": self._id,
            f"{PREFIX}owner": self._owner,
            f"{PREFIX}shared": self._shared,
            f"{PREFIX}versions": self._versions,
            f"{PREFIX}publiclink": self._public_link,
        }
        self.names = tuple(self._tellers)

    async def tell(self, place: Place, name: str) -> bytes:
        """The value of one of `names`. Raises RemoteUnsupported where the item has no such thing, RemoteError."""
        teller = self._tellers.get(name)
        if teller is None:
            raise RemoteUnsupported(f"no attribute {name}")
        item = await self._places.find(place)
        if item.id == VRE_FOLDERS:
            raise RemoteUnsupported(f"{place} is not on the server")
        return (await teller(item)).encode("utf-8", "replace")

    async def describe(self, place: Place) -> Mapping[str, str]:
        """What a person is told of the item. Raises RemoteError."""
        item = await self._places.find(place)
        told = dict(details_of(item))
        if item.kind is Kind.FILE:
            try:
                versions = version_lines(await self._hub.versions(item.id))
            except (Unclear, RemoteNotFound, RemoteDenied) as exc:
                versions = [f"not told: {exc}"]
            told["versions"] = "; ".join(reversed(versions[-SHOWN_VERSIONS:]))
            if len(versions) > SHOWN_VERSIONS:
                told["versions"] += f"; {len(versions) - SHOWN_VERSIONS} older ones"
        return told

    async def _id(self, item: Item) -> str:
        return item.id

    async def _owner(self, item: Item) -> str:
        if not item.owner:
            raise RemoteUnsupported("the server names no owner")
        return item.owner

    async def _shared(self, item: Item) -> str:
        return "yes" if item.shared or item.is_share else "no"

    async def _versions(self, item: Item) -> str:
        if item.kind is not Kind.FILE:
            raise RemoteUnsupported("folders have no versions")
        return "\n".join(version_lines(await self._hub.versions(item.id)))

    async def _public_link(self, item: Item) -> str:
        if item.kind is not Kind.FILE:
            raise RemoteUnsupported("folders have no public link here")
        return await self._hub.public_link(item.id)


def version_lines(versions: list[Mapping[str, Any]]) -> list[str]:
    """"NAME TIME" of each version in the order of their times, " current" behind one; what makes no sense is left out."""
    found = []
    for each in versions:
        name, created = each.get("name"), each.get("created")
        if not isinstance(name, str):
            continue
        known = isinstance(created, (int, float)) and 0 <= created < 2**43
        at = float(created) / 1000 if known and created is not None else 0.0
        when = datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ") if known else "?"
        shown = "".join(letter if letter.isprintable() else "?" for letter in name[:100])
        found.append((at, f"{shown} {when}" + (" current" if each.get("current") is True else "")))
    return [line for _, line in sorted(found, key=lambda pair: pair[0])]
