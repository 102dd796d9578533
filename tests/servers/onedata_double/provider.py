"""A Oneprovider's REST face (op-worker: src/http/rest/routes): reference/onedata.md, section 3, as code."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from .access import authenticate, check_file, check_space, check_writable, token_of
from .attributes import choice_of
from .cdmi import cdmi_put
from .content import download, write_body
from .events import stream_events
from .refusal import Refusal, bad_value, forbidden, posix
from .server import Request, Response, json_response
from .world import Node, Space, Token, View, World

PREFIX = ["api", "v3", "oneprovider"]
EMPTY = Response(204)
KNOWN_INTERNAL = ("cdmi_acl", "cdmi_mimetype", "onedata_json", "onedata_rdf")


class Provider:
    """One provider. `version` decides between the generations of attribute names and limits."""

    def __init__(self, world: World, id: str, name: str, domain: str, version: str, *, has_events: bool) -> None:
        self.world = world
        self.id = id
        self.name = name
        self.domain = domain
        self.version = version
        self.online = True
        self.has_events = has_events
        self.quota: int | None = None
        self.plain_index = True
        self.streams = 0
        """Streams of events opened so far."""

    @property
    def view(self) -> View:
        return self.world.views[self.id]

    @property
    def number(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.version.split("."))

    def handle(self, request: Request) -> Response:
        self.world.catch_up()
        segments = request.segments
        if segments[:1] == ["cdmi"]:
            token = authenticate(self.world, token_of(request), f"opw-{self.id}")
            return cdmi_put(self, token, request)
        if segments[:3] != PREFIX:
            raise Refusal(404, "notFound", "The resource could not be found.")
        route = segments[3:]
        if route == ["configuration"]:
            return json_response(
                {"providerId": self.id, "name": self.name, "domain": self.domain, "version": self.version, "build": "x"}
            )
        if route == ["health"]:
            return json_response({"status": "healthy"})
        token = authenticate(self.world, token_of(request), f"opw-{self.id}")
        handler = self._handlers(route).get(request.method)
        if handler is None:
            if self._handlers(route):
                return Response(405)
            raise Refusal(404, "notFound", "The resource could not be found.")
        return handler(token, request)

    def _handlers(self, route: list[str]) -> dict[str, Callable[[Token, Request], Response]]:
        kind, rest = route[0], route[1:]
        if kind == "spaces":
            if not rest:
                return {"GET": self._spaces}
            if len(rest) == 1:
                return {"GET": self._space}
            if rest[1:] == ["events", "files"] and self.has_events:
                return {"POST": lambda token, request: stream_events(self, token, request)}
        if kind == "lookup-file-id" and rest:
            return {"POST": self._lookup}
        if kind != "data" or not rest:
            return {}
        below = rest[1:]
        if not below:
            return {"GET": self._attributes, "PUT": self._set_attributes, "DELETE": self._remove}
        if below[0] == "path" and len(below) > 1:
            return {"GET": self._download_at, "PUT": self._create_at, "DELETE": self._remove_at}
        table: dict[str, dict[str, Callable[[Token, Request], Response]]] = {
            "children": {"GET": self._children, "POST": self._create},
            "files": {"GET": self._files},
            "content": {"GET": self._download, "PUT": self._write},
            "symlink_value": {"GET": self._symlink_value},
            "hardlinks": {"GET": self._hardlinks},
            "distribution": {"GET": self._distribution},
            "metadata/xattrs": {"GET": self._xattrs, "PUT": self._set_xattrs, "DELETE": self._remove_xattrs},
            "metadata/json": {"GET": self._document, "PUT": self._set_document, "DELETE": self._remove_document},
            "metadata/rdf": {"GET": self._document, "PUT": self._set_document, "DELETE": self._remove_document},
        }
        return table.get("/".join(below), {})

    # --- finding ---

    def find(self, token: Token, identifier: str, wanted: str = "") -> tuple[Space, Node]:
        """The object with this file id, or the root of the space with this id. Raises Refusal in the server's order."""
        root = self.world.spaces.get(identifier)
        node = self.world.root(self.view, identifier) if root is not None else None
        if node is None:
            from .ids import parse_file_id

            parsed = parse_file_id(identifier)
            if parsed is None:
                raise bad_value("badValueIdentifier", "id")
            space_id = parsed[1]
        else:
            space_id = identifier
        space = check_space(self.world, token, space_id, self.id)
        if node is None:
            node = self.world.by_id(self.view, identifier)
        if node is None:
            raise posix("enoent")
        check_file(space, token, node, wanted)
        return space, node

    def find_for_change(self, token: Token, identifier: str, wanted: str = "") -> tuple[Space, Node]:
        space, node = self.find(token, identifier, wanted)
        check_writable(space, token, self.id)
        return space, node

    def _lookup(self, token: Token, request: Request) -> Response:
        name, *path = request.segments[4:]
        space = self.space_named(token, name)
        root = self.world.root(self.view, space.id)
        assert root is not None
        with self.world.lock:
            return json_response({"fileId": self.world.walk(self.view, root, [part for part in path if part]).id})

    def space_named(self, token: Token, name: str) -> Space:
        plain, _, id = name.partition("@")  # the first one: user_logic get_space_by_name
        for space in self.world.spaces.values():
            if token.user in space.members and space.name == plain and id in ("", space.id):
                return check_space(self.world, token, space.id, self.id)
        raise posix("enoent")

    # --- spaces ---

    def _spaces(self, token: Token, request: Request) -> Response:
        spaces = self.world.spaces.values()
        return json_response([self._told(space) for space in spaces if token.user in space.members])

    def _space(self, token: Token, request: Request) -> Response:
        space = self.world.spaces.get(request.segments[4])
        if space is None or token.user not in space.members:
            raise forbidden()
        return json_response(self._told(space))

    def _told(self, space: Space) -> dict[str, Any]:
        from .ids import file_id

        root = file_id(f"space_{space.id}", space.id)
        return {
            "spaceId": space.id, "name": space.name, "dirId": root, "fileId": root,
            "providers": [{"providerId": id, "providerName": id} for id in space.supports],
        }  # fmt: skip

    # --- listing and attributes ---

    def _children(self, token: Token, request: Request) -> Response:
        asked = request.json()
        _, node = self.find(token, request.segments[4], "r")
        highest = 10_000 if self.number >= (21, 2, 4) else 1000
        limit = _integer(asked, "limit", 1000, 1, highest)
        if node.type != "DIR":
            child = choice_of(self.world, self.view, asked, self.number, listing=True)(node, node.name)
            return json_response({"children": [child], "isLast": True, "nextPageToken": _token(b"")})
        with self.world.lock:
            listing = self.view.listing(node.uuid)
            start = 0
            if "token" in asked:
                after = _from_token(asked["token"])
                start = self.view.position(node.uuid, after)
                if start < len(listing) and listing[start][0] == after:
                    start += 1
            elif "index" in asked:
                if not self.plain_index:
                    raise bad_value("badValueString", "index")
                start = self.view.position(node.uuid, str(asked["index"]).encode())
            page = listing[start : start + limit]
            choose = choice_of(self.world, self.view, asked, self.number, listing=True)
            children = [choose(child, name.decode()) for name, child in page]
            last = start + limit >= len(listing)
            token_text = _token(page[-1][0] if page else b"")
        return json_response({"children": children, "isLast": last, "nextPageToken": token_text})

    def _files(self, token: Token, request: Request) -> Response:
        asked = request.json()
        _, node = self.find(token, request.segments[4], "r")
        limit = _integer(asked, "limit", 1000, 1, 10_000)
        with self.world.lock:
            found = sorted(self._below(node, ""))
            after = str(asked.get("token") or asked.get("start_after") or "")
            found = [item for item in found if item[0] > after and item[0].startswith(str(asked.get("prefix", "")))]
            page = found[:limit]
            choose = choice_of(self.world, self.view, asked, self.number)
            files = [
                {"fileId": child.id, "path": path}
                | (choose(child, child.name) if "attributes" in asked else {})
                for path, _, child in page
                if child.type != "DIR" or asked.get("include_directories")
            ]
        more = page[-1][0] if len(found) > limit else None
        return json_response({"files": files, "inaccessiblePaths": [], "nextPageToken": more})

    def _below(self, node: Node, prefix: str) -> list[tuple[str, str, Node]]:
        found = []
        for name, child in self.view.listing(node.uuid):
            path = prefix + name.decode()
            found.append((path, child.uuid, child))
            if child.type == "DIR":
                found += self._below(child, path + "/")
        return found

    def _attributes(self, token: Token, request: Request) -> Response:
        asked = request.json()
        with self.world.lock:
            _, node = self.find(token, request.segments[4])
            return json_response(choice_of(self.world, self.view, asked, self.number)(node, node.name))

    def _set_attributes(self, token: Token, request: Request) -> Response:
        asked = request.json()
        with self.world.lock:
            space, node = self.find_for_change(token, request.segments[4])
            mode = _mode(asked)
            if token.user not in (node.owner, space.owner):
                raise posix("eacces")
            if mode is not None:
                node.mode, node.ctime = mode, self.world.now()
                self.world.save(self.view, node)
        return EMPTY

    # --- content ---

    def _download(self, token: Token, request: Request) -> Response:
        with self.world.lock:
            _, node = self.find(token, request.segments[4])
            return self._send(token, node, request)

    def _download_at(self, token: Token, request: Request) -> Response:
        with self.world.lock:
            _, base = self.find(token, request.segments[4])
            return self._send(token, self.world.walk(self.view, base, request.segments[6:]), request)

    def _send(self, token: Token, node: Node, request: Request) -> Response:
        if node.type == "SYMLNK":
            if request.query.get("follow_symlinks") == ["false"]:
                return Response(200, (node.target or "").encode(), {"Content-Type": "application/octet-stream"})
            node = self.world.follow(self.view, node)
        check_file(self.world.spaces[node.space], token, node, "r")
        if node.type == "DIR":
            return Response(302, b"", {"Location": f"https://{self.domain}/download/abc"})
        return download(self.world, node, request.headers.get("range"))

    def _write(self, token: Token, request: Request) -> Response:
        offset = _offset(request)
        self._check_octets(request)
        with self.world.lock:
            _, node = self.find_for_change(token, request.segments[4], "w")
            if node.type != "REG":
                raise posix("eisdir")
        self._check_quota(request)
        write_body(self.world, self.view, node, request, offset)
        return EMPTY

    def _check_octets(self, request: Request) -> None:
        if request.body_size and request.headers.get("content-type", "").split(";")[0] != "application/octet-stream":
            raise Refusal(415, "badData", "Unsupported media type.")

    def _check_quota(self, request: Request) -> None:
        if self.quota is not None and request.body_size > self.quota:
            raise posix("enospc")

    # --- making and removing ---

    def _create(self, token: Token, request: Request) -> Response:
        names = request.query.get("name")
        if not names:
            raise Refusal(400, "missingRequiredValue", 'Missing required value: "name".', {"key": "name"})
        with self.world.lock:
            _, parent = self.find_for_change(token, request.segments[4], "wx")
        return self._make(token, request, parent, names[0])

    def _create_at(self, token: Token, request: Request) -> Response:
        *above, name = request.segments[6:]
        with self.world.lock:
            _, parent = self.find_for_change(token, request.segments[4])
            for part in above:
                if request.query.get("create_parents") == ["true"] and self.view.child(parent.uuid, part) is None:
                    parent = self.world.make(self.view, parent, part, "DIR", None, token.user)
                else:
                    parent = self.world.walk(self.view, parent, [part])
        return self._make(token, request, parent, name)

    def _make(self, token: Token, request: Request, parent: Node, name: str) -> Response:
        if "\0" in name or "/" in name or name in ("", ".", ".."):
            raise bad_value("badValueFilePath", "path")
        kind = request.query.get("type", ["REG"])[0]
        if kind not in ("REG", "DIR", "LNK", "SYMLNK"):
            raise bad_value("badValueNotAllowed", "type", allowed=["REG", "DIR", "LNK", "SYMLNK"])
        mode = _mode({key: values[0] for key, values in request.query.items()})
        if kind == "REG":
            self._check_octets(request)
            self._check_quota(request)
        with self.world.lock:
            source = self.find(token, request.query["target_file_id"][0])[1] if kind == "LNK" else None
            target = request.query.get("target_file_path", [""])[0] if kind == "SYMLNK" else None
            node = self.world.make(self.view, parent, name, kind, mode, token.user, target=target, source=source)
        if kind == "REG" and request.body_size:
            try:
                check_file(self.world.spaces[node.space], token, node, "w")
                write_body(self.world, self.view, node, request, _offset(request) or 0)
            except BaseException:
                with self.world.lock:
                    self.world.drop(self.view, node)
                raise
        location = f"https://{self.domain}/api/v3/oneprovider/data/{node.id}"
        return json_response({"fileId": node.id}, 201, Location=location)

    def _remove(self, token: Token, request: Request) -> Response:
        with self.world.lock:
            space, node = self.find_for_change(token, request.segments[4])
            return self._unlink(token, space, node)

    def _remove_at(self, token: Token, request: Request) -> Response:
        with self.world.lock:
            space, base = self.find_for_change(token, request.segments[4])
            return self._unlink(token, space, self.world.walk(self.view, base, request.segments[6:]))

    def _unlink(self, token: Token, space: Space, node: Node) -> Response:
        """Directories go with all that is in them, to the trash."""
        parent = self.view.nodes.get(node.parent or "")
        if parent is None:
            raise posix("eperm")
        check_file(space, token, parent, "w")
        self.world.drop(self.view, node)
        self.world.touch(self.view, parent)
        return EMPTY

    # --- metadata and the rest ---

    def _xattrs(self, token: Token, request: Request) -> Response:
        with self.world.lock:
            _, node = self.find(token, request.segments[4])
            internal = request.query.get("show_internal") == ["true"]
            plain = {key: value for key, value in node.xattrs.items() if internal or not key.startswith("onedata_")}
            if wanted := request.query.get("attribute"):
                if wanted[0] not in plain:
                    raise posix("enodata")
                return json_response({wanted[0]: plain[wanted[0]]})
            return json_response(plain)

    def _set_xattrs(self, token: Token, request: Request) -> Response:
        asked = request.json()
        if any(key.startswith(("cdmi_", "onedata_")) and key not in KNOWN_INTERNAL for key in asked):
            raise posix("eperm")
        with self.world.lock:
            _, node = self.find_for_change(token, request.segments[4], "w")
            self._annotate(node, asked)
        return EMPTY

    def _remove_xattrs(self, token: Token, request: Request) -> Response:
        keys = request.json().get("keys", [])
        with self.world.lock:
            _, node = self.find_for_change(token, request.segments[4], "w")
            self._annotate(node, {}, keys)
        return EMPTY

    def _document(self, token: Token, request: Request) -> Response:
        key = f"onedata_{request.segments[6]}"
        with self.world.lock:
            _, node = self.find(token, request.segments[4])
            if key not in node.xattrs:
                raise posix("enodata")
            if key == "onedata_json":
                return json_response(node.xattrs[key])
            return Response(200, node.xattrs[key].encode(), {"Content-Type": "application/rdf+xml"})

    def _set_document(self, token: Token, request: Request) -> Response:
        key = f"onedata_{request.segments[6]}"
        body = request.body().decode()
        with self.world.lock:
            _, node = self.find_for_change(token, request.segments[4], "w")
            self._annotate(node, {key: json.loads(body) if key == "onedata_json" else body})
        return EMPTY

    def _remove_document(self, token: Token, request: Request) -> Response:
        with self.world.lock:
            _, node = self.find_for_change(token, request.segments[4], "w")
            self._annotate(node, {}, [f"onedata_{request.segments[6]}"])
        return EMPTY

    def _annotate(self, node: Node, added: dict[str, Any], removed: list[str] | tuple[str, ...] = ()) -> None:
        node.xattrs = {key: value for key, value in (node.xattrs | added).items() if key not in removed}
        node.ctime = self.world.now()
        self.world.save(self.view, node)

    def _symlink_value(self, token: Token, request: Request) -> Response:
        with self.world.lock:
            _, node = self.find(token, request.segments[4])
            if node.type != "SYMLNK":
                raise posix("einval")
            return Response(200, (node.target or "").encode(), {"Content-Type": "application/octet-stream"})

    def _hardlinks(self, token: Token, request: Request) -> Response:
        with self.world.lock:
            _, node = self.find(token, request.segments[4])
            group = [other.id for other in self.view.nodes.values() if node.group and other.group == node.group]
            return json_response(group or [node.id])

    def _distribution(self, token: Token, request: Request) -> Response:
        with self.world.lock:
            _, node = self.find(token, request.segments[4])
            storage = {f"st-{self.id}": {"blocks": [[0, node.size]] if node.size else [], "physicalSize": node.size}}
            mine = {"success": True, "virtualSize": node.size, "distributionPerStorage": storage}
            return json_response({"type": node.type, "distributionPerProvider": {self.id: mine}})


def _integer(asked: dict[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = asked.get(key, default)
    try:
        number = int(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise bad_value("badValueInteger", key)
    if not low <= number <= high:
        raise bad_value("badValueNotInRange", key, low=low, high=high)
    return number


def _offset(request: Request) -> int | None:
    if "offset" not in request.query:
        return None
    try:
        offset = int(request.query["offset"][0])
    except ValueError:
        raise bad_value("badValueInteger", "offset") from None
    if offset < 0:
        raise bad_value("badValueTooLow", "offset")
    return offset


def _mode(asked: dict[str, Any]) -> int | None:
    if "mode" not in asked:
        return None
    try:
        mode = int(str(asked["mode"]), 8)
    except ValueError:
        raise bad_value("badValueInteger", "mode") from None
    if not 0 <= mode <= 0o1777:
        raise bad_value("badValueNotInRange", "mode")
    return mode


def _token(name: bytes) -> str:
    return base64.urlsafe_b64encode(name).decode()


def _from_token(token: Any) -> bytes:
    try:
        return base64.urlsafe_b64decode(str(token))
    except ValueError:
        raise posix("einval") from None
