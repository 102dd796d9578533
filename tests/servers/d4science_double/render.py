"""Items as JSON, the way the two generations write them. It knows nothing of HTTP."""

from __future__ import annotations

import base64
from typing import Any

from tests.servers.d4science_double.tree import Node, Tree

MODEL = "org.gcube.common.storagehub.model.items."
TYPES = {
    "folder": ("FolderItem", "nthl:workspaceItem"),
    "special": ("FolderItem", "nthl:workspaceItem"),
    "shared": ("SharedFolder", "nthl:workspaceSharedItem"),
    "vre": ("VreFolder", "nthl:workspaceVreItem"),
    "trash": ("TrashItem", "nthl:trashItem"),
    "file": ("GenericFileItem", "nthl:externalFile"),
    "image": ("ImageFile", "nthl:externalImage"),
}


def item(tree: Tree, node: Node, user: str, exclude: set[str]) -> dict[str, Any]:
    """One item without its wrapper. `exclude` works by node name and at the first level only."""
    settings = tree.settings
    exclude = exclude if settings.knows_exclude else set()
    newer = settings.profile == "2.x"
    image = node.kind == "file" and node.versions[-1].mime.startswith("image/")
    name, primary = TYPES["image" if image else node.kind]
    parent = node.parent
    if node.kind in ("shared", "vre") and settings.shared_parent == "own":
        parent = node.clones.get(user, parent)
    path = tree.path(node, user)
    values: dict[str, Any] = {
        "@class": MODEL + name,
        "id": node.id,
        "name": node.shown,
        "title": node.title,
        "description": node.description or None,
        "path": path,
        "parentId": parent,
        "parentPath": path.rpartition("/")[0],
        "primaryType": primary,
        "owner": node.owner,
        "lastModifiedBy": node.modified_by,
        "lastAction": node.action,
        "creationTime": node.created,
        "lastModificationTime": node.modified,
        "shared": tree.share_of(node) is not None,
        "locked": node.id in tree.locked,
        "hidden": node.hidden,
        "trashed": tree.trashed(node),
        "publicItem": False,
        "ownerNode": None,
    }
    if newer:
        values |= {"externalManaged": False, "relatedNode": None}
    if "hl:accounting" not in exclude:
        values["accounting"] = {"entries": [{"user": user, "type": what} for what in node.accounting]}
    if "hl:metadata" not in exclude:
        values["metadata" if newer else "propertyMap"] = {"map" if newer else "values": node.metadata}
    if node.kind in ("shared", "vre"):
        values |= {"privilege": node.members.get(user), "vreFolder": node.kind == "vre", "displayName": node.display_name}
        values["users"] = {"map" if newer else "values": node.members}
    if node.kind == "vre":
        values |= {"groupId": node.name, "context": node.context}
    if node.kind == "trash":
        values |= {"name": node.name, "originalParentId": node.former_parent, "deletedBy": node.owner, "lenght": 0}
    if node.kind == "file" and "jcr:content" not in exclude:
        values["content"] = _content(tree, node, path)
    if settings.absent == "missing":
        values = {key: value for key, value in values.items() if value is not None}
    return values


def _content(tree: Tree, node: Node, path: str) -> dict[str, Any]:
    last = node.versions[-1]
    values: dict[str, Any] = {
        "size": last.size,
        "mimeType": last.mime,
        "remotePath": path,
        "data": "jcr:content",
    }
    if tree.settings.storage_ids:
        values["storageId"] = last.storage_id
    if last.mime.startswith("image/"):
        count = tree.settings.thumbnails
        values |= {"width": 1, "height": 1, "thumbnailData": base64.b64encode(bytes(count)).decode()}
    return values
