"""Reads a multipart/form-data body as it arrives: small parts into memory, the part named `file` into a file on disk."""

from __future__ import annotations

import email.message
import re
from collections.abc import Callable
from pathlib import Path

PIECE = 256 * 1024


class CutShort(Exception):
    """The client stopped sending."""


class NotMultipart(Exception):
    """The body is not what its Content-Type says."""


def read_form(
    read: Callable[[int], bytes], content_type: str, length: int, target: Path
) -> tuple[dict[str, str], int | None]:
    """The small parts by name, and the size of the part `file` (None: there was none), which is written to `target`."""
    match = re.search(r'boundary="?([^";]+)', content_type)
    if match is None:
        raise NotMultipart("no boundary")
    return _Reader(read, match[1].encode(), length, target).run()


class _Reader:
    def __init__(self, read: Callable[[int], bytes], boundary: bytes, length: int, target: Path) -> None:
        self._read = read
        self._mark = b"\r\n--" + boundary
        self._left = length
        self._buffer = b"\r\n"
        self._target = target

    def run(self) -> tuple[dict[str, str], int | None]:
        values: dict[str, str] = {}
        size: int | None = None
        self._until(self._mark, lambda data: None)
        while self._take(2) == b"\r\n":
            header = bytearray()
            self._until(b"\r\n\r\n", header.extend)
            message = email.message.Message()
            for line in header.decode("utf-8").split("\r\n"):
                key, _, value = line.partition(":")
                message[key.strip()] = value.strip()
            name = message.get_param("name", header="content-disposition")
            if name == "file":
                with self._target.open("wb") as file:
                    self._until(self._mark, file.write)
                    size = file.tell()
            else:
                value_bytes = bytearray()
                self._until(self._mark, value_bytes.extend)
                values[str(name)] = value_bytes.decode("utf-8")
        while self._left:
            self._more()
        return values, size

    def _more(self) -> None:
        data = self._read(min(PIECE, self._left))
        if not data:
            raise CutShort
        self._left -= len(data)
        self._buffer += data

    def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            if not self._left:
                raise NotMultipart("the body ends in a part")
            self._more()
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _until(self, mark: bytes, give: Callable[[bytes], object]) -> None:
        while (at := self._buffer.find(mark)) < 0:
            keep = len(mark) - 1
            if len(self._buffer) > keep:
                give(self._buffer[:-keep])
                self._buffer = self._buffer[-keep:]
            if not self._left:
                raise NotMultipart("a part does not end")
            self._more()
        give(self._buffer[:at])
        self._buffer = self._buffer[at + len(mark) :]
