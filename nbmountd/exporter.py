"""The optional listener of the supervisor that Prometheus scrapes: `GET /metrics` over HTTP, nothing else.

It knows nothing of the metrics' meaning. It has no log-in: whoever reaches the port sees names of mounts and numbers, so it is
off unless `metrics_listen` is set. Requests are hostile input: limits on size, time and number at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio

from nbmountd.log import get_logger
from nbmountd.metrics import CONTENT_TYPE
from nbmountd.units import parse_address

REQUEST_LIMIT = 8 * 1024
"""Bytes of a request with its headers."""
TIME_LIMIT = 10.0
"""Seconds from the connection to the end of the answer."""
AT_ONCE = 8
"""Connections served at once; further ones wait."""

_log = get_logger(__name__)


async def serve(
    address: str,
    exposition: Callable[[], Awaitable[str]],
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answers with what `exposition()` gives, until cancelled; `started` with the port. A port that cannot be had is one
    warning: the mounts matter more."""
    host, port = parse_address(address)
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as exc:
        _log.warning("metrics cannot be listened for", address=address, cause=exc)
        task_status.started(0)
        return
    limiter = trio.CapacityLimiter(AT_ONCE)
    task_status.started(listeners[0].socket.getsockname()[1])
    await trio.serve_listeners(partial(_serve_client, exposition, limiter), listeners)


async def _serve_client(
    exposition: Callable[[], Awaitable[str]], limiter: trio.CapacityLimiter, stream: trio.SocketStream
) -> None:
    async with stream:
        with trio.move_on_after(TIME_LIMIT):
            async with limiter:
                try:
                    await stream.send_all(_answer(*await _respond(await _request_line(stream), exposition)))
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return


async def _request_line(stream: trio.SocketStream) -> bytes:
    """The first line, when all headers are there; empty if that is no request."""
    received = b""
    while b"\r\n\r\n" not in received:
        piece = await stream.receive_some(4096)
        received += piece
        if not piece or len(received) > REQUEST_LIMIT:
            return b""
    return received.partition(b"\r\n")[0]


async def _respond(line: bytes, exposition: Callable[[], Awaitable[str]]) -> tuple[str, str, str]:
    """Status, type and body."""
    method, _, target = line.rpartition(b" ")[0].partition(b" ")
    if not line.rpartition(b" ")[2].startswith(b"HTTP/1."):
        return "400 Bad Request", "text/plain", "not HTTP\n"
    if method != b"GET":
        return "405 Method Not Allowed", "text/plain", "only GET\n"
    if target.partition(b"?")[0] != b"/metrics":
        return "404 Not Found", "text/plain", "only /metrics\n"
    return "200 OK", CONTENT_TYPE, await exposition()


def _answer(status: str, kind: str, text: str) -> bytes:
    body = text.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body
