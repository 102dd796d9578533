"""Attributes of files in both generations of names, and which a request may ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .refusal import bad_value
from .world import Node, View, World

OLD_NAMES = {
    "fileId": "file_id", "parentFileId": "parent_id", "name": "name", "type": "type", "posixPermissions": "mode",
    "size": "size", "atime": "atime", "mtime": "mtime", "ctime": "ctime", "hardlinkCount": "hardlinks_count",
    "displayUid": "storage_user_id", "displayGid": "storage_group_id", "ownerUserId": "owner_id",
    "originProviderId": "provider_id", "directShareIds": "shares", "index": "index",
}  # fmt: skip
NEW_ONLY = (
    "conflictingName", "activePermissionsType", "creationTime", "symlinkValue", "isFullyReplicatedLocally",
    "localReplicationRate", "hasCustomMetadata", "path", "effProtectionFlags",
)  # fmt: skip
NEW_NAMES = (*OLD_NAMES, *NEW_ONLY)
NEW_OF_OLD = {old: new for new, old in OLD_NAMES.items()}


@dataclass(slots=True)
class Shown:
    """An object as a provider shows it, under the name that it is listed with."""

    world: World
    view: View
    node: Node
    name: str

    def parent(self) -> str | None:
        parent = self.view.nodes.get(self.node.parent or "")
        return parent.id if parent is not None else None

    def links(self) -> int:
        group = self.node.group
        return 1 if group is None else sum(other.group == group for other in self.view.nodes.values())


ATTRIBUTES: dict[str, Callable[[Shown], Any]] = {
    "fileId": lambda shown: shown.node.id,
    "parentFileId": Shown.parent,
    "name": lambda shown: shown.name,
    "conflictingName": lambda shown: shown.node.name if shown.name != shown.node.name else None,
    "type": lambda shown: shown.node.type,
    "posixPermissions": lambda shown: f"{shown.node.mode:03o}",
    "activePermissionsType": lambda shown: "posix",
    "size": lambda shown: shown.node.size,
    "atime": lambda shown: shown.node.atime,
    "mtime": lambda shown: shown.node.mtime,
    "ctime": lambda shown: shown.node.ctime,
    "creationTime": lambda shown: shown.node.created,
    "hardlinkCount": Shown.links,
    "symlinkValue": lambda shown: shown.node.target,
    "displayUid": lambda shown: 1000,
    "displayGid": lambda shown: 1000,
    "ownerUserId": lambda shown: shown.node.owner,
    "originProviderId": lambda shown: shown.node.origin,
    "directShareIds": lambda shown: [],
    "index": lambda shown: shown.name,
    "isFullyReplicatedLocally": lambda shown: True,
    "localReplicationRate": lambda shown: 1.0,
    "hasCustomMetadata": lambda shown: bool(shown.node.xattrs),
    "path": lambda shown: "/" + shown.world.path(shown.view, shown.node),
    "effProtectionFlags": lambda shown: [],
}
"""Each is made only when it is asked for: a benchmark of clients is not to be one of the double."""


Choice = Callable[[Node, str], dict[str, Any]]
"""What a request gets of a node that is listed as so."""


def choice_of(
    world: World, view: View, asked: dict[str, Any], version: tuple[int, ...], *, listing: bool = False
) -> Choice:
    """What a request with these parameters gets of each object; of a `listing` other things than of a single one."""

    def these(makers: dict[str, Callable[[Shown], Any]]) -> Choice:
        def choose(node: Node, name: str) -> dict[str, Any]:
            shown = Shown(world, view, node, name)
            return {key: make(shown) for key, make in makers.items()}

        return choose

    if version >= (21, 2, 5) and "attributes" in asked:
        names = asked["attributes"]
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise bad_value("badValueNotAllowed", "attributes", allowed=list(NEW_NAMES))
        makers = {}
        for name in names:
            if name.startswith("xattr."):
                makers[name] = partial(_xattr, name[6:])
            elif name not in NEW_NAMES or (name == "creationTime" and version < (21, 2, 6)):
                raise bad_value("badValueNotAllowed", "attributes", allowed=list(NEW_NAMES))
            else:
                makers[name] = ATTRIBUTES[name]
        return these(makers)
    if "attribute" in asked:
        old = asked["attribute"]
        several = isinstance(old, list)
        if several and not listing and version < (21, 2, 5):
            return these({})  # a bug of these versions (onedatafilerestclient: file_attributes.py)
        wanted = old if several else [old]
        if not all(name in NEW_OF_OLD for name in wanted):
            raise bad_value("badValueNotAllowed", "attribute", allowed=list(NEW_OF_OLD))
        return these({name: ATTRIBUTES[NEW_OF_OLD[name]] for name in wanted})
    if listing:
        return these({"fileId": ATTRIBUTES["fileId"], "name": ATTRIBUTES["name"], "file_id": ATTRIBUTES["fileId"]})
    old_ones = {old: ATTRIBUTES[new] for old, new in NEW_OF_OLD.items()}
    return these(old_ones if version < (21, 2, 5) else old_ones | {name: ATTRIBUTES[name] for name in OLD_NAMES})


def _xattr(key: str, shown: Shown) -> Any:
    return shown.node.xattrs.get(key)
