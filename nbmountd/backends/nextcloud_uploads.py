"""Uploads to a Nextcloud that cannot damage what is there: in chunks to a folder of their own, put together by one MOVE.

It knows nothing of names, versions or conditions: those are in the headers it is given. A PUT that is cut over an existing
file leaves it truncated (Nextcloud 32), so none is sent. The ticket keeps folder and chunk size; what arrived before a
crash is not sent again. A folder that nobody asks for is removed by the server after a day.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import trio

from nbmountd.backends.base import Body, Ticket
from nbmountd.backends.http_errors import error_of
from nbmountd.backends.http_exchange import SEND_PIECE, Answer
from nbmountd.backends.multistatus import DAV
from nbmountd.backends.webdav_client import WebDAVClient
from nbmountd.backends.webdav_entries import Directory, parse_number
from nbmountd.errors import RemoteError, RemoteNotFound, RemoteProtocolError

CHUNK = 10 * 1024 * 1024
"""Bytes of a chunk: 5 MB is the least that all servers take but for the last; 5, 10 and 32 MiB were equally fast."""

MOST_CHUNKS = 9000
"""Of 10,000 that are allowed."""

PARALLEL = 4
"""Chunks in memory and under way at once, of all uploads of a mount together. The server announces 5 at most."""

TOKEN = re.compile(r"(nbmountd-[0-9a-f]{32});(\d{1,15})")
"""What a ticket remembers: folder and chunk size."""


@dataclass(frozen=True)
class Staged:
    """A whole body in chunks on the server. `folder` is a quoted path, `sha1` a hex digest, `size` in bytes."""

    folder: str
    size: int
    sha1: str


class ChunkedUploads:
    """The uploads of one user. `uploads` is the quoted path of her `uploads/USER/`."""

    def __init__(self, client: WebDAVClient, uploads: str) -> None:
        self._client = client
        self._uploads = uploads
        self._slots = trio.CapacityLimiter(PARALLEL)

    async def send(self, body: Body, url: str, ticket: Ticket) -> Staged:
        """Sends all chunks of `body`, which is to go to `url`, that are not there yet. The target is not touched."""
        chunk = max(CHUNK, -(-body.size // MOST_CHUNKS))
        folder, chunk, there = await self._begin(body.size, chunk, url, ticket)
        digest = hashlib.sha1(usedforsecurity=False)
        headers = {"Destination": url, "OC-Total-Length": str(body.size)}
        failures: list[Exception] = []

        def next_chunk(size: int) -> bytes:
            pieces = []
            while size:
                piece = body.read(min(size, SEND_PIECE))
                if not piece:
                    raise RuntimeError("a body ended before its size")
                digest.update(piece)
                pieces.append(piece)
                size -= len(piece)
            return b"".join(pieces)

        async def put(number: int, data: bytes, slot: object) -> None:
            try:
                answer = await self._client.put(f"{folder}{number:05}", headers, data)
                if answer.status >= 300:
                    raise error_of(answer, f"PUT {folder}{number:05}")
            except Exception as exc:
                fail(exc)
            finally:
                self._slots.release_on_behalf_of(slot)

        def fail(exc: Exception) -> None:
            failures.append(exc)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for number, start in enumerate(range(0, max(body.size, 1), chunk), start=1):
                slot = object()
                await self._slots.acquire_on_behalf_of(slot)
                taken = False
                try:
                    data = await trio.to_thread.run_sync(next_chunk, min(chunk, body.size - start))
                    if there.get(f"{number:05}") != len(data):
                        nursery.start_soon(put, number, data, slot)
                        taken = True
                except Exception as exc:
                    fail(exc)
                    break
                finally:
                    if not taken:
                        self._slots.release_on_behalf_of(slot)
        if failures:
            if isinstance(failures[0], RemoteError):
                failures[0].in_doubt = False
            raise failures[0]
        return Staged(folder, body.size, digest.hexdigest())

    async def _begin(self, size: int, chunk: int, url: str, ticket: Ticket) -> tuple[str, int, Mapping[str, int]]:
        """Folder, chunk size, and what is in the folder. A single chunk is not worth a ticket.

        The Destination is asked for in each request by the way of uploading that object stores have (ChunkingV2Plugin).
        """
        known = TOKEN.fullmatch(ticket.token or "")
        if known is not None and size > CHUNK:
            folder = f"{self._uploads}{known[1]}/"
            with suppress(RemoteNotFound):
                return folder, int(known[2]), await self._chunks(folder)
        name = f"nbmountd-{secrets.token_hex(16)}"
        if size > CHUNK:
            await ticket.remember(f"{name};{chunk}")
        folder = f"{self._uploads}{name}/"
        answer = await self._client.mkcol(folder, {"Destination": url})
        if answer.status >= 300:
            error = error_of(answer, f"MKCOL {folder}")
            error.in_doubt = False
            raise error
        return folder, chunk, {}

    async def _chunks(self, folder: str) -> Mapping[str, int]:
        resources, answer = await self._client.propfind(folder, 1, ("d:getcontentlength",))
        if answer.status >= 300:
            raise error_of(answer, f"PROPFIND {folder}")
        directory = Directory(folder)
        found: dict[str, int] = {}
        for resource in resources:
            name = directory.name(resource.href)
            size = parse_number(resource.properties.get(DAV + "getcontentlength"))
            if name is not None and size is not None:
                found[name] = size
        return found

    async def assemble(self, staged: Staged, headers: Mapping[str, str]) -> Answer:
        """Puts the chunks together at the Destination in `headers`. The answer may have any status."""
        if not staged.folder.startswith(self._uploads):
            raise RemoteProtocolError("an upload of another user")
        return await self._client.move(f"{staged.folder}.file", {"OC-Total-Length": str(staged.size), **headers})

    async def discard(self, staged: Staged) -> None:
        """Removes what was sent, if the server lets us; it would itself, after a day."""
        with trio.move_on_after(3, shield=True), suppress(RemoteError):
            await self._client.delete(staged.folder, {})
