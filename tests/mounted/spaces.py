"""A space on the Onedata double, to be handled as a directory, as another client of a provider sees it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from tests.servers.onedata_double import DoorError, DoubleOutside, OnedataDouble

GENERATIONS = {"onedata-25": "25.0.1", "onedata-21": "21.02.3"}
"""Names of both generations of the API for NBMOUNTD_TEST_REMOTE, and the version of the provider."""

KINDS = {"REG": stat.S_IFREG, "DIR": stat.S_IFDIR, "SYMLNK": stat.S_IFLNK}


@dataclass(frozen=True)
class SpacePath:
    """What the tests use of `pathlib.Path`, over the double's own door. Raises FileNotFoundError."""

    outside: DoubleOutside
    path: str = ""
    """Below the space, "a/b"."""

    def __truediv__(self, name: str) -> SpacePath:
        return SpacePath(self.outside, f"{self.path}/{name}".lstrip("/"))

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def __fspath__(self) -> str:
        """A copy of the file, for programs that open files by themselves."""
        copy = Path(self.outside.double.work) / "copies" / self.outside.base / self.path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(self.read_bytes())
        return str(copy)

    def iterdir(self) -> Iterator[SpacePath]:
        try:
            names = self.outside.listdir(self.path)
        except DoorError as exc:
            raise FileNotFoundError(self.path) from exc
        yield from (self / name for name in names)

    def lstat(self) -> os.stat_result:
        try:
            told = self.outside.stat(self.path)
        except DoorError as exc:
            raise FileNotFoundError(self.path) from exc
        return os.stat_result((KINDS[told["type"]] | told["mode"], 0, 0, 1, 0, 0, told["size"], 0, 0, 0))

    stat = lstat

    def exists(self) -> bool:
        with suppress(FileNotFoundError):
            self.lstat()
            return True
        return False

    def glob(self, pattern: str) -> Iterator[SpacePath]:
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def unlink(self) -> None:
        self.outside.remove(self.path)

    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.lstat().st_mode)

    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.lstat().st_mode)

    def readlink(self) -> Path:
        return Path(self.outside.stat(self.path)["target"])

    def read_bytes(self) -> bytes:
        return self.outside.read(self.path)

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        self.outside.write(self.path, content)

    def mkdir(self) -> None:
        self.outside.mkdir(self.path)


def space_on(double: OnedataDouble, name: str, base: Path) -> tuple[dict[str, object], SpacePath]:
    """The keys of a mount of a new space, and the space from outside. The providers hear of each other's changes after 2 s."""
    token = base / f"{name}-token"
    token.write_text("checkin-alice")
    token.chmod(0o644)
    base.chmod(0o755)
    double.do("lag", seconds=2)
    root = SpacePath(double.add_space(name, f"{name} data"))
    keys: dict[str, object] = {
        "backend": "onedata", "onezone": double.zone_host, "oneprovider": double.krakow_host, "space": f"{name} data",
        "checkin_token_file": str(token), "ca_bundle": double.ca_bundle,
    }  # fmt: skip
    return keys, root
