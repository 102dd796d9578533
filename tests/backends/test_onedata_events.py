"""The stream of changes: seen soon, nothing missed between two requests, silence and nonsense endured."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager

import pytest
import trio

from nbmountd.backends.onedata import OnedataBackend
from nbmountd.backends.onedata_events import LINE_LIMIT, Listener
from nbmountd.errors import RemoteProtocolError, RemoteUnsupported
from nbmountd.model import Place
from tests.backends.onedata_fixtures import VARIABLE, connected, new_space, options
from tests.backends.suite import at
from tests.servers.onedata_double import KRAKOW, OnedataDouble


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnedataDouble]:
    with OnedataDouble(tmp_path_factory.mktemp("onedata")) as server:
        assert isinstance(server, OnedataDouble)
        yield server


@pytest.fixture
def double(running: OnedataDouble, monkeypatch: pytest.MonkeyPatch) -> OnedataDouble:
    monkeypatch.setenv(VARIABLE, "alice-rest")
    running.do("clear")
    running.do("provider", id=KRAKOW, streams=0)
    return running


@asynccontextmanager
async def following(backend: OnedataBackend) -> AsyncIterator[trio.MemoryReceiveChannel[Place]]:
    """The places of changes, gathered beside the test."""
    send, receive = trio.open_memory_channel[Place](1000)

    async def follow() -> None:
        async with aclosing(backend.changes()) as changes:  # type: ignore[type-var]
            async for change in changes:
                await send.send(change.place)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        with trio.fail_after(20):
            yield receive
        nursery.cancel_scope.cancel()


async def opened(double: OnedataDouble, number: int = 2) -> None:
    """Returns when that many streams have been opened since the start of the test; `connect` opens the first."""
    with trio.fail_after(10):
        while double.do("streams") < number:  # noqa: ASYNC110  what a server does sets no event here
            await trio.sleep(0.02)


async def test_changes_in_listed_directories_are_told(double: OnedataDouble) -> None:
    space = new_space(double)
    space.mkdir("folder")
    space.mkdir("unseen")

    async with connected(double, space.base) as backend:
        entries = {entry.name: entry for entry in await backend.list(Place())}
        await backend.list(at(entries["folder"]))
        async with following(backend) as changes:
            await opened(double)
            space.write("unseen/file", b"1")  # changes the times of "unseen" in the root, too
            first = await changes.receive()
            space.write("folder/file", b"1")
            places = {first.path}
            while ("folder",) not in places:
                places.add((await changes.receive()).path)

    assert places == {(), ("folder",)}


async def test_what_happens_between_two_requests_is_told_by_the_next(double: OnedataDouble) -> None:
    space = new_space(double)

    async with connected(double, space.base) as backend:
        await backend.list(Place())
        async with following(backend) as changes:
            await opened(double)
            space.write("one", b"1")
            await changes.receive()
            space.write("two", b"1")  # while nobody listens: the pause between requests
            await changes.receive()


async def test_a_stream_that_stays_silent_is_opened_anew(double: OnedataDouble) -> None:
    space = new_space(double)

    async with connected(double, space.base, request_timeout=0.5) as backend:
        await backend.list(Place())
        double.fault("events/files", "stall_body", seconds=1.5, size=5)
        async with following(backend) as changes:
            await opened(double, 3)
            space.write("one", b"1")
            place = await changes.receive()

    assert place.path == ()


async def test_a_provider_without_the_stream_is_recognised_once(double: OnedataDouble) -> None:
    space = new_space(double)
    double.do("provider", id=KRAKOW, has_events=False)
    backend = OnedataBackend(options(double, space.base))
    try:
        capabilities = await backend.connect()
        with pytest.raises(RemoteUnsupported):
            async for _ in backend.changes():
                pass
    finally:
        double.do("provider", id=KRAKOW, has_events=True)
        await backend.aclose()

    assert not capabilities.change_feed
    assert sum("events/files 404" in line for line in double.records()) == 1


def test_events_cut_anywhere_are_put_together() -> None:
    text = (
        b": hello\r\n\r\nid: 5\nevent: heartbeat\ndata: null\n\n"
        b'id: 7\nevent: deleted\ndata: {"fileId": "a",\ndata: "parentFileId": "b"}\n\nid: 9\nevent: x'
    )

    for size in (1, 2, 7, len(text)):
        listener = Listener(None)
        for start in range(0, len(text), size):
            listener.feed(text[start : start + size])
        assert (listener.parents, listener.last) == (["b"], "7")


@pytest.mark.parametrize(
    "text", [b"x" * (LINE_LIMIT + 1), b"data: 123456789\n" * (LINE_LIMIT // 9 + 1), b"event: deleted\ndata: {\n\n"]
)
def test_a_stream_that_makes_no_sense_is_an_error(text: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Listener(None).feed(text)
