"""A proxy before a WebDAV server that spoils one request of each case, at one point, and forwards all others.

A case is a directory whose name says what happens to the requests below it: "KIND-N-PHASE..." spoils the N-th request
(from 1, counted from `arm` on) for a name in the directory; requests about the directory itself, and for the turn in it
(webdav_turns.py), are not counted. What a Nextcloud gathers in a folder of its `uploads/` counts for the name in the
Destination that the folder was made with.

KIND: "lost" (no answer), "cut" (a cut body), "stall" (silence for `stall` seconds, then no answer), "length" (a length that
is not true), or a status. PHASE, how far the request came:

0  nothing of it reached the server       (cut: none of its body did; length: the answer is said to be longer than it is)
1  half of its body did                   (length: the answer is said to be shorter)
2  it was carried out                     (cut, length: and the answer's body is cut to nothing, or its size is told wrong)
3  it was carried out, and half of the answer came back   (statuses: it was carried out, and the next request fails too;
                                           length: the server was given one byte less than the client sent)
4  a quarter of its body did              (length: the answer is said to be longer by one byte)
5  all of its body but the last byte did  (length: the answer is said to be shorter by one byte)
6  it was carried out, and all of the answer but its last byte came back   (statuses: and the next two requests fail too;
                                           length: the size in the answer is told one byte too small)
"""

from __future__ import annotations

import http.client
import re
import socket
import socketserver
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from urllib.parse import unquote

KINDS = ("lost", "cut", "stall", "length", "412", "423", "429", "500", "503", "507")
PHASES = (0, 1, 2, 3)
ALL_PHASES = (*PHASES, 4, 5, 6)
ALSO_FAIL = {3: 1, 6: 2}
"""Phase -> requests after the spoiled one that a status is the answer to as well."""
CASE = re.compile(r"/(lost|cut|stall|length|\d{3})-(\d+)-(\d)[^/]*/[^/]")
TURN = ".nbmountd-upload-turn"
UPLOAD = re.compile(r"/uploads/[^/]+/([^/]+)")


class FaultProxy:
    """A thread that listens on `port` of 127.0.0.1 and forwards to `target`, another port. Stopped by leaving the `with`."""

    def __init__(self, target: int, *, stall: float = 3.0) -> None:
        self.target = target
        self.stall = stall
        self.armed = threading.Event()
        self.fired: set[str] = set()
        """The directories of the cases whose fault has happened."""
        self.seen: Counter[str] = Counter()
        """Requests of each case."""
        self.lock = threading.Lock()
        self._folders: dict[str, str] = {}
        """The Destination of each folder of `uploads/`."""
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def arm(self) -> None:
        """From now on requests are counted, and faults happen."""
        self.armed.set()

    def disarm(self) -> None:
        self.armed.clear()

    def fault(self, path: str, destination: str | None = None) -> tuple[str, int] | None:
        """(kind, phase) if this request, with that Destination, is to be spoiled."""
        if (upload := UPLOAD.search(path)) is not None:
            path = self._folders.setdefault(upload[1], destination or "")
        found = CASE.search(unquote(path))
        if found is None or TURN in path or not self.armed.is_set():
            return None
        kind, number, phase = found[1], int(found[2]), int(found[3])
        case = found[0].split("/")[1]
        with self.lock:
            self.seen[case] += 1
            after = self.seen[case] - number
            if after == 0 or (kind.isdigit() and 0 < after <= ALSO_FAIL.get(phase, 0)):
                self.fired.add(case)
                return kind, phase if after == 0 else 0
        return None

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is nothing to be said."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def handle_one_request(self) -> None:
        try:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            assert isinstance(self.server, _Server)
            self.proxy = self.server.proxy
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            fault = self.proxy.fault(self.path, self.headers.get("Destination"))
            if fault is None:
                self.give(*self.forward(body))
            else:
                self.spoil(*fault, body)
            self.wfile.flush()
        except OSError:
            self.close_connection = True

    def sent_headers(self, length: int) -> dict[str, str]:
        """The request's, as if it had been made to the server itself."""
        here, there = f"127.0.0.1:{self.proxy.port}", f"127.0.0.1:{self.proxy.target}"
        headers = {name: value.replace(here, there) for name, value in self.headers.items()}
        return headers | ({"Content-Length": str(length)} if length or "Content-Length" in headers else {})

    def forward(self, body: bytes) -> tuple[int, str, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.target, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.sent_headers(len(body)).items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            content = answer.read()
            framing = ("content-length", "transfer-encoding", "connection", "keep-alive")
            headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in framing]
            if self.command == "HEAD" and (length := answer.headers.get("Content-Length")):
                headers.append(("Content-Length", length))
            return answer.status, answer.reason, headers, content
        finally:
            connection.close()

    def give(
        self, status: int, reason: str, headers: list[tuple[str, str]], body: bytes, *, length: int | None = None
    ) -> None:
        """Answers; with another Content-Length than the body's, if that is wanted, and then the connection ends."""
        self.send_response_only(status, reason)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD" and status not in (204, 304):
            self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(body)
        if length not in (None, len(body)):
            self.close_connection = True

    def give_part(self, status: int, reason: str, headers: list[tuple[str, str]], body: bytes, count: int) -> None:
        """The first `count` bytes of an answer's body, or, where there is none, the first part of its head."""
        if body:
            self.give(status, reason, headers, body[:count], length=len(body))
        else:
            self.wfile.write(f"HTTP/1.1 {status} {reason}\r\nDate: M".encode())
        self.wfile.flush()
        self.close_connection = True

    def cut_towards_server(self, body: bytes, *, wait: bool) -> bytes:
        """Sends the head and this part of the body only, then nothing more; with `wait`, what the server says to that."""
        head = [f"{self.command} {self.path} HTTP/1.1"]
        length = int(self.headers.get("Content-Length", "0"))
        head += [f"{name}: {value}" for name, value in self.sent_headers(length).items()]
        with socket.create_connection(("127.0.0.1", self.proxy.target), timeout=10) as upstream:
            upstream.sendall("\r\n".join([*head, "Connection: close", "", ""]).encode("latin-1") + body)
            upstream.shutdown(socket.SHUT_WR)
            said = b""
            while wait and (piece := upstream.recv(65536)):
                said += piece
            return said

    def begun(self, phase: int, body: bytes) -> bytes:
        """What of a body reaches the server before it ends."""
        return body[: {1: len(body) // 2, 4: len(body) // 4, 5: len(body) - 1}.get(phase, 0)] if body else b""

    def spoil(self, kind: str, phase: int, body: bytes) -> None:
        if kind.isdigit():
            self.refuse(int(kind), phase, body)
        elif kind == "length":
            self.tell_wrong_length(phase, body)
        else:
            self.break_off(kind, phase, body)

    def refuse(self, status: int, phase: int, body: bytes) -> None:
        if phase in (1, 4, 5):
            self.cut_towards_server(self.begun(phase, body), wait=True)
        elif phase:
            self.forward(body)
        retry = [("Retry-After", "1")] if status == 429 else []
        self.give(status, "Spoiled", retry, b"<p>spoiled on purpose</p>")

    def break_off(self, kind: str, phase: int, body: bytes) -> None:
        self.close_connection = True
        said = b""
        if phase in (1, 4, 5) or (kind == "cut" and phase == 0):
            said = self.cut_towards_server(self.begun(phase, body), wait=True)
        answer = self.forward(body) if phase in (2, 3, 6) else None
        if kind == "cut" and said:
            self.wfile.write(said)  # "400 Bad Request" or the like; a server that says nothing leaves it at that
        elif answer is not None and (phase != 2 or kind == "cut"):
            length = len(answer[3])
            self.give_part(*answer, {2: 0, 3: length // 2, 6: max(0, length - 1)}[phase])
        if kind == "stall":
            time.sleep(self.proxy.stall)

    def tell_wrong_length(self, phase: int, body: bytes) -> None:
        status, reason, headers, content = self.forward(body[:-1] if phase == 3 and self.command == "PUT" else body)
        if phase in (0, 1, 4, 5):
            wrong = {0: 10, 1: -10, 4: 1, 5: -1}[phase]
            self.give(status, reason, headers, content, length=max(0, len(content) + wrong))
        else:
            wrong = {2: 2, 3: 3, 6: -1}[phase]
            told = re.sub(
                rb"(getcontentlength>)(\d+)", lambda found: found[1] + str(int(found[2]) + wrong).encode(), content
            )
            self.give(status, reason, headers, told)
        self.close_connection = True

