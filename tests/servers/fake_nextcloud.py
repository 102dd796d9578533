"""A Nextcloud as far as files go, with its bad habits (reference: Nextcloud 32 on Apache and FPM), and faults on request.

- PUT over a file writes in place: a cut one leaves what had arrived. PUT to a new name goes by way of a part file.
- A file's ETag is made of second, inode and size; a folder's changes with anything below it.
- `uploads/` with MOVE of `.file`, judged by `If: <target> (["etag"])`; If-Match on that MOVE is tested against `.file`.
- OC-Checksum is stored unverified and vanishes at an overwrite without one; X-OC-Mtime below a day fails after storing.
- Ten wrong passwords within the life of the server, and everybody gets 429 without Retry-After.
- GET has no Content-Length; log-ins set a cookie; listings have pages on request.
- Dead properties are kept by path: those of what is below a folder that is moved or removed stay behind at the old path,
  for whatever comes there next. No ETag tells of a change of one.
- No file id is given twice, whatever the disk does with its inode numbers.
- What an overwrite replaces is kept as a version of that file id: `FakeNextcloud.versions`.
- Log-in Flow v2: `FakeNextcloud.grant` is the person who agrees in the browser.

`FakeNextcloud.hook(...)` sets faults, all of them off by default:

delay        seconds before each answer                   maintenance   503, ServerMaintenanceMode, no Retry-After
lose         {"MOVE": 1}: so many are done, not answered   refuse        {"PUT": [503, 2]}: so many get that status, undone
quota        bytes left                                   assembling    seconds a MOVE of `.file` takes; 423 meanwhile
forget_pages the second page begins a listing anew          alone         nobody changes the files but through us: faster
passwords    those that count from now on                  permissions   {"name": "RG"}: oc:permissions of that file or folder
elsewhere    where the log-in flow sends a client             forbidden     {"forbidden_filenames": […], …}: capabilities
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import secrets
import shutil
import socket
import sys
import threading
import time
import unicodedata
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

DAV, OC = "{DAV:}", "{http://owncloud.org/ns}"
MOST_FAILURES = 10

if __package__:
    from tests.servers.process import ServerProcess, python_script

    class FakeNextcloud(ServerProcess):
        """`root` is the user's files. She logs in as `user`; her internal id is `uid`."""

        uid = "alice-id"
        prefix = "/remote.php/dav/files/alice-id/"

        def configure(self) -> None:
            settings = {
                "root": str(self.root), "work": str(self.work), "port": self.port, "user": self.user, "uid": self.uid,
                "password": self.password, "log": str(self.log),
            }  # fmt: skip
            path = self.work / "settings.json"
            path.touch(mode=0o600)
            path.write_text(json.dumps(settings))

        def command(self) -> list[str]:
            return python_script(Path(__file__), str(self.work / "settings.json"))

        @property
        def origin(self) -> str:
            return f"http://127.0.0.1:{self.port}"

        def hook(self, **faults: Any) -> None:
            """Sets these faults and ends all others."""
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("POST", "/hooks", json.dumps(faults))
            connection.getresponse().read()
            connection.close()

        def versions(self, path: Path) -> list[bytes]:
            """The contents that a file had before, oldest first."""
            kept = self.work / "versions" / str(path.stat().st_ino)
            return [each.read_bytes() for each in sorted(kept.iterdir())] if kept.exists() else []

        def grant(self, login_page: str) -> int:
            """A person follows the link of a log-in flow and agrees; the status of the answer."""
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("GET", urlsplit(login_page).path)
            status = connection.getresponse().status
            connection.close()
            return status

        def every_request(self) -> list[str]:
            """Like `requests`, of all paths."""
            return [line for line in self.log.read_text("utf-8", "replace").splitlines() if not line.startswith("POST")]


class State:
    """What all requests share."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.root = Path(settings["root"])
        self.uploads = Path(settings["work"]) / "uploads"
        self.uploads.mkdir(exist_ok=True)
        self.user, self.uid, self.password = settings["user"], settings["uid"], settings["password"]
        self.log = Path(settings["log"])
        self.lock = threading.RLock()
        self.hooks: dict[str, Any] = {}
        self.checksums: dict[int, tuple[str, int, int]] = {}
        self.changes: dict[Path, int] = {}
        self.assembling: set[Path] = set()
        self.pages: dict[str, list[str]] = {}
        self.failures = 0
        self.properties: dict[Path, dict[str, str]] = {}
        self.reused: dict[int, int] = {}
        """How often the file with that inode number was removed."""
        self.versions = Path(settings["work"]) / "versions"
        self.flows: dict[str, bool] = {}
        """Poll token -> whether somebody has agreed."""
        self.app_passwords: list[str] = []

    def touched(self, path: Path) -> None:
        """All folders above get another ETag."""
        with self.lock:
            while path != self.root:
                path = path.parent
                self.changes[path] = self.changes.get(path, 0) + 1

    def etag(self, path: Path) -> str:
        status = path.stat()
        if not path.is_dir():
            return hashlib.md5(f"{int(status.st_mtime)} {status.st_ino} {status.st_size}".encode()).hexdigest()
        below = 0 if self.hooks.get("alone") else _fingerprint(str(path))
        return hashlib.md5(f"{self.changes.get(path, 0)} {status.st_ino} {below}".encode()).hexdigest()[:13]

    def id(self, path: Path) -> int:
        number = path.stat().st_ino
        return number + self.reused.get(number, 0) * 10**12

    def remove(self, path: Path) -> None:
        """Takes it away with all that is in it, and with what is said of itself."""
        for each in [path, *(path.rglob("*") if path.is_dir() else ())]:
            number = each.lstat().st_ino
            self.reused[number] = self.reused.get(number, 0) + 1
        self.properties.pop(path, None)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    def checksum(self, path: Path) -> str:
        status = path.stat()
        text, size, second = self.checksums.get(status.st_ino, ("", 0, 0))
        return text if (size, second) == (status.st_size, int(status.st_mtime)) else ""

    def keep_checksum(self, path: Path, text: str) -> None:
        status = path.stat()
        self.checksums[status.st_ino] = (text, status.st_size, int(status.st_mtime))

    def keep_version(self, path: Path) -> None:
        """Keeps the content as it is before an overwrite."""
        kept = self.versions / str(path.stat().st_ino)
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, kept / f"{time.time_ns():020}")

    def used(self) -> int:
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())


def _fingerprint(directory: str) -> int:
    """Changes with anything below the directory, by whomever."""
    found = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # a test has taken it away just now
                continue
            found ^= hash((entry.name, status.st_ino, status.st_size, int(status.st_mtime)))
            if entry.is_dir(follow_symlinks=False):
                found ^= hash((entry.name, _fingerprint(entry.path)))
    return found


class Refused(Exception):
    """Ends a request with this status."""

    def __init__(self, status: int, kind: str = "") -> None:
        super().__init__(status)
        self.status = status
        self.kind = kind


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    state: State

    def handle_any(self) -> None:
        state = self.state
        self.left = int(self.headers.get("Content-Length", "0"))
        path = urlsplit(self.path).path
        if path == "/hooks":
            state.hooks = json.loads(self.body())
            self.answer(204)
            return
        time.sleep(state.hooks.get("delay", 0))
        try:
            if path == "/status.php":
                maintenance = str(bool(state.hooks.get("maintenance"))).lower().encode()
                self.answer(200, b'{"installed":true,"maintenance":%b,"productname":"Nextcloud"}' % maintenance)
                return
            if path.startswith("/index.php/login/v2"):
                self.login_flow(path)
                return
            if self.command != "OPTIONS":
                self.check_login()
            if state.hooks.get("maintenance"):
                raise Refused(503, "Sabre\\DAV\\Exception\\ServiceUnavailable ServerMaintenanceMode")
            if path == "/ocs/v2.php/cloud/capabilities":
                files = {"bigfilechunking": True, **state.hooks.get("forbidden", {})}
                told = {"ocs": {"data": {"capabilities": {"files": files}}}}
                self.answer(200 if "OCS-APIRequest" in self.headers else 412, json.dumps(told).encode())
                return
            refused = state.hooks.get("refuse", {}).get(self.command, [0, 0])
            if refused[1]:
                refused[1] -= 1
                raise Refused(refused[0])
            self.route(path)
        except Refused as refusal:
            self.answer(refusal.status, f"<d:error><s:message>{refusal.kind}</s:message></d:error>".encode())

    do_OPTIONS = do_PROPFIND = do_PROPPATCH = do_GET = do_PUT = do_DELETE = do_MKCOL = do_MOVE = do_POST = handle_any  # noqa: N815

    def route(self, path: str) -> None:
        state = self.state
        if match := re.match(r"/remote\.php/(?:dav/files/([^/]*)|webdav)(/.*|$)", path):
            if match[1] not in (None, quote(state.uid)):
                raise Refused(404)
            self.base = path[: len(path) - len(match[2])]
            getattr(self, f"do_file_{self.command.lower()}")(self.place(match[2]))
        elif path.startswith(f"/remote.php/dav/uploads/{quote(state.uid)}/"):
            self.base = f"/remote.php/dav/uploads/{quote(state.uid)}"
            self.do_upload(path[len(self.base) :])
        elif path.rstrip("/") == "/remote.php/dav":
            if self.command == "OPTIONS":
                self.answer(200, headers=self.features())
                return
            principal = f"/remote.php/dav/principals/users/{quote(state.uid)}/"
            found = f"<d:current-user-principal><d:href>{principal}</d:href></d:current-user-principal>"
            self.body()
            self.multistatus([self.response(path, found)])
        else:
            raise Refused(404 if self.command != "OPTIONS" else 200)

    # --- small parts ---

    def check_login(self) -> None:
        state = self.state
        if state.failures > MOST_FAILURES and "oc_session" not in self.headers.get("Cookie", ""):
            raise Refused(429)
        passwords = state.hooks.get("passwords", [state.password, *state.app_passwords])
        expected = [base64.b64encode(f"{state.user}:{each}".encode()).decode() for each in passwords]
        if self.headers.get("Authorization", "").removeprefix("Basic ") not in expected:
            state.failures += "Authorization" in self.headers
            raise Refused(401)

    def login_flow(self, path: str) -> None:
        """Log-in Flow v2: begin, the page for the person, and the program that polls (404 until she has agreed)."""
        state, origin = self.state, self.state.hooks.get("elsewhere") or f"http://{self.headers['Host']}"
        if path == "/index.php/login/v2" and self.command == "POST":
            token = secrets.token_hex(32)
            state.flows[token] = False
            poll = {"token": token, "endpoint": f"{origin}/index.php/login/v2/poll"}
            self.answer(200, json.dumps({"poll": poll, "login": f"{origin}/index.php/login/v2/flow/{token}"}).encode())
        elif path == "/index.php/login/v2/poll" and self.command == "POST":
            token = unquote(self.body().decode().partition("token=")[2])
            if not state.flows.get(token):
                raise Refused(404)
            del state.flows[token]  # it is told once
            state.app_passwords.append(secrets.token_urlsafe(24))
            told = {"server": origin, "loginName": state.user, "appPassword": state.app_passwords[-1]}
            self.answer(200, json.dumps(told).encode())
        elif path.rpartition("/")[2] in state.flows:
            state.flows[path.rpartition("/")[2]] = True
            self.answer(200, b"granted")
        else:
            raise Refused(404)

    def place(self, path: str) -> Path:
        folded = unicodedata.normalize("NFC", unquote(path, errors="surrogateescape"))
        names = [name for name in folded.split("/") if name]
        return self.state.root.joinpath(*names)

    def there(self, path: Path) -> Path:
        if not path.exists():
            raise Refused(404)
        return path

    def body(self) -> bytes:
        data = self.rfile.read(self.left)
        self.left -= len(data)
        return data

    def features(self) -> dict[str, str]:
        return {"DAV": "1, 3, extended-mkcol, access-control, nc-paginate, nextcloud-checksum-update"}

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        while self.left and self.rfile.read(min(self.left, 65536)):  # the whole body comes before any refusal
            self.left -= min(self.left, 65536)
        with self.state.lock, self.state.log.open("a") as log:
            log.write(f"{self.command} {self.path} {status}\n")
        losses = self.state.hooks.get("lose", {})
        if status < 300 and losses.get(self.command):
            losses[self.command] -= 1
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response_only(status)
        self.send_header("Date", formatdate(usegmt=True))
        self.send_header("Set-Cookie", "oc_session=open; Path=/; HttpOnly")
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="Nextcloud", charset="UTF-8"')
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Transfer-Encoding" not in (headers or {}) and status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def multistatus(self, responses: list[str], headers: dict[str, str] | None = None) -> None:
        text = '<?xml version="1.0"?><d:multistatus xmlns:d="DAV:" xmlns:oc="http://owncloud.org/ns">'
        text += "".join(responses) + "</d:multistatus>"
        self.answer(207, text.encode(), {"Content-Type": "application/xml", **self.features(), **(headers or {})})

    def response(self, href: str, found: str, missing: str = "") -> str:
        text = f"<d:response><d:href>{escape(href)}</d:href>"
        for properties, status in ((found, "200 OK"), (missing, "404 Not Found")):
            if properties:
                text += f"<d:propstat><d:prop>{properties}</d:prop><d:status>HTTP/1.1 {status}</d:status></d:propstat>"
        return text + "</d:response>"

    def href(self, path: Path, root: Path) -> str:
        names = [quote(name, errors="surrogateescape") for name in path.relative_to(root).parts]
        return self.base + "".join("/" + name for name in names) + ("/" if path.is_dir() else "")

    def properties(self, path: Path, wanted: list[str]) -> tuple[str, str]:
        state, status, folder = self.state, path.stat(), path.is_dir()
        values = {
            DAV + "resourcetype": "<d:collection/>" if folder else "",
            DAV + "getcontentlength": None if folder else str(status.st_size),
            DAV + "getlastmodified": formatdate(int(status.st_mtime), usegmt=True),
            DAV + "getetag": f"&quot;{state.etag(path)}&quot;",
            DAV + "quota-used-bytes": str(state.used()) if folder and DAV + "quota-used-bytes" in wanted else None,
            DAV + "quota-available-bytes": str(state.hooks.get("quota", -3)) if folder else None,
            OC + "fileid": str(state.id(path)),
            OC + "permissions": state.hooks.get("permissions", {}).get(path.name, "RGDNVCK" if folder else "RGDNVW"),
            OC + "checksums": f"<oc:checksum>{state.checksum(path)}</oc:checksum>" if state.checksum(path) else None,
        }
        found = missing = ""
        for name in wanted:
            short = name.replace(DAV, "d:").replace(OC, "oc:")
            if (kept := state.properties.get(path, {}).get(name)) is not None:
                space, _, local = name[1:].partition("}")
                found += f'<x:{local} xmlns:x="{escape(space)}">{escape(kept)}</x:{local}>'
                continue
            if (value := values.get(name)) is not None:
                found += f"<{short}>{value}</{short}>"
            elif not short.startswith("{"):
                missing += f"<{short}/>"
        return found, missing

    # --- files ---

    def do_file_options(self, path: Path) -> None:
        self.answer(200, headers=self.features())

    def do_file_propfind(self, path: Path) -> None:
        wanted = [element.tag for element in ElementTree.fromstring(self.body()).iter() if len(element) == 0]
        token = self.headers.get("X-NC-Paginate-Token", "")
        count, offset = (int(self.headers.get(f"X-NC-Paginate-{name}", "0")) for name in ("Count", "Offset"))
        if token in self.state.pages and not self.state.hooks.get("forget_pages"):
            self.multistatus(self.state.pages[token][offset : offset + count], {"X-NC-Paginate": "true"})
            return
        with self.state.lock:
            self.there(path)
            paths = [path]
            if path.is_dir() and self.headers.get("Depth") == "1":
                paths += sorted(path.iterdir())
            responses = [
                self.response(self.href(each, self.state.root), *self.properties(each, wanted)) for each in paths
            ]
        headers = {}
        if self.headers.get("X-NC-Paginate") and len(responses) > offset + count:
            token = f"page{len(self.state.pages)}"
            self.state.pages[token] = responses
            headers = {"X-NC-Paginate": "true", "X-NC-Paginate-Token": token, "X-NC-Paginate-Total": str(len(responses))}
            responses = responses[offset : offset + count]
        self.multistatus(responses, headers)

    def do_file_get(self, path: Path) -> None:
        self.there(path)
        if path.is_dir():
            self.answer(200)
            return
        if path in self.state.assembling:
            raise Refused(423)
        with self.state.lock, contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("rb"))
            etag, checksum, size = self.state.etag(path), self.state.checksum(path), path.stat().st_size
            modified = formatdate(int(path.stat().st_mtime), usegmt=True)
            closing = stack.pop_all()
        if self.headers.get("If-Match", f'"{etag}"') != f'"{etag}"':
            raise Refused(412)
        headers = {"ETag": f'"{etag}"', "OC-ETag": f'"{etag}"', "Last-Modified": modified, "Transfer-Encoding": "chunked"}
        if checksum:
            headers["OC-Checksum"] = checksum
        status, start, stop = 200, 0, size
        with closing:
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, stop, status = int(match[1]), min(int(match[2] or size) + 1, size), 206
                if start >= size:
                    raise Refused(416)
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            self.answer(status, b"", headers)
            # An overwrite of ours writes in place, as Nextcloud does: its readers may get a mixture.
            while start < stop and (count := min(stop - start, 1 << 20)):
                self.wfile.write(b"%x\r\n" % count)
                sent = self.connection.sendfile(file, start, count)
                self.wfile.write(b"\r\n")
                if sent < count:
                    self.close_connection = True
                    return
                start += count
            self.wfile.write(b"0\r\n\r\n")

    def do_file_put(self, path: Path) -> None:
        state = self.state
        exists = path.exists()
        self.check_name(path)
        if path.is_dir():
            raise Refused(409)
        if not path.parent.is_dir():
            raise Refused(404)
        if path in state.assembling:
            raise Refused(423)
        if exists and self.headers.get("If-None-Match") == "*":
            raise Refused(412)
        if "If-Match" in self.headers and (not exists or self.headers["If-Match"] != f'"{state.etag(path)}"'):
            raise Refused(412)
        size = self.left
        if size > state.hooks.get("quota", size):
            raise Refused(507)
        if exists:
            state.keep_version(path)
        target = path if exists else state.uploads / f"part-{time.time_ns()}"
        with target.open("r+b" if exists else "wb") as file:
            file.truncate(0)
            while self.left and (piece := self.rfile.read1(min(self.left, 65536))):
                self.left -= len(piece)
                file.write(piece)
        if self.left:
            self.left = 0
            self.close_connection = True
            if not exists:
                target.unlink()
            return
        with state.lock:
            if not exists:
                if not path.parent.is_dir() or (path.exists() and self.headers.get("If-None-Match") == "*"):
                    target.unlink()
                    raise Refused(412 if path.exists() else 404)
                target.replace(path)
            self.finish_write(path, 204 if exists else 201)

    def finish_write(self, path: Path, status: int) -> None:
        state = self.state
        second = int(self.headers.get("X-OC-Mtime", int(time.time())))
        os.utime(path, (second, second))
        state.checksums.pop(path.stat().st_ino, None)
        if "OC-Checksum" in self.headers:
            state.keep_checksum(path, self.headers["OC-Checksum"])
        state.touched(path)
        if second <= 86400:
            raise Refused(500)
        etag = f'"{state.etag(path)}"'
        headers = {"ETag": etag, "OC-ETag": etag, "OC-FileId": f"{state.id(path):08}ocfake"}
        if "X-OC-Mtime" in self.headers:
            headers["X-OC-MTime"] = "accepted"
        if self.headers.get("X-Hash") == "sha1" and self.command == "PUT":
            headers["X-Hash-SHA1"] = hashlib.sha1(path.read_bytes()).hexdigest()
        self.answer(status, headers=headers)

    def check_name(self, path: Path) -> None:
        name, stem = path.name.lower(), path.name.lower()[:1] + path.name.lower()[1:].partition(".")[0]
        forbidden = self.state.hooks.get("forbidden", {})
        if (
            name in forbidden.get("forbidden_filenames", ())
            or stem in forbidden.get("forbidden_filename_basenames", ())
            or any(each in name for each in forbidden.get("forbidden_filename_characters", ()))
            or any(name.endswith(each) for each in forbidden.get("forbidden_filename_extensions", ()))
        ):
            raise Refused(400)
        name = path.name
        odd = any(character < " " or character == "\\" or "\udc80" <= character <= "\udcff" for character in name)
        if odd or name.lower() == ".htaccess" or name.lower().endswith((".part", ".filepart")) or len(os.fsencode(name)) > 250:
            raise Refused(400)

    def do_file_mkcol(self, path: Path) -> None:
        self.check_name(path)
        with self.state.lock:
            if path.exists():
                raise Refused(405)
            if not path.parent.is_dir():
                raise Refused(409)
            path.mkdir()
            self.state.touched(path)
        self.answer(201)

    def do_file_delete(self, path: Path) -> None:
        with self.state.lock:
            self.there(path)
            if "If-Match" in self.headers and self.headers["If-Match"] != f'"{self.state.etag(path)}"':
                raise Refused(412)
            self.state.remove(path)
            self.state.touched(path)
        self.answer(204)

    def do_file_move(self, path: Path) -> None:
        target = self.destination()
        self.check_name(target)
        with self.state.lock:
            self.there(path)
            self.check_target(target)
            if "If-Match" in self.headers and self.headers["If-Match"] != f'"{self.state.etag(path)}"':
                raise Refused(412)
            if path in target.parents:
                raise Refused(409)
            existed = target.exists()
            if existed:
                self.state.remove(target)
            path.rename(target)
            if (kept := self.state.properties.pop(path, None)) is not None:
                self.state.properties[target] = kept
            self.state.touched(path)
            self.state.touched(target)
        self.answer(204 if existed else 201)

    def destination(self) -> Path:
        path = urlsplit(self.headers["Destination"]).path
        prefix = f"/remote.php/dav/files/{quote(self.state.uid)}"
        if not path.startswith(prefix + "/"):
            raise Refused(403)
        target = self.place(path[len(prefix) :])
        if not target.parent.is_dir():
            raise Refused(409)
        return target

    def check_target(self, target: Path) -> None:
        if self.headers.get("Overwrite") == "F" and target.exists():
            raise Refused(412)
        if condition := self.headers.get("If"):
            match = re.fullmatch(r'<([^>]*)> \(\["([^"]*)"\]\)', condition)
            assert match is not None, condition
            if match[1] == self.headers["Destination"] and (not target.exists() or self.state.etag(target) != match[2]):
                raise Refused(412)

    def do_file_proppatch(self, path: Path) -> None:
        self.there(path)
        root = ElementTree.fromstring(self.body())
        found = missing = ""
        for element in root.iterfind(f"{DAV}set/{DAV}prop/*"):
            if element.tag == DAV + "lastmodified":
                second = int(element.text or "")
                checksum = self.state.checksum(path)
                os.utime(path, (second, second))
                if checksum:
                    self.state.keep_checksum(path, checksum)
                self.state.touched(path)
                found += "<d:lastmodified/>"
            elif element.tag.startswith(DAV):
                missing += "<d:getlastmodified/>"
            else:
                self.state.properties.setdefault(path, {})[element.tag] = element.text or ""
                found += self.empty(element.tag)
        for element in root.iterfind(f"{DAV}remove/{DAV}prop/*"):
            self.state.properties.get(path, {}).pop(element.tag, None)
            found += self.empty(element.tag)
        self.multistatus([self.response(self.href(path, self.state.root), found, missing)])

    @staticmethod
    def empty(tag: str) -> str:
        space, _, local = tag[1:].partition("}")
        return f'<x:{local} xmlns:x="{escape(space)}"/>'

    # --- uploads ---

    def do_upload(self, path: str) -> None:
        state = self.state
        names = [unquote(name) for name in path.split("/") if name]
        place = state.uploads.joinpath(*names)
        if self.command in ("MKCOL", "PUT", "MOVE") and "Destination" not in self.headers:
            raise Refused(400)  # as the uploads of object stores do (ChunkingV2Plugin)
        if self.command == "MKCOL":
            if place.exists():
                raise Refused(405)
            place.mkdir()
            self.answer(201)
        elif self.command == "PUT":
            self.put_chunk(place)
        elif self.command == "PROPFIND":
            self.there(place)
            self.body()
            chunks = sorted(place.iterdir())
            sizes = [(self.href(each, state.uploads), each.stat().st_size) for each in chunks]
            sizes.append((self.href(place, state.uploads) + ".file", sum(size for _, size in sizes)))
            found = [self.response(href, f"<d:getcontentlength>{size}</d:getcontentlength>") for href, size in sizes]
            self.multistatus([self.response(self.href(place, state.uploads), "<d:resourcetype/>"), *found])
        elif self.command == "DELETE":
            shutil.rmtree(self.there(place))
            self.answer(204)
        elif self.command == "MOVE":
            self.assemble(place)
        else:
            raise Refused(501)

    def put_chunk(self, place: Path) -> None:
        total = int(self.headers.get("OC-Total-Length", "0"))
        if total > self.state.hooks.get("quota", total):
            raise Refused(507)
        if not place.parent.is_dir() or not self.destination_parent():
            raise Refused(404)
        data = self.body()
        if self.left:
            self.close_connection = True
            self.left = 0
            return
        existed = place.exists()
        place.write_bytes(data)
        self.answer(204 if existed else 201)

    def destination_parent(self) -> bool:
        try:
            return "Destination" not in self.headers or self.destination().parent.is_dir()
        except Refused:
            return False

    def assemble(self, place: Path) -> None:
        state, folder = self.state, place.parent
        if place.name != ".file" or not folder.is_dir():
            raise Refused(404)
        if "If-None-Match" in self.headers or "If-Match" in self.headers:
            raise Refused(412)  # tested against `.file`
        target = self.destination()
        chunks = sorted(folder.iterdir(), key=lambda chunk: int(chunk.name))
        with state.lock:
            if target in state.assembling:
                raise Refused(423)
            self.check_target(target)
            if sum(chunk.stat().st_size for chunk in chunks) != int(self.headers.get("OC-Total-Length", "0")):
                raise Refused(400, "Chunks on server do not sum up")
            existed = target.exists()
            state.assembling.add(target)
        time.sleep(state.hooks.get("assembling", 0))
        with state.lock:
            if existed:
                state.keep_version(target)
            with target.open("r+b" if existed else "wb") as file:
                file.truncate(0)
                for chunk in chunks:
                    file.write(chunk.read_bytes())
            shutil.rmtree(folder)
            state.assembling.discard(target)
            self.finish_write(target, 204 if existed else 201)

    def log_message(self, *_: object) -> None:
        """Says nothing: the log of requests has it."""


def serve(settings: dict[str, Any]) -> None:
    """Serves until the process is ended."""
    Handler.state = State(settings)
    server = ThreadingHTTPServer(("127.0.0.1", settings["port"]), Handler)
    server.daemon_threads = True
    server.serve_forever()


if __name__ == "__main__":
    serve(json.loads(Path(sys.argv[1]).read_text()))
