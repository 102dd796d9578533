"""HTTP requests in worker threads: one request a call, streamed both ways, ended when the caller is cancelled.

It knows nothing of WebDAV or of any other meaning of the answers. It follows no redirect and repeats nothing, with two
exceptions: after a 401 the request goes out again if there is another credential by then, and what changes nothing when
a kept connection turned out to have ended (http_exchange.py).

Touched by several tasks: the connection pool (urllib3's own locks), the cookie jar (its own lock), the counters and the
addresses (on the loop only). The thread of an exchange shares nothing with the loop but its `Lever`.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from http.cookiejar import CookieJar
from urllib.parse import urlsplit

import trio
import urllib3

from nbmountd.backends.base import Body
from nbmountd.backends.connections import Address, Lever, new_pool
from nbmountd.backends.credentials import Credential
from nbmountd.backends.http_exchange import SEND_PIECE, Answer, Exchange, Question, Receive, Send
from nbmountd.errors import ConfigError, RemoteUnavailable, Unauthenticated
from nbmountd.threads import run_interruptible

CREDENTIALS_TRIED = 3
"""For one request: tokens may rotate while it waits, and a large one may wait for long. No credential is sent twice."""

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
        for attempt in range(CREDENTIALS_TRIED):
            if attempt and body is not None and not isinstance(body, bytes):
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
        raise Unauthenticated(f"{what}: the server refuses the credential (401), and {CREDENTIALS_TRIED - 1} before it")

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
        exchange = Exchange(self._pool, self._cookies, lever, (self._credential.header_name, header), what, accepted)
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


def _tls_context(ca_bundle: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_bundle)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(f"ca_bundle {ca_bundle}: {exc}") from exc


