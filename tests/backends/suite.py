"""The conformance suite: every promise of `nbmountd/backends/base.py`, shown of any backend.

How a backend joins: a test module makes a subclass whose name begins with `Test`, and an async fixture `remote` that
yields a `Remote`: a connected backend over an empty remote, and a view of the same remote from outside:

    class TestFolder(BackendSuite):
        @pytest.fixture
        async def remote(self, tmp_path):
            backend = ...
            yield Remote(backend, await backend.connect(), FolderOutside(tmp_path))
            await backend.aclose()

For a server that keeps its files in a directory, `FolderOutside(directory)` is the view. Each test gets a fresh remote
(or a fresh directory of a server that stays up: the mount's root must be empty). Where remotes may differ the suite
asks the capabilities; what a backend cannot do at all it must say there, then those tests pass on the refusal. A test
that a remote cannot pass for a reason that no capability names is overridden in the subclass, with the reason.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import pytest
import trio

from nbmountd.backends.base import Backend, NoTicket, Piece
from nbmountd.errors import (
    NameRefused,
    ParentMissing,
    RemoteError,
    RemoteExists,
    RemoteNotFound,
    RemoteProtocolError,
    RemoteUnavailable,
    RemoteUnsupported,
    VersionMismatch,
)
from nbmountd.escapes import AS_THEY_ARE, Rules
from nbmountd.model import Attributes, Capabilities, Entry, Kind, Place, Version

NO_ATTRIBUTES = Attributes()
MIB = 1024 * 1024
LARGEST_REQUEST = 16 * MIB
"""No backend may ask a body for more than this at once."""

NAMES = [
    "plain.txt",
    "with space",
    " leading and trailing ",
    "caf\u00e9 composed",
    "cafe\u0301 decomposed",
    "100%",
    "%41 is not A",
    "%2F",
    "a#b",
    "a?b",
    "a&b=c",
    "a;b",
    "a+b",
    "a,b@c:d",
    "it's",
    'say "x"',
    "(round) [square] {curly}",
    "<tag>",
    "tilde~",
    "back\\slash",
    "pipe|star*",
    ".hidden",
    "...dots",
    "ends.with.dot.",
    "-dash",
    "\u65e5\u672c\u8a9e",
    "\U0001f9ea emoji",
    "x" * 200,
    "\u00fc" * 100,
]
ALWAYS_ALLOWED = {"plain.txt", "with space", "caf\u00e9 composed", "100%", "a#b", "a&b=c", "a;b", "a+b", ".hidden"}
"""Names that no remote may refuse; the others it may refuse with NameRefused, but never change."""


class Outside(Protocol):
    """The remote as another client sees it. Paths are texts such as "a/b", "" is the root. Plain, blocking calls."""

    def read(self, path: str) -> bytes: ...
    def write(self, path: str, content: bytes) -> None: ...
    def listdir(self, path: str) -> list[str]: ...
    def mkdir(self, path: str) -> None: ...
    def remove(self, path: str) -> None:
        """Removes a file or an empty directory."""


@dataclass
class FolderOutside:
    """The outside view of a remote that keeps its files in a local directory, its names written as `names` says."""

    root: Path
    names: Rules = AS_THEY_ARE

    def at(self, path: str) -> Path:
        return self.root / "/".join(map(self.names.stored, path.split("/")))

    def read(self, path: str) -> bytes:
        return self.at(path).read_bytes()

    def write(self, path: str, content: bytes) -> None:
        self.at(path).write_bytes(content)

    def listdir(self, path: str) -> list[str]:
        # Apache keeps dead properties in ".DAV", sabre/dav in ".sabredav", and both show it to nobody.
        children = (child.name for child in self.at(path).iterdir() if child.name not in (".DAV", ".sabredav"))
        return sorted(map(self.names.shown, children))

    def mkdir(self, path: str) -> None:
        self.at(path).mkdir()

    def remove(self, path: str) -> None:
        there = self.at(path)
        if there.is_dir():
            there.rmdir()
        else:
            there.unlink()


@dataclass
class Remote:
    """What the fixture yields: a connected backend, what it can do, and the same remote from outside."""

    backend: Backend
    capabilities: Capabilities
    outside: Outside


class BytesBody:
    """A body that notes how it was read, and in which thread."""

    def __init__(self, content: bytes, on_read: Callable[[int], None] | None = None) -> None:
        self.content = content
        self.size = len(content)
        self.position = 0
        self.largest_request = 0
        self.unbounded_requests = 0
        self.reads = 0
        self.threads: set[int] = set()
        self.on_read = on_read

    def read(self, count: int = -1, /) -> bytes:
        self.reads += 1
        self.threads.add(threading.get_ident())
        self.largest_request = max(self.largest_request, count)
        self.unbounded_requests += count < 0
        if self.on_read is not None:
            self.on_read(self.position)
        part = self.content[self.position :] if count < 0 else self.content[self.position : self.position + count]
        self.position += len(part)
        return part

    def rewind(self) -> None:
        self.position = 0


class Collector:
    """A sink that keeps what it gets, and notes in which thread."""

    def __init__(self, on_bytes: Callable[[int], None] | None = None) -> None:
        self.content = bytearray()
        self.calls = 0
        self.threads: set[int] = set()
        self.on_bytes = on_bytes

    def __call__(self, view: memoryview) -> None:
        self.calls += 1
        self.threads.add(threading.get_ident())
        self.content += view
        if self.on_bytes is not None:
            self.on_bytes(len(self.content))


def free(name: str, parent: Place | None = None) -> Place:
    """A place at which nothing is yet."""
    parent = parent or Place()
    return Place((*parent.path, name), None, parent.id)


def at(entry: Entry, parent: Place | None = None) -> Place:
    """The place of an object that the backend told of."""
    parent = parent or Place()
    return Place((*parent.path, entry.name), entry.id, parent.id)


async def upload(
    backend: Backend,
    place: Place,
    content: bytes,
    replaces: Version | None = None,
    attributes: Attributes = NO_ATTRIBUTES,
) -> Entry:
    return await backend.upload(
        place, BytesBody(content), replaces=replaces, attributes=attributes, ticket=NoTicket()
    )


async def read(backend: Backend, place: Place, version: Version | None, start: int, stop: int) -> bytes:
    collector = Collector()
    await backend.read(place, version, start, stop, collector)
    return bytes(collector.content)


async def listing(backend: Backend, place: Place | None = None) -> dict[str, Entry]:
    entries = await backend.list(place or Place())
    assert len({entry.name for entry in entries}) == len(entries)
    return {entry.name: entry for entry in entries}


def pattern(size: int) -> bytes:
    """Bytes that are nowhere alike, so that a shift is seen."""
    blocks = (hashlib.sha256(number.to_bytes(8, "big")).digest() for number in range(size // 32 + 1))
    return b"".join(blocks)[:size]


class BackendSuite:
    """Subclass it as said at the top of the file."""

    # --- stat and list ---

    async def test_the_root_is_a_directory(self, remote: Remote) -> None:
        entry = await remote.backend.stat(Place())

        assert entry.kind is Kind.DIRECTORY
        assert entry.name == ""

    async def test_an_empty_directory_lists_nothing(self, remote: Remote) -> None:
        assert await remote.backend.list(Place()) == []

    async def test_stat_and_list_tell_what_is_there(self, remote: Remote) -> None:
        remote.outside.write("file", b"12345")
        remote.outside.mkdir("folder")
        remote.outside.write("folder/inner", b"")

        entries = await listing(remote.backend)
        folder = at(entries["folder"])
        inner = await listing(remote.backend, folder)

        assert {name: entry.kind for name, entry in entries.items()} == {"file": Kind.FILE, "folder": Kind.DIRECTORY}
        assert entries["file"].size == 5
        assert {name: entry.size for name, entry in inner.items()} == {"inner": 0}
        for place, entry in [
            (at(entries["file"]), entries["file"]),
            (folder, entries["folder"]),
            (at(inner["inner"], folder), inner["inner"]),
        ]:
            told = await remote.backend.stat(place)
            assert (told.name, told.kind, told.version, told.id) == (entry.name, entry.kind, entry.version, entry.id)

    async def test_what_is_not_there_is_not_found(self, remote: Remote) -> None:
        remote.outside.write("file", b"1")

        for path in [("absent",), ("absent", "below"), ("file", "below")]:
            with pytest.raises(RemoteNotFound):
                await remote.backend.stat(Place(path))
        with pytest.raises(RemoteNotFound):
            await remote.backend.list(Place(("absent",)))

    async def test_listing_a_file_is_an_error(self, remote: Remote) -> None:
        remote.outside.write("file", b"1")

        with pytest.raises((RemoteNotFound, RemoteProtocolError)):
            await remote.backend.list(Place(("file",)))

    async def test_a_listing_of_1000_entries_is_whole(self, remote: Remote) -> None:
        remote.outside.mkdir("many")
        for number in range(1000):
            remote.outside.write(f"many/{number:04}", b"x" * (number % 7))

        many = await remote.backend.stat(free("many"))
        entries = await listing(remote.backend, at(many))

        assert {name: entry.size for name, entry in entries.items()} == {f"{n:04}": n % 7 for n in range(1000)}

    async def test_a_change_by_another_client_gives_another_version(self, remote: Remote) -> None:
        remote.outside.write("file", b"old")
        old = await remote.backend.stat(free("file"))
        again = await remote.backend.stat(free("file"))

        remote.outside.write("file", b"new and longer")
        new = await remote.backend.stat(free("file"))

        assert old.version is not None
        assert old.version == again.version
        assert old.version != new.version
        assert (await listing(remote.backend))["file"].version == new.version

    async def test_a_directory_version_if_any_changes_with_its_names(self, remote: Remote) -> None:
        before = (await remote.backend.stat(Place())).version
        remote.outside.write("file", b"1")
        after = (await remote.backend.stat(Place())).version

        if before is not None and after is not None and remote.capabilities.strong_versions:
            assert before != after

    async def test_versions_propagate_where_promised(self, remote: Remote) -> None:
        remote.outside.mkdir("a")
        remote.outside.mkdir("a/b")
        before = (await remote.backend.stat(Place())).version
        remote.outside.write("a/b/file", b"1")
        after = (await remote.backend.stat(Place())).version

        if remote.capabilities.propagating_versions:
            assert before is not None
            assert before != after

    # --- read ---

    @pytest.mark.parametrize("size", [1, 4096, 65536, MIB + 1])
    async def test_a_whole_read_gives_every_byte(self, remote: Remote, size: int) -> None:
        content = pattern(size)
        remote.outside.write("file", content)
        entry = await remote.backend.stat(free("file"))

        assert entry.size == size
        assert await read(remote.backend, at(entry), entry.version, 0, size) == content
        assert await read(remote.backend, at(entry), None, 0, size) == content

    async def test_an_empty_file_reads_as_nothing(self, remote: Remote) -> None:
        remote.outside.write("file", b"")
        entry = await remote.backend.stat(free("file"))

        assert entry.size == 0
        assert await read(remote.backend, at(entry), entry.version, 0, 0) == b""

    @pytest.mark.parametrize(
        ("start", "stop"),
        [(0, 1), (0, 1000), (1, 2), (777, 300_001), (MIB // 2, MIB), (MIB, MIB + 1), (MIB - 100, MIB + 1)],
    )
    async def test_a_ranged_read_gives_exactly_the_range(self, remote: Remote, start: int, stop: int) -> None:
        content = pattern(MIB + 1)
        remote.outside.write("file", content)
        entry = await remote.backend.stat(free("file"))

        if remote.capabilities.ranged_reads:
            assert await read(remote.backend, at(entry), entry.version, start, stop) == content[start:stop]
        elif start:
            with pytest.raises(RemoteUnsupported):
                await read(remote.backend, at(entry), entry.version, start, stop)

    async def test_a_read_past_the_end_is_an_error_not_a_short_answer(self, remote: Remote) -> None:
        remote.outside.write("file", b"12345")
        entry = await remote.backend.stat(free("file"))

        with pytest.raises(RemoteProtocolError):
            await read(remote.backend, at(entry), entry.version, 0, 6)
        if remote.capabilities.ranged_reads:
            with pytest.raises(RemoteProtocolError):
                await read(remote.backend, at(entry), entry.version, 5, 6)

    async def test_a_read_of_an_old_version_is_refused_without_a_byte_of_the_new(self, remote: Remote) -> None:
        remote.outside.write("file", b"a" * 1000)
        old = await remote.backend.stat(free("file"))
        remote.outside.write("file", b"b" * 2000)
        collector = Collector()

        with pytest.raises(VersionMismatch):
            await remote.backend.read(at(old), old.version, 0, 1000, collector)

        assert bytes(collector.content) == b""

    async def test_a_read_of_what_is_gone_is_not_found(self, remote: Remote) -> None:
        remote.outside.write("file", b"12345")
        entry = await remote.backend.stat(free("file"))
        remote.outside.remove("file")

        with pytest.raises((RemoteNotFound, VersionMismatch)):
            await read(remote.backend, at(entry), entry.version, 0, 5)

    async def test_an_error_of_the_sink_comes_out_unchanged(self, remote: Remote) -> None:
        class SinkIsFullError(Exception):
            pass

        def refuse(got: int) -> None:
            raise SinkIsFullError(got)

        remote.outside.write("file", pattern(MIB))
        entry = await remote.backend.stat(free("file"))

        with pytest.raises(SinkIsFullError):
            await remote.backend.read(at(entry), entry.version, 0, MIB, Collector(refuse))

        assert len(await read(remote.backend, at(entry), entry.version, 0, MIB)) == MIB

    async def test_sinks_are_called_in_worker_threads(self, remote: Remote) -> None:
        remote.outside.write("file", b"12345")
        entry = await remote.backend.stat(free("file"))
        collector = Collector()

        await remote.backend.read(at(entry), entry.version, 0, 5, collector)

        assert threading.get_ident() not in collector.threads

    async def test_reads_at_once_do_not_mix(self, remote: Remote) -> None:
        contents = {f"file{number}": pattern(200_000 + number)[number:] for number in range(4)}
        for name, content in contents.items():
            remote.outside.write(name, content)
        got: dict[str, bytes] = {}

        async def fetch(name: str) -> None:
            got[name] = await read(remote.backend, free(name), None, 0, len(contents[name]))

        async with trio.open_nursery() as nursery:
            for name in contents:
                nursery.start_soon(fetch, name)

        assert got == contents

    async def test_a_cancelled_read_ends_soon_and_its_sink_is_left_alone(self, remote: Remote) -> None:
        size = 32 * MIB
        remote.outside.write("file", bytes(size))
        entry = await remote.backend.stat(free("file"))
        scope = trio.CancelScope()
        cancelled_at: list[int] = []

        def cancel(got: int) -> None:
            if not cancelled_at:
                cancelled_at.append(got)
                trio.from_thread.run_sync(scope.cancel)

        collector = Collector(cancel)
        with trio.fail_after(10), scope:
            await remote.backend.read(at(entry), entry.version, 0, size, collector)
        calls = collector.calls
        await remote.backend.stat(Place())

        assert scope.cancelled_caught
        assert len(collector.content) < size
        assert collector.calls == calls

    # --- upload ---

    @pytest.mark.parametrize("size", [0, 1, 4096, MIB + 1])
    async def test_an_upload_makes_a_new_file(self, remote: Remote, size: int) -> None:
        content = pattern(size)

        entry = await upload(remote.backend, free("new"), content)

        assert (entry.name, entry.kind, entry.size) == ("new", Kind.FILE, size)
        assert entry.version is not None
        assert remote.outside.read("new") == content
        told = await remote.backend.stat(at(entry))
        assert (told.version, told.size, told.id) == (entry.version, size, entry.id)
        assert await read(remote.backend, at(entry), entry.version, 0, size) == content

    async def test_an_upload_replaces_the_version_it_names(self, remote: Remote) -> None:
        old = await upload(remote.backend, free("file"), b"old content")

        new = await upload(remote.backend, at(old), b"new", old.version)

        assert remote.outside.read("file") == b"new"
        assert new.version != old.version
        assert (await remote.backend.stat(at(new))).id == new.id
        assert remote.outside.listdir("") == ["file"]

    async def test_an_upload_over_another_version_is_refused(self, remote: Remote) -> None:
        old = await upload(remote.backend, free("file"), b"old content")
        remote.outside.write("file", b"somebody else's content")

        with pytest.raises(VersionMismatch):
            await upload(remote.backend, at(old), b"mine", old.version)

        assert remote.outside.read("file") == b"somebody else's content"
        assert remote.outside.listdir("") == ["file"]

    async def test_an_upload_to_a_taken_name_is_refused(self, remote: Remote) -> None:
        remote.outside.write("file", b"somebody else's content")
        remote.outside.mkdir("folder")

        for name in ("file", "folder"):
            with pytest.raises(RemoteExists):
                await upload(remote.backend, free(name), b"mine")

        assert remote.outside.read("file") == b"somebody else's content"
        assert remote.outside.listdir("folder") == []

    async def test_an_upload_over_a_file_that_is_gone_is_refused(self, remote: Remote) -> None:
        old = await upload(remote.backend, free("file"), b"old content")
        remote.outside.remove("file")

        with pytest.raises((RemoteNotFound, VersionMismatch)):
            await upload(remote.backend, at(old), b"mine", old.version)

        assert remote.outside.listdir("") == []

    async def test_an_upload_into_a_missing_directory_is_refused(self, remote: Remote) -> None:
        with pytest.raises((ParentMissing, RemoteNotFound)):
            await upload(remote.backend, Place(("absent", "file")), b"mine")

        assert remote.outside.listdir("") == []

    async def test_an_upload_reads_its_body_in_bounded_parts_in_a_worker_thread(self, remote: Remote) -> None:
        body = BytesBody(bytes(24 * MIB))

        await remote.backend.upload(
            free("large"), body, replaces=None, attributes=NO_ATTRIBUTES, ticket=NoTicket()
        )

        assert body.unbounded_requests == 0
        assert 0 < body.largest_request <= LARGEST_REQUEST
        assert threading.get_ident() not in body.threads
        assert (await remote.backend.stat(free("large"))).size == body.size

    async def test_an_error_of_the_body_comes_out_and_leaves_the_old_content(self, remote: Remote) -> None:
        class BodyLostError(Exception):
            pass

        def fail(position: int) -> None:
            if position:
                raise BodyLostError(position)

        old = await upload(remote.backend, free("file"), b"old content")

        with pytest.raises((BodyLostError, RemoteError)):
            await remote.backend.upload(
                at(old),
                BytesBody(bytes(24 * MIB), fail),
                replaces=old.version,
                attributes=NO_ATTRIBUTES,
                ticket=NoTicket(),
            )

        if remote.capabilities.atomic_replace:
            assert remote.outside.read("file") == b"old content"
            assert await settled(lambda: list(self.names(remote)) == ["file"]), self.names(remote)

    async def test_a_cancelled_upload_ends_soon_and_its_body_is_left_alone(self, remote: Remote) -> None:
        scope = trio.CancelScope()
        cancelled_at: list[int] = []

        def cancel(position: int) -> None:
            if position and not cancelled_at:
                cancelled_at.append(position)
                trio.from_thread.run_sync(scope.cancel)

        old = await upload(remote.backend, free("file"), b"old content")
        body = BytesBody(bytes(48 * MIB), cancel)

        with trio.fail_after(10), scope:
            await remote.backend.upload(
                at(old), body, replaces=old.version, attributes=NO_ATTRIBUTES, ticket=NoTicket()
            )
        reads = body.reads
        await remote.backend.stat(Place())

        assert scope.cancelled_caught
        assert body.position < body.size
        assert body.reads == reads
        if remote.capabilities.atomic_replace:
            assert remote.outside.read("file") == b"old content"
            assert await settled(lambda: list(self.names(remote)) == ["file"]), self.names(remote)

    async def test_two_uploads_at_once_both_arrive(self, remote: Remote) -> None:
        contents = {"one": pattern(MIB), "two": pattern(MIB + 100)[100:]}

        async with trio.open_nursery() as nursery:
            for name, content in contents.items():
                nursery.start_soon(upload, remote.backend, free(name), content)

        assert {name: remote.outside.read(name) for name in contents} == contents

    async def test_of_two_conditional_uploads_at_once_one_wins(self, remote: Remote) -> None:
        """Where the remote itself checks, exactly one; the loser is told, and no byte of it is in the file."""
        old = await upload(remote.backend, free("file"), b"old")
        contents = [b"a" * 300_000, b"b" * 400_000]
        outcomes: list[Entry | RemoteError] = []

        async def contend(content: bytes) -> None:
            try:
                outcomes.append(await upload(remote.backend, at(old), content, old.version))
            except RemoteError as error:
                if not (error.in_doubt or isinstance(error, VersionMismatch | RemoteExists)):
                    raise
                outcomes.append(error)  # in doubt: it looked, and found the other's

        async with trio.open_nursery() as nursery:
            for content in contents:
                nursery.start_soon(contend, content)

        winners = [outcome for outcome in outcomes if isinstance(outcome, Entry)]
        if remote.capabilities.conditional_writes:
            assert len(winners) == 1
        assert len(winners) >= 1
        if remote.capabilities.atomic_replace:
            final = remote.outside.read("file")
            assert final in contents
            assert len(final) in {winner.size for winner in winners}

    # --- ranged writes ---

    async def test_write_ranges_changes_only_the_pieces(self, remote: Remote) -> None:
        content = bytearray(pattern(300_000))
        old = await upload(remote.backend, free("file"), bytes(content))
        assert old.version is not None
        dirty = {(0, 10): b"0123456789", (150_000, 150_004): b"abcd", (299_999, 300_010): b"x" * 11}
        for (start, stop), part in dirty.items():
            content[start:stop] = part
        pieces = [Piece(start, stop, partial(_read_from, bytes(content))) for start, stop in dirty]

        writing = partial(
            remote.backend.write_ranges, at(old), pieces, len(content), replaces=old.version, attributes=NO_ATTRIBUTES
        )
        if not remote.capabilities.ranged_writes:
            with pytest.raises(RemoteUnsupported):
                await writing()
            return
        new = await writing()

        assert remote.outside.read("file") == bytes(content)
        assert new.size == len(content)
        assert new.version != old.version
        assert (await remote.backend.stat(at(new))).version == new.version
        with pytest.raises(VersionMismatch):
            await writing()

    async def test_write_ranges_can_shorten_and_lengthen(self, remote: Remote) -> None:
        if not remote.capabilities.ranged_writes:
            return
        entry = await upload(remote.backend, free("file"), b"0123456789")

        for size, expected in [(4, b"0123"), (8, b"0123\0\0\0\0"), (0, b"")]:
            assert entry.version is not None
            entry = await remote.backend.write_ranges(
                at(entry), [], size, replaces=entry.version, attributes=NO_ATTRIBUTES
            )
            assert entry.size == size
            assert remote.outside.read("file") == expected

    # --- directories and symlinks ---

    async def test_a_directory_is_made_once(self, remote: Remote) -> None:
        entry = await remote.backend.make_directory(free("folder"), NO_ATTRIBUTES)

        assert (entry.name, entry.kind) == ("folder", Kind.DIRECTORY)
        assert remote.outside.listdir("") == ["folder"]
        assert await remote.backend.list(at(entry)) == []
        with pytest.raises(RemoteExists):
            await remote.backend.make_directory(free("folder"), NO_ATTRIBUTES)

    async def test_a_directory_over_a_file_or_without_a_parent_is_refused(self, remote: Remote) -> None:
        remote.outside.write("file", b"1")

        with pytest.raises(RemoteExists):
            await remote.backend.make_directory(free("file"), NO_ATTRIBUTES)
        with pytest.raises((ParentMissing, RemoteNotFound)):
            await remote.backend.make_directory(Place(("absent", "folder")), NO_ATTRIBUTES)
        assert remote.outside.read("file") == b"1"

    async def test_symlinks_are_kept_or_refused(self, remote: Remote) -> None:
        making = partial(remote.backend.make_symlink, free("link"), "../some where/else", NO_ATTRIBUTES)
        if not remote.capabilities.native_symlinks:
            with pytest.raises(RemoteUnsupported):
                await making()
            assert remote.outside.listdir("") == []
            return

        made = await making()

        assert (made.kind, made.attributes.target) == (Kind.SYMLINK, "../some where/else")
        assert (await listing(remote.backend))["link"].attributes.target == "../some where/else"
        with pytest.raises(RemoteExists):
            await making()
        await remote.backend.remove(at(made), kind=Kind.SYMLINK, version=made.version)
        assert remote.outside.listdir("") == []

    # --- move ---

    async def test_a_file_moves_to_a_free_name(self, remote: Remote) -> None:
        entry = await upload(remote.backend, free("from"), b"content")

        moved = await remote.backend.move(
            at(entry), free("to"), kind=Kind.FILE, version=entry.version, replaces=None
        )

        assert (moved.name, moved.kind) == ("to", Kind.FILE)
        assert remote.outside.listdir("") == ["to"]
        assert remote.outside.read("to") == b"content"
        told = await remote.backend.stat(at(moved))
        assert (told.version, told.id) == (moved.version, moved.id)
        if remote.capabilities.stable_ids:
            assert moved.id == entry.id is not None

    async def test_a_file_moves_into_another_directory(self, remote: Remote) -> None:
        entry = await upload(remote.backend, free("from"), b"content")
        folder = at(await remote.backend.make_directory(free("folder"), NO_ATTRIBUTES))

        await remote.backend.move(
            at(entry), free("to", folder), kind=Kind.FILE, version=entry.version, replaces=None
        )

        assert remote.outside.listdir("") == ["folder"]
        assert remote.outside.read("folder/to") == b"content"

    async def test_a_move_to_a_taken_name_is_refused(self, remote: Remote) -> None:
        entry = await upload(remote.backend, free("from"), b"mine")
        remote.outside.write("to", b"somebody else's")

        with pytest.raises(RemoteExists):
            await remote.backend.move(at(entry), free("to"), kind=Kind.FILE, version=entry.version, replaces=None)

        assert remote.outside.read("from") == b"mine"
        assert remote.outside.read("to") == b"somebody else's"

    async def test_a_move_replaces_the_version_it_names(self, remote: Remote) -> None:
        source = await upload(remote.backend, free("from"), b"new content")
        target = await upload(remote.backend, free("to"), b"old")

        moved = await remote.backend.move(
            at(source), at(target), kind=Kind.FILE, version=source.version, replaces=target.version
        )

        assert remote.outside.listdir("") == ["to"]
        assert remote.outside.read("to") == b"new content"
        assert moved.name == "to"

    async def test_a_move_over_another_version_is_refused(self, remote: Remote) -> None:
        source = await upload(remote.backend, free("from"), b"mine")
        target = await upload(remote.backend, free("to"), b"old")
        remote.outside.write("to", b"somebody else's content")

        with pytest.raises(VersionMismatch):
            await remote.backend.move(
                at(source), at(target), kind=Kind.FILE, version=source.version, replaces=target.version
            )

        assert remote.outside.read("from") == b"mine"
        assert remote.outside.read("to") == b"somebody else's content"

    async def test_a_move_of_what_is_gone_is_not_found(self, remote: Remote) -> None:
        entry = await upload(remote.backend, free("from"), b"mine")
        remote.outside.remove("from")

        with pytest.raises(RemoteNotFound):
            await remote.backend.move(at(entry), free("to"), kind=Kind.FILE, version=None, replaces=None)

        assert remote.outside.listdir("") == []

    async def test_a_move_into_a_missing_directory_is_refused(self, remote: Remote) -> None:
        entry = await upload(remote.backend, free("from"), b"mine")

        with pytest.raises((ParentMissing, RemoteNotFound)):
            await remote.backend.move(
                at(entry), Place(("absent", "to")), kind=Kind.FILE, version=entry.version, replaces=None
            )

        assert remote.outside.listdir("") == ["from"]

    async def test_a_directory_moves_with_all_that_is_in_it(self, remote: Remote) -> None:
        remote.outside.mkdir("from")
        remote.outside.mkdir("from/inner")
        remote.outside.write("from/inner/file", b"content")
        entry = await remote.backend.stat(free("from"))
        moving = partial(
            remote.backend.move, at(entry), free("to"), kind=Kind.DIRECTORY, version=None, replaces=None
        )

        if not remote.capabilities.moves_directories:
            with pytest.raises(RemoteUnsupported):
                await moving()
            return
        moved = await moving()

        assert (moved.name, moved.kind) == ("to", Kind.DIRECTORY)
        assert remote.outside.listdir("") == ["to"]
        assert remote.outside.read("to/inner/file") == b"content"

    # --- remove ---

    async def test_a_file_is_removed_and_gone_counts_as_done(self, remote: Remote) -> None:
        entry = await upload(remote.backend, free("file"), b"content")

        await remote.backend.remove(at(entry), kind=Kind.FILE, version=entry.version)
        await remote.backend.remove(at(entry), kind=Kind.FILE, version=entry.version)
        await remote.backend.remove(free("never"), kind=Kind.DIRECTORY, version=None)

        assert remote.outside.listdir("") == []

    async def test_removing_another_version_is_refused(self, remote: Remote) -> None:
        entry = await upload(remote.backend, free("file"), b"content")
        remote.outside.write("file", b"somebody else's content")

        with pytest.raises(VersionMismatch):
            await remote.backend.remove(at(entry), kind=Kind.FILE, version=entry.version)

        assert remote.outside.read("file") == b"somebody else's content"

    async def test_an_empty_directory_is_removed_and_a_full_one_is_not(self, remote: Remote) -> None:
        remote.outside.mkdir("empty")
        remote.outside.mkdir("full")
        remote.outside.write("full/file", b"content")
        entries = await listing(remote.backend)

        await remote.backend.remove(at(entries["empty"]), kind=Kind.DIRECTORY, version=None)
        with pytest.raises(RemoteExists):
            await remote.backend.remove(at(entries["full"]), kind=Kind.DIRECTORY, version=None)

        assert remote.outside.listdir("") == ["full"]
        assert remote.outside.read("full/file") == b"content"

    # --- names ---

    @pytest.mark.parametrize("name", NAMES)
    async def test_a_name_comes_back_as_it_was_given(self, remote: Remote, name: str) -> None:
        try:
            made = await upload(remote.backend, free(name), b"content")
        except NameRefused:
            assert name not in ALWAYS_ALLOWED
            assert remote.outside.listdir("") == []
            return

        assert made.name == name
        assert remote.outside.listdir("") == [name]
        assert list(await listing(remote.backend)) == [name]
        assert (await remote.backend.stat(at(made))).name == name
        assert await read(remote.backend, at(made), made.version, 0, 7) == b"content"
        moved = await remote.backend.move(
            at(made), free("moved " + name[:150]), kind=Kind.FILE, version=made.version, replaces=None
        )
        back = await remote.backend.move(at(moved), free(name), kind=Kind.FILE, version=moved.version, replaces=None)
        assert remote.outside.listdir("") == [name]
        await remote.backend.remove(at(back), kind=Kind.FILE, version=back.version)
        assert remote.outside.listdir("") == []

    @pytest.mark.parametrize("name", ["plain", "with space", "100%", "a#b", "a&b=c", "a;b", "caf\u00e9", "%2e%2e"])
    async def test_a_directory_may_have_such_a_name_too(self, remote: Remote, name: str) -> None:
        folder = at(await remote.backend.make_directory(free(name), NO_ATTRIBUTES))
        entry = await upload(remote.backend, free(name, folder), b"content")

        assert remote.outside.read(f"{name}/{name}") == b"content"
        assert list(await listing(remote.backend, folder)) == [name]
        assert (await remote.backend.stat(at(entry, folder))).version == entry.version

    async def test_names_that_differ_only_in_composition_are_two_or_refused(self, remote: Remote) -> None:
        await upload(remote.backend, free("caf\u00e9"), b"composed")
        try:
            await upload(remote.backend, free("cafe\u0301"), b"decomposed")
        except (NameRefused, RemoteExists):
            assert remote.outside.read("caf\u00e9") == b"composed"
            return

        assert await read(remote.backend, free("caf\u00e9"), None, 0, 8) == b"composed"
        assert await read(remote.backend, free("cafe\u0301"), None, 0, 10) == b"decomposed"

    @pytest.mark.parametrize("name", [".", "..", "a/b", "nul\0", ""])
    async def test_what_is_no_name_is_refused(self, remote: Remote, name: str) -> None:
        remote.outside.mkdir("folder")

        with pytest.raises((NameRefused, RemoteExists)):
            await upload(remote.backend, Place(("folder", name)), b"content")

        assert remote.outside.listdir("") == ["folder"]
        assert remote.outside.listdir("folder") == []

    async def test_a_name_longer_than_the_limit_is_refused(self, remote: Remote) -> None:
        with pytest.raises(NameRefused):
            await upload(remote.backend, free("x" * (remote.capabilities.max_name_bytes + 1)), b"content")

        assert remote.outside.listdir("") == []

    # --- attributes and the rest ---

    async def test_an_mtime_comes_back_where_promised(self, remote: Remote) -> None:
        mtime_ns = 1_500_000_000_123_456_789
        entry = await upload(remote.backend, free("file"), b"content", attributes=Attributes(mtime_ns=mtime_ns))

        told = await remote.backend.stat(at(entry))

        assert told.attributes.mtime_ns is not None
        if remote.capabilities.native_mtime:
            granularity = remote.capabilities.mtime_granularity_ns
            assert told.attributes.mtime_ns == mtime_ns - mtime_ns % granularity
            assert (await listing(remote.backend))["file"].attributes.mtime_ns == told.attributes.mtime_ns

    async def test_attributes_come_back_where_promised(self, remote: Remote) -> None:
        can = remote.capabilities
        entry = await upload(remote.backend, free("file"), b"content")
        wanted = Attributes(
            mode=0o640 if can.native_mode else None,
            mtime_ns=1_500_000_000_000_000_000 if can.native_mtime else None,
            xattrs={"user.colour": b"blue\0\xff"} if can.native_xattrs else None,
        )
        if wanted == NO_ATTRIBUTES:
            return

        answered = await remote.backend.set_attributes(at(entry), wanted, kind=Kind.FILE)
        told = await remote.backend.stat(at(entry))

        for entry in (answered, told):
            if can.native_mode:
                assert entry.attributes.mode == 0o640
            if can.native_mtime:
                assert entry.attributes.mtime_ns == wanted.mtime_ns
            if can.native_xattrs:
                assert entry.attributes.xattrs == wanted.xattrs
        assert told.version == answered.version
        assert remote.outside.read("file") == b"content"

    async def test_attributes_go_with_an_upload_and_survive_the_next(self, remote: Remote) -> None:
        can = remote.capabilities
        wanted = Attributes(
            mode=0o600 if can.native_mode else None, xattrs={"user.a": b"1"} if can.native_xattrs else None
        )
        first = await upload(remote.backend, free("file"), b"content", attributes=wanted)
        second = await upload(remote.backend, at(first), b"more content", first.version)

        told = await remote.backend.stat(at(second))

        if can.native_mode:
            assert told.attributes.mode == 0o600
        if can.native_xattrs:
            assert told.attributes.xattrs == {"user.a": b"1"}

    async def test_what_cannot_be_stored_is_refused(self, remote: Remote) -> None:
        entry = await upload(remote.backend, free("file"), b"content")

        if not remote.capabilities.native_xattrs:
            with pytest.raises(RemoteUnsupported):
                await remote.backend.set_attributes(at(entry), Attributes(xattrs={"user.a": b"1"}), kind=Kind.FILE)

    async def test_a_checksum_if_told_is_right(self, remote: Remote) -> None:
        entry = await upload(remote.backend, free("file"), b"content")
        told = await remote.backend.stat(at(entry))

        for algorithm, digest in {**entry.checksums, **told.checksums}.items():
            if algorithm.lower() in hashlib.algorithms_available:
                assert hashlib.new(algorithm.lower(), b"content").hexdigest() == digest
        if remote.capabilities.checksum_algorithm is not None:
            assert remote.capabilities.checksum_algorithm.upper() in told.checksums

    async def test_quota_is_an_answer_not_an_error(self, remote: Remote) -> None:
        quota = await remote.backend.quota()

        assert quota.used is None or quota.used >= 0
        assert quota.available is None or quota.available >= 0

    async def test_connecting_again_changes_nothing(self, remote: Remote) -> None:
        remote.outside.write("file", b"content")

        assert await remote.backend.connect() == remote.capabilities
        assert remote.outside.listdir("") == ["file"]

    async def test_after_closing_verbs_end_with_unavailable(self, remote: Remote) -> None:
        await remote.backend.aclose()
        await remote.backend.aclose()

        with pytest.raises(RemoteUnavailable):
            await remote.backend.stat(Place())

    @staticmethod
    def names(remote: Remote) -> list[str]:
        """Names at the root, without those a backend keeps hidden from listings while an upload is under way."""
        return remote.outside.listdir("")


async def settled(check: Callable[[], bool]) -> bool:
    """Whether `check` becomes true within two seconds: a server may still be cleaning up after a cut request."""
    with trio.move_on_after(2):
        while not check():  # noqa: ASYNC110  what a server does sets no event here
            await trio.sleep(0.01)
    return check()


def _read_from(content: bytes, offset: int, count: int) -> bytes:
    return content[offset : offset + count]
