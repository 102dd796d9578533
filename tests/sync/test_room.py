"""The remote's quota: what waits to be sent takes room of it, and what will never be sent gives it back at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from nbmountd.errors import QuotaExceeded
from nbmountd.fs.filesystem import SetAttributes
from tests.sync.test_both_sides import remove, tell
from tests.sync.world import World


async def refused(world: World, path: str, data: bytes) -> None:
    """The write is refused, and the empty file is taken away again."""
    with pytest.raises(QuotaExceeded):
        await world.write_file(path, data)
    await remove(world, path)


def test_what_waits_to_be_sent_takes_room_of_the_quota(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.fs.budget.learn_quota(100)
        await world.write_file("a", bytes(80))
        await refused(world, "b", bytes(30))
        await world.write_file("a", bytes(80))
        await world.write_file("c", bytes(20))
        assert world.fs.budget.quota_available == 0

    assert tell(tmp_path, story).remote.tree() == {"a": bytes(80), "c": bytes(20)}


@pytest.mark.parametrize("how", ["cut off", "removed", "written again"])
def test_room_that_nothing_waits_for_any_more_is_there_again_at_once(how: str, tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.fs.budget.learn_quota(100)
        node = await world.write_file("a", bytes(80))
        if how == "removed":
            await remove(world, "a")
        elif how == "cut off":
            await world.fs.setattr(node.ino, SetAttributes(size=10))
        else:
            world.fs.open(node.ino, writing=True, truncate=True)
            world.fs.close_file(node.ino, writing=True)
        await world.write_file("b", bytes(90))

    assert tell(tmp_path, story).remote.tree()["b"] == bytes(90)


def test_room_that_was_taken_on_the_remote_does_not_come_back_by_sending(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.fs.budget.learn_quota(100)
        await world.write_file("a", bytes(80))
        await trio.sleep(30)
        assert world.remote.tree() == {"a": bytes(80)}
        await refused(world, "b", bytes(30))
        world.fs.budget.learn_quota(20)
        await refused(world, "b", bytes(30))
        await world.write_file("b", bytes(20))
        world.fs.budget.learn_quota(None)
        await world.write_file("c", bytes(200))

    assert tell(tmp_path, story).remote.tree() == {"a": bytes(80), "b": bytes(20), "c": bytes(200)}
