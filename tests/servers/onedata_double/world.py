"""The truth behind the double: users' tokens, spaces, and each provider's own view of the files, kept apart by a lag.

It knows nothing of HTTP. A change made on one provider is in its own view at once and in the others' after `lag`
seconds. Everything is touched under `World.lock`. Bytes are in sparse files in a directory; with a lag a changed file
gets new ones (a view that has not heard of the change must serve the old bytes), without they are changed in place.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools
import os
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .ids import file_id, parse_file_id
from .refusal import posix


@dataclass
class Token:
    user: str
    readonly: bool = False
    interface: str | None = None
    services: list[str] | None = None
    valid_until: float | None = None
    revoked: bool = False


@dataclass
class Space:
    id: str
    name: str
    owner: str
    members: list[str]
    supports: dict[str, bool]
    """Provider -> whether its support is read-only."""


@dataclass
class Node:
    uuid: str
    space: str
    parent: str | None
    name: str
    type: str
    mode: int
    owner: str
    origin: str
    size: int = 0
    atime: int = 0
    mtime: int = 0
    ctime: int = 0
    created: int = 0
    xattrs: dict[str, Any] = field(default_factory=dict)
    target: str | None = None
    bytes: str = ""
    """Name of the file that holds the content."""
    group: str | None = None
    """Shared by hard links of one file."""

    @property
    def id(self) -> str:
        return file_id(self.uuid, self.space)


@dataclass
class Event:
    seq: int
    kind: str
    uuid: str
    parent: str | None
    space: str


class View:
    """What one provider knows."""

    def __init__(self, provider: str) -> None:
        self.provider = provider
        self.nodes: dict[str, Node] = {}
        self.children: dict[str, dict[str, list[str]]] = {}
        self.events: list[Event] = []
        self.news = threading.Condition()
        self._listings: dict[str, list[tuple[bytes, Node]]] = {}

    def put(self, node: Node) -> None:
        old = self.nodes.get(node.uuid)
        if old is not None:
            self._unlink(old)
        self.nodes[node.uuid] = node
        if node.parent is not None:
            self.children.setdefault(node.parent, {}).setdefault(node.name, []).append(node.uuid)
            self._listings.pop(node.parent, None)
        self._tell("changedOrCreated", node)

    def drop(self, uuid: str) -> None:
        node = self.nodes.pop(uuid, None)
        if node is not None:
            self._unlink(node)
            self._tell("deleted", node)

    def named(self, parent: str, name: str) -> Node | None:
        """The child with that name, by the plain name or by `name@provider` when there are several."""
        for shown, node in self.listing(parent):
            if shown == name.encode():
                return node
        return None

    def child(self, parent: str, name: str) -> Node | None:
        found = self.children.get(parent, {}).get(name)
        if found and len(found) == 1:
            return self.nodes[found[0]]
        return self.named(parent, name) if found or "@" in name else None

    def listing(self, parent: str) -> list[tuple[bytes, Node]]:
        """(name as listed, node) in the byte order of names; names that two providers gave are made different."""
        listing = self._listings.get(parent)
        if listing is None:
            listing = []
            for name, uuids in self.children.get(parent, {}).items():
                for uuid in uuids:
                    node = self.nodes[uuid]
                    foreign = len(uuids) > 1 and node.origin != self.provider
                    listing.append(((f"{name}@{node.origin[:6]}" if foreign else name).encode(), node))
            listing.sort(key=lambda item: item[0])
            self._listings[parent] = listing
        return listing

    def position(self, parent: str, name: bytes) -> int:
        """Where in the listing the first name >= `name` is."""
        return bisect.bisect_left(self.listing(parent), name, key=lambda item: item[0])

    def _unlink(self, node: Node) -> None:
        if node.parent is not None:
            siblings = self.children[node.parent][node.name]
            siblings.remove(node.uuid)
            if not siblings:
                del self.children[node.parent][node.name]
            self._listings.pop(node.parent, None)

    def _tell(self, kind: str, node: Node) -> None:
        with self.news:
            self.events.append(Event(len(self.events) + 1, kind, node.uuid, node.parent, node.space))
            self.news.notify_all()


class World:
    def __init__(self, directory: Path, providers: list[str]) -> None:
        self.directory = directory
        self.lock = threading.RLock()
        self.lag = 0.0
        self.views = {provider: View(provider) for provider in providers}
        self.spaces: dict[str, Space] = {}
        self.tokens: dict[str, Token] = {}
        self._numbers = itertools.count(1)
        self._due: list[tuple[float, int, str, str, Node | None]] = []

    def now(self) -> int:
        return int(time.time())

    def catch_up(self) -> None:
        """Lets every view hear of what is due by now."""
        with self.lock:
            while self._due and self._due[0][0] <= time.monotonic():
                _, _, provider, uuid, node = heapq.heappop(self._due)
                self._apply(self.views[provider], uuid, node)

    def _apply(self, view: View, uuid: str, node: Node | None) -> None:
        if node is None:
            view.drop(uuid)
        else:
            view.put(node)

    def save(self, view: View, node: Node) -> None:
        """`node`, changed or new, as this provider has it now; the others hear of it. Hard links change together."""
        nodes = [node]
        if node.group is not None:
            for other in view.nodes.values():
                if other.group == node.group and other.uuid != node.uuid:
                    for key in ("size", "mode", "mtime", "ctime", "atime", "xattrs", "bytes"):
                        setattr(other, key, getattr(node, key))
                    nodes.append(other)
        for one in nodes:
            view.put(one)
            self._spread(view, one.uuid, one)

    def drop(self, view: View, node: Node) -> None:
        """Removes `node` and everything below it."""
        for _, child in list(view.listing(node.uuid)):
            self.drop(view, child)
        view.drop(node.uuid)
        self._spread(view, node.uuid, None)

    def _spread(self, view: View, uuid: str, node: Node | None) -> None:
        space = node.space if node is not None else None
        for provider, other in self.views.items():
            if other is view or (space is not None and provider not in self.spaces[space].supports):
                continue
            news = None if node is None else dataclasses.replace(node)  # xattrs are replaced as a whole
            if self.lag <= 0:
                self._apply(other, uuid, news)
            else:
                due = time.monotonic() + self.lag
                heapq.heappush(self._due, (due, next(self._numbers), provider, uuid, news))

    # --- making ---

    def add_space(
        self, id: str, name: str, owner: str, members: list[str], supports: dict[str, bool]
    ) -> Space:
        space = Space(id, name, owner, members, supports)
        self.spaces[id] = space
        now = self.now()
        for provider in supports:
            uuid = f"space_{id}"
            root = Node(uuid, id, None, name, "DIR", 0o775, owner, provider, 0, now, now, now, now)
            self.views[provider].put(root)
        return space

    def make(
        self, view: View, parent: Node, name: str, type: str, mode: int | None, owner: str, *, target: str | None = None,
        source: Node | None = None,
    ) -> Node:
        if parent.type != "DIR":
            raise posix("enotdir")
        if view.child(parent.uuid, name) is not None:
            raise posix("eexist")
        if len(name.encode()) > 255:
            raise posix("enametoolong")
        now = self.now()
        number = next(self._numbers)
        prefix = {"SYMLNK": "smlnk_", "LNK": "link_"}.get(type, "")
        uuid = f"{prefix}{number:012x}{view.provider}"
        if source is not None:
            if source.type != "REG" or source.space != parent.space:
                raise posix("eperm")
            if source.group is None:
                source.group = source.uuid
                self.save(view, source)
            node = dataclasses.replace(source)
            node.uuid, node.parent, node.name, node.ctime = uuid, parent.uuid, name, now
        else:
            default = 0o664 if type == "REG" else 0o775
            size = len((target or "").encode())
            node = Node(
                uuid, parent.space, parent.uuid, name, type, default if mode is None else mode, owner, view.provider,
                size, now, now, now, now, {}, target, f"{number:x}" if type == "REG" else "",
            )  # fmt: skip
        self.save(view, node)
        self.touch(view, parent)
        return node

    def touch(self, view: View, node: Node) -> None:
        node.mtime = node.ctime = self.now()
        self.save(view, node)

    # --- content ---

    def open(self, node: Node) -> int:
        """A descriptor for reading; the caller closes it."""
        return os.open(self.directory / node.bytes, os.O_RDONLY | os.O_CREAT)

    def begin_write(self, view: View, node: Node, *, truncate: bool) -> int:
        """A descriptor for writing; the caller closes it and calls `wrote`."""
        if self.lag > 0 or node.group is not None:
            name = f"{next(self._numbers):x}"
            if not truncate:
                (self.directory / node.bytes).touch()
                shutil.copyfile(self.directory / node.bytes, self.directory / name)
            node.bytes = name
        flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if truncate else 0)
        fd = os.open(self.directory / node.bytes, flags)
        if truncate:
            self.wrote(view, node, fd)
        return fd

    def wrote(self, view: View, node: Node, fd: int) -> None:
        node.size = os.fstat(fd).st_size
        if node.uuid in view.nodes:
            self.touch(view, node)

    # --- finding ---

    def root(self, view: View, space: str) -> Node | None:
        return view.nodes.get(f"space_{space}")

    def by_id(self, view: View, identifier: str) -> Node | None:
        parsed = parse_file_id(identifier)
        if parsed is None:
            return None
        node = view.nodes.get(parsed[0])
        return node if node is not None and node.space == parsed[1] else None

    def walk(self, view: View, start: Node, names: list[str], depth: int = 0) -> Node:
        """Follows `names` down, through symlinks. Raises Refusal."""
        node = start
        for number, name in enumerate(names):
            if node.type != "DIR":
                raise posix("enotdir")
            found = view.child(node.uuid, name)
            if found is None:
                raise posix("enoent")
            if found.type == "SYMLNK" and number < len(names) - 1:
                found = self.follow(view, found, depth + 1)
            node = found
        return node

    def follow(self, view: View, link: Node, depth: int = 0) -> Node:
        if depth > 40:
            raise posix("eloop")
        target = link.target or ""
        marker = f"<__onedata_space_id:{link.space}>"
        if target.startswith(marker):
            start = self.root(view, link.space)
            target = target[len(marker) :]
        else:
            start = view.nodes.get(link.parent or "")
        assert start is not None
        names: list[str] = []
        for name in target.split("/"):
            if name == "..":
                if names:
                    names.pop()
                else:
                    start = view.nodes.get(start.parent or "", start)
            elif name not in ("", "."):
                names.append(name)
        found = self.walk(view, start, names, depth)
        return self.follow(view, found, depth + 1) if found.type == "SYMLNK" else found

    def path(self, view: View, node: Node) -> str:
        """Path from the space's root."""
        names: list[str] = []
        while node.parent is not None:
            names.insert(0, node.name)
            node = view.nodes[node.parent]
        return "/".join(names)
