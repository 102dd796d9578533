"""A user's workspace on the StorageHub double, to be handled as a directory: names are those that programs see."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from nbmountd.backends.d4science_names import decode, encode
from tests.servers.d4science_double import DoubleUser


@dataclass(frozen=True)
class WorkspacePath:
    """What the tests use of `pathlib.Path`, over the double's own door. Raises FileNotFoundError."""

    user: DoubleUser
    path: str = ""
    """Below the workspace, "a/b"."""

    def __truediv__(self, name: str) -> WorkspacePath:
        return WorkspacePath(self.user, f"{self.path}/{name}")

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def wire(self) -> str:
        return "/".join(encode(part) for part in self.path.split("/") if part)

    def iterdir(self) -> Iterator[WorkspacePath]:
        for name in self.user.listdir(self.wire):
            yield self / decode(name)

    def lstat(self) -> os.stat_result:
        item = self.user.item(self.wire)
        mode = stat.S_IFREG if item["kind"] == "file" else stat.S_IFDIR
        return os.stat_result((mode, 0, 0, 1, 0, 0, item["size"], 0, 0, 0))

    stat = lstat

    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.lstat().st_mode)

    def is_symlink(self) -> bool:
        return False

    def read_bytes(self) -> bytes:
        return self.user.read(self.wire)

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        self.user.write(self.wire, content)

    def mkdir(self) -> None:
        self.user.mkdir(self.wire)
