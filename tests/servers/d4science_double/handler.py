"""HTTP of the double: routes, log-in, status codes of the two profiles, faults, the log of requests, and the test's own door.

What the requests do is in tree.py. Paths below `/_double/` are for tests alone and need no log-in.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import urllib.parse
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.servers.d4science_double import render
from tests.servers.d4science_double.door import Door
from tests.servers.d4science_double.hooks import Hook, Hooks
from tests.servers.d4science_double.multipart import CutShort, NotMultipart, read_form
from tests.servers.d4science_double.settings import Settings
from tests.servers.d4science_double.tokens import Tokens
from tests.servers.d4science_double.tree import Node, Refusal, Tree

PREFIX = "/workspace"
EXCEPTIONS = "org.gcube.common.storagehub.model.exceptions."
ONE_CHANGE = 1024 * 1024
"""Bytes of an upload up to which it counts as one of the changes that a client should not make side by side."""


class Double:
    """What all requests share."""

    port = 0

    def __init__(self, payloads: Path, log: Path) -> None:
        self.settings = Settings()
        self.tree = Tree(self.settings, payloads)
        self.tokens = Tokens()
        self.hooks = Hooks()
        self.log = log
        self.lock = threading.Lock()
        self.links: dict[str, str] = {}
        self.running: dict[str, int] = {}
        self.overlaps: dict[str, int] = {}

    def note(self, line: str) -> None:
        with self.lock, self.log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def begins(self, folder: str) -> None:
        with self.lock:
            self.running[folder] = self.running.get(folder, 0) + 1
            if self.running[folder] > 1:
                self.overlaps[folder] = max(self.overlaps.get(folder, 0), self.running[folder])

    def ends(self, folder: str) -> None:
        with self.lock:
            self.running[folder] -= 1


class Lost(Exception):
    """The connection is to close without an answer."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1024 * 1024
    disable_nagle_algorithm = True
    double: Double

    # --- one request ---

    def handle_any(self) -> None:
        raw, _, query = self.path.partition("?")
        self.parts = [urllib.parse.unquote(part) for part in raw.split("/") if part]
        self.query = urllib.parse.parse_qs(query, keep_blank_values=True)
        self.left = int(self.headers.get("Content-Length", "0"))
        self.user = "-"
        self.logged = False
        self.hook: Hook | None = None
        try:
            self.dispatch()
        except Refusal as refusal:
            self.refuse(refusal)
        except (Lost, CutShort, ConnectionError):
            self.close_connection = True
            self.note(0)
        except NotMultipart as exc:
            self.text(400, f"<html>{exc}</html>", "text/html")
        self.drain()

    do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = handle_any  # noqa: N815

    def dispatch(self) -> None:
        if self.command == "OPTIONS":
            self.text(200, "")
        elif self.parts[:1] == ["_double"]:
            door = Door(self.double.tree, self.double.tokens, self.double.hooks, self.double.overlaps)
            status, answer = door.open(self.parts[1], self.query, self.body())
            self.logged = True
            self.send(status, answer, "application/octet-stream")
        elif self.parts[:1] == ["auth"]:
            self.token()
        elif self.parts[:1] == ["icproxy"]:
            self.discovery()
        elif self.parts[:1] == ["shub"]:
            self.payload(self.double.tree.nodes[self.double.links[self.parts[1]]], None)
        else:
            self.service()

    def service(self) -> None:
        if not self.log_in():
            status = self.double.settings.bad_token_status
            self.text(status, "<html>the token is missing or expired</html>", "text/html")
            return
        hook = self.hook = self.double.hooks.take(f"{self.command} {self.path}", self.user)
        if hook is not None and self.fault(hook):
            return
        limit = self.double.settings.max_body
        if limit is not None and self.left > limit:
            self.text(413, "<html>Request Entity Too Large</html>", "text/html")
            self.close_connection = True
            return
        if self.parts[:1] == ["rest"]:
            profile = {"username": self.user, "fullname": self.user, "avatar": "", "roles": [], "context": "/root"}
            self.json({"result": profile})
        elif self.parts[:1] != [PREFIX.strip("/")]:
            self.text(404, "<html>no such page</html>", "text/html")
        else:
            self.workspace(self.parts[1:])

    def workspace(self, parts: list[str]) -> None:
        tree, user = self.double.tree, self.user
        if parts[:1] == ["items"] and len(parts) > 1:
            self.items(parts[1], parts[2:])
            return
        if self.command == "PUT" and parts == ["trash", "restore"]:
            id = self.body().decode().strip().strip('"')
            with tree.lock:
                self.id_text(tree.restore(id, user).id)
            return
        if self.command == "DELETE" and parts == ["trash", "empty"]:
            with tree.lock:
                self.id_text(tree.empty_trash(user))
            return
        with tree.lock:
            home = tree.user(user)
            vres = [node for node in tree.nodes.values() if node.kind == "vre" and user in node.clones]
            everything = [node for node in tree.nodes.values() if node.owner == user and node.kind == "file"]
            if not parts:
                self.root()
            elif parts == ["vrefolder"]:
                if not vres:
                    raise Refusal("BackendGenericError", "the current scope is not a VRE", 406)
                self.item(vres[0])
            elif parts in (["vrefolders"], ["vrefolder", "recents"]):
                self.items_list(vres)
            elif parts == ["vrefolders", "paged"]:
                self.items_list(self.window(vres))
            elif parts == ["trash"]:
                self.item(tree.nodes[home.trash])
            elif parts == ["shared-with-me"]:
                self.items_list([node for node in tree.nodes.values() if node.kind == "shared" and user in node.clones])
            elif parts == ["size"] and self.double.settings.has_size:
                self.text(200, str(sum(node.versions[-1].size for node in everything)), "application/json")
            elif parts == ["count"]:
                self.text(200, str(len(everything)), "application/json")
            else:
                self.text(404, "<html>no such page</html>", "text/html")

    def root(self) -> None:
        tree = self.double.tree
        node = tree.nodes[tree.user(self.user).root]
        for name in self.query.get("relPath", [""])[0].split("/"):
            if name:
                found = [each for each in tree.listing(node, self.user, hidden=True) if each.shown == name]
                if not found:
                    raise Refusal("BackendGenericError", "javax.jcr.PathNotFoundException", 406)
                node = found[0]
        self.item(node)

    # --- items ---

    def items(self, id: str, rest: list[str]) -> None:
        verb = rest[0] if rest else ""
        if self.command == "GET":
            self.look(id, verb, rest[1:])
            return
        with self.double.tree.lock:
            self.double.tree.remember()
        if (self.command, verb) == ("POST", "create"):
            self.create(id, rest[1] if len(rest) > 1 else "")
        elif self.command == "PUT" and verb in ("rename", "move", "copy", "metadata"):
            self.change(id, verb)
        elif self.command == "DELETE" and not verb:
            self.delete(id)
        else:
            self.text(404, "<html>no such page</html>", "text/html")

    def look(self, id: str, verb: str, rest: list[str]) -> None:
        tree, user = self.double.tree, self.user
        with tree.lock:
            try:
                node = tree.get(id, user)
            except Refusal as refusal:
                raise self.as_profile(refusal, verb) from None
            if verb == "":
                node.accounting.append("READ")
                self.item(node)
            elif verb in ("children", "items"):
                with tree.behind():
                    try:
                        node = tree.get(id, user)
                    except Refusal as refusal:
                        raise self.as_profile(refusal, verb) from None
                    if verb == "children":
                        self.children(node, rest)
                    else:
                        self.items_list(tree.named(self.a_folder(node), user, rest[0]))
            elif verb == "anchestors":
                self.items_list(tree.parents(node))
            elif verb == "rootSharedFolder":
                share = tree.share_of(node)
                if share is None:
                    raise Refusal("InvalidCallParameters", "the item is not shared", 400)
                self.item(share)
            elif verb == "acls":
                members = node.members or {node.owner: "ADMINISTRATOR"}
                self.json({"acls": [{"pricipal": name, "accessTypes": [access]} for name, access in members.items()]})
            elif verb == "versions" and not rest:
                if node.kind != "file":
                    raise Refusal("InvalidItemException", "not a file")
                self.json({"itemlist": [
                    {"id": f"{node.id}-{each.name}", "name": each.name, "created": each.created,
                     "current": each is node.versions[-1]}
                    for each in node.versions
                ]})  # fmt: skip
            elif verb == "publiclink":
                self.public_link(node)
            elif verb not in ("download", "versions"):
                self.text(404, "<html>no such page</html>", "text/html")
        if verb == "download":
            self.payload(node, None)
        elif verb == "versions" and rest:
            self.payload(node, rest[0])

    def children(self, node: Node, rest: list[str]) -> None:
        hidden = self.query.get("showHidden", ["false"])[0].lower() == "true"
        found = self.double.tree.listing(self.a_folder(node), self.user, hidden=hidden)
        if rest == ["paged"]:
            found = self.window(found)
        if rest == ["count"]:
            self.text(200, str(len(found)), "application/json")
        else:
            self.items_list(found)

    def create(self, parent: str, what: str) -> None:
        tree, user = self.double.tree, self.user
        accept = self.headers.get("Accept", "*/*")
        if self.double.settings.profile == "2.x" and not re.search(r"text/plain|text/\*|\*/\*", accept):
            self.text(406, "<html>Not Acceptable</html>", "text/html")
            return
        counted = self.left <= ONE_CHANGE
        if counted:
            self.double.begins(parent)
        try:
            if what == "FILE":
                payload = tree.payloads / uuid.uuid4().hex
                form, size = read_form(self.read, self.headers.get("Content-Type", ""), self.left, payload)
                if size is None or "description" not in form or not form.get("name", "").strip():
                    raise Refusal("InvalidCallParameters", "name, description and file are needed", 400)
                self.race(parent, form["name"])
                if self.hook is not None and self.hook.action == "truncate":
                    size = self.hook.count
                    with payload.open("r+b") as stored:
                        stored.truncate(size)
                with tree.lock:
                    node = tree.create_file(parent, form["name"], form["description"], payload, size, user)
            elif what == "FOLDER":
                values = self.form()
                self.race(parent, values.get("name", ""))
                with tree.lock:
                    hidden = values.get("hidden", "false").lower() == "true"
                    node = tree.create_folder(parent, values.get("name", ""), values.get("description", ""), hidden, user)
            else:
                self.text(404, "<html>no such page</html>", "text/html")
                return
        except Refusal as refusal:
            raise self.as_profile(refusal, "create" if what == "FOLDER" else "upload") from None
        finally:
            if counted:
                self.double.ends(parent)
        self.id_text(node.id)

    def change(self, id: str, verb: str) -> None:
        tree, user = self.double.tree, self.user
        with tree.lock:
            folders = [tree.nodes[id].parent or ""] if id in tree.nodes else []
        for folder in folders:
            self.double.begins(folder)
        try:
            if verb == "metadata":
                values = json.loads(self.body())
                inner = values.get("map", values.get("values", {}))
                with tree.lock:
                    node = tree.set_metadata(id, inner, user)
            else:
                form = self.form()
                self.race(form.get("destinationId", folders[0] if folders else ""), form.get("newName", ""))
                with tree.lock:
                    if verb == "rename":
                        node = tree.rename(id, form["newName"], user)
                    elif verb == "move":
                        node = tree.move(id, form["destinationId"], user)
                    else:
                        node = tree.copy(id, form["destinationId"], form["fileName"], user)
        except Refusal as refusal:
            raise self.as_profile(refusal, verb) from None
        finally:
            for folder in folders:
                self.double.ends(folder)
        self.id_text(node.id)

    def delete(self, id: str) -> None:
        tree = self.double.tree
        with tree.lock:
            try:
                tree.delete(id, self.user, force=self.query.get("force", [""])[0].lower() == "true")
            except Refusal as refusal:
                raise self.as_profile(refusal, "delete") from None
        self.text(self.double.settings.delete_status, "")

    # --- content ---

    def payload(self, node: Node, version: str | None) -> None:
        tree = self.double.tree
        with tree.lock:
            if node.kind != "file":
                raise Refusal("InvalidItemException", "not a file")
            found = [each for each in node.versions if version in (None, each.name)]
            if not found:
                raise Refusal("BackendGenericError", "no such version", 406)
            content = found[-1]
            node.accounting.append("READ")
        start, stop, status = 0, content.size, 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.double.settings.ranges and match:
            start, stop, status = int(match[1]), min(int(match[2] or content.size - 1) + 1, content.size), 206
            if start >= content.size:
                self.text(416, "")
                return
        self.note(status)
        self.send_response_only(status)
        self.send_header("content-disposition", f"attachment; filename = {node.shown.encode().decode('latin-1')}")
        self.send_header("Content-Type", content.mime)
        self.send_header("Content-Length", str(stop - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{content.size}")
        self.end_headers()
        hook = self.hook if self.hook is not None and self.hook.action in ("cut", "drip", "trickle") else None
        with content.payload.open("rb") as file:
            file.seek(start)
            if hook is not None:
                self.wfile.write(file.read(min(hook.count, stop - start)))
                self.wfile.flush()
                if hook.action == "cut":
                    raise Lost
                while hook.action == "trickle" and not hook.released.wait(hook.seconds) and file.tell() < stop:
                    self.wfile.write(file.read(min(1024 * 1024, stop - file.tell())))
                    self.wfile.flush()
                if hook.action == "drip":
                    hook.released.wait(60)
            while file.tell() < stop:
                self.wfile.write(file.read(min(256 * 1024, stop - file.tell())))

    def public_link(self, node: Node) -> None:
        opaque = uuid.uuid4().hex
        self.double.links[opaque] = node.id
        prefix = self.double.settings.public_prefix or f"http://127.0.0.1:{self.double.port}/shub/"
        self.text(200, json.dumps(prefix + opaque), "application/json")

    # --- log-in ---

    def log_in(self) -> bool:
        bearer = self.headers.get("Authorization", "").partition("Bearer ")[2]
        text = bearer or self.headers.get("gcube-token", "") or self.query.get("gcube-token", [""])[0]
        token = self.double.tokens.find(text)
        if token is None:
            return False
        self.user = token.user
        with self.double.tree.lock:
            self.double.tree.user(token.user)
        return True

    def token(self) -> None:
        """The three grants that public clients use."""
        form = self.form()
        tokens, settings = self.double.tokens, self.double.settings
        grant = form.get("grant_type", "")
        if grant == "urn:ietf:params:oauth:grant-type:uma-ticket":
            user = form.get("user", "ann")
            context = urllib.parse.unquote(form.get("audience", ""))
        elif grant == "refresh_token" and (known := tokens.refreshed(form.get("refresh_token", ""))) is not None:
            user, context = known.user, known.context
        elif grant == "password" and form.get("scope", "").startswith("d4s-context:"):
            user, context = form.get("username", ""), form["scope"].removeprefix("d4s-context:")
        else:
            self.json({"error": "invalid_grant"}, 400)
            return
        access = tokens.issue(user, context=context, seconds=settings.expires_in)
        refresh = tokens.refresh_token(user, context)
        self.json({"access_token": access, "expires_in": int(settings.expires_in), "refresh_token": refresh})

    def discovery(self) -> None:
        url = f"http://127.0.0.1:{self.double.port}{PREFIX}"
        self.text(200, (
            "<Result><Resource><Profile><AccessPoint><RunningInstanceInterfaces>"
            f'<Endpoint EntryName="org.gcube.data.access.storagehub.StorageHub">{url}</Endpoint>'
            "</RunningInstanceInterfaces></AccessPoint></Profile></Resource></Result>"
        ), "application/xml")  # fmt: skip

    # --- faults ---

    def fault(self, hook: Hook) -> bool:
        """Whether the hook has answered already."""
        if hook.action == "lose-before":
            self.body()
            raise Lost
        if hook.action == "delay":
            hook.released.wait(hook.seconds)
        elif hook.action == "nothing":
            self.body()
            self.id_text(self.parts[2] if len(self.parts) > 2 else "")
            return True
        elif hook.action == "status":
            self.body()
            if hook.gx:
                self.gx(hook.status, hook.gx, hook.body)
            else:
                self.text(hook.status, hook.body or "<html>proxy</html>", "text/html")
            return True
        return False

    def race(self, parent: str, name: str) -> None:
        """Somebody else is faster: takes the name just before."""
        if self.hook is None or self.hook.action != "race":
            return
        tree = self.double.tree
        with tree.lock:
            tree.create_folder(parent, self.hook.name or name, "", False, self.user)

    # --- answers ---

    def as_profile(self, refusal: Refusal, verb: str) -> Refusal:
        """The refusal with the status of the profile, for a missing id."""
        if refusal.name != "IdNotFoundException" or refusal.status is not None:
            return refusal
        if self.double.settings.profile == "1.x" and verb in ("", "children", "items", "create"):
            return Refusal(refusal.name, str(refusal), 404)
        return Refusal(self.double.settings.missing_class, str(refusal), 406)

    def refuse(self, refusal: Refusal) -> None:
        status = refusal.status
        if status is None:
            status = 406 if refusal.name == "IdNotFoundException" else 500
        self.gx(status, refusal.name, str(refusal))

    def gx(self, status: int, name: str, message: str) -> None:
        body = {"id": -1, "message": message, "exceptionClass": EXCEPTIONS + name, "encodedTrace": ""}
        self.send(status, json.dumps(body).encode(), "application/json", {"ETag": '"GXErrorResponse"'})

    def item(self, node: Node) -> None:
        self.json({"item": render.item(self.double.tree, node, self.user, set(self.query.get("exclude", [])))})

    def items_list(self, nodes: list[Node]) -> None:
        exclude = set(self.query.get("exclude", []))
        self.json({"itemlist": [render.item(self.double.tree, node, self.user, exclude) for node in nodes]})

    def window(self, nodes: list[Node]) -> list[Node]:
        try:
            start, limit = int(self.query["start"][0]), int(self.query["limit"][0])
        except (KeyError, ValueError):
            raise Refusal("BackendGenericError", "start and limit are needed", 500) from None
        return nodes[start : start + limit]

    def a_folder(self, node: Node) -> Node:
        if not node.is_folder and node.kind != "trash":
            raise Refusal("InvalidItemException", "the item is not a folder")
        return node

    def json(self, values: Any, status: int = 200) -> None:
        self.text(status, json.dumps(values), "application/json")

    def id_text(self, id: str) -> None:
        self.text(200, id)

    def text(self, status: int, text: str, kind: str = "text/plain") -> None:
        self.send(status, text.encode(), kind)

    def send(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        hook = self.hook
        if hook is not None and status < 300 and hook.action == "lose-after":
            raise Lost
        self.note(status)
        self.send_response_only(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status != 204:
            self.wfile.write(body)

    def note(self, status: int) -> None:
        if not self.logged:
            self.double.note(f"{self.command} {self.path} {status} {self.user}")
            self.logged = True

    # --- bodies ---

    def read(self, count: int) -> bytes:
        data = self.rfile.read(min(count, self.left))
        self.left -= len(data)
        return data

    def body(self) -> bytes:
        length = self.left
        data = self.read(length)
        if len(data) < length:
            raise CutShort
        return data

    def form(self) -> dict[str, str]:
        """A form-urlencoded or small multipart body."""
        if self.headers.get("Content-Type", "").startswith("multipart/"):
            return read_form(self.read, self.headers["Content-Type"], self.left, self.double.tree.payloads / "unused")[0]
        values = urllib.parse.parse_qs(self.body().decode("utf-8"), keep_blank_values=True)
        return {name: value[0] for name, value in values.items()}

    def drain(self) -> None:
        """What is left of the body is read, so that the connection can serve again; a long one closes it."""
        if self.left > ONE_CHANGE:
            self.close_connection = True
        elif self.left:
            self.read(self.left)

    def log_message(self, *arguments: object) -> None:
        """Requests are in the log already."""


def serve(port: int, work: Path, log: Path) -> None:
    """Serves until the process is ended; says on standard output on which port, which may be 0 for any."""
    payloads = work / "payloads"
    payloads.mkdir(exist_ok=True)
    double = Double(payloads, log)
    handler: Callable[..., Handler] = type("Bound", (Handler,), {"double": double})

    class Server(ThreadingHTTPServer):
        request_queue_size = 64
        daemon_threads = True

    server = Server(("127.0.0.1", port), handler)
    double.port = server.server_address[1]
    sys.stdout.write(f"{double.port}\n")
    sys.stdout.flush()
    server.serve_forever()
