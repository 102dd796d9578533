"""Server-sent events of files in observed directories (op-worker 25.x: file_events; reference/onedata.md, section 5.2)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .access import check_space
from .attributes import ATTRIBUTES, Shown
from .refusal import bad_value, posix
from .server import Request, Response
from .world import Event, Token

if TYPE_CHECKING:
    from .provider import Provider

POLL = 0.2
"""Seconds after which a stream looks whether its provider still runs."""


def stream_events(provider: Provider, token: Token, request: Request) -> Response:
    space = check_space(provider.world, token, request.segments[4], provider.id)
    asked = request.json()
    directories = asked.get("observedDirectories") or []
    if not directories:
        raise bad_value("badValueEmpty", "observedDirectories")
    observed = set()
    for number, identifier in enumerate(directories):
        node = provider.world.by_id(provider.view, identifier)
        if node is None or node.space != space.id:
            raise bad_value("badValueIdentifier", f"observedDirectories[{number}]")
        if node.type != "DIR":
            raise posix("enotdir")
        observed.add(node.uuid)
    last = request.headers.get("last-event-id")
    start = int(last) if last is not None else len(provider.view.events)
    stream = _events(provider, space.id, observed, asked.get("observedAttributes") or [], start)
    return Response(200, b"", {"Content-Type": "text/event-stream"}, stream)


def _events(provider: Provider, space: str, observed: set[str], attributes: list[str], seq: int) -> Iterator[bytes]:
    told = seq
    provider.streams += 1
    yield b": hello\n\n"
    yield from _live(provider, space, observed, attributes, seq, told)


def _live(
    provider: Provider, space: str, observed: set[str], attributes: list[str], seq: int, told: int
) -> Iterator[bytes]:
    view = provider.view
    while True:
        with view.news:
            if len(view.events) <= seq:
                view.news.wait(POLL)
            news = view.events[seq:]
        provider.world.catch_up()
        if not news:
            yield b""  # notices an end of the connection
        for event in news:
            seq = event.seq
            if event.space == space and event.parent in observed:
                told = seq
                yield _text(seq, event.kind, _told(provider, event, attributes))
            elif seq - told >= 100:
                told = seq
                yield _text(seq, "heartbeat", None)


def _told(provider: Provider, event: Event, attributes: list[str]) -> dict[str, Any]:
    from .ids import file_id

    told: dict[str, Any] = {
        "fileId": file_id(event.uuid, event.space),
        "parentFileId": file_id(event.parent or "", event.space),
    }
    node = provider.view.nodes.get(event.uuid)
    if event.kind == "changedOrCreated" and node is not None:
        shown = Shown(provider.world, provider.view, node, node.name)
        told["attributes"] = {key: ATTRIBUTES[key](shown) for key in attributes if key in ATTRIBUTES}
    return told


def _text(seq: int, kind: str, value: Any) -> bytes:
    return f"id: {seq}\nevent: {kind}\ndata: {json.dumps(value)}\n\n".encode()
