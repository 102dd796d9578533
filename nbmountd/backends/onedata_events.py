"""Changes in directories that were listed, from a provider's stream of server-sent events (Oneproviders of the 25 line).

It knows nothing of what a change means. A stream tells of the direct children of directories that are named when it is
opened. So each request ends when something came, when it has been silent for the time limit, or when other directories
are to be watched; the next one names the last event, and the provider first tells what was missed. Before the first event
there is none to name: what happens between two requests then is not told, and is left to the freshness time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import suppress

import msgspec
import trio

from nbmountd.backends.base import Change
from nbmountd.backends.http_exchange import Incoming
from nbmountd.backends.hygiene import NOT_JSON
from nbmountd.backends.onedata_client import OnedataClient
from nbmountd.errors import RemoteProtocolError, RemoteTimeout
from nbmountd.model import Place

WATCHED = 500
"""Directories watched at once, the last listed ones. The provider's own limit is not known."""
PAUSE = 0.5
"""Seconds between two requests, in which changes and directories gather. A guess."""
LINE_LIMIT = 1024 * 1024
OBSERVED = ("name", "type", "size", "mtime", "posixPermissions")
"""At least one of each document that a provider keeps of a file; changes of a document nobody asks for are not told."""


class _Event(msgspec.Struct, frozen=True):
    parent: str | None = msgspec.field(default=None, name="parentFileId")


class Watch:
    """The directories of one space that are watched."""

    def __init__(self) -> None:
        self._places: OrderedDict[str, Place] = OrderedDict()
        self._last: str | None = None
        self._waiting: trio.CancelScope | None = None
        self._any = trio.Event()

    def add(self, id: str, place: Place) -> None:
        """Watches the directory from now on; a stream that waits is opened anew."""
        known = self._places.get(id) == place
        self._places[id] = place
        self._places.move_to_end(id)
        if len(self._places) > WATCHED:
            self._places.popitem(last=False)
        self._any.set()
        if not known and self._waiting is not None:
            self._waiting.cancel()

    async def changes(self, client: OnedataClient, space: str) -> AsyncGenerator[Change, None]:
        """Changes as they come. Raises RemoteError to be called again, RemoteUnsupported where there is no stream."""
        await self._any.wait()
        while True:
            watched = dict(self._places)
            parents: list[str] = []
            self._waiting = trio.CancelScope()
            with self._waiting:
                parents = await self._wait(client, space, list(watched))
            self._waiting = None
            for parent in dict.fromkeys(parents):
                if parent in watched:
                    yield Change(watched[parent])
            await trio.sleep(PAUSE)

    async def _wait(self, client: OnedataClient, space: str, directories: list[str]) -> list[str]:
        """Ids of the directories of the next events; empty when it stayed silent."""
        listener = Listener(self._last)
        with suppress(Heard, RemoteTimeout):  # silence proves nothing: the connection may be dead
            await client.events(space, directories, OBSERVED, self._last, listener)
        self._last = listener.last  # not when cancelled: what was heard then is told again
        return listener.parents


class Heard(Exception):
    """Ends a stream on purpose."""


class Listener:
    """Reads a stream up to its next events. Raises Heard with them noted, RemoteProtocolError for what is none."""

    def __init__(self, last: str | None) -> None:
        self.last = last
        """Id of the last event, for the next request."""
        self.parents: list[str] = []
        self._text = b""
        self._event, self._data, self._id = "", bytearray(), ""

    def __call__(self, incoming: Incoming) -> None:
        if "text/event-stream" not in incoming.headers.get("content-type", ""):
            raise RemoteProtocolError("not a stream of events")
        for piece in incoming.as_it_comes():
            self.feed(piece)
            if self.parents:
                raise Heard
        raise Heard

    def feed(self, piece: bytes) -> None:
        self._text += piece
        *lines, self._text = self._text.split(b"\n")
        if len(self._text) > LINE_LIMIT:
            raise RemoteProtocolError("an event without an end")
        for line in lines:
            self._line(line.rstrip(b"\r"))

    def _line(self, line: bytes) -> None:
        if not line:
            self._dispatch()
            return
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"id" and value.isdigit() and len(value) < 20:
            self._id = value.decode()
        elif name == b"event":
            self._event = value[:100].decode("utf-8", "replace")
        elif name == b"data":
            self._data += value
            if len(self._data) > LINE_LIMIT:
                raise RemoteProtocolError("an event without an end")

    def _dispatch(self) -> None:
        if self._event in ("changedOrCreated", "deleted"):
            try:
                parent = msgspec.json.decode(self._data, type=_Event).parent
            except NOT_JSON:
                raise RemoteProtocolError("an event that makes no sense") from None
            if parent is not None:
                self.parents.append(parent)
        self.last = self._id or self.last
        self._event, self._data, self._id = "", bytearray(), ""
