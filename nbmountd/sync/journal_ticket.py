"""What is remembered of an upload over restarts: which layers went out, and how far an upload in parts had come.

An answer that never came leaves the question whether the remote has those bytes. So the number of the newest layer of a
snapshot is noted before it is sent; while that is open, the layers up to there stay as they were (later writes go to
another one), so that the remote's bytes can be compared with exactly what was sent. It knows no remote.
"""

from __future__ import annotations

import trio

from nbmountd.disk.database import Database, Transaction


def begun(database: Database, ino: int) -> int | None:
    """The newest layer of the last upload that was begun and not confirmed; None: none is open."""
    row = database.connection.execute("SELECT token FROM work WHERE ino = ?", (ino,)).fetchone()
    layer = (row[0] or "").partition(":")[0] if row else ""
    return int(layer) if layer.isdigit() else None


def all_begun(database: Database) -> dict[int, int]:
    """Inode -> newest layer, of every upload that is open."""
    rows = database.connection.execute("SELECT ino, token FROM work WHERE token IS NOT NULL").fetchall()
    pairs = ((ino, token.partition(":")[0]) for ino, token in rows)
    return {ino: int(layer) for ino, layer in pairs if layer.isdigit()}


class JournalTicket:
    """Remembers an upload's token in the database, for the snapshot whose newest layer is `layer`, of one node."""

    def __init__(self, database: Database, layer: int, ino: int) -> None:
        self._database = database
        self._key = f"{layer}:"
        self._ino = ino
        row = database.connection.execute("SELECT token FROM work WHERE ino = ?", (ino,)).fetchone()
        stored = row[0] if row else None
        self._token = stored[len(self._key) :] or None if stored and stored.startswith(self._key) else None

    @property
    def token(self) -> str | None:
        return self._token

    def begin(self, change: Transaction) -> None:
        """Notes that these layers are being sent."""
        if self._token is None:
            self._store("", change)

    async def remember(self, token: str) -> None:
        """Durably stores `token`: a loss of power does not cost the parts that were sent."""
        self._token = token
        with self._database.transaction() as change:
            self._store(token, change)
        await trio.to_thread.run_sync(self._database.sync, self._database.commits)

    def _store(self, token: str, change: Transaction) -> None:
        change.execute(
            "INSERT INTO work (ino, token) VALUES (?, ?) ON CONFLICT (ino) DO UPDATE SET token = excluded.token",
            (self._ino, self._key + token),
        )
