"""Moves by CDMI, the only way to rename (op-worker: cdmi_handler.erl, cdmi_dataobject.erl, cdmi_container.erl)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from .access import check_file, check_writable
from .refusal import Refusal, posix
from .server import Request, Response, json_response
from .world import Node, Token

if TYPE_CHECKING:
    from .provider import Provider

CONTAINER, OBJECT = "application/cdmi-container", "application/cdmi-object"


def cdmi_put(provider: Provider, token: Token, request: Request) -> Response:
    if request.method != "PUT":
        return Response(405)
    body = json.loads(request.body() or b"{}")
    kind = request.headers.get("content-type", "")
    if "x-cdmi-specification-version" not in request.headers or kind not in (CONTAINER, OBJECT):
        raise Refusal(400, "badData", "Only CDMI moves are understood here.")
    segments = request.segments[1:]
    container_url = segments[-1] == ""
    if container_url:
        segments = segments[:-1]
    if container_url != (kind == CONTAINER):
        raise Refusal(400, "badData", "The path does not fit the type.")
    with provider.world.lock:
        parent, name = _target(provider, token, segments)
        source = _source(provider, token, body["move"])
        return _move(provider, token, source, parent, name, container=container_url, path=request.raw_path)


def _target(provider: Provider, token: Token, segments: list[str]) -> tuple[Node, str]:
    world, view = provider.world, provider.view
    if segments[0] == "cdmi_objectid":
        _, start = provider.find_for_change(token, segments[1])
        names = segments[2:]
    else:
        root = world.root(view, provider.space_named(token, segments[0]).id)
        assert root is not None
        start, names = root, segments[1:]
    parent = world.walk(view, start, names[:-1])
    if parent.type != "DIR":
        raise posix("enotdir")
    return parent, names[-1]


def _source(provider: Provider, token: Token, text: str) -> Node:
    parts = [part for part in text.split("/") if part]
    if parts[0] == "cdmi_objectid":
        return provider.find_for_change(token, parts[1])[1]
    root = provider.world.root(provider.view, provider.space_named(token, parts[0]).id)
    assert root is not None
    return provider.world.walk(provider.view, root, parts[1:])


def _move(
    provider: Provider, token: Token, node: Node, parent: Node, name: str, *, container: bool, path: str
) -> Response:
    world, view = provider.world, provider.view
    space = world.spaces[parent.space]
    check_writable(space, token, provider.id)
    check_file(space, token, parent, "wx")
    existing = view.child(parent.uuid, name)
    if existing is not None and existing.type == "DIR" and not container:
        return Response(302, b"", {"Location": f"https://{provider.domain}{path}/"})
    if existing is not None and container:
        raise Refusal(500, "internalServerError", "Internal server error.", {"reference": "x"})
    if container != (node.type == "DIR"):
        raise posix("enotdir" if container else "eisdir")
    if node.space != parent.space:
        raise posix("enotsup")  # it would copy and delete; nobody here asks for it
    above: Node | None = parent
    while above is not None:
        if above.uuid == node.uuid:
            raise posix("einval")
        above = view.nodes.get(above.parent or "")
    if len(name.encode()) > 255:
        raise posix("enametoolong")
    if existing is not None and existing.uuid != node.uuid:
        world.drop(view, existing)
    old_parent = view.nodes[node.parent or ""]
    view.drop(node.uuid)  # so that the old name is found and forgotten
    node.parent, node.name, node.ctime = parent.uuid, name, world.now()
    world.save(view, node)
    world.touch(view, old_parent)
    world.touch(view, parent)
    return json_response({"objectID": node.id, "objectName": name}, 200 if existing is not None else 201)
