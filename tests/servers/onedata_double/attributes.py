"""Attributes of files in both generations of names, and which a request may ask for."""

from __future__ import annotations

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


def all_attributes(world: World, view: View, node: Node, listed_as: str) -> dict[str, Any]:
    links = 1 if node.group is None else sum(other.group == node.group for other in view.nodes.values())
    parent = view.nodes.get(node.parent or "")
    return {
        "fileId": node.id,
        "parentFileId": parent.id if parent is not None else None,
        "name": listed_as,
        "conflictingName": node.name if listed_as != node.name else None,
        "type": node.type,
        "posixPermissions": f"{node.mode:03o}",
        "activePermissionsType": "posix",
        "size": node.size,
        "atime": node.atime,
        "mtime": node.mtime,
        "ctime": node.ctime,
        "creationTime": node.created,
        "hardlinkCount": links,
        "symlinkValue": node.target,
        "displayUid": 1000,
        "displayGid": 1000,
        "ownerUserId": node.owner,
        "originProviderId": node.origin,
        "directShareIds": [],
        "index": listed_as,
        "isFullyReplicatedLocally": True,
        "localReplicationRate": 1.0,
        "hasCustomMetadata": bool(node.xattrs),
        "path": "/" + world.path(view, node),
        "effProtectionFlags": [],
    }


def chosen_attributes(
    world: World, view: View, node: Node, asked: dict[str, Any], version: tuple[int, ...], *, child: str | None = None
) -> dict[str, Any]:
    """What a request with these parameters gets of `node`; `child` is its name in a listing, None outside of one."""
    everything = all_attributes(world, view, node, child if child is not None else node.name)
    if version >= (21, 2, 5) and "attributes" in asked:
        names = asked["attributes"]
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise bad_value("badValueNotAllowed", "attributes", allowed=list(NEW_NAMES))
        given = {}
        for name in names:
            if name.startswith("xattr."):
                given[name] = node.xattrs.get(name[6:])
            elif name not in NEW_NAMES or (name == "creationTime" and version < (21, 2, 6)):
                raise bad_value("badValueNotAllowed", "attributes", allowed=list(NEW_NAMES))
            else:
                given[name] = everything[name]
        return given
    if "attribute" in asked:
        old = asked["attribute"]
        several = isinstance(old, list)
        if several and child is None and version < (21, 2, 5):
            return {}  # a bug of these versions (onedatafilerestclient: file_attributes.py)
        wanted = old if several else [old]
        by_old = {OLD_NAMES[name]: everything[name] for name in OLD_NAMES}
        if not all(name in by_old for name in wanted):
            raise bad_value("badValueNotAllowed", "attribute", allowed=list(by_old))
        return {name: by_old[name] for name in wanted}
    if child is not None:
        return {"fileId": node.id, "name": child, "file_id": node.id}
    old_ones = {OLD_NAMES[name]: everything[name] for name in OLD_NAMES}
    if version < (21, 2, 5):
        return old_ones
    return old_ones | {name: everything[name] for name in OLD_NAMES}
