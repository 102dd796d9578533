"""SQLite with both kinds of journal, from two processes at once, through every transaction it has."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounted.conftest import Rig
from tests.mounted.programs.conftest import LIMIT, sized

WRITER = """if True:
    import sqlite3, sys
    path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    database = sqlite3.connect(path, timeout=60, isolation_level=None)
    for number in range(count):
        database.execute("BEGIN IMMEDIATE")
        database.execute("INSERT INTO entries VALUES (?, ?, ?)", (name, number, "x" * (number * 37 % 2000)))
        if number % 10 == 9:
            database.execute("DELETE FROM entries WHERE name = ? AND number = ?", (name, number - 5))
        database.execute("ROLLBACK" if number % 7 == 6 else "COMMIT")
    database.close()
"""


def open_database(path: Path) -> contextlib.closing[sqlite3.Connection]:
    return contextlib.closing(sqlite3.connect(path, timeout=60, isolation_level=None))


@pytest.mark.parametrize("journal", ["delete", "truncate", "persist", "wal"])
def test_two_processes_write_and_the_database_is_whole(folder: Rig, journal: str) -> None:
    path = folder.mount / "data.db"
    count = sized(30, 5000)
    with open_database(path) as database:
        assert database.execute(f"PRAGMA journal_mode = {journal}").fetchone() == (journal,)
        database.execute("CREATE TABLE entries (name TEXT, number INTEGER, filling TEXT, PRIMARY KEY (name, number))")

    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, name, str(count)]) for name in ("one", "two")]
    for writer in writers:
        assert writer.wait(LIMIT) == 0

    kept = [number for number in range(count) if number % 7 != 6]
    deleted = {number - 5 for number in kept if number % 10 == 9}
    with open_database(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        found = database.execute("SELECT name, number, length(filling) FROM entries ORDER BY 1, 2").fetchall()
        if journal == "wal":
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert found == [(name, n, n * 37 % 2000) for name in ("one", "two") for n in kept if n not in deleted]

    folder.daemon.sync(folder.mount)
    with open_database(folder.root / "data.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("SELECT count(*) FROM entries").fetchone() == (len(found),)


def test_a_vacuum_makes_the_file_smaller_and_loses_nothing(folder: Rig) -> None:
    with open_database(folder.mount / "data.db") as database:
        database.execute("CREATE TABLE blobs (content BLOB)")
        database.executemany("INSERT INTO blobs VALUES (randomblob(?))", [(20_000,)] * 100)
        database.execute("DELETE FROM blobs WHERE rowid % 2")
        before = (folder.mount / "data.db").stat().st_size
        database.execute("VACUUM")

        assert (folder.mount / "data.db").stat().st_size < before
        assert database.execute("SELECT count(*), sum(length(content)) FROM blobs").fetchone() == (50, 1_000_000)
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_reading_by_memory_map_sees_what_was_written(folder: Rig) -> None:
    with open_database(folder.mount / "data.db") as writer, open_database(folder.mount / "data.db") as reader:
        reader.execute("PRAGMA mmap_size = 268435456")
        writer.execute("CREATE TABLE numbers (n INTEGER)")
        for number in range(30):
            writer.execute("INSERT INTO numbers VALUES (?)", (number,))
            assert reader.execute("SELECT count(*) FROM numbers").fetchone() == (number + 1,)
