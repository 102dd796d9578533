"""What looking promises: a listing that had begun before `refresh` makes nothing fresh; a long one is shown at last."""

from __future__ import annotations

from pathlib import Path

import trio
import trio.testing

from nbmountd.backends.memory import EVERYTHING, MemoryBackend, MemoryRemote
from nbmountd.config import DirectoryOptions, MountConfig
from nbmountd.errors import RemoteTimeout
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


class Slow(MemoryBackend):
    """Gives each listing `seconds` after it was asked for."""

    def __init__(self, remote: MemoryRemote, seconds: float) -> None:
        super().__init__(remote, EVERYTHING, threads=False)
        self.seconds = seconds

    async def list(self, place: Place) -> list[Entry]:
        found = await super().list(place)
        await trio.sleep(self.seconds)
        return found


def over(disk: Disk, backend: MemoryBackend) -> tuple[Nodes, Refresh]:
    config = MountConfig(name="m", path="/m", backend="directory", options=DirectoryOptions(source="/nowhere"))
    nodes = Nodes(config, disk.database, disk.store, Silence(), held=Held())
    nodes.capabilities = EVERYTHING
    return nodes, Refresh(nodes, backend, freshness=30.0, deadline=30.0)


async def test_a_directory_that_takes_longer_than_the_deadline_is_shown_when_its_listing_has_come(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    remote = MemoryRemote()
    remote.put("file", b"1")
    backend = Slow(remote, 75.0)
    nodes, refresh = over(Disk(tmp_path), backend)
    ended = []

    async with trio.open_nursery() as nursery:
        nursery.start_soon(refresh.run_listings)
        for _ in range(3):
            try:
                await refresh.ensure_fresh(nodes.database.root)
                ended.append((trio.current_time(), "shown"))
            except RemoteTimeout:
                ended.append((trio.current_time(), "too slow"))
        shown = [child.name for child in nodes.database.children(1)]
        nursery.cancel_scope.cancel()

    assert [(round(at), how) for at, how in ended] == [(30, "too slow"), (60, "too slow"), (75, "shown")]
    assert shown == ["file"]
    assert backend.count("list") == 1


async def test_a_known_directory_whose_listing_takes_long_holds_nobody_up_for_longer_than_the_first_who_waits(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    backend = Slow(MemoryRemote(), 0.0)
    nodes, refresh = over(Disk(tmp_path), backend)
    waited = []

    async with trio.open_nursery() as nursery:
        nursery.start_soon(refresh.run_listings)
        await refresh.ensure_fresh(nodes.database.root)
        backend.seconds = 300.0
        await trio.sleep(31)
        for _ in range(5):
            began = trio.current_time()
            await refresh.ensure_fresh(nodes.database.root)
            waited.append(round(trio.current_time() - began))
            await trio.sleep(1)
        nursery.cancel_scope.cancel()

    assert waited == [30, 0, 0, 0, 0]
    assert backend.count("list") == 2


async def test_a_listing_that_began_before_a_refresh_makes_nothing_fresh(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    disk = Disk(tmp_path)
    remote = MemoryRemote()
    backend = Gated(remote)
    nodes, refresh = over(disk, backend)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(refresh.run_listings)
        nursery.start_soon(refresh.ensure_fresh, nodes.database.root)
        await backend.asked.wait()
        remote.put("new", b"made while the old listing was on its way")
        refresh.forget()
        backend.answer.set()
        await trio.sleep(1)
        await refresh.ensure_fresh(nodes.database.root)
        nursery.cancel_scope.cancel()

    assert [child.name for child in nodes.database.children(1)] == ["new"]
