"""A user's workspace on the StorageHub double, to be handled as a directory: names are those that programs see."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import cast

from nbmountd.backends.d4science_names import decode, encode
from tests.servers.d4science_double import D4ScienceServer, DoubleUser

KINDS: dict[str, dict[str, object]] = {
    "1.x": {"profile": "1.x"},
    "1.x-ranges": {"profile": "1.x", "ranges": True, "absent": "missing"},
    "2.x": {"profile": "2.x"},
    "2.x-ranges": {"profile": "2.x", "ranges": True, "missing_class": "IdNotFoundException"},
}
"""The servers that workspaces may be on: settings of the double by name."""


def workspace_on(server: D4ScienceServer, kind: str, base: Path) -> tuple[dict[str, object], Path]:
    """The keys of a mount over a new user's workspace on `server`, which becomes one of `kind`, and the workspace from outside.
    `base` gets a file with the token."""
    server.settings(**KINDS[kind])
    user = server.new_user()
    user.write("probe", b"12")  # whether ranges work is found out with a file
    token = base / f"{kind}.token"
    token.write_text(user.token)
    keys: dict[str, object] = {"backend": "d4science", "url": server.url, "token_file": str(token)}
    return keys, cast(Path, WorkspacePath(user))


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

    def __fspath__(self) -> str:
        """A copy of the file, for programs that open files by themselves."""
        copy = self.user.server.work / "copies" / self.wire
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(self.read_bytes())
        return str(copy)

    def iterdir(self) -> Iterator[WorkspacePath]:
        for name in self.user.listdir(self.wire):
            yield self / decode(name)

    def lstat(self) -> os.stat_result:
        item = self.user.item(self.wire)
        mode = stat.S_IFREG if item["kind"] == "file" else stat.S_IFDIR
        return os.stat_result((mode, 0, 0, 1, 0, 0, item["size"], 0, 0, 0))

    stat = lstat

    def exists(self) -> bool:
        with suppress(FileNotFoundError):
            self.lstat()
            return True
        return False

    def glob(self, pattern: str) -> Iterator[WorkspacePath]:
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

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
