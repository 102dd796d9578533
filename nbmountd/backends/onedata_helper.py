"""A program beside the daemon: PyFilesystem's drivers for Onedata, asked over a socket. Run by the site's own interpreter.

It needs the standard library, Python 3.7 and the package `fs` with one of the drivers, and nothing of nbmountd: it is
started as a file. Standard input is the socket; whatever the libraries print goes to standard error. A frame is two
lengths (header, content; 4 bytes each, big-endian), a header in JSON, and content. The first frame says what to open, the
token in it; then one request at a time. It ends with its socket, and by a signal of the kernel when a call of a library
takes longer than allowed, however that call holds the interpreter.

The drivers' traps that are kept from the daemon here: `fs.onedatafs` says "not found" of any failure, and spells names
that are not ASCII with question marks, which are then other files; `fs.onedatarestfs` puts names into addresses as they
are, and does not shorten a file that it opens for writing. So nothing is written over: what is new is written beside, looked
at, and moved.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

LENGTHS = struct.Struct(">II")
LARGEST_PART = 1024 * 1024
"""Bytes of content in a frame, and of one read or write of the library."""
LARGEST_HEADER = 1 << 28
STORAGE_TRIES = 3
"""The first access to a storage past the provider may fail with EAGAIN."""


class Failure(Exception):
    """What the daemon is told instead of an answer: a kind that it knows, and a text."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Channel:
    """Frames over a connected socket, which its owner closes. A closed one is EOFError."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, header: dict[str, Any], content: bytes | memoryview = b"") -> None:
        text = json.dumps(header).encode()
        self._connection.sendall(LENGTHS.pack(len(text), len(content)) + text)
        self._connection.sendall(content)

    def receive(self) -> tuple[dict[str, Any], memoryview]:
        header_size, content_size = LENGTHS.unpack(self._take(LENGTHS.size))
        if header_size > LARGEST_HEADER or content_size > LARGEST_PART:
            raise ValueError("a frame is too large")
        header = json.loads(bytes(self._take(header_size)))
        if not isinstance(header, dict):
            raise ValueError("a frame's header is no object")
        return header, self._take(content_size)

    def _take(self, size: int) -> memoryview:
        room = memoryview(bytearray(size))
        done = 0
        while done < size:
            count = self._connection.recv_into(room[done:])
            if not count:
                raise EOFError
            done += count
        return room


class Watched(Channel):
    """The helper's side: the kernel ends this process when it does something else than talk for `limit` seconds."""

    limit = 0

    def send(self, header: dict[str, Any], content: bytes | memoryview = b"") -> None:
        signal.alarm(0)
        super().send(header, content)
        signal.alarm(self.limit)

    def receive(self) -> tuple[dict[str, Any], memoryview]:
        signal.alarm(0)
        frame = super().receive()
        signal.alarm(self.limit)
        return frame


class Drive:
    """One opened file system of PyFilesystem. Paths begin with a slash."""

    def __init__(self, library: str, opened: Any) -> None:
        self._native = library == "onedatafs"
        self._fs = opened

    def stat(self, path: str) -> dict[str, Any]:
        return self._told(self._info(path), path.rsplit("/", 1)[1])

    def list(self, path: str) -> list[dict[str, Any]]:
        if not self._info(path).is_dir:
            raise Failure("not-found", "it is no directory")
        if not self._native:  # attributes come with the listing
            return [self._told(info, info.name) for info in self._fs.scandir(self._spelled(path), namespaces=["details"])]
        found = []
        for name in self._fs.listdir(self._spelled(path)):
            try:
                found.append(self.stat(f"{path.rstrip('/')}/{name}"))
            except Failure as failure:
                if failure.kind != "not-found":  # gone since
                    raise
        return found

    def read(self, path: str, start: int, stop: int) -> Iterator[bytes]:
        with self._fs.openbin(self._spelled(path), "r") as file:
            while start < stop:
                part = self._patiently(file, start, min(LARGEST_PART, stop - start))
                if not part:
                    raise Failure("cut", f"it ends at {start}, before {stop}")
                start += len(part)
                yield part

    def _patiently(self, file: Any, start: int, size: int) -> bytes:
        for _ in range(STORAGE_TRIES - 1):
            try:
                file.seek(start)
                return bytes(file.read(size))
            except RuntimeError as exc:
                if "temporarily unavailable" not in str(exc):
                    raise
                time.sleep(0.2)
        file.seek(start)
        return bytes(file.read(size))

    def write(self, path: str, parts: Iterator[memoryview]) -> int:
        """A new file; how many bytes it was given."""
        done = 0
        with self._fs.openbin(self._spelled(path), "w") as file:
            for part in parts:
                file.seek(done)
                file.write(bytes(part))
                done += len(part)
        return done

    def make(self, path: str) -> None:
        self._fs.makedir(self._spelled(path))

    def remove(self, path: str) -> None:
        self._fs.remove(self._spelled(path))

    def remove_directory(self, path: str) -> None:
        self._fs.removedir(self._spelled(path))

    def rename(self, path: str, target: str) -> None:
        """onedatafs: also directories, which its `move` refuses (and `movedir` of the interface copies)."""
        if self._native:
            self._fs._odfs.rename(self._spelled(path), self._spelled(target))
            return
        source_space, source = self._fs._split_space_path(path)  # goes into a text, not into an address
        target_space, there = self._fs._split_space_path(self._spelled(target))
        self._fs.client().move(source_space, source, target_space, there)

    def _info(self, path: str) -> Any:
        for last in (self._native, True):
            try:
                return self._fs.getinfo(self._spelled(path), namespaces=["details"])
            except Exception as exc:
                failure = failure_of(exc)
                # The driver for REST asks for an id and then about it: a file that was replaced in between is not gone.
                if last or failure.kind != "not-found":
                    raise failure from exc
        raise AssertionError

    def _spelled(self, path: str) -> str:
        if not self._native:
            return path.replace("%", "%25").replace("#", "%23").replace("?", "%3F")
        if not path.isascii():
            raise Failure("name", "fs.onedatafs cannot spell names outside ASCII")
        return path

    def _told(self, info: Any, name: str) -> dict[str, Any]:
        details = info.raw.get("details", {})
        kind = "directory" if info.is_dir else {2: "file", 7: "symlink"}.get(details.get("type"), "other")
        return {"name": name, "kind": kind, "size": details.get("size"), "modified": details.get("modified")}


def open_drive(wanted: dict[str, Any]) -> Drive:
    """The file system that the first frame asks for."""
    library, options = wanted["library"], wanted["options"]
    try:
        if library == "onedatafs":
            from fs.onedatafs import OnedataFS as Driver
        else:
            from fs.onedatarestfs import OnedataRESTFS as Driver
    except Exception as exc:
        raise Failure("library", f"{sys.executable} cannot import fs.{library}: {exc}") from exc
    try:
        return Drive(library, Driver(wanted["host"], wanted["token"], **options))
    except Exception as exc:
        raise failure_of(exc) from exc


KINDS = {
    "ResourceNotFound": "not-found", "FileExists": "exists", "DirectoryExists": "exists", "DestinationExists": "exists",
    "DirectoryNotEmpty": "not-empty", "FileExpected": "kind", "DirectoryExpected": "kind", "PermissionDenied": "denied",
    "ReadonlyTokenError": "denied", "RemoveRootError": "denied", "InsufficientStorage": "full", "InvalidCharsInPath": "name",
    "Unsupported": "unsupported",
}  # fmt: skip
TEXTS = (
    ("no such file", "not-found"), ("file exists", "exists"), ("not empty", "not-empty"), ("is a directory", "kind"),
    ("not a directory", "kind"), ("no space", "full"), ("quota", "full"), ("name too long", "name"),
    ("token", "unauthenticated"), ("unauthorized", "unauthenticated"), ("authentication", "unauthenticated"),
    ("permission denied", "denied"), ("not permitted", "denied"),
)  # fmt: skip
STATUSES = {401: "unauthenticated", 403: "denied", 404: "not-found", 507: "full"}


def failure_of(exc: BaseException) -> Failure:
    """`exc` as a kind. What is behind it counts more than its class: a driver makes "not found" of a lost connection."""
    if isinstance(exc, Failure):
        return exc
    behind = exc.__cause__ or exc.__context__
    for one in (exc, behind):
        status = getattr(one, "http_code", None)
        if status in STATUSES:
            return Failure(STATUSES[status], str(exc))
    if type(behind) is RuntimeError:  # all that onedatafs raises; its text is that of strerror(3)
        return Failure(_kind_of_text(str(behind)), str(behind))
    if type(exc) is RuntimeError:
        return Failure(_kind_of_text(str(exc)), str(exc))
    return Failure(KINDS.get(type(exc).__name__, "unavailable"), f"{type(exc).__name__}: {exc}")


def _kind_of_text(text: str) -> str:
    return next((kind for words, kind in TEXTS if words in text.lower()), "unavailable")


def answer(drive: Drive, channel: Channel, request: dict[str, Any]) -> None:
    """Does what `request` says and sends what it asked for; the last frame has `done`."""
    verb, path = request["do"], request.get("path", "/")
    result: dict[str, Any] = {"done": True}
    if verb == "stat":
        result["entry"] = drive.stat(path)
    elif verb == "list":
        result["entries"] = drive.list(path)
    elif verb == "read":
        for part in drive.read(path, request["start"], request["stop"]):
            channel.send({}, part)
    elif verb == "write":
        result["size"] = drive.write(path, _parts(channel))
    elif verb == "make":
        drive.make(path)
    elif verb == "remove":
        drive.remove(path)
    elif verb == "remove-directory":
        drive.remove_directory(path)
    elif verb == "rename":
        drive.rename(path, request["target"])
    else:
        raise Failure("unsupported", f"no such request: {verb!r}")
    channel.send(result)


def _parts(channel: Channel) -> Iterator[memoryview]:
    while True:
        channel.send({"more": True})
        header, content = channel.receive()
        if header.get("last"):
            return
        yield content


def serve(connection: socket.socket) -> None:
    """Answers until the other side closes."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process without asking Python, which may be held up
    channel = Watched(connection)
    wanted, _ = channel.receive()
    channel.limit = max(1, int(wanted["limit"]))
    signal.alarm(channel.limit)
    try:
        drive = open_drive(wanted)
        channel.send({"done": True})
        while True:
            request, _ = channel.receive()
            try:
                answer(drive, channel, request)
            except EOFError:
                raise
            except Exception as exc:
                failure = failure_of(exc)
                channel.send({"failed": failure.kind, "text": str(failure)})
    except Failure as failure:
        channel.send({"failed": failure.kind, "text": str(failure)})
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def main() -> None:
    del sys.path[0]  # the directory of this file, whose modules hide those of the libraries
    connection = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    serve(connection)
    os._exit(0)  # the library's own end is known to hang


if __name__ == "__main__":
    main()
