"""Byte ranges of GET (ctool: http_parser; op-worker: file_content download) and the streaming of bodies to disk."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from .server import PIECE, Request, Response
from .world import Node, View, World

RANGE = re.compile(r"(\d*)-(\d*)")


def parse_ranges(header: str, size: int) -> list[tuple[int, int]] | None:
    """Half-open ranges, or None if the header is malformed or nothing of it is in the file."""
    if not header.startswith("bytes="):
        return None
    found = []
    for text in header[6:].split(","):
        text = text.strip()
        if not text:
            continue
        match = RANGE.fullmatch(text)
        if match is None or not (match[1] or match[2]):
            return None
        if not match[1]:
            start, stop = max(0, size - int(match[2])), size
        else:
            start = int(match[1])
            stop = min(int(match[2]) + 1, size) if match[2] else size
            if match[2] and int(match[2]) < start:
                return None
        if start >= size:
            return None
        found.append((start, stop))
    return found or None


def download(world: World, node: Node, header: str | None) -> Response:
    """The content, or the part of it that a Range header asks for."""
    size = node.size
    headers = {"Content-Type": "application/octet-stream", "Content-Disposition": "attachment"}
    if header is None:
        return Response(200, b"", headers, _bytes_of(world.open(node), 0, size), size)
    ranges = parse_ranges(header, size)
    if ranges is None:
        return Response(416, b"", {"Content-Range": f"bytes */{size}"})
    if len(ranges) == 1:
        start, stop = ranges[0]
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Response(206, b"", headers, _bytes_of(world.open(node), start, stop), stop - start)
    parts = []
    for start, stop in ranges:
        head = f"--boundary\r\nContent-Range: bytes {start}-{stop - 1}/{size}\r\n\r\n".encode()
        parts.append(head + b"".join(_bytes_of(world.open(node), start, stop)) + b"\r\n")
    return Response(206, b"".join(parts) + b"--boundary--", {"Content-Type": "multipart/byteranges; boundary=boundary"})


def write_body(world: World, view: View, node: Node, request: Request, offset: int | None) -> None:
    """The body into the file as it comes; without an offset the file is emptied first."""
    with world.lock:
        fd = world.begin_write(view, node, truncate=offset is None)
    try:
        at = offset or 0
        for piece in request.pieces():
            os.pwrite(fd, piece, at)
            at += len(piece)
    finally:
        with world.lock:
            world.wrote(view, node, fd)
        os.close(fd)


def _bytes_of(fd: int, start: int, stop: int) -> Iterator[bytes]:
    """The bytes that are there: fewer than announced if the file has shrunk meanwhile."""
    try:
        while start < stop and (piece := os.pread(fd, min(PIECE, stop - start), start)):
            yield piece
            start += len(piece)
    finally:
        os.close(fd)
