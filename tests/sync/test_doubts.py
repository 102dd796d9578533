"""A step that arrived just before the process died, and what programs did to the name before anybody knew: nothing comes back
as a ghost, and nobody is in conflict with himself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from nbmountd.backends.memory import EVERYTHING
from nbmountd.fs.filesystem import SetAttributes
from tests.sync.test_both_sides import edit, remove, rename, tell
from tests.sync.world import World


async def die_after(world: World, verb: str, how: str) -> None:
    """The next `verb` is carried out and its answer never comes; then the process dies, or lives on. The remote is away."""
    world.flaky.fail(verb, "silent" if how == "death" else "lost")
    world.flaky.fail("stat", *["error"] * 1000)
    await trio.sleep(8)
    world.memory.outage = "gone"
    if how == "death":
        await world.kill(world.nursery)


async def back(world: World) -> None:
    """The remote is there again and is looked at."""
    world.memory.outage = None
    world.flaky.plan.clear()
    await trio.sleep(60)
    await world.fs.refresh_now(None)


async def ready(world: World) -> None:
    world.remote.mkdir("d")
    world.remote.put("old", b"before")
    await world.read_file("old")
    await world.find("d")


async def new_file(world: World) -> None:
    await world.write_file("new", b"ours")


async def empty_file(world: World) -> None:
    node = await world.fs.create(1, "new", 0o644)
    world.fs.close_file(node.ino, writing=True)


async def edited(world: World) -> None:
    await edit(world, "old", b"BE")


async def replaced(world: World) -> None:
    await world.write_file(".tmp", b"ours")
    await rename(world, ".tmp", "old")


async def moved(world: World) -> None:
    await rename(world, "old", "d/new")


async def made(world: World) -> None:
    await world.fs.make_directory(1, "e", 0o755)


Act = Callable[[World], Awaitable[None]]
SENT: dict[str, tuple[str, Act, str]] = {
    "new file": ("upload", new_file, "new"),
    "empty file": ("upload", empty_file, "new"),
    "edit": ("upload", edited, "old"),
    "replacement": ("upload", replaced, "old"),
    "move": ("move", moved, "d/new"),
    "directory": ("make_directory", made, "e"),
}


@pytest.mark.parametrize("how", ["death", "no answer"])
@pytest.mark.parametrize("what", SENT)
def test_what_arrived_unheard_and_was_then_removed_does_not_come_back(what: str, how: str, tmp_path: Path) -> None:
    verb, act, path = SENT[what]

    async def story(world: World) -> None:
        await ready(world)
        await act(world)
        await die_after(world, verb, how)
        if what == "directory":
            await world.fs.remove_directory(1, path)
        else:
            await remove(world, path)
        await back(world)

    world = tell(tmp_path, story)

    rest = {} if path == "old" or what == "move" else {"old": b"before"}
    assert world.remote.tree() == {"d": None} | rest
    assert not [event for event in world.events if event[0] == "conflict"]


@pytest.mark.parametrize("how", ["death", "no answer"])
@pytest.mark.parametrize("what", SENT)
def test_what_arrived_unheard_and_was_then_renamed_is_there_once(what: str, how: str, tmp_path: Path) -> None:
    verb, act, path = SENT[what]
    contents: list[bytes | None] = []

    async def story(world: World) -> None:
        await ready(world)
        await act(world)
        contents.append(None if what == "directory" else await world.read_file(path))
        await die_after(world, verb, how)
        await rename(world, path, "other")
        await back(world)

    world = tell(tmp_path, story)

    rest = {} if path == "old" or what == "move" else {"old": b"before"}
    assert world.remote.tree() == {"d": None, "other": contents[0]} | rest
    assert not [event for event in world.events if event[0] == "conflict"]


@pytest.mark.parametrize("how", ["death", "no answer"])
def test_a_move_that_arrived_unheard_and_was_then_taken_back_is_taken_back(how: str, tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await ready(world)
        await moved(world)
        await die_after(world, "move", how)
        await rename(world, "d/new", "old")
        await back(world)

    assert tell(tmp_path, story).remote.tree() == {"d": None, "old": b"before"}


@pytest.mark.parametrize("how", ["death", "no answer"])
@pytest.mark.parametrize("what", ["new file", "edit", "replacement"])
def test_what_arrived_unheard_is_replaced_by_the_next_file_of_that_name_without_a_conflict(
    what: str, how: str, tmp_path: Path
) -> None:
    verb, act, path = SENT[what]

    async def story(world: World) -> None:
        await ready(world)
        await act(world)
        await die_after(world, verb, how)
        await world.write_file(".tmp", b"next")
        await rename(world, ".tmp", path)
        await back(world)

    assert tell(tmp_path, story).remote.tree() == {"d": None, "old": b"before"} | {path: b"next"}


def test_what_others_put_there_meanwhile_is_not_taken_for_ours(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await ready(world)
        await new_file(world)
        await die_after(world, "upload", "death")
        world.remote.put("new", b"their")
        await remove(world, "new")
        await back(world)

    assert tell(tmp_path, story).remote.tree() == {"d": None, "old": b"before", "new": b"their"}


def test_a_removed_file_in_doubt_is_forgotten_when_it_never_arrived(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await ready(world)
        await new_file(world)
        world.flaky.fail("upload", "maybe", *["error"] * 1000)
        world.flaky.fail("stat", *["error"] * 1000)
        await trio.sleep(8)
        await remove(world, "new")
        assert [doubt.name for doubt in world.nodes.doubts.all()] == ["new"]
        await back(world)
        await trio.sleep(400)
        assert world.nodes.doubts.all() == []
        assert world.rig.store.unsent_bytes == 0

    assert tell(tmp_path, story).remote.tree() == {"d": None, "old": b"before"}


PROVES_NOTHING = replace(
    EVERYTHING, native_mtime=False, checksum_algorithm=None, stable_ids=False, conditional_writes=False, ranged_writes=False
)


def test_what_others_put_at_the_target_of_a_move_is_not_taken_for_what_was_moved(tmp_path: Path) -> None:
    """The other client removes the source as well, both files are of one size, and not a byte of ours is here to compare."""
    seen: list[int] = []

    async def story(world: World) -> None:
        world.remote.put("old", b"ours..")
        seen.append((await world.find("old")).ino)
        await trio.sleep(3)  # so that their times differ
        world.remote.put("new", b"theirs")
        world.remote.remove("old")
        await rename(world, "old", "new")
        await trio.sleep(60)
        await world.fs.refresh_now(None)
        seen.append((await world.find("new")).ino)
        assert await world.read_file("new") == b"theirs"

    assert tell(tmp_path, story, PROVES_NOTHING).remote.tree() == {"new": b"theirs"}
    assert seen[0] != seen[1]


def test_a_file_that_was_only_cut_shorter_is_known_again_after_a_death(tmp_path: Path) -> None:
    """Only its new size travels, and not a byte of it is here: what is left of it is fetched first, to be compared."""

    async def story(world: World) -> None:
        world.remote.put("old", b"a hundred thousand")
        await world.fs.setattr((await world.find("old")).ino, SetAttributes(size=9))
        await die_after(world, "write_ranges", "death")
        await back(world)

    world = tell(tmp_path, story, replace(PROVES_NOTHING, conditional_writes=True, ranged_writes=True))

    assert world.remote.tree() == {"old": b"a hundred"}
    assert not [event for event in world.events if event[0] == "conflict"]


@pytest.mark.parametrize("answer", ["short", "long"])
def test_an_answer_of_the_wrong_length_does_not_prove_that_the_remote_has_other_bytes(answer: str, tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.flaky.fail("upload", "lost")
        world.flaky.fail("read", answer)
        await world.write_file("new", b"ours")
        await trio.sleep(60)

    world = tell(tmp_path, story, replace(PROVES_NOTHING, conditional_writes=True))

    assert world.remote.tree() == {"new": b"ours"}
    assert not [event for event in world.events if event[0] == "conflict"]


@pytest.mark.parametrize("how", ["death", "no answer"])
def test_a_hard_link_that_arrived_unheard_and_was_then_written_to_is_no_conflict(how: str, tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await ready(world)
        await world.fs.link((await world.find("old")).ino, 1, "new")
        await die_after(world, "upload", how)
        await edit(world, "new", b"BE")
        await back(world)

    world = tell(tmp_path, story, replace(PROVES_NOTHING, conditional_writes=True))

    assert world.remote.tree() == {"d": None, "old": b"BEfore", "new": b"BEfore"}
    assert not [event for event in world.events if event[0] == "conflict"]
