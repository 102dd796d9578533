"""Random scripts of what programs, another client, faults and time do to a mount, and what must be true of each.

A script is a list of plain tuples, so that a failing one can be made shorter and pasted into a test. What is checked:

- What a program reads of a file is what was in it when it was opened, changed by what programs wrote, at any time.
- A *token* is eight bytes that were written once, here or by the other client. It is dead when a program overwrote, cut off
  or removed it in a file where it was to be seen, or when the other client did so on the remote. In the end, with all
  faults over and everything sent, every token that is not dead is on the remote (or in a file that is parked).
- Both sides have the same tree then, and every file's bytes are those that its node says.
- Where nobody else works, no name ever goes away by itself, none that was removed comes back, nothing is in conflict and
  nothing is parked, whatever fails.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from nbmountd.backends.memory import EVERYTHING
from nbmountd.disk.database import Node
from nbmountd.errors import LocalError, RemoteError
from nbmountd.fs.filesystem import SetAttributes
from nbmountd.model import Capabilities, Kind
from tests.sync.world import World, running

Op = tuple[Any, ...]
TOKEN = 8
PATHS = ("a", "a", "b.txt", "d/a", "d/a", "d/b.txt", "e/a", "d/e/a")
VERBS = (
    "upload", "write_ranges", "make_directory", "move", "remove", "set_attributes", "list", "stat", "read", "upload", "move",
)  # fmt: skip
KINDS = (
    "error", "maybe", "lost", "lost", "silent", "hang", "busy", "slow down", "locked", "mismatch", "full", "nonsense", "cut",
    "cut", "stall", "short", "long",
)  # fmt: skip

PLAIN = Capabilities(ranged_writes=False, native_mtime=False, checksum_algorithm=None)
PROFILES: dict[str, Capabilities] = {
    "everything": EVERYTHING,
    "plain": PLAIN,
    "whole reads": replace(PLAIN, ranged_reads=False, native_mtime=True),
    "unconditional": replace(PLAIN, conditional_writes=False),
    "cut uploads stay": replace(PLAIN, atomic_replace=False),
    "checksums": replace(PLAIN, checksum_algorithm="sha1", stable_ids=True, native_mtime=True),
    "ranged": replace(PLAIN, ranged_writes=True),
    "restless versions": replace(PLAIN, native_mtime=True, native_mode=True),
    "few connections": replace(EVERYTHING, connections=2, ranged_writes=False, propagating_versions=True),
}


def make_script(chance: random.Random) -> list[Op]:
    """A script of some rounds. In each, programs and the other client meet at one or two names, mostly without knowing of
    each other; between rounds time goes by, or not."""
    script: list[Op] = [("other mkdir", "d"), ("other put", "a", 3), ("other put", "d/a", 3), ("other mkdir", "e")]
    script = [op for op in script if chance.random() < 0.8]
    script += [("list", ""), ("list", "d")] if chance.random() < 0.8 else []
    script += [("latency", chance.choice((0.05, 0.5, 3.0)))] if chance.random() < 0.6 else []
    alone = chance.random() < 0.3
    for _ in range(chance.randrange(1, 6)):
        script += _make_round(chance, alone=alone)
    return script


def _make_round(chance: random.Random, *, alone: bool) -> list[Op]:
    paths = chance.choices(PATHS, k=2)
    directories = chance.choices(("d", "d", "e", "d/e"), k=2)

    def path() -> str:
        return chance.choice(paths)

    def directory() -> str:
        return chance.choice(directories)

    def slot() -> int:
        return chance.randrange(2)

    def others() -> bool:
        return chance.random() < 0.5

    def place() -> tuple[int, int]:
        return chance.randrange(4), chance.randrange(1, 4)

    here: list[tuple[int, Callable[[], Op]]] = [
        (10, lambda: ("write", path(), *place(), chance.random() < 0.3)),
        (5, lambda: ("replace", path(), chance.randrange(1, 4))),
        (5, lambda: ("rename", path(), chance.choice(PATHS))),
        (2, lambda: ("rename", directory(), directory())),
        (1, lambda: ("rename", path(), directory())),
        (1, lambda: ("exchange", path(), path())),
        (3, lambda: ("take over", path(), chance.randrange(1, 4), not alone and others(), chance.choice((0.0, 6.0)))),
        (4, lambda: ("mkdir", directory())),
        (1, lambda: ("mkdir", path())),
        (2, lambda: ("rmdir", directory())),
        (6, lambda: ("unlink", path())),
        (3, lambda: ("empty", directory())),
        (2, lambda: ("truncate", path(), chance.randrange(5))),
        (2, lambda: ("chmod", path(), chance.choice((0o600, 0o644, 0o755)))),
        (1, lambda: ("utime", path(), chance.randrange(10**9))),
        (4, lambda: ("read", path())),
        (1, lambda: ("link", path(), chance.choice(PATHS))),
        (5, lambda: ("open", path(), slot())),
        (6, lambda: ("handle write", slot(), *place())),
        (1, lambda: ("handle truncate", slot(), chance.randrange(4))),
        (2, lambda: ("handle read", slot())),
        (3, lambda: ("close", slot())),
    ]
    there: list[tuple[int, Callable[[], Op]]] = [
        (8, lambda: ("other put", path(), chance.randrange(1, 5))),
        (4, lambda: ("other remove", path())),
        (2, lambda: ("other remove", directory())),
        (3, lambda: ("other move", path(), chance.choice(PATHS))),
        (2, lambda: ("other move", directory(), directory())),
        (2, lambda: ("other mkdir", directory())),
        (1, lambda: ("other mkdir", path())),
    ]
    trouble: list[tuple[int, Callable[[], Op]]] = [
        (8, lambda: ("fault", chance.choice(VERBS), *(chance.choice(KINDS) for _ in range(chance.randrange(1, 4))))),
        (1, lambda: ("unauthenticated", chance.choice(VERBS))),
        (1, lambda: ("outage", chance.random() < 0.5)),
        (1, lambda: ("space", chance.choice((0, 50, 500, None, None)))),
        (1, lambda: ("latency", chance.choice((0.0, 0.2, 3.0)))),
        (2, lambda: ("kill",)),
        (1, lambda: ("clock", chance.choice((-7200.0, -10.0, 3600.0)))),
    ]
    pauses: list[tuple[int, Callable[[], Op]]] = [
        (6, lambda: ("wait", chance.choice((0.0, 0.01, 0.1, 0.5, 2.0)))),
        (3, lambda: ("wait", chance.choice((5.1, 6.0, 8.0)))),
        (1, lambda: ("list", chance.choice(("", "", directory())))),
        (2, lambda: ("hurry", path())),
    ]

    def one_of(makers: list[tuple[int, Callable[[], Op]]]) -> Op:
        return chance.choices([call for _, call in makers], [weight for weight, _ in makers])[0]()

    ops = [one_of(here) for _ in range(chance.randrange(0, 5))]
    ops += [one_of(there) for _ in range(0 if alone else chance.randrange(0, 4))]
    chance.shuffle(ops)
    if not alone and chance.random() < 0.15:  # what others do to a file that stays open
        file, at = path(), slot()
        news: Op = chance.choice((("other put", file, 2), ("other remove", file), ("other move", file, chance.choice(PATHS))))
        ops += [("open", file, at), news, ("list", file.rpartition("/")[0]), ("handle write", at, *place())]
    script: list[Op] = []
    if chance.random() < 0.15:  # a step arrives, its answer does not, and the name means something else before anybody asks
        file, change = path(), chance.choice((("upload",), ("upload",), ("move",), ("make_directory", "write_ranges")))
        script += [one_of(here), ("write", file, *place(), False)]
        script += [("fault", verb, chance.choice(("silent", "lost", "cut"))) for verb in change]
        script += [("outage", False), ("wait", chance.choice((5.1, 6.0, 8.0))), ("outage", True)]
        script += [("kill",)] if chance.random() < 0.7 else []
        ends: tuple[Op, ...] = (("unlink", file), ("rename", file, chance.choice(PATHS)), ("replace", file, 1), one_of(here))
        script += [chance.choice(ends), one_of(here), ("outage", False)]
    for op in ops:
        script.append(op)
        if chance.random() < 0.3:
            script.append(one_of(pauses))
        if chance.random() < 0.15:
            script.append(one_of(trouble))
    script.append(("wait", chance.choice((0.0, 0.1, 5.5, 6.0, 7.0, 9.0, 15.0, 40.0, 70.0))))
    if chance.random() < 0.2:
        script += [("credential",), ("outage", False), ("space", None)]
    return script


@dataclass
class Handle:
    ino: int
    writing: bool = True


@dataclass
class Run:
    """One script at work on one world."""

    world: World
    nursery: trio.Nursery
    unit: int = TOKEN
    """Bytes of a block: a token, repeated."""
    mirror: dict[int, bytearray] = field(default_factory=dict)
    """What each file must have, by inode."""
    living: dict[bytes, str] = field(default_factory=dict)
    """Token -> where it came from."""
    handles: dict[int, Handle] = field(default_factory=dict)
    removed: set[bytes] = field(default_factory=set)
    """Tokens that went with the file that held them, while nobody else worked."""
    seen: set[bytes] | None = None
    """What a program that is removing a file has read in it just before; None: it did not look."""
    unlinked: set[int] = field(default_factory=set)
    """Files of which a program took the last name."""
    honest: bool = True
    """Questions to the remote are not answered with wrong sizes in this script."""
    alone: bool = False
    """Nobody else changes the remote after the beginning."""
    made: int = 0

    # -- tokens -------------------------------------------------------------------------------------------------------

    def token(self, origin: str) -> bytes:
        self.made += 1
        token = b"%s%07d" % (origin[:1].encode(), self.made)
        self.living[token] = origin
        return token

    def tokens(self, content: bytes | bytearray) -> set[bytes]:
        return {bytes(content[at : at + TOKEN]) for at in range(0, len(content), self.unit)} - {bytes(TOKEN)}

    def kill_tokens(self, content: bytes | bytearray) -> None:
        for token in self.tokens(content):
            self.living.pop(token, None)

    def blocks(self, count: int, origin: str) -> bytes:
        return b"".join(self.token(origin) * (self.unit // TOKEN) for _ in range(count))

    def content_of(self, node: Node) -> bytearray:
        if node.ino not in self.mirror:
            version = node.base_version
            self.mirror[node.ino] = bytearray(self.world.remote.contents[version] if version else b"")
        return self.mirror[node.ino]

    def removed_here(self, node: Node) -> None:
        self.unlinked.add(node.ino)
        if node.kind is Kind.FILE:
            going = self.tokens(self.content_of(node))
            for token in going if self.seen is None else going & self.seen:
                self.living.pop(token, None)
            if self.alone:
                self.removed |= self.tokens(self.content_of(node))

    # -- what programs do ---------------------------------------------------------------------------------------------

    async def do(self, op: Op) -> None:
        verb, *arguments = op
        try:
            with trio.fail_after(200):  # nothing may hang: deadlines are 30 s
                await getattr(self, "do_" + verb.replace(" ", "_"))(*arguments)
        except (LocalError, RemoteError):
            pass
        if self.alone:
            for ino in self.mirror.keys() - self.unlinked:
                node = self.world.nodes.database.get(ino)
                assert node is not None and not node.removed, f"{node} lost its name by itself after {op}"

    async def parent_of(self, path: str) -> tuple[int, str]:
        parent, _, name = path.rpartition("/")
        return (await self.world.find(parent)).ino, name

    async def do_write(self, path: str, at: int, count: int, truncate: bool) -> None:
        fs = self.world.fs
        parent, name = await self.parent_of(path)
        try:
            node = await fs.create(parent, name, 0o644)
            self.mirror[node.ino] = bytearray()
        except LocalError:
            node = await self.world.find(path)
            if node.kind is not Kind.FILE:
                return
            content = self.content_of(node)
            fs.open(node.ino, writing=True, truncate=truncate)
            if truncate:
                self.kill_tokens(content)
                content.clear()
        try:
            self.write(node, at, count)
        finally:
            fs.close_file(node.ino, writing=True)

    def write(self, node: Node, at: int, count: int) -> None:
        content, data = self.content_of(node), self.blocks(count, "local")
        start, stop = at * self.unit, at * self.unit + len(data)
        try:
            self.world.fs.write(node.ino, start, data)
        except (LocalError, RemoteError):
            self.kill_tokens(data)
            raise
        self.kill_tokens(bytes(content[start:stop]))
        content.extend(bytes(max(0, stop - len(content))))
        content[start:stop] = data

    async def do_replace(self, path: str, count: int) -> None:
        parent, name = await self.parent_of(path)
        temporary = f".{name}.tmp"
        fs = self.world.fs
        node = await fs.create(parent, temporary, 0o644)
        self.mirror[node.ino] = bytearray()
        try:
            self.write(node, 0, count)
        finally:
            fs.close_file(node.ino, writing=True)
        await fs.rename(parent, temporary, parent, name, replace=True, exchange=False)

    async def do_rename(self, source: str, target: str) -> None:
        if target == source or target.startswith(source + "/"):
            return
        from_parent, from_name = await self.parent_of(source)
        to_parent, to_name = await self.parent_of(target)
        node = await self.world.find(source)
        at: Node | None = self.world.nodes.get(to_parent)
        while at is not None and at.ino != 1:
            if at is node:
                return  # the kernel refuses to move a directory below itself
            at = self.world.nodes.database.get(at.parent or 1)
        await self.world.fs.rename(from_parent, from_name, to_parent, to_name, replace=True, exchange=False)

    async def do_exchange(self, source: str, target: str) -> None:
        if source.startswith(target + "/") or target.startswith(source + "/") or source == target:
            return
        from_parent, from_name = await self.parent_of(source)
        to_parent, to_name = await self.parent_of(target)
        one, other = await self.world.find(source), await self.world.find(target)
        if one.is_directory or other.is_directory:
            return
        await self.world.fs.rename(from_parent, from_name, to_parent, to_name, replace=True, exchange=True)

    async def do_take_over(self, path: str, count: int, others: bool, seconds: float) -> None:
        """A new file changes names with the old one, which is read and then removed; with `others` between the two somebody
        else writes under the name. Nothing goes but what was read."""
        parent, name = await self.parent_of(path)
        if (await self.world.find(path)).is_directory:
            return
        temporary = f".{name}.aside"
        fs = self.world.fs
        node = await fs.create(parent, temporary, 0o644)
        self.mirror[node.ino] = bytearray()
        try:
            self.write(node, 0, count)
        finally:
            fs.close_file(node.ino, writing=True)
        await fs.rename(parent, temporary, parent, name, replace=False, exchange=True)
        aside = f"{path.rpartition('/')[0]}/{temporary}".lstrip("/")
        old = await self.world.find(aside)
        plain = old.link_of is None and not self.world.nodes.aliases[old.ino]  # of hard links no such thing is promised
        await self.do_read(aside)
        seen = self.tokens(self.content_of(old))
        if others:
            await self.do_other_put(path, 1)
        await trio.sleep(seconds)
        self.seen = seen if plain else None
        try:
            await fs.unlink(parent, temporary)
        finally:
            self.seen = None

    async def do_mkdir(self, path: str) -> None:
        parent, name = await self.parent_of(path)
        await self.world.fs.make_directory(parent, name, 0o755)

    async def do_rmdir(self, path: str) -> None:
        parent, name = await self.parent_of(path)
        await self.world.fs.remove_directory(parent, name)

    async def do_unlink(self, path: str) -> None:
        parent, name = await self.parent_of(path)
        await self.world.fs.unlink(parent, name)

    async def do_empty(self, path: str) -> None:
        """rm -rf"""
        directory = await self.world.find(path)
        if not directory.is_directory:
            return
        await self.world.fs.open_directory(directory.ino)
        for child in self.world.nodes.database.children(directory.ino):
            if child.is_directory:
                await self.do_empty(f"{path}/{child.name}")
            else:
                await self.world.fs.unlink(directory.ino, child.name)
        await self.do_rmdir(path)

    async def do_truncate(self, path: str, blocks: int) -> None:
        node = await self.world.find(path)
        if node.kind is Kind.FILE:
            self.content_of(node)
            await self.world.fs.setattr(node.ino, SetAttributes(size=blocks * self.unit))
            self.truncated(node, blocks)

    def truncated(self, node: Node, blocks: int) -> None:
        content, size = self.content_of(node), blocks * self.unit
        self.kill_tokens(bytes(content[size:]))
        del content[size:]
        content.extend(bytes(max(0, size - len(content))))

    async def do_chmod(self, path: str, mode: int) -> None:
        await self.world.fs.setattr((await self.world.find(path)).ino, SetAttributes(mode=mode))

    async def do_utime(self, path: str, seconds: int) -> None:
        await self.world.fs.setattr((await self.world.find(path)).ino, SetAttributes(mtime_ns=seconds * 10**9))

    async def do_read(self, path: str) -> None:
        node = await self.world.find(path)
        if node.kind is Kind.FILE:
            self.world.fs.open(node.ino, writing=False, truncate=False)
            try:
                await self.check_reading(node)
            finally:
                self.world.fs.close_file(node.ino, writing=False)

    async def check_reading(self, node: Node) -> None:
        seen_before = node.ino in self.mirror
        expected = bytes(self.content_of(node))
        try:
            data = bytes(await self.world.fs.read(node.ino, 0, len(expected) + 100))
        except (LocalError, RemoteError):
            if not seen_before:  # so nobody could tell if it became another version
                del self.mirror[node.ino]
            raise
        assert data == expected, f"{node.name} reads {data[:80]!r}, not {expected[:80]!r}"

    async def do_link(self, path: str, target: str) -> None:
        parent, name = await self.parent_of(target)
        node = await self.world.find(path)
        await self.world.fs.link(node.ino, parent, name)

    async def do_open(self, path: str, slot: int) -> None:
        if slot not in self.handles:
            node = await self.world.find(path)
            if node.kind is Kind.FILE:
                self.content_of(node)
                self.world.fs.open(node.ino, writing=True, truncate=False)
                self.handles[slot] = Handle(node.ino)

    async def do_handle_write(self, slot: int, at: int, count: int) -> None:
        if slot in self.handles:
            self.write(self.world.nodes.get(self.handles[slot].ino), at, count)

    async def do_handle_truncate(self, slot: int, blocks: int) -> None:
        if slot in self.handles:
            node = self.world.nodes.get(self.handles[slot].ino)
            await self.world.fs.setattr(node.ino, SetAttributes(size=blocks * self.unit))
            self.truncated(node, blocks)

    async def do_handle_read(self, slot: int) -> None:
        if slot in self.handles:
            await self.check_reading(self.world.nodes.get(self.handles[slot].ino))

    async def do_close(self, slot: int) -> None:
        handle = self.handles.pop(slot, None)
        if handle is not None:
            node = self.world.nodes.get(handle.ino)
            if node.ino in self.unlinked:
                self.kill_tokens(self.content_of(node))  # unlinked, and now closed
            self.world.fs.close_file(handle.ino, writing=handle.writing)

    # -- what the other client does -----------------------------------------------------------------------------------

    async def do_other_put(self, path: str, count: int) -> None:
        remote = self.world.remote
        names = tuple(path.split("/"))
        there, parent = remote.find(names), remote.find(names[:-1])
        if parent is None or parent.kind is not Kind.DIRECTORY or (there is not None and there.kind is not Kind.FILE):
            return
        if there is not None:
            self.kill_tokens(there.content)
        remote.put(path, self.blocks(count, "remote"))

    async def do_other_remove(self, path: str) -> None:
        remote = self.world.remote
        if remote.find(tuple(path.split("/"))) is not None:
            for name, content in remote.tree().items():
                if isinstance(content, bytes) and (name == path or name.startswith(path + "/")):
                    self.kill_tokens(content)
            remote.remove(path)

    async def do_other_move(self, source: str, target: str) -> None:
        remote = self.world.remote
        there = remote.find(tuple(target.split("/")))
        parent = remote.find(tuple(target.split("/"))[:-1])
        if source == target or target.startswith(source + "/") or source.startswith(target + "/"):
            return
        if remote.find(tuple(source.split("/"))) is None or parent is None or parent.kind is not Kind.DIRECTORY:
            return
        if there is not None:
            await self.do_other_remove(target)
        remote.move(source, target)

    async def do_other_mkdir(self, path: str) -> None:
        remote = self.world.remote
        names = tuple(path.split("/"))
        parent = remote.find(names[:-1])
        if parent is not None and parent.kind is Kind.DIRECTORY and remote.find(names) is None:
            remote.mkdir(path)

    # -- time, faults, death ------------------------------------------------------------------------------------------

    async def do_wait(self, seconds: float) -> None:
        await trio.sleep(seconds)

    async def do_list(self, path: str) -> None:
        node = await self.world.find(path)
        if node.is_directory:
            await self.world.fs.refresh_now(node)

    async def do_hurry(self, path: str) -> None:
        """Somebody asks for safety, and goes away before it is reached."""
        with trio.move_on_after(0.3):
            async for _ in self.world.engine.send_now([path]):
                pass

    async def do_fault(self, verb: str, *kinds: str) -> None:
        self.world.flaky.fail(verb, *kinds)

    async def do_unauthenticated(self, verb: str) -> None:
        self.world.flaky.fail(verb, "unauthenticated")

    async def do_credential(self) -> None:
        self.world.flaky.credential += 1

    async def do_outage(self, on: bool) -> None:
        self.world.memory.outage = "gone" if on else None

    async def do_space(self, left: int | None) -> None:
        remote = self.world.remote
        remote.space = None if left is None else remote.used() + left * self.unit // TOKEN

    async def do_latency(self, seconds: float) -> None:
        self.world.flaky.latency = seconds

    async def do_clock(self, seconds: float) -> None:
        self.world.time.wall_offset += seconds

    async def do_kill(self) -> None:
        world = self.world
        for handle in self.handles.values():  # a fresh mount: no program survives it
            node = world.nodes.get(handle.ino)
            if node.ino in self.unlinked or not node.unsent:
                self.kill_tokens(self.content_of(node))
        self.handles.clear()
        await world.kill(self.nursery)
        world.fs.take_over()

    # -- the end ------------------------------------------------------------------------------------------------------

    async def check_end(self) -> None:
        world = self.world
        world.flaky.calm()
        for slot in list(self.handles):
            await self.do_close(slot)
        await trio.sleep(200)
        world.flaky.credential += 1  # whatever was refused late was not this one
        await trio.sleep(200)
        parked = await world.converge()

        assert not (self.alone and self.honest and parked), f"parked without need: {world.engine.parked('m')}"
        conflicts = world.nodes.database.connection.execute("SELECT count(*) FROM conflicts").fetchone()[0]
        assert not (self.alone and self.honest and conflicts), "a conflict with oneself"
        theirs = world.remote.tree()
        kept: set[bytes] = set()
        for node in parked:
            kept |= await self.readable(node)
        ours = world.local_tree()
        apart = {path for path, node in ours.items() if node in parked}
        assert {path for path in theirs if path not in apart} == set(ours) - apart, "the trees differ"
        for path, node in ours.items():
            if node in parked or node.kind is not Kind.FILE:
                continue
            remote = theirs[path]
            owner = world.nodes.owner(node)
            expected = bytes(self.mirror[owner.ino]) if owner.ino in self.mirror else None
            assert expected is None or remote == expected, f"{path}: remote {remote!r:.90}, not {expected!r:.90}"
            assert await world.read_file(path) == remote, f"{path} does not read as the remote has it"
        found = {token for content in theirs.values() if isinstance(content, bytes) for token in self.tokens(content)}
        lost = {token: origin for token, origin in self.living.items() if token not in found | kept}
        if not world.memory.capabilities.conditional_writes:  # somebody may write between our look and our upload
            lost = {token: origin for token, origin in lost.items() if origin == "local"}
        assert not lost, f"lost: {lost}"
        assert not (self.alone and self.honest and found & self.removed), f"came back: {found & self.removed}"

    async def readable(self, node: Node) -> set[bytes]:
        """Tokens in what is here of a parked file."""
        if node.kind is not Kind.FILE:
            return set()
        owner = self.world.nodes.owner(node)
        content = self.world.rig.store.open(owner)
        try:
            found: set[bytes] = set()
            for at in range(0, content.size, self.unit):
                try:
                    await self.world.reads.ensure(content, at, at + TOKEN)
                except (LocalError, RemoteError):
                    continue
                found.add(content.read(at, TOKEN))
            return found
        finally:
            self.world.rig.store.release(content)


async def _play(script: list[Op], world: World, unit: int) -> None:
    async with running(world) as nursery:
        run = Run(world, nursery, unit)
        world.on_removed = world.nodes.on_removed = run.removed_here
        run.honest = not any(op[:2] == ("fault", "stat") and {"short", "long"} & set(op[2:]) for op in script)
        others = [op[0].startswith("other") for op in script]
        apart = others == sorted(others, reverse=True) and not any(op[0] == "take over" and op[3] for op in script)
        for op, other in zip(script, others, strict=True):
            run.alone = not other and apart
            await run.do(op)
        await run.check_end()


def play(script: list[Op], profile: str, home: Path, *, seed: int = 0, unit: int = TOKEN) -> None:
    """Plays a script from nothing. Raises AssertionError when a promise is broken."""
    home.mkdir(parents=True, exist_ok=True)
    world = World(home, PROFILES[profile], seed=seed)
    world.flaky.restless = profile == "restless versions"
    trio.run(_play, script, world, unit, clock=world.time.clock)
