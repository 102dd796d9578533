"""One Oneprovider: a method a request, each with the right token, in the generation of names that the provider speaks.

It knows nothing of places, versions' meaning or what is safe. Objects are named by file ids (a space's own id stands
for its root). Redirects are never followed: of a directory's content one leads to a TAR stream, of a move to nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec
import trio

from nbmountd.backends.base import Body, Sink
from nbmountd.backends.http import HTTPStatistics
from nbmountd.backends.http_exchange import Answer, Incoming, Receive
from nbmountd.backends.hygiene import NOT_JSON
from nbmountd.backends.onedata_answers import (
    ATTRIBUTES,
    EVENTS_SINCE,
    LONG_PAGES_SINCE,
    NEW_NAMES_SINCE,
    OLD_ATTRIBUTES,
    OLD_PARENT,
    PARENT,
    Made,
    Page,
    Told,
    checked_id,
    parse_version,
)
from nbmountd.backends.onedata_errors import error_of_answer
from nbmountd.backends.onedata_tokens import TokenRefused, Tokens
from nbmountd.backends.onedata_zone import Ask, JSONClient
from nbmountd.errors import (
    RemoteExists,
    RemoteProtocolError,
    RemoteTimeout,
    RemoteUnavailable,
    RemoteUnsupported,
    Unauthenticated,
    VersionMismatch,
)
from nbmountd.model import Kind, Version

T = TypeVar("T")

API = "/api/v3/oneprovider"
PAGE, OLD_PAGE = 5000, 1000
"""Entries asked for at a time. A provider allows 10,000 (1,000 before 21.02.4); 5,000 are 2.5 MB."""
BREAKS = 2
"""So often what may be repeated is sent again at once when a connection breaks: several in the pool may have ended."""
LARGE_ANSWER = 1024 * 1024
"""Bytes of JSON from which on it is not decoded on the loop: that takes a millisecond, and a thread half of one."""
GIVEN_PIECE = 256 * 1024
"""Bytes given to a sink at a time."""
CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19})")
JSON = {"Content-Type": "application/json"}
OCTETS = {"Content-Type": "application/octet-stream"}
TYPES = {Kind.FILE: "REG", Kind.DIRECTORY: "DIR", Kind.SYMLINK: "SYMLNK"}


class PastEnd(RemoteProtocolError):
    """The range is not (wholly) in the file."""


class OnedataClient:
    """Requests to one provider."""

    def __init__(self, client: JSONClient, tokens: Tokens, version: str) -> None:
        self._client = client
        self._tokens = tokens
        self.version = parse_version(version)
        self.answered_at = float("-inf")
        """When it answered last, by trio's clock."""

    @property
    def new_names(self) -> bool:
        return self.version >= NEW_NAMES_SINCE

    @property
    def may_have_events(self) -> bool:
        return self.version >= EVENTS_SINCE

    @property
    def authority(self) -> str:
        return self._client.origin.partition("://")[2]

    # --- looking ---

    async def attributes(self, id: str) -> Told:
        path = f"/data/{quote(id, safe='')}"
        if self.new_names:
            path += "?" + self._wanted(parent=True)
        return await self._json("GET", path, Told)  # older ones answer {} when asked for several: ask for none

    async def children(self, id: str, *, token: str | None = None) -> Page:
        """One page of a listing."""
        limit = PAGE if self.version >= LONG_PAGES_SINCE else OLD_PAGE
        query = f"limit={limit}&{self._wanted()}"
        if token is not None:
            query += "&" + urlencode({"token": token})
        return await self._json("GET", f"/data/{quote(id, safe='')}/children?{query}", Page)

    async def child(self, parent: str, name: str) -> Told | None:
        """The child with that very name; None if there is none. One request: listings can begin at a name."""
        query = f"limit=1&{urlencode({'index': name}, quote_via=quote)}&{self._wanted(parent=True)}"
        page = await self._json("GET", f"/data/{quote(parent, safe='')}/children?{query}", Page)
        return page.children[0] if page.children and page.children[0].name == name else None

    async def first_children(self, id: str, count: int) -> Page:
        return await self._json("GET", f"/data/{quote(id, safe='')}/children?limit={count}&{self._wanted()}", Page)

    async def look_up(self, space: str, names: Sequence[str]) -> str:
        """The id at a path. `space` is "Name@id"."""
        path = "/".join(quote(name, safe="@" if number == 0 else "") for number, name in enumerate((space, *names)))
        return checked_id((await self._json("POST", f"/lookup-file-id/{path}", Made)).id)

    async def spaces(self) -> list[dict[str, Any]]:
        """The user's spaces as this provider tells them, those of other providers too."""
        return await self._json("GET", "/spaces", list[dict[str, Any]])

    async def symlink_value(self, id: str) -> str:
        _, content = await self._ask("GET", f"/data/{quote(id, safe='')}/symlink_value")
        return content.decode("utf-8", "surrogateescape")

    async def read(self, id: str, version: Version | None, start: int, stop: int, sink: Sink) -> None:
        """The bytes [start, stop) to `sink`, in a worker thread, when it is certain that they are of `version`.

        Answers for content tell no version: they are held until a look at the attributes, made after the last byte came,
        shows it. Raises VersionMismatch, PastEnd, RemoteProtocolError for anything that is not exactly these bytes.
        """
        what, path = "GET content", f"{API}/data/{quote(id, safe='')}"
        content = bytearray()
        query = "?" + self._wanted() if self.new_names else ""

        def receive(incoming: Incoming) -> None:
            match = CONTENT_RANGE.fullmatch(incoming.headers.get("content-range", "").strip())
            if incoming.status != 206 or match is None or match[1] is None:
                raise RemoteProtocolError(f"{what}: status {incoming.status} without the range it is of")
            if (int(match[1]), int(match[2])) != (start, stop - 1):
                raise _Elsewhere
            for piece in incoming.pieces():
                content.extend(piece)
            if len(content) != stop - start:
                raise RemoteProtocolError(f"{what}: {len(content)} bytes instead of {stop - start}")

        def call(ask: Ask) -> Answer:
            content.clear()
            past = False
            try:
                headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
                answer, _ = ask("GET", path + "/content", headers, None, receive)
                past = answer.status == 416
                if answer.status >= 300 and not past:
                    raise error_of_answer(answer, what)
            except _Elsewhere:
                past = True
            if version is not None:
                answer, told = ask("GET", path + query)
                if answer.status >= 300:
                    raise error_of_answer(answer, f"GET {path}")
                if _decoded(told, Told, f"GET {path}").version != version:
                    raise VersionMismatch("the file has another version now")
            if past:
                raise PastEnd(f"{what}: {start}-{stop} is not in the file")
            try:
                _give(content, sink)
            except Exception as exc:
                raise _SinkFailed(exc) from exc
            return answer

        try:
            await self._with_token(what, call)
        except _SinkFailed as exc:
            raise exc.cause from None

    # --- changing ---

    async def make(
        self, parent: str, name: str, kind: Kind, *, mode: int | None = None, target: str | None = None,
        body: Body | None = None,
    ) -> str:
        """Makes an object, a file with `body` in the same request; its id. The name must be free: RemoteExists."""
        query = {"name": name, "type": TYPES[kind]}
        if mode is not None:
            query["mode"] = f"{mode & 0o1777:04o}"
        if target is not None:
            query["target_file_path"] = target
        path = f"/data/{quote(parent, safe='')}/children?{urlencode(query, quote_via=quote)}"
        return checked_id((await self._json("POST", path, Made, OCTETS if body is not None else {}, body)).id)

    async def write(self, id: str, body: Body | bytes, offset: int | None) -> None:
        """Writes at `offset` and keeps the rest; None empties the file first."""
        query = "" if offset is None else f"?offset={offset}"
        await self._ask("PUT", f"/data/{quote(id, safe='')}/content{query}", OCTETS, body)

    async def remove(self, id: str) -> None:
        """Removes the object, a directory with all that is in it."""
        await self._ask("DELETE", f"/data/{quote(id, safe='')}")

    async def set_mode(self, id: str, mode: int) -> None:
        await self._ask("PUT", f"/data/{quote(id, safe='')}", JSON, msgspec.json.encode({"mode": f"{mode & 0o1777:04o}"}))

    async def move(self, id: str, parent: str, name: str, *, directory: bool) -> None:
        """Moves by CDMI; a file there is replaced. `parent` is a file id, not a space's."""
        kind = "container" if directory else "object"
        headers = {"X-CDMI-Specification-Version": "1.1.1", "Content-Type": f"application/cdmi-{kind}"}
        path = f"/cdmi/cdmi_objectid/{parent}/{quote(name, safe='')}" + ("/" if directory else "")
        body = msgspec.json.encode({"move": f"/cdmi_objectid/{id}"})
        answer, _ = await self._send("PUT", path, headers, body)
        if answer.status in (301, 302, 307, 308):
            raise RemoteExists(f"there is a directory at {name!r}")  # 302 adds a slash: nothing was moved
        if answer.status >= 300:
            raise error_of_answer(answer, "PUT move")

    # --- metadata ---

    async def xattrs(self, id: str) -> dict[str, Any]:
        path = f"/data/{quote(id, safe='')}/metadata/xattrs?show_internal=true"
        return await self._json("GET", path, dict[str, Any])

    async def set_xattrs(self, id: str, values: dict[str, Any]) -> None:
        await self._ask("PUT", f"/data/{quote(id, safe='')}/metadata/xattrs", JSON, msgspec.json.encode(values))

    async def remove_xattrs(self, id: str, keys: list[str]) -> None:
        body = msgspec.json.encode({"keys": keys})
        await self._ask("DELETE", f"/data/{quote(id, safe='')}/metadata/xattrs", JSON, body)

    # --- changes ---

    async def events(
        self, space: str, directories: Sequence[str], attributes: Sequence[str], last: str | None, receive: Receive
    ) -> None:
        """Gives the stream of events of these directories to `receive`. Raises RemoteUnsupported where there is none."""
        headers = {**JSON, "Accept": "text/event-stream"}
        if last is not None:
            headers["Last-Event-Id"] = last
        body = msgspec.json.encode({"observedDirectories": directories, "observedAttributes": attributes})
        path = f"{API}/spaces/{quote(space, safe='')}/events/files"
        answer, _ = await self._send("POST", path, headers, body, receive)
        if answer.status in (403, 404, 405):
            raise RemoteUnsupported("this provider has no stream of changes")
        if answer.status >= 300:
            raise error_of_answer(answer, "POST events")

    # --- how ---

    def _wanted(self, *, parent: bool = False) -> str:
        if self.new_names:
            return "&".join(f"attributes={name}" for name in (*ATTRIBUTES, *((PARENT,) if parent else ())))
        return "&".join(f"attribute={name}" for name in (*OLD_ATTRIBUTES, *((OLD_PARENT,) if parent else ())))

    async def _json(
        self, method: str, path: str, kind: type[T], headers: dict[str, str] | None = None, body: Body | bytes | None = None
    ) -> T:
        _, content = await self._ask(method, path, headers, body)
        what = f"{method} {path.partition('?')[0]}"
        try:
            if len(content) > LARGE_ANSWER:
                return await trio.to_thread.run_sync(_decoded, content, kind, what)
            return _decoded(content, kind, what)
        except RemoteProtocolError as exc:
            exc.in_doubt = method != "GET"
            raise

    async def _ask(
        self, method: str, path: str, headers: dict[str, str] | None = None, body: Body | bytes | None = None
    ) -> tuple[Answer, bytes]:
        answer, content = await self._send(method, API + path, headers or {}, body)
        if answer.status >= 300:
            raise error_of_answer(answer, f"{method} {path.partition('?')[0]}")
        return answer, content

    async def _send(
        self, method: str, path: str, headers: dict[str, str], body: Body | bytes | None = None,
        receive: Receive | None = None,
    ) -> tuple[Answer, bytes]:  # fmt: skip
        """The answer to one request, and the body that `receive` did not take."""
        results: list[tuple[Answer, bytes]] = []

        def call(ask: Ask) -> Answer:
            results.append(ask(method, path, headers, body, receive))
            return results[-1][0]

        may_break = method == "GET" or "?offset=" in path
        await self._with_token(f"{method} {path.partition('?')[0]}", call, body, may_break=may_break)
        return results[-1]

    async def _with_token(
        self, what: str, call: Callable[[Ask], Answer], body: Body | bytes | None = None, *, may_break: bool = True
    ) -> None:
        """Runs `call`; once more with another token after a 401, or on another connection when one broke.

        The server ends a connection after 30 requests or 30 s, and does not always say so: then a request meets the end.
        """
        refused = broken = 0
        while refused < 2:
            token = await self._tokens.get()
            if refused + broken and body is not None and not isinstance(body, bytes):
                body.rewind()
            try:
                await self._client.converse(what, token, call, body)
            except TokenRefused as exc:
                self._tokens.refuse(token, str(exc))
                refused += 1
            except RemoteTimeout:
                raise
            except RemoteUnavailable:
                broken += 1
                if broken > BREAKS or not may_break:
                    raise
            else:
                self.answered_at = trio.current_time()
                return
        await self._tokens.get()  # says what is wrong with all of them
        raise Unauthenticated("the provider refuses a token that Onezone has just made for it")

    def statistics(self) -> HTTPStatistics:
        return self._client.statistics()

    async def aclose(self) -> None:
        await self._client.aclose()


class _Elsewhere(Exception):
    """The answer is of another range than the one asked for; no byte of it was taken."""


class _SinkFailed(Exception):
    """Carries an exception of a sink past those who would ask again."""

    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.cause = cause


def _decoded(content: bytes, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except NOT_JSON:
        raise RemoteProtocolError(f"{what}: the answer makes no sense") from None


def _give(content: bytearray, sink: Sink) -> None:
    with memoryview(content) as view:
        for start in range(0, len(view), GIVEN_PIECE):
            sink(view[start : start + GIVEN_PIECE])
