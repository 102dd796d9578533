"""How a remote is doing: one table of states and events, and the consecutive troubles that lead from one to the next.

It knows nothing of verbs, tasks or time limits; `policy.py` tells it what happened. `since` is wall-clock time.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable

import trio

from nbmountd.errors import RemoteError, RemoteProtocolError, RemoteUnavailable, Unauthenticated
from nbmountd.model import Health


class Event(enum.Enum):
    """What one request, or a person, told."""

    ANSWER = enum.auto()
    """The remote answered, be it with "no"."""
    TROUBLE = enum.auto()
    """No answer, or one that excuses itself (5xx, 429), or one that makes no sense."""
    LOST = enum.auto()
    """`LOST_AFTER` troubles with no answer in between, or the first connection failed."""
    REFUSED = enum.auto()
    """The credential was refused."""
    CREDENTIAL = enum.auto()
    """There is another credential."""


LIVE, DEGRADED, OFFLINE, UNAUTHENTICATED = Health.LIVE, Health.DEGRADED, Health.OFFLINE, Health.UNAUTHENTICATED

TRANSITIONS: dict[Health, dict[Event, Health]] = {
    LIVE: {
        Event.ANSWER: LIVE,
        Event.TROUBLE: DEGRADED,
        Event.LOST: OFFLINE,
        Event.REFUSED: UNAUTHENTICATED,
        Event.CREDENTIAL: LIVE,
    },
    DEGRADED: {
        Event.ANSWER: LIVE,
        Event.TROUBLE: DEGRADED,
        Event.LOST: OFFLINE,
        Event.REFUSED: UNAUTHENTICATED,
        Event.CREDENTIAL: DEGRADED,
    },
    OFFLINE: {
        Event.ANSWER: LIVE,
        Event.TROUBLE: OFFLINE,
        Event.LOST: OFFLINE,
        Event.REFUSED: UNAUTHENTICATED,
        Event.CREDENTIAL: OFFLINE,
    },
    # Answers and troubles of requests that were sent with the old credential change nothing: only another one helps.
    UNAUTHENTICATED: {
        Event.ANSWER: UNAUTHENTICATED,
        Event.TROUBLE: UNAUTHENTICATED,
        Event.LOST: UNAUTHENTICATED,
        Event.REFUSED: UNAUTHENTICATED,
        Event.CREDENTIAL: OFFLINE,
    },
}

LOST_AFTER = 3
"""A guess. Being wrong costs one probe, which is sent at once."""


def event_of(error: RemoteError | None) -> Event:
    if isinstance(error, Unauthenticated):
        return Event.REFUSED
    if isinstance(error, (RemoteUnavailable, RemoteProtocolError)):
        return Event.TROUBLE
    return Event.ANSWER


class HealthState:
    """Health now, since when and why. A new remote is offline until it answers."""

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self.health = OFFLINE
        self.reason = "not asked yet"
        """A sentence for a person; empty when live."""
        self.asked = False
        """Whether it was ever told how the remote is; until then it is offline only by caution."""
        self._wall_clock = wall_clock
        self.since = wall_clock()
        """Seconds since 1970."""
        self._troubles = 0
        self._changed = trio.Event()

    def note(self, error: RemoteError | None) -> None:
        """What a request ended with, None for success."""
        event = event_of(error)
        if event is Event.ANSWER:
            self._troubles = 0
        elif isinstance(error, RemoteUnavailable):
            self._troubles += 1
            if self._troubles >= LOST_AFTER:
                event = Event.LOST
        self.apply(event, str(error or ""))

    def apply(self, event: Event, reason: str) -> None:
        """The only place where health changes. `reason` is dropped when live, and when it is nothing new."""
        self.asked = True
        health = TRANSITIONS[self.health][event]
        if health is self.health and (event is Event.ANSWER or health is UNAUTHENTICATED):
            return
        self.reason = "" if health is LIVE else reason
        if health is self.health:
            return
        self.health, self.since = health, self._wall_clock()
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def wait_change(self) -> Health:
        """Returns the new health at its next change."""
        await self._changed.wait()
        return self.health
