"""How many changes at once are good for a remote: more while its answers stay as quick as they were, fewer when it complains.

Pure; it knows no remote and no task. Where an answer takes 50 ms whatever is asked, more requests at once are as many times the
speed; where the server's processor is the limit, they only make each slower. So the limit goes up by one for a round of answers
that came in the usual time while somebody waited for a connection, comes down when they take much longer, and is halved, once a
round, when the server says that it is too much (429, 503), breaks connections or does not answer in time.
"""

from __future__ import annotations

START = 6
"""Changes at once before anything is known; slow answers bring it down to that again, and complaints below."""
LEAST = 2
QUICK, SLOW = 1.5, 3.0
"""Times of what is usual up to which answers came quickly, and from which on they are slow."""
AGEING = 1.002
"""So much longer becomes what is usual with each slower answer: a line that is longer for good is usual after a while."""


class Parallel:
    """The limit of one remote; `most` is what is allowed."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.limit = min(most, START)
        """Changes at once, now."""
        self._usual: dict[str, float] = {}
        """Verb -> seconds that its quickest answers take."""
        self._slowness = 1.0
        """Seconds of the last answers, as a multiple of what is usual."""
        self._round = self._wanted = 0
        """Answers since the limit was looked at, and those of them that came while somebody waited."""
        self._complained = False

    def allow(self, most: int) -> None:
        """Another number is allowed from now on."""
        if most != self._most:
            self._most = most
            self.limit = min(most, START)

    def answered(self, verb: str, seconds: float, *, wanted: bool) -> None:
        """A small request was answered. `wanted`: somebody waits for its connection."""
        usual = self._usual[verb] = min(seconds, self._usual.get(verb, seconds) * AGEING)
        self._slowness += (seconds / max(usual, 0.001) - self._slowness) / 8
        self._round += 1
        self._wanted += wanted
        if self._round < self.limit:
            return
        if self._slowness > SLOW and self.limit > START:
            self.limit = max(START, self.limit * 3 // 4)
        elif self._slowness < QUICK and self._wanted * 2 > self._round:
            self.limit = min(self._most, self.limit + 1)
        self._round = self._wanted = 0
        self._complained = False

    def complained(self) -> None:
        """A request came to nothing that the server should have answered."""
        if not self._complained:
            self.limit = min(self._most, max(LEAST, self.limit // 2))
            self._round = self._wanted = 0
            self._complained = True
