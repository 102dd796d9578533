"""Whatever strangers send is read or refused by a declared error, in bounded time and memory.

20,000 inputs here; `python -m tests.fuzz.run --inputs 1000000` and `make bench` give more.
"""

from __future__ import annotations

import gzip
import random
import resource
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from nbmountd.backends.credentials import anonymous
from nbmountd.backends.http import HTTPClient
from nbmountd.backends.http_exchange import Incoming
from nbmountd.control import schema
from nbmountd.control.client import ask
from nbmountd.control.server import open_listener, serve_requests
from nbmountd.errors import RemoteError
from tests.fuzz.mutations import mutate
from tests.fuzz.run import fuzz
from tests.fuzz.targets import MULTISTATUS, REQUESTS

SEED = 1


def test_every_parser_reads_or_refuses_what_strangers_wrote() -> None:
    outcome = fuzz(20_000, SEED)

    assert outcome.findings == []
    assert outcome.read > 2000 and sum(outcome.refused.values()) > 2000, "the mutations are neither too mild nor too wild"


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nbm-") as directory:  # a socket's path must be short
        yield Path(directory) / "control.sock"


async def test_the_control_socket_outlives_every_line(nursery: trio.Nursery, place: Path) -> None:
    """Each line is answered, or its connection ended; the next client is answered in any case."""

    async def handle(request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
        yield schema.Done(message=request.mount or "")

    nursery.start_soon(serve_requests, open_listener(place), handle)
    rng = random.Random(SEED)
    with trio.fail_after(60):
        for _ in range(400):
            line = mutate(REQUESTS, rng)
            async with await trio.open_unix_socket(place) as stream:
                await stream.send_all(line + (b"\n" if rng.random() < 0.9 else b""))
                await stream.send_eof()
                answer = b""
                while piece := await _receive(stream):
                    answer += piece
            for told in answer.splitlines():
                assert isinstance(schema.decode_reply(told), schema.Done | schema.Failed), line

        assert [reply async for reply in ask(place, schema.Ping())] == [schema.Done()]


async def _receive(stream: trio.SocketStream) -> bytes:
    try:
        return bytes(await stream.receive_some(65536))
    except trio.BrokenResourceError:
        return b""


RESPONSES = (
    b"HTTP/1.1 207 Multi-Status\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nSet-Cookie: a=b; Path=/\r\n\r\n%s"
    % (len(MULTISTATUS[0]), MULTISTATUS[0]),
    b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nETag: "x"\r\n\r\n5\r\nhello\r\n0\r\n\r\n',
    b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere.example/\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\n\x1f\x8b\x08",
)


async def test_http_that_is_none_is_one_of_our_errors(nursery: trio.Nursery) -> None:
    rng = random.Random(SEED)

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            if await _receive(stream):
                try:
                    await stream.send_all(mutate(RESPONSES, rng))
                except trio.BrokenResourceError:
                    return

    listeners = await nursery.start(trio.serve_tcp, serve, 0)
    origin = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
    http = HTTPClient(origin, credential=anonymous(), connections=4, timeout=5.0)
    answered = 0

    def read(incoming: Incoming) -> None:
        for _ in incoming.pieces():
            continue

    with trio.fail_after(60):
        for number in range(300):
            try:
                answer = await http.request("GET", origin + "/x", receive=read if number % 2 else None)
            except RemoteError:
                continue
            assert 200 <= answer.status <= 999
            answered += 1
    await http.aclose()
    assert 10 < answered < 290


async def test_a_body_that_unpacks_without_end_is_refused_early(nursery: trio.Nursery) -> None:
    """64 MiB of zeros in 64 KiB: nobody asked for compression, and an answer that nobody streams is cut after 64 KiB."""
    packed = gzip.compress(bytes(64 * 2**20))

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await _receive(stream)
            head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
            try:
                await stream.send_all(head + packed)
            except trio.BrokenResourceError:
                return

    listeners = await nursery.start(trio.serve_tcp, serve, 0)
    origin = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
    http = HTTPClient(origin, credential=anonymous(), connections=1, timeout=5.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises(RemoteError, match="more than"):
        await http.request("GET", origin + "/x")

    await http.aclose()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 16 * 2**20
