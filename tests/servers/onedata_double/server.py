"""HTTP/1.1 over TLS in threads: keep-alive with a limit of requests, faults before, inside and after answers, a record.

It knows nothing of Onedata; a face's `handle` makes an answer of a request. It is a test's server: one thread a
connection, no limits on sizes.
"""

from __future__ import annotations

import http
import io
import itertools
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .refusal import Refusal

PIECE = 1024 * 1024


class Gone(Exception):
    """The connection is to be dropped without (the rest of) an answer."""


@dataclass
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body_size: int
    _file: Any
    received: int = 0

    def __post_init__(self) -> None:
        parts = urlsplit(self.target)
        self.raw_path = parts.path
        self.segments = [unquote(part, errors="strict") for part in parts.path.split("/")[1:]]
        self.query = parse_qs(parts.query, keep_blank_values=True)

    def pieces(self) -> Iterator[bytes]:
        """The body as it comes. Raises Gone when it is cut."""
        while self.received < self.body_size:
            piece = self._file.read(min(PIECE, self.body_size - self.received))
            if not piece:
                raise Gone
            self.received += len(piece)
            yield piece

    def body(self) -> bytes:
        return b"".join(self.pieces())

    def json(self) -> dict[str, Any]:
        """The body merged with the query, which wins; repeated keys of the query become lists."""
        body = self.body()
        if body and self.headers.get("content-type", "application/json").split(";")[0] != "application/json":
            body = b""
        try:
            merged = json.loads(body) if body else {}
        except ValueError:
            raise Refusal(400, "malformedData", "The request body is not JSON.") from None
        if not isinstance(merged, dict):
            raise Refusal(400, "malformedData", "The request body is not an object.")
        for key, values in self.query.items():
            merged[key] = values if len(values) > 1 else values[0]
        return merged


@dataclass
class Response:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    stream: Iterator[bytes] | None = None
    """The body in pieces instead: of `length` bytes, or chunked when that is None."""
    length: int | None = None


def json_response(value: Any, status: int = 200, **headers: str) -> Response:
    return Response(
        status, json.dumps(value, ensure_ascii=False).encode(), {"Content-Type": "application/json", **headers}
    )


@dataclass
class Fault:
    """What happens to requests whose "METHOD target" matches `pattern`, `count` times after the first `skip`.

    action: latency, status, reset (before), lost (after it was carried out), cut (the body after `size` bytes), stall
    (no answer for `seconds`), stall_body (the rest after `seconds`), call (runs `then`, then goes on).
    """

    face: str
    pattern: str
    action: str
    count: int = 1
    skip: int = 0
    seconds: float = 0.0
    status: int = 500
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    size: int = 0
    then: dict[str, Any] = field(default_factory=dict)


class Faces:
    """What all faces share: faults and the record."""

    def __init__(self, log: Any) -> None:
        self.faults: list[Fault] = []
        self.records: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.max_requests = 30
        self.idle_seconds = 30.0
        self.says_close = True
        self.call: Callable[[dict[str, Any]], None] = lambda _: None
        self._log = log

    def fault(self, face: str, request: Request) -> Fault | None:
        what = f"{request.method} {request.target}"
        with self.lock:
            for fault in self.faults:
                if fault.face in ("*", face) and fault.count != 0 and re.search(fault.pattern, what):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.count -= 1
                    return fault
        return None

    def record(self, face: str, request: Request, status: int, connection: int) -> dict[str, Any]:
        """The new record, to be called before the answer goes out: a test that has the answer finds it. `sent` grows."""
        record = {
            "face": face, "method": request.method, "target": request.target, "status": status,
            "received": request.received, "sent": 0, "connection": connection,
        }  # fmt: skip
        with self.lock:
            if face != "control":
                self.records.append(record)
            self._log.write(f"{request.method} {request.raw_path} {status}\n")
        return record


class Face:
    """One listening address."""

    _connections = itertools.count(1)

    def __init__(
        self, name: str, port: int, context: ssl.SSLContext | None, shared: Faces, handle: Callable[[Request], Response]
    ) -> None:
        self.name = name
        self.down = False
        self._context = context
        self._shared = shared
        self._handle = handle
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        threading.Thread(target=self._accept, daemon=True).start()

    def set_down(self, down: bool) -> None:
        """Down: every connection is reset, old and new."""
        self.down = down
        if down:
            for sock in list(self._open):
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            if self.down:
                _reset(sock)
                continue
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        number = next(self._connections)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_side=True)
            self._open.add(sock)
            sock.settimeout(self._shared.idle_seconds)
            file = sock.makefile("rb", buffering=64 * 1024)
            for count in itertools.count(1):
                last = count >= self._shared.max_requests
                if not self._one(sock, file, number, last=last) or last:
                    break
        except (OSError, Gone, ValueError):
            pass
        finally:
            self._open.discard(sock)
            _close(sock)

    def _one(self, sock: socket.socket, file: Any, number: int, *, last: bool) -> bool:
        request = _read_request(file)
        if request is None or self.down:
            return False
        fault = self._shared.fault(self.name, request)
        action = fault.action if fault is not None else ""
        if fault is not None:
            if action == "latency":
                time.sleep(fault.seconds)
            elif action == "stall":
                time.sleep(fault.seconds)
                _reset(sock)
                raise Gone
            elif action == "reset":
                self._shared.record(self.name, request, 0, number)
                _reset(sock)
                raise Gone
            elif action == "call":
                self._shared.call(fault.then)
        if fault is not None and action == "status":
            request.body()
            response = Response(fault.status, fault.body.encode(), dict(fault.headers))
        else:
            response = self._answer(request)
        for _ in request.pieces():
            pass  # what a handler left unread
        if action == "lost":
            self._shared.record(self.name, request, 0, number)
            _reset(sock)
            raise Gone
        record = self._shared.record(self.name, request, response.status, number)
        record["sent"] = self._send(sock, response, fault, last=last)
        return True

    def _answer(self, request: Request) -> Response:
        try:
            return self._handle(request)
        except Refusal as refusal:
            return Response(refusal.status, refusal.body(), {"Content-Type": "application/json"})

    def _send(self, sock: socket.socket, response: Response, fault: Fault | None, *, last: bool) -> int:
        phrase = http.HTTPStatus(response.status).phrase
        lines = [f"HTTP/1.1 {response.status} {phrase}", "Access-Control-Allow-Origin: *"]
        lines.append("Date: " + time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()))
        lines += [f"{name}: {value}" for name, value in response.headers.items()]
        chunked = response.stream is not None and response.length is None
        if chunked:
            lines.append("Transfer-Encoding: chunked")
        elif response.status != 204:
            length = len(response.body) if response.stream is None else response.length
            lines.append(f"Content-Length: {length}")
        if last and self._shared.says_close:
            lines.append("Connection: close")
        head = ("\r\n".join(lines) + "\r\n\r\n").encode()
        limit = fault.size if fault is not None and fault.action in ("cut", "stall_body") else None
        if response.stream is None and limit is None:
            sock.sendall(head + response.body)
            return len(response.body)
        sock.sendall(head)
        sent = 0
        for piece in response.stream if response.stream is not None else iter([response.body]):
            if limit is not None and sent + len(piece) > limit:
                sock.sendall(piece[: limit - sent])
                if fault is not None and fault.action == "stall_body":
                    time.sleep(fault.seconds)
                raise Gone
            if not piece:
                _check_alive(sock)
                continue
            sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            sent += len(piece)
        if chunked:
            sock.sendall(b"0\r\n\r\n")
        return sent


def _check_alive(sock: socket.socket) -> None:
    """Raises Gone when the client has hung up."""
    sock.settimeout(0.0)
    try:
        if not sock.recv(1):
            raise Gone
    except (ssl.SSLWantReadError, BlockingIOError):
        pass
    finally:
        sock.settimeout(30.0)


def _read_request(file: Any) -> Request | None:
    line = file.readline(128 * 1024)
    if not line.strip():
        return None
    method, target, _ = line.decode("latin-1").split(" ")
    headers: dict[str, str] = {}
    while (line := file.readline(2 * 1024 * 1024)) not in (b"\r\n", b"\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return Request(method, target, headers, int(headers.get("content-length", "0")), file or io.BytesIO())


def _reset(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with suppress(OSError):
        if isinstance(sock, ssl.SSLSocket):
            sock = socket.socket(fileno=sock.detach())
        sock.close()


def _close(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    with suppress(OSError):
        sock.close()
