"""Remembers, over restarts, which steps were begun and never heard to have ended, and what each aimed at.

Such a step may have been carried out. As long as nobody has asked the remote, its node is kept even without a name, a listing
says nothing of the name that it aimed at, and no other step goes there. It knows neither steps nor a remote.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from nbmountd.disk.database import Database, Transaction

UPLOAD, MAKE, MOVE, ATTRIBUTES = "upload", "make", "move", "attributes"


@dataclass(frozen=True, slots=True)
class Doubt:
    """A step for node `ino` that was to bring it to `name` in the directory `parent`, or to change it there.

    `version` is that of the file which an upload was to replace there, None if there was none; `layer` the newest layer that
    went along, 0 if none.
    """

    ino: int
    kind: str
    parent: int
    name: str
    version: str | None = None
    layer: int = 0


class Doubts:
    """The open questions of one mount, by inode."""

    def __init__(self, database: Database) -> None:
        self._database = database
        rows = database.connection.execute("SELECT ino, kind, parent, name, version, layer FROM doubts").fetchall()
        self._open = {row[0]: Doubt(row[0], row[1], row[2], os.fsdecode(row[3]), row[4], row[5]) for row in rows}

    def __contains__(self, ino: int) -> bool:
        return ino in self._open

    def get(self, ino: int) -> Doubt | None:
        return self._open.get(ino)

    def all(self) -> list[Doubt]:
        return list(self._open.values())

    def names(self, parent: int) -> set[str]:
        """Names in a directory that may mean what one of our steps made of them."""
        return {doubt.name for doubt in self._open.values() if doubt.parent == parent}

    def begin(self, doubt: Doubt, *others: Callable[[Transaction], None]) -> None:
        """To be called before the step is sent. Raises sqlite3.Error: then it must not be sent. `others` note what else belongs
        to the same transaction."""
        known = self._open.get(doubt.ino) == doubt
        if known and not others:
            return
        with self._database.transaction() as change:
            if not known:
                change.execute(
                    "INSERT OR REPLACE INTO doubts (ino, kind, parent, name, version, layer) VALUES (?, ?, ?, ?, ?, ?)",
                    (doubt.ino, doubt.kind, doubt.parent, os.fsencode(doubt.name), doubt.version, doubt.layer),
                )
            for other in others:
                other(change)
        self._open[doubt.ino] = doubt

    def end(self, ino: int) -> None:
        """It is known what became of the node's step."""
        if ino in self._open:
            with self._database.transaction() as change:
                change.execute("DELETE FROM doubts WHERE ino = ?", (ino,))
            del self._open[ino]
