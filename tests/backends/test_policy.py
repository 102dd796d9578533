"""The policy wrapper: the suite through it, and each of its rules on a clock that jumps."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbmountd.backends.base import NoTicket, Sink, heard
from nbmountd.backends.health import LOST_AFTER, TRANSITIONS, Event, HealthState
from nbmountd.backends.memory import CHUNK, EVERYTHING, Fault, MemoryBackend
from nbmountd.backends.policy import ATTEMPTS, LISTING_DEADLINES, PolicyBackend
from nbmountd.errors import (
    RemoteDenied,
    RemoteError,
    RemoteLocked,
    RemoteNotFound,
    RemoteProtocolError,
    RemoteTimeout,
    RemoteUnavailable,
    Unauthenticated,
    VersionMismatch,
)
from nbmountd.model import Attributes, Capabilities, Entry, Health, Kind, Place, Version
from tests.backends.suite import BackendSuite, BytesBody, Collector, Remote, free, pattern, read, upload
from tests.backends.test_memory import MemoryOutside

DEADLINE = 30.0
ROOT = Place()


class TestConformance(BackendSuite):
    @pytest.fixture
    async def remote(self) -> AsyncIterator[Remote]:
        inner = MemoryBackend()
        backend = PolicyBackend(inner)
        yield Remote(backend, await backend.connect(), MemoryOutside(inner.remote))
        await backend.aclose()


def wrapped(inner: MemoryBackend) -> PolicyBackend:
    return PolicyBackend(inner, deadline=DEADLINE, jitter=random.Random(1))


async def connected(
    inner: MemoryBackend | None = None, capabilities: Capabilities = EVERYTHING
) -> tuple[MemoryBackend, PolicyBackend]:
    inner = inner or MemoryBackend(capabilities=capabilities, threads=False)
    policy = wrapped(inner)
    await policy.connect()
    inner.requests.clear()
    return inner, policy


def unavailable(in_doubt: bool = False, retry_after: float | None = None) -> RemoteUnavailable:
    return RemoteUnavailable("503", in_doubt=in_doubt, retry_after=retry_after)


async def lose(inner: MemoryBackend, policy: PolicyBackend) -> None:
    """Takes the remote away and lets the policy notice."""
    inner.outage = "connection refused"
    with pytest.raises(RemoteUnavailable):
        await policy.stat(ROOT)
    assert policy.health is Health.OFFLINE
    inner.requests.clear()


# --- long listings ---


class Dripping(MemoryBackend):
    """Hears of a listing every `pause` seconds, `parts` times, and is silent for `last` seconds before it gives it."""

    def __init__(self, parts: int, pause: float, last: float = 0.0) -> None:
        super().__init__(capabilities=EVERYTHING, threads=False)
        self.parts, self.pause, self.last = parts, pause, last

    async def list(self, place: Place) -> list[Entry]:
        for _ in range(self.parts):
            await trio.sleep(self.pause)
            heard()
        await trio.sleep(self.last)
        return await super().list(place)


async def test_a_listing_goes_on_as_long_as_bytes_of_it_come(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected(Dripping(10, DEADLINE * 0.8))
    inner.remote.put("file", b"1")

    entries = await policy.list(ROOT)

    assert [entry.name for entry in entries] == ["file"]
    assert trio.current_time() == pytest.approx(8 * DEADLINE)


async def test_a_listing_that_stops_coming_ends_a_deadline_later(autojump_clock: trio.testing.MockClock) -> None:
    _, policy = await connected(Dripping(3, DEADLINE * 0.8, 10 * DEADLINE))

    with pytest.raises(RemoteTimeout):
        await policy.list(ROOT)

    assert 3.4 * DEADLINE <= trio.current_time() <= 3.8 * DEADLINE


async def test_a_listing_that_never_ends_is_ended(autojump_clock: trio.testing.MockClock) -> None:
    _, policy = await connected(Dripping(1_000_000, 1.0))

    with pytest.raises(RemoteTimeout):
        await policy.list(ROOT)

    assert trio.current_time() == pytest.approx(LISTING_DEADLINES * DEADLINE)


# --- retries ---


async def test_a_look_that_fails_for_a_moment_is_repeated(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    inner.fail("stat", unavailable(), RemoteLocked("423"), RemoteProtocolError("cut"))

    entry = await policy.stat(ROOT)

    assert entry.kind is Kind.DIRECTORY
    assert inner.count("stat") == 4
    assert 0 < trio.current_time() < 3
    assert policy.health is Health.LIVE


async def test_repeating_ends(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    inner.on("stat", lambda place: Fault(before=RemoteLocked("423")))

    with pytest.raises(RemoteLocked):
        await policy.stat(ROOT)

    assert inner.count("stat") == ATTEMPTS


async def test_a_final_error_is_not_repeated(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    inner.fail("stat", RemoteDenied("403"))

    with pytest.raises(RemoteDenied):
        await policy.stat(ROOT)
    with pytest.raises(RemoteNotFound):
        await policy.stat(free("absent"))

    assert inner.count("stat") == 2
    assert policy.health is Health.LIVE


async def test_a_change_in_doubt_is_sent_once(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    changes: dict[str, Callable[[], object]] = {
        "upload": lambda: upload(policy, free("file"), b"content"),
        "make_directory": lambda: policy.make_directory(free("folder"), Attributes()),
        "make_symlink": lambda: policy.make_symlink(free("link"), "target", Attributes()),
        "set_attributes": lambda: policy.set_attributes(free("file"), Attributes(mode=0o600), kind=Kind.FILE),
        "move": lambda: policy.move(free("file"), free("other"), kind=Kind.FILE, version=None, replaces=None),
        "remove": lambda: policy.remove(free("other"), kind=Kind.FILE, version=None),
    }

    for verb, change in changes.items():
        inner.fail(verb, Fault(after=unavailable(in_doubt=True)))
        with pytest.raises(RemoteUnavailable) as caught:
            await change()  # type: ignore[misc]
        assert caught.value.in_doubt
        assert inner.count(verb) == 1
        await policy.stat(ROOT)

    assert inner.remote.listdir() == ["folder", "link"]


async def test_a_change_that_was_not_carried_out_is_repeated_with_its_whole_body(
    autojump_clock: trio.testing.MockClock,
) -> None:
    inner, policy = await connected()
    content = pattern(CHUNK * 2 + 1)
    inner.fail("upload", unavailable(), unavailable())

    await upload(policy, free("file"), content)

    assert inner.remote.read("file") == content
    assert inner.count("upload") == 3


async def test_retry_after_is_obeyed_by_every_request(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    inner.fail("stat", unavailable(retry_after=12))
    times: list[float] = []
    inner.on("*", lambda place: times.append(trio.current_time()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(policy.stat, ROOT)
        await trio.sleep(1)
        nursery.start_soon(policy.list, ROOT)

    assert inner.count() == 3
    assert min(times) >= 12


async def test_a_retry_after_longer_than_the_deadline_is_told_at_once(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    inner.fail("stat", unavailable(retry_after=100))

    for verb in (policy.stat, policy.list):
        with pytest.raises(RemoteUnavailable) as caught:
            await verb(ROOT)
        assert caught.value.retry_after == 100

    assert trio.current_time() == 0
    assert inner.count() == 1


# --- reads that go on ---


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    size=st.integers(1, 3000),
    cuts=st.lists(st.integers(0, 1500), max_size=8),
    start_share=st.floats(0, 1),
    ranged=st.booleans(),
)
def test_a_read_that_breaks_goes_on_where_it_was(size: int, cuts: list[int], start_share: float, ranged: bool) -> None:
    """However it breaks, the sink gets each byte once, in order; only cuts that bring nothing count as failures."""

    async def main() -> None:
        inner, policy = await connected(capabilities=replace(EVERYTHING, ranged_reads=ranged))
        content = pattern(size)
        version = inner.remote.put("file", content)
        start = int(start_share * size) if ranged else 0
        inner.fail("read", *(Fault(cut=cut) for cut in cuts))
        collector = Collector()

        try:
            await policy.read(free("file"), version, start, size, collector)
        except RemoteUnavailable:
            assert content[start:].startswith(bytes(collector.content))
            assert sum(cut <= len(collector.content) for cut in cuts) >= LOST_AFTER
        else:
            assert bytes(collector.content) == content[start:]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def test_a_repeated_read_asks_only_for_the_rest(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    version = inner.remote.put("file", pattern(1000))
    inner.fail("read", Fault(cut=300), Fault(cut=500))

    assert await read(policy, free("file"), version, 0, 1000) == pattern(1000)
    assert [(request.start, request.stop) for request in inner.requests] == [(0, 1000), (300, 1000), (800, 1000)]


async def test_a_read_of_any_version_is_not_glued_together(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    inner.remote.put("file", pattern(1000))
    inner.fail("read", Fault(cut=300))

    with pytest.raises(RemoteUnavailable):
        await read(policy, free("file"), None, 0, 1000)

    assert inner.count("read") == 1


async def test_a_read_whose_file_changes_in_the_pause_ends_with_mismatch(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    version = inner.remote.put("file", b"a" * 1000)
    inner.fail("read", Fault(cut=300))
    collector = Collector()

    async with trio.open_nursery() as nursery:

        async def change() -> None:
            while inner.busy == 0 and inner.count("read") == 0:
                await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked()
            inner.remote.put("file", b"b" * 1000)

        nursery.start_soon(change)
        with pytest.raises(VersionMismatch):
            await policy.read(free("file"), version, 0, 1000, collector)

    assert bytes(collector.content) == b"a" * 300


# --- deadlines ---


async def test_no_answer_is_a_timeout_after_the_deadline(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    inner.on("stat", lambda place: Fault(wait_for=trio.Event()))

    with pytest.raises(RemoteTimeout) as caught:
        await policy.stat(ROOT)

    assert trio.current_time() == DEADLINE
    assert not caught.value.in_doubt


async def test_a_change_without_an_answer_is_in_doubt(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    inner.fail("make_directory", Fault(wait_for=trio.Event()))

    with pytest.raises(RemoteTimeout) as caught:
        await policy.make_directory(free("folder"), Attributes())

    assert caught.value.in_doubt
    assert inner.count("make_directory") == 1


class SlowBackend(MemoryBackend):
    """Gives a read byte for byte, with `pause` seconds before each."""

    pause = 20.0

    async def read(self, place: Place, version: Version | None, start: int, stop: int, sink: Sink) -> None:
        for byte in self.remote["file"].content[start:stop]:
            await trio.sleep(self.pause)
            sink(memoryview(bytes([byte])))


async def test_a_slow_read_that_gets_on_is_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    inner = SlowBackend()
    inner.remote.put("file", b"0123456789")
    _, policy = await connected(inner)

    assert await read(policy, free("file"), None, 0, 10) == b"0123456789"
    assert trio.current_time() == 10 * SlowBackend.pause


class RereadingBackend(SlowBackend):
    """Always begins at the first byte, and breaks before the last the first time."""

    broken = False

    async def read(self, place: Place, version: Version | None, start: int, stop: int, sink: Sink) -> None:
        assert start == 0
        end = stop if self.broken else stop - 1
        await super().read(place, version, 0, end, sink)
        if not self.broken:
            self.broken = True
            raise RemoteUnavailable("broken")


async def test_reading_again_what_is_there_already_counts_as_getting_on(autojump_clock: trio.testing.MockClock) -> None:
    inner = RereadingBackend(capabilities=replace(EVERYTHING, ranged_reads=False))
    version = inner.remote.put("file", b"0123456789")
    _, policy = await connected(inner)

    assert await read(policy, free("file"), version, 0, 10) == b"0123456789"


async def test_time_in_which_our_own_body_is_slow_does_not_count() -> None:
    inner = MemoryBackend()
    policy = PolicyBackend(inner, deadline=0.05)
    await policy.connect()

    await policy.upload(
        free("file"),
        BytesBody(b"content", lambda position: time.sleep(0.2)),
        replaces=None,
        attributes=Attributes(),
        ticket=NoTicket(),
    )

    assert inner.remote.read("file") == b"content"


async def test_a_read_that_stands_still_is_ended_and_goes_on_elsewhere(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    version = inner.remote.put("file", pattern(1000))
    inner.fail("read", Fault(stall=(300, trio.Event())))

    assert await read(policy, free("file"), version, 0, 1000) == pattern(1000)
    assert DEADLINE <= trio.current_time() <= 1.5 * DEADLINE
    assert inner.count("read") == 2


async def test_an_upload_that_stands_still_is_ended_in_doubt(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    inner.fail("upload", Fault(stall=(300, trio.Event())))

    with pytest.raises(RemoteTimeout) as caught:
        await upload(policy, free("file"), pattern(1000))

    assert caught.value.in_doubt
    assert trio.current_time() <= 1.5 * DEADLINE
    assert inner.count("upload") == 1


async def test_a_cancelled_verb_gives_its_connection_back(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected(capabilities=replace(EVERYTHING, connections=2))
    inner.fail("stat", *(Fault(wait_for=trio.Event()) for _ in range(10)))

    for _ in range(10):
        with trio.move_on_after(1):
            await policy.stat(ROOT)

    assert (await policy.stat(ROOT)).kind is Kind.DIRECTORY
    assert inner.busy == 0


# --- connections ---


@pytest.mark.parametrize("connections", [2, 3, 8])
async def test_no_more_requests_at_once_than_connections(
    autojump_clock: trio.testing.MockClock, connections: int
) -> None:
    inner, policy = await connected(capabilities=replace(EVERYTHING, connections=connections))
    gate = trio.Event()
    inner.on("*", lambda place: Fault(wait_for=gate))

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(policy.stat, ROOT)
            nursery.start_soon(upload, policy, free(f"file{number}"), b"content")
        await trio.testing.wait_all_tasks_blocked()
        assert inner.busy == connections
        gate.set()

    assert inner.peak == connections
    assert len(inner.remote.listdir()) == 20


@pytest.mark.parametrize("connections", [1, 2, 8])
async def test_uploads_leave_room_for_reads_and_reads_for_uploads(
    autojump_clock: trio.testing.MockClock, connections: int
) -> None:
    inner, policy = await connected(capabilities=replace(EVERYTHING, connections=connections))

    for blocked, free_verb in [("upload", "stat"), ("stat", "upload")]:
        gate = trio.Event()
        inner.on(blocked, lambda place, gate=gate: Fault(wait_for=gate))  # type: ignore[misc]
        inner.on(free_verb, None)
        calls = {
            "upload": lambda number: upload(policy, free(f"file{number}"), b"content"),
            "stat": lambda number: policy.stat(ROOT),
        }
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(calls[blocked], number)
            await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(1):
                await calls[free_verb](100)
            gate.set()


async def test_a_body_may_read_through_the_policy_even_on_one_connection() -> None:
    inner = MemoryBackend(capabilities=replace(EVERYTHING, connections=1))
    policy = PolicyBackend(inner)
    await policy.connect()
    version = inner.remote.put("base", b"from the base")

    class FetchingBody(BytesBody):
        def read(self, count: int = -1, /) -> bytes:
            part = super().read(count)
            return trio.from_thread.run(read, policy, free("base"), version, 0, len(part)) if part else b""

    with trio.fail_after(5):
        await policy.upload(
            free("copy"),
            FetchingBody(b"x" * 13),
            replaces=None,
            attributes=Attributes(),
            ticket=NoTicket(),
        )

    assert inner.remote.read("copy") == b"from the base"


# --- health ---


async def test_before_the_first_answer_it_is_offline_and_sends_nothing(autojump_clock: trio.testing.MockClock) -> None:
    inner = MemoryBackend(threads=False)
    policy = wrapped(inner)

    with pytest.raises(RemoteUnavailable):
        await policy.stat(ROOT)

    health = [policy.health]
    assert inner.count() == 0
    assert await policy.connect() == EVERYTHING == policy.capabilities
    assert [*health, policy.health] == [Health.OFFLINE, Health.LIVE]
    assert policy.health_reason == ""


async def test_offline_fails_at_once_and_says_why(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    await lose(inner, policy)
    before = trio.current_time()

    for _ in range(20):
        with pytest.raises(RemoteUnavailable, match="connection refused") as caught:
            await upload(policy, free("file"), b"content")
        assert not caught.value.in_doubt

    assert trio.current_time() == before
    assert inner.count() == 0
    assert "connection refused" in policy.health_reason


async def test_who_waits_for_a_connection_learns_at_once_that_there_is_no_remote(
    autojump_clock: trio.testing.MockClock,
) -> None:
    inner, policy = await connected(capabilities=replace(EVERYTHING, connections=3))
    inner.on("stat", lambda place: Fault(wait_for=trio.Event()))
    inner.on("upload", lambda place: Fault(before=unavailable()))
    ended: list[float] = []

    async def wait_in_line() -> None:
        with pytest.raises(RemoteUnavailable):
            await policy.list(ROOT)
        ended.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(policy.stat, ROOT)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(5):
            nursery.start_soon(wait_in_line)
        with pytest.raises(RemoteUnavailable):
            await upload(policy, free("file"), b"")
        await trio.testing.wait_all_tasks_blocked()
        assert len(ended) == 5
        nursery.cancel_scope.cancel()

    assert policy.health is Health.OFFLINE
    assert max(ended) < 5


@pytest.mark.parametrize("black_hole", [False, True], ids=["refused", "black hole"])
@pytest.mark.parametrize("away_for", [0.0, 3.3, 61.7, 3600.5])
async def test_a_remote_that_is_back_is_noticed_within_10_seconds(
    autojump_clock: trio.testing.MockClock, black_hole: bool, away_for: float
) -> None:
    inner, policy = await connected()
    probes_at_once: list[int] = []

    def fault(place: Place) -> Fault:
        probes_at_once.append(inner.busy + 1)
        return Fault(wait_for=trio.Event())

    async with trio.open_nursery() as nursery:
        await lose(inner, policy)
        if black_hole:
            inner.outage = None
            inner.on("connect", fault)
        nursery.start_soon(policy.run)
        await trio.sleep(away_for)
        inner.outage = None
        inner.on("connect", None)
        back_at = trio.current_time()
        while policy.health is not Health.LIVE:
            await policy.wait_health_change()
        assert trio.current_time() - back_at <= 10
        assert (await policy.stat(ROOT)).kind is Kind.DIRECTORY
        nursery.cancel_scope.cancel()

    assert set(probes_at_once) <= {1}


async def test_a_refused_credential_is_sent_once(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    inner.on("*", lambda place: Fault(before=Unauthenticated("401")))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(policy.run)
        for _ in range(5):
            with pytest.raises(Unauthenticated):
                await policy.stat(ROOT)
            with pytest.raises(Unauthenticated):
                await policy.connect()
            await trio.sleep(100)
        nursery.cancel_scope.cancel()

    assert inner.count() == 1
    assert policy.health is Health.UNAUTHENTICATED


async def test_another_credential_is_tried_once_and_soon(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    inner.on("*", lambda place: Fault(before=Unauthenticated("401")))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(policy.run)
        with pytest.raises(Unauthenticated):
            await policy.stat(ROOT)
        await trio.sleep(100)
        policy.credential_changed()
        await trio.sleep(100)
        assert inner.count() == 2  # also wrong: once
        inner.on("*", None)
        policy.credential_changed()
        with trio.fail_after(5):
            while policy.health is not Health.LIVE:
                await policy.wait_health_change()
        await policy.stat(ROOT)
        nursery.cancel_scope.cancel()


async def test_the_credential_source_is_asked_for_another_one(autojump_clock: trio.testing.MockClock) -> None:
    inner = MemoryBackend(threads=False)
    fingerprint = ["first"]
    policy = PolicyBackend(inner, credential=lambda: fingerprint[0], jitter=random.Random(1))
    inner.on("*", lambda place: Fault(before=Unauthenticated("401")) if fingerprint[0] == "first" else None)

    async with trio.open_nursery() as nursery:
        with pytest.raises(Unauthenticated):
            await policy.connect()
        nursery.start_soon(policy.run)
        await trio.sleep(100)
        assert inner.count() == 1
        fingerprint[0] = "second"
        with trio.fail_after(10):
            while policy.health is not Health.LIVE:
                await policy.wait_health_change()
        nursery.cancel_scope.cancel()


async def test_a_credential_that_came_while_another_was_being_refused_is_tried(autojump_clock: trio.testing.MockClock) -> None:
    """Else a token file that is replaced in just that moment would wait for its next rotation, an hour later."""
    inner = MemoryBackend(threads=False)
    fingerprint, gate = ["first"], trio.Event()
    policy = PolicyBackend(inner, credential=lambda: fingerprint[0], jitter=random.Random(1))
    inner.fail("*", Fault(wait_for=gate, before=Unauthenticated("401")))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(policy.run)
        await trio.testing.wait_all_tasks_blocked()
        fingerprint[0] = "second"
        gate.set()
        with trio.fail_after(10):
            while policy.health is not Health.LIVE:
                await policy.wait_health_change()
        nursery.cancel_scope.cancel()


async def test_a_call_whose_credential_was_replaced_meanwhile_is_made_again_with_the_new_one(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Nobody told of the new one, and neither the mount nor the program hears of the refusal."""
    inner = MemoryBackend(threads=False)
    fingerprint, gate = ["first"], trio.Event()
    policy = PolicyBackend(inner, credential=lambda: fingerprint[0], jitter=random.Random(1))
    await policy.connect()
    inner.fail("make_directory", Fault(wait_for=gate, before=Unauthenticated("401")))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(policy.make_directory, free("folder"), Attributes())
        await trio.testing.wait_all_tasks_blocked()
        fingerprint[0] = "second"
        gate.set()

    assert inner.remote.listdir() == ["folder"]
    assert policy.health is Health.LIVE


async def test_the_refusal_of_an_old_credential_is_no_refusal_of_the_new(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    gate = trio.Event()
    inner.fail("make_directory", Fault(wait_for=gate, before=Unauthenticated("401")))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(policy.make_directory, free("folder"), Attributes())
        await trio.testing.wait_all_tasks_blocked()
        policy.credential_changed()
        gate.set()

    assert inner.remote.listdir() == ["folder"]
    assert policy.health is Health.LIVE


async def test_troubles_with_answers_between_are_degraded_not_offline(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    seen: list[Health] = []

    async def watch() -> None:
        while True:
            seen.append(await policy.wait_health_change())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(5):
            inner.fail("stat", unavailable())
            await policy.stat(ROOT)
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    assert seen == [Health.DEGRADED, Health.LIVE] * 5


async def test_our_own_sink_and_body_say_nothing_of_the_remote(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    version = inner.remote.put("file", pattern(10))

    def fail(position: int) -> None:
        raise Unauthenticated("of another remote")

    with pytest.raises(Unauthenticated):
        await policy.read(free("file"), version, 0, 10, Collector(fail))
    with pytest.raises(Unauthenticated):
        await policy.upload(
            free("new"), BytesBody(b"1", fail), replaces=None, attributes=Attributes(), ticket=NoTicket()
        )

    assert policy.health is Health.LIVE
    assert inner.counts() == {"read": 1, "upload": 1}


async def test_a_connection_that_is_denied_is_not_live(autojump_clock: trio.testing.MockClock) -> None:
    inner = MemoryBackend(threads=False)
    policy = wrapped(inner)
    inner.fail("connect", RemoteDenied("no such space"))

    with pytest.raises(RemoteDenied):
        await policy.connect()

    assert policy.health is Health.OFFLINE
    assert policy.health_reason == "no such space"


async def test_a_change_of_health_is_logged_once(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nbmountd.backends.policy")
    inner, policy = await connected()
    caplog.clear()
    await lose(inner, policy)
    for _ in range(5):
        with pytest.raises(RemoteUnavailable):
            await policy.stat(ROOT)

    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "the remote is degraded",
        "the remote is offline",
    ]


async def test_statistics_count_calls_errors_retries_and_bytes(autojump_clock: trio.testing.MockClock) -> None:
    inner, policy = await connected()
    version = (await upload(policy, free("file"), pattern(1000))).version
    inner.fail("read", Fault(cut=300))
    await read(policy, free("file"), version, 0, 1000)
    with pytest.raises(RemoteNotFound):
        await policy.stat(free("absent"))

    told = policy.statistics()

    assert (told["upload"].count, told["upload"].bytes) == (1, 1000)
    assert (told["read"].count, told["read"].errors, told["read"].retries, told["read"].bytes) == (1, 0, 1, 1000)
    assert (told["stat"].count, told["stat"].errors) == (1, 1)


def test_the_table_names_every_state_and_event() -> None:
    assert set(TRANSITIONS) == set(Health)
    assert all(set(row) == set(Event) for row in TRANSITIONS.values())


@given(
    st.lists(
        st.sampled_from(
            [None, unavailable(), RemoteTimeout("t"), Unauthenticated("401"), RemoteNotFound("404"), "credential"]
        )
    )
)
def test_health_always_has_a_reason_and_moves_its_date_only_when_it_changes(
    events: list[RemoteError | str | None],
) -> None:
    now = [0.0]
    state = HealthState(lambda: now[0])

    for event in events:
        now[0] += 1
        before = (state.health, state.since)
        if isinstance(event, str):
            state.apply(Event.CREDENTIAL, "new credential")
        else:
            state.note(event)
        assert (state.reason == "") == (state.health is Health.LIVE)
        assert state.since == (before[1] if state.health is before[0] else now[0])
        if before[0] is Health.UNAUTHENTICATED and not isinstance(event, str):
            assert state.health is Health.UNAUTHENTICATED
