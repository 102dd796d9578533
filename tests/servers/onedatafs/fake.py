"""A stand-in for Onedata's `fs.onedatafs`, which is on no index: a directory behind its interface, with its traps.

Kept are: the arguments of its constructor; that `getinfo` says "not found" of every failure; that most methods spell a path
with "?" for what is not ASCII; that a call holds the interpreter while it waits; times in whole seconds; that `move` takes
no directories. What other tests want of it is in the directory ROOT: a file `.broken` there makes every call fail, a file
`.held` makes every read wait for ever, `.opened` tells with which arguments it was opened.
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

from fs.base import FS
from fs.errors import FileExpected, ResourceNotFound
from fs.info import Info
from fs.osfs import OSFS

ROOT = Path(os.environ["FAKE_ONEDATAFS_ROOT"])
TOKEN = "the-token-of-the-test"


def to_ascii(path: str) -> str:
    return path.encode("ascii", "replace").decode()


class _Native:
    """The compiled part, as far as it is used past the interface."""

    def __init__(self, files: OSFS) -> None:
        self._files = files

    def rename(self, source: str, target: str) -> None:
        try:
            os.rename(self._files.getsyspath(source), self._files.getsyspath(target))
        except OSError as exc:
            raise RuntimeError(exc.strerror) from None


class OnedataFS(FS):  # type: ignore[misc, unused-ignore]
    def __init__(
        self, host: str, token: str, port: int = 443, space: Any = (), space_id: Any = (), insecure: bool = False,
        force_proxy_io: bool = False, force_direct_io: bool = False, no_buffer: bool = False, provider_timeout: int = 30,
        metadata_cache_size: int = 5000000, drop_dir_cache_after: int = 300, log_level: int = 0, cli_args: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        print("the library prints what it likes", flush=True)
        if token != TOKEN:
            raise RuntimeError("Authentication failed: invalid token")
        told = {"host": host, "space": space, "direct": force_direct_io, "proxy": force_proxy_io, "plain": no_buffer}
        (ROOT / ".opened").write_text(json.dumps(told))
        self._files = OSFS(str(ROOT / "spaces"))
        self._odfs = _Native(self._files)

    def _checked(self) -> None:
        if (ROOT / ".broken").exists():
            raise RuntimeError("Connection refused")

    def getinfo(self, path: str, namespaces: Any = None) -> Info:
        try:
            self._checked()
            if not self._files.exists(path):
                raise RuntimeError("No such file or directory")
        except RuntimeError:
            raise ResourceNotFound(path)  # noqa: B904  # as the original: what was behind is only in its context
        raw = self._files.getinfo(path, ["details"]).raw
        raw["details"]["modified"] = int(raw["details"]["modified"])
        return Info(raw)

    def listdir(self, path: str) -> list[str]:
        self._checked()
        return self._files.listdir(to_ascii(path))

    def openbin(self, path: str, mode: str = "r", buffering: int = -1, **options: Any) -> Any:
        self._checked()
        if "r" in mode and (ROOT / ".held").exists():
            ctypes.PyDLL(None).sleep(3600)  # as the original: nothing else of this process runs
        return self._files.openbin(to_ascii(path), mode, buffering)

    def makedir(self, path: str, permissions: Any = None, recreate: bool = False) -> Any:
        self._checked()
        return self._files.makedir(to_ascii(path))

    def remove(self, path: str) -> None:
        self._checked()
        self._files.remove(to_ascii(path))

    def removedir(self, path: str) -> None:
        self._checked()
        self._files.removedir(to_ascii(path))

    def setinfo(self, path: str, info: Any) -> None:
        self._checked()

    def move(self, src_path: str, dst_path: str, overwrite: bool = False, preserve_time: bool = False) -> None:
        if self.isdir(src_path):
            raise FileExpected(src_path)
        self._odfs.rename(to_ascii(src_path), to_ascii(dst_path))
