"""Opens the state directory of one mount: lock, database, journal, contents, and the recovery from whatever happened before.

What cannot be read is quarantined (quarantine.py) with all unsent bytes, never deleted, said in one log line; then everything
starts anew. It does not know what is in the files.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nbmountd.disk.content import ContentStore
from nbmountd.disk.database import Database, UnreadableDatabaseError, is_damage
from nbmountd.disk.journal import Journal
from nbmountd.disk.quarantine import put_aside
from nbmountd.errors import StateError
from nbmountd.log import get_logger

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_log = get_logger(__name__)


@dataclass(frozen=True)
class State:
    """What is open of one state directory. Closed with `close`."""

    database: Database
    journal: Journal
    store: ContentStore

    def close(self) -> None:
        self.store.close()
        self.database.close()
        self.journal.close()


def open_state(state: Path, cache: Path, reserve: Callable[[int], None], *, boot_id: str | None = None, **limits: int) -> State:
    """The recovered state of a mount. Raises StateError when another daemon has it, or when the disk refuses.

    `boot_id` names the time since the machine was started; None asks the kernel. `limits` are ContentStore's.
    """
    if boot_id is None:
        boot_id = _boot_id()
    try:
        return _open(state, cache, reserve, boot_id, limits)
    except UnreadableDatabaseError as exc:
        kept = put_aside(state)
        _log.error("the state could not be read and was put aside with all unsent bytes; starting anew", kept=kept, cause=exc)
    return _open(state, cache, reserve, boot_id, limits)


def _open(state: Path, cache: Path, reserve: Callable[[int], None], boot_id: str, limits: dict[str, int]) -> State:
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    database = Database(state / "nodes.db")
    try:
        before = database.get_meta("boot_id")
        power_lost = before is not None and (before != boot_id or not boot_id)
        if power_lost:
            database.check()
        journal = Journal(state / "journal")
        store = ContentStore(database, journal, state, cache, reserve, **limits)
        store.recover(power_lost=power_lost, boot_id=boot_id)
    except BaseException as exc:
        database.close()
        if is_damage(exc):
            raise UnreadableDatabaseError(f"{state / 'nodes.db'} is damaged: {exc}") from exc
        if isinstance(exc, (sqlite3.Error, OSError)):
            raise StateError(f"{state} cannot be used: {exc}") from exc
        raise
    return State(database, journal, store)


def _boot_id() -> str:
    """Empty where the kernel does not tell: then each start may be one after a loss of power."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""
