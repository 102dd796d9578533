"""From places to file ids: which space a place is in, what is there now, and whole listings.

It knows nothing of contents and changes nothing. Where the caller knows the id of the directory, an object is found with
one request, a listing of one entry that begins at its name; else the path is walked from the root of what is shown.
"""

from __future__ import annotations

from nbmountd.backends.onedata_answers import Told
from nbmountd.backends.onedata_errors import BadInput
from nbmountd.backends.onedata_spaces import Space, Spaces
from nbmountd.config import OnedataOptions
from nbmountd.errors import NameRefused, ParentMissing, RemoteDenied, RemoteNotFound, RemoteProtocolError
from nbmountd.model import Kind, Place

TEMPORARY = ".nbmountd-upload-"
"""Names that begin so are uploads under way: never shown, removed when older than TEMPORARY_AGE seconds."""
TEMPORARY_AGE = 24 * 3600

MAX_NAME_BYTES = 255
MAX_PAGES = 10_000

Names = tuple[str, ...]
"""A path from the root of the space, or of the folder in it that is shown."""


class Paths:
    """The places of one mount."""

    def __init__(self, options: OnedataOptions, spaces: Spaces, *, read_only: bool) -> None:
        self._one_space = options.space is not None
        self._spaces = spaces
        self._read_only = read_only
        self.folder: Names = tuple(part for part in (options.folder or "").split("/") if part)

    def is_top(self, place: Place) -> bool:
        """Whether it is the directory of all spaces, which no provider has."""
        return not place.path and not self._one_space

    async def where(self, place: Place) -> tuple[Space, Names]:
        """The space that `place` is in, and the path there. Raises RemoteNotFound for a space that there is not."""
        if self._one_space:
            return await self._spaces.only(), place.path
        return await self._spaces.named(place.path[0]), place.path[1:]

    async def for_change(self, place: Place) -> tuple[Space, Names]:
        """`where`, if something may be changed there. Raises RemoteDenied, NameRefused."""
        if self._read_only:
            raise RemoteDenied("the mount is read-only")
        if len(place.path) < (1 if self._one_space else 2):
            raise RemoteDenied("spaces are made and removed at Onezone")
        name = place.name
        try:
            length = len(name.encode())
        except UnicodeEncodeError:
            raise NameRefused(f"not UTF-8: {name!r}") from None
        if length > MAX_NAME_BYTES:
            raise NameRefused(f"longer than {MAX_NAME_BYTES} bytes: {name!r}")
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise NameRefused(f"no name: {name!r}")
        if name.startswith(TEMPORARY):
            raise NameRefused(f"names that begin with {TEMPORARY} are for uploads under way")
        space, names = await self.where(place)
        if not space.writable:
            raise RemoteDenied(f"the token or the provider lets nobody write to the space {space.shown!r}")
        return space, names

    async def root(self, space: Space) -> str:
        """The id of what is shown: the space (its own id stands for its root) or the folder in it."""
        if not self.folder:
            return space.id
        if self.folder not in space.paths:
            space.paths[self.folder] = await self._walk(space, space.id, self.folder)
        return space.paths[self.folder]

    async def at(self, space: Space, names: Names) -> str:
        """The id of the directory at a path."""
        return await self._walk(space, await self.root(space), names)

    async def parent(self, space: Space, names: Names, place: Place) -> str:
        """The id of the directory that has, or shall have, the object. Raises ParentMissing."""
        if place.parent_id is not None:
            return place.parent_id
        try:
            return await self.at(space, names[:-1])
        except RemoteNotFound as exc:
            raise ParentMissing(f"the directory of {place} is not there") from exc

    async def find(self, space: Space, names: Names, place: Place) -> Told:
        """What is at `place` now. Raises RemoteNotFound."""
        if not names:
            return await space.client.attributes(await self.root(space))
        return await self._child(space, place.parent_id or await self.at(space, names[:-1]), names[-1], names)

    async def file_id(self, space: Space, id: str) -> str:
        """`id`, or the file id of the root for a space's own id: CDMI knows only these."""
        if id != space.id:
            return id
        if space.root is None:
            space.root = (await space.client.attributes(space.id)).id
        return space.root

    async def children(self, space: Space, directory: str) -> list[Told]:
        """The whole listing. Names come in their order, so a page that does not go on is a fault of the server."""
        found: dict[str, Told] = {}
        token = None
        for _ in range(MAX_PAGES):
            page = await space.client.children(directory, token=token)
            before = len(found)
            found.update((one.name or "", one) for one in page.children)
            if page.last:
                told = list(found.values())
                if len(told) == 1 and told[0].kind is not Kind.DIRECTORY and told[0].id == directory:
                    raise RemoteNotFound("it is no directory")
                return told
            if page.token is None or page.token == token or len(found) == before:
                break
            token = page.token
        raise RemoteProtocolError("the listing does not come to an end")

    async def _walk(self, space: Space, id: str, names: Names) -> str:
        for name in names:
            told = await self._child(space, id, name)
            if told.kind is not Kind.DIRECTORY:
                raise RemoteNotFound(f"{name!r} is no directory")
            id = told.id
        return id

    async def _child(self, space: Space, parent: str, name: str, names: Names = ()) -> Told:
        try:
            told = await space.client.child(parent, name)
        except (RemoteDenied, BadInput):
            # A directory that may be passed but not listed, or a server that takes no name for an index.
            if not names:
                raise
            told = await self._look_up(space, names)
        if told is None and names and "@" in name:
            told = await self._look_up(space, names)  # one of two of the same name: listed as name@provider
        # A file listed tells of itself as its only child.
        if told is None or (parent != space.id and told.parent is not None and told.parent != parent):
            raise RemoteNotFound(f"there is no {name!r}")
        return told

    async def _look_up(self, space: Space, names: Names) -> Told | None:
        if "@" in space.name:
            return None  # the server splits at the first one
        try:
            id = await space.client.look_up(f"{space.name}@{space.id}", (*self.folder, *names))
        except RemoteNotFound:
            return None
        told = await space.client.attributes(id)
        return told if told.name == names[-1] else None


def is_stale_upload(told: Told, now: float) -> bool:
    """Whether it was left by an upload of more than a day ago; `now` in seconds since 1970."""
    return (told.name or "").startswith(TEMPORARY) and told.mtime is not None and now - told.mtime > TEMPORARY_AGE
