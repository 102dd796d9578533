"""HTTP requests in worker threads: one request a call, streamed both ways, ended when the caller is cancelled.

It knows nothing of WebDAV or of any other meaning of the answers. It follows no redirect and repeats nothing, with one
exception: after a 401 the request goes out once more if there is another credential by then.

Touched by several tasks: the connection pool (urllib3's own locks), the cookie jar (its own lock), the counters and the
addresses (on the loop only). The thread of an exchange shares nothing with the loop but its `Lever`.
"""

from __future__ import annotations

import email.message
import http
import http.client
import io
import logging
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
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
from nbmountd.backends.connections import SAFE_METHODS, Address, Lever, new_pool
from nbmountd.backends.credentials import Credential
from nbmountd.errors import (
    ConfigError,
    NameRefused,
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
from nbmountd.threads import run_interruptible

logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings quote headers that make no sense, which may echo ours


SMALL_BODY = 64 * 1024
"""Bytes of a body that nobody streams. Larger ones are cut there and cost the connection."""

PIECE = 256 * 1024
"""Bytes handed to a receiver at a time: 1.0 to 2.3 GiB/s on loopback, 0.3 to 0.7 s of processor a GiB.

Measured: 1 MiB is no faster, 64 KiB slower; reading into a buffer that is used again is no faster than urllib3's `read`.
"""

SEND_PIECE = 1024 * 1024
"""Bytes asked of a body at a time: 2.7 times the throughput of urllib3's default of 16 KiB (measured)."""

THROTTLED_WAIT = 60.0
"""Seconds to leave a server alone that says "too many requests" and not until when."""

MAINTENANCE_WAIT = 20.0
"""Seconds after which a server in maintenance mode is asked again."""

PROOF_LASTS = 2.0
"""Seconds after an answer for which its credential is taken to be good still. After a pause one request goes ahead alone, so
that of a password that was revoked meanwhile the server hears once."""

IDLE_PROOF_LASTS = 0.5
"""The same while no request is under way: a burst that follows waits for the head of its first answer, and no longer."""

PROOF_PATIENCE = 1.0
"""Seconds to wait for that one request, with a credential that was good before."""

CONNECT_TIMEOUT = 10.0
"""Seconds for a TCP connection; three tries of SYN fit in."""

ADDRESS_LIFETIME = 60.0
"""Seconds that a resolved address is used for without asking again."""


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


@dataclass(frozen=True)
class HTTPStatistics:
    """Counts since start."""

    requests: int
    """Requests sent, whatever became of them."""
    bytes_sent: int
    """Bytes of bodies."""
    bytes_received: int
    """Bytes of bodies, after decompression."""


class HTTPClient:
    """Requests to one origin with one credential, at most `connections` at a time.

    `timeout`: seconds that the server may be silent. `ca_bundle`: PEM file with the certificates to trust instead of
    the system's. `refused`: whether an answer means that the credential is not accepted. `probe`: a question with a small
    answer for which a credential is needed. Raises ConfigError when that file cannot be used.
    """

    def __init__(
        self,
        origin: str,
        *,
        credential: Credential,
        connections: int,
        timeout: float,
        ca_bundle: str | None = None,
        refused: Callable[[Answer], bool] = lambda answer: answer.status == 401,
        probe: Callable[[], Question] | None = None,
    ) -> None:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"not an http or https address: {origin!r}")
        self.origin = f"{parts.scheme}://{parts.netloc}"
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._credential = credential
        self._refused = refused
        self._proven: str | None = None
        self._proven_at = float("-inf")
        self._alone = trio.Semaphore(1)
        self._probe = probe
        self._limiter = trio.CapacityLimiter(connections)
        self._addresses: tuple[Address, ...] = ()
        self._addresses_until = 0.0
        self._cookies = CookieJar()
        self._closed = False
        self._levers: set[Lever] = set()
        self._requests = self._bytes_sent = self._bytes_received = 0
        self._pool = new_pool(
            maxsize=connections,
            block=False,
            retries=False,
            timeout=urllib3.Timeout(connect=min(CONNECT_TIMEOUT, timeout), read=timeout),
            blocksize=SEND_PIECE,
            ssl_context=_tls_context(ca_bundle) if parts.scheme == "https" else None,
        )

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | Body | None = None,
        receive: Receive | None = None,
    ) -> Answer:
        """Sends one request and returns the answer, whatever its status.

        `url` is whole, quoted, and of this client's origin. `receive` gets the body of a 2xx answer. Raises RemoteError:
        Unauthenticated for 401, RemoteUnavailable and its kin when there is no answer, with `in_doubt` set if the method
        changes something and may have been carried out. What `body` or `receive` raise comes out unchanged. Ends soon
        after cancellation; the thread is done with `body` and `receive` then.
        """
        return await self.perform(
            f"{method} {urlsplit(url).path}", lambda send: send(method, url, headers or {}, body, receive), body
        )

    async def perform(self, what: str, call: Callable[[Send], Answer], body: bytes | Body | None = None) -> Answer:
        """Runs `call` in a worker thread with the means to send one request; otherwise like `request`.

        `what` names the request in errors; `body` is rewound before the request is repeated with another credential.
        """
        for again in (False, True):
            if again and body is not None and not isinstance(body, bytes):
                body.rewind()
            header, answer = await self._authorized(what, call, large=not isinstance(body, bytes) and body is not None)
            if not self._refused(answer):
                if header == self._proven and answer.status != 429 and answer.status < 500:
                    self._proven_at = trio.current_time()
                return answer
            self._credential.refuse(header)
            if self._proven == header:
                self._proven = None
        await self._credential.authorization()
        raise Unauthenticated(f"{what}: the server refuses the credential (401), and refused the one before")

    async def _authorized(self, what: str, call: Callable[[Send], Answer], *, large: bool) -> tuple[str | None, Answer]:
        """The answer, and the credential that it was asked with.

        A new credential goes alone: eight refused log-ins at once are most of what it takes to be locked out (Nextcloud:
        eleven within half an hour, for everybody behind our address). The others wait for the head of its answer, which is
        soon there, and not for a body: a `large` one is not sent with a credential that a small question can prove.
        """
        while not self._is_proven(header := await self._credential.authorization()):
            known = header == self._proven  # only not lately: an upload goes as it is, and nobody waits long for it
            with trio.move_on_after(PROOF_PATIENCE if known else float("inf")) as waiting:
                await self._alone.acquire()
            if waiting.cancelled_caught:
                break
            turn = _Turn(self._alone)
            with turn:
                if await self._credential.authorization() != header or self._is_proven(header):
                    continue  # that was meanwhile
                asking = self._probe() if self._probe is not None and large and not known else None
                send_it = call if asking is None else partial(_ask, asking)
                answer = await self._exchange(what, send_it, header, partial(self._prove, header, turn))
                if answer.status != 429 and answer.status < 500 and not self._refused(answer):
                    self._proven, self._proven_at = header, trio.current_time()
                if asking is None or self._refused(answer):
                    return header, answer
                if self._proven != header:
                    return header, await self._exchange(what, call, header)
        return header, await self._exchange(what, call, header)

    def _is_proven(self, header: str | None) -> bool:
        """Whether the server has accepted it lately: else one request goes ahead."""
        age = trio.current_time() - self._proven_at
        if not self._levers and age >= IDLE_PROOF_LASTS:
            self._proven_at = float("-inf")  # also for those that come while the first one of a burst is under way
        return header == self._proven and trio.current_time() - self._proven_at < PROOF_LASTS

    def _prove(self, header: str | None, turn: _Turn) -> None:
        self._proven, self._proven_at = header, trio.current_time()
        turn.end()

    async def _exchange(
        self, what: str, call: Callable[[Send], Answer], header: str | None, accepted: Callable[[], None] | None = None
    ) -> Answer:
        lever = Lever(await self._resolve())
        exchange = _Exchange(self._pool, self._cookies, lever, (self._credential.header_name, header), what, accepted)
        if self._closed:
            raise RemoteUnavailable(f"{what}: the mount is closing")
        self._levers.add(lever)
        try:
            return await run_interruptible(partial(exchange.run, call), lever.pull, self._limiter)
        finally:
            self._levers.discard(lever)
            self._requests += exchange.requests
            self._bytes_sent += exchange.bytes_sent
            self._bytes_received += exchange.bytes_received

    async def _resolve(self) -> tuple[Address, ...]:
        """The server's addresses. Asked for on the loop, where waiting for a name server can be cancelled."""
        now = trio.current_time()
        if now < self._addresses_until:
            return self._addresses
        try:
            found = await trio.socket.getaddrinfo(self._host, self._port, type=trio.socket.SOCK_STREAM)
        except OSError as exc:
            if not self._addresses:
                raise RemoteUnavailable(f"the name {self._host} cannot be resolved: {exc}") from exc
        else:
            self._addresses = tuple((family, address) for family, _, _, _, address in found)
        self._addresses_until = now + ADDRESS_LIFETIME
        return self._addresses

    def statistics(self) -> HTTPStatistics:
        """Counts of finished requests."""
        return HTTPStatistics(self._requests, self._bytes_sent, self._bytes_received)

    async def aclose(self) -> None:
        """Ends all connections; running requests raise RemoteUnavailable. May be called twice."""
        self._closed = True
        for lever in self._levers:
            lever.pull()
        self._pool.clear()
        await trio.lowlevel.checkpoint()


class _Turn:
    """The turn of the one request that goes with an unproven credential: ends once, with its `with` or before."""

    def __init__(self, alone: trio.Semaphore) -> None:
        self._alone: trio.Semaphore | None = alone

    def end(self) -> None:
        alone, self._alone = self._alone, None
        if alone is not None:
            alone.release()

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        self.end()


def _ask(question: Question, send: Send) -> Answer:
    return send(*question)


def _was_hung_up(exc: ProtocolError) -> bool:
    """Whether the connection ended before the first byte of an answer."""
    return len(exc.args) > 1 and isinstance(exc.args[1], http.client.RemoteDisconnected)


class _Exchange:
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
        ask = partial(
            self._pool.urlopen, method, url, body=cast(Any, outgoing), headers=sent, redirect=False, preload_content=False
        )
        try:
            try:
                response = ask()
            except ProtocolError as exc:
                # A server may end an idle connection while we send on it (RFC 9112, 9.3.1): asked once more on another one.
                if method not in SAFE_METHODS or outgoing is not None or not self._lever.kept or not _was_hung_up(exc):
                    raise
                self.requests += 1
                response = ask()
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


def error_of(answer: Answer, what: str) -> RemoteError:
    """The error that an answer with status 300 or more means in general; a protocol may know better for some.

    The text holds nothing that the server wrote: it may echo secrets or be meant for a terminal.
    """
    status = answer.status
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = "unknown status"
    text = f"{what}: {status} {phrase}"
    wait = retry_after(answer.headers)
    in_doubt = what.split(" ", 1)[0] not in SAFE_METHODS
    if status < 400:
        return RemoteProtocolError(f"{text}: redirects are not followed")
    if status == 429:
        # Nextcloud does not say how long; each further request makes it longer, for everybody behind our address.
        return RemoteUnavailable(text, retry_after=wait or THROTTLED_WAIT)
    if status == 503 and b"MaintenanceMode" in answer.body:
        return RemoteUnavailable(f"{text}: the server is in maintenance mode", retry_after=wait or MAINTENANCE_WAIT)
    if status in (503, 425):
        return RemoteUnavailable(text, retry_after=wait)
    if status in (408, 504):
        return RemoteTimeout(text, retry_after=wait, in_doubt=in_doubt)
    if status == 423:
        return RemoteLocked(text, retry_after=wait)
    if kind := _FINAL.get(status):
        return kind(text)
    if status >= 500:
        return RemoteUnavailable(text, retry_after=wait, in_doubt=in_doubt)
    return RemoteDenied(text)


_FINAL: dict[int, type[RemoteError]] = {
    401: Unauthenticated,
    403: RemoteDenied,
    404: RemoteNotFound,
    405: RemoteUnsupported,
    410: RemoteNotFound,
    412: VersionMismatch,
    413: RemoteTooLarge,
    414: NameRefused,
    416: RemoteProtocolError,
    501: RemoteUnsupported,
    507: RemoteFull,
}


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait (RFC 9110, section 10.2.3: a number or a date), or None."""
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    if value.isascii() and value.isdigit():
        return float(min(int(value[:9]), 24 * 3600))
    try:
        at = parsedate_to_datetime(value).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(at - time.time(), 0.0), 24 * 3600.0)


def _tls_context(ca_bundle: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_bundle)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(f"ca_bundle {ca_bundle}: {exc}") from exc


