"""Faults on order: each is used for the next `times` requests whose "METHOD PATH" its pattern finds.

lose-before  the connection closes, nothing was done      lose-after  it was done, and the connection closes
nothing      200 and an id, but nothing was done           status      `status` with `body` (`gx`: as the service itself)
delay        waits `seconds`, then goes on
cut          a download ends after `count` bytes            drip        ... and goes on after `release`
trickle      a download goes on after `count` bytes by 1 MiB each `seconds`, and freely after `release`
truncate     only `count` bytes of an upload are stored    race        somebody makes a folder with that name just before
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Hook:
    pattern: str
    action: str
    times: int = 1
    status: int = 500
    body: str = ""
    gx: str = ""
    """`exceptionClass` of the answer; empty: no body of the service's own."""
    count: int = 0
    seconds: float = 0.0
    name: str = ""
    user: str = ""
    """Only requests of this user, if given."""
    released: threading.Event = field(default_factory=threading.Event)


class Hooks:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hooks: list[Hook] = []

    def add(self, values: dict[str, Any]) -> None:
        with self._lock:
            self._hooks.append(Hook(**values))

    def clear(self) -> None:
        with self._lock:
            for hook in self._hooks:
                hook.released.set()
            self._hooks.clear()

    def release(self) -> None:
        """Ends all waiting."""
        with self._lock:
            for hook in self._hooks:
                hook.released.set()

    def take(self, request: str, user: str) -> Hook | None:
        """The first hook that is for this request; it is used up by one."""
        with self._lock:
            for hook in self._hooks:
                if hook.times > 0 and hook.user in ("", user) and re.search(hook.pattern, request):
                    hook.times -= 1
                    return hook
        return None
