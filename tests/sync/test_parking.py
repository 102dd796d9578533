"""What the remote denied goes out by itself some time after the remote allows it; until then it is sent for nothing seldom."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from nbmountd.errors import RemoteError
from nbmountd.model import Health
from nbmountd.sync.parking import FIRST_TRIAL, LAST_TRIAL
from tests.sync.test_both_sides import edit, remove, rename, tell
from tests.sync.world import CHANGES, World

HOUR = 3600


def deny(world: World, kind: str = "denied") -> None:
    """The remote takes no change any more."""
    for verb in CHANGES:
        world.flaky.fail(verb, *[kind] * 100_000)


def left(world: World, verb: str) -> int:
    return len(world.flaky.plan[verb])


async def many_changes(world: World) -> None:
    """Everything that can be parked: made, written, edited, renamed, removed."""
    for name in ("edited", "removed", "renamed"):
        world.remote.put(name, b"before")
    await world.read_file("edited")
    deny(world)
    await world.fs.make_directory(1, "d", 0o755)
    await world.write_file("d/new", b"ours")
    await edit(world, "edited", b"EDITED")
    await remove(world, "removed")
    await rename(world, "renamed", "other")
    await trio.sleep(60)
    assert len(world.engine.parked_nodes()) == 4


def all_of_it(world: World) -> bool:
    return world.remote.tree() == {"d": None, "d/new": b"ours", "edited": b"EDITED", "other": b"before"}


async def by_itself(world: World) -> None:
    await trio.sleep(1.2 * FIRST_TRIAL + 10)


async def after_an_outage(world: World) -> None:
    world.memory.outage = "gone"
    while world.policy.health is not Health.OFFLINE:
        with suppress(RemoteError):
            await world.fs.refresh_now(None)
    world.memory.outage = None
    await trio.sleep(60)


async def at_the_next_start(world: World) -> None:
    await world.kill(world.nursery)
    await trio.sleep(30)


async def when_somebody_says_so(world: World) -> None:
    world.engine.try_parked()
    await trio.sleep(10)


@pytest.mark.parametrize("how", [by_itself, after_an_outage, at_the_next_start, when_somebody_says_so])
def test_what_the_remote_denied_goes_out_once_it_is_allowed(how: Callable[[World], Awaitable[None]], tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await many_changes(world)
        world.flaky.plan.clear()
        await how(world)
        assert all_of_it(world)
        assert world.engine.parked_nodes() == []

    tell(tmp_path, story)


@pytest.mark.parametrize("kind", ["denied", "too large"])
def test_what_is_still_denied_is_sent_for_nothing_seldom_and_one_at_a_time(kind: str, tmp_path: Path) -> None:
    async def story(world: World) -> None:
        deny(world, kind)
        for number in range(20):
            await world.write_file(f"file {number}", b"ours")
        await trio.sleep(60)
        before, parkings = left(world, "upload"), world.engine.parkings
        await trio.sleep(24 * HOUR)
        assert 24 * HOUR / (1.2 * LAST_TRIAL) < before - left(world, "upload") < 24 * HOUR / (0.8 * LAST_TRIAL) + 10
        assert world.engine.parkings == parkings  # so no program hears of it twice
        assert len([event for event in world.events if event[0] == "parked"]) == 20
        world.flaky.plan.clear()
        await trio.sleep(1.2 * LAST_TRIAL + 60)
        assert len(world.remote.tree()) == 20

    tell(tmp_path, story)


def test_one_that_stays_denied_does_not_keep_others_from_being_tried(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        deny(world)
        await world.fs.make_directory(1, "small, and denied for ever", 0o755)
        await world.write_file("large", bytes(1000))
        await trio.sleep(60)
        world.flaky.plan["upload"].clear()
        await trio.sleep(3 * 1.2 * FIRST_TRIAL + 10)
        assert world.remote.tree() == {"large": bytes(1000)}

    tell(tmp_path, story)


def test_what_no_remote_will_ever_take_is_not_tried_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a", b"before")
        node = await world.find("a")
        world.fs.open(node.ino, writing=True, truncate=False)
        world.remote.put("a", b"theirs")
        world.fs.write(node.ino, 6, b" and ours")  # of the bytes before there is no copy anywhere
        await trio.sleep(600)
        world.fs.close_file(node.ino, writing=True)
        await trio.sleep(60)
        assert len(world.engine.parked_nodes()) == 1
        calls = []
        world.flaky.answer_with("upload", lambda: calls.append("upload"))  # type: ignore[arg-type, return-value]
        await trio.sleep(24 * HOUR)
        assert calls == []
        world.flaky.answers.clear()

    tell(tmp_path, story)
