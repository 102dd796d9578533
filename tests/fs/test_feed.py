"""What a remote tells of changes is looked at when it is told, long before the freshness time is over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from nbmountd.backends.memory import EVERYTHING
from nbmountd.errors import RemoteTimeout, RemoteUnavailable
from nbmountd.fs.feed import Feed
from tests.fs.test_poll import Rig

FEEDING = replace(EVERYTHING, change_feed=True)


@pytest.fixture
async def rig(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, FEEDING)
    rig.remote.mkdir("a")
    rig.remote.mkdir("b")
    rig.remote.put("a/file", b"1")
    async with rig.living(), trio.open_nursery() as nursery:
        await rig.look("a")
        await rig.look("b")
        rig.requests()
        nursery.start_soon(Feed(rig.nodes, rig.backend, rig.refresh).run)
        await trio.sleep(5)
        yield rig
        nursery.cancel_scope.cancel()


async def test_what_is_told_is_seen_at_once_and_costs_one_listing(rig: Rig) -> None:
    rig.remote.put("a/new", b"2")
    await trio.sleep(0.1)

    assert await rig.look("a") == ["file", "new"]
    assert [request for request in rig.requests() if request.startswith("list")] == ["list /a"]


async def test_a_feed_that_broke_is_asked_for_again(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    rig = Rig(tmp_path, FEEDING)
    rig.backend.fail("changes", RemoteUnavailable("reset"), RemoteTimeout("silence"))
    rig.remote.mkdir("b")
    async with rig.living(), trio.open_nursery() as nursery:
        await rig.look("b")
        nursery.start_soon(Feed(rig.nodes, rig.backend, rig.refresh).run)
        await trio.sleep(10)
        rig.remote.put("b/later", b"3")
        await trio.sleep(0.1)

        assert await rig.look("b") == ["later"]
        nursery.cancel_scope.cancel()


async def test_a_change_in_a_directory_that_nobody_has_seen_costs_nothing(rig: Rig) -> None:
    rig.remote.mkdir("a/unseen")
    await trio.sleep(0.1)
    rig.requests()

    rig.remote.put("a/unseen/file", b"2")
    await trio.sleep(0.1)

    assert "list /a/unseen" not in rig.requests()
