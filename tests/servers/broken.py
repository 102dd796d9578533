"""A server that answers wrongly on purpose: the first part of the path below the prefix says how.

`BrokenServer(...).at("cut")` is the URL of a share that behaves as `cut` of the table below. Every share holds one file,
`file`, of CONTENT. The requests log has a fourth word, the Authorization header (blanks as "_", "-" for none), a fifth,
the client's port (one per connection), and a sixth, the Cookie.

ranges-ignored   GET answers 200 with everything            no-version    GET has neither ETag nor Last-Modified
wrong-range      GET answers another range than asked        other-etag    GET answers with another ETag
short            GET breaks off in the middle               short-framed  GET gives fewer bytes than its Content-Range
stall            nothing is ever answered                   stall-body    GET stops in the middle and hangs
deaf             a body is not read, nothing answered        vanish        the connection closes instead of an answer
html             PROPFIND gives 200 and a log-in page        garbage       PROPFIND gives 207 and no XML
cut              PROPFIND gives half of the XML              doctype       PROPFIND gives entities that explode
outside          PROPFIND tells of another directory         empty         PROPFIND gives an empty multi-status
denied-size      the size has status 404, with a value        foreign       addresses with scheme and another host
away             302 to another server                       slash         301 to the same path with a slash
slash-at-PORT    the same, on another server
status-NNN       that status, Retry-After: 7                  cookie        sets a cookie at each answer
loud             404 with a body of 10 MB                     bearer        401 unless the token is "good"
many-N           a directory with N entries                   refuses       412 to any condition
drip-N           the same, an entry every half second
"""

from __future__ import annotations

import re
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

CONTENT = bytes(range(256)) * 4096
ETAG = '"v1"'
DATE = "Sun, 06 Nov 1994 08:49:37 GMT"

if __package__:
    from tests.servers.process import ServerProcess, python_script

    class BrokenServer(ServerProcess):
        """`tls`: paths of the certificate (with its key), then the URL is https."""

        def __init__(self, work: Path, *, tls: Path | None = None) -> None:
            self._tls = tls
            super().__init__(work / "unused", work)

        def command(self) -> list[str]:
            return python_script(Path(__file__), str(self.port), str(self.log), str(self._tls or ""))

        def at(self, behaviour: str) -> str:
            """The URL of the share that behaves so."""
            scheme = "https" if self._tls else "http"
            return f"{scheme}://127.0.0.1:{self.port}{self.prefix}{behaviour}/"

        def _answers(self) -> bool:
            with socket.socket() as sock:
                listens = sock.connect_ex(("127.0.0.1", self.port)) == 0
            if listens:
                self.log.write_text(f"OPTIONS {self.prefix} 200\n")  # what others log of the question whether they are up
            return listens


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    log_path: Path

    def handle_any(self) -> None:
        parts = urlsplit(self.path).path.split("/")
        self.behaviour = parts[2] if len(parts) > 2 else ""
        behaviour = self.behaviour
        if behaviour in ("stall", "deaf"):
            self.note(0)
            time.sleep(3600)
        length = int(self.headers.get("Content-Length", "0"))
        if len(self.rfile.read(length)) < length:
            self.close_connection = True
            return
        if behaviour == "vanish" and self.command not in ("OPTIONS", "PROPFIND"):
            self.note(0)
            self.close_connection = True
        elif match := re.fullmatch(r"status-(\d+)", behaviour):
            self.answer(int(match[1]), {"Retry-After": "7"}, b"<s:message>SECRET echo</s:message>")
        elif behaviour == "away":
            self.answer(302, {"Location": "http://192.0.2.1/login?next=1"})
        elif match := re.fullmatch(r"slash-at-(\d+)", behaviour):
            self.answer(301, {"Location": f"http://127.0.0.1:{match[1]}{self.path}/"})
        elif behaviour == "slash" and not self.path.endswith("/"):
            self.answer(301, {"Location": self.path + "/"})
        elif behaviour == "loud":
            self.answer(404, {}, bytes(10_000_000))
        elif behaviour == "bearer" and self.headers.get("Authorization") != "Bearer good":
            self.answer(401, {"WWW-Authenticate": "Bearer"}, b"no")
        elif behaviour == "refuses" and ("If-Match" in self.headers or "If-None-Match" in self.headers):
            self.answer(412)
        elif self.command == "PROPFIND":
            self.propfind()
        elif self.command in ("GET", "HEAD"):
            self.get()
        else:
            self.answer(200 if self.command == "OPTIONS" else 201, {"DAV": "1"})

    do_OPTIONS = do_PROPFIND = do_GET = do_HEAD = do_PUT = do_DELETE = do_MKCOL = do_MOVE = do_POST = handle_any  # noqa: N815

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.note(status)
        self.send_response_only(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.behaviour == "cookie":
            self.send_header("Set-Cookie", "session=abc; Path=/; HttpOnly")
            self.send_header("Set-Cookie", "second=def; Path=/")
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def note(self, status: int) -> None:
        authorization = self.headers.get("Authorization", "-").replace(" ", "_")
        cookie = self.headers.get("Cookie", "-").replace(" ", "")
        with self.log_path.open("a") as log:
            log.write(f"{self.command} {self.path} {status} {authorization} {self.client_address[1]} {cookie}\n")

    def propfind(self) -> None:
        behaviour, path = self.behaviour, self.path
        if behaviour == "html":
            return self.answer(200, {"Content-Type": "text/html"}, b"<html><body>Please log in</body></html>")
        if behaviour == "garbage":
            return self.answer(207, {}, b"\x00\xff garbage")
        if behaviour == "empty":
            return self.answer(207, {}, b'<d:multistatus xmlns:d="DAV:"/>')
        if behaviour.startswith("drip-"):
            return self.drip([part.encode() for part in self.listing(path)])
        body = "".join(self.listing(path)).encode()
        if behaviour == "cut" and self.headers.get("Depth") == "1":
            body = body[: len(body) // 2]
        if behaviour == "doctype":
            body = b'<!DOCTYPE d [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]>' + body
        return self.answer(207, {"Content-Type": "application/xml"}, body)

    def drip(self, parts: list[bytes]) -> None:
        self.answer(207, {"Content-Type": "application/xml", "Content-Length": str(sum(map(len, parts)))}, b"")
        for part in parts:
            time.sleep(0.5 if len(parts) > 3 else 0)
            self.wfile.write(part)
            self.wfile.flush()

    def listing(self, path: str) -> Iterator[str]:
        base = f"/dav/{self.behaviour}/"
        many = re.fullmatch(r"(?:many|drip)-(\d+)", self.behaviour)
        yield '<?xml version="1.0"?><d:multistatus xmlns:d="DAV:">'
        prefix = "http://elsewhere.example" if self.behaviour == "foreign" else ""
        if path in (base, base[:-1]):
            yield self.resource(prefix + base, collection=True)
            if self.headers.get("Depth") == "1":
                if many:
                    for number in range(int(many[1])):
                        yield self.resource(f"{base}entry%20{number:06}", collection=False)
                else:
                    name = "/dav/elsewhere/file" if self.behaviour == "outside" else f"{base}file"
                    yield self.resource(prefix + name, collection=False)
        else:
            yield self.resource(prefix + path, collection=False)
        yield "</d:multistatus>"

    def resource(self, href: str, *, collection: bool) -> str:
        kind = "<d:collection/>" if collection else ""
        size = f"<d:getcontentlength>{len(CONTENT)}</d:getcontentlength>"
        missing = ""
        if self.behaviour == "denied-size":
            missing = f"<d:propstat><d:prop>{size}</d:prop><d:status>HTTP/1.1 404 Not Found</d:status></d:propstat>"
            size = ""
        etag = f"<d:getetag>{ETAG}</d:getetag>"
        return (
            f"<d:response><d:href>{href}</d:href><d:propstat><d:prop><d:resourcetype>{kind}</d:resourcetype>{size}{etag}"
            f"<d:getlastmodified>{DATE}</d:getlastmodified></d:prop><d:status>HTTP/1.1 200 OK</d:status></d:propstat>"
            f"{missing}</d:response>"
        )

    def get(self) -> None:
        behaviour = self.behaviour
        headers = {"ETag": '"v2"' if behaviour == "other-etag" else ETAG}
        if behaviour == "no-version":
            headers = {}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None or behaviour == "ranges-ignored":
            return self.answer(200, headers, CONTENT)
        start, last = int(match[1]), int(match[2])
        if behaviour == "wrong-range":
            start, last = start + 1, last + 1
        body = CONTENT[start : last + 1]
        headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{len(CONTENT)}"
        if behaviour == "short-framed":
            return self.answer(206, headers, body[:-1])
        if behaviour in ("short", "stall-body"):
            self.answer(206, headers | {"Content-Length": str(len(body))}, body[: len(body) // 2])
            self.wfile.flush()
            if behaviour == "stall-body":
                time.sleep(3600)
            self.close_connection = True
            return None
        return self.answer(206, headers, body)

    def log_message(self, *_: object) -> None:
        """Says nothing: the log of requests has it."""


def serve(port: int, log: Path, tls: str) -> None:
    """Serves until the process is ended."""
    Handler.log_path = log
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
