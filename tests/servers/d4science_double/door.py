"""The test's own door into the double: users, tokens, switches, faults, locks, and the workspace as another client sees it."""

from __future__ import annotations

import json
import uuid
from typing import Any

from tests.servers.d4science_double.hooks import Hooks
from tests.servers.d4science_double.settings import Settings
from tests.servers.d4science_double.tokens import Tokens
from tests.servers.d4science_double.tree import Node, Tree


class Door:
    def __init__(self, tree: Tree, tokens: Tokens, hooks: Hooks, overlaps: dict[str, int]) -> None:
        self._tree = tree
        self._tokens = tokens
        self._hooks = hooks
        self._overlaps = overlaps

    def open(self, what: str, query: dict[str, list[str]], body: bytes) -> tuple[int, bytes]:
        """Does what the path says; raises nothing: what is not there is 404."""
        arguments = {name: values[0] for name, values in query.items()}
        with self._tree.lock:
            try:
                answer = getattr(self, "do_" + what)(arguments, body)
            except (KeyError, AttributeError, IndexError) as exc:
                return 404, repr(exc).encode()
        return 200, answer if isinstance(answer, bytes) else json.dumps(answer).encode()

    # --- arrangement ---

    def do_reset(self, arguments: dict[str, str], body: bytes) -> None:
        """All switches as at the start, no faults, no locks."""
        self._tree.settings.__dict__.update(Settings().__dict__)
        self._hooks.clear()
        self._tree.locked.clear()
        self._overlaps.clear()

    def do_settings(self, arguments: dict[str, str], body: bytes) -> None:
        self._tree.settings.update(json.loads(body))
        self._tree.past.clear()

    def do_user(self, arguments: dict[str, str], body: bytes) -> str:
        return self._tree.user(arguments["user"], arguments.get("root")).root

    def do_token(self, arguments: dict[str, str], body: bytes) -> str:
        seconds = float(arguments.get("seconds", "3600"))
        self._tree.user(arguments["user"])
        return self._tokens.issue(arguments["user"], seconds=seconds, jwt=arguments.get("jwt", "1") == "1")

    def do_expire(self, arguments: dict[str, str], body: bytes) -> None:
        self._tokens.expire(body.decode(), float(arguments.get("seconds", "0")))

    def do_hook(self, arguments: dict[str, str], body: bytes) -> None:
        self._hooks.add(json.loads(body))

    def do_clear(self, arguments: dict[str, str], body: bytes) -> None:
        """No faults."""
        self._hooks.clear()

    def do_release(self, arguments: dict[str, str], body: bytes) -> None:
        self._hooks.release()

    def do_lock(self, arguments: dict[str, str], body: bytes) -> None:
        self._tree.locked.add(arguments["id"])

    def do_unlock(self, arguments: dict[str, str], body: bytes) -> None:
        self._tree.locked.discard(arguments["id"])

    def do_share(self, arguments: dict[str, str], body: bytes) -> str:
        values = json.loads(body)
        return self._tree.make_share(**values).id

    def do_hang(self, arguments: dict[str, str], body: bytes) -> None:
        """The user keeps a shared folder in another folder of his."""
        self._tree.nodes[arguments["id"]].clones[arguments["user"]] = arguments["folder"]

    def do_overlaps(self, arguments: dict[str, str], body: bytes) -> dict[str, int]:
        return dict(self._overlaps)

    # --- the workspace from outside ---

    def do_item(self, arguments: dict[str, str], body: bytes) -> dict[str, Any]:
        """What the double knows of an item, by `id` or by `user` and `path`."""
        node = self._tree.nodes[arguments["id"]] if "id" in arguments else self._at(arguments)
        return {
            "id": node.id,
            "name": node.shown,
            "node": node.name,
            "kind": node.kind,
            "size": node.versions[-1].size if node.versions else 0,
            "versions": len(node.versions),
            "metadata": node.metadata,
            "trashed": self._tree.trashed(node),
            "parent": node.parent,
        }

    def do_list(self, arguments: dict[str, str], body: bytes) -> list[str]:
        folder = self._at(arguments)
        return sorted(node.shown for node in self._tree.listing(folder, arguments["user"], hidden=True))

    def do_read(self, arguments: dict[str, str], body: bytes) -> bytes:
        return self._at(arguments).versions[-1].payload.read_bytes()

    def do_write(self, arguments: dict[str, str], body: bytes) -> str:
        """A new file, or a new version; names are taken as they are, legal or not.

        `size`: so many bytes, zeros but for the body at the beginning and at the end.
        """
        tree, user = self._tree, arguments["user"]
        folder, name = self._above(arguments)
        payload = tree.payloads / uuid.uuid4().hex
        payload.write_bytes(body)
        size = int(arguments.get("size", len(body)))
        with payload.open("r+b") as file:
            file.truncate(size)
            file.seek(max(0, size - len(body)))
            file.write(body[:size])
        there = [node for node in tree.listing(folder, user, hidden=True) if node.shown == name and node.kind == "file"]
        node = there[0] if there else tree.make("file", name, user, folder.id)
        node.hidden = arguments.get("hidden") == "1"
        node.action = "UPDATED" if there else "CREATED"
        tree.store(node, payload, size, user)
        return node.id

    def do_fill(self, arguments: dict[str, str], body: bytes) -> None:
        """Many small files in a new folder: their sizes by name."""
        folder = self.do_mkdir(arguments, b"")
        payload = self._tree.payloads / uuid.uuid4().hex
        sizes: dict[str, int] = json.loads(body)
        payload.write_bytes(b"z" * max(sizes.values(), default=0))
        for name, size in sizes.items():
            self._tree.store(self._tree.make("file", name, arguments["user"], folder), payload, size, arguments["user"])

    def do_mkdir(self, arguments: dict[str, str], body: bytes) -> str:
        folder, name = self._above(arguments)
        return self._tree.make("folder", name, arguments["user"], folder.id).id

    def do_remove(self, arguments: dict[str, str], body: bytes) -> None:
        self._tree.delete(self._at(arguments).id, arguments["user"], force=False)

    def do_rename(self, arguments: dict[str, str], body: bytes) -> None:
        self._tree.rename(self._at(arguments).id, arguments["to"], arguments["user"])

    def do_trash(self, arguments: dict[str, str], body: bytes) -> list[str]:
        """Titles of what is in the user's trash."""
        trash = self._tree.user(arguments["user"]).trash
        return sorted(self._tree.nodes[id].title for id in self._tree.children.get(trash, []))

    def _at(self, arguments: dict[str, str]) -> Node:
        tree, user = self._tree, arguments["user"]
        node = tree.nodes[arguments.get("below") or tree.user(user).root]
        for name in arguments.get("path", "").split("/"):
            if name:
                listed = tree.listing(node, user, hidden=True)
                node = [each for each in listed if name in (each.shown, each.members and each.title)][-1]
        return node

    def _above(self, arguments: dict[str, str]) -> tuple[Node, str]:
        above, _, name = arguments["path"].rpartition("/")
        return self._at({**arguments, "path": above}), name
