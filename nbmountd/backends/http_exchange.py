"""One HTTP request in its worker thread: what goes out, what comes back, and what a broken connection means.

It knows nothing of the loop, of credentials or of the meaning of an answer. Errors of urllib3, http.client, ssl and socket
end here as ours.
"""

from __future__ import annotations

import email.message
import http.client
import io
import logging
import ssl
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from http.cookiejar import CookieJar
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import trio
import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    IncompleteRead,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
    SSLError,
)

from nbmountd import __version__
from nbmountd.backends.base import Body, heard
from nbmountd.backends.connections import SAFE_METHODS, Lever
from nbmountd.errors import RemoteError, RemoteProtocolError, RemoteTimeout, RemoteUnavailable

logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings quote headers that make no sense, which may echo ours

SMALL_BODY = 64 * 1024
"""Bytes of a body that nobody streams. Larger ones are cut there and cost the connection."""

PIECE = 256 * 1024
"""Bytes handed to a receiver at a time: 1.0 to 2.3 GiB/s on loopback, 0.3 to 0.7 s of processor a GiB.

Measured: 1 MiB is no faster, 64 KiB slower; reading into a buffer that is used again is no faster than urllib3's `read`.
"""

SEND_PIECE = 1024 * 1024
"""Bytes asked of a body at a time: 2.7 times the throughput of urllib3's default of 16 KiB (measured)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `body` is empty if a receiver took it, and cut after SMALL_BODY bytes for errors."""

    status: int
    headers: Mapping[str, str]
    """Names in any case. Values of repeated headers are joined by a comma."""
    body: bytes = b""


class Incoming:
    """An answer whose body has yet to be read; lives in the worker thread of one request."""

    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self.received = 0
        self._response = response
        body = getattr(response, "_fp", None)
        plain = isinstance(body, http.client.HTTPResponse) and "content-encoding" not in self.headers
        self._plain: http.client.HTTPResponse | None = body if plain else None

    def pieces(self, size: int = PIECE, *, eager: bool = False) -> Iterator[memoryview]:
        """The body in order, `size` bytes at a time, decoded if it came compressed. Each view is valid until the next.
        `eager`: what is there, up to `size`, for bodies that may come slowly.

        What is not compressed goes past urllib3 into one buffer: its `read` makes and joins new `bytes` for each piece, of
        which a chunked body costs most. The checks of `read` are made here: a body that ends too soon is an error.
        """
        if self._plain is None:
            while data := self._response.read(size):
                heard()
                self.received += len(data)
                yield memoryview(data)
            return
        view = memoryview(bytearray(size))
        while count := self._read_into(self._plain, view, eager=eager):
            heard()
            self.received += count
            yield view[:count]

    def at_end(self) -> bool:
        """Whether nothing of the body is left, so that the connection can serve again. Reads on to find out."""
        if self._plain is None:
            return not self._response.read(1)
        return not self._read_into(self._plain, memoryview(bytearray(1)))

    def _read_into(self, body: http.client.HTTPResponse, view: memoryview, *, eager: bool = False) -> int:
        try:
            if eager:
                found = body.read1(len(view))
                count = len(found)
                view[:count] = found
            else:
                count = body.readinto(view)
            if not count and body.length:
                raise http.client.IncompleteRead(b"", body.length)
        except (http.client.HTTPException, OSError) as exc:
            raise ProtocolError("the connection broke", exc) from exc
        return count

    def as_it_comes(self) -> Iterator[bytes]:
        """The body in order, in pieces as the server sends them: for bodies that never end."""
        while data := self._response.read1(PIECE):
            self.received += len(data)
            yield data


class Receive(Protocol):
    """Takes the body of a 2xx answer in the worker thread. What it raises comes out of the request unchanged."""

    def __call__(self, incoming: Incoming, /) -> None: ...


class Send(Protocol):
    """Sends one request from within the worker thread and returns its answer."""

    def __call__(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | Body | None = None,
        receive: Receive | None = None,
    ) -> Answer: ...


Question = tuple[str, str, Mapping[str, str]]
"""Method, whole URL and headers of a request without a body."""


def _was_ended(exc: HTTPError) -> bool:
    """Whether the server has ended the connection: in order, or with a reset when our request met its end."""
    cause = exc.args[-1] if exc.args else None
    return isinstance(cause, (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError))


class Exchange:
    """One request in its worker thread. `accepted` is called on the loop when the head of a 2xx answer is there."""

    def __init__(
        self,
        pool: urllib3.PoolManager,
        cookies: CookieJar,
        lever: Lever,
        authorization: tuple[str, str | None],
        what: str,
        accepted: Callable[[], None] | None = None,
    ) -> None:
        self._accepted = accepted
        self._pool = pool
        self._cookies = cookies
        self._lever = lever
        self._authorization = authorization
        self._what = what
        self._method = self._host = ""
        self.requests = self.bytes_sent = self.bytes_received = 0

    def run(self, call: Callable[[Send], Answer]) -> Answer:
        with self._lever.in_hand():
            return call(self._send)

    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | Body | None = None,
        receive: Receive | None = None,
    ) -> Answer:
        self._method = method
        self._host = urlsplit(url).netloc
        self.requests += 1
        sent = {"User-Agent": f"nbmountd/{__version__}", **headers}
        name, value = self._authorization
        if value is not None:
            sent[name] = value
        if cookie := self._cookie(url):
            sent["Cookie"] = cookie
        outgoing = None if body is None else _Outgoing(body)
        if outgoing is not None:
            sent["Content-Length"] = str(outgoing.size)  # so that it is not sent chunked: several servers mishandle that
        ask = partial(self._pool.urlopen, method, url, headers=sent, redirect=False, preload_content=False)
        repeatable = method in SAFE_METHODS and (body is None or isinstance(body, bytes))
        try:
            try:
                response = ask(body=cast(Any, outgoing))
            except (ProtocolError, SSLError) as exc:
                # A server may end an idle connection while we send on it (RFC 9112, 9.3.1): asked once more on another one.
                if not repeatable or not self._lever.kept or not _was_ended(exc):
                    raise
                self.requests += 1
                if outgoing is not None and body is not None:
                    self.bytes_sent += outgoing.sent
                    outgoing = _Outgoing(body)
                response = ask(body=cast(Any, outgoing))
        except HTTPError as exc:
            raise self._lost(exc) from exc
        except _BodyFailed as exc:
            raise exc.cause from None
        finally:
            self.bytes_sent += outgoing.sent if outgoing is not None else 0
        return self._take(url, response, receive)

    def _take(self, url: str, response: urllib3.BaseHTTPResponse, receive: Receive | None) -> Answer:
        """The answer, with its body read in any case, so that the connection can serve again; else it is closed."""
        incoming = Incoming(response)
        try:
            self._keep_cookies(url, response)
            if self._accepted is not None and 200 <= response.status < 300:
                trio.from_thread.run_sync(self._accepted)
            content = bytearray()
            if receive is not None and 200 <= response.status < 300:
                receive(incoming)
                ended = incoming.at_end()
            else:
                ended = True
                for piece in incoming.pieces(SMALL_BODY):
                    content += piece
                    if len(content) > SMALL_BODY:
                        ended = False
                        break
            if not ended:
                response.close()
                if receive is None and response.status < 300:
                    raise RemoteProtocolError(f"{self._what}: an answer of more than {SMALL_BODY} bytes")
        except BaseException as exc:
            response.close()
            if isinstance(exc, HTTPError):
                raise self._lost(exc) from exc
            raise
        finally:
            self.bytes_received += incoming.received
            response.release_conn()
        return Answer(response.status, response.headers, bytes(content[:SMALL_BODY]))

    def _lost(self, exc: HTTPError) -> RemoteError:
        """The one place where exceptions of urllib3, http.client, ssl and socket become ours."""
        in_doubt = self._lever.connected and self._method not in SAFE_METHODS
        cause: object = exc
        if isinstance(exc, ProtocolError) and len(exc.args) > 1:
            cause = exc.args[1]
        if isinstance(exc, NewConnectionError):  # before the timeout, which it is a kind of
            return RemoteUnavailable(f"{self._what}: no connection to {self._host}: {exc.__cause__}")
        if isinstance(exc, ConnectTimeoutError):
            return RemoteTimeout(f"{self._what}: no connection to {self._host} in time")
        if isinstance(exc, ReadTimeoutError) or isinstance(cause, TimeoutError):
            return RemoteTimeout(f"{self._what}: no answer in time", in_doubt=in_doubt)
        if isinstance(exc, SSLError):
            hint = " (name its certificate authority in ca_bundle)" if "CERTIFICATE_VERIFY_FAILED" in str(exc) else ""
            return RemoteUnavailable(f"{self._what}: TLS with {self._host}: {exc}{hint}", in_doubt=in_doubt)
        if isinstance(cause, (IncompleteRead, http.client.IncompleteRead)):
            return RemoteProtocolError(f"{self._what}: the answer is cut short", in_doubt=in_doubt)
        if isinstance(cause, OSError):  # RemoteDisconnected is one as well
            return RemoteUnavailable(f"{self._what}: the connection broke: {cause}", in_doubt=in_doubt)
        return RemoteProtocolError(f"{self._what}: not HTTP: {type(cause).__name__}", in_doubt=in_doubt)

    def _cookie(self, url: str) -> str | None:
        if not len(self._cookies):
            return None
        request = urllib.request.Request(url)
        self._cookies.add_cookie_header(request)
        return request.get_header("Cookie")

    def _keep_cookies(self, url: str, response: urllib3.BaseHTTPResponse) -> None:
        if "set-cookie" in response.headers:
            message = email.message.Message()
            for value in response.headers.getlist("set-cookie"):
                message["Set-Cookie"] = value
            request = urllib.request.Request(url)
            self._cookies.extract_cookies(_CookieSource(message), request)  # type: ignore[arg-type]


class _CookieSource:
    """The part of a response that a cookie jar looks at."""

    def __init__(self, message: email.message.Message) -> None:
        self._message = message

    def info(self) -> email.message.Message:
        return self._message


class _BodyFailed(Exception):
    """Carries an exception of a body past the handlers of urllib3."""

    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.cause = cause


class _Outgoing:
    """A body on its way: counts, keeps to the announced size, and lets its errors pass urllib3 unchanged."""

    def __init__(self, body: bytes | Body) -> None:
        if isinstance(body, bytes):
            self.size = len(body)
            self._read: Callable[[int], bytes] = io.BytesIO(body).read
        else:
            self.size = body.size
            self._read = body.read
        self.sent = 0

    def read(self, count: int) -> bytes:
        left = self.size - self.sent
        try:
            data = self._read(min(count, left)) if left else b""
            if left and not data:
                raise RuntimeError(f"a body of {self.size} bytes ended after {self.sent}")
        except Exception as exc:
            raise _BodyFailed(exc) from None
        self.sent += len(data)
        return data
