"""The HTTP layer: one request a call, bounded, cancelled at once, every failure one of ours."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from email.utils import formatdate
from functools import partial
from pathlib import Path

import pytest
import trio
import trustme

from nbmountd.backends.credentials import Credential, FileSecret, anonymous, bearer
from nbmountd.backends.http import HTTPClient
from nbmountd.backends.http_errors import error_of, retry_after
from nbmountd.backends.http_exchange import SMALL_BODY, Answer, Incoming, Question
from nbmountd.errors import (
    ConfigError,
    RemoteDenied,
    RemoteError,
    RemoteFull,
    RemoteLocked,
    RemoteNotFound,
    RemoteProtocolError,
    RemoteTimeout,
    RemoteTooLarge,
    RemoteUnavailable,
    RemoteUnsupported,
    Unauthenticated,
    VersionMismatch,
)
from tests.backends.suite import BytesBody
from tests.servers import BrokenServer
from tests.servers.broken import CONTENT
from tests.servers.process import free_port


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokenServer]:
    server = BrokenServer(tmp_path_factory.mktemp("broken"))
    with server:
        yield server


@pytest.fixture(autouse=True)
def _fresh_log(server: BrokenServer) -> None:
    server.clear_requests()


@asynccontextmanager
async def client(
    origin: str, credential: Credential | None = None, *, connections: int = 4, timeout: float = 5.0, ca: str | None = None,
    probe: Callable[[], Question] | None = None,
) -> AsyncIterator[HTTPClient]:
    http = HTTPClient(
        origin, credential=credential or anonymous(), connections=connections, timeout=timeout, ca_bundle=ca, probe=probe
    )
    try:
        yield http
    finally:
        await http.aclose()


def ports(server: BrokenServer) -> set[str]:
    """The client's ports: one for each connection."""
    return {line.split()[4] for line in server.requests()}


async def test_connections_are_used_again_after_any_small_body(server: BrokenServer) -> None:
    async with client(server.url) as http:
        for behaviour in ("plain", "status-404", "status-503", "plain"):
            await http.request("PROPFIND", server.at(behaviour))
        await http.request("PUT", server.at("plain") + "x", body=b"abc")
        await http.request("GET", server.at("plain") + "file", headers={"Range": "bytes=0-9"}, receive=drain)

    assert len(server.requests()) == 6
    assert len(ports(server)) == 1


async def test_a_body_larger_than_small_costs_the_connection_and_no_memory(server: BrokenServer) -> None:
    async with client(server.url) as http:
        answer = await http.request("GET", server.at("loud"))
        await http.request("PROPFIND", server.at("plain"))

    assert answer.status == 404
    assert len(answer.body) == SMALL_BODY
    assert len(ports(server)) == 2


async def test_a_receiver_gets_the_body_in_order_in_pieces(server: BrokenServer) -> None:
    got: list[bytes] = []

    def receive(incoming: Incoming) -> None:
        got.extend(bytes(piece) for piece in incoming.pieces(100_000))

    async with client(server.url) as http:
        answer = await http.request("GET", server.at("plain") + "file", receive=receive)
        statistics = http.statistics()

    assert b"".join(got) == CONTENT
    assert max(map(len, got)) <= 100_000
    assert answer.body == b""
    assert (statistics.requests, statistics.bytes_sent, statistics.bytes_received) == (1, 0, len(CONTENT))


async def test_a_receiver_that_stops_early_or_raises_leaves_the_client_usable(server: BrokenServer) -> None:
    class StopError(Exception):
        pass

    def early(incoming: Incoming) -> None:
        next(incoming.pieces(10))

    def failing(incoming: Incoming) -> None:
        raise StopError

    async with client(server.url) as http:
        await http.request("GET", server.at("plain") + "file", receive=early)
        with pytest.raises(StopError):
            await http.request("GET", server.at("plain") + "file", receive=failing)
        answer = await http.request("PROPFIND", server.at("plain"))

    assert answer.status == 207


async def test_redirects_are_not_followed(server: BrokenServer) -> None:
    async with client(server.url) as http:
        answer = await http.request("PROPFIND", server.at("away"))

    assert answer.status == 302
    assert len(server.requests()) == 1


async def test_cookies_are_sent_back(server: BrokenServer) -> None:
    async with client(server.url) as http:
        for _ in range(2):
            await http.request("PROPFIND", server.at("cookie"))

    first, second = (line.split()[5] for line in server.requests())
    assert first == "-"
    assert set(second.split(";")) == {"session=abc", "second=def"}


# --- bodies ---


async def test_a_body_is_sent_with_its_length_in_bounded_parts(server: BrokenServer) -> None:
    body = BytesBody(bytes(5_000_000))

    async with client(server.url) as http:
        answer = await http.request("PUT", server.at("plain") + "x", body=body)
        sent = http.statistics().bytes_sent

    assert answer.status == 201
    assert sent == body.size == body.position
    assert 0 < body.largest_request <= 16 * 2**20


async def test_errors_of_a_body_come_out_unchanged(server: BrokenServer) -> None:
    for error in (OSError("disk"), RemoteNotFound("base"), TimeoutError()):

        def fail(position: int, error: Exception = error) -> None:
            raise error

        async with client(server.url) as http:
            with pytest.raises(type(error)) as caught:
                await http.request("PUT", server.at("plain") + "x", body=BytesBody(bytes(10), fail))
        assert caught.value is error


async def test_a_body_that_is_shorter_than_it_says_is_never_sent_as_whole(server: BrokenServer) -> None:
    body = BytesBody(bytes(10))
    body.size = 20

    async with client(server.url) as http:
        with pytest.raises(RuntimeError, match="ended after 10"):
            await http.request("PUT", server.at("plain") + "x", body=body)

    assert server.requests() == []


# --- failures ---


async def test_no_connection_is_unavailable_and_without_doubt() -> None:
    origin = f"http://127.0.0.1:{free_port()}/"

    async with client(origin) as http:
        with pytest.raises(RemoteUnavailable) as caught:
            await http.request("PUT", origin + "x", body=b"1")

    assert not caught.value.in_doubt


@pytest.mark.parametrize(("method", "in_doubt"), [("GET", False), ("HEAD", False), ("PUT", True), ("MOVE", True)])
async def test_a_change_without_an_answer_is_in_doubt(server: BrokenServer, method: str, in_doubt: bool) -> None:
    async with client(server.url) as http:
        with pytest.raises(RemoteUnavailable) as caught:
            await http.request(method, server.at("vanish"))

    assert caught.value.in_doubt is in_doubt


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_a_kept_connection_that_ends_is_no_outage_for_what_changes_nothing(reset: bool) -> None:
    """Each connection serves one request; the next one meets its end (RFC 9112, 9.3.1). A question may have a body."""
    asked: list[bytes] = []
    question = b"<propfind/>"

    async def serve_once(stream: trio.SocketStream) -> None:
        for answer in (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""):
            data = bytes(await stream.receive_some(1000))
            while b"\r\n\r\n" not in data or (data.startswith(b"PROPFIND") and not data.endswith(question)):
                data += await stream.receive_some(1000)
            asked.append(data.split()[0])
            if answer:
                await stream.send_all(answer)
        if reset:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, serve_once, 0, host="127.0.0.1"))
        origin = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/"
        async with client(origin) as http:
            await http.request("OPTIONS", origin)
            await http.request("PROPFIND", origin, body=question)
            assert http.statistics().bytes_sent == 2 * len(question)
            with pytest.raises(RemoteUnavailable) as caught:
                await http.request("DELETE", origin)
        nursery.cancel_scope.cancel()

    assert asked == [b"OPTIONS", b"PROPFIND", b"PROPFIND", b"DELETE"]
    assert caught.value.in_doubt


async def test_silence_is_a_timeout(server: BrokenServer) -> None:
    async with client(server.url, timeout=0.1) as http:
        with pytest.raises(RemoteTimeout) as caught:
            await http.request("DELETE", server.at("stall"))

    assert caught.value.in_doubt


@pytest.mark.parametrize("behaviour", ["short"])
async def test_a_short_answer_is_a_protocol_error(server: BrokenServer, behaviour: str) -> None:
    async with client(server.url) as http:
        with pytest.raises(RemoteProtocolError, match="cut short"):
            await http.request("GET", server.at(behaviour) + "file", headers={"Range": "bytes=0-99999"}, receive=drain)


async def test_what_is_not_http_is_a_protocol_error() -> None:
    async def speak(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(b"220 mail.example ESMTP\r\n")

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, speak, 0, host="127.0.0.1"))
        origin = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/"
        async with client(origin) as http:
            with pytest.raises(RemoteError):
                await http.request("GET", origin)
        nursery.cancel_scope.cancel()


async def test_a_name_that_cannot_be_resolved_is_unavailable() -> None:
    async with client("http://no-such-host.invalid/") as http:
        with pytest.raises(RemoteUnavailable, match=r"no-such-host\.invalid"):
            await http.request("GET", "http://no-such-host.invalid/")


# --- cancellation ---


async def cancelled_after(start: float, call: Callable[[], object]) -> float:
    """Seconds from the cancellation of the async `call` until it ended."""
    with trio.move_on_after(start) as scope:
        await call()  # type: ignore[misc]
    assert scope.cancelled_caught
    return trio.current_time() - scope.deadline


@pytest.mark.parametrize("behaviour", ["stall", "stall-body"])
async def test_cancelling_wakes_a_thread_that_waits_for_an_answer(server: BrokenServer, behaviour: str) -> None:
    async with client(server.url, timeout=60) as http:
        took = await cancelled_after(
            0.1,
            lambda: http.request(
                "GET", server.at(behaviour) + "file", headers={"Range": "bytes=0-99999"}, receive=drain
            ),
        )

    assert took < 2


async def test_cancelling_wakes_a_thread_that_sends(server: BrokenServer) -> None:
    async with client(server.url, timeout=60) as http:
        took = await cancelled_after(
            0.1, lambda: http.request("PUT", server.at("deaf") + "x", body=BytesBody(bytes(64 * 2**20)))
        )

    assert took < 2


async def test_cancelling_wakes_a_thread_that_connects() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = []
        for _ in range(4):  # a full backlog: the kernel answers no further SYN
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            fillers.append(filler)
        origin = f"http://127.0.0.1:{listener.getsockname()[1]}/"

        async with client(origin, timeout=60) as http:
            took = await cancelled_after(0.2, lambda: http.request("GET", origin))
        for filler in fillers:
            filler.close()

    assert took < 2


async def test_cancelling_wakes_a_thread_in_a_tls_handshake() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)
        origin = f"https://127.0.0.1:{listener.getsockname()[1]}/"

        async with client(origin, timeout=60) as http:
            took = await cancelled_after(0.2, lambda: http.request("GET", origin))

    assert took < 2


async def test_closing_ends_running_requests_with_unavailable(server: BrokenServer) -> None:
    async with client(server.url, timeout=60) as http:
        async with trio.open_nursery() as nursery:

            async def request() -> None:
                with pytest.raises(RemoteUnavailable):
                    await http.request("GET", server.at("stall"))

            nursery.start_soon(request)
            await trio.to_thread.run_sync(server.wait_for_requests, 1)
            await http.aclose()
        with pytest.raises(RemoteUnavailable):
            await http.request("GET", server.at("plain"))
        await http.aclose()


# --- credentials ---


async def test_a_refused_token_is_sent_once_and_another_one_at_once(server: BrokenServer, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("expired")
    async with client(server.url, bearer(FileSecret(path))) as http:
        for _ in range(3):
            with pytest.raises(Unauthenticated, match=str(path)):
                await http.request("PROPFIND", server.at("bearer"))
        path.write_text("good")
        answer = await http.request("PROPFIND", server.at("bearer"))

    assert answer.status == 207
    assert [line.split()[3] for line in server.requests()] == ["Bearer_expired", "Bearer_good"]


async def test_many_requests_at_once_send_an_unproven_token_once(server: BrokenServer, tmp_path: Path) -> None:
    """Eleven refusals within half an hour lock out everybody behind our address (Nextcloud)."""
    path = tmp_path / "token"
    path.write_text("expired")

    async with client(server.url, bearer(FileSecret(path))) as http:

        async def refused() -> None:
            with pytest.raises(Unauthenticated):
                await http.request("PROPFIND", server.at("bearer"))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(refused)

    assert len(server.requests()) == 1


async def test_a_rotated_token_is_proven_by_the_head_of_an_answer_and_nobody_waits_for_the_body(
    server: BrokenServer, tmp_path: Path
) -> None:
    """Else, once an hour, everything waits for the one download that happens to be the first with the new token."""
    path = tmp_path / "token"
    path.write_text("old")
    halted, go_on = threading.Event(), threading.Event()

    def slow(incoming: Incoming) -> None:
        halted.set()
        assert go_on.wait(60)

    async with client(server.url, bearer(FileSecret(path))) as http:
        await http.request("PROPFIND", server.at("many-1"))
        path.write_text("rotated")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(http.request, "GET", server.at("no-version") + "file", receive=slow))
            assert await trio.to_thread.run_sync(halted.wait, 60)
            with trio.fail_after(20):
                for _ in range(3):
                    assert (await http.request("PROPFIND", server.at("many-1"))).status == 207
            go_on.set()


async def test_a_large_body_is_not_sent_with_a_token_that_a_small_question_can_prove(
    server: BrokenServer, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    path.write_text("expired")
    credential = bearer(FileSecret(path))
    question = ("PROPFIND", server.at("bearer"), {"Depth": "0"})

    async with client(server.url, credential, probe=lambda: question) as http:
        with pytest.raises(Unauthenticated):
            await http.request("PUT", server.at("bearer") + "x", body=BytesBody(b"12345"))
        refused = http.statistics()
        path.write_text("good")
        for _ in range(2):
            assert (await http.request("PUT", server.at("bearer") + "x", body=BytesBody(b"12345"))).status == 201

    assert refused.bytes_sent == 0
    assert [line.split()[0] for line in server.requests()] == ["PROPFIND", "PROPFIND", "PUT", "PUT"]


async def test_a_body_is_sent_from_the_start_after_the_token_was_renewed(server: BrokenServer, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("expired")

    def renew(position: int) -> None:
        path.write_text("good")

    body = BytesBody(b"12345", renew)

    async with client(server.url, bearer(FileSecret(path))) as http:
        answer = await http.request("PUT", server.at("bearer") + "x", body=body)
        sent = http.statistics()

    assert answer.status == 201
    assert (sent.requests, sent.bytes_sent) == (2, 10)


async def test_tokens_that_rotate_during_one_request_are_each_tried_once(server: BrokenServer, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("expired")
    coming = ["expired too", "good"]

    def renew(position: int) -> None:
        if position == 0 and coming:
            path.write_text(coming.pop(0))

    async with client(server.url, bearer(FileSecret(path))) as http:
        answer = await http.request("PUT", server.at("bearer") + "x", body=BytesBody(b"12345", renew))

    assert answer.status == 201
    assert [line.split()[3] for line in server.requests()] == ["Bearer_expired", "Bearer_expired_too", "Bearer_good"]


# --- TLS ---


async def test_tls_is_verified_against_the_bundle(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    (tmp_path / "work").mkdir()
    certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))

    with BrokenServer(tmp_path / "work", tls=tmp_path / "server.pem") as server:
        assert isinstance(server, BrokenServer)
        async with client(server.at("plain"), ca=str(tmp_path / "ca.pem")) as http:
            answer = await http.request("GET", server.at("plain") + "file", receive=drain)
        async with client(server.at("plain")) as http:
            with pytest.raises(RemoteUnavailable, match="TLS"):
                await http.request("GET", server.at("plain") + "file")

    assert answer.status == 200


def test_an_unreadable_bundle_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ca_bundle"):
        HTTPClient(
            "https://dav.example", credential=anonymous(), connections=1, timeout=1, ca_bundle=str(tmp_path / "none.pem")
        )


# --- the table of errors ---


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (302, RemoteProtocolError),
        (400, RemoteDenied),
        (401, Unauthenticated),
        (403, RemoteDenied),
        (404, RemoteNotFound),
        (405, RemoteUnsupported),
        (408, RemoteTimeout),
        (412, VersionMismatch),
        (413, RemoteTooLarge),
        (423, RemoteLocked),
        (429, RemoteUnavailable),
        (499, RemoteDenied),
        (500, RemoteUnavailable),
        (501, RemoteUnsupported),
        (503, RemoteUnavailable),
        (504, RemoteTimeout),
        (507, RemoteFull),
    ],
)
def test_a_status_is_one_error_and_shows_nothing_that_the_server_wrote(status: int, kind: type[RemoteError]) -> None:
    error = error_of(Answer(status, {"retry-after": "7"}, b"SECRET"), "PUT /x")

    assert type(error) is kind
    assert str(status) in str(error)
    assert "SECRET" not in str(error)
    assert error.retry_after in (7.0, None)


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after({"retry-after": "120"}) == 120
    assert retry_after({}) is None
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({"retry-after": "-5"}) is None
    assert retry_after({"retry-after": "99999999999999999999"}) == 24 * 3600
    assert retry_after({"retry-after": formatdate(time.time() - 60, usegmt=True)}) == 0
    soon = retry_after({"retry-after": formatdate(time.time() + 60, usegmt=True)})
    assert soon is not None
    assert 55 < soon <= 60


def drain(incoming: Incoming) -> None:
    for _ in incoming.pieces():
        pass
