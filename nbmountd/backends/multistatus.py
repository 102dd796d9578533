"""Reads a WebDAV multi-status body (RFC 4918, section 14.16) piece by piece, in memory that the result needs and no more.

It knows nothing of requests or of what the properties mean. The body is hostile input: no document type, no entities,
limits on everything; a body that is not a whole multi-status is an error, never an empty result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from xml.parsers import expat

from nbmountd.errors import RemoteProtocolError

DAV = "DAV: "
OWNCLOUD = "http://owncloud.org/ns "
"""Namespaces as they stand before a local name in property names here."""

BODY_LIMIT = 1 << 30
"""Bytes of one body: two million entries of 500 bytes."""

TEXT_LIMIT = 64 * 1024
"""Characters of one value."""

RESOURCE_LIMIT = 500_000
"""Resources of one body, of some 1 KiB of memory each. Compressed, that many need no more than a few megabytes to be sent."""

PROPERTY_LIMIT = 200
"""Properties of one resource. A dozen are asked for."""

DEPTH_LIMIT = 32
"""Elements inside each other. Seven are used."""

STATUS_LINE = re.compile(r"HTTP/\d(?:\.\d)? (\d{3})")


@dataclass(slots=True)
class Resource:
    """One `response` of the body.

    `href` as sent. `status` is that of the whole resource, None if only properties have one. `properties` maps
    "NAMESPACE NAME" to the value's text, for properties that have status 200; `collection` is true for a directory,
    None if the server gave no resource type.
    """

    href: str
    status: int | None
    properties: Mapping[str, str]
    collection: bool | None


class MultiStatusParser:
    """Takes the body in pieces of any size; `close` gives the resources. Both raise RemoteProtocolError."""

    def __init__(self) -> None:
        self._parser = parser = expat.ParserCreate(namespace_separator=" ")
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._characters
        parser.StartDoctypeDeclHandler = self._refuse_doctype
        self._size = 0
        self._path: list[str] = []
        self._text: list[str] = []
        self._text_size = 0
        self._resources: list[Resource] = []
        self._begin_resource()
        self._begin_propstat()

    def feed(self, data: bytes | memoryview) -> None:
        self._size += len(data)
        if self._size > BODY_LIMIT:
            raise RemoteProtocolError("the listing is too long")
        self._parse(data, final=False)

    def close(self) -> list[Resource]:
        self._parse(b"", final=True)
        return self._resources

    def _parse(self, data: bytes | memoryview, *, final: bool) -> None:
        try:
            self._parser.Parse(data, final)
        except expat.ExpatError as exc:
            raise RemoteProtocolError(f"the listing is not whole XML: {expat.errors.messages[exc.code]}") from exc

    def _refuse_doctype(self, *_: object) -> None:
        raise RemoteProtocolError("the listing has a document type")

    def _begin_resource(self) -> None:
        self._href = ""
        self._status: int | None = None
        self._properties: dict[str, str] = {}
        self._collection: bool | None = None

    def _begin_propstat(self) -> None:
        self._found: dict[str, str] = {}
        self._found_collection: bool | None = None
        self._found_status: int | None = None

    def _start(self, tag: str, _: object) -> None:
        path = self._path
        depth = len(path)
        if depth == 0 and tag != "DAV: multistatus":
            raise RemoteProtocolError("the listing is not a DAV multi-status")
        if depth >= DEPTH_LIMIT:
            raise RemoteProtocolError("the listing is nested too deep")
        path.append(tag)
        self._text.clear()
        self._text_size = 0
        if depth == 1 and tag == "DAV: response":
            self._begin_resource()
        elif depth == 2 and tag == "DAV: propstat":
            self._begin_propstat()
        elif depth == 4 and tag == "DAV: resourcetype":
            self._found_collection = False
        elif depth == 5 and tag == "DAV: collection" and path[4] == "DAV: resourcetype":
            self._found_collection = True

    def _characters(self, text: str) -> None:
        self._text_size += len(text)
        if self._text_size > TEXT_LIMIT:
            raise RemoteProtocolError("a value in the listing is too long")
        self._text.append(text)

    def _end(self, tag: str) -> None:
        path = self._path
        path.pop()
        depth = len(path)
        if depth > 4 or depth == 0:
            return  # structured values, of which only the resource type matters; `_start` has seen it
        text = "".join(self._text).strip()
        self._text.clear()
        if depth == 4 and path[3] == "DAV: prop":
            if len(self._found) >= PROPERTY_LIMIT:
                raise RemoteProtocolError("too many properties of one resource in the listing")
            self._found[tag] = text
        elif depth == 3 and tag == "DAV: status":
            self._found_status = _status(text)
        elif depth == 2 and tag == "DAV: propstat":
            if self._found_status == 200:
                self._properties.update(self._found)
                if self._found_collection is not None:
                    self._collection = self._found_collection
        elif depth == 2 and tag == "DAV: href" and not self._href:
            self._href = text
        elif depth == 2 and tag == "DAV: status":
            self._status = _status(text)
        elif depth == 1 and tag == "DAV: response":
            if not self._href:
                raise RemoteProtocolError("a resource without an address in the listing")
            if len(self._resources) >= RESOURCE_LIMIT:
                raise RemoteProtocolError(f"more than {RESOURCE_LIMIT} resources in the listing")
            self._resources.append(Resource(self._href, self._status, self._properties, self._collection))


def _status(line: str) -> int:
    match = STATUS_LINE.match(line)
    if not match:
        raise RemoteProtocolError("a status in the listing that is none")
    return int(match[1])
