"""The memory backend: the suite with everything on and with much off, and that its faults do what they say."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import pytest
import trio
import trio.testing

from nbmountd.backends.memory import EVERYTHING, Fault, MemoryBackend, MemoryRemote
from nbmountd.errors import RemoteDenied, RemoteFull, RemoteUnavailable
from nbmountd.model import Capabilities, Quota
from tests.backends.suite import BackendSuite, Collector, Remote, free, pattern, upload

POOR = Capabilities(
    ranged_reads=False,
    conditional_writes=False,
    moves_directories=False,
    mtime_granularity_ns=1_000_000_000,
    max_name_bytes=220,
)
CHEAP_FEED = replace(EVERYTHING, propagating_versions=True, change_feed=True, checksum_algorithm="sha1")


@dataclass
class MemoryOutside:
    remote: MemoryRemote

    def read(self, path: str) -> bytes:
        return self.remote.read(path)

    def write(self, path: str, content: bytes) -> None:
        self.remote.put(path, content)

    def listdir(self, path: str) -> list[str]:
        return self.remote.listdir(path)

    def mkdir(self, path: str) -> None:
        self.remote.mkdir(path)

    def remove(self, path: str) -> None:
        assert not self.remote[path].children
        self.remote.remove(path)


class TestConformance(BackendSuite):
    @pytest.fixture(params=[EVERYTHING, POOR, CHEAP_FEED], ids=["everything", "poor", "feed"])
    async def remote(self, request: pytest.FixtureRequest) -> AsyncIterator[Remote]:
        backend = MemoryBackend(capabilities=request.param)
        yield Remote(backend, await backend.connect(), MemoryOutside(backend.remote))
        await backend.aclose()


# --- faults, for the tests of the core ---


async def connected(**options: Any) -> MemoryBackend:
    backend = MemoryBackend(threads=False, **options)
    await backend.connect()
    backend.requests.clear()
    return backend


async def test_before_means_nothing_was_done_and_after_means_all_was() -> None:
    backend = await connected()
    backend.fail("upload", RemoteUnavailable("refused"), Fault(after=RemoteUnavailable("lost", in_doubt=True)))

    for name in ("before", "after"):
        with pytest.raises(RemoteUnavailable):
            await upload(backend, free(name), b"content")

    assert backend.remote.tree() == {"after": b"content"}
    assert backend.counts() == {"upload": 2}


async def test_a_cut_read_gives_the_bytes_before_the_cut() -> None:
    backend = await connected()
    backend.remote.put("file", pattern(1000))
    backend.fail("read", Fault(cut=300))
    collector = Collector()

    with pytest.raises(RemoteUnavailable):
        await backend.read(free("file"), None, 100, 1000, collector)

    assert bytes(collector.content) == pattern(1000)[100:400]


@pytest.mark.parametrize(("atomic", "left"), [(True, b"old"), (False, b"new c")])
async def test_a_cut_upload_leaves_a_mixture_only_where_replacing_is_not_atomic(atomic: bool, left: bytes) -> None:
    backend = await connected(capabilities=replace(EVERYTHING, atomic_replace=atomic))
    version = backend.remote.put("file", b"old")
    backend.fail("upload", Fault(cut=5))

    with pytest.raises(RemoteUnavailable) as caught:
        await upload(backend, free("file"), b"new content", version)

    assert caught.value.in_doubt
    assert backend.remote.read("file") == left
    assert (backend.remote["file"].version == version) == atomic


async def test_a_stalled_request_waits_where_it_was_told_and_goes_on() -> None:
    backend = await connected()
    backend.remote.put("file", pattern(1000))
    gate = trio.Event()
    backend.fail("read", Fault(stall=(300, gate)))
    collector = Collector()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.read, free("file"), None, 0, 1000, collector)
        await trio.testing.wait_all_tasks_blocked()
        assert bytes(collector.content) == pattern(1000)[:300]
        gate.set()

    assert bytes(collector.content) == pattern(1000)


async def test_closing_ends_what_waits() -> None:
    backend = await connected()
    backend.fail("stat", Fault(wait_for=trio.Event()))

    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(RemoteUnavailable):
                await backend.stat(free("file"))

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        await backend.aclose()


async def test_another_client_is_seen_and_announced() -> None:
    backend = await connected(capabilities=replace(EVERYTHING, change_feed=True))
    told: list[str] = []

    async def follow() -> None:
        async with aclosing(backend.changes()) as changes:  # type: ignore[type-var]
            async for change in changes:
                told.append(str(change.place))  # noqa: PERF401  extend would show nothing before the end

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        await trio.testing.wait_all_tasks_blocked()
        backend.remote.mkdir("folder")
        backend.remote.put("folder/file", b"1", mtime_ns=5)
        backend.remote.move("folder/file", "file")
        backend.remote.remove("folder")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    assert told == ["/folder", "/folder/file", "/folder/file", "/file", "/folder"]
    assert (await backend.stat(free("file"))).attributes.mtime_ns == 5


async def test_a_full_remote_takes_nothing_more() -> None:
    backend = await connected()
    backend.remote.space = 10
    await upload(backend, free("file"), b"12345678")

    with pytest.raises(RemoteFull):
        await upload(backend, free("more"), b"123")

    assert await backend.quota() == Quota(used=8, available=2)


async def test_permissions_of_the_remote_are_told_and_kept() -> None:
    backend = await connected()
    backend.remote.put("file", b"1")
    backend.remote["file"].writable = False
    entry = await backend.stat(free("file"))

    with pytest.raises(RemoteDenied):
        await upload(backend, free("file"), b"2", entry.version)

    assert not entry.writable
