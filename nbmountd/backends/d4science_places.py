"""Finds StorageHub's item at a place: by id where one is known, else name by name from the top of the workspace.

It knows nothing of changes. A server that says "no such id" (which it does with several statuses, some of them meaning
anything) is not believed: the names decide, and of a name the listing of its folder. Items' `path` is never looked at; below
a shared folder it may be another member's. Shared between tasks: the root, which never changes.
"""

from __future__ import annotations

from contextlib import suppress

from nbmountd.backends.d4science_answers import Unclear
from nbmountd.backends.d4science_api import StorageHub
from nbmountd.backends.d4science_items import VRE_FOLDERS, Item, shown_name, shown_names, with_id
from nbmountd.backends.d4science_names import encode
from nbmountd.backends.d4science_recent import Recent
from nbmountd.errors import NameRefused, ParentMissing, RemoteDenied, RemoteError, RemoteExists, RemoteNotFound
from nbmountd.model import Kind, Place


class Places:
    """Places of one workspace. `vre_folders`: name of the directory in the root that shows the VRE folders; "": none."""

    def __init__(self, hub: StorageHub, recent: Recent, vre_folders: str) -> None:
        self._hub = hub
        self._recent = recent
        self.vre_folders = vre_folders
        self._root: Item | None = None

    async def root(self) -> Item:
        """The top of the workspace, as it was when first asked."""
        if self._root is None:
            self._root = await self._hub.root()
        return self._root

    async def find(self, place: Place) -> Item:
        """The item at `place`, asked anew. Raises RemoteNotFound when there is none, or another one."""
        if not place.path:
            self._root = await self._hub.root()
            return self._root
        if place.path == (self.vre_folders,) and (special := await self._special()) is not None:
            return special
        if place.id is not None and place.id != VRE_FOLDERS:
            try:
                item = await self._hub.item(place.id)
            except (RemoteNotFound, Unclear):
                pass
            else:
                if await self._is_at(item, place):
                    return item
        parent = await self._known_parent(place)
        if parent is not None:
            try:
                return await self._child(parent, place)
            except (Unclear, RemoteDenied, RemoteNotFound):
                # The folder may be gone, a file by now, or in the trash: the names from the top decide.
                if len(place.path) == 1:
                    raise
        item = await self.root()
        for depth in range(len(place.path)):
            item = await self._below(item, Place(place.path[: depth + 1]))
        return item

    async def list(self, place: Place) -> dict[str, Item]:
        """What is in the directory at `place`, by the names that programs see. Raises RemoteNotFound."""
        if place.path == (self.vre_folders,) and await self._special() is not None:
            return shown_names(await self._hub.vre_folders())
        if not place.path:
            return await self._list_root()
        id = place.id
        if id is None:
            id = (await self._directory(place)).id
        try:
            items = await self._recent.children(id)
        except (RemoteNotFound, Unclear, RemoteDenied):  # denied: what is listed may have become a file
            items = await self._recent.children((await self._directory(place)).id)
        if any(item.trashed for item in items):  # an id stays readable in the trash
            items = await self._recent.children((await self._directory(place)).id)
        return shown_names(item for item in items if not item.trashed)

    async def parent(self, place: Place) -> str:
        """The id of the folder that holds `place`. Raises ParentMissing, RemoteDenied where nothing can be changed."""
        if place.path[:1] == (self.vre_folders,) and len(place.path) < 3 and await self._special() is not None:
            raise RemoteDenied(f"{place}: VRE folders are made and removed on the D4Science portal")
        known = await self._known_parent(place)
        if known is not None:
            return known
        try:
            folder = await self._directory(Place(place.path[:-1]))
        except RemoteNotFound:
            raise ParentMissing(f"the directory of {place} is not there") from None
        return folder.id

    async def explained(self, error: RemoteError, place: Place, parent: str) -> RemoteError:
        """What `error` means that a change at `place` met: its directory is gone, its name taken or refused, or itself."""
        if await self._parent_is_gone(place, parent):
            return ParentMissing(f"the directory of {place} is not there")
        if isinstance(error, RemoteNotFound):
            return error
        with suppress(RemoteError):
            found = await self.named(parent, place.name)
            if found is not None and found.kind is Kind.DIRECTORY:
                return RemoteExists(f"{place} is a directory")
        if isinstance(error, Unclear) and encode(place.name) != place.name:
            return NameRefused(f"{place}: the server failed, probably on this name: {error}")
        return error

    async def named(self, parent: str, name: str) -> Item | None:
        """What has that name in the folder, as far as the server finds it by name."""
        wire = encode(name)
        for asked in dict.fromkeys((wire, name)):  # others may have made it under the name itself
            for item in await self._recent.named(parent, asked):
                if not item.trashed and shown_name(item) == name:
                    return item
        return None

    # --- parts ---

    async def _parent_is_gone(self, place: Place, parent: str) -> bool:
        """Whether `parent` is no longer the folder that holds `place`, by the names from the top."""
        try:
            return (await self.find(Place(place.path[:-1]))).id != parent
        except RemoteNotFound:
            return True

    async def _special(self) -> Item | None:
        """The directory of VRE folders, if there are any."""
        if not self.vre_folders or not await self._hub.vre_folders():
            return None
        return Item(id=VRE_FOLDERS, name=self.vre_folders, primary_type="nthl:workspaceItem", parent_id=(await self.root()).id)

    async def _list_root(self) -> dict[str, Item]:
        items = [item for item in await self._recent.children((await self.root()).id) if not item.trashed]
        if not self.vre_folders or not (vres := await self._hub.vre_folders()):
            return shown_names(items)
        # A VRE folder is shown once, and what has the name of their directory steps aside.
        known = {item.id for item in vres}
        shown = shown_names(item for item in items if item.id not in known)
        if self.vre_folders in shown:
            aside = shown.pop(self.vre_folders)
            shown[with_id(self.vre_folders, aside)] = aside
        shown[self.vre_folders] = Item(
            id=VRE_FOLDERS, name=self.vre_folders, primary_type="nthl:workspaceItem", parent_id=(await self.root()).id
        )
        return shown

    async def _directory(self, place: Place) -> Item:
        item = await self.find(place)
        if item.kind is not Kind.DIRECTORY:
            raise RemoteNotFound(f"{place} is no directory")
        return item

    async def _known_parent(self, place: Place) -> str | None:
        if len(place.path) == 1:
            return (await self.root()).id
        return place.parent_id if place.parent_id != VRE_FOLDERS else None

    async def _is_at(self, item: Item, place: Place) -> bool:
        if item.trashed or item.kind is None:
            return False
        name = shown_name(item)
        if name is None or place.name not in (name, with_id(name, item)):
            return False
        parent = await self._known_parent(place)
        return item.is_share or None in (parent, item.parent_id) or item.parent_id == parent

    async def _below(self, folder: Item, place: Place) -> Item:
        if folder.kind is not Kind.DIRECTORY:
            raise RemoteNotFound(f"{place}: what should hold it is no directory")
        if place.path == (self.vre_folders,) and (special := await self._special()) is not None:
            return special
        if folder.id == VRE_FOLDERS:
            item = shown_names(await self._hub.vre_folders()).get(place.name)
            if item is None:
                raise RemoteNotFound(f"{place} is not there")
            return item
        return await self._child(folder.id, place)

    async def _child(self, parent: str, place: Place) -> Item:
        try:
            found = await self.named(parent, place.name)
        except NameRefused:
            found = None
        except RemoteNotFound as exc:
            raise Unclear(f"{place}: the folder that should hold it is not there") from exc
        if found is None:
            shown = shown_names(item for item in await self._recent.children(parent) if not item.trashed)
            found = shown.get(place.name)
        if found is None or found.kind is None:
            raise RemoteNotFound(f"{place} is not there")
        return found
