"""Any backend made patient and polite: deadlines, retries, a limit on connections, health, statistics.

It knows nothing of what the requests mean beyond whether they change something. The rules:

- Deadlines: a verb without a body must end within `deadline` seconds; for reads, uploads and listings that long without a
  byte is too long. Time in which we ourselves (sink, body) are slow does not count. A listing has a limit as a whole, too.
- Retries: what changes nothing, and what was surely not carried out. A change `in_doubt` is never sent twice. A read that
  is repeated goes on where it was. Pauses are exponential with full jitter; Retry-After counts for every request.
- Connections: at most `capabilities.connections`, of which uploads cannot take all, nor reads: each can always go on. How
  many changes at once are good for the remote is found out (parallel.py).
- Health: offline and unauthenticated fail at once instead of after a deadline. `run()` alone looks for the end of it, with
  one probe (`connect`) at a time.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import trio

from nbmountd.backends.base import Backend, Body, Change, Piece, Sink, Telling, Ticket, listening
from nbmountd.backends.health import Event, HealthState
from nbmountd.backends.hygiene import fit, fit_entries
from nbmountd.backends.parallel import Parallel
from nbmountd.errors import RemoteError, RemoteTimeout, RemoteUnavailable, RemoteUnsupported, Unauthenticated
from nbmountd.model import Attributes, Capabilities, Entry, Health, Kind, Place, Quota, Version

logger = logging.getLogger(__name__)

T = TypeVar("T")
Listing = list[Entry]

ATTEMPTS = 4
FIRST_PAUSE = 0.25
LONGEST_PAUSE = 8.0
LONGEST_OBEYED_WAIT = 300.0
"""Of a Retry-After: a wrong or hostile one must not stop a mount for a year."""
ANSWER_BYTES_PER_SECOND = 10_000_000
"""After the last byte of an upload a server may still assemble, hash and copy it: so much longer it may take. A guess."""
LISTING_DEADLINES = 20
"""So many deadlines a listing may take while bytes of it come: 10 minutes by default. A guess; it is what a server can cost
that sends one byte after the other without end."""
LOOKS_AT_ONCE = 8
"""Reads and questions: few large ones are as fast as many."""
SMALL = 256 * 1024
"""Bytes up to which an upload says something of what a request costs, and not of the line."""
PROBE_DEADLINE = 6.0
PROBE_PAUSE = 3.0
"""Deadline and pause together keep the promise that a remote that is back is noticed within 10 s, also when a probe
hangs in a black hole. A remote that needs longer than that to connect stays offline until somebody calls `connect`."""


@dataclass(frozen=True, slots=True)
class VerbStatistics:
    count: int = 0
    """Calls that ended, however."""
    errors: int = 0
    """Calls that ended with a RemoteError."""
    retries: int = 0
    bytes: int = 0
    """Content bytes that went over, also in calls that failed later."""
    seconds: float = 0.0
    """Time spent in them all, with waiting."""


@dataclass
class _Progress:
    """What went by in one call, noted by a worker thread and looked at by the loop."""

    bytes: int = 0
    """In all attempts together."""
    sent: int = 0
    """Of a body, in this attempt."""
    size: int = 0
    """All that a body has to give."""
    work: int = 0
    """Bytes that the remote may have to handle when it has been sent all."""
    moves: int = 0
    """Grows whenever anything happens."""
    in_ours: bool = False
    """A sink or body of ours is being waited for, not the remote."""
    error: BaseException | None = None
    """What our sink or body raised in this attempt: it says nothing of the remote."""

    def start_attempt(self) -> None:
        self.sent, self.error = 0, None

    def ours(self, call: Callable[[], T]) -> T:
        self.moves += 1
        self.in_ours = True
        try:
            return call()
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.in_ours = False
            self.moves += 1

    def took(self, count: int) -> None:
        self.bytes += count
        self.sent += count


@dataclass
class _Call:
    """One call of a verb, over all its attempts."""

    verb: str
    changes: bool
    began: float
    progress: _Progress = field(default_factory=_Progress)
    failures: int = 0
    """Attempts that failed since it last got on."""
    got_on: float = 0.0
    """When it last got on; 0 before."""
    retries: int = 0


class PolicyBackend:
    """A backend around `backend`; the same contract, and the state of the remote.

    `deadline` is in seconds. `credential`, if given, returns something that is equal as long as the credential is the
    same (never the credential itself); it is asked while unauthenticated. `run` must run for offline to end by itself.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        deadline: float = 30.0,
        credential: Callable[[], object] | None = None,
        jitter: random.Random | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._backend = backend
        self._deadline = deadline
        self._credential = credential
        self._refused_credential: object = None
        self._generation = 0
        self._jitter = jitter or random.Random()
        self._state = HealthState(wall_clock)
        self._capabilities = Capabilities()
        self._not_before = 0.0
        self._connecting = trio.Lock()
        self._asked = trio.Event()
        """Set when the first `connect` has ended, however: until then nobody knows, so verbs wait for it."""
        self._look_now = trio.Event()
        self._statistics: dict[str, VerbStatistics] = {}
        self._waiting: set[trio.CancelScope] = set()
        self._everything = trio.CapacityLimiter(2)
        self._looks = trio.CapacityLimiter(1)
        self._changes = trio.CapacityLimiter(1)
        self._parallel = Parallel(1)
        self._share_connections()

    # --- what is known of the remote ---

    @property
    def capabilities(self) -> Capabilities:
        """As of the last `connect`; the defaults before it."""
        return self._capabilities

    @property
    def health(self) -> Health:
        return self._state.health

    @property
    def health_reason(self) -> str:
        """Why it is not live, for a person; "" when it is."""
        return self._state.reason

    @property
    def asked(self) -> bool:
        """Whether the remote, or the way to it, has ever been heard of."""
        return self._state.asked

    @property
    def health_since(self) -> float:
        """Seconds since 1970."""
        return self._state.since

    async def wait_health_change(self) -> Health:
        """The new health, at its next change. Look at `health` first: what changed before is not waited for."""
        return await self._state.wait_change()

    def statistics(self) -> dict[str, VerbStatistics]:
        """What each verb did so far."""
        return dict(self._statistics)

    def credential_changed(self) -> None:
        """There is another credential: it is tried once, soon, if the last one was refused."""
        self._generation += 1
        if self.health is Health.UNAUTHENTICATED:
            self._state.apply(Event.CREDENTIAL, "there is a new credential, not tried yet")
        self._look_now.set()

    async def run(self) -> None:
        """Looks for the remote while it is offline, and for another credential while unauthenticated. Never returns."""
        while True:
            self._look_now = trio.Event()
            if self.health is Health.UNAUTHENTICATED:
                self._notice_another_credential()
            if self.health is Health.OFFLINE:
                try:
                    await self._connect(min(PROBE_DEADLINE, self._deadline))
                except RemoteError as error:
                    logger.debug("still %s: %s", self.health.value, error)
            if self.health in (Health.LIVE, Health.DEGRADED):
                await self.wait_health_change()
                continue
            with trio.move_on_after(max(self._jitter.uniform(0.5, 1) * PROBE_PAUSE, self._wait_wanted())):
                await self._look_now.wait()

    # --- the contract ---

    async def connect(self) -> Capabilities:
        """Asks anew, also when offline; only a refused credential is not sent again."""
        return await self._connect(self._deadline)

    async def stat(self, place: Place) -> Entry:
        return fit(await self._look("stat", partial(self._backend.stat, place)))

    async def list(self, place: Place) -> Listing:
        call = _Call("list", changes=False, began=trio.current_time())

        def noted() -> None:
            call.progress.moves += 1

        async def attempt() -> Listing:
            with listening(noted):
                return await self._backend.list(place)

        watched = partial(self._with_progress, call, attempt)
        attempt_within = partial(self._within, LISTING_DEADLINES * self._deadline, call, watched)
        return fit_entries(await self._repeat(call, attempt_within), place)

    async def quota(self) -> Quota:
        return await self._look("quota", self._backend.quota)

    async def read(self, place: Place, version: Version | None, start: int, stop: int, sink: Sink) -> None:
        call = _Call("read", changes=False, began=trio.current_time())
        progress = call.progress
        skip = 0

        def take(view: memoryview) -> None:
            nonlocal skip
            wanted = view[min(skip, len(view)) :]
            skip -= len(view) - len(wanted)
            progress.moves += 1
            if wanted:
                progress.ours(lambda: sink(wanted))
                progress.took(len(wanted))

        async def attempt() -> None:
            nonlocal skip
            begin = start + progress.bytes
            if not self._capabilities.ranged_reads:
                begin, skip = start, progress.bytes
            if progress.bytes < stop - start or stop == start:
                await self._backend.read(place, version, begin, stop, take)

        def may_resume() -> bool:
            return version is not None or progress.bytes == 0  # else bytes of two versions might meet

        await self._repeat(call, partial(self._with_progress, call, attempt), may_resume)

    async def upload(
        self, place: Place, body: Body, *, replaces: Version | None, attributes: Attributes, ticket: Ticket
    ) -> Entry:
        call = _Call("upload", changes=True, began=trio.current_time())
        watched = _WatchedBody(body, call.progress)
        first = True

        async def attempt() -> Entry:
            nonlocal first
            if not first:
                body.rewind()
            first = False
            return await self._backend.upload(
                place, watched, replaces=replaces, attributes=attributes, ticket=ticket
            )

        return fit(await self._repeat(call, partial(self._with_progress, call, attempt)))

    async def write_ranges(
        self, place: Place, pieces: Sequence[Piece], size: int, *, replaces: Version, attributes: Attributes
    ) -> Entry:
        call = _Call("write_ranges", changes=True, began=trio.current_time())
        call.progress.work = size  # it may have to copy the rest of the file, even before it takes the first byte
        watched = [replace(piece, read=partial(_read_piece, piece, call.progress)) for piece in pieces]
        attempt = partial(
            self._backend.write_ranges, place, watched, size, replaces=replaces, attributes=attributes
        )
        return fit(await self._repeat(call, partial(self._with_progress, call, attempt)))

    async def make_directory(self, place: Place, attributes: Attributes) -> Entry:
        return fit(await self._change("make_directory", partial(self._backend.make_directory, place, attributes)))

    async def make_symlink(self, place: Place, target: str, attributes: Attributes) -> Entry:
        return fit(await self._change("make_symlink", partial(self._backend.make_symlink, place, target, attributes)))

    async def move(
        self, source: Place, target: Place, *, kind: Kind, version: Version | None, replaces: Version | None
    ) -> Entry:
        moving = partial(self._backend.move, source, target, kind=kind, version=version, replaces=replaces)
        return fit(await self._change("move", moving))

    async def remove(self, place: Place, *, kind: Kind, version: Version | None) -> None:
        await self._change("remove", partial(self._backend.remove, place, kind=kind, version=version))

    async def set_attributes(self, place: Place, attributes: Attributes, *, kind: Kind) -> Entry:
        setting = partial(self._backend.set_attributes, place, attributes, kind=kind)
        return fit(await self._change("set_attributes", setting))

    async def tell(self, place: Place, name: str) -> bytes:
        if not isinstance(self._backend, Telling):
            raise RemoteUnsupported("this remote has nothing to tell beside the file")
        return await self._look("tell", partial(self._backend.tell, place, name))

    async def describe(self, place: Place) -> Mapping[str, str]:
        """What the backend tells a person of the object; from one that tells nothing special, the details of its entry."""
        if isinstance(self._backend, Telling):
            return await self._look("describe", partial(self._backend.describe, place))
        return (await self.stat(place)).details

    def changes(self) -> AsyncIterator[Change]:
        """The backend's own feed: no deadline, no retry, no connection counted."""
        return self._backend.changes()

    async def aclose(self) -> None:
        await self._backend.aclose()

    # --- one attempt ---

    async def _connect(self, deadline: float) -> Capabilities:
        async with self._connecting:
            if self.health is Health.UNAUTHENTICATED:
                self._notice_another_credential()
            if self.health is Health.UNAUTHENTICATED:
                raise _Refused(self.health_reason)
            call = _Call("connect", changes=False, began=trio.current_time())
            generation, tried = self._generation, self._fingerprint()
            try:
                capabilities = await self._within(deadline, call, self._backend.connect)
            except RemoteError as error:
                self._count(call, failed=True)
                self._note(error, generation, tried, failed_connection=True)
                raise
            finally:
                self._asked.set()
            self._count(call, failed=False)
            self._capabilities = capabilities
            self._share_connections()
            self._note(None, generation, tried)
            return capabilities

    async def _look(self, verb: str, attempt: Callable[[], Awaitable[T]]) -> T:
        call = _Call(verb, changes=False, began=trio.current_time())
        return await self._repeat(call, partial(self._within, self._deadline, call, attempt))

    async def _change(self, verb: str, attempt: Callable[[], Awaitable[T]]) -> T:
        call = _Call(verb, changes=True, began=trio.current_time())
        return await self._repeat(call, partial(self._within, self._deadline, call, attempt))

    async def _within(self, seconds: float, call: _Call, attempt: Callable[[], Awaitable[T]]) -> T:
        with trio.move_on_after(seconds):
            return await attempt()
        raise RemoteTimeout(f"{call.verb}: no answer in {seconds:g} s", in_doubt=call.changes)

    async def _with_progress(self, call: _Call, attempt: Callable[[], Awaitable[T]]) -> T:
        """What `attempt` returns or raises; RemoteTimeout when no byte went by for the deadline."""
        results: list[T] = []
        failure: Exception | None = None
        call.progress.start_attempt()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_stalled, call.progress, nursery.cancel_scope)
            try:
                results.append(await attempt())
            except Exception as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if results:
            return results[0]
        raise RemoteTimeout(f"{call.verb}: no byte in {self._deadline:g} s", in_doubt=call.changes)

    async def _cancel_when_stalled(self, progress: _Progress, scope: trio.CancelScope) -> None:
        seen, at = progress.moves, trio.current_time()
        while True:
            all_sent = progress.sent >= progress.size
            patience = self._deadline + (progress.work / ANSWER_BYTES_PER_SECOND if all_sent else 0)
            await trio.sleep(self._deadline / 8)
            if progress.moves != seen or progress.in_ours:
                seen, at = progress.moves, trio.current_time()
            elif trio.current_time() - at >= patience:
                scope.cancel()
                return

    # --- all attempts ---

    async def _repeat(
        self, call: _Call, attempt: Callable[[], Awaitable[T]], may_repeat: Callable[[], bool] = lambda: True
    ) -> T:
        failed = True
        try:
            while True:
                bytes_before = call.progress.bytes
                generation, tried = self._generation, self._fingerprint()
                try:
                    async with self._connection(changes=call.changes):
                        self._refuse_if_away()
                        self._refuse_if_asked_to_wait()
                        began = trio.current_time()
                        result = await attempt()
                        self._answered(call, trio.current_time() - began)
                except RemoteError as error:
                    if call.progress.error is not None:
                        raise
                    self._note(error, generation, tried)
                    if call.progress.bytes > bytes_before and not call.changes:
                        call.failures, call.got_on = 0, trio.current_time()  # in pieces, but it comes
                    call.failures += 1
                    pause = self._pause(call, error, generation)
                    if pause is None or not may_repeat():
                        raise
                    logger.debug("%s: %s; again in %.2f s", call.verb, error, pause)
                    await self._unless_down(partial(trio.sleep, pause))
                    call.retries += 1
                else:
                    self._note(None, generation, tried)
                    failed = False
                    return result
        finally:
            self._count(call, failed=failed)

    def _pause(self, call: _Call, error: RemoteError, generation: int) -> float | None:
        """Seconds to wait before another attempt, or None if there is to be none."""
        if isinstance(error, Unauthenticated):
            another = generation != self._generation and call.failures == 1
            return 0.0 if another else None
        if not error.transient or (call.changes and error.in_doubt) or call.failures >= ATTEMPTS:
            return None
        if self.health in (Health.OFFLINE, Health.UNAUTHENTICATED):
            return None
        ceiling = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (call.failures - 1))
        pause = max(self._jitter.uniform(0, ceiling), self._wait_wanted())
        waited = trio.current_time() - max(call.began, call.got_on)
        return pause if waited + pause <= self._deadline else None

    def _refuse_if_away(self) -> None:
        """Raises at once what would else be found out after a deadline, or with a locked account."""
        if self.health is Health.UNAUTHENTICATED:
            self._notice_another_credential()
        if self.health is Health.UNAUTHENTICATED:
            raise _Refused(self.health_reason)
        if self.health is Health.OFFLINE:
            raise _Down(self.health_reason, retry_after=PROBE_PAUSE)

    def _refuse_if_asked_to_wait(self) -> None:
        wait = self._wait_wanted()
        if wait > 0:
            raise _Down("the remote asked us to wait", retry_after=wait)

    def _wait_wanted(self) -> float:
        return max(0.0, self._not_before - trio.current_time())

    def _note(
        self, error: RemoteError | None, generation: int, tried: object, *, failed_connection: bool = False
    ) -> None:
        """`tried`: the credential's fingerprint when the attempt began. One that came since was not refused."""
        if isinstance(error, (_Down, _Refused)):
            return  # nothing was sent
        if isinstance(error, RemoteUnavailable):
            self._parallel.complained()
            self._changes.total_tokens = self._parallel.limit
        if isinstance(error, RemoteUnavailable) and error.retry_after is not None:
            wait = min(error.retry_after, LONGEST_OBEYED_WAIT)
            self._not_before = max(self._not_before, trio.current_time() + wait)
        if isinstance(error, Unauthenticated):
            if generation == self._generation and self._fingerprint() != tried:
                self.credential_changed()
            if generation != self._generation:
                return  # it was the old credential that was refused
            self._refused_credential = tried
        before = self.health
        self._state.note(error)
        if failed_connection and not isinstance(error, Unauthenticated):
            self._state.apply(Event.LOST, str(error))
        if self.health is before:
            return
        if self.health in (Health.OFFLINE, Health.UNAUTHENTICATED):
            for scope in self._waiting:
                scope.cancel()
        level = logging.INFO if self.health is Health.LIVE else logging.WARNING
        logger.log(level, "the remote is %s (was %s) %s", self.health.value, before.value, self.health_reason)

    def _fingerprint(self) -> object:
        return None if self._credential is None else self._credential()

    def _notice_another_credential(self) -> None:
        if self._fingerprint() != self._refused_credential:
            self.credential_changed()

    # --- connections and counting ---

    def _share_connections(self) -> None:
        """An upload may have to read while it holds its connection: so even of one connection we make two."""
        total = max(2, self._capabilities.connections)
        self._everything.total_tokens = total
        self._looks.total_tokens = min(total - 1, LOOKS_AT_ONCE)
        self._parallel.allow(max(1, total - max(1, total // 4)))
        self._changes.total_tokens = self._parallel.limit

    def _answered(self, call: _Call, seconds: float) -> None:
        if call.changes and call.progress.bytes <= SMALL:
            self._parallel.answered(call.verb, seconds, wanted=self._changes.statistics().tasks_waiting > 0)
            self._changes.total_tokens = self._parallel.limit

    @asynccontextmanager
    async def _connection(self, *, changes: bool) -> AsyncIterator[None]:
        # A body that reads through us runs in the task of its upload, so the borrower is not the task.
        borrower = object()
        share = self._changes if changes else self._looks
        await self._unless_down(partial(share.acquire_on_behalf_of, borrower))
        try:
            await self._unless_down(partial(self._everything.acquire_on_behalf_of, borrower))
            try:
                yield
            finally:
                self._everything.release_on_behalf_of(borrower)
        finally:
            share.release_on_behalf_of(borrower)

    async def _unless_down(self, wait: Callable[[], Awaitable[object]]) -> None:
        """Returns when `wait()` has; raises instead as soon as the remote is known to be away."""
        if self._connecting.locked():
            await self._asked.wait()
        while True:
            self._refuse_if_away()
            with trio.CancelScope() as scope:
                self._waiting.add(scope)
                try:
                    await wait()
                    return
                finally:
                    self._waiting.discard(scope)

    def _count(self, call: _Call, *, failed: bool) -> None:
        old = self._statistics.get(call.verb, VerbStatistics())
        self._statistics[call.verb] = VerbStatistics(
            count=old.count + 1,
            errors=old.errors + failed,
            retries=old.retries + call.retries,
            bytes=old.bytes + call.progress.bytes,
            seconds=old.seconds + trio.current_time() - call.began,
        )


class _Down(RemoteUnavailable):
    """Not sent, because the remote is known to be away."""


class _Refused(Unauthenticated):
    """Not sent, because the credential is known to be refused."""


class _WatchedBody:
    """A body that tells `progress` what it gave."""

    def __init__(self, body: Body, progress: _Progress) -> None:
        self._body = body
        self._progress = progress
        self.size = progress.size = progress.work = body.size

    def read(self, count: int = -1, /) -> bytes:
        part = self._progress.ours(lambda: self._body.read(count))
        self._progress.took(len(part))
        return part

    def rewind(self) -> None:
        self._progress.sent = 0
        self._body.rewind()


def _read_piece(piece: Piece, progress: _Progress, offset: int, count: int) -> bytes:
    part = progress.ours(lambda: piece.read(offset, count))
    progress.took(len(part))
    return part
