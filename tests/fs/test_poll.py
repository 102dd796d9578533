"""Where versions propagate, one question keeps any number of directories fresh, and a change is found by its path."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from nbmountd.backends.memory import EVERYTHING, MemoryBackend, MemoryRemote
from nbmountd.config import DirectoryOptions, MountConfig
from nbmountd.disk.database import Node
from nbmountd.fs.held import Held
from nbmountd.fs.nodes import Nodes
from nbmountd.fs.poll import PollingRefresh
from nbmountd.model import Capabilities
from tests.sync.world import Disk, Silence

FRESHNESS = 30.0
STALE = FRESHNESS + 1
PROPAGATING = replace(EVERYTHING, propagating_versions=True)


class Rig:
    """Nodes over a remote in memory, without steps and without a kernel."""

    def __init__(self, home: Path, capabilities: Capabilities) -> None:
        self.disk = Disk(home)
        self.remote = MemoryRemote()
        self.backend = MemoryBackend(self.remote, capabilities, threads=False)
        config = MountConfig(name="m", path="/m", backend="directory", options=DirectoryOptions(source="/nowhere"))
        self.nodes = Nodes(config, self.disk.database, self.disk.store, Silence(), held=Held())
        self.nodes.capabilities = capabilities
        self.refresh = PollingRefresh(self.nodes, self.backend, freshness=FRESHNESS, deadline=30.0)

    @asynccontextmanager
    async def living(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.refresh.run_listings)
            yield
            nursery.cancel_scope.cancel()
        self.disk.abandon()

    def node(self, path: str) -> Node:
        found = self.nodes.find(path)
        assert found is not None, path
        return found

    async def look(self, path: str) -> list[str]:
        """What a program sees in the directory."""
        names = [name for name in path.split("/") if name]
        for depth in range(len(names) + 1):
            await self.refresh.ensure_fresh(self.node("/".join(names[:depth])))
        return sorted(child.name for child in self.nodes.database.children(self.node(path).ino))

    def requests(self) -> list[str]:
        """VERB PATH of each request since the last call."""
        found = [f"{request.verb} {request.place}" for request in self.backend.requests]
        self.backend.requests.clear()
        return found


@pytest.fixture
async def rig(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, PROPAGATING)
    for left in "abc":
        rig.remote.mkdir(left)
        for right in "xyz":
            rig.remote.mkdir(f"{left}/{right}")
            rig.remote.put(f"{left}/{right}/file", b"1")
    async with rig.living():
        for left in "abc":
            for right in "xyz":
                assert await rig.look(f"{left}/{right}") == ["file"]
        await trio.sleep(STALE)
        await rig.look("a")  # the first question: from now on the root's version is known
        rig.requests()
        yield rig


async def see_all(rig: Rig) -> None:
    for left in "abc":
        for right in "xyz":
            await rig.look(f"{left}/{right}")


async def test_a_quiet_tree_costs_one_question_however_large(rig: Rig, autojump_clock: trio.testing.MockClock) -> None:
    for _ in range(3):
        await trio.sleep(STALE)
        await see_all(rig)

        assert rig.requests() == ["stat /"]


async def test_a_change_is_found_by_its_path_alone(rig: Rig, autojump_clock: trio.testing.MockClock) -> None:
    await trio.sleep(STALE)
    rig.remote.put("b/y/new", b"2")
    await see_all(rig)

    assert await rig.look("b/y") == ["file", "new"]
    assert rig.requests() == ["stat /", "list /", "list /b", "list /b/y"]

    await trio.sleep(STALE)
    await see_all(rig)
    assert rig.requests() == ["stat /"]


async def test_what_was_listed_while_it_changed_is_listed_again(rig: Rig, autojump_clock: trio.testing.MockClock) -> None:
    await trio.sleep(STALE)
    rig.remote.put("a/x/one", b"2")

    def change_meanwhile() -> None:
        rig.remote.put("a/x/two", b"3")

    rig.backend.on("list", lambda place: change_meanwhile() if place.name == "x" else None)
    await rig.look("a/x")
    rig.backend.on("list", None)
    await trio.sleep(STALE)

    assert await rig.look("a/x") == ["file", "one", "two"]


async def test_what_is_asked_to_be_forgotten_is_asked_for_itself(rig: Rig, autojump_clock: trio.testing.MockClock) -> None:
    rig.refresh.forget(rig.node("a/x").ino)
    await rig.look("a/x")
    first = rig.requests()
    rig.refresh.forget()
    await see_all(rig)

    assert first == ["list /a/x"]
    assert len([request for request in rig.requests() if request.startswith("list")]) == 13


async def test_a_directory_that_is_gone_goes(rig: Rig, autojump_clock: trio.testing.MockClock) -> None:
    await trio.sleep(STALE)
    rig.remote.remove("c/z")
    await rig.refresh.ensure_fresh(rig.node("c/z"))

    assert rig.nodes.find("c/z") is None
    assert await rig.look("c") == ["x", "y"]


async def test_many_who_look_at_once_share_the_question(rig: Rig, autojump_clock: trio.testing.MockClock) -> None:
    await trio.sleep(STALE)
    async with trio.open_nursery() as nursery:
        for left in "abc":
            for right in "xyz":
                nursery.start_soon(rig.refresh.ensure_fresh, rig.node(f"{left}/{right}"))

    assert rig.requests() == ["stat /"]


async def test_while_the_remote_is_away_what_was_listed_counts(rig: Rig, autojump_clock: trio.testing.MockClock) -> None:
    await trio.sleep(STALE)
    rig.backend.outage = "the cable is out"

    assert await rig.look("a/x") == ["file"]


async def test_without_propagation_every_directory_is_listed(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    rig = Rig(tmp_path, EVERYTHING)
    rig.remote.mkdir("a")
    async with rig.living():
        await rig.look("a")
        await trio.sleep(STALE)
        await rig.look("a")

    assert rig.requests() == ["list /", "list /a"] * 2
