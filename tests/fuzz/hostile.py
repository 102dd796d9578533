"""A WebDAV server whose every answer but the first ones is changed at random: bodies, headers, statuses, lengths.

It runs in threads of the test. `HostileServer.seed` and the number of answers so far decide what comes next.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.fuzz.mutations import mutate
from tests.fuzz.targets import MULTISTATUS

STATUSES = (200, 201, 204, 206, 207, 302, 307, 400, 403, 404, 409, 412, 416, 423, 500, 503, 507)
GOOD = (
    b'<?xml version="1.0"?><d:multistatus xmlns:d="DAV:"><d:response><d:href>/dav/dir/</d:href><d:propstat><d:prop>'
    b"<d:resourcetype><d:collection/></d:resourcetype></d:prop><d:status>HTTP/1.1 200 OK</d:status></d:propstat></d:response>"
    b"</d:multistatus>"
)
ITSELF = GOOD[GOOD.index(b"<d:response>") : GOOD.index(b"</d:multistatus>")]
LISTINGS = tuple(body.replace(b"<d:response>", ITSELF + b"<d:response>", 1) for body in MULTISTATUS[1:3])
HEADERS = {"ETag": b'"5f-1a"', "Last-Modified": b"Sun, 06 Nov 1994 08:49:37 GMT", "Content-Range": b"bytes 0-11/12"}
BODY = b"twelve bytes"


class HostileServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections break here all the time."""

    def __init__(self, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seed = seed
        self.answers = itertools.count()
        self.answered = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/dav/dir/"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HostileServer

    def answer(self) -> None:
        rng = random.Random(f"{self.server.seed} {next(self.server.answers)}")
        self.server.answered += 1
        with contextlib.suppress(ValueError):
            self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if self.command == "OPTIONS":
            self.give(200, {"DAV": b"1", "Server": b"Apache/2.4"}, b"")
        elif self.command == "PROPFIND" and self.headers.get("Depth") == "0" and rng.random() < 0.9:
            self.give(207, {"Content-Type": b"application/xml"}, GOOD)
        elif self.command == "PROPFIND":
            body = rng.choice(LISTINGS) if rng.random() < 0.5 else mutate(LISTINGS, rng)
            self.give(207 if rng.random() < 0.9 else rng.choice(STATUSES), {}, body)
        else:
            status = (206 if self.command == "GET" else 201) if rng.random() < 0.6 else rng.choice(STATUSES)
            headers = {name: mutate([value], rng) if rng.random() < 0.3 else value for name, value in HEADERS.items()}
            body = mutate([BODY], rng) if rng.random() < 0.3 else BODY
            self.give(status, headers, b"" if status in (201, 204) else body, cut=rng.random() < 0.1)

    do_OPTIONS = do_PROPFIND = do_GET = do_HEAD = do_PUT = do_DELETE = do_MKCOL = do_MOVE = do_PROPPATCH = answer  # noqa: N815

    def give(self, status: int, headers: dict[str, bytes], body: bytes, *, cut: bool = False) -> None:
        """As it is: also what is no header."""
        head = b"HTTP/1.1 %d X\r\n" % status
        head += b"".join(name.encode() + b": " + value[:8000] + b"\r\n" for name, value in headers.items())
        length = 0 if status == 204 else len(body)
        self.close_connection = cut or bool(headers.keys() & {"ETag"})
        with contextlib.suppress(OSError):
            self.wfile.write(head + b"Content-Length: %d\r\n\r\n" % length + (body[: length // 2] if cut else body[:length]))

    def log_message(self, *_: object) -> None:
        return


@contextlib.contextmanager
def hostile(seed: int) -> Iterator[HostileServer]:
    with HostileServer(seed) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
