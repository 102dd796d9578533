"""The double's state: users, items with versions, shares, VRE folders, trash, locks; and each change as StorageHub does it.

It knows nothing of HTTP. Every method is called with `lock` held. Failures are `Refusal`s that name the exception class and
the kind of call, so that the profile can choose the status.
"""

from __future__ import annotations

import copy
import re
import threading
import time
import unicodedata
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tests.servers.d4science_double.names import escape, legal_path, unescape
from tests.servers.d4science_double.settings import Settings

SPECIAL = ("Workspace", "Trash", "MySpecialFolders")
READ_ONLY, WRITE_OWNER, WRITE_ALL, ADMINISTRATOR = "READ_ONLY", "WRITE_OWNER", "WRITE_ALL", "ADMINISTRATOR"


class Refusal(Exception):
    """An exception of the service: `name` is the class without its package."""

    def __init__(self, name: str, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.name = name
        self.status = status


def missing(id: str) -> Refusal:
    return Refusal("IdNotFoundException", f"Item with id {id} not found")


@dataclass
class Content:
    """One version of a file; the bytes are in the file `payload`."""

    name: str
    storage_id: str
    size: int
    mime: str
    payload: Path
    created: int


@dataclass
class Node:
    """One item. `kind`: folder, file, shared, vre, trash (wrapper), special."""

    id: str
    kind: str
    name: str
    """The node name: escaped."""
    title: str
    owner: str
    parent: str | None
    description: str = ""
    hidden: bool = False
    created: int = 0
    modified: int = 0
    action: str = "CREATED"
    modified_by: str = ""
    versions: list[Content] = field(default_factory=list)
    metadata: dict[str, object] = field(default_factory=dict)
    accounting: list[str] = field(default_factory=list)
    members: dict[str, str] = field(default_factory=dict)
    """Of a share: user -> access type."""
    clones: dict[str, str] = field(default_factory=dict)
    """Of a share: user -> id of the folder in his tree that shows it."""
    display_name: str = ""
    context: str = ""
    former_parent: str = ""

    @property
    def shown(self) -> str:
        return unescape(self.name)

    @property
    def is_folder(self) -> bool:
        return self.kind in ("folder", "shared", "vre", "special")


@dataclass
class User:
    root: str
    trash: str
    special: str


def now() -> int:
    return int(time.time() * 1000)


class Tree:
    """Everything. `payloads` is a directory for the bytes of files."""

    def __init__(self, settings: Settings, payloads: Path) -> None:
        self.lock = threading.RLock()
        self.settings = settings
        self.payloads = payloads
        self.nodes: dict[str, Node] = {}
        self.children: dict[str, list[str]] = {}
        self.users: dict[str, User] = {}
        self.locked: set[str] = set()
        self.past: list[tuple[float, dict[str, Node], dict[str, list[str]]]] = []
        self.share = self.make("special", "Share", "", None).id

    # --- the past ---

    def remember(self) -> None:
        """Something is about to change: keeps what was, where listings lag."""
        if self.settings.lag:
            self.past.append((time.time(), copy.deepcopy(self.nodes), copy.deepcopy(self.children)))

    @contextmanager
    def behind(self) -> Iterator[None]:
        """Inside, the tree is as it was `settings.lag` seconds ago."""
        now = self.nodes, self.children
        for at, nodes, children in self.past:
            if self.settings.lag and at > time.time() - self.settings.lag:
                self.nodes, self.children = nodes, children
                break
        try:
            yield
        finally:
            self.nodes, self.children = now

    # --- looking ---

    def user(self, name: str, root: str | None = None) -> User:
        """The user, made with an empty workspace when new."""
        if name not in self.users:
            top = self.make("special", "Workspace", name, None, id=root)
            trash = self.make("special", "Trash", name, top.id)
            special = self.make("special", "MySpecialFolders", name, top.id)
            self.users[name] = User(top.id, trash.id, special.id)
        return self.users[name]

    def get(self, id: str, user: str) -> Node:
        """Raises Refusal when there is none or the user may not read it."""
        if id not in self.nodes:
            raise missing(id)
        node = self.nodes[id]
        if self.access(node, user) is None:
            raise self.denied(user, node)
        return node

    def denied(self, user: str, node: Node) -> Refusal:
        return Refusal(self.settings.denied_class, f"user {user} not authorized on {node.shown}", self.settings.denied_status)

    def parents(self, node: Node) -> list[Node]:
        """From the item's own folder upwards."""
        found = []
        at = node.parent
        while at is not None and at in self.nodes:
            found.append(self.nodes[at])
            at = self.nodes[at].parent
        return found

    def share_of(self, node: Node) -> Node | None:
        for each in (node, *self.parents(node)):
            if each.kind in ("shared", "vre"):
                return each
        return None

    def trashed(self, node: Node) -> bool:
        return any(each.kind == "trash" for each in self.parents(node))

    def access(self, node: Node, user: str) -> str | None:
        share = self.share_of(node)
        if share is not None:
            return share.members.get(user)
        return ADMINISTRATOR if node.owner == user else None

    def may_change(self, node: Node, user: str) -> bool:
        access = self.access(node, user)
        return access in (WRITE_ALL, ADMINISTRATOR) or (access == WRITE_OWNER and node.owner == user)

    def may_create(self, folder: Node, user: str) -> bool:
        return self.access(folder, user) in (WRITE_OWNER, WRITE_ALL, ADMINISTRATOR)

    def listing(self, folder: Node, user: str, *, hidden: bool) -> list[Node]:
        """What `children` gives, in order."""
        found = []
        for id in self.children.get(folder.id, []):
            node = self.nodes[id]
            if node.kind in ("folder", "special") and node.shown in ("Trash", "MySpecialFolders"):
                continue
            if node.hidden and not hidden:
                continue
            found.append(node)
        shares = (self.nodes[id] for id in self.children.get(self.share, []))
        found.extend(node for node in shares if node.clones.get(user) == folder.id)
        return found

    def path(self, node: Node, user: str) -> str:
        names = [node.shown]
        at: Node | None = node
        while at is not None:
            parent = at.clones.get(user, at.parent) if at.kind in ("shared", "vre") else at.parent
            at = self.nodes.get(parent) if parent else None
            if at is not None:
                names.append(at.shown)
        top = [] if names[-1] == "Share" else ["Home", user]
        return "/" + "/".join([*top, *reversed(names)])

    def named(self, folder: Node, user: str, pattern: str) -> list[Node]:
        """items/{name}: node name or title; a blank-free wildcard at either end."""
        expression = re.escape(pattern)
        if pattern.startswith("*"):
            expression = ".*" + expression[2:]
        if pattern.endswith("*") and len(pattern) > 1:
            expression = expression[:-2] + ".*"
        compiled = re.compile(expression, re.DOTALL)
        return [
            node
            for node in self.listing(folder, user, hidden=True)
            if compiled.fullmatch(node.shown) or compiled.fullmatch(node.title)
        ]

    # --- changing ---

    def create_file(self, parent: str, name: str, description: str, payload: Path, size: int, user: str) -> Node:
        name = self._composed(name)
        if not name.strip():
            raise Refusal("InvalidCallParameters", "the name is blank", 400)
        folder = self._folder(parent, user)
        self._unlocked(folder)
        if size == 0 and not self.settings.takes_empty_files:
            raise Refusal("BackendGenericError", "cannot store an empty payload", 500)
        if not legal_path(name):
            raise Refusal("BackendGenericError", f"javax.jcr.RepositoryException: not a path: {name}", 406)
        there = self._named_exactly(folder, name, raw=True)
        if there is None and (double := self._named_exactly(folder, name, raw=False)) is not None:
            if self.settings.escaped_again == "error":
                raise Refusal("BackendGenericError", "javax.jcr.ItemExistsException", 406)
            there = double if self.settings.escaped_again == "correct" else None
        if there is not None and self.settings.file_collision == "number":
            there, name = None, self._free(folder, name)
        if there is None:
            there = self.make("file", name, user, folder.id)
            there.description = description
        elif there.kind != "file":
            raise Refusal("InvalidItemException", f"{name} is not a file")
        else:
            self._unlocked(there)
            if not self.may_change(there, user):
                raise self.denied(user, there)
            there.action = "UPDATED"
        self.store(there, payload, size, user)
        return there

    def store(self, node: Node, payload: Path, size: int, user: str) -> None:
        """Makes the payload the newest version."""
        moment = now()
        major = f"1.{len(node.versions)}"
        mime = "image/png" if node.shown.endswith(".png") else "application/octet-stream"
        node.versions.append(Content(major, uuid.uuid4().hex[:24], size, mime, payload, moment))
        node.modified, node.modified_by = moment, user

    def create_folder(self, parent: str, name: str, description: str, hidden: bool, user: str) -> Node:
        name = self._composed(name)
        if not name.strip():
            raise Refusal("InvalidCallParameters", "the name is blank", 400)
        folder = self._folder(parent, user)
        self._legal(name)
        node = self.make("folder", self._free(folder, name), user, folder.id)
        node.description, node.hidden = description, hidden
        return node

    def rename(self, id: str, name: str, user: str) -> Node:
        node = self._changeable(id, user)
        if not name.strip():
            raise Refusal("InvalidCallParameters", "the name is blank", 400)
        self._legal(name)
        folder = self.nodes[node.parent or ""]
        self._unlocked(node, folder)
        node.name = escape(self._free(folder, name), quotes=self.settings.escapes_quotes)
        node.title = node.name
        self._touched(node, "RENAMED", user)
        return node

    def move(self, id: str, destination: str, user: str) -> Node:
        node = self._changeable(id, user)
        folder = self._folder(destination, user)
        self._unlocked(node, folder)
        if self.share_of(node) is not None and self.share_of(node) is not self.share_of(folder):
            raise Refusal("InvalidCallParameters", "shared Item cannot be moved in a different shared folder", 400)
        if node in (folder, *self.parents(folder)):
            raise Refusal("InvalidCallParameters", "a folder cannot be moved into itself", 400)
        self._legal(node.shown)
        name = self._free(folder, node.shown)
        self._hang(node, folder.id)
        node.name = escape(name, quotes=self.settings.escapes_quotes)
        self._touched(node, "MOVED", user)
        return node

    def copy(self, id: str, destination: str, name: str, user: str) -> Node:
        node = self.get(id, user)
        if node.kind != "file":
            raise Refusal("InvalidItemException", "folder cannot be copied")
        folder = self._folder(destination, user)
        self._unlocked(node, folder)
        copy = self.make("file", self._free(folder, name), user, folder.id)
        copy.action = "CLONED"
        last = node.versions[-1]
        self.store(copy, last.payload, last.size, user)
        return copy

    def delete(self, id: str, user: str, *, force: bool) -> None:
        node = self.get(id, user)
        if node.kind == "trash" or self.trashed(node):
            above = self.nodes[node.parent or ""]
            self._forget(above if above.kind == "trash" else node)
            return
        node = self._changeable(id, user)
        try:
            self._unlocked(node)
        except Refusal:
            if self.settings.swallows_locks:
                return
            raise
        if force:
            self._forget(node)
            return
        wrapper = self.make("trash", node.id, user, self.user(user).trash)
        wrapper.title, wrapper.former_parent, wrapper.modified_by = node.shown, node.parent or "", user
        self._hang(node, wrapper.id)

    def restore(self, id: str, user: str) -> Node:
        wrapper = self.get(id, user)
        if wrapper.kind != "trash":
            raise Refusal("InvalidItemException", "not in the trash")
        node = self.nodes[self.children[wrapper.id][0]]
        folder = self._folder(wrapper.former_parent, user)
        node.name = escape(self._free(folder, node.shown))
        self._hang(node, folder.id)
        self._forget(wrapper)
        return node

    def empty_trash(self, user: str) -> str:
        trash = self.nodes[self.user(user).trash]
        for id in list(self.children.get(trash.id, [])):
            self._forget(self.nodes[id])
        return trash.id

    def set_metadata(self, id: str, values: dict[str, object], user: str) -> Node:
        node = self.get(id, user)
        if not self.may_change(node, user):
            raise self.denied(user, node)
        if not self.settings.takes_metadata:
            raise Refusal("BackendGenericError", "cannot set metadata", 406)
        node.metadata = dict(values)
        if self.settings.metadata_touches:
            self._touched(node, "UPDATED", user)
        return node

    def make_share(
        self, kind: str, title: str, owner: str, members: dict[str, str], *, context: str = ""
    ) -> Node:
        """A shared folder, shown in each member's root; or a VRE folder, shown below MySpecialFolders."""
        id = str(uuid.uuid4())
        name = context.strip("/").replace("/", "-") if kind == "vre" else id
        node = self.make(kind, name, owner, self.share, id=id)
        node.title, node.display_name, node.context = title, title, context
        node.members = dict(members)
        for member in members:
            user = self.user(member)
            node.clones[member] = user.special if kind == "vre" else user.root
        return node

    # --- small parts ---

    def _composed(self, name: str) -> str:
        return unicodedata.normalize("NFC", name) if self.settings.composes else name

    def make(self, kind: str, name: str, owner: str, parent: str | None, id: str | None = None) -> Node:
        moment = now()
        written = escape(name, quotes=self.settings.escapes_quotes)
        node = Node(id or str(uuid.uuid4()), kind, written, name, owner, parent, created=moment, modified=moment)
        node.modified_by = owner
        self.nodes[node.id] = node
        if parent is not None:
            self.children.setdefault(parent, []).append(node.id)
        return node

    def _hang(self, node: Node, parent: str) -> None:
        if node.parent is not None:
            self.children[node.parent].remove(node.id)
        node.parent = parent
        self.children.setdefault(parent, []).append(node.id)

    def _forget(self, node: Node) -> None:
        for id in list(self.children.get(node.id, [])):
            self._forget(self.nodes[id])
        self.children.pop(node.id, None)
        if node.parent is not None:
            self.children[node.parent].remove(node.id)
        self.nodes.pop(node.id, None)

    def _folder(self, id: str, user: str) -> Node:
        folder = self.get(id, user)
        if not folder.is_folder:
            raise Refusal("InvalidItemException", "the destination is not a folder")
        root = self.user(user).root
        if (folder.shown in ("Trash", "MySpecialFolders") and folder.id != root) or not self.may_create(folder, user):
            raise self.denied(user, folder)
        return folder

    def _changeable(self, id: str, user: str) -> Node:
        node = self.get(id, user)
        if node.shown in SPECIAL or node.title in SPECIAL:
            raise Refusal("InvalidCallParameters", f"{node.shown} cannot be changed", 400)
        if node.kind in ("shared", "vre"):
            raise Refusal("InvalidItemException", "a shared folder cannot be moved, renamed or deleted")
        if self._holds_a_share(node):
            raise Refusal("InvalidItemException", "the folder contains shared items")
        if not self.may_change(node, user):
            raise self.denied(user, node)
        return node

    def _holds_a_share(self, node: Node) -> bool:
        below = {node.id}
        waiting = [node.id]
        while waiting:
            ids = self.children.get(waiting.pop(), [])
            below.update(ids)
            waiting.extend(ids)
        shares = (self.nodes[id] for id in self.children.get(self.share, []))
        return any(parent in below for each in shares for parent in each.clones.values())

    def _unlocked(self, *nodes: Node) -> None:
        for node in nodes:
            if node.id in self.locked:
                raise Refusal("ItemLockedException", f"{node.shown} is locked", 409)

    def _legal(self, name: str) -> None:
        if not legal_path(name):
            raise Refusal("BackendGenericError", f"javax.jcr.RepositoryException: not a path: {name}", 500)

    def _named_exactly(self, folder: Node, name: str, *, raw: bool) -> Node | None:
        wanted = name if raw else escape(name, quotes=self.settings.escapes_quotes)
        for id in self.children.get(folder.id, []):
            if self.nodes[id].name == wanted:
                return self.nodes[id]
        return None

    def _free(self, folder: Node, name: str) -> str:
        if self._named_exactly(folder, name, raw=False) is None:
            return name
        if self.settings.collisions == "refuse":
            raise Refusal("ItemAlreadyExistsException", f"{name} already exists", 400)
        suffix = PurePosixPath(name).suffix
        stem = name[: len(name) - len(suffix)]
        try:
            numbered = re.compile(rf"{stem}\((\d+)\){re.escape(suffix)}")  # the raw stem, as the service does
        except re.error as exc:
            raise Refusal("BackendGenericError", f"java.util.regex.PatternSyntaxException: {exc}", 500) from exc
        shown = [self.nodes[id].shown for id in self.children[folder.id]]
        highest = max((int(match[1]) for each in shown if (match := numbered.fullmatch(each))), default=0)
        candidate = f"{stem}({highest + 1}){suffix}"
        if candidate in shown:
            raise Refusal("BackendGenericError", "javax.jcr.ItemExistsException", 500)
        return candidate

    def _touched(self, node: Node, action: str, user: str) -> None:
        node.modified, node.action, node.modified_by = now(), action, user
