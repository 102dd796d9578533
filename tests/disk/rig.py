"""One mount's state directory as a test sees it: opened, killed at a moment, opened again, with a remote made of bytes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nbmountd.disk.content import Content, Layer
from nbmountd.disk.database import Node
from nbmountd.disk.state import State, open_state
from nbmountd.model import ROOT_INODE, Kind

NOW = 1_700_000_000_000_000_000


def accept(count: int) -> None:
    """A budget without a limit."""


class Rig:
    """A state directory and a cache directory below `home`. Closed with `close`; `kill` leaves it as a SIGKILL would."""

    def __init__(self, home: Path, *, boot_id: str = "boot 1", **limits: int) -> None:
        self.home = home
        self.boot_id = boot_id
        self.limits = limits
        self.generation = 0
        self.meddled = False
        """Somebody has changed the cache behind our back."""
        self._open()

    def _open(self) -> None:
        self.state_dir = self.home / f"state {self.generation}"
        self.cache_dir = self.home / f"cache {self.generation}"
        self.state: State = open_state(self.state_dir, self.cache_dir, accept, boot_id=self.boot_id, **self.limits)
        self.database, self.store = self.state.database, self.state.store

    def kill(self, *, reboot: bool = False) -> None:
        """What a death at this moment leaves on the disk is opened anew; the dead one's descriptors are closed."""
        before = (self.state_dir, self.cache_dir)
        self.generation += 1
        for old, name in zip(before, ("state", "cache"), strict=True):
            if old.exists():
                shutil.copytree(old, self.home / f"{name} {self.generation}")
        self.abandon()
        for old in before:
            shutil.rmtree(old, ignore_errors=True)
        if reboot:
            self.boot_id += "'"
        self._open()

    def abandon(self) -> None:
        """Closes without anything that an orderly end does."""
        store = self.store
        for content in list(store._open.values()):  # the only way to end a store without its consent
            store._cache._close(content)
            for layer in content.layers:
                if layer.fd >= 0:
                    os.close(layer.fd)
        self.state.journal.close()
        self.database.close()

    def restart(self) -> None:
        """An orderly end and a new start."""
        self.state.close()
        self._open()

    def close(self) -> None:
        self.state.close()

    # -- a remote without protocol ------------------------------------------------------------------------------------

    def new_file(self, name: str = "file", base: bytes | None = None, version: str = "v1") -> Node:
        """A node; with `base`, one that the remote has."""
        values = {} if base is None else {
            "base_parent": ROOT_INODE, "base_name": name, "base_version": version, "base_size": len(base), "size": len(base)
        }  # fmt: skip
        with self.database.transaction() as change:
            return change.insert(Kind.FILE, parent=ROOT_INODE, name=name, mtime_ns=NOW, **values)

    def node(self, name: str = "file") -> Node:
        node = self.database.child(ROOT_INODE, name)
        assert node is not None
        return node

    def fetch(self, content: Content, base: bytes, start: int, stop: int, layers: list[Layer] | None = None) -> None:
        """Verifies and brings what is missing of the range, as reads.py does."""
        while gaps := content.missing(start, stop, layers):
            verify = self.store.verify_later(content, gaps)
            if verify is not None:
                before = content.present.total
                verify()()
                assert self.meddled or content.present.total == before, "what nobody changed is what it was"
                continue
            for begin, end in gaps:
                fill = self.store.fill(content, begin)
                try:
                    fill.write(memoryview(base[begin:end]))
                finally:
                    fill.note()
                    fill.close()

    def read(self, node: Node, base: bytes = b"") -> bytes:
        """The whole file as a program sees it."""
        content = self.store.open(node)
        try:
            self.fetch(content, base, 0, content.size)
            data = content.read(0, content.size)
            assert self.store.read_later(content, 0, content.size)() == data
            return data
        finally:
            self.store.release(content)

    def write(self, node: Node, offset: int, data: bytes) -> None:
        content = self.store.open(node)
        try:
            self.store.write(content, offset, data, NOW)
        finally:
            self.store.release(content)

    def truncate(self, node: Node, size: int) -> None:
        content = self.store.open(node)
        try:
            self.store.truncate(content, size, NOW)
        finally:
            self.store.release(content)

    def fsync(self, node: Node) -> None:
        content = self.store.open(node)
        try:
            for call in self.store.syncing(content):
                call()
        finally:
            self.store.release(content)

    def settle(self) -> None:
        for call in self.store.settling():
            call()

    def check_counters(self) -> None:
        assert (self.store.unsent_bytes, self.store.cached_bytes) == self.store.recount()
