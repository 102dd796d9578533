"""What is parked: kept, shown, and not sent until a person, another change of the file or a cure on the remote helps.

What the remote denied (403) may be allowed there some day, and nobody tells us. So one piece of that work at a time is tried
again now and then, a small one first and each in turn, while it stays parked; when one gets through, all the others may
go. It knows neither steps nor when they run (engine.py).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from nbmountd.disk.database import Node
from nbmountd.fs.nodes import Nodes

FIRST_TRIAL, LAST_TRIAL = 300.0, 3600.0
"""Seconds between two trials: doubling, with jitter. Each may send a whole file for nothing."""


@dataclass
class Parked:
    """Work that is parked. `number` counts parkings since the start, 0 if an earlier worker parked it; `changed_at` is the
    node's then, None if not looked at yet; `trials` None if no trial would help."""

    error: str
    at: float
    number: int = 0
    changed_at: float | None = None
    trials: int | None = 0


class Parking:
    """The parked work of one mount, by inode. Times of trials are trio's clock, others are seconds since 1970."""

    def __init__(self, nodes: Nodes, chance: random.Random) -> None:
        self._nodes = nodes
        self._chance = chance
        self.count = 0
        """How often something was parked since the start."""
        rows = nodes.database.connection.execute("SELECT ino, error, at FROM work WHERE parked")
        self._parked = {ino: Parked(error, at) for ino, error, at in rows}
        self._trial: int | None = None
        """What is being tried, although it is parked."""
        self._next_trial = 0.0
        self._pause = FIRST_TRIAL

    def __contains__(self, ino: int) -> bool:
        return ino in self._parked

    def error(self, ino: int) -> str | None:
        """Why it is parked; None if it is not."""
        parked = self._parked.get(ino)
        return parked.error if parked else None

    def items(self) -> list[tuple[Node, Parked]]:
        """All that is parked and has still something to send."""
        found = []
        for ino, parked in list(self._parked.items()):
            node = self._nodes.database.get(ino)
            if node is None or not node.to_send:
                del self._parked[ino]
            else:
                found.append((node, parked))
        return found

    def park(self, node: Node, error: str, *, may_be_cured: bool, clock: float) -> None:
        now = self._nodes.now()[1]
        self.count += 1
        if may_be_cured and self.next_trial == float("inf"):
            self._pause = FIRST_TRIAL
            self._next_trial = clock + self._jitter()
        self._parked[node.ino] = Parked(error, now, self.count, node.changed_at, 0 if may_be_cured else None)
        with self._nodes.database.transaction() as change:
            change.execute(
                "INSERT INTO work (ino, parked, error, at) VALUES (?, 1, ?, ?)"
                " ON CONFLICT (ino) DO UPDATE SET parked = 1, error = excluded.error, at = excluded.at",
                (node.ino, error, now),
            )

    def unpark(self, ino: int) -> bool:
        """Whether it was parked."""
        if self._parked.pop(ino, None) is None:
            return False
        with self._nodes.database.transaction() as change:
            change.execute("UPDATE work SET parked = 0 WHERE ino = ?", (ino,))
        return True

    def holds(self, ino: int) -> bool:
        """Whether its work stays where it is now."""
        return ino in self._parked and ino != self._trial

    def is_another(self, node: Node) -> bool:
        """Whether parked work has other bytes or another name than when it was parked: then it is worth another try."""
        parked = self._parked[node.ino]
        if parked.changed_at is None:
            parked.changed_at = node.changed_at
        return node.changed_at != parked.changed_at

    def write_error(self, node: Node) -> tuple[int, str] | None:
        """Of a file whose bytes, as they are now, were parked since the start: which parking that was, and why."""
        parked = self._parked.get(node.ino)
        if parked is None or not parked.number or not node.unsent or self.is_another(node):
            return None
        return parked.number, parked.error

    # -- trials -------------------------------------------------------------------------------------------------------

    def begin_trial(self, clock: float) -> None:
        """Lets one go if it is time for that."""
        if clock < self._next_trial or not (curable := self._curable()):
            return
        trials, _, self._trial = min(curable)
        self._parked[self._trial].trials = trials + 1
        self._next_trial = clock + self._jitter()
        self._pause = min(LAST_TRIAL, 2 * self._pause)

    @property
    def next_trial(self) -> float:
        """When to call that again; inf if there is nothing to be tried."""
        return self._next_trial if any(each.trials is not None for each in self._parked.values()) else float("inf")

    def _curable(self) -> list[tuple[int, int, int]]:
        """(trials, size, inode): the first in order is tried next."""
        return [(parked.trials, node.size, node.ino) for node, parked in self.items() if parked.trials is not None]

    def try_soon(self) -> None:
        """The remote may be another by now."""
        self._next_trial, self._pause = 0.0, FIRST_TRIAL

    def failed(self, ino: int, *, may_be_cured: bool) -> None:
        """A trial did not get through: all is as before, and only time will tell."""
        self._trial = None
        if not may_be_cured:
            self._parked[ino].trials = None

    def cured(self, ino: int) -> list[int]:
        """A trial got through: that, and what may now be tried as well."""
        self._trial = None
        return [ino, *(curable for *_, curable in self._curable())]

    def _jitter(self) -> float:
        return self._pause * self._chance.uniform(0.8, 1.2)
