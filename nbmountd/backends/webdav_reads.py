"""Ranged reads of exactly one version, whatever the server makes of the range and the condition.

It knows nothing of listings and changes. Shared between tasks is what was learned of the server (`ranges_ignored`, and
whether GET tells a version at all); losing an update of them costs a request.
"""

from __future__ import annotations

import re

from nbmountd.backends.base import Sink
from nbmountd.backends.http_errors import error_of
from nbmountd.backends.http_exchange import Answer, Incoming
from nbmountd.backends.webdav_client import WebDAVClient
from nbmountd.backends.webdav_conditions import Conditions
from nbmountd.backends.webdav_entries import Addresses, tells
from nbmountd.errors import RemoteProtocolError, VersionMismatch
from nbmountd.model import Place, Version

CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")


class Reads:
    """The reads of one share."""

    def __init__(self, client: WebDAVClient, addresses: Addresses, conditions: Conditions) -> None:
        self._client = client
        self._addresses = addresses
        self._conditions = conditions
        self._get_tells_no_version = False
        self.ranges_ignored = False
        """The server was seen to answer with the whole file."""

    async def read(self, place: Place, version: Version | None, start: int, stop: int, sink: Sink) -> None:
        """See `Backend.read`."""
        if start >= stop:
            return
        if version is not None and self._get_tells_no_version:
            await self._conditions.must_have(place, version)
        answer = await self._get(place, version, start, stop, sink, conditional=True)
        if answer.status == 412:
            # An ETag that the server calls weak matches nothing. The tag of the answer says whether it is the version.
            answer = await self._get(place, version, start, stop, sink, conditional=False)
        if answer.status == 416:
            if version is not None:
                await self._conditions.must_have(place, version)
            raise RemoteProtocolError(f"GET {self._addresses.path(place)}: {start}-{stop} is past the end of the file")
        if answer.status >= 300:
            raise error_of(answer, f"GET {self._addresses.path(place)}")

    async def _get(
        self, place: Place, version: Version | None, start: int, stop: int, sink: Sink, *, conditional: bool
    ) -> Answer:
        path = self._addresses.path(place)
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if version is not None and conditional and (tag := self._conditions.tag(version)) is not None:
            headers["If-Match"] = f'"{tag}"'
        believe = self._get_tells_no_version
        receiver = RangeReceiver(f"GET {path}", version, start, stop, sink, believe=believe)
        try:
            return await self._client.get(path, headers, receiver)
        except TellsNoVersion:
            assert version is not None
            await self._conditions.must_have(place, version)
            self._get_tells_no_version = True  # and not that it is another one
            receiver = RangeReceiver(f"GET {path}", version, start, stop, sink, believe=True)
            return await self._client.get(path, headers, receiver)
        finally:
            self.ranges_ignored |= receiver.range_ignored


class TellsNoVersion(Exception):
    """The answer to GET has nothing that says of which version it is; no byte was given away."""


class RangeReceiver:
    """Checks that an answer to a ranged GET is what was asked for, then gives its bytes to the sink."""

    def __init__(
        self, what: str, version: Version | None, start: int, stop: int, sink: Sink, *, believe: bool
    ) -> None:
        self.range_ignored = False
        self._what = what
        self._version = version
        self._start = start
        self._stop = stop
        self._sink = sink
        self._believe = believe

    def __call__(self, incoming: Incoming) -> None:
        headers = incoming.headers
        if incoming.status == 206:
            match = CONTENT_RANGE.fullmatch(headers.get("content-range", "").strip())
            if match is None or "content-encoding" in headers:
                raise RemoteProtocolError(f"{self._what}: a partial answer without the range it is of")
            size = None if match[3] == "*" else int(match[3])
            skip = self._start - int(match[1])  # sabre/dav 1.8 answers 0-0 with the whole file, and says so
        elif incoming.status == 200:
            match = None
            length = headers.get("content-length", "")
            size = int(length) if length.isascii() and length.isdigit() and "content-encoding" not in headers else None
            self.range_ignored = True
            skip = self._start
        else:
            raise RemoteProtocolError(f"{self._what}: status {incoming.status} for a range")
        self._check_version(incoming, size)
        if match is not None and (skip < 0 or int(match[2]) < self._stop - 1):
            raise RemoteProtocolError(f"{self._what}: bytes {match[1]}-{match[2]} instead of {self._start}-{self._stop - 1}")
        if size is not None and size < self._stop:
            raise RemoteProtocolError(f"{self._what}: the file ends at {size}, before {self._stop}")
        self._give(incoming, skip, self._stop - self._start)

    def _check_version(self, incoming: Incoming, size: int | None) -> None:
        if self._version is None:
            return
        verdict = tells(self._version, incoming.headers, size)
        if verdict is False:
            raise VersionMismatch(f"{self._what}: another version than {self._version}")
        if verdict is None and not self._believe:
            raise TellsNoVersion

    def _give(self, incoming: Incoming, skip: int, count: int) -> None:
        for piece in incoming.pieces():
            if skip >= len(piece):
                skip -= len(piece)
                continue
            part = piece[skip : skip + count]
            skip = 0
            count -= len(part)
            self._sink(part)
            if not count:
                return
        raise RemoteProtocolError(f"{self._what}: the answer is {count} bytes short")
