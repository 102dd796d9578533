"""The door for tests: another client's hand on the files, faults, tokens, the record. Plain HTTP and JSON."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from .provider import Provider
from .refusal import Refusal
from .server import Face, Faces, Fault, Request, Response, json_response
from .world import Node, Token, View, World
from .zone import Zone


class Control:
    def __init__(
        self, world: World, providers: dict[str, Provider], zone: Zone, shared: Faces, faces: dict[str, Face]
    ) -> None:
        self._world = world
        self._providers = providers
        self._zone = zone
        self._shared = shared
        self._faces = faces

    def handle(self, request: Request) -> Response:
        if request.method == "OPTIONS":
            return Response(204)
        operation: Callable[..., Any] | None = getattr(self, "do_" + request.segments[0], None)
        if operation is None:
            raise Refusal(404, "notFound", "no such operation")
        self._world.catch_up()
        return json_response(operation(**request.json()))

    def perform(self, call: dict[str, Any]) -> None:
        """For faults of action "call"."""
        arguments = dict(call)
        getattr(self, "do_" + arguments.pop("operation"))(**arguments)

    # --- files, by "space/path" on a provider ---

    def do_read(self, provider: str, path: str) -> str:
        with self._world.lock:
            node = self._node(provider, path)
            if node.type != "REG":
                raise Refusal(400, "posix", "no file")
            fd = self._world.open(node)
        with os.fdopen(fd, "rb") as file:
            return base64.b64encode(file.read(node.size)).decode()

    def do_write(self, provider: str, path: str, content: str, mtime: int | None = None) -> None:
        with self._world.lock:
            parent, name, view = self._parent(provider, path)
            node = view.child(parent.uuid, name)
            if node is None:
                node = self._world.make(view, parent, name, "REG", None, self._owner(parent))
            fd = self._world.begin_write(view, node, truncate=True)
            try:
                os.pwrite(fd, base64.b64decode(content), 0)
                self._world.wrote(view, node, fd)
            finally:
                os.close(fd)
            if mtime is not None:
                node.mtime = node.ctime = mtime
                self._world.save(view, node)

    def do_sparse(self, provider: str, path: str, size: int) -> None:
        """A file of `size` bytes of which none takes room."""
        self.do_write(provider, path, "")
        with self._world.lock:
            parent, name, view = self._parent(provider, path)
            node = view.child(parent.uuid, name)
            assert node is not None
            os.truncate(self._world.directory / node.bytes, size)
            node.size = size
            self._world.save(view, node)

    def do_fill(self, provider: str, path: str, count: int, prefix: str = "") -> None:
        """`count` empty files with numbers for names."""
        with self._world.lock:
            view = self._world.views[provider]
            parent = self._node(provider, path)
            for number in range(count):
                self._world.make(view, parent, f"{prefix}{number:05}", "REG", None, self._owner(parent))

    def do_listdir(self, provider: str, path: str) -> list[str]:
        with self._world.lock:
            node = self._node(provider, path)
            return [name.decode() for name, _ in self._world.views[provider].listing(node.uuid)]

    def do_mkdir(self, provider: str, path: str) -> None:
        with self._world.lock:
            parent, name, view = self._parent(provider, path)
            self._world.make(view, parent, name, "DIR", None, self._owner(parent))

    def do_symlink(self, provider: str, path: str, target: str) -> None:
        with self._world.lock:
            parent, name, view = self._parent(provider, path)
            self._world.make(view, parent, name, "SYMLNK", None, self._owner(parent), target=target)

    def do_link(self, provider: str, path: str, target: str) -> None:
        with self._world.lock:
            source = self._node(provider, target)
            parent, name, view = self._parent(provider, path)
            self._world.make(view, parent, name, "LNK", None, self._owner(parent), source=source)

    def do_chmod(self, provider: str, path: str, mode: int, owner: str | None = None) -> None:
        with self._world.lock:
            node = self._node(provider, path)
            node.mode, node.owner = mode, owner or node.owner
            self._world.save(self._world.views[provider], node)

    def do_xattrs(self, provider: str, path: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
        with self._world.lock:
            node = self._node(provider, path)
            if values is not None:
                node.xattrs = node.xattrs | values
                self._world.save(self._world.views[provider], node)
            return node.xattrs

    def do_remove(self, provider: str, path: str) -> None:
        with self._world.lock:
            view = self._world.views[provider]
            node = self._node(provider, path)
            parent = view.nodes[node.parent or ""]
            self._world.drop(view, node)
            self._world.touch(view, parent)

    def do_stat(self, provider: str, path: str) -> dict[str, Any]:
        with self._world.lock:
            node = self._node(provider, path)
            return {**asdict(node), "id": node.id}

    def _node(self, provider: str, path: str) -> Node:
        space, *names = [part for part in path.split("/") if part]
        view = self._world.views[provider]
        root = self._world.root(view, space)
        assert root is not None
        return self._world.walk(view, root, names)

    def _parent(self, provider: str, path: str) -> tuple[Node, str, View]:
        above, _, name = path.rpartition("/")
        return self._node(provider, above), name, self._world.views[provider]

    def _owner(self, node: Node) -> str:
        return self._world.spaces[node.space].owner

    # --- the rest ---

    def do_space(self, id: str, name: str, owner: str, members: list[str], supports: dict[str, bool]) -> None:
        with self._world.lock:
            self._world.add_space(id, name, owner, members, supports)

    def do_forget_space(self, id: str) -> None:
        with self._world.lock:
            del self._world.spaces[id]

    def do_token(self, text: str, **values: Any) -> None:
        self._world.tokens[text] = Token(**values)

    def do_identity(self, token: str, user: str | None) -> None:
        self._zone.identities.pop(token, None)
        if user is not None:
            self._zone.identities[token] = user

    def do_revoke_minted(self) -> None:
        for text in self._zone.minted:
            self._world.tokens[text].revoked = True

    def do_expire(self, text: str) -> None:
        self._world.tokens[text].valid_until = time.time() - 1

    def do_minted(self) -> list[dict[str, Any]]:
        return [{"text": text, **asdict(self._world.tokens[text])} for text in self._zone.minted]

    def do_provider(self, id: str, **values: Any) -> None:
        for key, value in values.items():
            setattr(self._providers[id], key, value)

    def do_down(self, face: str, down: bool) -> None:
        self._faces[face].set_down(down)

    def do_lag(self, seconds: float) -> None:
        self._world.lag = seconds

    def do_connections(self, **values: Any) -> None:
        for key, value in values.items():
            setattr(self._shared, key, value)

    def do_fault(self, **values: Any) -> None:
        with self._shared.lock:
            self._shared.faults.append(Fault(**values))

    def do_streams(self) -> int:
        return sum(provider.streams for provider in self._providers.values())

    def do_cpu(self) -> float:
        """Seconds of CPU that the double has used."""
        return time.process_time()

    def do_clear(self) -> None:
        with self._shared.lock:
            self._shared.faults.clear()
            self._shared.records.clear()

    def do_records(self) -> list[dict[str, Any]]:
        with self._shared.lock:
            return list(self._shared.records)
