"""StorageHub's requests: one method a call of its API, each sent once, answers parsed, failures as errors.

It knows nothing of places, names that programs see, or what to do after a failure. Endpoints and parameters are those of
the server's source (1.x) and its API pages (2.x). `exclude=hl:accounting` is always sent: each read adds to that list, and
it grows without end. Create calls of 2.x produce text/plain only, so `Accept` admits it everywhere.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

import msgspec

from nbmountd.backends.base import Body
from nbmountd.backends.d4science_answers import failure
from nbmountd.backends.d4science_items import Item, parse_item, parse_list
from nbmountd.backends.http import HTTPClient
from nbmountd.backends.http_exchange import Answer, Incoming, Question, Receive
from nbmountd.backends.hygiene import NOT_JSON
from nbmountd.errors import RemoteProtocolError

ACCEPT = "application/json, text/plain;q=0.9, */*;q=0.1"

PAGE = 500
"""Items a page. The server walks a folder from its start for each page, so few and large ones cost least."""

ANSWER_LIMIT = 16 * 1024 * 1024
"""Bytes of JSON in one answer; a listing that is larger (thumbnails) is asked for in smaller pages."""


class StorageHub:
    """Calls below `base`, a whole URL. Raises RemoteError alone."""

    def __init__(self, http: HTTPClient, base: str) -> None:
        self._http = http
        self._base = base.rstrip("/")

    # --- looking ---

    @property
    def question(self) -> Question:
        """The smallest one for which a token is needed."""
        return "GET", f"{self._base}?exclude=hl%3Aaccounting", {"Accept": ACCEPT}

    async def root(self) -> Item:
        """The top of the user's workspace."""
        return await self._one("")

    async def item(self, id: str) -> Item:
        """The item, which may be in the trash (`trashed`)."""
        return await self._one(f"/items/{_segment(id)}")

    async def named(self, folder: str, wire: str) -> list[Item]:
        """What is in `folder` under that name or title. The server takes "*" at either end for a wildcard."""
        items, _ = await self._list(f"/items/{_segment(folder)}/items/{_segment(wire)}")
        return items

    async def vre_folders(self) -> list[Item]:
        items, _ = await self._list("/vrefolders")
        return items

    async def children(self, folder: str) -> list[Item]:
        """Everything in the folder, hidden or not."""
        items, pages = await self._pages(folder)
        if pages > 1 and await self._count(folder) not in (len(items), None):
            items, _ = await self._pages(folder)  # pages are no snapshot: something came or went between them
        return items

    async def some_children(self, folder: str, limit: int) -> list[Item]:
        """The first `limit` at most."""
        items, _ = await self._page(folder, 0, limit)
        return items

    async def _pages(self, folder: str) -> tuple[list[Item], int]:
        found: dict[str, Item] = {}
        start, limit, pages = 0, PAGE, 0
        while True:
            try:
                items, count = await self._page(folder, start, limit)
            except _TooLarge as exc:
                if limit == 1:
                    raise RemoteProtocolError(str(exc)) from None
                limit = max(1, limit // 8)
                continue
            pages += 1
            start += count
            new = {item.id: item for item in items if item.id not in found}
            found |= new
            if count < limit or not new:
                return list(found.values()), pages

    async def _page(self, folder: str, start: int, limit: int) -> tuple[list[Item], int]:
        return await self._list(f"/items/{_segment(folder)}/children/paged", start=start, limit=limit, showHidden="true")

    async def _count(self, folder: str) -> int | None:
        answer = await self._checked("GET", f"/items/{_segment(folder)}/children/count", query={"showHidden": "true"})
        text = answer.body.strip()
        return int(text) if text.isdigit() and len(text) < 12 else None

    async def versions(self, id: str) -> list[Mapping[str, Any]]:
        """Each version's `name`, `created` (ms) and `current`."""
        what = f"/items/{_segment(id)}/versions"
        answer = await self._checked("GET", what)
        told = _json(answer.body, f"GET {what}")
        items = told.get("itemlist") if isinstance(told, dict) else None
        return [each for each in items if isinstance(each, dict)] if isinstance(items, list) else []

    async def public_link(self, id: str) -> str:
        """A URL that anybody can download the file from; asking for it makes it."""
        what = f"/items/{_segment(id)}/publiclink"
        link = (await self._checked("GET", what)).body.decode("utf-8", "replace").strip().strip('"')
        if not re.fullmatch(r"https?://[\x21-\x7e]{1,2000}", link):
            raise RemoteProtocolError(f"GET {what}: the answer is no link")
        return link

    async def size(self) -> int | None:
        """Bytes that the workspace holds; None if the answer is no number."""
        text = (await self._checked("GET", "/size")).body.strip()
        return int(text) if text.isdigit() and len(text) < 19 else None

    async def download(self, id: str, headers: Mapping[str, str], receive: Receive) -> Answer:
        return await self._checked("GET", f"/items/{_segment(id)}/download", headers=headers, receive=receive)

    # --- changing: each gives the id that the server answers with, and nothing that it says can be relied on ---

    async def upload(self, folder: str, wire: str, body: Body) -> str:
        """A new file, or a new version of the one with that name."""
        form = MultipartBody({"name": wire, "description": ""}, body)
        return await self._id(
            "POST", f"/items/{_segment(folder)}/create/FILE", headers={"Content-Type": form.content_type}, body=form
        )

    async def create_folder(self, folder: str, wire: str) -> str:
        values = {"name": wire, "description": "", "hidden": "false"}
        return await self._form("POST", f"/items/{_segment(folder)}/create/FOLDER", values)

    async def rename(self, id: str, wire: str) -> str:
        return await self._form("PUT", f"/items/{_segment(id)}/rename", {"newName": wire})

    async def move(self, id: str, folder: str) -> str:
        return await self._form("PUT", f"/items/{_segment(id)}/move", {"destinationId": folder})

    async def set_metadata(self, id: str, values: Mapping[str, Any], key: str) -> None:
        """Replaces the item's metadata. `key`: what the server calls the map."""
        await self._checked(
            "PUT",
            f"/items/{_segment(id)}/metadata",
            headers={"Content-Type": "application/json"},
            body=msgspec.json.encode({key: dict(values)}),
        )

    async def delete(self, id: str, *, force: bool) -> None:
        """To the trash; for good with `force`, and also when it is in the trash already."""
        await self._checked("DELETE", f"/items/{_segment(id)}", query={"force": "true"} if force else {})

    # --- one request ---

    async def _one(self, path: str) -> Item:
        return parse_item(await self._document(path, {}), f"GET {path or '/'}")

    async def _list(self, path: str, **query: object) -> tuple[list[Item], int]:
        return parse_list(await self._document(path, query), f"GET {path}")

    async def _document(self, path: str, query: Mapping[str, object]) -> bytes:
        document = bytearray()

        def receive(incoming: Incoming) -> None:
            document.clear()
            for piece in incoming.pieces(eager=True):
                document.extend(piece)
                if len(document) > ANSWER_LIMIT:
                    raise _TooLarge(f"GET {path}: an answer of more than {ANSWER_LIMIT} bytes")

        await self._checked("GET", path, query=query, receive=receive)
        return bytes(document)

    async def _form(self, method: str, path: str, values: Mapping[str, str]) -> str:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return await self._id(method, path, headers=headers, body=urlencode(values).encode("ascii"))

    async def _id(self, method: str, path: str, *, headers: Mapping[str, str], body: bytes | Body) -> str:
        answer = await self._checked(method, path, headers=headers, body=body)
        id = answer.body.decode("utf-8", "replace").strip().strip('"')
        if not re.fullmatch(r"[\w.:-]{1,200}", id):
            raise RemoteProtocolError(f"{method} {path}: the answer is no id", in_doubt=True)
        return id

    async def _checked(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | Body | None = None,
        receive: Receive | None = None,
    ) -> Answer:
        """The answer, which has a status below 300."""
        asked = {**(query or {}), **({"exclude": "hl:accounting"} if method == "GET" else {})}
        url = self._base + path + (f"?{urlencode(asked)}" if asked else "")
        sent = {"Accept": ACCEPT, "Accept-Encoding": "identity", **(headers or {})}
        answer = await self._http.request(method, url, headers=sent, body=body, receive=receive)
        if answer.status >= 300:
            raise failure(answer, f"{method} {path or '/'}")
        return answer


class _TooLarge(RemoteProtocolError):
    """Too many bytes for one answer."""


class MultipartBody:
    """A multipart/form-data body (RFC 7578) with small `fields` and the part `file`, streamed. Its length is known before."""

    def __init__(self, fields: Mapping[str, str], file: Body) -> None:
        boundary = f"nbmountd-{secrets.token_hex(16)}"
        self.content_type = f"multipart/form-data; boundary={boundary}"
        head = "".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n'
            f"Content-Type: text/plain; charset=UTF-8\r\n\r\n{value}\r\n"
            for name, value in fields.items()
        )
        head += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="file"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        self._edges: Sequence[bytes] = (head.encode(), f"\r\n--{boundary}--\r\n".encode())
        self._file = file
        self.size = len(self._edges[0]) + file.size + len(self._edges[1])
        self._position = 0

    def read(self, count: int = -1, /) -> bytes:
        head, tail = self._edges
        file_stop = len(head) + self._file.size
        wanted = self.size - self._position if count < 0 else count
        if self._position < len(head):
            piece = head[self._position : self._position + wanted]
        elif self._position < file_stop:
            piece = self._file.read(min(wanted, file_stop - self._position))
        else:
            at = self._position - file_stop
            piece = tail[at : at + wanted]
        self._position += len(piece)
        return piece

    def rewind(self) -> None:
        self._file.rewind()
        self._position = 0


def _segment(text: str) -> str:
    """One segment of a path. "." and ".." would be taken for directions."""
    return quote(text, safe="") if text not in (".", "..") else text.replace(".", "%2E")


def _json(body: bytes, what: str) -> Any:
    try:
        return msgspec.json.decode(body)
    except NOT_JSON:
        raise RemoteProtocolError(f"{what}: the answer is no JSON") from None
