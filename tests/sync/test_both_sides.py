"""What becomes of a name when both sides have changed it: one promise a test, against the real core over a remote in memory."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from nbmountd.backends.memory import EVERYTHING
from nbmountd.disk.database import Node
from nbmountd.errors import LocalError, NotFound, RemoteError, RemoteExists, RemoteNotFound, RemoteUnavailable, StaleFile
from nbmountd.fs.filesystem import SetAttributes
from nbmountd.fs.rules import TABLE, Here, There, as_markdown, decide
from nbmountd.model import Capabilities, Entry, Kind, Place
from tests.sync.world import World, running

Story = Callable[[World], Awaitable[None]]
WHOLE_UPLOADS = replace(EVERYTHING, ranged_writes=False, native_mtime=False)
LARGE = 600 * 1024
"""More than is fetched whole at the first read."""


def tell(home: Path, story: Story, capabilities: Capabilities = WHOLE_UPLOADS, *, latency: float = 0.0) -> World:
    """Plays the story in virtual time, then lets both sides converge."""
    world = World(home, capabilities)
    world.flaky.latency = latency

    async def main() -> None:
        async with running(world) as nursery:
            world.nursery = nursery
            await story(world)
            world.flaky.calm()
            world.left = await world.converge()
            world.seen = {path: None if node.is_directory else node for path, node in world.local_tree().items()}

    trio.run(main, clock=world.time.clock)
    return world


def copies(world: World) -> list[bytes]:
    """Contents of the conflict copies on the remote."""
    return [content for path, content in world.remote.tree().items() if "(conflict " in path and isinstance(content, bytes)]


async def remove(world: World, path: str) -> None:
    parent, _, name = path.rpartition("/")
    await world.fs.unlink((await world.find(parent)).ino, name)


async def rename(world: World, source: str, target: str) -> None:
    parent, _, name = source.rpartition("/")
    new_parent, _, new_name = target.rpartition("/")
    await world.fs.rename(
        (await world.find(parent)).ino, name, (await world.find(new_parent)).ino, new_name, replace=True, exchange=False
    )


async def edit(world: World, path: str, data: bytes, offset: int = 0) -> Node:
    """Overwrites some bytes of a file that is there."""
    node = await world.find(path)
    world.fs.open(node.ino, writing=True, truncate=False)
    world.fs.write(node.ino, offset, data)
    world.fs.close_file(node.ino, writing=True)
    return node


# --- content -------------------------------------------------------------------------------------------------------------


def test_an_edit_on_both_sides_keeps_both(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a.txt", b"before")
        await world.read_file("a.txt")
        await world.write_file("a.txt", b"ours")
        world.remote.put("a.txt", b"theirs")

    world = tell(tmp_path, story)

    assert world.remote.read("a.txt") == b"theirs"
    assert copies(world) == [b"ours"]


@pytest.mark.parametrize("there", [b"theirs", None], ids=["changed there", "removed there"])
def test_who_comes_with_the_inode_that_a_name_meant_before_has_to_look_the_name_up_again(
    tmp_path: Path, there: bytes | None
) -> None:
    """The kernel may not have heard yet that others took the name: what was written then would be nowhere, and after a rename
    by name another file than the one that is read would be renamed and removed."""

    async def story(world: World) -> None:
        world.remote.put("a.txt", b"before")
        before = await world.find("a.txt")
        world.nodes.held.looked_up(before.ino, 1)
        await world.read_file("a.txt")
        world.fs.open(before.ino, writing=False, truncate=False)  # a program that reads
        if there is None:
            world.remote.remove("a.txt")
        else:
            world.remote.put("a.txt", there)
        await world.look_everywhere()
        for _ in range(2):
            for truncate in (False, True):
                with pytest.raises(StaleFile):
                    world.fs.open(before.ino, writing=True, truncate=truncate)
            if world.nodes.opens[before.ino]:
                assert bytes(await world.fs.read(before.ino, 0, 6)) == b"before"
                world.fs.close_file(before.ino, writing=False)
        await world.write_file("a.txt", b"after")

    world = tell(tmp_path, story)

    assert world.remote.read("a.txt") == b"after"
    assert not copies(world)


def test_a_refresh_shows_what_others_wrote_just_after_ours_was_safe(tmp_path: Path) -> None:
    """Also while the sent bytes are still being put in order here, for which no thread is free for a while."""

    async def story(world: World) -> None:
        limiter = trio.to_thread.current_default_thread_limiter()
        takers: list[object] = []

        async def answer() -> Entry:
            world.remote.put("a.txt", b"ours")
            while limiter.available_tokens:
                takers.append(taker := object())
                limiter.acquire_on_behalf_of_nowait(taker)
                world.time.blocked_threads += 1
            return await world.memory.stat(Place(("a.txt",)))

        async def release() -> None:
            await trio.sleep(1)
            for taker in takers:
                limiter.release_on_behalf_of(taker)
                world.time.blocked_threads -= 1

        await world.fs.refresh_now(None)
        world.flaky.answer_with("upload", answer)
        node = await world.write_file("a.txt", b"ours")
        while node.to_send:
            await world.nodes.changed.wait()
        world.remote.put("a.txt", b"theirs")
        world.nursery.start_soon(release)

        await world.fs.refresh_now(None)

        seen = world.nodes.find("a.txt")
        assert seen is not None and seen.size == len(b"theirs")

    assert tell(tmp_path, story).remote.tree() == {"a.txt": b"theirs"}


def test_the_same_edit_on_both_sides_is_no_conflict(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a.txt", b"before")
        await world.read_file("a.txt")
        await world.write_file("a.txt", b"the same")
        world.remote.put("a.txt", b"the same")

    assert tell(tmp_path, story).remote.tree() == {"a.txt": b"the same"}


def test_a_file_made_on_both_sides_keeps_both(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.write_file("a.txt", b"ours")
        world.remote.put("a.txt", b"theirs")

    world = tell(tmp_path, story)

    assert world.remote.read("a.txt") == b"theirs"
    assert copies(world) == [b"ours"]


def test_what_is_conflicting_is_listed_with_sizes_and_times_of_both(tmp_path: Path) -> None:
    rows: list[tuple[int, int, int, int]] = []

    async def story(world: World) -> None:
        await world.write_file("a.txt", b"our own")
        world.remote.put("a.txt", b"theirs", mtime_ns=5_000_000_000)
        await world.converge()
        rows.extend(
            world.nodes.database.connection.execute(
                "SELECT local_size, local_mtime_ns, remote_size, remote_mtime_ns FROM conflicts"
            )
        )

    tell(tmp_path, story)

    ((local_size, local_mtime_ns, remote_size, remote_mtime_ns),) = rows
    assert (local_size, remote_size, remote_mtime_ns) == (7, 6, 5_000_000_000)
    assert local_mtime_ns > remote_mtime_ns


def test_a_name_that_is_taken_on_the_remote_without_our_knowing_is_not_overwritten_by_a_copy(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.write_file("a.txt", b"ours")
        world.remote.put("a.txt", b"theirs")
        world.flaky.fail("upload", "lost")
        world.flaky.latency = 0.4
        await trio.sleep(5.9)  # the copy has its name by now
        for node in world.nodes.database.children(1):
            if "(conflict" in node.name and world.remote.find((node.name,)) is None:
                world.remote.put(node.name, b"somebody's")

    world = tell(tmp_path, story)

    assert sorted(copies(world)) in ([b"ours"], [b"ours", b"somebody's"])
    assert not any(path.count("(conflict") > 1 for path in world.remote.tree())


# --- removals ------------------------------------------------------------------------------------------------------------


def test_an_edit_here_wins_over_a_removal_there(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a.txt", b"before")
        await world.read_file("a.txt")
        await world.write_file("a.txt", b"ours")
        world.remote.remove("a.txt")

    assert tell(tmp_path, story).remote.tree() == {"a.txt": b"ours"}


def test_a_change_there_wins_over_a_removal_here(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a.txt", b"before")
        await world.read_file("a.txt")
        await remove(world, "a.txt")
        world.remote.put("a.txt", b"changed")

    world = tell(tmp_path, story)

    assert world.remote.tree() == {"a.txt": b"changed"}
    assert set(world.seen) == {"a.txt"}


def test_a_removal_here_is_never_of_a_version_that_a_listing_brought_meanwhile(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a.txt", b"before")
        await world.read_file("a.txt")
        await remove(world, "a.txt")
        world.remote.put("a.txt", b"changed")
        await world.fs.refresh_now(None)

    assert tell(tmp_path, story).remote.tree() == {"a.txt": b"changed"}


def test_a_removal_there_takes_an_unchanged_file_away(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a.txt", b"before")
        await world.read_file("a.txt")
        world.remote.remove("a.txt")

    assert tell(tmp_path, story).seen == {}


def test_a_directory_removed_there_is_made_again_for_what_was_written_in_it(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.mkdir("d")
        world.remote.mkdir("d/e")
        world.remote.put("d/e/old", b"old")
        world.remote.put("d/other", b"other")
        await world.read_file("d/e/old")
        await world.read_file("d/other")
        await world.write_file("d/e/new", b"new")
        await edit(world, "d/e/old", b"OLD")
        world.remote.remove("d")

    assert tell(tmp_path, story).remote.tree() == {"d": None, "d/e": None, "d/e/new": b"new", "d/e/old": b"OLD"}


def test_a_directory_removed_here_comes_back_with_what_was_put_into_it_there(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.mkdir("d")
        world.remote.put("d/old", b"old")
        await world.read_file("d/old")
        await remove(world, "d/old")
        await world.fs.remove_directory(1, "d")
        world.remote.put("d/new", b"new")

    world = tell(tmp_path, story)

    assert world.remote.tree() == {"d": None, "d/new": b"new"}
    assert set(world.seen) == {"d", "d/new"}


def test_removed_and_made_again_on_the_remote_is_another_file(tmp_path: Path) -> None:
    numbers: list[int] = []

    async def story(world: World) -> None:
        world.remote.put("a.txt", b"one")
        numbers.append((await world.find("a.txt")).ino)
        world.remote.remove("a.txt")
        world.remote.put("a.txt", b"two")
        await world.fs.refresh_now(None)
        numbers.append((await world.find("a.txt")).ino)
        assert await world.read_file("a.txt") == b"two"

    tell(tmp_path, story)

    assert numbers[0] != numbers[1]


# --- names ---------------------------------------------------------------------------------------------------------------


def test_a_file_renamed_here_unread_and_changed_there_has_the_new_bytes_under_the_new_name(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a.txt", b"before")
        await rename(world, "a.txt", "b.txt")
        world.remote.put("a.txt", b"changed")

    assert tell(tmp_path, story).remote.tree() == {"b.txt": b"changed"}


@pytest.mark.parametrize("old", [b"before", b""])
def test_a_file_renamed_here_of_which_all_is_here_and_changed_there_keeps_both(tmp_path: Path, old: bytes) -> None:
    async def story(world: World) -> None:
        world.remote.put("a.txt", old)
        await world.read_file("a.txt")
        await rename(world, "a.txt", "b.txt")
        world.remote.put("a.txt", b"changed")

    assert tell(tmp_path, story).remote.tree() == {"a.txt": b"changed", "b.txt": old}


def test_renamed_and_edited_here_and_changed_there_keeps_both(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a.txt", b"before")
        await world.read_file("a.txt")
        await world.write_file("a.txt", b"ours")
        await rename(world, "a.txt", "b.txt")
        world.remote.put("a.txt", b"theirs")

    assert tell(tmp_path, story).remote.tree() == {"a.txt": b"theirs", "b.txt": b"ours"}


def test_a_name_given_on_both_sides_keeps_both(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a.txt", b"moved here")
        await world.read_file("a.txt")
        await rename(world, "a.txt", "b.txt")
        world.remote.put("b.txt", b"made there")

    world = tell(tmp_path, story)

    assert world.remote.read("b.txt") == b"made there"
    assert copies(world) == [b"moved here"]
    assert "a.txt" not in world.remote.tree()


def test_a_file_saved_over_one_that_was_changed_there_becomes_the_copy(tmp_path: Path) -> None:
    """Editors write a temporary file and rename it over the old one."""

    async def story(world: World) -> None:
        world.remote.put("a.txt", b"before")
        await world.read_file("a.txt")
        await world.write_file("a.tmp", b"ours")
        await rename(world, "a.tmp", "a.txt")
        world.remote.put("a.txt", b"theirs")

    world = tell(tmp_path, story)

    assert world.remote.read("a.txt") == b"theirs"
    assert copies(world) == [b"ours"]


def test_a_file_saved_over_one_that_was_removed_there_stays(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a.txt", b"before")
        await world.read_file("a.txt")
        await world.write_file("a.tmp", b"ours")
        await rename(world, "a.tmp", "a.txt")
        world.remote.remove("a.txt")

    assert tell(tmp_path, story).remote.tree() == {"a.txt": b"ours"}


def test_a_file_renamed_while_its_upload_finds_a_conflict_is_no_longer_in_the_way(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a.txt", b"before")
        await world.read_file("a.txt")
        await world.write_file("a.txt", b"ours")
        world.remote.put("a.txt", b"theirs")
        world.flaky.latency = 3.0
        await trio.sleep(5.5)  # the upload is under way
        await rename(world, "a.txt", "b.txt")

    assert tell(tmp_path, story).remote.tree() == {"a.txt": b"theirs", "b.txt": b"ours"}


# --- kinds ---------------------------------------------------------------------------------------------------------------


def test_a_directory_made_on_both_sides_is_one(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        directory = await world.fs.make_directory(1, "d", 0o755)
        await world.write_file("d/ours", b"ours")
        world.remote.mkdir("d")
        world.remote.put("d/theirs", b"theirs")
        assert directory.is_directory

    world = tell(tmp_path, story)

    assert world.remote.tree() == {"d": None, "d/ours": b"ours", "d/theirs": b"theirs"}
    assert set(world.seen) == set(world.remote.tree())


def test_a_file_edited_here_and_a_directory_there_keep_both(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a", b"before")
        await world.read_file("a")
        await world.write_file("a", b"ours")
        world.remote.remove("a")
        world.remote.mkdir("a")
        world.remote.put("a/b", b"theirs")

    world = tell(tmp_path, story)

    assert world.remote.read("a/b") == b"theirs"
    assert copies(world) == [b"ours"]


def test_a_directory_made_here_and_a_file_there_keep_both(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.fs.make_directory(1, "a", 0o755)
        await world.write_file("a/b", b"ours")
        world.remote.put("a", b"theirs")

    world = tell(tmp_path, story)

    assert world.remote.read("a") == b"theirs"
    assert [content for path, content in world.remote.tree().items() if path.endswith("/b")] == [b"ours"]


def test_a_directory_that_became_a_file_there_is_taken_with_what_was_written_in_it_kept(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.mkdir("d")
        world.remote.put("d/old", b"old")
        await world.read_file("d/old")
        await world.write_file("d/new", b"ours")
        world.remote.remove("d")
        world.remote.put("d", b"theirs")

    world = tell(tmp_path, story)

    assert world.remote.read("d") == b"theirs"
    assert [content for path, content in world.remote.tree().items() if path.endswith("/new")] == [b"ours"]


# --- open files ----------------------------------------------------------------------------------------------------------


def test_what_is_written_through_a_handle_after_the_remote_changed_the_file_is_kept_beside_it(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("log", b"before")
        await world.read_file("log")
        node = await world.find("log")
        world.fs.open(node.ino, writing=True, truncate=False)
        world.remote.put("log", b"theirs")
        await world.fs.refresh_now(None)
        world.fs.write(node.ino, 6, b" and more")
        world.fs.close_file(node.ino, writing=True)

    world = tell(tmp_path, story)

    assert world.remote.read("log") == b"theirs"
    assert copies(world) == [b"before and more"]


def test_what_is_written_through_a_handle_after_the_remote_removed_the_file_brings_it_back(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("log", b"before")
        await world.read_file("log")
        node = await world.find("log")
        world.fs.open(node.ino, writing=True, truncate=False)
        world.remote.remove("log")
        await world.fs.refresh_now(None)
        world.fs.write(node.ino, 6, b" and more")
        world.fs.close_file(node.ino, writing=True)

    assert tell(tmp_path, story).remote.tree() == {"log": b"before and more"}


def test_an_open_file_is_one_version_and_a_new_open_sees_the_new_one(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a", b"one" * LARGE)
        node = await world.find("a")
        world.fs.open(node.ino, writing=False, truncate=False)
        assert await world.fs.read(node.ino, 0, 3) == b"one"
        world.remote.put("a", b"two" * LARGE)
        await world.fs.refresh_now(None)

        assert await world.read_file("a") == b"two" * LARGE
        assert await world.fs.read(node.ino, 0, 3) == b"one"
        with pytest.raises(StaleFile):
            await world.fs.read(node.ino, 3 * LARGE - 3, 3)
        with pytest.raises(StaleFile):  # by its old number nobody opens it again
            world.fs.close_file(node.ino, writing=False)
            world.fs.open(node.ino, writing=False, truncate=False)

    tell(tmp_path, story)


def test_a_file_that_is_removed_while_a_program_reads_it_is_fetched_first(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a", b"x" * LARGE)
        node = await world.find("a")
        world.fs.open(node.ino, writing=False, truncate=False)
        await world.fs.read(node.ino, 0, 3)
        await remove(world, "a")
        await world.drain()

        assert world.remote.tree() == {}
        assert await world.fs.read(node.ino, LARGE - 5, 10) == b"x" * 5
        world.fs.close_file(node.ino, writing=False)

    tell(tmp_path, story)


def test_a_file_that_is_replaced_while_a_program_reads_it_is_fetched_first(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a", b"x" * LARGE)
        node = await world.find("a")
        world.fs.open(node.ino, writing=False, truncate=False)
        await world.fs.read(node.ino, 0, 3)
        await world.write_file("a.tmp", b"new")
        await rename(world, "a.tmp", "a")
        await world.drain()

        assert world.remote.tree() == {"a": b"new"}
        assert await world.fs.read(node.ino, LARGE - 5, 10) == b"x" * 5
        world.fs.close_file(node.ino, writing=False)

    tell(tmp_path, story)


# --- bytes that are gone -------------------------------------------------------------------------------------------------


def test_an_edit_whose_unfetched_rest_is_gone_is_parked_with_what_is_here_and_no_zeros_are_sent(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a.bin", b"x" * LARGE)
        await edit(world, "a.bin", b"ours", offset=LARGE)
        world.remote.put("a.bin", b"theirs")

    world = tell(tmp_path, story)

    assert world.remote.tree() == {"a.bin": b"theirs"}
    (parked,) = world.left
    assert "(conflict " in parked.name
    assert parked.unsent


# --- lost answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lost", "silent", "maybe"])
def test_an_upload_of_which_no_answer_came_is_no_conflict_even_when_the_file_was_written_again(
    tmp_path: Path, kind: str
) -> None:
    async def story(world: World) -> None:
        await world.write_file("a.txt", b"one")
        world.flaky.fail("upload", kind)
        world.flaky.fail("stat", "error", "error", "error", "error", "error")
        await trio.sleep(6)
        await edit(world, "a.txt", b" and two", offset=3)
        await trio.sleep(60)

    assert tell(tmp_path, story).remote.tree() == {"a.txt": b"one and two"}


def test_an_upload_that_a_dead_worker_sent_is_no_conflict_even_when_the_file_was_written_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a.txt", b"x" * 100)
        await edit(world, "a.txt", b"one", offset=5)
        world.flaky.fail("upload", "silent")
        await trio.sleep(7)
        assert world.remote.read("a.txt")[5:8] == b"one"
        await world.kill(world.nursery)
        world.fs.take_over()
        await edit(world, "a.txt", b"two", offset=50)

    world = tell(tmp_path, story)

    assert world.remote.tree() == {"a.txt": b"xxxxxone" + b"x" * 42 + b"two" + b"x" * 47}


def test_an_upload_that_a_dead_worker_sent_is_found_though_the_bytes_it_was_completed_with_are_gone(tmp_path: Path) -> None:
    """It replaced the version that they belonged to, and they were kept nowhere else."""

    async def story(world: World) -> None:
        world.remote.put("a.bin", b"x" * LARGE)
        await edit(world, "a.bin", b"ours", offset=LARGE)
        world.flaky.fail("upload", "silent")
        await trio.sleep(7)
        assert world.remote.read("a.bin") == b"x" * LARGE + b"ours"
        await world.kill(world.nursery)
        shutil.rmtree(world.rig.cache_dir / "base", ignore_errors=True)
        world.fs.take_over()

    world = tell(tmp_path, story)

    assert world.remote.tree() == {"a.bin": b"x" * LARGE + b"ours"}
    assert world.left == []


async def create_and_die_with_its_upload(world: World, name: str, data: bytes) -> None:
    """The remote has it; nobody here has heard of that, and the next worker does not come to sending before what follows."""
    await world.write_file(name, data)
    world.flaky.fail("upload", "silent", *["error"] * 500)  # until the story is over
    await trio.sleep(7)
    assert world.remote.tree() == {name: data}
    await world.kill(world.nursery)
    world.fs.take_over()
    while world.engine.failure(await world.find(name)) is None or world.engine.uploading:  # noqa: ASYNC110
        await trio.sleep(0.05)


def test_an_empty_file_that_a_dead_worker_sent_is_no_conflict_when_it_is_written_then(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await create_and_die_with_its_upload(world, "a.txt", b"")
        await edit(world, "a.txt", b"no longer empty")

    assert tell(tmp_path, story).remote.tree() == {"a.txt": b"no longer empty"}


@pytest.mark.parametrize("data", [b"", b"sent"])
def test_a_new_file_that_a_dead_worker_sent_and_that_is_renamed_then_leaves_nothing_behind(tmp_path: Path, data: bytes) -> None:
    async def story(world: World) -> None:
        await create_and_die_with_its_upload(world, "a.txt", data)
        await rename(world, "a.txt", "b.txt")

    assert tell(tmp_path, story).remote.tree() == {"b.txt": data}


@pytest.mark.parametrize("data", [b"", b"sent"])
def test_a_new_file_that_a_dead_worker_sent_and_that_is_removed_then_does_not_come_back(tmp_path: Path, data: bytes) -> None:
    async def story(world: World) -> None:
        await create_and_die_with_its_upload(world, "a.txt", data)
        await remove(world, "a.txt")
        await trio.sleep(60)
        await world.fs.refresh_now(None)

    assert tell(tmp_path, story).remote.tree() == {}


@pytest.mark.parametrize("what", ["renamed", "removed", "replaced"])
def test_an_overwrite_that_a_dead_worker_sent_is_known_as_ours_when_the_file_then_goes(tmp_path: Path, what: str) -> None:
    async def story(world: World) -> None:
        world.remote.put("a.txt", b"base")
        await edit(world, "a.txt", b"sent")
        world.flaky.fail("upload", "silent", *["error"] * 500)
        await trio.sleep(7)
        assert world.remote.tree() == {"a.txt": b"sent"}
        await world.kill(world.nursery)
        world.fs.take_over()
        while world.engine.failure(await world.find("a.txt")) is None or world.engine.uploading:  # noqa: ASYNC110
            await trio.sleep(0.05)
        if what == "removed":
            await remove(world, "a.txt")
        elif what == "renamed":
            await rename(world, "a.txt", "b.txt")
        else:
            await world.write_file("new.txt", b"new")
            await rename(world, "new.txt", "a.txt")

    after = {"removed": {}, "renamed": {"b.txt": b"sent"}, "replaced": {"a.txt": b"new"}}
    assert tell(tmp_path, story).remote.tree() == after[what]


def test_a_move_of_which_no_answer_came_is_found_out_by_asking(tmp_path: Path) -> None:
    numbers: list[int] = []

    async def story(world: World) -> None:
        world.remote.put("a", b"x")
        numbers.append((await world.find("a")).ino)
        await rename(world, "a", "b")
        world.flaky.fail("move", "lost")
        await trio.sleep(6)
        await world.fs.refresh_now(None)
        numbers.append((await world.find("b")).ino)

    world = tell(tmp_path, story)

    assert world.remote.tree() == {"b": b"x"}
    assert numbers[0] == numbers[1]
    assert world.memory.count("move") == 1


def test_a_chmod_during_the_upload_is_sent_too(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        node = await world.write_file("a", b"x")
        world.flaky.latency = 3.0
        await trio.sleep(5.2)
        await world.fs.setattr(node.ino, SetAttributes(mode=0o600))

    world = tell(tmp_path, story)

    assert world.remote["a"].attributes.mode == 0o600


def test_setting_a_time_does_not_make_a_change_by_others_ours(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a", b"before")
        assert await world.read_file("a") == b"before"
        node = await world.find("a")
        await world.fs.setattr(node.ino, SetAttributes(mtime_ns=10**18))
        world.remote.put("a", b"theirs")

    world = tell(tmp_path, story, EVERYTHING)

    assert world.remote.read("a") == b"theirs"
    node = world.seen["a"]
    assert node is not None and node.base_version == world.remote["a"].version


# --- listings that are under way -----------------------------------------------------------------------------------------


def test_a_listing_that_began_before_our_upload_ended_takes_nothing_away(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.find("")
        gate = trio.Event()
        node = await world.write_file("a", b"x")
        number = node.ino

        async def old_listing() -> None:
            world.flaky.latency = 0.0
            entries = await world.memory.list(world.nodes.place(world.nodes.database.root))
            await gate.wait()
            return entries  # type: ignore[return-value]

        world.flaky.answer_with("list", old_listing)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.refresh.list_now, world.nodes.database.root)
            await trio.sleep(6)
            assert world.remote.read("a") == b"x"
            gate.set()
        assert (await world.find("a")).ino == number

    tell(tmp_path, story)


def test_a_directory_moved_while_it_is_listed_does_not_get_the_children_of_its_successor(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.mkdir("d")
        world.remote.put("d/a", b"x")
        number = (await world.find("d/a")).ino
        directory = await world.find("d")
        gate = trio.Event()

        async def late_listing() -> None:
            await gate.wait()
            return await world.memory.list(await_place)  # type: ignore[return-value]

        await_place = world.nodes.place(directory)
        world.flaky.answer_with("list", late_listing)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.refresh.list_now, directory)
            await trio.sleep(0.1)
            await rename(world, "d", "e")
            await world.fs.make_directory(1, "d", 0o755)
            await world.drain()
            gate.set()
        child = world.nodes.database.child(directory.ino, "a")
        assert child is not None and child.ino == number

    tell(tmp_path, story)


# --- the table -----------------------------------------------------------------------------------------------------------


def test_the_table_has_an_outcome_for_everything_that_can_be() -> None:
    for here in Here:
        for there in There:
            possible = (here is Here.NEW) == (there is There.ALIKE) or there not in (There.ALIKE, There.SAME)
            if here is Here.NEW and there is There.SAME:
                possible = False
            if possible:
                assert decide(here, there) is TABLE[here][there]
            else:
                with pytest.raises(KeyError):
                    decide(here, there)


def test_the_table_reads_as_markdown() -> None:
    lines = as_markdown().splitlines()

    assert len(lines) == len(TABLE) + 2
    assert len({line.count("|") for line in lines}) == 1


def test_a_name_that_goes_away_during_a_rename_is_not_renamed_into_nothing(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a", b"x")
        world.remote.mkdir("e")
        await world.find("e")
        source = await world.find("a")
        target = await world.find("e")
        world.remote.remove("e")
        world.refresh.forget()
        with pytest.raises(LocalError):
            await world.fs.rename(1, "a", target.ino, "a", replace=True, exchange=False)
        assert source.kind is Kind.FILE and not source.removed
        with pytest.raises(NotFound):
            await world.find("e")

    assert tell(tmp_path, story).remote.tree() == {"a": b"x"}


# --- found by the model --------------------------------------------------------------------------------------------------


def test_a_file_open_here_and_renamed_keeps_its_number_where_a_move_renews_the_version(tmp_path: Path) -> None:
    numbers: list[int] = []

    async def story(world: World) -> None:
        world.flaky.restless = True
        world.remote.put("a", b"x" * 10)
        node = await world.find("a")
        world.fs.open(node.ino, writing=False, truncate=False)
        await rename(world, "a", "b")
        await world.converge()
        await world.fs.setattr(node.ino, SetAttributes(mtime_ns=10**18))
        await world.converge()
        numbers.extend([node.ino, (await world.find("b")).ino])
        assert await world.fs.read(node.ino, 0, 10) == b"x" * 10
        world.fs.close_file(node.ino, writing=False)

    tell(tmp_path, story, replace(WHOLE_UPLOADS, native_mtime=True))

    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("death", [False, True])
def test_an_upload_cut_where_cut_ones_stay_is_sent_again_with_the_bytes_it_replaced(tmp_path: Path, death: bool) -> None:
    async def story(world: World) -> None:
        world.remote.put("a", b"x" * 200)
        await edit(world, "a", b"ours", offset=20)
        world.flaky.fail("upload", "cut")
        await trio.sleep(5.001)
        if death:
            await world.kill(world.nursery)

    world = tell(tmp_path, story, replace(WHOLE_UPLOADS, atomic_replace=False))

    assert world.remote.tree() == {"a": b"x" * 20 + b"ours" + b"x" * 176}


def test_a_file_of_which_some_is_here_is_fetched_whole_where_there_are_no_ranges(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a", b"x" * 200)
        world.flaky.fail("read", *["cut"] * 20)
        with pytest.raises(RemoteError):
            await world.read_file("a")
        world.flaky.calm()
        await trio.sleep(60)
        assert await world.read_file("a") == b"x" * 200

    tell(tmp_path, story, replace(WHOLE_UPLOADS, ranged_reads=False))


def test_what_a_rename_replaces_stays_on_the_remote_while_the_newcomer_cannot_be_sent(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a", b"old")
        world.remote.put("b", b"x" * LARGE)
        await world.find("a")
        await edit(world, "b", b"ours", offset=LARGE // 2)
        world.flaky.latency = 3.0
        await trio.sleep(5.1)  # its upload has begun
        world.remote.put("b", b"theirs")
        await rename(world, "b", "a")

    world = tell(tmp_path, story)

    assert world.remote.tree() == {"a": b"old", "b": b"theirs"}
    (parked,) = world.left
    assert parked.name.startswith("a")


def test_a_further_name_is_sent_though_the_bytes_of_the_first_were_refused_once(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.remote.put("a", b"x" * 100)
        node = await world.find("a")
        world.flaky.fail("read", "mismatch")
        await world.fs.link(node.ino, 1, "b")

    world = tell(tmp_path, story)

    assert world.remote.tree() == {"a": b"x" * 100, "b": b"x" * 100}


@pytest.mark.parametrize("kind", ["short", "long", "cut", "stall"])
def test_a_body_of_the_wrong_length_is_never_taken_for_the_file(tmp_path: Path, kind: str) -> None:
    content = bytes(range(256)) * (LARGE // 256)

    async def story(world: World) -> None:
        world.remote.put("a", content)
        node = await world.find("a")
        world.fs.open(node.ino, writing=False, truncate=False)
        world.flaky.fail("read", *[kind] * 3)
        for at in (1000, 300_000, 1000, 200_000, 300_000):
            try:
                assert await world.fs.read(node.ino, at, 4096) == content[at : at + 4096]
            except RemoteError:
                continue
        world.flaky.calm()
        await trio.sleep(60)
        assert await world.fs.read(node.ino, 0, LARGE) == content
        world.fs.close_file(node.ino, writing=False)

    tell(tmp_path, story)


def test_fsync_with_durability_fsync_returns_when_the_remote_has_every_name_of_the_file(tmp_path: Path) -> None:
    world = World(tmp_path, WHOLE_UPLOADS, durability="fsync", write_back_delay=60.0)
    seen: list[object] = []

    async def main() -> None:
        async with running(world):
            world.remote.put("a", b"before")
            node = await world.find("a")
            await world.fs.link(node.ino, 1, "b")
            await world.fs.link(node.ino, 1, "c")
            world.fs.open(node.ino, writing=True, truncate=False)
            world.fs.write(node.ino, 0, b"after!")
            await world.fs.fsync(node.ino)
            seen.append(dict(world.remote.tree()))
            await remove(world, "a")  # the file goes on with one of its other names
            world.fs.write(node.ino, 0, b"last..")
            await world.fs.fsync(node.ino)
            seen.append(dict(world.remote.tree()))
            world.fs.close_file(node.ino, writing=True)
            await world.converge()

    trio.run(main, clock=world.time.clock)

    assert seen[0] == {"a": b"after!", "b": b"after!", "c": b"after!"}
    assert {name: found for name, found in dict(seen[1]).items() if name != "a"} == {"b": b"last..", "c": b"last.."}


# --- what the model found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", [True, False])
def test_only_a_file_that_others_moved_to_the_name_that_ours_gets_is_the_base_of_ours(tmp_path: Path, moved: bool) -> None:
    """Ours was opened before and not a byte of it read: what was appended goes there if it is the same file; to another it
    does not, is kept and shown, and nothing waits for ever."""

    async def story(world: World) -> None:
        world.remote.mkdir("d")
        world.remote.put("d/a", b"theirs")
        node = await world.find("d/a")
        world.fs.open(node.ino, writing=True, truncate=False)
        if moved:
            world.remote.move("d/a", "a")
        else:
            world.remote.remove("d/a")
            world.remote.put("a", b"theirs")
        world.fs.write(node.ino, 6, b" and ours")
        await trio.sleep(21)
        await rename(world, "d/a", "a")
        world.fs.close_file(node.ino, writing=True)

    world = tell(tmp_path, story)

    assert world.remote.tree()["a"] == (b"theirs and ours" if moved else b"theirs")
    assert [node.size for node in world.left] == ([] if moved else [15])


def test_a_renamed_hard_link_with_news_is_no_conflict_where_moving_gives_another_version(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.flaky.restless = True
        world.remote.put("a", b"before")
        node = await world.find("a")
        await world.fs.link(node.ino, 1, "b")
        await trio.sleep(15)
        await world.fs.setattr(node.ino, SetAttributes(size=3))
        await rename(world, "b", "c")

    world = tell(tmp_path, story, replace(WHOLE_UPLOADS, native_mtime=True))

    assert world.remote.tree() == {"a": b"bef", "c": b"bef"}


@pytest.mark.parametrize("replacing", [True, False])
def test_what_others_wrote_is_not_removed_with_a_file_that_was_read_and_taken_aside(tmp_path: Path, replacing: bool) -> None:
    """A program takes a file to a name of its own, reads what it has there, and removes that: nothing else."""
    seen: list[bytes] = []

    async def story(world: World) -> None:
        world.remote.put("a.txt", b"before")
        await world.read_file("a.txt")
        if replacing:
            await world.write_file(".a.txt", b"ours")
            await world.fs.rename(1, ".a.txt", 1, "a.txt", replace=False, exchange=True)
        else:
            await rename(world, "a.txt", ".a.txt")
        seen.append(await world.read_file(".a.txt"))
        world.remote.put("a.txt", b"theirs")
        await trio.sleep(6)  # the rename is on its way, and meets what others wrote
        await remove(world, ".a.txt")

    world = tell(tmp_path, story)

    assert seen == [b"before"]
    assert world.remote.read("a.txt") == b"theirs"
    assert copies(world) == ([b"ours"] if replacing else [])
    assert ".a.txt" not in world.remote.tree()


def test_what_others_moved_to_the_name_of_a_hard_link_stays_when_the_first_name_goes(tmp_path: Path) -> None:
    """Then both names are one file on the remote: the link, taken for uploaded, and what the file is to be renamed to."""

    async def story(world: World) -> None:
        world.remote.put("a", b"before")
        world.remote.mkdir("e")
        await world.read_file("a")
        await world.fs.link((await world.find("a")).ino, (await world.find("e")).ino, "a")

        async def meanwhile() -> None:
            world.remote.move("a", "e/a")
            await remove(world, "a")
            raise RemoteExists("e/a is there")

        world.flaky.answer_with("upload", meanwhile)
        await trio.sleep(60)

    world = tell(tmp_path, story)

    assert world.remote.tree() == {"e": None, "e/a": b"before"}


def test_a_write_after_an_answer_was_lost_and_could_not_be_asked_for_is_no_conflict_with_oneself(tmp_path: Path) -> None:
    """Only what was sent can be compared with what is there; each attempt that fails keeps it."""

    async def story(world: World) -> None:
        world.flaky.fail("upload", "lost")
        world.flaky.fail("read", "mismatch", "full")
        await world.write_file("a", b"sent before")
        await trio.sleep(6)
        await world.write_file("a", b"SENT", 0)
        await trio.sleep(200)

    world = tell(tmp_path, story, replace(WHOLE_UPLOADS, conditional_writes=False, checksum_algorithm=None))

    assert list(world.remote.tree()) == ["a"]


def test_what_others_renamed_like_us_before_they_removed_its_directory_stays(tmp_path: Path) -> None:
    """A listing takes it for gone with the directory while our rename is on its way, and finds it at the new name."""

    async def story(world: World) -> None:
        world.remote.mkdir("d")
        world.remote.put("d/a", b"theirs")
        await rename(world, "d/a", "a")

        async def meanwhile() -> None:
            world.remote.move("d/a", "a")
            world.remote.remove("d")
            await world.refresh.list_now(world.nodes.database.root)
            raise RemoteNotFound("/d/a is not there")

        world.flaky.answer_with("move", meanwhile)
        await trio.sleep(60)

    world = tell(tmp_path, story)

    assert world.remote.tree() == {"a": b"theirs"}


def test_what_was_sent_without_an_answer_and_can_never_be_whole_again_is_parked(tmp_path: Path) -> None:
    """Its bytes are those of a version that was never fetched, and that others have removed: nobody waits for it for ever."""

    async def story(world: World) -> None:
        await trio.sleep(3)  # what is fetched for the upload is not kept safely yet when all is killed
        world.remote.put("a", b"never fetched")
        world.flaky.fail("upload", "silent")
        await world.write_file("a", b" and more", 13)
        await trio.sleep(8)  # on its way
        world.memory.outage = "gone"
        await world.kill(world.nursery)
        world.memory.outage = None
        await world.fs.setattr((await world.find("a")).ino, SetAttributes(size=13))
        world.remote.remove("a")
        await trio.sleep(60)

    world = tell(tmp_path, story, replace(WHOLE_UPLOADS, conditional_writes=False))

    assert [node.name for node in world.left] == ["a"]


def test_work_is_not_looked_for_again_and_again_while_somebody_waits_for_what_is_under_way(tmp_path: Path) -> None:
    looks = 0

    async def story(world: World) -> None:
        nonlocal looks
        look = world.engine._look

        def counted() -> None:
            nonlocal looks
            looks += 1
            look()

        async def slow() -> None:
            await trio.sleep(20)
            raise RemoteUnavailable("after all")

        world.engine._look = counted  # type: ignore[method-assign]
        world.flaky.answer_with("upload", slow)
        await world.write_file("hurried", b"first")
        await trio.sleep(6)  # its upload is under way
        await world.write_file("other", b"due soon")
        await remove(world, "hurried")
        await world.write_file("hurried", b"second")
        with trio.move_on_after(12):
            async for _ in world.engine.send_now(["hurried"]):
                pass

    tell(tmp_path, story)

    assert looks < 100
