"""Requests to a WebDAV server: webdavclient3 names the methods, URLs and headers, our HTTP layer carries them.

It knows nothing of versions and conditions. webdavclient3's own transport leaks a connection for every body it leaves
unread, follows redirects to log-in pages, loses the headers of errors, and cannot be cancelled; its high-level calls
send two to six requests each. So only `execute_request` and what it uses is used, with the transport replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from urllib.parse import unquote_to_bytes, urlsplit

from webdav3.client import Client

from nbmountd.backends.base import Body
from nbmountd.backends.http import HTTPClient
from nbmountd.backends.http_exchange import Answer, Incoming, Receive, Send
from nbmountd.backends.multistatus import MultiStatusParser, Resource
from nbmountd.backends.webdav_overlay import NAMESPACE
from nbmountd.errors import RemoteProtocolError

BASIC_PROPERTIES = ("d:resourcetype", "d:getcontentlength", "d:getlastmodified", "d:getetag")
OWNCLOUD_PROPERTIES = ("oc:fileid", "oc:permissions", "oc:checksums")
OVERLAY_PROPERTIES = ("n:attributes",)
QUOTA_PROPERTIES = ("d:resourcetype", "d:quota-used-bytes", "d:quota-available-bytes")


class _Requests(Client):  # type: ignore[misc]  # it has no types
    """webdavclient3 without its transport. `send` is how the request of this very call is sent."""

    def execute_request(
        self,
        action: str,
        path: str,
        data: bytes | None = None,
        headers_ext: Sequence[str] = (),
        *,
        send: Send,
        receive: Receive | None = None,
    ) -> Answer:
        headers: dict[str, str] = self.get_headers(action, list(headers_ext))
        return send(self.requests[action], self.get_url(path), headers, data, receive)


class WebDAVClient:
    """One method a WebDAV method; each sends one request and returns its answer, whatever the status."""

    def __init__(self, http: HTTPClient) -> None:
        self.http = http
        self._requests = _Requests({"webdav_hostname": http.origin})

    async def options(self, path: str) -> Answer:
        return await self._control("options", path)

    async def propfind(
        self, path: str, depth: int, properties: Sequence[str], more_headers: Sequence[str] = ()
    ) -> tuple[list[Resource], Answer]:
        """The resources of a multi-status answer, whole, or none and an answer of another status above 299.

        A missing slash at the end of a collection's path is added when the server redirects to it. Raises
        RemoteProtocolError for a 2xx answer that is no whole multi-status.
        """
        names = "".join(f"<{name}/>" for name in properties)
        body = (
            '<?xml version="1.0" encoding="utf-8"?><d:propfind xmlns:d="DAV:" xmlns:oc="http://owncloud.org/ns" '
            f'xmlns:n="{NAMESPACE}">'
            f"<d:prop>{names}</d:prop></d:propfind>"
        ).encode()
        headers = [f"Depth: {depth}", "Content-Type: application/xml; charset=utf-8", "Accept-Encoding: gzip"]
        headers += more_headers
        for _ in range(2):
            resources: list[Resource] = []
            answer = await self._control("list", path, body, headers, partial(_parse_into, resources))
            if not self._adds_slash(answer, path):
                break
            path += "/"
        return resources, answer

    async def proppatch(self, path: str, body: bytes, name: str) -> tuple[bool, Answer]:
        """Whether the property `name` ("NAMESPACE NAME"), which `body` sets or removes, was; and the answer, of any status.

        lighttpd says 204 instead of a multi-status when all is done.
        """
        resources: list[Resource] = []

        def receive(incoming: Incoming) -> None:
            if incoming.status != 204:
                _parse_into(resources, incoming)

        headers = ["Depth: 0", "Content-Type: application/xml; charset=utf-8"]
        answer = await self._control("set_property", path, body, headers, receive)
        return answer.status == 204 or any(name in resource.properties for resource in resources), answer

    async def mkcol(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return await self._control("mkdir", path, None, [f"{name}: {value}" for name, value in (headers or {}).items()])

    async def move(self, path: str, headers: Mapping[str, str]) -> Answer:
        return await self._control("move", path, None, [f"{name}: {value}" for name, value in headers.items()])

    async def delete(self, path: str, headers: Mapping[str, str]) -> Answer:
        return await self._control("clean", path, None, [f"{name}: {value}" for name, value in headers.items()])

    async def get(self, path: str, headers: Mapping[str, str], receive: Receive) -> Answer:
        return await self.http.request("GET", self.http.origin + path, headers=headers, receive=receive)

    async def put(self, path: str, headers: Mapping[str, str], body: bytes | Body) -> Answer:
        return await self.http.request("PUT", self.http.origin + path, headers=headers, body=body)

    async def put_with(self, path: str, headers: Callable[[], Mapping[str, str]], body: Body) -> Answer:
        """As `put`, with headers that are made in the thread that sends: they may read the body and rewind it."""
        url = self.http.origin + path
        return await self.http.perform(f"PUT {path}", lambda send: send("PUT", url, headers(), body), body)

    async def _control(
        self,
        action: str,
        path: str,
        data: bytes | None = None,
        headers: Sequence[str] = (),
        receive: Receive | None = None,
    ) -> Answer:
        def call(send: Send) -> Answer:
            return self._requests.execute_request(action, path, data, headers, send=send, receive=receive)

        return await self.http.perform(f"{self._requests.requests[action]} {path}", call)

    def _adds_slash(self, answer: Answer, path: str) -> bool:
        if answer.status not in (301, 302, 307, 308) or path.endswith("/"):
            return False
        try:
            target = urlsplit(answer.headers.get("location", ""))
        except ValueError:  # half an IPv6 address
            return False
        same_origin = not target.netloc or f"{target.scheme}://{target.netloc}" == self.http.origin
        return same_origin and unquote_to_bytes(target.path) == unquote_to_bytes(path + "/") and not target.query


def _parse_into(resources: list[Resource], incoming: Incoming) -> None:
    if incoming.status != 207:
        raise RemoteProtocolError(f"an answer of status {incoming.status} where a multi-status (207) belongs")
    parser = MultiStatusParser()
    for piece in incoming.pieces(64 * 1024, eager=True):
        parser.feed(piece)
    resources.extend(parser.close())
