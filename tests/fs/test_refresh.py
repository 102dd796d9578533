"""What `refresh` promises: a listing that had begun before it makes nothing fresh."""

from __future__ import annotations

from pathlib import Path

import trio
import trio.testing

from nbmountd.backends.memory import EVERYTHING, MemoryBackend, MemoryRemote
from nbmountd.config import DirectoryOptions, MountConfig
from nbmountd.fs.held import Held
from nbmountd.fs.nodes import Nodes
from nbmountd.fs.refresh import Refresh
from nbmountd.model import Entry, Place
from tests.sync.world import Disk, Silence


class Gated(MemoryBackend):
    """Gives each listing, as it was when it was asked for, only when told to."""

    def __init__(self, remote: MemoryRemote) -> None:
        super().__init__(remote, EVERYTHING, threads=False)
        self.asked = trio.Event()
        self.answer = trio.Event()

    async def list(self, place: Place) -> list[Entry]:
        found = await super().list(place)
        self.asked.set()
        await self.answer.wait()
        return found


async def test_a_listing_that_began_before_a_refresh_makes_nothing_fresh(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    disk = Disk(tmp_path)
    remote = MemoryRemote()
    backend = Gated(remote)
    config = MountConfig(name="m", path="/m", backend="directory", options=DirectoryOptions(source="/nowhere"))
    nodes = Nodes(config, disk.database, disk.store, Silence(), held=Held())
    nodes.capabilities = EVERYTHING
    refresh = Refresh(nodes, backend, freshness=30.0, deadline=30.0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(refresh.ensure_fresh, nodes.database.root)
        await backend.asked.wait()
        remote.put("new", b"made while the old listing was on its way")
        refresh.forget()
        backend.answer.set()
    await refresh.ensure_fresh(nodes.database.root)

    assert [child.name for child in nodes.database.children(1)] == ["new"]
